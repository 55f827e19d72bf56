"""Renders the pages of the site that come from data: one text per path, from the catalogue and what stands beside it.

    python tools/render_site.py --out DIR      # site/ and the generated pages, ready for any builder of Markdown

`mkdocs build` and `mkdocs serve` take the same pages through tools/mkdocs_hook.py. Nothing of the library is imported.
"""
from __future__ import annotations

import argparse
import json
import posixpath
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import bibtexparser
import jinja2

from accel_tools.catalog import ROOT, Catalog, CatalogError, load
from accel_tools.code_hash import Source
from accel_tools.export import as_bib, as_csv, as_json, bib_entry
from accel_tools.markdown_text import code, fence, md, number, prose
from accel_tools.measured import Run, measured, models
from accel_tools.method_source import ModuleSource, parse
from accel_tools.plots import figures, highlighted
from accel_tools.render_readme import SOURCE, write
from accel_tools.rows import fields, link
from accel_tools.schema import TAG_AXES, Entry, Paper

AXES = (*TAG_AXES, "model", "kind")                       # axes that have a page for each term
FAMILIES = ("unet", "sdxl", "dit", "pixart", "sd3", "flux", "latte", "cogvideox")     # models of this repository
ARMS = {"plain": "Unaccelerated", "fewer_steps": "Fewer steps, equal cost"}
METRICS = {                                               # key in an arm of a result -> column, how to print it
    "steps": ("Steps", "plain"), "passes": ("Passes", "plain"),
    "latency_s": ("Latency", "seconds"), "latency_spread": ("Spread", "plain"),
    "speedup": ("Speed-up", "times"), "speedup_spread": ("Spread of the ratio", "times"), "mac_bound": ("MAC bound", "times"),
    "overhead": ("Overhead", "percent"), "overhead_spread": ("Spread of the overhead", "percent"),
    "macs": ("MACs", "count"), "peak_bytes": ("Peak memory", "bytes"), "cached_bytes": ("Cached", "bytes"),
    "psnr": ("PSNR (dB)", "plain"), "ssim": ("SSIM", "plain"), "label_accuracy": ("Label accuracy", "plain"),
    "retrieval": ("Retrieval", "plain"), "retrieval_top1": ("Retrieval, first", "plain"),
    "frame_agreement": ("Frame agreement", "plain"), "travel": ("Travel (pixels)", "plain"),
    "lowest_recall": ("Lowest recall", "plain"), "frechet": ("Fréchet distance", "plain"), "n": ("Images", "plain"),
}


@dataclass(frozen=True)
class Site:
    """Everything the pages are made from."""
    catalog: Catalog
    results: dict[str, dict] = field(default_factory=dict)              # slug -> catalog/results/<slug>.json
    compatibility: dict[str, dict] | None = None                        # slug -> family -> {works, reason}
    pairs: dict[str, dict[str, dict]] = field(default_factory=dict)     # slug -> slug -> family -> True, or the reason why not
    plans: dict = field(default_factory=dict)                           # catalog/plans.json
    methods: dict[str, ModuleSource] = field(default_factory=dict)
    kernels: dict[str, ModuleSource] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)                # slug -> hash of its code as it is now
    uses: dict[str, list[str]] = field(default_factory=dict)            # slug -> kernels reached by its imports
    samples: bool = False                                               # site/assets/samples.png is there
    pictures: frozenset[str] = frozenset()                              # bundled models with site/assets/models/<name>.png
    zoo: dict[str, dict] = field(default_factory=dict)                  # bundled model -> its card
    baselines: dict[str, dict] = field(default_factory=dict)            # model -> catalog/baselines/<model>.json


def read(root: Path = ROOT) -> Site:
    """Raises CatalogError, SyntaxError, or ValueError for JSON that does not parse."""
    catalog = load(root)
    source = Source(root)
    modules = {slug: path for slug in catalog.entries if (path := source.path(f"methods.{slug}"))}
    kernels = {path.stem: path for path in sorted((root / "kernels").glob("[a-z]*.py"))}
    uses = {slug: [name for name, file in kernels.items() if file in set(source.closure(path))]
            for slug, path in modules.items()}
    results = {path.stem: _json(path) for path in sorted((root / "catalog/results").glob("*.json"))}
    compatibility, pairs, plans = (root / f"catalog/{name}.json" for name in ("compatibility", "pairs", "plans"))
    return Site(
        catalog=catalog,
        results={slug: result for slug, result in results.items() if slug in catalog.entries},
        compatibility=_json(compatibility) if compatibility.exists() else None,
        pairs=_json(pairs) if pairs.exists() else {},
        plans=_json(plans) if plans.exists() else {},
        methods={slug: parse(path.read_text(encoding="utf-8")) for slug, path in modules.items()},
        kernels={name: parse(path.read_text(encoding="utf-8")) for name, path in kernels.items()},
        hashes={slug: source.code_hash(slug) for slug in modules},
        uses=uses,
        samples=(root / "site/assets/samples.png").exists(),
        pictures=frozenset(path.stem for path in (root / "site/assets/models").glob("*.png")),
        zoo={path.stem: _json(path) for path in sorted((root / "methods/_zoo").glob("*.json"))
             if path.with_suffix(".safetensors").exists()},
        baselines={path.stem: _json(path) for path in sorted((root / "catalog/baselines").glob("*.json"))},
    )


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def pages(site: Site) -> dict[str, str]:
    """Path below the docs folder -> text."""
    catalog, entries = site.catalog, site.catalog.entries
    found: dict[str, str] = {
        "catalog.json": as_json(catalog), "catalog.csv": as_csv(catalog), "catalog.bib": as_bib(catalog),
    }

    def add(path: str, template: str, **context) -> None:
        found[path] = _render(site, path, template, **context)

    tables = [_table(site, model) for model in sorted(models(site.results, site.baselines),
                                                      key=lambda model: model not in site.zoo)]
    tagged = {(axis, term): _tagged(catalog, axis, term)
              for axis in AXES for term in getattr(catalog.vocab, axis).terms}
    by_date = sorted(entries.values(), key=lambda entry: (entry.since, entry.slug))
    errata = _errata(catalog)
    add("index.md", "index.md.j2", tagged=tagged, errata=errata, quarters=_quarters(by_date))
    add("methods/index.md", "methods.md.j2", entries=by_date, facets=_facets(catalog))
    for slug, entry in entries.items():
        add(f"methods/{slug}.md", "method.md.j2", entry=entry, paper=entry.papers[0], code=site.methods.get(slug),
            related=_related(catalog, entry), plots=_plots(tables, slug),
            successors=[e for e in entries.values() if slug in e.builds_on],
            measured=_measured(site, entry), study=_study(site, slug), tested=_tested(site, slug))
    add("models.md", "models.md.j2", families=[_family(site, name) for name in FAMILIES])
    add("stacking.md", "stacking.md.j2", stacking=_stacking(site))
    add("tags/index.md", "tags.md.j2", tagged=tagged, axes=AXES)
    for (axis, term), groups in tagged.items():
        add(f"tags/{axis}/{term}.md", "tag.md.j2", axis=axis, term=term, groups=groups)
    for name, spec in catalog.lists.items():
        sections = [(_heading(section.text, section.id), [
            (entry, row, fields(catalog, spec, entry, row)) for entry, row in catalog.rows(name, section.id)
        ]) for section in spec.sections]
        add(f"lists/{name}.md", "list.md.j2", spec=spec, sections=sections)
    users = {name: [entries[slug] for slug, names in site.uses.items() if name in names] for name in site.kernels}
    add("kernels/index.md", "kernels.md.j2", users=users)
    for name, module in site.kernels.items():
        add(f"kernels/{name}.md", "kernel.md.j2", name=name, module=module, users=users[name])
    add("measured.md", "measured.md.j2", tables=tables)
    add("zoo.md", "zoo.md.j2", curves={name: _curve(card["loss"]) for name, card in site.zoo.items()})
    add("corrections.md", "corrections.md.j2", errata=errata)
    add("download.md", "download.md.j2", errata=errata, sizes={name: len(found[name].encode()) for name in found
                                                              if name.startswith("catalog.")})
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
            ]} for axis in AXES],
        "kernels/index.md": [{name: f"kernels/{name}.md"} for name in site.kernels],
    }


# ---- what the pages say -------------------------------------------------------------------------------------------

def _curve(losses: list[list[float]]) -> str:
    """Training loss over steps as inline SVG; the loss axis begins at zero."""
    first, length, top = losses[0][0], max(1, losses[-1][0] - losses[0][0]), max(loss for _, loss in losses)
    points = " ".join(f"{560 * (step - first) / length:.1f},{120 - 115 * loss / top:.1f}" for step, loss in losses)
    return (f'<svg class="curve" viewBox="0 0 560 122" role="img" aria-label="Training loss, from {losses[0][1]:.2f} to '
            f'{losses[-1][1]:.3f}"><polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>')


def terms(entry: Entry, axis: str) -> list[str]:
    if axis == "model":
        return entry.models
    return [entry.kind] if axis == "kind" else getattr(entry.tags, axis)


def with_parents(catalog: Catalog, axis: str, names: Iterable[str]) -> list[str]:
    """The terms and every broader term above them, in order, once each."""
    found: dict[str, None] = {}
    for name in names:
        current: str | None = name
        while current and current not in found:
            found[current] = None
            current = catalog.vocab.term(axis, current).parent
    return list(found)


def _tagged(catalog: Catalog, axis: str, term: str) -> dict[str, list[Entry]]:
    """Methods of a term, and under each narrower term those that carry it: term -> methods by date."""
    groups = {}
    for name in (term, *(name for name in getattr(catalog.vocab, axis).terms
                         if name != term and term in with_parents(catalog, axis, [name]))):
        groups[name] = sorted((entry for entry in catalog.entries.values() if name in terms(entry, axis)),
                              key=lambda entry: (entry.since, entry.slug))
    return groups


def _distinct(groups: dict[str, list[Entry]]) -> int:
    return len({entry.slug for group in groups.values() for entry in group})


def _quarters(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Entries by the quarter of their first publication, empty quarters between them included."""
    numbers = {entry.slug: int(entry.since[:4]) * 4 + (int(entry.since[5:7]) - 1) // 3 for entry in entries}
    return {f"{n // 4} Q{n % 4 + 1}": [entry for entry in entries if numbers[entry.slug] == n]
            for n in range(min(numbers.values()), max(numbers.values()) + 1)}


def _facets(catalog: Catalog) -> dict[str, list[tuple[str, str, int]]]:
    """Filters of the table: axis -> (value, label, number of methods)."""
    entries = catalog.entries.values()
    found = {}
    for axis in TAG_AXES:
        count = Counter(name for entry in entries for name in with_parents(catalog, axis, terms(entry, axis)))
        found[axis] = [(name, term.label, count[name]) for name, term in getattr(catalog.vocab, axis).terms.items()
                       if count[name]]
    venues = Counter(entry.papers[0].venue for entry in entries)
    years = Counter(str(entry.papers[0].year) for entry in entries)
    states = Counter("no" if entry.pending else "yes" for entry in entries)
    found["venue"] = [(name, name, venues[name]) for name in sorted(venues, key=str.casefold)]
    found["year"] = [(name, name, years[name]) for name in sorted(years, reverse=True)]
    found["implemented"] = [(name, name, states[name]) for name in ("yes", "no") if states[name]]
    return found


def _related(catalog: Catalog, entry: Entry, most: int = 5) -> list[Entry]:
    """Methods that share most tags; mechanisms weigh most."""
    weight = {"mechanism": 3, "criterion": 2, "application": 1}
    score: Counter[str] = Counter()
    for other in catalog.entries.values():
        if other.slug not in (entry.slug, *entry.builds_on):
            for axis, points in weight.items():
                score[other.slug] += points * len(set(terms(entry, axis)) & set(terms(other, axis)))
    best = sorted((slug for slug in score if score[slug] > 2), key=lambda slug: (-score[slug], slug))
    return [catalog.entries[slug] for slug in best[:most]]


def _errata(catalog: Catalog) -> list[dict]:
    """All corrections of the source lists: list -> its rows in order, then those of its other text."""
    found = []
    for name, spec in catalog.lists.items():
        order = {f"{name}/{section.id}": i for i, section in enumerate(spec.sections)}
        rows = [(entry, erratum) for entry in catalog.entries.values() for erratum in entry.errata
                if erratum.place in order]
        rows.sort(key=lambda pair: (order[pair[1].place], pair[1].row, pair[0].slug))
        found.append({"name": name, "spec": spec, "rows": rows, "texts": spec.errata,
                      "count": len(rows) + len(spec.errata)})
    return found


def _heading(text: str, otherwise: str) -> str:
    """The words of the last Markdown heading in `text`."""
    words = [re.sub(r"<[^>]*>|[^\w\s/-]", "", line.lstrip("# ")).strip() for line in text.splitlines()
             if line.startswith("#")]
    return words[-1] if words and words[-1] else otherwise.replace("-", " ").capitalize()


def _family(site: Site, name: str) -> dict:
    """What is known about the methods on one model family: tested here, refused here, or named in the paper only."""
    broader = with_parents(site.catalog, "model", [name])
    runs, refuses, paper = [], [], []
    for entry in site.catalog.entries.values():
        result = _tested(site, entry.slug).get(name)
        if result and result["works"]:
            runs.append((entry, _best(site, entry.slug, name)))
        elif result:
            refuses.append((entry, result.get("reason", "")))
        elif set(broader) & set(entry.models):
            paper.append(entry)
    runs.sort(key=lambda pair: (-pair[1].get("speedup", 0), pair[0].name.casefold()))
    term = site.catalog.vocab.term("model", name)
    return {"name": name, "term": term, "runs": runs, "refuses": refuses, "paper": paper}


def _tested(site: Site, slug: str) -> dict[str, dict]:
    """What the contract run found for a method: family -> {works, reason}."""
    return {family: result for family, result in (site.compatibility or {}).get(slug, {}).items() if family in FAMILIES}


def _stacking(site: Site) -> dict:
    """The table of pairs: names of the columns, a row for each method with a cell for each column, and reasons with pairs."""
    verdicts = {pair: found for a, row in site.pairs.items() for b, found in row.items() for pair in ((a, b), (b, a))}
    slugs = sorted({slug for pair in verdicts for slug in pair})
    names = {slug: site.catalog.entries[slug].name for slug in slugs}
    reasons: dict[str, list[str]] = {}
    for (a, b), found in verdicts.items():
        if a < b and (refused := [reason for reason in found.values() if reason is not True]):
            reason = re.sub(r" of the same \w+", " of the same module", refused[0].partition("cannot stack: ")[2] or refused[0])
            reasons.setdefault(reason, []).append(f"{names[a]} and {names[b]}")

    def cell(a: str, b: str) -> dict[str, int] | None:
        found = verdicts.get((a, b))
        return found and {"works": sum(each is True for each in found.values()), "tried": len(found)}
    return {"names": list(names.values()), "reasons": reasons,
            "rows": [{"slug": a, "name": names[a], "cells": [cell(a, b) for b in slugs]} for a in slugs]}


def _best(site: Site, slug: str, model: str) -> dict:
    """The fastest measured run of a method on a model: the numbers of its arm, or nothing."""
    arms = [record["arms"].get("method", {}) for record in site.results.get(slug, {}).get("records", [])
            if record.get("model") == model]
    return max(arms, key=lambda arm: arm.get("speedup", 0), default={})


def _table(site: Site, model: str) -> dict:
    """All measurements of one model: its plots by name, and the columns and rows of its table."""
    names = {slug: entry.name for slug, entry in site.catalog.entries.items()}
    found = measured(model, site.results, site.baselines.get(model), names, site.hashes)
    keys = [key for key in METRICS if key != "latency_s" and not key.endswith("_spread")
            and any(_cell(run, key) is not None for run in found.runs)]
    return {"model": model, "found": found, "plots": figures(found), "runs": [
        (run, [number(_cell(run, key), METRICS[key][1]) for key in keys]) for run in found.runs],
        "columns": [METRICS[key][0] for key in keys]}


def _cell(run: Run, key: str) -> object:
    return run.bound if key == "mac_bound" else run.arm.get(key)


def _plots(tables: list[dict], slug: str) -> dict[str, list[str]]:
    """A method's place among all others: model -> its quality against speed, and its MAC bound."""
    return {table["model"]: [highlighted(plot, slug) for name, plot in table["plots"].items() if f"run-{slug}" in plot]
            for table in tables if any(run.slug == slug for run in table["found"].runs)}


def _measured(site: Site, entry: Entry) -> list[dict]:
    """Our measurements of one method: a table a record."""
    found = []
    for record in site.results.get(entry.slug, {}).get("records", []):
        arms = record.get("arms", {})
        arms = {name: arm | {"lowest_recall": min(arm["recall"].values())} if arm.get("recall") else arm
                for name, arm in arms.items()}
        keys = [key for key in METRICS if any(key in arm for arm in arms.values())]
        keys += sorted({key for arm in arms.values() for key, value in arm.items()
                        if not isinstance(value, dict | list) and key not in METRICS})
        found.append({
            "model": record.get("model", "unknown model"),
            "config": ", ".join(f"{key}={value!r}" for key, value in record.get("config", {}).items()) or "defaults",
            "columns": [METRICS.get(key, (key.replace("_", " "), "plain"))[0] for key in keys],
            "rows": [(ARMS.get(arm, entry.name if arm == "method" else arm),
                      [number(values.get(key), METRICS.get(key, ("", "plain"))[1]) for key in keys])
                     for arm, values in arms.items()],
            "facts": {key: record[key] for key in ("hardware", "commit", "date") if record.get(key)} | {
                key: value for key, value in record.get("suite", {}).items() if key in ("rounds", "guidance", "seeds")},
            "versions": record.get("versions", {}),
            "missing": {ARMS[arm]: reason for arm, reason in record.get("missing", {}).items()},
            "stale": record.get("code_hash") != site.hashes.get(entry.slug),
        })
    return found


def _study(site: Site, slug: str) -> dict | None:
    """The table that only this method has."""
    study = site.results.get(slug, {}).get("study")
    if study is None:
        return None
    return study | {"rows": [[number(value, "plain") for value in row] for row in study["rows"]],
                    "facts": "; ".join(study[key] for key in ("hardware", "date", "commit") if key in study),
                    "stale": study.get("code_hash") != site.hashes.get(slug)}


# ---- how they say it ----------------------------------------------------------------------------------------------

def bibtex(paper: Paper) -> str:
    return bibtexparser.write_string(bibtexparser.Library([bib_entry(paper)])).strip().replace("\t", "  ")


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
             "to": partial(_to, path), "url": partial(_url, path)}
    return _env.get_template(template).render({**known, **context})


_env = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates/site"),
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)
_env.filters |= {"md": md, "code": code, "prose": prose, "fence": fence, "link": link,
                 "json": partial(json.dumps, ensure_ascii=False)}
_env.globals |= {"AXES": AXES, "TAG_AXES": TAG_AXES, "SOURCE": SOURCE, "terms": terms, "with_parents": with_parents,
                 "bibtex": bibtex, "number": number, "distinct": _distinct,
                 "listed": _listed}


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
