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
from typing import get_args

from pydantic import ValidationError

from accel_tools.catalog import ROOT, Reading, draft, read
from accel_tools.catalog.citation import InputError, from_bibtex, from_names, same_paper
from accel_tools.catalog.entries import entry_file
from accel_tools.catalog.module_rules import docstring_parts
from accel_tools.catalog.papers import paper_problems, twins, venue_named
from accel_tools.catalog.rules import slug_problem
from accel_tools.catalog.schema import Kind, Paper, Vocab
from accel_tools.pages.text import environment, write

SIGNATURES = {
    "patch": ["def apply(target: Any, config: Config = Config()) -> Patch:"],
    "decoder": ["def generate(model: Any, prompt: Tensor, config: Config = Config()) -> Any:"],
    "module": ["def build(config: Config = Config()) -> nn.Module:"],
    "training": ["def convert(model: nn.Module, config: Config = Config()) -> nn.Module:",
                 "def loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: Generator,\n"
                 "         **conditions: Any) -> dict[str, Tensor]:"],
    "compress": ["def compress(model: nn.Module, config: Config, noising: Noising,\n"
                 "             batches: Iterable[tuple[Tensor, dict[str, Any]]]) -> nn.Module:"],
    "parallel": ["def apply(target: Any, group: Any = None, config: Config = Config()) -> Patch:"],
}

_env = environment(
    q=lambda value: json.dumps(value, ensure_ascii=False),
    docstring=lambda text: textwrap.fill(text.replace("\\", r"\\").replace('"""', r'\"\"\"'), 120, break_long_words=False,
                                         break_on_hyphens=False),
)


def make_paper(args: argparse.Namespace, vocab: Vocab) -> tuple[Paper, list[str]]:
    """The paper, and what was left out of the BibTeX file."""
    facts, left_out = from_bibtex(args.bibtex) if args.bibtex else ({}, [])
    facts |= {name: getattr(args, name) for name in ("key", "title", "venue", "year", "code") if getattr(args, name)}
    links = [(name, getattr(args, name)) for name in ("arxiv", "openreview", "doi", "url") if getattr(args, name)]
    facts |= same_paper(links)
    if args.authors:
        facts["authors"] = from_names(args.authors)
    facts["venue"] = venue_named(vocab, facts.get("venue", "arXiv")) or facts["venue"]
    if not facts.get("key") and facts.get("authors"):
        family = re.sub(r"[^a-z]", "", facts["authors"][0]["family"].lower())
        facts["key"] = f"{family or 'paper'}{facts.get('year', '')}{args.slug.replace('_', '')}"
    try:
        return Paper.model_validate(facts), [f"{args.bibtex}:{what}" for what in left_out]
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
    verbs = [signature.split("(")[0].removeprefix("def ") for signature in SIGNATURES[kind]]
    names = sorted(["Config", *verbs] + ["OFF"] * (kind == "patch"), key=lambda word: (not word.isupper(), word))
    values = {
        "slug": slug, "name": name, "kind": kind, "paper": paper, "since": first_public(paper.arxiv), "pending": pending,
        "signatures": SIGNATURES[kind], "first": first, "second": f"{authors}, {rest}", "names": names,
    }
    files = {f"catalog/entries/{slug}.yaml": "entry.yaml.j2"}
    if not pending:
        files |= {f"methods/{slug}.py": "method.py.j2", f"tests/methods/test_{slug}.py": "test_method.py.j2"}
    return {path: _env.get_template(template).render(values) for path, template in files.items()}


def opinions(reading: Reading, slug: str, name: str, kind: str, paper: Paper) -> tuple[list[str], list[str]]:
    """What the checker would say of this paper beside those of the catalogue, such as that it stands there already: errors, and
    warnings."""
    entry = draft({"name": name, "kind": kind, "papers": [paper.model_dump(exclude_none=True)]})
    entry._slug = slug
    catalog = dataclasses.replace(reading.catalog, entries=reading.catalog.entries | {slug: entry})
    errors, warnings = ([problem.message.replace("papers.0.", "--").removeprefix("papers.0: ") for problem in found
                         if problem.file == entry_file(slug)] for found in (paper_problems(catalog), twins(catalog)))
    return errors, warnings


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
        paper, said = make_paper(args, reading.catalog.vocab)
        files = skeletons(args.slug, args.name, args.kind, paper, args.pending)
        if there := [path for path in files if (args.root / path).exists()]:
            raise InputError(f"{', '.join(there)} exists; choose another slug or edit the file")
        errors, warnings = opinions(reading, args.slug, args.name, args.kind, paper)
        if errors:
            raise InputError("\n".join(errors))
    except (InputError, OSError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        print("nothing written", file=sys.stderr)
        return 1
    for text in [*said, *(f"warning: {text}" for text in warnings)]:
        print(text, file=sys.stderr)
    for path, text in files.items():
        write(args.root / path, text)
        print(f"written: {path}")
    print("authors: " + "; ".join(f"{each.family}, {each.given}" if each.given else each.family for each in paper.authors))
    print("next: fill in what tools/check_catalog.py asks for")
    return 0


if __name__ == "__main__":
    sys.exit(main())
