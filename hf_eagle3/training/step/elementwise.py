"""The elementwise work between the matrix products of a training step, fused on a GPU.

Each function here and elsewhere that goes through `fuse_on_gpu` is plain PyTorch; on a GPU `torch.compile` makes one
kernel of it and one of its gradient, in a few seconds each, once a process.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import language

Function = TypeVar("Function", bound=Callable[..., Any])


def fuse_on_gpu(function: Function, like: Tensor, any_size: bool = False) -> Function:
    """`function`, compiled if `like` is in half precision on a GPU with Triton.

    Args:
        any_size: Compile for all sizes at once; otherwise for the first size, and for all others at the second.
    """
    fuses = like.is_cuda and like.dtype in (torch.bfloat16, torch.float16) and language.is_available(like.device)
    return _compiled(function, any_size) if fuses else function


@cache
def _compiled(function: Function, any_size: bool) -> Function:
    return torch.compile(function, dynamic=True if any_size else None)  # type: ignore[return-value]


def working_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else otherwise


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """An RMSNorm of the host's, in the dtype of `x`, float32 inside."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", enabled=False):
            return F.rms_norm(x, weight.shape, weight.to(x.dtype), module.variance_epsilon)  # type: ignore[arg-type]
    return module(x).to(x.dtype)


def bare_norm(module: nn.Module, x: Tensor) -> Tensor:
    """An RMSNorm of the host's without its weight, in the dtype of `x`, float32 inside."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], None, module.variance_epsilon)  # type: ignore[arg-type]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on heads [n, heads, D]; `cos` and `sin` [n, D], halves alike (arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up
