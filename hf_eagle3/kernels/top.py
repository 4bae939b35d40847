"""The best few of long rows: the children of a node among a vocabulary.

PyTorch's `topk` sorts in several passes and gives few rows to few threads. Here each program takes the best of its share
one after the other, and a second kernel takes the best of those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import jit, require, round_up_to_power, tl

BLOCK = 1024  # values of a program
MOST = 8  # values that can be asked for


def top_rows_eager(x: Tensor, k: int) -> Tensor:
    """[..., k] int64, where the largest of each row of `x` [..., V] are, the largest first: the first among equals.

    No place comes twice, whatever the values are; NaN is the largest.
    """
    values = x.float()
    values = torch.where(values == 0, 0.0, values)  # no zero is less than another
    bits = values.view(torch.int32)
    order = torch.where(values.isnan(), 0x7FFFFFFF, bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    places = torch.arange(x.shape[-1], device=x.device)
    return ((order << 32) | (x.shape[-1] - places)).topk(k).indices


@jit()
def _find_top(x, found, V, stride, num_splits, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    split = tl.program_id(1)
    at = split * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row.to(tl.int64) * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    value = tl.where(value == 0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(value != value, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = tl.where(at < V, (order.to(tl.int64) << 32) | (V - at).to(tl.int64), -0x8000000000000000)
    for j in tl.static_range(K):
        best = tl.max(keys, 0)
        tl.store(found + (row * num_splits + split) * K + j, best)
        keys = tl.where(keys == best, -0x8000000000000000, keys)


@jit()
def _take_top(found, out, V, num_found, K: tl.constexpr, BLOCK_S: tl.constexpr):
    row = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    keys = tl.load(found + row * num_found + s, mask=s < num_found, other=-0x8000000000000000)
    for j in tl.static_range(K):
        best = tl.max(keys, 0)
        tl.store(out + row * K + j, V - (best & 0xFFFFFFFF))
        keys = tl.where(keys == best, -0x8000000000000000, keys)


def top_rows(x: Tensor, k: int) -> Tensor:
    """The kernel of `top_rows_eager`, for up to `MOST` of rows of at most 32 bits.

    Args:
        x: [..., V], rows evenly spaced.
        k: 1 to V.
    """
    require(x.device)
    V = x.shape[-1]
    if k > min(MOST, V) or x.itemsize > 4:
        return top_rows_eager(x, k)
    rows = x if x.dim() == 2 else x.reshape(-1, V)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    num_rows, num_splits = len(rows), -(-V // BLOCK)
    found = torch.empty(num_rows, num_splits * k, dtype=torch.int64, device=x.device)
    out = torch.empty(*x.shape[:-1], k, dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):
        _find_top[num_rows, num_splits](rows, found, V, rows.stride(0), num_splits, K=k, BLOCK=BLOCK, num_warps=4)
        _take_top[(num_rows,)](
            found, out, V, num_splits * k, K=k, BLOCK_S=round_up_to_power(num_splits * k), num_warps=4
        )
    return out
