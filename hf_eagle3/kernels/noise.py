"""Shared noise on scores in one pass: each number is made where it is used.

PyTorch makes them in a dozen passes over integers of eight bytes, one for each token of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..speculation.noise import GOLDEN, MIX
from ..speculation.shared_noise import SCALE
from .language import jit, require, tl

BLOCK = 1024  # values of a program


@jit("n", "m", "V")
def _add_noise(
    scores,
    keys,
    places,
    ids,
    out,
    n,
    m,
    V,
    stride_b,
    stride_n,
    GOLDEN: tl.constexpr,
    FACTOR_1: tl.constexpr,
    FACTOR_2: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // n
    i = row % n
    place = tl.minimum(i, m - 1)  # one key may be for all
    if HAS_PLACES:
        place = tl.load(places + i)
    key = tl.load(keys + b * m + place)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = at.to(tl.int64)
    if HAS_IDS:
        token = tl.load(ids + at, mask=at < V, other=0)
    x = key + (token + 1) * GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FACTOR_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * FACTOR_2
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    u = (((x >> 33) & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * SCALE
    rest = 1 - u
    exponential = tl.where(rest == 1, u, u * tl.div_rn(tl.log(rest), rest - 1))  # as the twin
    values = tl.load(scores + b * stride_b + i * stride_n + at, mask=at < V, other=0.0).to(tl.float32)
    tl.store(out + row * V + at, values - tl.log(exponential), mask=at < V)


def add_noise_rows(scores: Tensor, keys: Tensor, places: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """The kernel of `speculation.shared_noise.add_noise`; same arguments."""
    require(scores.device)
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    B, n, V = scores.shape
    out = torch.empty(B, n, V, dtype=torch.float32, device=scores.device)
    keys = keys.contiguous()
    with torch.cuda.device_of(scores):
        _add_noise[B * n, -(-V // BLOCK)](
            *(scores, keys, keys if places is None else places, keys if ids is None else ids, out),
            *(n, keys.shape[1], V, *scores.stride()[:2]),
            GOLDEN=GOLDEN,
            FACTOR_1=MIX[0][1],
            FACTOR_2=MIX[1][1],
            SCALE=SCALE,
            HAS_PLACES=places is not None,
            HAS_IDS=ids is not None,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # else `fma` rounds once where the twin rounds twice
        )
    return out
