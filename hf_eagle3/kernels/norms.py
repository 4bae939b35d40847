"""RMSNorm in one kernel, in the three ways that host models round it.

All square, average and scale in float32. They differ in where the weight comes in:

* llama: the scaled input is rounded to its dtype, then multiplied by the weight (and rounded again);
* wide: multiplied by the weight in float32, then rounded (GptOss, Olmo 2);
* shifted: multiplied by 1 + weight in float32, then rounded (Gemma).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import jit, require, round_up_to_power, tl

VARIANTS = ("llama", "wide", "shifted")
GATED_VARIANTS = ("llama", "wide")
SUM = "sum"  # the kind of a sum that is deferred, for `add_rms_norm` to take


def rms_norm_eager(x: Tensor, weight: Tensor, *, eps: float, variant: str = "llama") -> Tensor:
    """`x` [..., D] over its root mean square, times `weight` [D], as `variant` of `VARIANTS` rounds it; `x`'s dtype."""
    scaled = x.float()
    scaled = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + eps)
    if variant == "llama":
        return weight * scaled.to(x.dtype)
    wide_weight = weight.float() + 1 if variant == "shifted" else weight.float()
    return (wide_weight * scaled).to(x.dtype)


def add_rms_norm_eager(
    x: Tensor, y: Tensor, weight: Tensor, *, eps: float, variant: str = "llama"
) -> tuple[Tensor, Tensor]:
    """`x` + `y`, [..., D] both, and `rms_norm_eager` of that sum: a residual stream and what the next layer reads."""
    total = x + y
    return total, rms_norm_eager(total, weight, eps=eps, variant=variant)


@jit()
def _rms_norm(
    x,
    y,
    weight,
    total,
    out,
    num_rows,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    VARIANT: tl.constexpr,
    HAS_SUM: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    mask = (row < num_rows)[:, None] & (d < D)[None, :]
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    if HAS_SUM:
        added = (wide + tl.load(y + at, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, added, mask=mask)
        wide = added.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
    if VARIANT == "llama":
        scaled = scaled.to(out.dtype.element_ty).to(tl.float32)
    if VARIANT == "shifted":
        w = w + 1
    tl.store(out + at, (scaled * w).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, variant: str = "llama") -> Tensor:
    """The kernel of `rms_norm_eager`, for `x` and `weight` of one dtype.

    The sum of squares is taken in another order, so its last bit may differ; what is rounded to 16 bits is then equal
    almost always, and otherwise the neighbour.
    """
    x = x.contiguous()
    return _launch(x, None, weight, x, eps, variant)


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, *, eps: float, variant: str = "llama", total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel of `add_rms_norm_eager`, as `rms_norm`. The sum is what PyTorch's is.

    Args:
        total: Where the sum is to go, contiguous; a new tensor if left out.
    """
    x, y = x.contiguous(), y.contiguous()
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"x and y must be alike, got {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}.")
    total = torch.empty_like(x) if total is None else total
    return total, _launch(x, y, weight, total, eps, variant)


def _launch(x: Tensor, y: Tensor | None, weight: Tensor, total: Tensor, eps: float, variant: str) -> Tensor:
    require(x.device)
    D = x.shape[-1]
    out = torch.empty_like(x)
    num_rows = x.numel() // D
    block_d = round_up_to_power(D)
    block_r = max(1, 1024 // block_d)
    with torch.cuda.device_of(x):
        _rms_norm[(-(-num_rows // block_r),)](
            x,
            x if y is None else y,
            weight,
            total,
            out,
            num_rows,
            eps,
            D=D,
            BLOCK_D=block_d,
            BLOCK_R=block_r,
            VARIANT=variant,
            HAS_SUM=y is not None,
            num_warps=8 if block_d > 2048 else 4,
        )
    return out


def gated_rms_norm_eager(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, variant: str = "llama") -> Tensor:
    """`rms_norm_eager` of `x` [..., D] times SiLU(`gate`) [..., D], which is multiplied in float32 and rounded once.

    As "wide" nothing is rounded before.
    """
    activated = torch.nn.functional.silu(gate.float())
    if variant == "llama":
        return (rms_norm_eager(x, weight, eps=eps) * activated).to(x.dtype)
    return (rms_norm_eager(x.float(), weight, eps=eps, variant=variant) * activated).to(x.dtype)


@jit("num_rows")
def _gated_rms_norm(
    x, gate, weight, out, num_rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    mask = (row < num_rows)[:, None] & (d < D)[None, :]
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
    if VARIANT == "llama":
        scaled = (scaled.to(out.dtype.element_ty).to(tl.float32) * w).to(out.dtype.element_ty).to(tl.float32)
    else:
        scaled = scaled * w
    tl.store(out + at, (scaled * (g / (1.0 + tl.exp(-g)))).to(out.dtype.element_ty), mask=mask)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, variant: str = "llama") -> Tensor:
    """The kernel of `gated_rms_norm_eager`, for tensors of one dtype; sums are taken in another order."""
    require(x.device)
    x, gate = x.contiguous(), gate.contiguous()
    D = x.shape[-1]
    out = torch.empty_like(x)
    num_rows = x.numel() // D
    block_d = round_up_to_power(D)
    block_r = max(1, 512 // block_d)
    with torch.cuda.device_of(x):
        _gated_rms_norm[(-(-num_rows // block_r),)](
            x, gate, weight, out, num_rows, eps,
            D=D, BLOCK_D=block_d, BLOCK_R=block_r, VARIANT=variant,
        )  # fmt: skip
    return out
