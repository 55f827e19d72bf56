"""What the pages of the site say: each part of a page as plain data, from the catalogue and what stands beside it."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from accel_tools.catalog import Catalog
from accel_tools.catalog.schema import TAG_AXES, Entry, Reported, VocabTerm
from accel_tools.pages.markdown_text import number
from accel_tools.pages.measured import Run, measured
from accel_tools.pages.plots import figures, highlighted
from accel_tools.pages.site import Site
from accel_tools.pages.verdict import WORDS, Verdict, verdict

AXES = (*TAG_AXES, "model", "kind")                       # axes that have a page for each term
FIRST = ("unet", "sdxl", "dit", "pixart", "sd3", "flux", "latte", "cogvideox")        # columns of the table of models
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
    "macs_per_image": ("MACs an image", "count"), "mse": ("Mean square error", "plain"),
    "lowest_recall": ("Lowest recall", "plain"), "frechet": ("Fréchet distance", "plain"), "n": ("Images", "plain"),
}


def curve(losses: list[list[float]]) -> str:
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


def words(catalog: Catalog, entry: Entry) -> str:
    """The labels and other names of all its terms, to be found by."""
    found = [catalog.vocab.term(axis, name) for axis in (*TAG_AXES, "model")
             for name in with_parents(catalog, axis, terms(entry, axis))]
    return " ".join(word for term in found for word in (term.label, *term.aliases))


def tagged(catalog: Catalog, axis: str, term: str) -> dict[str, list[Entry]]:
    """Methods of a term, and under each narrower term those that carry it: term -> methods by date."""
    groups = {}
    for name in (term, *(name for name in getattr(catalog.vocab, axis).terms
                         if name != term and term in with_parents(catalog, axis, [name]))):
        groups[name] = sorted((entry for entry in catalog.entries.values() if name in terms(entry, axis)),
                              key=lambda entry: (entry.since, entry.slug))
    return groups


def timeline(groups: dict[str, list[Entry]]) -> list[Entry]:
    """All methods of the groups, once each, by date."""
    found = {entry.slug: entry for group in groups.values() for entry in group}
    return sorted(found.values(), key=lambda entry: (entry.since, entry.slug))


def distinct(groups: dict[str, list[Entry]]) -> int:
    return len({entry.slug for group in groups.values() for entry in group})


def quarters(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Entries by the quarter of their first publication, empty quarters between them included."""
    numbers = {entry.slug: int(entry.since[:4]) * 4 + (int(entry.since[5:7]) - 1) // 3 for entry in entries}
    return {f"{n // 4} Q{n % 4 + 1}": [entry for entry in entries if numbers[entry.slug] == n]
            for n in range(min(numbers.values()), max(numbers.values()) + 1)}


def facets(catalog: Catalog, rows: dict[str, dict[str, str]]) -> dict[str, list[tuple[str, str, int]]]:
    """Filters of the table, of which each method has a `row`: axis -> (value, label, number of methods)."""
    entries = catalog.entries.values()
    found = {}
    for axis in (*TAG_AXES, "model"):
        count = Counter(name for entry in entries for name in with_parents(catalog, axis, terms(entry, axis)))
        found[axis] = [(name, term.label, count[name]) for name, term in getattr(catalog.vocab, axis).terms.items()
                       if count[name]]
    for facet, labels in (("kind", catalog.vocab.kind.terms), ("fidelity", catalog.vocab.fidelity.terms),
                          ("verdict", WORDS), ("list", catalog.lists)):
        count = Counter(value for each in rows.values() for value in each[facet].split())
        found[facet] = [(name, getattr(term, "label", getattr(term, "title", term)), count[name])
                        for name, term in labels.items() if count[name]]
    venues = Counter(entry.papers[0].venue for entry in entries)
    years = Counter(str(entry.papers[0].year) for entry in entries)
    states = Counter("no" if entry.pending else "yes" for entry in entries)
    found["venue"] = [(name, name, venues[name]) for name in sorted(venues, key=str.casefold)]
    found["year"] = [(name, name, years[name]) for name in sorted(years, reverse=True)]
    found["implemented"] = [(name, name, states[name]) for name in ("yes", "no") if states[name]]
    return found


def row(site: Site, entry: Entry, tables: list[dict]) -> dict[str, str]:
    """What the table filters a method by, besides its tags: words, several with a space between them."""
    said = {table["said"][id(run)].word for table in tables for run, _ in table["runs"]
            if run.slug == entry.slug and table["said"][id(run)]}
    return {"kind": entry.kind, "fidelity": entry.fidelity.level if entry.fidelity else "",
            "verdict": next((word for word in WORDS if word in said), ""),
            "list": " ".join(dict.fromkeys(each.place.split("/")[0] for each in entry.rows))}


def related(catalog: Catalog, entry: Entry, most: int = 5) -> list[Entry]:
    """Methods that share most tags; mechanisms weigh most."""
    weight = {"mechanism": 3, "criterion": 2, "application": 1}
    score: Counter[str] = Counter()
    for other in catalog.entries.values():
        if other.slug not in (entry.slug, *entry.builds_on):
            for axis, points in weight.items():
                score[other.slug] += points * len(set(terms(entry, axis)) & set(terms(other, axis)))
    best = sorted((slug for slug in score if score[slug] > 2), key=lambda slug: (-score[slug], slug))
    return [catalog.entries[slug] for slug in best[:most]]


def errata(catalog: Catalog) -> list[dict]:
    """All corrections of the source lists: list -> its rows in order, then those of its other text."""
    found = []
    for name, spec in catalog.lists.items():
        if spec.unlisted:
            continue
        order = {f"{name}/{section.id}": i for i, section in enumerate(spec.sections)}
        rows = [(entry, erratum) for entry in catalog.entries.values() for erratum in entry.errata
                if erratum.place in order]
        rows.sort(key=lambda pair: (order[pair[1].place], pair[1].row, pair[0].slug))
        found.append({"name": name, "spec": spec, "rows": rows, "texts": spec.errata,
                      "count": len(rows) + len(spec.errata)})
    return found


def heading(text: str, otherwise: str) -> str:
    """The words of the last Markdown heading in `text`."""
    words = [re.sub(r"<[^>]*>|[^\w\s/-]", "", line.lstrip("# ")).strip() for line in text.splitlines()
             if line.startswith("#")]
    return words[-1] if words and words[-1] else otherwise.replace("-", " ").capitalize()


@dataclass(frozen=True)
class Choice:
    """A method on a family: the setting that makes it run there, its best run on a bundled model with what that is worth, and
    the speed-ups its authors report for the family, or else for its relatives."""

    entry: Entry
    setting: dict[str, object]
    run: Run | None = None
    said: Verdict | None = None
    model: str = ""                                        # the bundled model of `run`
    reported: list[Reported] = field(default_factory=list)

    @property
    def apply(self) -> str:
        """The call that puts it on a pipeline."""
        setting, slug = ", ".join(f"{key}={value!r}" for key, value in self.setting.items()), self.entry.slug
        return f"{slug}.apply(pipe, {slug}.Config({setting}))" if setting else f"{slug}.apply(pipe)"

    @property
    def claim(self) -> Reported | None:
        """The highest of the reported speed-ups."""
        return max(self.reported, key=faster, default=None)

    @property
    def worth(self) -> tuple:
        """What one should try first comes first: by what it is worth here, then by what is reported, never by bare speed."""
        word = ["better", "trades", None, "loses"].index(self.said and self.said.word)
        return word, -faster(self.claim) if self.claim else 0, self.entry.name.casefold()


def faster(reported: Reported) -> float:
    """The speed-up that authors report, or that follows from their latencies; 0 where it is of something else."""
    if reported.speedup:
        return reported.speedup
    timed = reported.metric.startswith("latency") and reported.before and reported.after
    return reported.before / reported.after if timed else 0


def family(site: Site, name: str, tables: list[dict]) -> dict:
    """What is known about the methods on one model family: tested here, refused here, or named in the paper only."""
    broader, vocab = with_parents(site.catalog, "model", [name]), site.catalog.vocab
    near = {near: label for term, word in vocab.model.terms.items() if len(broader) > 1 and term != name
            and set(broader[1:]) & set(with_parents(site.catalog, "model", [term])) for near, label in _known(word)}
    own = dict(_known(vocab.term("model", name)))
    table = next((table for table in tables if site.zoo.get(table["model"], {}).get("family") == name), None)
    runs, refuses, paper = [], [], []
    for entry in site.catalog.entries.values():
        result = tested(site, entry.slug).get(name)
        if result and result["works"]:
            reported = [[each for each in entry.reported if faster(each) and each.model in words] for words in (own, near)]
            best, said, model = _worthiest([table] if table else tables, entry.slug)
            setting = (dict(best.config) if table and best and best.short else {}) | result.get("with", {})
            runs.append(Choice(entry, setting, best, said, model, reported[0] or reported[1]))
        elif result:
            refuses.append((entry, result.get("reason", "")))
        elif set(broader) & set(entry.models):
            paper.append(entry)
    runs.sort(key=lambda choice: choice.worth)
    first = [choice for choice in runs if choice.said and choice.said.word != "loses" or choice.claim]
    return {"name": name, "term": vocab.term("model", name), "runs": runs, "refuses": refuses, "paper": paper, "table": table,
            "own": own, "first": first[:3]}


def _known(term: VocabTerm) -> list[tuple[str, str]]:
    """The names under which papers speak of a family, each with its label."""
    return [(name, term.label) for name in (term.label, *term.aliases)]


def _worthiest(tables: list[dict], slug: str) -> tuple[Run | None, Verdict | None, str]:
    """Of the runs of a method, one that fewer steps do not beat if there is such a one, then the fastest. -> run, verdict,
    model"""
    runs = [(run, table["said"][id(run)], table["model"]) for table in tables for run, _ in table["runs"] if run.slug == slug]
    order = [*WORDS, None]
    return min(runs, key=lambda each: (order.index(each[1] and each[1].word), -each[0].arm.get("speedup", 0)),
               default=(None, None, ""))


def tested(site: Site, slug: str) -> dict[str, dict]:
    """What the contract run found for a method: family -> {works, with, reason}."""
    return (site.compatibility or {}).get(slug, {})


def families(site: Site) -> list[str]:
    """The families on which the methods are tried, those of the table first."""
    found = {family for row in (site.compatibility or {}).values() for family in row}
    return [*FIRST, *sorted(found - set(FIRST))]


def stacking(site: Site) -> dict:
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


def company(site: Site) -> dict:
    """The table of situations: names of the columns, a row for each method that was tried, and reasons with their cells."""
    situations = sorted({situation for found in site.surroundings.values() for situation in found}, key=str.casefold)
    rows, reasons = [], {}
    for slug, found in site.surroundings.items():
        name = site.catalog.entries[slug].name
        if found:
            rows.append({"slug": slug, "name": name, "cells": [found.get(each) for each in situations]})
        for situation, each in found.items():
            if not each["works"]:
                reason = each["reason"].removeprefix(f"{slug}: ").removeprefix(f"{slug} ")
                reasons.setdefault(reason, []).append(f"{name} ({situation})")
    return {"situations": situations, "rows": rows, "reasons": reasons}


def table(site: Site, model: str) -> dict:
    """All measurements of one model: its plots by name, and the columns and rows of its table."""
    names = {slug: entry.name for slug, entry in site.catalog.entries.items()}
    found = measured(model, site.results, site.baselines.get(model), names, site.hashes)
    keys = [key for key in METRICS if key != "latency_s" and not key.endswith("_spread")
            and any(reading(run, key) is not None for run in found.runs)]
    said = {id(run): verdict(found, run) for run in found.runs}
    return {"model": model, "path": place(model), "found": found,
            "plots": figures(found), "said": said,
            "words": Counter(said[id(run)].word for run in found.of("method") if said[id(run)]),
            "runs": [(run, [number(reading(run, key), METRICS[key][1]) for key in keys]) for run in found.runs],
            "columns": [METRICS[key][0] for key in keys]}


def place(model: str) -> str:
    """The page of what was measured on a model."""
    return f"measured/{re.sub('[^a-z0-9]+', '-', model.lower()).strip('-')}.md"


def reading(run: Run, key: str) -> object:
    """What a column of METRICS says of a run."""
    return run.bound if key == "mac_bound" else run.arm.get(key)


def plots(tables: list[dict], slug: str) -> dict[str, list[str]]:
    """A method's place among all others: model -> its quality against speed, and its MAC bound."""
    return {table["model"]: [highlighted(plot, slug) for name, plot in table["plots"].items() if f"run-{slug}" in plot]
            for table in tables if any(run.slug == slug for run in table["found"].runs)}


def measurements(site: Site, entry: Entry, tables: list[dict]) -> list[dict]:
    """Our measurements of one method: a table a record."""
    runs = {(table["model"], _key(run.config)): table["said"][id(run)] for table in tables for run, _ in table["runs"]
            if run.slug == entry.slug}
    found = []
    for record in site.results.get(entry.slug, {}).get("records", []):
        arms = record.get("arms", {})
        arms = {name: arm | {"lowest_recall": min(arm["recall"].values())} if arm.get("recall") else arm
                for name, arm in arms.items()}
        keys = [key for key in METRICS if any(key in arm for arm in arms.values())]
        keys += sorted({key for arm in arms.values() for key, value in arm.items()
                        if not isinstance(value, dict | list) and key not in METRICS})
        model, config = record.get("model", "unknown model"), record.get("config", {})
        found.append({
            "model": model,
            "config": ", ".join(f"{key}={value!r}" for key, value in config.items()) or "defaults",
            "short": Run("method", "", {}, config).label.removeprefix(", ") or "defaults",
            "arms": arms, "said": runs.get((model, _key(config))),
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


def _key(config: Mapping[str, object]) -> str:
    return json.dumps(config, sort_keys=True)


def glance(site: Site, entry: Entry, tables: list[dict]) -> dict:
    """What one wants to know first of a method: where it runs, with how many it stacks, the best that was measured and
    reported."""
    run, said, model = _worthiest(tables, entry.slug)
    pairs = [found for a, row in site.pairs.items() for b, found in row.items() if entry.slug in (a, b)]
    families = tested(site, entry.slug)
    changed = next((result["with"] for result in families.values() if result.get("with")), {})
    return {"run": run, "said": said, "model": model,
            "stacks": sum(True in found.values() for found in pairs), "pairs": len(pairs),
            "runs": sum(result["works"] for result in families.values()), "families": len(families),
            "setting": ", ".join(f"{key}={value!r}" for key, value in changed.items()),
            "reported": max((each for each in entry.reported if faster(each)), key=faster, default=None)}


def trained(site: Site, entry: Entry) -> list[dict]:
    """What the weights are worth that ship with a method that trains: a table a file, its rivals beside it."""
    found = []
    for name, card in site.trained.items():
        if card["method"] != entry.slug:
            continue
        metrics = card["metrics"]
        arms = {arm: values for arm, values in metrics.items() if isinstance(values, dict) and "macs_per_image" in values}
        if not arms:                                           # a network from scratch, by measures of its own
            arms = {entry.name: metrics, **metrics.get("rivals", {})}
        keys = [key for key in dict.fromkeys(key for values in arms.values() for key in values)
                if any(_scalar(values.get(key)) for values in arms.values()) and key not in ("n", "seed", "guidance")]
        columns = [METRICS.get(key, (key.replace("_", " ").capitalize(), ""))[0] for key in keys]
        found.append({
            "name": name, "card": card, "columns": columns,
            "rows": [(entry.name if arm == entry.slug else arm, [_with_spread(values, key) for key in keys])
                     for arm, values in arms.items()],
            "curves": [curve([point[:2] for point in losses]) for losses in card["loss"] if len(losses) > 1]})
    return found


def _scalar(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_spread(values: Mapping[str, object], key: str) -> str:
    if not _scalar(values.get(key)):
        return ""
    shown = number(values[key], "count" if key.startswith("macs") else "plain")
    spread = values.get(f"{key}_spread")
    return f"{shown} ({number(spread, 'plain')})" if spread else shown


def study(site: Site, slug: str) -> dict | None:
    """The table that only this method has."""
    study = site.results.get(slug, {}).get("study")
    if study is None:
        return None
    return study | {"rows": [[number(value, "plain") for value in row] for row in study["rows"]],
                    "facts": "; ".join(study[key] for key in ("hardware", "date", "commit") if key in study),
                    "stale": study.get("code_hash") != site.hashes.get(slug)}
