"""YAML that remembers lines: safe, duplicate keys refused, every plain scalar a string.

Numbers, booleans and dates are left to the schema, so an arXiv id such as `2401.00010` never loses its last zero.
"""
from __future__ import annotations

from typing import NamedTuple

import yaml

_Safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "null", "seq", "map")}

Path = tuple[str | int, ...]


class Problem(NamedTuple):
    """One finding: `file` is relative to the repository root, `line` counts from 1."""
    file: str
    line: int
    message: str
    level: str = "error"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


class _Loader(_Safe):
    """Resolves only null; every other plain scalar stays a string."""
    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in pairs if tag.endswith(":null")]
        for first, pairs in _Safe.yaml_implicit_resolvers.items()
    }


def parse(text: str | bytes, file: str) -> tuple[object, dict[Path, int], list[Problem]]:
    """Data, line of every key path, and problems. The data is None when there are problems."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        node = yaml.compose(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        return None, {}, [Problem(file, 1, f"not UTF-8: byte {error.start} cannot be decoded")]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        return None, {}, [Problem(file, mark.line + 1 if mark else 1, f"not valid YAML: {reason}; look here and in "
                                   "the line above for a colon, a quote, a bracket or an indent")]
    except RecursionError:
        return None, {}, [Problem(file, 1, "not valid YAML: nested too deeply")]
    lines: dict[Path, int] = {(): 1}
    problems: list[Problem] = []
    seen: set[int] = set()

    def build(node: yaml.Node, path: Path):
        line = node.start_mark.line + 1
        lines.setdefault(path, line)
        if node.tag not in _TAGS:
            problems.append(Problem(file, line, f"tag {node.tag!r} is not allowed; write plain YAML"))
        if id(node) in seen:
            problems.append(Problem(file, line, "anchors and aliases are not allowed; write the value out"))
            return None
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            return None if node.tag.endswith(":null") else node.value
        if isinstance(node, yaml.SequenceNode):
            return [build(item, (*path, i)) for i, item in enumerate(node.value)]
        mapping = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                problems.append(Problem(file, at, "a key must be a plain word"))
                continue
            if key.value in mapping:
                first = lines[(*path, key.value)]
                problems.append(Problem(file, at, f"key {key.value!r} stands twice (first on line {first}); keep one"))
                continue
            lines[(*path, key.value)] = at
            mapping[key.value] = build(value, (*path, key.value))
        return mapping

    try:
        data = build(node, ()) if node is not None else None
    except RecursionError:
        return None, {}, [Problem(file, 1, "not valid YAML: nested too deeply")]
    return (None if problems else data), lines, problems


def line_of(lines: dict[Path, int], path: Path) -> int:
    """Line of the longest known prefix of `path`."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)
