"""Rules of one file of a method, and of its test: what must stand in it and what must not. Read by AST, never imported."""
from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from accel_tools.catalog.entries import Catalog, allowed, entry_file
from accel_tools.catalog.method_source import definitions, parse
from accel_tools.catalog.schema import UNFILLED, Entry, Paper
from accel_tools.catalog.source import FOLDERS, Source, statements
from accel_tools.catalog.yaml_lines import Problem

LONGEST = 300                                     # lines of a file that can be read in one sitting
SECTIONS = ("Idea", "Map", "Departures", "Example")


def syntax_problem(source: Source, path: Path) -> Problem | None:
    try:
        source.tree(path)
    except (SyntaxError, ValueError) as error:
        return Problem(_name(source, path), getattr(error, "lineno", None) or 1, f"does not parse: {error}")
    return None


def module_problems(catalog: Catalog, source: Source, slug: str, entry: Entry | None, path: Path) -> Iterator[Problem]:
    """Problems of the file that a method is, or that its package begins with. `entry` is None where that cannot be read."""
    file, tree = _name(source, path), source.tree(path)
    yield from _docstring_problems(source, entry, file, path)
    if entry:
        kind = catalog.vocab.kind.terms.get(entry.kind)
        names = definitions(tree).keys() | set(imported(source, path))
        for name in ("Config", *([kind.verb] if kind else []), *(["OFF"] if entry.kind == "patch" else [])):
            if name not in names:
                yield Problem(file, 1, f"a method of kind {entry.kind} must define {name!r}")
        yield from _entry_imports(catalog, source, entry, path)


def file_problems(source: Source, slug: str, kind: str | None, path: Path) -> Iterator[Problem]:
    """Problems of any file of a method, whatever its entry says but for the kind."""
    file, text = _name(source, path), path.read_text(encoding="utf-8", errors="replace")
    yield from unfilled(file, text)
    yield from _left_in(file, text, source.tree(path))
    yield from _config_problems(file, source.tree(path), text)
    yield from _untyped(file, source.tree(path))
    if (length := len(text.splitlines())) > LONGEST:
        yield Problem(file, LONGEST + 1, f"has {length} lines; at most {LONGEST} can be read in one sitting: shorten it, or "
                                         "move what other methods need too to methods/_core")
    for line, module in source.import_lines(path):
        head, _, rest = module.partition(".")
        name = rest.split(".")[0]
        if head == "triton":
            yield Problem(file, line, "imports triton; only kernels/_triton may, so that methods run without it")
        if head in ("diffusers", "transformers") and kind in ("patch", "parallel"):
            yield Problem(file, line, f"imports {head}; a {kind} asks methods._core.denoiser for blocks, by what they have")
        if head == "accel_kernels" and name and not name.startswith("_"):
            for needed in (f"kernels/{name}.py", f"kernels/_triton/{name}.py", f"tests/kernels/test_{name}.py"):
                if not (source.root / needed).is_file():
                    yield Problem(file, line, f"imports the kernel {name!r}, but {needed} is missing")


def problems_of_test(source: Source, slug: str, kind: str | None, path: Path) -> Iterator[Problem]:
    """Problems of the test of a method."""
    file, text = _name(source, path), path.read_text(encoding="utf-8", errors="replace")
    yield from unfilled(file, text)
    if problem := syntax_problem(source, path):
        yield problem
        return
    tree = source.tree(path)
    yield from _left_in(file, text, tree)
    if kind == "patch" or (source.root / f"tests/contracts/{kind}.py").exists():
        named = {alias.asname or alias.name.split(".")[0] for node in statements(tree) for alias in getattr(node, "names", ())
                 if isinstance(node, ast.Import | ast.ImportFrom)
                 and (getattr(node, "module", None) or alias.name).startswith("contract")}
        called = {ast.unparse(node.func).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        if not named & called:
            yield Problem(file, 1, "does not call the contract that all methods share: parametrize a test with "
                                   f"contract.cases({slug}, ...), as tests/methods/test_fora.py does")


def unfilled(file: str, text: str) -> Iterator[Problem]:
    """Places that tools/new_entry.py left to be written."""
    for i, line in enumerate(text.splitlines(), 1):
        if UNFILLED in line:
            yield Problem(file, i, "fill in" + line.split(UNFILLED[:-1])[1].rstrip(' "\')'))


def config_fields(tree: ast.Module) -> list[str]:
    config = _config(tree)
    return [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)] if config else []


def docstring_parts(name: str, paper: Paper) -> tuple[str, str, str]:
    """First line, authors, and the rest of the second paragraph of a method's docstring."""
    places = (("arXiv", paper.arxiv), ("OpenReview", paper.openreview), ("doi", paper.doi))
    where = next((f" {label}:{value}." for label, value in places if value), f" {paper.url}." if paper.url else "")
    code = f" Code: {paper.code}" if paper.code else ""
    authors = ", ".join(author.name for author in paper.authors)
    return f"{name} - {paper.title}", authors, f"{paper.venue} {paper.year}.{where}{code}".rstrip(".")


def imported(source: Source, path: Path) -> dict[str, str]:
    """Name -> the module, or the name in a module, that a file's imports give it."""
    found = {}
    for node in statements(source.tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{source.absolute(path, node)}.{alias.name}" for alias in node.names}
    return found


def _name(source: Source, path: Path) -> str:
    return path.relative_to(source.root).as_posix()


def _config(tree: ast.Module) -> ast.ClassDef | None:
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)


def _docstring_problems(source: Source, entry: Entry | None, file: str, path: Path) -> Iterator[Problem]:
    """The head says what the entry says; each part is there; what the map names exists."""
    tree = source.tree(path)
    if ast.get_docstring(tree) is None:
        yield Problem(file, 1, f"needs a docstring as methods/fora.py has it: paper, authors, {', '.join(SECTIONS)}")
        return
    node = tree.body[0].value
    lines = list(enumerate(node.value.split("\n"), node.lineno))              # a docstring has no escaped line breaks
    if entry:
        yield from _head_problems(entry, file, lines)
    module = parse(path.read_text(encoding="utf-8"))
    for name in SECTIONS:
        if not module.sections.get(name):
            yield Problem(file, node.end_lineno, f"docstring: the part {name!r} is missing; "
                          + ("begin a paragraph with `Idea: `" if name == "Idea" else
                             f"write {name!r} on a line of its own and indent what is below"))
    if UNFILLED in module.sections.get("Map", UNFILLED):
        return
    start = next(number for number, line in lines if re.fullmatch(r"\s*Map:?", line))
    if not module.map:
        yield Problem(file, start, "Map: its columns, two or more spaces apart, are: where in the paper, what, function")
    for name in dict.fromkeys(name for row in module.map for name in row.names):
        if not _exists(source, path, name):
            places = (number for number, text in lines if number > start and re.search(rf"(?<![\w.]){re.escape(name)}\b", text))
            hint = "no module or name there is known" if name.split(".")[0] in FOLDERS else allowed(name, [*module.lines])
            yield Problem(file, next(places, start), f"Map: {name} is not defined; {hint}")


def _head_problems(entry: Entry, file: str, lines: list[tuple[int, str]]) -> Iterator[Problem]:
    """The first two paragraphs."""
    paragraphs: list[tuple[int, str]] = []
    for i, (number, line) in enumerate(lines):
        if line.strip() and (i == 0 or not lines[i - 1][1].strip()):
            paragraphs.append((number, line))
        elif line.strip():
            paragraphs[-1] = (paragraphs[-1][0], f"{paragraphs[-1][1]} {line}")
    (line, head), (second_line, second), *_ = [*((number, " ".join(text.split()).rstrip(".")) for number, text in paragraphs),
                                               (lines[-1][0], "")]
    wanted = [docstring_parts(entry.name, paper) for paper in entry.papers]
    first = [text for text, _, _ in wanted]
    first += [text.replace(f"- {entry.name}: ", "- ", 1) for text in first]         # the name need not stand twice
    if head not in [text.rstrip(".") for text in first]:
        yield Problem(file, line, f"docstring must begin with {first[0]!r}, as in {entry_file(entry.slug)}")
    rest = [f"{shown}, {rest}" for _, authors, rest in wanted for shown in (authors, f"{authors.split(', ')[0]} et al.")]
    if second not in rest:
        yield Problem(file, second_line, f"second paragraph of the docstring must be {rest[0]!r}; the author list may be "
                                         "cut to 'First Author et al.'")


def _exists(source: Source, path: Path, name: str) -> bool:
    """Whether a name means something in a file: its own, one that it imports, or a dotted path into this repository."""
    if name in definitions(source.tree(path)) or name in imported(source, path):
        return True
    head, *rest = name.split(".")
    full = ".".join([imported(source, path).get(head, head), *rest]).split(".")
    for cut in range(len(full), 1, -1):
        if found := source.path(".".join(full[:cut])):
            return cut == len(full) or _exists(source, found, ".".join(full[cut:]))
    return False


def _left_in(file: str, text: str, tree: ast.Module) -> Iterator[Problem]:
    """Calls that help while one writes and must not stay."""
    if re.search(r"\b(print|breakpoint)\s*\(", text):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "breakpoint"):
                yield Problem(file, node.lineno, f"{node.func.id}() is left in")


def _untyped(file: str, tree: ast.Module) -> Iterator[Problem]:
    """The package says that it is typed, so every public function of it must be."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            missing = [each.arg for each in every if each.annotation is None] + ["what it returns"] * (node.returns is None)
            if missing:
                yield Problem(file, node.lineno, f"{node.name}: say the type of {', '.join(missing)}")


def _config_problems(file: str, tree: ast.Module, text: str) -> Iterator[Problem]:
    """Every field of Config says in a comment what it is and where the paper has it."""
    if (config := _config(tree)) is None:
        return
    lines = text.splitlines()[config.lineno - 1 : config.end_lineno]
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT and token.string.strip("# ")}
    for node in config.body:
        first, last = node.lineno - config.lineno + 1, node.end_lineno - config.lineno + 1
        above = {first - 1} if lines[first - 2].lstrip().startswith("#") else set()
        if isinstance(node, ast.AnnAssign) and not comments & {*range(first, last + 1), *above}:
            yield Problem(file, node.lineno, f"Config.{node.target.id} needs a comment: symbol, where in the paper")


def _entry_imports(catalog: Catalog, source: Source, entry: Entry, path: Path) -> Iterator[Problem]:
    """Other methods are imported only if the entry builds on them."""
    for line, module in source.import_lines(path):
        head, _, rest = module.partition(".")
        name = rest.split(".")[0]
        if head == "methods" and name in catalog.entries and name not in (entry.slug, *entry.builds_on):
            yield Problem(_name(source, path), line,
                          f"imports methods.{name}; {entry_file(entry.slug)} must list it under builds_on")
