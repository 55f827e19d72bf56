"""Starts a new method: entry, module and test, which the checker then asks you to fill in.

    python tools/new_entry.py --slug tome --name ToMe --kind patch --bibtex tome.bib --code dbolya/tomesd
    python tools/new_entry.py --slug tome --name ToMe --kind patch --title "Token Merging for Fast Stable Diffusion" \\
        --authors "Daniel Bolya; Judy Hoffman" --venue CVPRW --year 2023 --arxiv 2303.17604

Nothing is overwritten. Files are written only if none of the three exists.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import get_args

import bibtexparser
from bibtexparser.middlewares import LatexDecodingMiddleware, SeparateCoAuthors, SplitNameParts
from pydantic import ValidationError

from accel_tools.catalog import ROOT
from accel_tools.catalog.module_rules import docstring_parts
from accel_tools.catalog.schema import SLUG, Kind, Paper
from accel_tools.pages.text import environment, write

SIGNATURES = {
    "patch": "def apply(pipe_or_model, config: Config = Config()) -> Patch:",
    "decoder": "def generate(model, prompt, config: Config = Config()):",
    "module": "def build(config: Config = Config()) -> nn.Module:",
    "training": "def loss(model, batch, config: Config = Config()):",
    "compress": "def compress(model, config: Config, batches) -> nn.Module:",
    "parallel": "def apply(model, group, config: Config = Config()) -> Patch:",
}
ARXIV = re.compile(r"\b(\d{4}\.\d{5}(?:v[1-9]\d*)?)\b")

_env = environment(
    q=lambda value: json.dumps(value, ensure_ascii=False),
    docstring=lambda text: text.replace("\\", r"\\").replace('"""', r'\"\"\"'),
)


class InputError(Exception):
    """The command line or the BibTeX file does not give what is needed."""


def from_bibtex(path: Path) -> dict:
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
    arxiv = next((m[1] for key in ("eprint", "journal", "url", "note") if (m := ARXIV.search(text.get(key, "")))), None)
    return {
        "key": re.sub(r"[^a-z0-9_:-]", "", entry.key.lower()),
        "title": text.get("title"), "authors": authors, "year": text.get("year"), "arxiv": arxiv,
        "venue": "arXiv" if not venue or "arxiv" in venue.lower() else venue,
        "doi": text.get("doi", "").removeprefix("https://doi.org/") or None,
        "url": url if (url := text.get("url", "")).startswith("https://") else None,
    }


def from_names(text: str) -> list[dict]:
    """`Daniel Bolya; van de Weijer, Joost` -> given and family; without a comma the last word is the family name."""
    authors = []
    for name in filter(None, (part.strip() for part in text.split(";"))):
        if "," in name:
            family, given = (part.strip() for part in name.split(",", 1))
        else:
            *first, family = name.split()
            given = " ".join(first)
        authors.append({"given": given or None, "family": family})
    return authors


def make_paper(args: argparse.Namespace) -> Paper:
    facts = from_bibtex(args.bibtex) if args.bibtex else {}
    flags = ("key", "title", "venue", "year", "arxiv", "openreview", "doi", "url", "code")
    facts |= {name: getattr(args, name) for name in flags if getattr(args, name)}
    if args.authors:
        facts["authors"] = from_names(args.authors)
    facts.setdefault("venue", "arXiv")
    if not facts.get("key") and facts.get("authors"):
        family = re.sub(r"[^a-z]", "", facts["authors"][0]["family"].lower())
        facts["key"] = f"{family or 'paper'}{facts.get('year', '')}{args.slug.replace('_', '')}"
    try:
        return Paper.model_validate(facts)
    except ValidationError as error:
        raise InputError("\n".join(
            f"--{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        )) from None


def skeletons(slug: str, name: str, kind: str, paper: Paper) -> dict[str, str]:
    """Path from the root -> text of the three files."""
    first, authors, rest = docstring_parts(name, paper)
    since = f"20{paper.arxiv[:2]}-{paper.arxiv[2:4]}" if paper.arxiv else "FILL: first public date, as YYYY-MM-DD"
    verb = SIGNATURES[kind].split("(")[0].removeprefix("def ")
    names = sorted(["Config", verb] + ["OFF"] * (kind == "patch"), key=lambda word: (not word.isupper(), word))
    values = {
        "slug": slug, "name": name, "kind": kind, "paper": paper, "since": since, "signature": SIGNATURES[kind],
        "first": first, "second": f"{authors}, {rest}", "names": names,
    }
    files = {f"catalog/entries/{slug}.yaml": "entry.yaml.j2", f"methods/{slug}.py": "method.py.j2",
             f"tests/methods/test_{slug}.py": "test_method.py.j2"}
    return {path: _env.get_template(template).render(values) for path, template in files.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slug", required=True, help="file name, import name and URL, such as tome")
    parser.add_argument("--name", required=True, help="the paper's own name of the method, such as ToMe")
    parser.add_argument("--kind", required=True, choices=get_args(Kind))
    parser.add_argument("--bibtex", type=Path, metavar="FILE", help="one BibTeX entry; flags below override it")
    parser.add_argument("--authors", help='"Given Family; Family, Given; ..."')
    for flag in ("key", "title", "venue", "year", "arxiv", "openreview", "doi", "url", "code"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if not SLUG.fullmatch(args.slug):
            raise InputError(f"--slug: {args.slug!r} must be lower-case letters, digits and _, starting with a letter")
        files = skeletons(args.slug, args.name, args.kind, make_paper(args))
        if there := [path for path in files if (args.root / path).exists()]:
            raise InputError(f"{', '.join(there)} exists; choose another slug or edit the file")
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
