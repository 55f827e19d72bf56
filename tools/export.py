"""Exports the catalogue as data: catalog.json, catalog.csv (one line per method) and catalog.bib.

    python tools/export.py --out DIR
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from accel_tools.catalog import ROOT, CatalogError, load
from accel_tools.pages.data import as_bib, as_csv, as_json
from accel_tools.pages.text import write


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        catalog = load(args.root)
    except CatalogError as error:
        print(f"{error}\nnothing written", file=sys.stderr)
        return 1
    for name, make in (("catalog.json", as_json), ("catalog.csv", as_csv), ("catalog.bib", as_bib)):
        write(args.out / name, make(catalog))
        print(f"written: {args.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
