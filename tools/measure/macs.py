"""Multiply-accumulates of a call, counted as it runs: half the FLOPs of torch's FlopCounterMode, with its gaps filled.

Torch has no formula for the fused attention of a CPU and counts it as 0; the ops in kernels/ register their own. Counted:
matrix products, convolutions and attention. Not counted: norms, activations, additions, softmax, gathers.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)                      # 4 B H N M D: the two products of N x M x D


FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


@torch.no_grad()
def count_macs(call: Callable[[], Any]) -> int:
    """Run `call()` once and return the multiply-accumulates it made."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops() // 2


def equal_cost_steps(method_macs: int, plain_macs: int, steps: int) -> int:
    """The most plain steps that cost at most `method_macs`, when `steps` of them cost `plain_macs`; at least 1."""
    return max(1, method_macs * steps // plain_macs)
