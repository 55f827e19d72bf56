"""Vector quantisation: the nearest row of a codebook in place of a vector, with a gradient that passes straight through."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Quantised(NamedTuple):
    """`z_q` (..., D), the rows of `index` (...), and two mean squared errors: `codebook_loss` pulls the rows to the vectors,
    `commitment_loss` the vectors to the rows."""

    z_q: Tensor
    index: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def lookup(index: Tensor, codes: Tensor, unit: bool = False) -> Tensor:
    """The rows (..., D) of `codes` (V, D) that `index` (...) names, with `unit` on the sphere; differentiable in `codes`."""
    chosen = codes[index]
    return F.normalize(chosen, dim=-1) if unit else chosen


def quantise(z: Tensor, codes: Tensor, unit: bool = False) -> Quantised:
    """Replace each vector of `z` (..., D) by the nearest row of `codes` (V, D), the first on equal distances.

    The gradient of `z_q` is that of `z`, and none reaches `codes` through it (van den Oord et al. 2017): the rows learn from
    `codebook_loss`. With `unit` vectors and rows are l2-normalised first, so that the nearest has the largest cosine (Yu et al.
    2022), and the gradient passes straight to the normalised vector. Computed in float32 or better; `z_q` in the dtype of `z`.
    """
    dtype = z.dtype
    with torch.autocast(z.device.type, enabled=False):
        z, codes = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, codes))
        if unit:
            z = F.normalize(z, dim=-1)
        with torch.no_grad():
            table = F.normalize(codes, dim=-1) if unit else codes
            index = (table.square().sum(-1) - 2 * z @ table.T).argmin(-1)              # + |z|^2, the same for all rows
        z_q = lookup(index, codes, unit)
        losses = F.mse_loss(z_q, z.detach()), F.mse_loss(z_q.detach(), z)
        return Quantised((z_q.detach() + (z - z.detach())).to(dtype), index, *losses)      # z - z is 0: z_q stays exact
