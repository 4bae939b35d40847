"""Logits over the temperature of each row, in float32: one pass over a vocabulary in the place of two.

PyTorch widens 16-bit logits in one pass, and in another multiplies them by a number of each row, four bytes at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import jit, require, tl

BLOCK = 2048  # values of a program


@jit("n", "V")
def _scale_rows(logits, factors, out, n, V, stride_b, stride_n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b = row // n
    factor = tl.load(factors + b)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + b * stride_b + (row % n) * stride_n + at, mask=at < V, other=0.0).to(tl.float32)
    tl.store(out + row * V + at, values * factor, mask=at < V)


def divide_rows(logits: Tensor, temperature: Tensor) -> Tensor:
    """The kernel of `speculation.warpers.divide`; same arguments."""
    require(logits.device)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    B, n, V = logits.shape
    out = torch.empty(B, n, V, dtype=torch.float32, device=logits.device)
    factors = temperature.to(logits.device).reciprocal()  # [B]
    with torch.cuda.device_of(logits):
        _scale_rows[B * n, -(-V // BLOCK)](
            *(logits, factors, out, n, V, *logits.stride()[:2]), BLOCK=BLOCK, num_warps=4
        )
    return out
