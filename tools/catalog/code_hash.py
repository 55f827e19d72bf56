"""The code of a method as the bench sees it: a hash that changes when behaviour may, and not with comments.

    code_hash("tome") -> "sha256:..." of the method and of every module of this repository that it imports
"""
from __future__ import annotations

import ast
import hashlib
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
        self._digests: dict[Path, str] = {}
        self._imports: dict[Path, list[str]] = {}

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
        """Modules that a file imports, anywhere in it; `from a import b` gives a.b if that is a module, else a."""
        if path not in self._imports:
            found = []
            for node in statements(self.tree(path)):
                if isinstance(node, ast.Import):
                    found += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    base = self._absolute(path, node)
                    for alias in node.names:
                        full = f"{base}.{alias.name}"
                        found.append(full if self.path(full) or base in FOLDERS else base)
            self._imports[path] = list(dict.fromkeys(found))
        return self._imports[path]

    def _absolute(self, path: Path, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = list(path.relative_to(self.root).parent.parts)
        package = package[: len(package) - node.level + 1]
        package[:1] = [name for name, folder in FOLDERS.items() if package[:1] == [folder]]
        return ".".join([*package, *([node.module] if node.module else [])])

    def digest(self, path: Path) -> str:
        if path not in self._digests:
            tree = ast.parse(ast.unparse(self.tree(path)))        # a copy without positions
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) \
                        and ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
            self._digests[path] = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
        return self._digests[path]

    def closure(self, path: Path) -> list[Path]:
        """The file and all files of this repository that it imports, sorted."""
        seen, todo = set(), [path]
        while todo:
            if (current := todo.pop()) not in seen:
                seen.add(current)
                todo += [found for name in self.imports(current) if (found := self.path(name))]
        return sorted(seen)

    def code_hash(self, slug: str) -> str:
        path = self.path(f"methods.{slug}")
        if path is None:
            raise FileNotFoundError(f"methods/{slug}.py")
        parts = [f"{file.relative_to(self.root).as_posix()} {self.digest(file)}" for file in self.closure(path)]
        return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def code_hash(slug: str, root: Path = ROOT) -> str:
    """Raises FileNotFoundError when there is no such method and SyntaxError when a file does not parse."""
    return Source(root).code_hash(slug)
