"""Kernels over rows of logits for the loss of a training step.

`summarise` gives maximum, argmax and log-sum-exp of a tile of the target's logits. `head_loss` gives loss, gradient and
the counted values from the logits of drafter and target. A row is read twice and is still in the cache the second time;
PyTorch's compiler reads it four times. `scale_` scales gradients afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import jit, require, tl

BLOCK = 2048
NEVER = -1e30  # below any logit, and finite: differences of two are 0


def summarise_eager(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest, argmax and log-sum-exp [n] of each row of `logits` [n, V], float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.amax(-1), wide.argmax(-1), wide.logsumexp(-1)


@jit()
def _summarise(logits, top, at, lse, V, stride, BLOCK: tl.constexpr, NEVER: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], NEVER, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        column = start + lane
        x = tl.load(logits + row * stride + column, mask=column < V, other=NEVER).to(tl.float32)
        higher = tl.maximum(largest, x)
        total = total * tl.exp(largest - higher) + tl.where(column < V, tl.exp(x - higher), 0.0)
        where = tl.where(x > largest, column, where)
        largest = higher
    best = tl.max(largest, 0)
    tl.store(top + row, best)
    tl.store(lse + row, best + tl.log(tl.sum(total * tl.exp(largest - best), 0)))
    tl.store(at + row, tl.min(tl.where(largest == best, where, V), 0).to(tl.int64))


def summarise(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of `summarise_eager`, for 16-bit or float32 logits."""
    require(logits.device)
    n, V = logits.shape
    top, lse = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    at = torch.empty(n, dtype=torch.int64, device=logits.device)
    if n:
        with torch.cuda.device_of(logits):
            _summarise[(n,)](logits, top, at, lse, V, logits.stride(0), BLOCK=BLOCK, NEVER=NEVER, num_warps=8)
    return top, at, lse


@jit("C")
def _head_loss(
    logits,
    kept,
    restricted,
    lse,
    is_known,
    token,
    depth,
    scale,
    loss,
    alpha,
    drafted,
    ratio,
    C,
    V,
    BLOCK: tl.constexpr,
    NEVER: tl.constexpr,
):
    slot, step = tl.program_id(0), tl.program_id(1)
    row = step.to(tl.int64) * C + slot
    place = slot.to(tl.int64) + step  # of the target's row
    lane = tl.arange(0, BLOCK)
    z_row, p_row = logits + row * V, kept + place * V
    if tl.load(depth + slot) <= step:
        for start in range(0, V, BLOCK):
            column = start + lane
            tl.store(z_row + column, tl.zeros([BLOCK], logits.dtype.element_ty), mask=column < V)
        tl.store(loss + row, 0.0)
        tl.store(alpha + row, 0.0)
        tl.store(ratio + row, 0.0)
        tl.store(drafted + row, -2)
    else:
        z_top = tl.full([BLOCK], NEVER, tl.float32)
        z_sum = tl.zeros([BLOCK], tl.float32)
        where = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            column = start + lane
            z = tl.load(z_row + column, mask=column < V, other=NEVER).to(tl.float32)
            higher = tl.maximum(z_top, z)
            z_sum = z_sum * tl.exp(z_top - higher) + tl.where(column < V, tl.exp(z - higher), 0.0)
            where = tl.where(z > z_top, column, where)
            z_top = higher
        z_best = tl.max(z_top, 0)
        z_lse = z_best + tl.log(tl.sum(z_sum * tl.exp(z_top - z_best), 0))
        drafted_id = tl.min(tl.where(z_top == z_best, where, V), 0)
        p_lse, whole = tl.load(restricted + place), tl.load(lse + place)
        x = tl.load(token + row)
        at = tl.maximum(x, 0)
        log_q = tl.load(z_row + at).to(tl.float32) - z_lse
        log_p = tl.load(p_row + at).to(tl.float32) - whole
        tl.store(ratio + row, tl.where(x >= 0, tl.exp(tl.minimum(log_q - log_p, 0.0)), 0.0))
        counts = tl.load(is_known + place).to(tl.float32)
        factor = tl.load(scale + step) * counts
        tl.debug_barrier()  # the token's logit is read before its place takes a gradient
        divergence = tl.zeros([BLOCK], tl.float32)
        overlap = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            column = start + lane
            inside = column < V
            z = tl.load(z_row + column, mask=inside, other=NEVER).to(tl.float32) - z_lse
            y = tl.load(p_row + column, mask=inside, other=NEVER).to(tl.float32)
            q, p = tl.exp(z), tl.exp(y - p_lse)
            divergence += tl.where(inside, p * (y - p_lse - z), 0.0)
            overlap += tl.where(inside, tl.minimum(q, tl.exp(y - whole)), 0.0)
            tl.store(z_row + column, ((q - p) * factor).to(logits.dtype.element_ty), mask=inside)
        tl.store(loss + row, tl.sum(divergence, 0) * counts)
        tl.store(alpha + row, tl.sum(overlap, 0))
        tl.store(drafted + row, drafted_id.to(tl.int64))


def head_loss(
    logits: Tensor, kept: Tensor, lse: Tensor, best: Tensor, token: Tensor, depth: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward KL of C slots at k steps, and the counted values; `logits` are replaced by their scaled gradient.

    Args:
        logits: [k, C, V_d], 16 bits; overwritten.
        kept: [C+k-1, V_d], the target's logits, of slot c at step t in row c + t.
        lse: [C+k-1] float32, log-sum-exp of all of the target's logits.
        best: [C+k-1] int64, draft id of the target's argmax, -1 where there is none: no loss there.
        token: [k, C] int64, draft id of the data's token, -1 where there is none.
        depth: [C] int64, how many steps of a slot are live.
        scale: [k] float32, of the gradient of each step.

    Returns:
        Loss [k, C], alpha [k, C], the drafter's argmax [k, C] (-2 where not live) and min(1, q/p) of the token [k, C].
    """
    require(logits.device)
    k, C, V = logits.shape
    restricted = summarise(kept)[2]
    loss, alpha, ratio = (torch.empty(k, C, dtype=torch.float32, device=logits.device) for _ in range(3))
    drafted = torch.empty(k, C, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):
        _head_loss[(C, k)](
            logits,
            kept,
            restricted,
            lse,
            best >= 0,
            token.contiguous(),
            depth,
            scale,
            loss,
            alpha,
            drafted,
            ratio,
            C,
            V,
            BLOCK=BLOCK,
            NEVER=NEVER,
            num_warps=8,
        )
    return loss, alpha, drafted, ratio


@jit()
def _scale(x, factor, n, BLOCK: tl.constexpr):
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n).to(tl.float32)
        tl.store(x + at, (value * scale).to(x.dtype.element_ty), mask=at < n)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """`x.mul_(factor)`, without reading the contiguous `x` where the number `factor` [] is 1, as it mostly is."""
    require(x.device)
    assert x.is_contiguous()
    if x.numel():
        with torch.cuda.device_of(x):
            _scale[(-(-x.numel() // BLOCK),)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=8)
    return x
