"""Renders the lists from the catalogue: README.md (between its markers), TOKEN-WISE.md, TRAINING-FREE.md, SINCE.md, the schema.

    python tools/render_readme.py                     # write what has changed
    python tools/render_readme.py --check             # write nothing; exit 1 and show a diff if a file is stale
    python tools/render_readme.py --as-seed DIR       # the two that have a source, as it printed them, errata undone
    python tools/render_readme.py --list token-wise   # this list only

Nothing is written while the catalogue has an error.
"""
from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from accel_tools.catalog import ROOT, CatalogError, load
from accel_tools.catalog.rows import erratum_problems
from accel_tools.pages.lists import MarkerError, generated, render_list, stale
from accel_tools.pages.text import write


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    parser.add_argument("--as-seed", metavar="DIR", type=Path, help="write the lists as their sources had them")
    parser.add_argument("--list", metavar="NAME", help="only this list, such as token-wise")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.check and args.as_seed:
        parser.error("--check compares the corrected lists; it does not go with --as-seed")
    try:
        catalog = load(args.root)
        if problems := list(erratum_problems(catalog)):
            raise CatalogError(problems)
        names = [args.list] if args.list else list(catalog.lists)
        if unknown := set(names) - catalog.lists.keys():
            parser.error(f"no list {unknown.pop()!r}; there are {', '.join(catalog.lists)}")
        if args.as_seed:
            files = {spec.file: render_list(catalog, name, as_seed=True)
                     for name, spec in catalog.lists.items() if name in names and not spec.unlisted}
            root = args.as_seed
        elif args.list:
            files, root = {catalog.lists[args.list].file: render_list(catalog, args.list)}, args.root
        else:
            files, root = generated(catalog), args.root
    except (CatalogError, MarkerError) as error:
        print(error, file=sys.stderr)
        print("nothing written", file=sys.stderr)
        return 1
    changed = stale(root, files)
    if args.check:
        for name, (old, new) in changed.items():
            before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
            sys.stdout.writelines(difflib.unified_diff(before, after, f"{name} (on disk)", f"{name} (rendered)"))
        print(f"stale: {', '.join(changed)}; run tools/render_readme.py" if changed else "all files are fresh")
        return 1 if changed else 0
    for name, (_, text) in changed.items():
        write(root / name, text)
    print(f"written: {', '.join(changed)}" if changed else "nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
