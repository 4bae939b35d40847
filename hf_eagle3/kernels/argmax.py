"""Argmax over long rows: the greedy choice among a vocabulary.

PyTorch gives a row to one block of threads, which for the few rows of a round leaves most of a GPU idle. Here several
programs share a row, and a second kernel takes the best of their results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import jit, require, round_up_to_power, tl

BLOCK = 1024  # values a step
NUM_WARPS = 4
NUM_PROGRAMS = 1056  # eight for each multiprocessor of an H100


def argmax_rows_eager(x: Tensor) -> Tensor:
    """[...] int64, the index of the largest value in each row of `x` [..., V]: the first among equals, NaN first of all."""
    return x.argmax(-1)


@jit("num_splits")
def _find_best(
    x,
    found,  # [n, num_splits] int64: the largest value as an integer that sorts alike, and below it V less its place
    V,
    stride,
    num_splits,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(V, BLOCK), num_splits) * BLOCK
    begin = split * share
    end = tl.minimum(V, begin + share)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -0x80000000, tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    for at in range(begin, end, BLOCK):
        value = tl.load(x + row.to(tl.int64) * stride + at + lane, mask=at + lane < end, other=float("-inf"))
        value = value.to(tl.float32)
        value = tl.where(value == 0, 0.0, value)  # no zero is less than another
        bits = value.to(tl.int32, bitcast=True)
        key = tl.where(value != value, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        is_better = (key > best) & (at + lane < end)
        best = tl.where(is_better, key, best)
        place = tl.where(is_better, at + lane, place)
    tl.store(found + row * num_splits + split, tl.max((best.to(tl.int64) << 32) | (V - place).to(tl.int64), 0))


@jit("num_splits")
def _take_best(found, out, V, num_splits, BLOCK_S: tl.constexpr):
    row = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    best = tl.load(found + row * num_splits + s, mask=s < num_splits, other=-0x8000000000000000)
    tl.store(out + row, V - (tl.max(best, 0) & 0xFFFFFFFF))


def argmax_rows(x: Tensor, *, num_programs: int = NUM_PROGRAMS) -> Tensor:
    """The kernel of `argmax_rows_eager`, for `x` of at most 32 bits whose rows are evenly spaced.

    Args:
        x: [..., V].
        num_programs: Programs to launch at least, as far as rows have blocks for them.
    """
    require(x.device)
    V = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, V)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    num_rows = len(rows)
    num_splits = max(1, min(-(-num_programs // num_rows), -(-V // BLOCK)))
    found = torch.empty(num_rows, num_splits, dtype=torch.int64, device=x.device)
    out = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):
        _find_best[num_rows, num_splits](rows, found, V, rows.stride(0), num_splits, BLOCK=BLOCK, num_warps=NUM_WARPS)
        _take_best[(num_rows,)](found, out, V, num_splits, BLOCK_S=round_up_to_power(num_splits), num_warps=1)
    return out
