"""The code of a method as the bench sees it: a hash of the definitions it reaches, which changes when behaviour may.

    code_hash("tome") -> "sha256:..."

Reached is what the method offers (its `__all__`), and from there every definition of this repository whose name is
mentioned, at any depth of imports. A class counts with its attributes; a method of it counts once its name is mentioned,
as an attribute or in a string, by anything reached. All methods count where the class has a base from elsewhere, for whoever
made that base calls them. What a module does to another definition by being imported, such as a registration, counts with
that definition. Of the rows of model families, which nothing names, those of the measured models count. Comments, docstrings,
what nothing reaches, and the file in which a definition stands do not count.
"""
from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from accel_tools.catalog.entries import ROOT
from accel_tools.catalog.source import Source, statements

Function = ast.FunctionDef | ast.AsyncFunctionDef
PLAIN_BASES = {"object", "NamedTuple", "typing.NamedTuple", "ABC", "abc.ABC", "Protocol", "Exception", "ValueError"}
CALLED = {"report", "forward", "step", "set_timesteps"}          # by the bench and by pipelines, on what a method hands them
MEASURED = ("unet", "dit", "sd3", "cogvideox")   # rows of the models that results are measured on
EVERY = "*"                                      # a name made at run time: it may be that of any method


class Piece:
    """What is hashed whole: a statement at the top of a module, a class without its methods, or a method.

    `names` and `words` are what it mentions: names, dotted as they stand, and what may be looked up on an object.
    """

    def __init__(self, name: str, node: ast.stmt):
        self.name = name                         # "PLAN", "Config", "Patch.remove"
        self.node = node
        self.methods: list[Piece] = []           # of a class
        self.bases: list[str] = []

    @cached_property
    def _read(self) -> tuple[str, set[str], set[str]]:
        tree = ast.parse(ast.unparse(self.node))                      # a copy
        for node in ast.walk(tree):
            if isinstance(node, Function | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        names, words, todo = set(), set(), [tree]
        while todo:
            node = todo.pop()
            if dotted := _dotted(node):
                names.add(dotted)
                words.update(dotted.split(".")[1:])
                continue
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                words.add(node.value)
            elif isinstance(node, ast.Call) and _dotted(node.func) == "getattr" \
                    and isinstance(node.args[1], ast.JoinedStr | ast.BinOp):
                words.add(EVERY)
            todo += ast.iter_child_nodes(node)
        return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), names, words

    digest = property(lambda self: self._read[0])
    names = property(lambda self: self._read[1])
    words = property(lambda self: self._read[2])


class Module:
    """The pieces of one file by name, what its imports name, and what it does beyond defining."""

    def __init__(self, source: Source, path: Path):
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        self.imports: dict[str, list[tuple[str, str | None]]] = defaultdict(list)     # name -> (module, name in it or None)
        self.effects: dict[str | None, list[Piece]] = defaultdict(list)               # None: when anything here is reached
        tree = source.tree(path)
        for node in statements(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.split(".")[0]
                    self.imports[name].append((alias.name if alias.asname else name, None))
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.imports[alias.asname or alias.name].append((source.absolute(path, node), alias.name))
        for node in tree.body:
            self._add(node)
        self.offered = self._offered(tree)

    def _add(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        names = _bound(node)
        piece = _class(node) if isinstance(node, ast.ClassDef) else Piece(", ".join(names), node)
        for name in names:
            self.pieces[name].append(piece)
        for owner in self._owners(node):
            self.effects[owner].append(piece)

    def _owners(self, node: ast.stmt) -> Iterator[str | None]:
        """Whose behaviour a statement changes by being run: names of this module, or None for the module as such."""
        if isinstance(node, Function | ast.ClassDef):
            heads = [each for each in node.decorator_list if "register" in ast.unparse(each)]
        elif isinstance(node, ast.Expr):
            heads = [node.value]
        else:
            heads = [target for each in [node, *statements(node)] for target in _targets(each)
                     if isinstance(target, ast.Attribute | ast.Subscript)]
            heads += [each for each in statements(node) if isinstance(each, ast.Expr)]
        for head in heads:
            while isinstance(head, ast.Attribute | ast.Subscript | ast.Call):
                head = head.func if isinstance(head, ast.Call) else head.value
            yield head.id if isinstance(head, ast.Name) and head.id in self.pieces else None

    def _offered(self, tree: ast.Module) -> list[str]:
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
                return [each.value for each in getattr(node.value, "elts", ()) if isinstance(each, ast.Constant)]
        return [name for name in [*self.pieces, *self.imports] if not name.startswith("_")]


class Reached:
    """The pieces that a method reaches."""

    def __init__(self, code: Code, path: Path):
        self.code = code
        self.pieces: set[Piece] = set()
        self.elsewhere: set[str] = set()                              # names that other packages, or other names, stand for
        self._words = set(CALLED)
        self._waiting: dict[str, list[tuple[Path, Piece]]] = defaultdict(list)        # methods, until their name is mentioned
        self._entered: set[Path] = set()
        self._asked: set[tuple[Path, str]] = set()
        self._todo: list[tuple[Path, Piece]] = []
        for name in code.module(path).offered:
            self._reach(path, name)
        self._enter(path)
        for row in MEASURED:                                          # found by looking, not by name
            if found := code.source.path(f"methods._core.families.{row}"):
                self._reach(found, "FAMILY")
        while self._todo:
            self._follow(*self._todo.pop())

    def _enter(self, path: Path) -> None:
        if path not in self._entered:
            self._entered.add(path)
            self._take(path, self.code.module(path).effects[None])

    def _take(self, path: Path, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece not in self.pieces:
                self.pieces.add(piece)
                self._todo.append((path, piece))

    def _follow(self, path: Path, piece: Piece) -> None:
        for name in piece.names:
            self._reach(path, name)
        for word in piece.words - self._words:
            self._words.add(word)
            for of, method in self._waiting.pop(word, ()) if word != EVERY else sum(self._waiting.values(), []):
                self._take(of, [method])
        for method in piece.methods:
            name = method.name.partition(".")[2]
            if name.startswith("__") or name in self._words or EVERY in self._words or self.code.is_open(path, piece):
                self._take(path, [method])
            else:
                self._waiting[name].append((path, method))

    def _reach(self, path: Path, dotted: str) -> None:
        """Take what a name means in a file."""
        if (path, dotted) in self._asked:
            return
        self._asked.add((path, dotted))
        module, (head, *rest) = self.code.module(path), dotted.split(".")
        if head in module.pieces:
            self._enter(path)
            self._take(path, module.pieces[head])
            self._take(path, module.effects[head])
        for base, name in module.imports.get(head, ()):
            self._import(base, name, head, rest)
        if head not in module.pieces and head not in module.imports:
            for base, _ in module.imports.get("*", ()):
                if found := self.code.source.path(base):
                    self._reach(found, dotted)

    def _import(self, base: str, name: str | None, head: str, rest: list[str]) -> None:
        path = self.code.source.path
        full = f"{base}.{name}" if name else base
        while rest and path(f"{full}.{rest[0]}"):                     # down to the last module that the dots name
            full, rest = f"{full}.{rest[0]}", rest[1:]
        if found := path(full):
            self._enter(found)
            for each in [".".join(rest)] if rest else self.code.module(found).offered:
                self._reach(found, each)
        elif name and (found := path(base)):
            self._reach(found, ".".join([name, *rest]))
            if name != head:
                self.elsewhere.add(f"{head} = {name}")
        elif base.split(".")[0] not in ("methods", "accel_kernels"):
            self.elsewhere.add(f"{head} = {full}")


class Code:
    """The definitions of one checkout."""

    def __init__(self, source: Source):
        self.source = source
        self._modules: dict[Path, Module] = {}

    def module(self, path: Path) -> Module:
        """Raises SyntaxError."""
        if path not in self._modules:
            self._modules[path] = Module(self.source, path)
        return self._modules[path]

    def is_open(self, path: Path, piece: Piece) -> bool:
        """Whether a class has a base that does not stand in this repository, directly or through its bases."""
        for base in piece.bases:
            head, module = base.split(".")[0], self.module(path)
            if base in PLAIN_BASES:
                continue
            places = [(path, each) for each in module.pieces.get(base, ())]
            for origin, name in module.imports.get(head, ()):
                if name and (found := self.source.path(origin)):
                    places += [(found, each) for each in self.module(found).pieces.get(name, ())]
            if not places or any(self.is_open(*place) for place in places):
                return True
        return False

    def hash(self, slug: str) -> str:
        """Raises FileNotFoundError when there is no such method and SyntaxError when a file does not parse."""
        path = self.source.path(f"methods.{slug}")
        if path is None:
            raise FileNotFoundError(f"methods/{slug}.py")
        reached = Reached(self, path)
        lines = sorted([f"{piece.name} {piece.digest}" for piece in reached.pieces] + list(reached.elsewhere))
        return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def code_hash(slug: str, root: Path = ROOT) -> str:
    """Raises FileNotFoundError when there is no such method and SyntaxError when a file does not parse."""
    return Code(Source(root)).hash(slug)


def _class(node: ast.ClassDef) -> Piece:
    """A class without its methods, and they."""
    rest = [part for part in node.body if not isinstance(part, Function)] or [ast.Pass()]
    piece = Piece(node.name, ast.ClassDef(node.name, node.bases, node.keywords, rest, node.decorator_list, type_params=[]))
    piece.methods = [Piece(f"{node.name}.{part.name}", part) for part in node.body if isinstance(part, Function)]
    piece.bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
    return piece


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement binds at the top of its module."""
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    found = [name.id for each in [node, *statements(node)] for target in _targets(each)
             for name in ast.walk(target) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
    found += [each.name for each in statements(node) if isinstance(each, Function | ast.ClassDef)]
    return list(dict.fromkeys(found))


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    if isinstance(node, ast.AnnAssign | ast.AugAssign | ast.For):
        return [node.target]
    return [item.optional_vars for item in node.items if item.optional_vars] if isinstance(node, ast.With) else []


def _dotted(node: ast.AST) -> str | None:
    """A name, or `a.b.c` as it stands; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None
