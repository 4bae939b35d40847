"""Enter and leave: all swaps of a model at once, in this thread alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
from torch import nn

from .. import language
from .experts import swap_experts
from .functions import FunctionSwaps
from .modules import swap_angles, swap_gated_norms, swap_mlps, swap_norms, swap_rotaries
from .projections import group_projections
from .trials import Swap, SwapLog, Swaps, swap_in

logger = logging.getLogger(__name__)


@contextmanager
def fused(*models: nn.Module) -> Iterator[Swaps]:
    """Run linear layers and experts of `models` over few rows, norms, rotary embeddings and gated MLPs as kernels.

    A sum right before a norm is computed by that norm's kernel, and the argmax over a vocabulary is a kernel too. For
    capture and the warm-up before it; the graph keeps the kernels. Other threads run stock layers throughout, and on
    leaving everything is as it was.
    """
    swaps = Swaps()
    widths: set[int] = set()
    with ExitStack() as stack:
        for model in models:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            if not language.is_available(device):
                continue
            with torch.no_grad():
                widths |= swap_norms(model, swaps, stack)
                swap_gated_norms(model, swaps, stack)
                swap_rotaries(model, swaps, stack)
                swap_angles(model, swaps, stack)
                swap_mlps(model, swaps, stack)
                swap_experts(model, swaps, stack)
                group_projections(model, swaps, stack)
        logger.info("Fused %s: %s", ", ".join(type(model).__name__ for model in models), swaps)
        stack.enter_context(FunctionSwaps(widths))
        yield swaps


class FusedElements:
    """`fused` for many rows: norms, rotary embeddings and gated MLPs; linear layers are left to cuBLAS.

    A context manager that can be entered repeatedly; the trials run at the first entry.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._swaps: list[Swap] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> None:
        if self._swaps is None:
            self._swaps = self._find()
        for swap in self._swaps:
            swap_in(self._stack, *swap)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _find(self) -> list[Swap]:
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        if not language.is_available(device):
            return []
        swaps: tuple[Callable[[nn.Module, Swaps, ExitStack], object], ...] = (swap_norms, swap_rotaries, swap_mlps)
        with SwapLog() as stack, torch.no_grad():
            for swap in swaps:
                swap(self._model, Swaps(), stack)
            return stack.swaps
