"""Projections of one input as one kernel: queries, keys and values; those into a gated delta net."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..linear import MAX_ROWS, linear_group
from ..qkv import PROJECTIONS, view_as_one
from .trials import Swaps, can_run, is_plain, swap_in

# Names of projections that modules call in turn with one input. The kernel takes three.
GROUPS = (PROJECTIONS, ("in_proj_qkv", "in_proj_z", "in_proj_b"))


def group_projections(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Replace projections of one module, and of one input, by one launch."""
    for module, names in product(model.modules(), GROUPS):
        parts: list[Any] = [getattr(module, name, None) for name in names]
        if not all(type(part) is nn.Linear and is_plain(part) and can_run(part.weight) for part in parts):
            continue
        group = _Group(parts)
        swaps.num_groups += 1
        for i, part in enumerate(parts):
            swap_in(stack, vars(part), "forward", group.make_forward(i), part.forward)


class _Group:
    """Projections called in turn with the same tensor: the first call computes all."""

    def __init__(self, parts: list[nn.Linear]):
        self.parts = parts
        self.originals = [part.forward for part in parts]
        self.x: Tensor | None = None
        self.version: int | None = None
        self.results: dict[int, Tensor] = {}

    def make_forward(self, i: int) -> Callable[[Tensor], Tensor]:
        """The forward that replaces that of part `i`."""

        def forward(x: Tensor) -> Tensor:
            # Inference tensors have no version counter. No known model writes to its input between two projections.
            version = None if x.is_inference() else x._version
            if i == 0 and (results := self._run(x)) is not None:
                first, *rest = results
                self.x, self.version, self.results = x, version, dict(enumerate(rest, 1))
                return first
            is_ready = i in self.results and x is self.x and version == self.version
            result = self.results.pop(i) if is_ready else self.originals[i](x)
            if not self.results:
                self.x = None
            return result

        return forward

    def _run(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """All projections by one product: our kernel over few rows, else joined weights. None if neither fits."""
        if not all(is_ours(x, part.weight, part.bias) for part in self.parts):
            return None
        weights, biases = [part.weight for part in self.parts], [part.bias for part in self.parts]
        if x.numel() <= MAX_ROWS * x.shape[-1]:
            return linear_group(x, weights, biases)
        weight, bias = view_as_one(weights), None
        given = [bias for bias in biases if bias is not None]
        if given:
            bias = view_as_one(given) if len(given) == len(biases) else None
        if weight is None or (given and bias is None):
            return None
        return F.linear(x, weight, bias).split([len(w) for w in weights], dim=-1)


def is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our linear kernels can run this layer."""
    given = [x, weight] if bias is None else [x, weight, bias]
    return can_run(*given) and weight.is_contiguous() and x.numel() > 0 and x.shape[-1] == weight.shape[-1]
