"""Renders the pages of the site that come from data: one text per path, from the catalogue and what stands beside it.

    python tools/render_site.py --out DIR      # site/ and the generated pages, ready for any builder of Markdown

`mkdocs build` and `mkdocs serve` take the same pages through tools/mkdocs_hook.py. Nothing of the library is imported.
"""
from __future__ import annotations

import argparse
import json
import posixpath
import shutil
import sys
from functools import partial
from pathlib import Path

import bibtexparser

from accel_tools.catalog import ROOT, CatalogError
from accel_tools.catalog.rows import SOURCE, fields, link
from accel_tools.catalog.schema import TAG_AXES, Paper, Vocab, json_schema
from accel_tools.pages import views
from accel_tools.pages.data import as_bib, as_csv, as_json, bib_entry, results_csv
from accel_tools.pages.markdown_text import code, fence, md, number, prose
from accel_tools.pages.measured import models
from accel_tools.pages.site import Site, read
from accel_tools.pages.text import environment, write


def pages(site: Site) -> dict[str, str]:
    """Path below the docs folder -> text."""
    catalog, entries = site.catalog, site.catalog.entries
    found: dict[str, str] = {
        "catalog.json": as_json(catalog), "catalog.csv": as_csv(catalog), "catalog.bib": as_bib(catalog),
        "schema.json": json_schema(catalog.vocab),
    }

    def add(path: str, template: str, **context) -> None:
        found[path] = _render(site, path, template, **context)

    tables = [views.table(site, model) for model in sorted(models(site.results, site.baselines),
                                                      key=lambda model: model not in site.zoo)]
    tagged = {(axis, term): views.tagged(catalog, axis, term)
              for axis in views.AXES for term in getattr(catalog.vocab, axis).terms}
    found["results.csv"] = results_csv(tables)
    for name in ("compatibility", "pairs", "surroundings"):
        found[f"{name}.json"] = json.dumps(getattr(site, name), indent=1, ensure_ascii=False) + "\n"
    by_date = sorted(entries.values(), key=lambda entry: (entry.since, entry.slug))
    errata = views.errata(catalog)
    add("index.md", "index.md.j2", tagged=tagged, errata=errata, quarters=views.quarters(by_date))
    rows = {slug: views.row(site, entry, tables) for slug, entry in entries.items()}
    add("methods/index.md", "methods.md.j2", entries=by_date[::-1], facets=views.facets(catalog, rows), rows=rows)
    for slug, entry in entries.items():
        add(f"methods/{slug}.md", "method.md.j2", entry=entry, paper=entry.papers[0], code=site.methods.get(slug),
            related=views.related(catalog, entry), plots=views.plots(tables, slug),
            successors=[e for e in entries.values() if slug in e.builds_on],
            measured=views.measurements(site, entry, tables), study=views.study(site, slug), tested=views.tested(site, slug),
            glance=views.glance(site, entry, tables), trained=views.trained(site, entry))
    families = [views.family(site, name, tables) for name in views.families(site)]
    add("models/index.md", "models.md.j2", families=families, columns=len(views.FIRST))
    for family in families:
        add(f"models/{family['name']}.md", "family.md.j2", family=family)
    add("stacking.md", "stacking.md.j2", stacking=views.stacking(site))
    add("surroundings.md", "surroundings.md.j2", company=views.company(site))
    add("tags/index.md", "tags.md.j2", tagged=tagged, axes=views.AXES)
    for (axis, term), groups in tagged.items():
        add(f"tags/{axis}/{term}.md", "tag.md.j2", axis=axis, term=term, groups=groups, rows=rows)
    for name, spec in catalog.lists.items():
        sections = [(views.heading(section.text, section.id), [
            (entry, row, fields(catalog, spec, entry, row)) for entry, row in catalog.rows(name, section.id)
        ]) for section in spec.sections]
        add(f"lists/{name}.md", "list.md.j2", spec=spec, sections=sections)
    users = {name: [entries[slug] for slug, names in site.uses.items() if name in names] for name in site.kernels}
    add("kernels/index.md", "kernels.md.j2", users=users)
    for name, module in site.kernels.items():
        add(f"kernels/{name}.md", "kernel.md.j2", name=name, module=module, users=users[name])
    add("measured/index.md", "measured.md.j2", tables=tables)
    for table in tables:
        add(table["path"], "measured_model.md.j2", table=table)
    add("zoo.md", "zoo.md.j2", curves={name: views.curve(card["loss"]) for name, card in site.zoo.items()})
    add("corrections.md", "corrections.md.j2", errata=errata)
    add("download.md", "download.md.j2", errata=errata, sizes={name: len(text.encode()) for name, text in found.items()
                                                              if not name.endswith(".md")})
    return found


def nav(site: Site) -> dict[str, list]:
    """Sidebar entries of the sections whose pages are generated: top page -> the pages below it."""
    catalog = site.catalog
    by_name = sorted(catalog.entries.values(), key=lambda entry: entry.name.casefold())
    return {
        "methods/index.md": [{entry.name: f"methods/{entry.slug}.md"} for entry in by_name],
        "tags/index.md": [{"Lists": [{spec.title: f"lists/{name}.md"} for name, spec in catalog.lists.items()]}] + [
            {getattr(catalog.vocab, axis).label: [
                {term.label: f"tags/{axis}/{name}.md"} for name, term in getattr(catalog.vocab, axis).terms.items()
            ]} for axis in views.AXES],
        "models/index.md": [{catalog.vocab.term("model", name).label: f"models/{name}.md"} for name in views.families(site)],
        "measured/index.md": [{model: views.place(model)} for model in models(site.results, site.baselines)],
        "kernels/index.md": [{name: f"kernels/{name}.md"} for name in site.kernels],
    }


def _bibtex(vocab: Vocab, paper: Paper) -> str:
    return bibtexparser.write_string(bibtexparser.Library([bib_entry(paper, vocab)])).strip().replace("\t", "  ")


def _to(page: str, target: str) -> str:
    """Link from one source page to another, which mkdocs checks and turns into a URL."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def _url(page: str, target: str) -> str:
    """Link between the built pages, for HTML that mkdocs leaves alone."""
    def folder(path: str) -> str:
        stem = path.removesuffix(".md")
        return posixpath.dirname(path) if stem.endswith("index") else stem

    return posixpath.relpath(folder(target) or ".", folder(page) or ".") + "/"


def _listed(value: object) -> str:
    """A figure of a model's card: one value, a list, or one for each class."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {share}" for name, share in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _render(site: Site, path: str, template: str, **context) -> str:
    known = {"site": site, "catalog": site.catalog, "vocab": site.catalog.vocab, "entries": site.catalog.entries,
             "to": partial(_to, path), "url": partial(_url, path), "bibtex": partial(_bibtex, site.catalog.vocab)}
    return _env.get_template(template).render({**known, **context})


_env = environment("site", md=md, code=code, prose=prose, fence=fence, link=link, id=id,
                   json=partial(json.dumps, ensure_ascii=False))
_env.globals |= {"AXES": views.AXES, "TAG_AXES": TAG_AXES, "SOURCE": SOURCE, "terms": views.terms, "words": views.words,
                 "with_parents": views.with_parents, "number": number, "distinct": views.distinct,
                 "timeline": views.timeline, "listed": _listed, "faster": views.faster}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        site = read(args.root)
    except (CatalogError, SyntaxError, ValueError) as error:
        print(f"{error}\nnothing written", file=sys.stderr)
        return 1
    if (args.root / "site").is_dir():
        shutil.copytree(args.root / "site", args.out, dirs_exist_ok=True)
    made = pages(site)
    for path, text in made.items():
        write(args.out / path, text)
    print(f"{len(made)} pages written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
