"""Linear layers over few rows, where nearly all the time goes to reading the weight once.

Each program owns some rows of the weight and streams them; the input is small and comes from the cache. `dot` multiplies
on the tensor cores, with the input's rows padded to 16, 32 or 64; `fma` on the ordinary units, for up to four rows. The
order of sums depends on sizes only: equal calls give equal bits, and no row's result depends on the other rows.

M rows of input (all its leading dimensions), K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .language import jit, require, round_up_to_power, tl
from .mlp import ACTIVATIONS, activate

MAX_ROWS = 64


class Blocks(NamedTuple):
    """How a kernel is split into programs."""

    kind: str  # "dot" or "fma"
    block_n: int  # weight rows of a program
    block_k: int  # input features of a step
    split_k: int  # programs that share a weight row
    num_warps: int
    num_stages: int


def linear_small_eager(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [..., K] times the transpose of `weight` [N, K], plus `bias` [N]: [..., N], summed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def linear_group_eager(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Up to three linear layers over one `x` [..., K]; `weights` [N_i, K] each."""
    return tuple(linear_small_eager(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def linear_gated_eager(x: Tensor, gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """act(x gate^T) * (x up^T): [..., N], of `x` [..., K], `gate` and `up` [N, K]; rounded after each of the four."""
    return ACTIVATIONS[activation](linear_small_eager(x, gate)) * linear_small_eager(x, up)


@jit()
def _choose_layer(
    tile,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out_0,
    out_1,
    out_2,
    N_0,
    N_1,
    N_2,
    NUM_WEIGHTS: tl.constexpr,
    HAS_BIAS_0: tl.constexpr,
    HAS_BIAS_1: tl.constexpr,
    HAS_BIAS_2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The layer of a group that `tile` belongs to, and its tile there."""
    weight = weight_0
    bias = bias_0
    out = out_0
    N = N_0
    has_bias = HAS_BIAS_0
    if NUM_WEIGHTS > 1:
        num_0 = tl.cdiv(N_0, BLOCK_N)
        num_1 = tl.cdiv(N_1, BLOCK_N)
        if tile >= num_0 + num_1:
            weight = weight_2
            bias = bias_2
            out = out_2
            N = N_2
            has_bias = HAS_BIAS_2
            tile -= num_0 + num_1
        elif tile >= num_0:
            weight = weight_1
            bias = bias_1
            out = out_1
            N = N_1
            has_bias = HAS_BIAS_1
            tile -= num_0
    return tile, weight, bias, out, N, has_bias


@jit("M")
def _linear_dot(
    x,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out_0,
    out_1,
    out_2,
    partial,  # [SPLIT_K, M, N_0] float32
    M,
    K,
    N_0,
    N_1,
    N_2,
    NUM_WEIGHTS: tl.constexpr,
    HAS_BIAS_0: tl.constexpr,
    HAS_BIAS_1: tl.constexpr,
    HAS_BIAS_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    IS_EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile, weight, bias, out, N, has_bias = _choose_layer(
        tile,
        weight_0,
        weight_1,
        weight_2,
        bias_0,
        bias_1,
        bias_2,
        out_0,
        out_1,
        out_2,
        N_0,
        N_1,
        N_2,
        NUM_WEIGHTS,
        HAS_BIAS_0,
        HAS_BIAS_1,
        HAS_BIAS_2,
        BLOCK_N,
    )

    m = tl.arange(0, BLOCK_M)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(K, BLOCK_K * SPLIT_K) * BLOCK_K
    begin = split * share
    end = tl.minimum(K, begin + share)
    k = tl.arange(0, BLOCK_K)
    x_at = x + begin + m[:, None] * K + k[None, :]
    w_at = weight + n.to(tl.int64)[:, None] * K + begin + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(begin, end, BLOCK_K):
        if IS_EVEN_K:
            a = tl.load(x_at, mask=(m < M)[:, None], other=0.0)
            w = tl.load(w_at, mask=(n < N)[:, None], other=0.0, eviction_policy="evict_first")
        else:
            is_k = (at + k < end)[None, :]
            a = tl.load(x_at, mask=(m < M)[:, None] & is_k, other=0.0)
            w = tl.load(w_at, mask=(n < N)[:, None] & is_k, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K

    mask = (m < M)[:, None] & (n < N)[None, :]
    if SPLIT_K > 1:
        tl.store(partial + (split * M + m)[:, None].to(tl.int64) * N + n[None, :], acc, mask=mask)
    else:
        if has_bias:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@jit()
def _sum_splits(
    partial,
    bias,
    out,
    size,
    N,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial + split * size + at, mask=at < size, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < size)


@jit()
def _linear_fma(
    x,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out_0,
    out_1,
    out_2,
    K,
    N_0,
    N_1,
    N_2,
    M: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    HAS_BIAS_0: tl.constexpr,
    HAS_BIAS_1: tl.constexpr,
    HAS_BIAS_2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_EVEN_K: tl.constexpr,
):
    tile = tl.program_id(0)
    tile, weight, bias, out, N, has_bias = _choose_layer(
        tile,
        weight_0,
        weight_1,
        weight_2,
        bias_0,
        bias_1,
        bias_2,
        out_0,
        out_1,
        out_2,
        N_0,
        N_1,
        N_2,
        NUM_WEIGHTS,
        HAS_BIAS_0,
        HAS_BIAS_1,
        HAS_BIAS_2,
        BLOCK_N,
    )

    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    acc_0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_1 = acc_0
    acc_2 = acc_0
    acc_3 = acc_0
    for at in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        is_k = (at + k < K) if not IS_EVEN_K else (k >= 0)
        mask = (n < N)[:, None] & is_k[None, :]
        w = tl.load(w_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        acc_0 += w * tl.load(x + at + k, mask=is_k, other=0.0).to(tl.float32)[None, :]
        if M > 1:
            acc_1 += w * tl.load(x + K + at + k, mask=is_k, other=0.0).to(tl.float32)[None, :]
        if M > 2:
            acc_2 += w * tl.load(x + 2 * K + at + k, mask=is_k, other=0.0).to(tl.float32)[None, :]
        if M > 3:
            acc_3 += w * tl.load(x + 3 * K + at + k, mask=is_k, other=0.0).to(tl.float32)[None, :]
        w_at += BLOCK_K

    offset = tl.zeros([BLOCK_N], tl.float32)
    if has_bias:
        offset = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_0.dtype.element_ty
    tl.store(out + n, (tl.sum(acc_0, 1) + offset).to(dtype), mask=n < N)
    if M > 1:
        tl.store(out + N + n, (tl.sum(acc_1, 1) + offset).to(dtype), mask=n < N)
    if M > 2:
        tl.store(out + 2 * N + n, (tl.sum(acc_2, 1) + offset).to(dtype), mask=n < N)
    if M > 3:
        tl.store(out + 3 * N + n, (tl.sum(acc_3, 1) + offset).to(dtype), mask=n < N)


@jit("M")
def _linear_gated(
    x,
    gate,
    up,
    out,
    M,
    K,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EVEN_K: tl.constexpr,
    NAME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + m[:, None] * K + k[None, :]
    row = n.to(tl.int64)[:, None] * K
    g_at = gate + row + k[None, :]
    u_at = up + row + k[None, :]
    acc_g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, K, BLOCK_K):
        if IS_EVEN_K:
            a = tl.load(x_at, mask=(m < M)[:, None], other=0.0)
            g = tl.load(g_at, mask=(n < N)[:, None], other=0.0, eviction_policy="evict_first")
            u = tl.load(u_at, mask=(n < N)[:, None], other=0.0, eviction_policy="evict_first")
        else:
            is_k = (at + k < K)[None, :]
            a = tl.load(x_at, mask=(m < M)[:, None] & is_k, other=0.0)
            g = tl.load(g_at, mask=(n < N)[:, None] & is_k, other=0.0, eviction_policy="evict_first")
            u = tl.load(u_at, mask=(n < N)[:, None] & is_k, other=0.0, eviction_policy="evict_first")
        acc_g = tl.dot(a, tl.trans(g), acc_g, input_precision=PRECISION)
        acc_u = tl.dot(a, tl.trans(u), acc_u, input_precision=PRECISION)
        x_at += BLOCK_K
        g_at += BLOCK_K
        u_at += BLOCK_K

    dtype: tl.constexpr = out.dtype.element_ty
    activated = activate(acc_g.to(dtype).to(tl.float32), NAME).to(dtype).to(tl.float32)
    result = activated * acc_u.to(dtype).to(tl.float32)
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], result.to(dtype), mask=mask)


def linear_small(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, blocks: Blocks | None = None) -> Tensor:
    """The kernel of `linear_small_eager`, for at most 64 rows of `x` and a contiguous `weight` of `x`'s dtype.

    Args:
        blocks: For tuning. By default from the table.
    """
    return linear_group(x, [weight], [bias], blocks=blocks)[0]


def linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    blocks: Blocks | None = None,
) -> tuple[Tensor, ...]:
    """The kernel of `linear_group_eager`: one launch, and one tail, for up to three layers; else as `linear_small`."""
    x_rows = _check(x, *weights)
    M, K = x_rows.shape
    sizes = [len(weight) for weight in weights]
    blocks = blocks or choose_blocks(sum(sizes), K, M)
    outs = [x.new_empty(*x.shape[:-1], N) for N in sizes]
    three = [weights, biases, outs, sizes]
    (w, b, o, n) = ([*given, *[given[0]] * (3 - len(given))] for given in three)
    has_bias = [bias is not None for bias in b]
    b = [outs[0] if bias is None else bias for bias in b]
    shared = {
        "NUM_WEIGHTS": len(weights),
        "HAS_BIAS_0": has_bias[0],
        "HAS_BIAS_1": has_bias[1],
        "HAS_BIAS_2": has_bias[2],
        "BLOCK_N": blocks.block_n,
        "BLOCK_K": blocks.block_k,
        "num_warps": blocks.num_warps,
    }
    num_tiles = sum(-(-N // blocks.block_n) for N in sizes)
    with torch.cuda.device_of(x):
        if blocks.kind == "fma":
            _linear_fma[(num_tiles,)](
                x_rows,
                *w,
                *b,
                *o,
                K,
                *n,
                M=M,
                NUM_STAGES=blocks.num_stages,
                IS_EVEN_K=K % blocks.block_k == 0,
                **shared,
            )
            return tuple(outs)
        split_k = blocks.split_k if len(weights) == 1 else 1
        partial = outs[0]
        if split_k > 1:
            partial = torch.empty(split_k, M, sizes[0], dtype=torch.float32, device=x.device)
        _linear_dot[num_tiles, split_k](
            x_rows,
            *w,
            *b,
            *o,
            partial,
            M,
            K,
            *n,
            BLOCK_M=max(16, round_up_to_power(M)),
            SPLIT_K=split_k,
            IS_EVEN_K=K % blocks.block_k == 0,
            PRECISION=_precision(x),
            num_stages=blocks.num_stages,
            **shared,
        )
        if split_k > 1:
            size = M * sizes[0]
            _sum_splits[(-(-size // 512),)](
                partial,
                b[0],
                outs[0],
                size,
                sizes[0],
                HAS_BIAS=has_bias[0],
                SPLIT_K=split_k,
                BLOCK=512,
            )
    return tuple(outs)


def linear_gated(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    blocks: Blocks | None = None,
) -> Tensor:
    """The kernel of `linear_gated_eager`; else as `linear_small`."""
    x_rows = _check(x, gate, up)
    M, K = x_rows.shape
    N = len(gate)
    blocks = blocks or choose_gated_blocks(N, M)
    out = x.new_empty(*x.shape[:-1], N)
    with torch.cuda.device_of(x):
        _linear_gated[(-(-N // blocks.block_n),)](
            x_rows,
            gate,
            up,
            out,
            M,
            K,
            N,
            BLOCK_M=max(16, round_up_to_power(M)),
            BLOCK_N=blocks.block_n,
            BLOCK_K=blocks.block_k,
            IS_EVEN_K=K % blocks.block_k == 0,
            NAME=activation,
            PRECISION=_precision(x),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return out


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _check(x: Tensor, *weights: Tensor) -> Tensor:
    """`x` as [M, K]."""
    require(x.device)
    K = x.shape[-1]
    M = x.numel() // K
    if not 1 <= M <= MAX_ROWS:
        raise ValueError(f"x must have 1 to {MAX_ROWS} rows, got {M}. More are faster in torch's own linear.")
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != K or weight.dtype != x.dtype or not weight.is_contiguous():
            raise ValueError(
                f"A weight must be [N, {K}], contiguous and {x.dtype} like x, got {tuple(weight.shape)} {weight.dtype}."
            )
    return x.reshape(M, K).contiguous()


NUM_PROCESSORS = 132  # multiprocessors of an H100, on which the table was measured
ONE = Blocks("fma", 1, 2048, 1, 8, 1)

# Each column of the table was fastest for up to so many rows of input; "16" was measured with 8.
ROWS = (1, 4, 16, 32, 64)
# Key: the tile height at which every multiprocessor gets one tile of N. None: cuBLAS was faster. K hardly matters.
TABLE: dict[int, tuple[Blocks | None, ...]] = {
    # Measured with K x N of 4096 x 32000 and 128256.
    128: (
        ONE,
        Blocks("dot", 16, 256, 1, 2, 4),
        Blocks("dot", 16, 256, 1, 2, 4),
        Blocks("dot", 128, 128, 1, 8, 3),
        Blocks("dot", 128, 128, 1, 8, 3),
    ),
    # 4096 x 14336.
    64: (ONE, *[Blocks("dot", 64, 128, 1, 4, 3)] * 4),
    # 4096, 8192, 12288 and 14336 x 4096, and 4096 x (4096 + 1024 + 1024).
    16: (ONE, Blocks("dot", 16, 128, 1, 2, 6), Blocks("dot", 16, 128, 1, 2, 6), None, None),
    # 4096 x 1024.
    0: (
        ONE,
        Blocks("fma", 2, 1024, 1, 4, 1),
        Blocks("dot", 16, 256, 4, 4, 4),
        Blocks("dot", 32, 128, 4, 4, 4),
        Blocks("dot", 32, 128, 4, 4, 4),
    ),
}
# For a group of layers where cuBLAS is faster at one: one launch is faster than its three.
GROUP = Blocks("dot", 32, 128, 1, 4, 4)


def _find(N: int, M: int) -> Blocks | None:
    height = next(height for height in TABLE if NUM_PROCESSORS * height <= N)
    return TABLE[height][next(i for i, rows in enumerate(ROWS) if rows >= M)]


def is_worth_it(N: int, M: int) -> bool:
    """Whether our kernel is as fast as cuBLAS at a linear layer."""
    return M <= MAX_ROWS and _find(N, M) is not None


def choose_blocks(N: int, K: int, M: int) -> Blocks:
    """Blocks for a linear layer."""
    blocks = _find(N, M) or GROUP
    if blocks == ONE and K % ONE.block_k:
        return Blocks("fma", 1, 1024, 1, 4, 1)  # as fast within 2 %
    return blocks._replace(split_k=min(blocks.split_k, max(1, K // 1024)))


def choose_gated_blocks(N: int, M: int) -> Blocks:
    """Blocks for a gated pair of layers. Measured with 4096 x 14336: faster than cuBLAS for any M."""
    if N < NUM_PROCESSORS * 32:
        return Blocks("dot", 16, 256 if M <= 16 else 128, 1, 4, 3)
    return Blocks("dot", 64, 128, 1, 8, 3) if 16 < M <= 32 else Blocks("dot", 32, 128, 1, 4, 3)
