"""The code of one checkout, read by AST: which file a module is, what a file imports. Nothing is executed."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from accel_tools.catalog.entries import ROOT

FOLDERS = {"methods": "methods", "accel_kernels": "kernels"}      # import name -> folder


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements, at any depth; expressions are not entered, which makes it several times faster than ast.walk."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(tree, name, ()):
            yield node
            yield from statements(node)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), str(path))


class Source:
    """Parsed modules of one checkout; what is derived from them is kept, the last few trees too."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.tree = lru_cache(maxsize=32)(_parse)                 # raises SyntaxError
        self._imports: dict[Path, list[tuple[int, str]]] = {}

    def path(self, module: str) -> Path | None:
        """File of a module of this repository, or None for anything else."""
        head, *rest = module.split(".")
        if head not in FOLDERS:
            return None
        stem = self.root.joinpath(FOLDERS[head], *rest)
        for candidate in (stem.with_suffix(".py"), stem / "__init__.py"):
            if rest and candidate.is_file():
                return candidate
        return None

    def imports(self, path: Path) -> list[str]:
        """Modules that a file imports, anywhere in it, once each; `from a import b` gives a.b if that is a module, else a."""
        return list(dict.fromkeys(module for _, module in self.import_lines(path)))

    def import_lines(self, path: Path) -> list[tuple[int, str]]:
        """Line and module of every import."""
        if path not in self._imports:
            found = []
            for node in statements(self.tree(path)):
                if isinstance(node, ast.Import):
                    found += [(node.lineno, alias.name) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    base = self.absolute(path, node)
                    for alias in node.names:
                        full = f"{base}.{alias.name}"
                        found.append((node.lineno, full if self.path(full) or base in FOLDERS else base))
            self._imports[path] = found
        return self._imports[path]

    def absolute(self, path: Path, node: ast.ImportFrom) -> str:
        """The module that `from ... import` of a file names."""
        if not node.level:
            return node.module or ""
        package = list(path.relative_to(self.root).parent.parts)
        package = package[: len(package) - node.level + 1]
        package[:1] = [name for name, folder in FOLDERS.items() if package[:1] == [folder]]
        return ".".join([*package, *([node.module] if node.module else [])])

    def closure(self, path: Path) -> list[Path]:
        """The file and all files of this repository that it imports, sorted."""
        seen, todo = set(), [path]
        while todo:
            if (current := todo.pop()) not in seen:
                seen.add(current)
                todo += [found for name in self.imports(current) if (found := self.path(name))]
        return sorted(seen)
