import importlib

import pytest
import torch

from accel_kernels import _dispatch
from accel_kernels._dispatch import pick

OPS = ("agent_attention", "attention_mass", "cosine_match", "distance_match", "facility_location", "merge", "rows",
       "similarity_sum", "topk")


def test_auto_on_cpu_is_the_reference():
    assert pick("auto", torch.zeros(2)) == "reference"


def test_explicit_triton_runs_in_the_interpreter():
    assert pick("triton", torch.zeros(2)) == "triton"


def test_unknown_impl_is_named():
    with pytest.raises(ValueError, match="impl is 'fast', allowed: 'auto', 'reference', 'triton'"):
        pick("fast", torch.zeros(2))


def test_explicit_triton_never_falls_back(monkeypatch):
    with pytest.raises(ValueError, match="float64; allowed: float32"):
        pick("triton", torch.zeros(2, dtype=torch.float64))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"on \['cpu'\]; allowed: cuda"):
        pick("triton", torch.zeros(2))
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="not installed"):
        pick("triton", torch.zeros(2))


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_reference_and_a_launcher(name):
    assert callable(importlib.import_module(f"accel_kernels.{name}").reference)
    assert importlib.import_module(f"accel_kernels._triton.{name}").__doc__
