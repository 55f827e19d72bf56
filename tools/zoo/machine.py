"""The machine on which a model is trained or a method measured."""
from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def hardware() -> str:
    """The processor, the threads torch uses of it, and the memory."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, {memory:.0f} GiB"
