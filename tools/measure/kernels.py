"""Times every op's Triton kernel against its eager reference, and against the roofline of the device it runs on.

The roofline is the least time the device could take: the bytes of an op's inputs and outputs, each moved once, at the
bandwidth that a large copy reaches, or its FLOPs at the rate that a large matrix product reaches, whichever takes longer.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from accel_kernels.agent_attention import agent_attention
from accel_kernels.attention_graph import flow, log_sums, partner
from accel_kernels.attention_mass import attention_mass
from accel_kernels.cosine_match import cosine_match
from accel_kernels.distance_match import distance_match
from accel_kernels.facility_location import facility_location
from accel_kernels.merge import merge, mlerp, segments, unmerge
from accel_kernels.rows import gather_rows, scatter_rows
from accel_kernels.similarity_sum import similarity_sum
from accel_kernels.topk import topk_partition
from accel_tools.measure.macs import count_macs


class Problem(NamedTuple):
    """One op and its inputs."""

    op: Callable[..., Any]
    inputs: tuple

    def __call__(self, impl: str) -> Any:
        return self.op(*self.inputs, impl=impl)


class Roofline(NamedTuple):
    """What a device reaches: bytes and FLOPs a second."""

    bandwidth: float
    flops: float

    def seconds(self, moved: int, flops: int) -> float:
        return max(moved / self.bandwidth, flops / self.flops)


def problems(device: str, dtype: torch.dtype, *, batch: int = 2, tokens: int = 4096, channels: int = 320,
             heads: int = 8) -> dict[str, Problem]:
    """Op name -> the op on GPU-sized inputs: a quarter of the tokens are destinations, half are chosen."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    order = torch.randperm(tokens, device=device)
    dst, src = order[: tokens // 4].sort().values, order[tokens // 4:].sort().values
    x, half = normal(batch, tokens, channels), torch.stack([order[: tokens // 2]] * batch)
    plan = segments(torch.randint(tokens // 2, (batch, tokens), device=device), tokens // 2)
    q, k, v = (normal(batch, heads, tokens, channels // heads) for _ in range(3))
    sums, weights = torch.randn(2, batch, heads, tokens, device=device)
    rows = normal(batch, tokens // 2, channels)
    score = normal(batch, tokens)
    regions = normal(batch * tokens // 16, 16, channels)
    return {
        "agent_attention": Problem(agent_attention, (q, k, v, q[:, :, ::16], 0.1, 0.7, 0.075)),
        "attention_mass": Problem(attention_mass, (q, k, v)),
        "log_sums": Problem(log_sums, (q, k)),
        "flow": Problem(flow, (q, k, sums, weights)),
        "partner": Problem(partner, (q, k, sums)),
        "cosine_match": Problem(cosine_match, (x, src, dst)),
        "distance_match": Problem(distance_match, (x, src, dst)),
        "facility_location": Problem(facility_location, (regions, 8)),
        "merge": Problem(merge, (x, plan)),
        "mlerp": Problem(mlerp, (x, plan)),
        "unmerge": Problem(unmerge, (rows, plan)),
        "gather_rows": Problem(gather_rows, (x, half)),
        "scatter_rows": Problem(scatter_rows, (x, half, rows)),
        "similarity_sum": Problem(similarity_sum, (x,)),
        "topk_partition": Problem(topk_partition, (score, tokens // 2)),
    }


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in `value`, at any depth of tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_of, value)) if isinstance(value, tuple) else 0


def work(problem: Problem, impl: str) -> tuple[int, int]:
    """(bytes that must be moved, FLOPs) of one call."""
    return bytes_of(problem.inputs) + bytes_of(problem(impl)), 2 * count_macs(lambda: problem(impl))


def seconds(call: Callable[[], Any]) -> float:
    return Timer("call()", globals={"call": call}).blocked_autorange().median


def roofline(device: str, dtype: torch.dtype, *, elements: int = 1 << 28, side: int = 8192) -> Roofline:
    """Measured by a copy of `elements` numbers and by a product of square matrices of `side`."""
    source = torch.empty(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * bytes_of(source) / seconds(lambda: target.copy_(source))
    a = torch.randn(side, side, device=device).to(dtype)
    return Roofline(bandwidth, 2 * side ** 3 / seconds(lambda: a @ a))


def measure(device: str = "cuda", impls: tuple[str, ...] = ("reference", "triton"), **sizes: int) -> Iterator[dict[str, Any]]:
    """Median seconds of each implementation of each op beside the roofline, in fp32 and in fp16.

    `of_roofline` is the share of the roofline that the last implementation reaches.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else device
    for dtype in (torch.float32, torch.float16):
        limit = roofline(device, dtype, **{key: sizes[key] for key in ("elements", "side") if key in sizes})
        shape = {key: value for key, value in sizes.items() if key not in ("elements", "side")}
        for op, problem in problems(device, dtype, **shape).items():
            moved, flops = work(problem, impls[-1])
            taken = {impl: seconds(lambda problem=problem, impl=impl: problem(impl)) for impl in impls}
            least = limit.seconds(moved, flops)
            yield {"op": op, "dtype": str(dtype).removeprefix("torch."), "device": name, **taken,
                   "speedup": taken[impls[0]] / taken[impls[-1]], "bytes": moved, "flops": flops, "roofline": least,
                   "of_roofline": least / taken[impls[-1]]}
