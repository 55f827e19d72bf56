"""Times every op's Triton kernel against its eager reference on one GPU-sized problem."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from accel_kernels.attention_mass import attention_mass
from accel_kernels.cosine_match import cosine_match
from accel_kernels.merge import merge, segments, unmerge
from accel_kernels.rows import gather_rows, scatter_rows
from accel_kernels.topk import topk_partition


def problems(device: str, dtype: torch.dtype, *, batch: int = 2, tokens: int = 4096, channels: int = 320,
             heads: int = 8) -> dict[str, Callable[[str], Any]]:
    """Op name -> call of it with an `impl`: a quarter of the tokens are destinations, half are chosen."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    order = torch.randperm(tokens, device=device)
    dst, src = order[: tokens // 4].sort().values, order[tokens // 4:].sort().values
    x, half = normal(batch, tokens, channels), torch.stack([order[: tokens // 2]] * batch)
    plan = segments(torch.randint(tokens // 2, (batch, tokens), device=device), tokens // 2)
    q, k, v = (normal(batch, heads, tokens, channels // heads) for _ in range(3))
    rows = normal(batch, tokens // 2, channels)
    score = normal(batch, tokens)
    return {
        "attention_mass": lambda impl: attention_mass(q, k, v, impl=impl),
        "cosine_match": lambda impl: cosine_match(x, src, dst, impl=impl),
        "merge": lambda impl: merge(x, plan, impl=impl),
        "unmerge": lambda impl: unmerge(rows, plan, impl=impl),
        "gather_rows": lambda impl: gather_rows(x, half, impl=impl),
        "scatter_rows": lambda impl: scatter_rows(x, half, rows, impl=impl),
        "topk_partition": lambda impl: topk_partition(score, tokens // 2, impl=impl),
    }


def measure() -> Iterator[dict[str, Any]]:
    """Median seconds of both implementations of each op, in fp32 and in fp16."""
    for dtype in (torch.float32, torch.float16):
        for name, call in problems("cuda", dtype).items():
            seconds = {impl: Timer("call(impl)", globals={"call": call, "impl": impl}).blocked_autorange().median
                       for impl in ("reference", "triton")}
            yield {"op": name, "dtype": str(dtype).removeprefix("torch."), "device": torch.cuda.get_device_name(), **seconds,
                   "speedup": seconds["reference"] / seconds["triton"]}
