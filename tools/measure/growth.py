"""Times the catalogue tools on made-up catalogues of growing size.

    python tools/bench.py --catalog

Every made-up entry has a module and a test, as a real one has; the numbers include all checks.
"""
from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from accel_tools.catalog import ROOT, load
from accel_tools.check_catalog import check
from accel_tools.pages.lists import BEGIN, END, generated

ENTRY = """name: Method {i}
summary: "A made-up method, number {i}, for timing the tools"
kind: patch
since: "2024-01-15"
papers:
  - key: family{i}method
    title: "Made-up Method {i}: a Title as Long as Titles Usually Are in This Field"
    authors:
{authors}
    venue: arXiv
    year: 2024
    arxiv: "{arxiv}"
    code: owner/method{i}
builds_on: []
models: [unet, dit]
tags:
  application: [image-generation, text2image]
  training: [training-free]
  criterion: [similarity-based]
  mechanism: [token-merging]
mechanism: "Tokens are merged before a layer and copied back behind it, which is what most real entries say at greater
  length, over two or three lines of text like these."
reported:
  - {{model: DiT, setting: "256x256, 50 steps", metric: FID, before: 2.3, after: 2.4, speedup: 1.5, where: Table 1}}
notes: "Nothing."
rows: [{{in: token-wise/image, rank: {i}}}, {{in: training-free/stable-diffusion, rank: {i}, badge: Method}}]
errata:
  - list: token-wise/image
    row: {i}
    field: venue
    seed: arXiv 2023
    corrected: arXiv 2024
    reason: The year was wrong.
    evidence: The arXiv id.
"""
MODULE = '''"""Method {i} - Made-up Method {i}: a Title as Long as Titles Usually Are in This Field

Given Family{i} et al., arXiv 2024. arXiv:{arxiv}. Code: owner/method{i}

Idea: tokens that are alike are merged.

Map
    Eq. 0    keep what is alike    merge_0
    Alg. 1   the whole             apply

Departures
    None.

Example
    >>> 1 + 1
    2
"""
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.5       # r, Sec. 3
    seed: int = 0            # of the draw, Sec. 3


OFF = Config(ratio=0.0)
{body}

def apply(model: list, config: Config = Config()) -> float:
    return merge_0(model, config.ratio)
'''
TEST = """from contracts import patch as contract

from methods import method_{i}


def test_contract():
    assert contract.cases(method_{i})
"""
FUNCTION = '''

def merge_{j}(x: list, r: float) -> float:
    """Eq. {j}: keeps what is alike. (B, N, C) -> (B, N - r, C)"""
    kept = [token for token in x if token.weight > r]
    return sum(token.value * token.weight for token in kept) / max(len(kept), 1)
'''


def synthetic(n: int, root: Path) -> None:
    """A catalogue of `n` valid entries below `root`, with methods, tests and fresh generated files."""
    for folder in ("catalog/entries", "methods", "tests/methods"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "catalog/vocab.yaml", root / "catalog")
    (root / "catalog/lists").mkdir()
    for path in (ROOT / "catalog/lists").glob("*.yaml"):
        (root / "catalog/lists" / path.name).write_text(re.sub(r"source_rows: \d+", f"source_rows: {n}", path.read_text()))
    (root / "README.md").write_text(f"# Made up\n{BEGIN}\n{END}\n")
    body = "".join(FUNCTION.format(j=j) for j in range(12))
    for i in range(1, n + 1):
        arxiv = f"{2001 + i // 90000:04d}.{i % 90000 + 10000:05d}"
        authors = "\n".join(f"      - {{given: Given, family: Family{i + k}}}" for k in range(6))
        (root / f"catalog/entries/method_{i}.yaml").write_text(ENTRY.format(i=i, arxiv=arxiv, authors=authors))
        (root / f"methods/method_{i}.py").write_text(MODULE.format(i=i, arxiv=arxiv, body=body))
        (root / f"tests/methods/test_method_{i}.py").write_text(TEST.format(i=i))
    check(root, fix=True)


def measure(n: int) -> dict:
    """Seconds to check and to render `n` entries, and the problems found (0 when all is well)."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        synthetic(n, root)
        problems, checking = _timed(lambda: check(root)[0])
        _, rendering = _timed(lambda: generated(load(root)))
    return {"entries": n, "problems": len(problems), "check": checking, "load_and_render": rendering}


def _timed(work: Callable[[], object]) -> tuple[object, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall_s": round(time.perf_counter() - wall, 3), "cpu_s": round(time.process_time() - cpu, 3)}
