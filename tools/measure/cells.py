"""Finished pieces of a measurement on disk, so that a killed sweep continues where it was and nothing is measured twice.

A cell is what one computation gave, filed under everything it depends on (`identity`). It is written whole or not at all.
A computation that fails leaves its error beside the cells and is tried again by the next sweep.
"""
from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from accel_tools.catalog import ROOT

FOLDER = ROOT / "build/bench/cells"              # of the bench; the report has its own


class Cells:
    def __init__(self, folder: Path):
        self.folder = folder

    def numbers(self, identity: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The JSON value of a cell; `compute()` runs only if there is none yet."""
        path = self._path(identity, ".json")
        if not path.exists():
            value = self._try(identity, compute)
            self._write(path, lambda temporary: temporary.write_text(json.dumps({"identity": identity, "value": value})))
        return json.loads(path.read_text())["value"]

    def tensor(self, identity: dict[str, Any], compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of a cell; `compute()` runs only if there is none yet."""
        path = self._path(identity, ".safetensors")
        if not path.exists():
            value = self._try(identity, compute)
            self._write(path, lambda temporary: save_file({"value": value.contiguous()}, temporary))
        return load_file(path)["value"]

    def has(self, identity: dict[str, Any]) -> bool:
        return any(self._path(identity, suffix).exists() for suffix in (".json", ".safetensors"))

    def _path(self, identity: dict[str, Any], suffix: str) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{identity['what']}-{digest}{suffix}"

    def _try(self, identity: dict[str, Any], compute: Callable[[], Any]) -> Any:
        failed = self._path(identity, ".error")
        try:
            value = compute()
        except Exception:
            self._write(failed, lambda temporary: temporary.write_text(
                json.dumps({"identity": identity, "error": traceback.format_exc()})))
            raise
        failed.unlink(missing_ok=True)
        return value

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        write(temporary)
        os.replace(temporary, path)
