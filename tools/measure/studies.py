"""What a method is measured by besides the protocol of all.

    python tools/bench.py --studies [--method dato ...]      adds them to catalog/results/<slug>.json

A method, or `tools/measure/<slug>.py`, offers `study(folder)`, whose result is a table: {title, note, columns, rows}, and
`model` where that is not the UNet of emoji. What was done so far it may keep in `folder`. `code_hash` says of which code it is.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from accel_tools.measure.arms import offering
from accel_tools.measure.records import provenance
from accel_tools.measure.tasks import TASKS


def study(slug: str, folder: Path) -> dict[str, Any]:
    return {"model": TASKS["unet"].model} | offering("study")[slug].study(folder) | provenance(slug)
