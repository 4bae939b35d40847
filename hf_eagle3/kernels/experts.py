"""Linear layers of a mixture's experts over few tokens, where nearly all the time goes to reading the weights of those chosen.

Each program owns some output features of one expert. It searches the choices for its expert and reads no weight if there
are none; nothing is sorted or copied first. The order of sums depends on sizes only.

R rows of input, S choices (S/R of each row, side by side), E experts, K input features, N output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import jit, require, round_up_to_power, shared_memory, tl

MAX_CHOICES = 1024


def expert_linear_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, *, is_transposed: bool
) -> Tensor:
    """[S, N]: row i is row i // (S/R) of `x` [R, K] through expert `chosen[i]`, plus its bias, rounded before and after.

    `weight` is [E, K, N] if `is_transposed`, else [E, N, K]; `bias` [E, N]; `chosen` [S] int64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.repeat_interleave(len(chosen) // len(x), dim=0).to(wide)  # [S, K]
    matrices = weight[chosen].to(wide)
    y = torch.einsum("sk,skn->sn" if is_transposed else "sk,snk->sn", rows, matrices).to(x.dtype)
    return y if bias is None else y + bias[chosen]


@jit("S")
def _expert_linear(
    x,
    weight,
    bias,
    chosen,
    out,
    S,
    K,
    N,
    REPEAT,  # S / R
    stride_e,
    stride_k,
    stride_n,
    HAS_BIAS: tl.constexpr,
    MAX_S: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(1)
    every = tl.arange(0, MAX_S)
    count = tl.sum((tl.load(chosen + every, mask=every < S, other=-1) == expert).to(tl.int32), 0)

    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    matrix = weight + expert.to(tl.int64) * stride_e + n[None, :].to(tl.int64) * stride_n
    for first in range(0, count, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        is_here = m < count
        choice = tl.zeros([BLOCK_M], tl.int32)  # the m-th one of this expert, as a sum with one term
        num_before = 0
        for at in range(0, S, CHUNK):
            s = at + tl.arange(0, CHUNK)
            is_mine = (tl.load(chosen + s, mask=s < S, other=-1) == expert).to(tl.int32)
            place = num_before + tl.cumsum(is_mine, 0) - 1
            is_it = (is_mine[None, :] != 0) & (place[None, :] == m[:, None])
            choice += tl.sum(tl.where(is_it, s[None, :], 0), 1)
            num_before += tl.sum(is_mine, 0)
        row = x + (choice // REPEAT)[:, None].to(tl.int64) * K
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in range(0, K, BLOCK_K):
            is_k = at + k < K
            a = tl.load(row + at + k[None, :], mask=is_here[:, None] & is_k[None, :], other=0.0)
            w = tl.load(
                matrix + (at + k)[:, None].to(tl.int64) * stride_k,
                mask=is_k[:, None] & (n < N)[None, :],
                other=0.0,
            )
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        y = acc.to(out.dtype.element_ty)
        if HAS_BIAS:
            b = tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0)
            y = (y.to(tl.float32) + b.to(tl.float32)[None, :]).to(out.dtype.element_ty)
        at_out = out + choice[:, None].to(tl.int64) * N + n[None, :]
        tl.store(at_out, y, mask=is_here[:, None] & (n < N)[None, :])


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, *, is_transposed: bool) -> Tensor:
    """The kernel of `expert_linear_eager`, for up to 1024 choices.

    Raises:
        ValueError: There are more, or sizes do not fit.
    """
    require(x.device)
    (R, K), S, E = x.shape, len(chosen), len(weight)
    N = weight.shape[2 if is_transposed else 1]
    if not 0 < S <= MAX_CHOICES or S % R or weight.shape[1 if is_transposed else 2] != K:
        raise ValueError(
            f"Expected 1 to {MAX_CHOICES} choices, as many of each row, and weights [E, {'K, N' if is_transposed else 'N, K'}] "
            f"for x [R, K]; got {S} choices, x {list(x.shape)}, weights {list(weight.shape)}."
        )
    stride_e, *strides = weight.stride()
    stride_k, stride_n = strides if is_transposed else reversed(strides)
    a_row = S / E  # choices of an expert, on average
    block_k = 128 if x.element_size() == 2 else 32
    out = x.new_empty(S, N)
    with torch.cuda.device_of(x):
        _expert_linear[(-(-N // 64), E)](
            *(x.contiguous(), weight, bias if bias is None else bias.contiguous(), chosen.contiguous(), out),
            *(S, K, N, S // R, stride_e, stride_k, stride_n),
            HAS_BIAS=bias is not None,
            MAX_S=max(16, round_up_to_power(S)),
            CHUNK=min(128, max(16, round_up_to_power(S))),
            BLOCK_M=16 if a_row <= 12 else 32 if a_row <= 24 else 64,
            BLOCK_N=64,
            BLOCK_K=block_k,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=3 if shared_memory(x.device) > 160 * 1024 else 2,
        )
    return out
