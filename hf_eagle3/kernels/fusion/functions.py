"""Kernels in place of functions that the host calls on PyTorch: linear layers, sums before norms, argmax."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import language
from ..argmax import argmax_rows
from ..deferred import DEFERRED, Deferred
from ..linear import is_worth_it, linear_small
from ..norms import SUM
from .projections import is_ours
from .trials import DTYPES, can_run

MANY_VALUES = 4096  # row length from which the kernel is used: several programs then share a row


class FunctionSwaps(TorchFunctionMode):
    """Runs linear layers over few rows, sums before norms and argmax over a vocabulary as kernels.

    Args:
        widths: Widths of the norms whose kernel can take a sum.
        linear: Kernel for linear layers.
        argmax: Kernel for argmax over the last dimension.
    """

    def __init__(
        self,
        widths: set[int],
        *,
        linear: Callable[..., Tensor] = linear_small,
        argmax: Callable[[Tensor], Tensor] = argmax_rows,
    ) -> None:
        super().__init__()
        self._deferred, self._widths, self._linear, self._argmax = Deferred(), widths, linear, argmax

    def __enter__(self) -> FunctionSwaps:
        self._token = DEFERRED.set(self._deferred)
        return super().__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        DEFERRED.reset(self._token)
        if kind is None:
            self._deferred.finish()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) != "__get__":  # reading a property needs no values
            self._deferred.finish()
        if func in _ADDITIONS and not kwargs and _can_add(self._widths, *args):
            total = torch.empty_like(args[0])
            self._deferred.defer(SUM, total, args, lambda: torch.add(*args, out=total))
            return total
        if func is F.linear and len(args) >= 2 and args[1].dim() == 2 and _is_small(*args, **kwargs):
            return self._linear(*args, **kwargs)
        if func is Tensor.argmax and not kwargs and _is_vocabulary(*args):
            return self._argmax(args[0])
        return func(*args, **kwargs)


_ADDITIONS = (Tensor.add, torch.add)


def _can_add(widths: set[int], x: Any, y: Any = None, *more: Any) -> bool:
    """Whether a norm's kernel can take the sum of `x` and `y`: contiguous, of one shape, as wide as some norm."""
    return (
        not more
        and isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.shape == y.shape
        and x.dim() > 1
        and x.shape[-1] in widths
        and x.numel() > 0
        and x.is_contiguous()
        and y.is_contiguous()
        and can_run(x, y)
    )


def _is_vocabulary(x: Tensor, dim: Any = None, *more: Any) -> bool:
    """Whether `x.argmax(dim)` searches rows of at least `MANY_VALUES`."""
    return (
        not more
        and dim == -1
        and type(x) is Tensor
        and x.dim() > 1
        and x.numel() > 0
        and x.shape[-1] >= MANY_VALUES
        and x.dtype in (*DTYPES, torch.float32)
        and language.is_available(x.device)
    )


def _is_small(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether our kernel can run this linear layer, and is faster."""
    N, K = weight.shape
    return is_ours(x, weight, bias) and is_worth_it(N, x.numel() // K)
