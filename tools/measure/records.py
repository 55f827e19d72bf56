"""What stands in catalog/results/<slug>.json and catalog/baselines/<model>.json: measured records, each with all that is
needed to repeat or to doubt it.

Results: a record for each model and config, with its arms, and in some a `study`, a table that only this method has. Since
schema 2 a record may come from any bundled model, name its score, and say under `missing` why an arm does not exist; those
of schema 1 read the same.
Baselines: what a model does without this library, along a curve of fewer steps, and under the packages of others.
"""
from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accel_tools.catalog import ROOT
from accel_tools.catalog.code_hash import code_hash
from accel_tools.pages import text
from accel_tools.zoo.machine import hardware

code_hash_of = cache(code_hash)          # once a process: the code that runs is the code that was imported
MATTER = ("methods", "kernels", "tools", "catalog", "pyproject.toml", "constraints.txt")
WRITTEN = (":!catalog/results", ":!catalog/baselines", ":!catalog/plans.json", ":!catalog/tuned")
PACKAGES = ("genaccel", "torch", "diffusers", "transformers", "triton", "numpy", "tomesd", "DeepCache", "tgate", "cache-dit")


def provenance(slug: str | None = None) -> dict[str, Any]:
    """Where a number comes from: machine and how busy it was (load over five minutes), versions, commit, day, and of a method
    the hash of its code."""
    code = {"code_hash": code_hash_of(slug)} if slug else {}
    return {"hardware": hardware(), "load_average": round(os.getloadavg()[1], 1), "versions": versions(), "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(), **code}


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True).stdout


def changed(root: Path = ROOT) -> list[str]:
    """Files a number may depend on that differ from the commit, new ones included; those that the bench writes do not count.
    None outside a checkout."""
    lines = _git(root, "status", "--porcelain", "--untracked-files=all", "--no-renames", "--", *MATTER, *WRITTEN).splitlines()
    return [line[3:] for line in lines]


def commit(root: Path = ROOT) -> str:
    """The commit, with -dirty if files that matter were changed since; "unknown" outside a checkout."""
    name = _git(root, "describe", "--always").strip()
    return name + "-dirty" * bool(changed(root)) if name else "unknown"


def dirty_tree(root: Path = ROOT) -> str | None:
    """Why no result should be written from this tree; None where one may."""
    if not (files := changed(root)):
        return None
    shown = ", ".join(files[:3]) + f" and {len(files) - 3} more" * (len(files) > 3)
    return (f"the tree differs from its commit in {shown}, so nobody could repeat what is measured now; "
            "commit first, or say --dirty to write results that are marked so")


def rounded(value: Any) -> Any:
    """Floats to five digits, at any depth; one that JSON cannot hold becomes None."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def write(slug: str, records: list[dict[str, Any]], folder: Path = ROOT / "catalog/results") -> Path:
    """Put `records` into the method's file in place of those of the same model and config; others stay."""
    path = folder / f"{slug}.json"
    old = _read(path)
    new = {(record["model"], json.dumps(record["config"], sort_keys=True)): record
           for record in [*old.get("records", []), *rounded(records)]}
    return _write(path, old | {"schema": 2, "method": slug, "records": list(new.values())})


def write_study(slug: str, study: dict[str, Any], folder: Path = ROOT / "catalog/results") -> Path:
    """Put `study`, a table that only this method has, into the method's file."""
    path = folder / f"{slug}.json"
    return _write(path, {"schema": 2, "method": slug, "records": []} | _read(path) | {"study": rounded(study)})


def write_baseline(model: str, part: dict[str, Any], folder: Path = ROOT / "catalog/baselines") -> Path:
    """Put `part`, such as {"plain": ...} or {"peers": ...}, into the model's file; other parts stay."""
    path = folder / f"{model}.json"
    return _write(path, {"schema": 1, "model": model} | _read(path) | rounded(part))


def write_plans(found: dict[str, Any], path: Path = ROOT / "catalog/plans.json") -> dict[str, Any]:
    """What reducing tokens costs by itself, whole or not at all. -> what was written"""
    found = rounded({"schema": 1, **found, **provenance()})
    _write(path, found)
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, data: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text.write(path, json.dumps(data, indent=1) + "\n")
    return path
