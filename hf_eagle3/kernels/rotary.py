"""Rotary position embedding of queries and keys in one kernel, and its cosines and sines in another.

Rounds where the host does: after each product, and after the sum. So 16-bit results are the host's, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .language import jit, require, round_up_to_power, tl

ROTATION = "rotation"  # deferred (`deferred.py`) for the kernel that writes its keys to a cache


class Rotation(NamedTuple):
    """Operands of a rotation, and the tensors that its results go to."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, H_kv, T, D]
    cos: Tensor  # [B or 1, T, D or D/2]
    sin: Tensor
    out_q: Tensor
    out_k: Tensor


def apply_rotary_eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate `q` [B, H, T, D] and `k` [B, H_kv, T, D] by the angles of their positions.

    The pairs that turn together are (i, i + D/2).

    Args:
        cos: [B or 1, T, D], or [.., D/2] where both of a pair share it.
        sin: Likewise.

    Returns:
        q and k rotated, in their shapes.
    """
    D = q.shape[-1]
    if cos.shape[-1] != D:
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [B, 1, T, D]

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], dim=-1) * sin

    return turn(q), turn(k)


def rotary_angles_eager(
    positions: Tensor, inverse: Tensor, *, scaling: float, dtype: torch.dtype, is_shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at `positions` [B, T] int64, each [B, T, D] or, shared by a pair, [B, T, D/2].

    Args:
        inverse: [D/2], the angle of one position.
        scaling: Multiplies both, before they are rounded to `dtype`.
    """
    angles = positions[..., None].float() * inverse.float()  # [B, T, D/2]
    if not is_shared:
        angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


@jit()
def _rotary_angles(
    positions,
    inverse,
    cos,
    sin,
    scaling,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    IS_SHARED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_HALF)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(inverse + d, mask=d < HALF, other=0.0).to(tl.float32)
    c = (tl.cos(angle) * scaling).to(cos.dtype.element_ty)
    s = (tl.sin(angle) * scaling).to(sin.dtype.element_ty)
    at = token * (HALF if IS_SHARED else 2 * HALF) + d
    tl.store(cos + at, c, mask=d < HALF)
    tl.store(sin + at, s, mask=d < HALF)
    if not IS_SHARED:
        tl.store(cos + at + HALF, c, mask=d < HALF)
        tl.store(sin + at + HALF, s, mask=d < HALF)


def rotary_angles(
    positions: Tensor, inverse: Tensor, *, scaling: float, dtype: torch.dtype, is_shared: bool = False
) -> tuple[Tensor, Tensor]:
    """The kernel of `rotary_angles_eager`; same arguments."""
    require(positions.device)
    positions, half = positions.contiguous(), len(inverse)
    cos, sin = (
        torch.empty(*positions.shape, half if is_shared else 2 * half, dtype=dtype, device=positions.device)
        for _ in range(2)
    )
    with torch.cuda.device_of(positions):
        _rotary_angles[(positions.numel(),)](
            positions,
            inverse.contiguous(),
            cos,
            sin,
            scaling,
            HALF=half,
            BLOCK_HALF=round_up_to_power(half),
            IS_SHARED=is_shared,
            num_warps=1,
        )
    return cos, sin


@jit()
def _apply_rotary(
    q,
    k,
    v,
    cos,
    sin,
    out_q,
    out_k,
    keys,  # [B, L, H_kv, D], a cache
    values,
    start,  # [B] int64, the first slot to write to
    T,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_oqb,
    stride_oqh,
    stride_oqt,
    stride_okb,
    stride_okh,
    stride_okt,
    stride_cb,
    stride_ct,
    stride_sb,
    stride_st,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_cached_kb,
    stride_cached_kl,
    stride_cached_kh,
    stride_cached_vb,
    stride_cached_vl,
    stride_cached_vh,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    IS_SHARED: tl.constexpr,
    HAS_CACHE: tl.constexpr,
):
    token = tl.program_id(0)
    b = (token // T).to(tl.int64)
    t = token % T
    d = tl.arange(0, BLOCK_HALF)
    is_d = d < HALF
    cos_at = cos + b * stride_cb + t * stride_ct + d
    sin_at = sin + b * stride_sb + t * stride_st + d
    cos_1 = tl.load(cos_at, mask=is_d, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_at, mask=is_d, other=0.0).to(tl.float32)[None, :]
    if IS_SHARED:
        cos_2, sin_2 = cos_1, sin_1
    else:
        cos_2 = tl.load(cos_at + HALF, mask=is_d, other=0.0).to(tl.float32)[None, :]
        sin_2 = tl.load(sin_at + HALF, mask=is_d, other=0.0).to(tl.float32)[None, :]

    NUM_Q: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    NUM_K: tl.constexpr = (H_KV + BLOCK_H - 1) // BLOCK_H
    group = tl.program_id(1)
    if group < NUM_Q:
        h = group * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (h < H)[:, None] & is_d[None, :]
        x_at = q + b * stride_qb + t * stride_qt + h[:, None] * stride_qh + d[None, :]
        y_at = out_q + b * stride_oqb + t * stride_oqt + h[:, None] * stride_oqh + d[None, :]
        y_1, y_2 = _turn(x_at, mask, cos_1, sin_1, cos_2, sin_2, HALF)
        tl.store(y_at, y_1, mask=mask)
        tl.store(y_at + HALF, y_2, mask=mask)
    elif group < NUM_Q + NUM_K:
        h = (group - NUM_Q) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (h < H_KV)[:, None] & is_d[None, :]
        x_at = k + b * stride_kb + t * stride_kt + h[:, None] * stride_kh + d[None, :]
        y_at = out_k + b * stride_okb + t * stride_okt + h[:, None] * stride_okh + d[None, :]
        y_1, y_2 = _turn(x_at, mask, cos_1, sin_1, cos_2, sin_2, HALF)
        tl.store(y_at, y_1, mask=mask)
        tl.store(y_at + HALF, y_2, mask=mask)
        if HAS_CACHE:
            slot = tl.load(start + b) + t
            y_at = keys + b * stride_cached_kb + slot * stride_cached_kl + h[:, None] * stride_cached_kh + d[None, :]
            tl.store(y_at, y_1, mask=mask)
            tl.store(y_at + HALF, y_2, mask=mask)
    elif HAS_CACHE:
        h = (group - NUM_Q - NUM_K) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (h < H_KV)[:, None] & is_d[None, :]
        slot = tl.load(start + b) + t
        x_at = v + b * stride_vb + t * stride_vt + h[:, None] * stride_vh + d[None, :]
        y_at = values + b * stride_cached_vb + slot * stride_cached_vl + h[:, None] * stride_cached_vh + d[None, :]
        tl.store(y_at, tl.load(x_at, mask=mask), mask=mask)
        tl.store(y_at + HALF, tl.load(x_at + HALF, mask=mask), mask=mask)


@jit()
def _turn(x_at, mask, cos_1, sin_1, cos_2, sin_2, HALF: tl.constexpr):
    dtype: tl.constexpr = x_at.dtype.element_ty
    x_1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    y_1 = (x_1 * cos_1).to(dtype).to(tl.float32) + (-x_2 * sin_1).to(dtype).to(tl.float32)
    y_2 = (x_2 * cos_2).to(dtype).to(tl.float32) + (x_1 * sin_2).to(dtype).to(tl.float32)
    return y_1.to(dtype), y_2.to(dtype)


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, outs: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel of `apply_rotary_eager`, for tensors of one dtype, each contiguous in its last dimension.

    Args:
        outs: Where the results are to go, shaped as q and k; new tensors if left out.
    """
    outs = (torch.empty_like(q), torch.empty_like(k)) if outs is None else outs
    _launch(Rotation(q, k, cos, sin, *outs))
    return outs


def rotate_and_write(rotation: Rotation, v: Tensor, keys: Tensor, values: Tensor, start: Tensor) -> None:
    """The kernel of `apply_rotary_eager` and, with its keys, of `attention.write_rows_eager`: one instead of two.

    Args:
        rotation: Written to.
        v: [B, H_kv, T, D], as all others contiguous in the last dimension.
        keys: [B, L, H_kv, D], a cache, written to.
        values: Likewise.
        start: [B] int64, the slot of each row's first token.
    """
    _launch(rotation, (v, keys, values, start))


def _launch(rotation: Rotation, cache: tuple[Tensor, Tensor, Tensor, Tensor] | None = None) -> None:
    q, k, cos, sin, out_q, out_k = rotation
    require(q.device)
    B, H, T, D = q.shape
    H_kv = k.shape[1]
    v, keys, values, start = (k, out_k, out_k, out_k) if cache is None else cache  # unused without a cache
    block_h = min(8, round_up_to_power(max(H, H_kv)))
    num_groups = -(-H // block_h) + (1 if cache is None else 2) * -(-H_kv // block_h)
    # A broadcast batch has stride 0.
    cos_stride_b = cos.stride(0) if cos.shape[0] == B else 0
    sin_stride_b = sin.stride(0) if sin.shape[0] == B else 0
    with torch.cuda.device_of(q):
        _apply_rotary[B * T, num_groups](
            q,
            k,
            v,
            cos,
            sin,
            out_q,
            out_k,
            keys,
            values,
            start,
            T,
            *q.stride()[:3],
            *k.stride()[:3],
            *out_q.stride()[:3],
            *out_k.stride()[:3],
            cos_stride_b,
            cos.stride(1),
            sin_stride_b,
            sin.stride(1),
            *v.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            H=H,
            H_KV=H_kv,
            HALF=D // 2,
            BLOCK_HALF=round_up_to_power(D // 2),
            BLOCK_H=block_h,
            IS_SHARED=cos.shape[-1] != D,
            HAS_CACHE=cache is not None,
            num_warps=2,
            # Else LLVM makes 16-bit arithmetic of this, and of a rounded product and the sum one `fma`, rounded once.
            enable_fp_fusion=False,
        )
