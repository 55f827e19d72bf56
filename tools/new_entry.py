"""Starts a new method: entry, module and test, which the checker then asks you to fill in.

    python tools/new_entry.py --slug tome --name ToMe --kind patch --bibtex tome.bib --code dbolya/tomesd
    python tools/new_entry.py --slug tome --name ToMe --kind patch --title "Token Merging for Fast Stable Diffusion" \\
        --authors "Daniel Bolya; Judy Hoffman" --venue CVPRW --year 2023 --arxiv 2303.17604

Nothing is overwritten. Files are written only if none of the three exists, and only of a paper that is not in the catalogue.
With `--pending` it is the entry alone.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args

import bibtexparser
from bibtexparser.middlewares import LatexDecodingMiddleware, SeparateCoAuthors, SplitNameParts
from pydantic import ValidationError

from accel_tools.catalog import ROOT, Reading, draft, read
from accel_tools.catalog.entries import entry_file
from accel_tools.catalog.module_rules import docstring_parts
from accel_tools.catalog.papers import identity, paper_problems, venue_named
from accel_tools.catalog.rules import slug_problem
from accel_tools.catalog.schema import Kind, Paper, Vocab
from accel_tools.pages.text import environment, write

SIGNATURES = {
    "patch": "def apply(target: Any, config: Config = Config()) -> Patch:",
    "decoder": "def generate(model: Any, prompt: Tensor, config: Config = Config()) -> Tensor:",
    "module": "def build(config: Config = Config()) -> nn.Module:",
    "training": "def loss(model: nn.Module, batch: Tensor, config: Config = Config()) -> Tensor:",
    "compress": "def compress(model: nn.Module, config: Config, batches: Iterable[Tensor]) -> nn.Module:",
    "parallel": "def apply(target: Any, group: Any, config: Config = Config()) -> Patch:",
}
ARXIV = re.compile(r"arxiv(?:\.org/(?:abs|pdf)/|[:.\s]+)((?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v[1-9]\d*)?)\b",
                   re.I)

_env = environment(
    q=lambda value: json.dumps(value, ensure_ascii=False),
    docstring=lambda text: textwrap.fill(text.replace("\\", r"\\").replace('"""', r'\"\"\"'), 120, break_long_words=False,
                                         break_on_hyphens=False),
)


class InputError(Exception):
    """The command line or the BibTeX file does not give what is needed."""


def from_bibtex(path: Path) -> dict[str, Any]:
    """The facts of the one entry in a BibTeX file, LaTeX decoded, names split."""
    decode = [LatexDecodingMiddleware(), SeparateCoAuthors(), SplitNameParts()]
    library = bibtexparser.parse_string(path.read_text(encoding="utf-8"), append_middleware=decode)
    if library.failed_blocks:
        block = library.failed_blocks[0]
        raise InputError(f"{path}:{(block.start_line or 0) + 1}: this BibTeX cannot be read: {block.error}")
    if len(library.entries) != 1:
        raise InputError(f"{path}: needs exactly one BibTeX entry, has {len(library.entries)}")
    entry = library.entries[0]
    text = {key: value.value for key, value in entry.fields_dict.items() if isinstance(value.value, str)}
    text = {key.lower(): re.sub(r"[{}]", "", " ".join(value.split())) for key, value in text.items()}
    names = entry.fields_dict["author"].value if "author" in entry.fields_dict else []
    authors = [{"given": " ".join(name.first) or None, "family": " ".join([*name.von, *name.last, *name.jr])}
               for name in names]
    venue = text.get("booktitle") or text.get("journal") or ""
    found = {
        "key": re.sub(r"[^a-z0-9_:-]", "", entry.key.lower()),
        "title": text.get("title"), "authors": authors, "year": text.get("year"),
        "venue": "arXiv" if not venue or "arxiv" in venue.lower() else venue,
        "arxiv": next((m[1] for key in ("eprint", "journal", "url", "doi", "note") if (m := ARXIV.search(
            ("arxiv:" if key == "eprint" else "") + text.get(key, "")))), None),
    }
    for kind, value in (("doi", text.get("doi")), ("url", text.get("url"))):
        if value and (same := identity(kind, value)).kind != "arxiv":            # an address may be that of a DOI or a forum
            found.setdefault(same.kind, value if same.kind == kind else same.name)
    return found


def from_names(text: str) -> list[dict[str, str | None]]:
    """`A. Bee, Carl Dee and van de Weijer, Joost`: split at `;`, else at `and`, else at commas between full names.

    Raises InputError where names are left out, or where a comma may part two names or the two parts of one.
    """
    if match := re.search(r"\bet\.? al\b\.?|\b(and )?others\b", text, re.I):
        raise InputError(f"--authors: name all authors, not {match[0]!r}")
    text = text.strip(" ;")
    parts = re.split(r"\s*;\s*" if ";" in text else r"\s*,?\s+and\s+|\s+&\s+", text)
    return [_name(name) for part in filter(None, parts) for name in _names(part, ";" in text)]


def _names(part: str, one: bool) -> list[str]:
    """The names in a part without `and`; `one` where it can only be one."""
    pieces = [piece.strip() for piece in part.split(",") if piece.strip()]
    if one or len(pieces) == 1 or len(pieces) == 2 and not all(map(_whole, pieces)):
        return [part]
    if not all(map(_whole, pieces)):
        raise InputError(f"--authors: {part!r} can be read in several ways; part the authors with ';'")
    return pieces


def _whole(name: str) -> bool:
    """Whether this is a given name and a family name, and not a family name such as `van de Weijer`."""
    return len(name.split()) > 1 and not name[0].islower()


def _name(text: str) -> dict[str, str | None]:
    """`Weijer, Joost` or `Joost van de Weijer`: the family name begins at the first word in lower case, else it is the last."""
    if "," in text:
        family, given = (part.strip() for part in text.split(",", 1))
    else:
        words = text.split()
        start = next((i for i, word in enumerate(words) if i and word[0].islower()), len(words) - 1)
        given, family = " ".join(words[:start]), " ".join(words[start:])
    return {"given": given or None, "family": family}


def make_paper(args: argparse.Namespace, vocab: Vocab) -> Paper:
    facts = from_bibtex(args.bibtex) if args.bibtex else {}
    flags = ("key", "title", "venue", "year", "arxiv", "openreview", "doi", "url", "code")
    facts |= {name: getattr(args, name) for name in flags if getattr(args, name)}
    if args.authors:
        facts["authors"] = from_names(args.authors)
    facts["venue"] = venue_named(vocab, facts.get("venue", "arXiv")) or facts["venue"]
    if args.arxiv and (address := identity("url", args.arxiv)).kind == "arxiv":
        facts["arxiv"] = address.name + address.version
    if not facts.get("key") and facts.get("authors"):
        family = re.sub(r"[^a-z]", "", facts["authors"][0]["family"].lower())
        facts["key"] = f"{family or 'paper'}{facts.get('year', '')}{args.slug.replace('_', '')}"
    try:
        return Paper.model_validate(facts)
    except ValidationError as error:
        raise InputError("\n".join(
            f"--{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        )) from None


def first_public(arxiv: str | None) -> str:
    """Year and month of an arXiv id, of the old form or the new one."""
    if not arxiv:
        return "FILL: first public date, as YYYY-MM-DD"
    digits = arxiv.rpartition("/")[2]
    return f"{'19' if digits[:2] > '90' else '20'}{digits[:2]}-{digits[2:4]}"


def skeletons(slug: str, name: str, kind: str, paper: Paper, pending: bool = False) -> dict[str, str]:
    """Path from the root -> text of the three files, or of the entry alone where there is no code yet."""
    first, authors, rest = docstring_parts(name, paper)
    verb = SIGNATURES[kind].split("(")[0].removeprefix("def ")
    names = sorted(["Config", verb] + ["OFF"] * (kind == "patch"), key=lambda word: (not word.isupper(), word))
    values = {
        "slug": slug, "name": name, "kind": kind, "paper": paper, "since": first_public(paper.arxiv), "pending": pending,
        "signature": SIGNATURES[kind], "first": first, "second": f"{authors}, {rest}", "names": names,
    }
    files = {f"catalog/entries/{slug}.yaml": "entry.yaml.j2"}
    if not pending:
        files |= {f"methods/{slug}.py": "method.py.j2", f"tests/methods/test_{slug}.py": "test_method.py.j2"}
    return {path: _env.get_template(template).render(values) for path, template in files.items()}


def refusals(reading: Reading, slug: str, name: str, kind: str, paper: Paper) -> list[str]:
    """What the checker would say of this paper beside those of the catalogue, such as that it stands there already."""
    entry = draft({"name": name, "kind": kind, "papers": [paper.model_dump(exclude_none=True)]})
    entry._slug = slug
    catalog = dataclasses.replace(reading.catalog, entries=reading.catalog.entries | {slug: entry})
    return [problem.message.replace("papers.0.", "--").removeprefix("papers.0: ") for problem in paper_problems(catalog)
            if problem.file == entry_file(slug)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slug", required=True, help="file name, import name and URL, such as tome")
    parser.add_argument("--name", required=True, help="the paper's own name of the method, such as ToMe")
    parser.add_argument("--kind", required=True, choices=get_args(Kind))
    parser.add_argument("--bibtex", type=Path, metavar="FILE", help="one BibTeX entry; flags below override it")
    parser.add_argument("--pending", action="store_true", help="only the entry, of a method that has no code here yet")
    parser.add_argument("--authors", help='"Given Family; Family, Given", or "Given Family, Given Family and Given Family"')
    for flag in ("key", "title", "venue", "year", "arxiv", "openreview", "doi", "url", "code"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if reason := slug_problem(args.slug, args.root):
            raise InputError(f"--slug: {reason}")
        reading = read(args.root)
        if reading.catalog is None:
            raise InputError("\n".join(map(str, reading.problems)))
        paper = make_paper(args, reading.catalog.vocab)
        files = skeletons(args.slug, args.name, args.kind, paper, args.pending)
        if there := [path for path in files if (args.root / path).exists()]:
            raise InputError(f"{', '.join(there)} exists; choose another slug or edit the file")
        if said := refusals(reading, args.slug, args.name, args.kind, paper):
            raise InputError("\n".join(said))
    except (InputError, OSError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        print("nothing written", file=sys.stderr)
        return 1
    for path, text in files.items():
        write(args.root / path, text)
        print(f"written: {path}")
    print("next: fill in what tools/check_catalog.py asks for")
    return 0


if __name__ == "__main__":
    sys.exit(main())
