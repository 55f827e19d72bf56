"""Chooses between an op's eager reference and its Triton kernel.

`auto` takes the kernel when every tensor lives on a CUDA or HIP device, triton is installed and the dtypes are ones
the kernels accumulate in fp32; otherwise the reference. An explicit choice is obeyed or refused, never replaced.
`TRITON_INTERPRET=1` lets an explicit `impl="triton"` run on CPU tensors, in Triton's interpreter.
"""

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pick(impl: str, *tensors: torch.Tensor) -> str:
    """`"reference"` or `"triton"` for these tensors; ValueError if `impl` is unknown or cannot run on them."""
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl is {impl!r}, allowed: 'auto', 'reference', 'triton'")
    if impl == "reference":
        return impl
    on_gpu = all(t.is_cuda for t in tensors)  # HIP devices call themselves cuda too
    double = any(t.dtype == torch.float64 for t in tensors)
    if impl == "auto":
        return "triton" if on_gpu and HAS_TRITON and not double else "reference"
    if not HAS_TRITON:
        raise ValueError("impl is 'triton', but triton is not installed; allowed here: 'auto', 'reference'")
    if double:
        raise ValueError("impl is 'triton', but a tensor is float64; allowed: float32, float16, bfloat16")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        devices = sorted({t.device.type for t in tensors})
        raise ValueError(f"impl is 'triton', but tensors are on {devices}; allowed: cuda, or TRITON_INTERPRET=1")
    return impl
