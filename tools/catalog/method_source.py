"""What the site shows of a module, read from its text: parts of the docstring, Config fields, public functions.

The text is parsed, never imported, so that the site builds without torch.
"""
from __future__ import annotations

import ast
import doctest
import io
import re
import tokenize
from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    name: str
    type: str
    default: str | None
    comment: str


@dataclass(frozen=True)
class Function:
    name: str
    signature: str
    doc: str


@dataclass(frozen=True)
class MapRow:
    """`where` in the paper, `what` it says, and the `names` in the code that do it."""
    where: str
    what: str
    names: list[str]


@dataclass(frozen=True)
class ModuleSource:
    text: str
    doc: str                          # the docstring, whole
    sections: dict[str, str]          # "Idea" -> its text, "Map" -> its lines without their indent
    config: list[Field]
    functions: list[Function]
    lines: dict[str, int]             # what it defines, by `definitions`

    @property
    def map(self) -> list[MapRow]:
        """Columns stand two or more spaces apart; a line of a single column continues the one before."""
        rows: list[MapRow] = []
        for line in self.sections.get("Map", "").splitlines():
            where, *middle = re.split(r"\s{2,}", line.strip())
            if middle:
                rows.append(MapRow(where, "; ".join(middle[:-1]), re.findall(r"[\w.]+", middle[-1])))
            elif where and rows:
                last = rows.pop()
                rows.append(MapRow(last.where, f"{last.what} {where}", last.names))
        return rows

    @property
    def departures(self) -> list[str]:
        """One item for every sentence that begins a line."""
        items: list[str] = []
        for line in filter(None, map(str.strip, self.sections.get("Departures", "").splitlines())):
            if not items or re.search(r"[.!?]\)?$", items[-1]):
                items.append(line)
            else:
                items[-1] += " " + line
        return items

    @property
    def example(self) -> str:
        """The doctest as plain code, its output as comments."""
        lines = []
        for example in doctest.DocTestParser().get_examples(self.sections.get("Example", "")):
            lines += [example.source.rstrip("\n"), *(f"# {line}" for line in example.want.splitlines())]
        return "\n".join(lines)


def parse(text: str) -> ModuleSource:
    """Raises SyntaxError."""
    tree = ast.parse(text)
    doc = ast.get_docstring(tree) or ""
    config = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"), None)
    functions = [Function(node.name, _signature(node), ast.get_docstring(node) or "") for node in tree.body
                 if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return ModuleSource(text, doc, _sections(doc), _fields(config, text) if config else [], functions, definitions(tree))


def definitions(tree: ast.Module | ast.ClassDef) -> dict[str, int]:
    """What a module defines, and its classes: "apply", "OFF" or "_Merge.image" -> line."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}": line for name, line in definitions(node).items()}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id: node.lineno for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def _sections(doc: str) -> dict[str, str]:
    """`Idea: text` up to a blank line, and one-word headings above an indented part."""
    found: dict[str, list[str]] = {}
    current = None
    for line in doc.splitlines():
        if match := re.fullmatch(r"Idea:\s*(.*)|([A-Z][a-z]+):?", line):
            current = match[2] or "Idea"
            found[current] = [match[1] or ""]
        elif current and (not line or line.startswith(" ") or (current == "Idea" and found["Idea"][-1])):
            found[current].append(line)
        else:
            current = None
    return {name: _dedent(lines) for name, lines in found.items()}


def _dedent(lines: list[str]) -> str:
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[indent:] for line in lines).strip("\n")


def _fields(config: ast.ClassDef, text: str) -> list[Field]:
    comments = {token.start[0]: token.string.lstrip("# ")
                for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT}
    nodes = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    ends = [node.lineno for node in config.body[1:]] + [config.end_lineno + 1]
    following = dict(zip([id(node) for node in config.body], ends, strict=True))
    fields = []
    for node in nodes:
        said = [comments[line] for line in range(node.lineno, following[id(node)]) if line in comments]
        fields.append(Field(node.target.id, ast.unparse(node.annotation),
                            ast.unparse(node.value) if node.value else None, " ".join(said)))
    return fields


def _signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"
