"""What a method is measured by besides the protocol of all.

    python tools/bench.py --studies [--method dato ...]      adds them to catalog/results/<slug>.json

`tools/measure/<slug>.py` offers `study(folder)`, whose result is a table: {title, note, columns, rows}, and `model` where
that is not the UNet of emoji. What was done so far it may keep in `folder`. `code_hash` says of which code a study is.
"""
from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from accel_tools.catalog import ROOT
from accel_tools.catalog.method_source import definitions
from accel_tools.catalog.source import Source
from accel_tools.measure.records import provenance
from accel_tools.measure.tasks import TASKS


def studied() -> list[str]:
    """The methods that have a study."""
    source = Source()
    return [path.stem for path in sorted((ROOT / "catalog/entries").glob("*.yaml"))
            if (file := ROOT / f"tools/measure/{path.stem}.py").exists() and "study" in definitions(source.tree(file))]


def study(slug: str, folder: Path) -> dict[str, Any]:
    return {"model": TASKS["unet"].model} | import_module(f"accel_tools.measure.{slug}").study(folder) | provenance(slug)
