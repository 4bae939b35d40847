"""The middle of a gated MLP, act(gate) * up, in one kernel.

Rounds where the host does: after the activation, and after the product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .language import jit, require, tl

BLOCK = 1024


def silu(x: Tensor) -> Tensor:
    """SiLU: x times its sigmoid."""
    return F.silu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula."""
    return F.gelu(x, approximate="tanh")


# Activations that kernels compute, by their names there.
ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def gate_eager(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """act(gate) * up, all of one shape and dtype; `activation` names one of `ACTIVATIONS`."""
    return ACTIVATIONS[activation](gate) * up


@jit()
def activate(x, NAME: tl.constexpr):
    """`x` float32 through the activation called NAME."""
    if NAME == "silu":
        return x / (1 + tl.exp(-x))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return 0.5 * x * (2 - 2 / (tl.exp(2 * inner) + 1))  # 1 + tanh(inner)


@jit()
def _gate(gate, up, out, size, BLOCK: tl.constexpr, NAME: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < size).to(tl.float32)
    u = tl.load(up + at, mask=at < size).to(tl.float32)
    activated = activate(g, NAME).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (activated * u).to(out.dtype.element_ty), mask=at < size)


def gate(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """The kernel of `gate_eager`. Equal to it but for the last bit of the activation's exponential."""
    require(gate.device)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _gate[(-(-gate.numel() // BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, NAME=activation)
    return out
