"""Everything that the pages of the site are made from, read from one checkout. Nothing of the library is imported."""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from accel_tools.catalog import ROOT, Catalog, load
from accel_tools.catalog.code_hash import Code
from accel_tools.catalog.method_source import ModuleSource, parse
from accel_tools.catalog.source import Source


@dataclass(frozen=True)
class Site:
    """Everything the pages are made from."""
    catalog: Catalog
    results: dict[str, dict] = field(default_factory=dict)              # slug -> catalog/results/<slug>.json
    compatibility: dict[str, dict] | None = None                        # slug -> family -> {works, with, reason}
    surroundings: dict[str, dict] = field(default_factory=dict)         # slug -> situation -> {works, reason}
    pairs: dict[str, dict[str, dict]] = field(default_factory=dict)     # slug -> slug -> family -> True, or the reason why not
    classes: list[dict] = field(default_factory=list)                   # model classes without a row: {reason, classes}
    plans: dict = field(default_factory=dict)                           # catalog/plans.json
    principles: dict[str, str] = field(default_factory=dict)            # mechanism -> catalog/principles/<mechanism>.md
    methods: dict[str, ModuleSource] = field(default_factory=dict)
    kernels: dict[str, ModuleSource] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)                # slug -> hash of its code as it is now
    uses: dict[str, list[str]] = field(default_factory=dict)            # slug -> kernels reached by its imports
    samples: bool = False                                               # site/assets/samples.png is there
    strips: frozenset[str] = frozenset()                                # methods with site/assets/methods/<slug>.png
    pictures: frozenset[str] = frozenset()                              # bundled models with site/assets/models/<name>.png
    zoo: dict[str, dict] = field(default_factory=dict)                  # bundled model -> its card
    trained: dict[str, dict] = field(default_factory=dict)              # trained weights of methods -> their card
    baselines: dict[str, dict] = field(default_factory=dict)            # model -> catalog/baselines/<model>.json
    tuned: dict[str, dict] = field(default_factory=dict)                # model -> catalog/tuned/<model>.json


def read(root: Path = ROOT) -> Site:
    """Raises CatalogError, SyntaxError, or ValueError for JSON that does not parse."""
    catalog = load(root)
    source = Source(root)
    code = Code(source)
    modules = {slug: path for slug in catalog.entries if (path := source.path(f"methods.{slug}"))}
    kernels = {path.stem: path for path in sorted((root / "kernels").glob("[a-z]*.py"))}
    uses = {slug: [name for name, file in kernels.items() if file in set(source.closure(path))]
            for slug, path in modules.items()}
    results = {path.stem: _json(path) for path in sorted((root / "catalog/results").glob("*.json"))}
    compatibility, pairs, plans, surroundings = (
        root / f"catalog/{name}.json" for name in ("compatibility", "pairs", "plans", "surroundings"))
    classes = root / "catalog/classes.yaml"
    return Site(
        catalog=catalog,
        results={slug: result for slug, result in results.items() if slug in catalog.entries},
        compatibility=_json(compatibility) if compatibility.exists() else None,
        surroundings=_json(surroundings) if surroundings.exists() else {},
        pairs=_json(pairs) if pairs.exists() else {},
        classes=yaml.safe_load(classes.read_text(encoding="utf-8")) if classes.exists() else [],
        plans=_json(plans) if plans.exists() else {},
        principles={path.stem: path.read_text(encoding="utf-8") for path in sorted((root / "catalog/principles").glob("*.md"))},
        methods={slug: parse(path.read_text(encoding="utf-8")) for slug, path in modules.items()},
        kernels={name: parse(path.read_text(encoding="utf-8")) for name, path in kernels.items()},
        hashes={slug: code.hash(slug) for slug in modules},
        uses=uses,
        samples=(root / "site/assets/samples.png").exists(),
        strips=frozenset(path.stem for path in (root / "site/assets/methods").glob("*.png")),
        pictures=frozenset(path.stem for path in (root / "site/assets/models").glob("*.png")),
        zoo={path.stem: _json(path) for path in sorted((root / "methods/_zoo").glob("*.json"))
             if path.with_suffix(".safetensors").exists()},
        trained={path.stem: _json(path) for path in sorted((root / "methods/_trained").glob("*.json"))},
        baselines={path.stem: _json(path) for path in sorted((root / "catalog/baselines").glob("*.json"))},
        tuned={path.stem: _json(path) for path in sorted((root / "catalog/tuned").glob("*.json"))},
    )


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
