"""Runs the Triton kernels of these tests in Triton's interpreter, on CPU tensors whose fresh outputs are poisoned."""

import importlib
import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its own helpers are decorated at import

import pytest
import torch

LAUNCHERS = ("agent_attention", "attention_graph", "attention_mass", "cosine_match", "distance_match", "facility_location",
             "merge", "rows", "similarity_sum", "topk")


class PoisonedTorch:
    """torch, but `empty` is full of NaN (or of the smallest integer), so that an element nobody writes shows."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, dtype, device):
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        return torch.full(size if isinstance(size[0], int) else size[0], poison, dtype=dtype, device=device)


def dot_with_bf16(interpreter):
    """Triton 3.9's interpreter keeps bf16 as integer bit patterns and multiplies those; this widens them first."""
    exact = interpreter.InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    return lambda self, a, b, *rest: exact(self, widen(a), widen(b), *rest)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    pytest.importorskip("triton")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_with_bf16(interpreter))
    for name in LAUNCHERS:
        monkeypatch.setattr(importlib.import_module(f"accel_kernels._triton.{name}"), "torch", PoisonedTorch())


@pytest.fixture
def flops():
    """Counts the floating-point operations of a call as torch's FlopCounterMode sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(op, *args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            op(*args, **kwargs)
        return counter.get_total_flops()

    return count


@pytest.fixture
def compiled():
    """Compiles an op as one graph; a second graph or a graph break is an error."""
    torch._dynamo.reset()
    return lambda op: torch.compile(op, backend="aot_eager", fullgraph=True)
