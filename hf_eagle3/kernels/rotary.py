"""Rotary position embedding of queries and keys in one kernel, and the cosines and sines that it takes in another.

Rounds where the host does: after each product, and after the sum. So 16-bit results are the host's, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import jit, require, round_up_to_power, tl


def apply_rotary_eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate `q` [B, H, T, D] and `k` [B, H_kv, T, D] by the angles of their positions.

    The pairs that turn together are (i, i + D/2).

    Args:
        cos: [B or 1, T, D], or [.., D/2] where both of a pair share it.
        sin: Likewise.

    Returns:
        What became of q and k, in their shapes.
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
    cos,
    sin,
    out_q,
    out_k,
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
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    IS_SHARED: tl.constexpr,
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
    group = tl.program_id(1)
    if group < NUM_Q:
        h = group * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (h < H)[:, None] & is_d[None, :]
        x_at = q + b * stride_qb + t * stride_qt + h[:, None] * stride_qh + d[None, :]
        y_at = out_q + b * stride_oqb + t * stride_oqt + h[:, None] * stride_oqh + d[None, :]
        _turn(x_at, y_at, mask, cos_1, sin_1, cos_2, sin_2, HALF)
    else:
        h = (group - NUM_Q) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (h < H_KV)[:, None] & is_d[None, :]
        x_at = k + b * stride_kb + t * stride_kt + h[:, None] * stride_kh + d[None, :]
        y_at = out_k + b * stride_okb + t * stride_okt + h[:, None] * stride_okh + d[None, :]
        _turn(x_at, y_at, mask, cos_1, sin_1, cos_2, sin_2, HALF)


@jit()
def _turn(x_at, y_at, mask, cos_1, sin_1, cos_2, sin_2, HALF: tl.constexpr):
    dtype: tl.constexpr = y_at.dtype.element_ty
    x_1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    y_1 = (x_1 * cos_1).to(dtype).to(tl.float32) + (-x_2 * sin_1).to(dtype).to(tl.float32)
    y_2 = (x_2 * cos_2).to(dtype).to(tl.float32) + (x_1 * sin_2).to(dtype).to(tl.float32)
    tl.store(y_at, y_1.to(dtype), mask=mask)
    tl.store(y_at + HALF, y_2.to(dtype), mask=mask)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of `apply_rotary_eager`, for tensors of one dtype, each contiguous in its last dimension."""
    require(q.device)
    B, H, T, D = q.shape
    H_kv = k.shape[1]
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    block_h = min(8, round_up_to_power(max(H, H_kv)))
    # A broadcast batch has stride 0.
    cos_stride_b = cos.stride(0) if cos.shape[0] == B else 0
    sin_stride_b = sin.stride(0) if sin.shape[0] == B else 0
    with torch.cuda.device_of(q):
        _apply_rotary[B * T, -(-H // block_h) + -(-H_kv // block_h)](
            q,
            k,
            cos,
            sin,
            out_q,
            out_k,
            T,
            *q.stride()[:3],
            *k.stride()[:3],
            *out_q.stride()[:3],
            *out_k.stride()[:3],
            cos_stride_b,
            cos.stride(1),
            sin_stride_b,
            sin.stride(1),
            H=H,
            H_KV=H_kv,
            HALF=D // 2,
            BLOCK_HALF=round_up_to_power(D // 2),
            BLOCK_H=block_h,
            IS_SHARED=cos.shape[-1] != D,
            num_warps=2,
            # Else LLVM makes 16-bit arithmetic of this, and of a rounded product and the sum one `fma`, rounded once.
            enable_fp_fusion=False,
        )
    return out_q, out_k
