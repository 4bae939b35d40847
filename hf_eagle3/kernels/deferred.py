"""Operations deferred while a round is recorded, so that a later kernel can do them together with its own.

The result of a deferred operation is allocated at once and stays uninitialised. A kernel that can do the operation asks
for it by that result; before anything else reads the result, `finish` must run. `fusion` sees to this by looking at every
call of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor


class Deferred:
    """At most one operation."""

    def __init__(self) -> None:
        self._pending: tuple[str, Tensor, tuple[Any, ...], Callable[[], object]] | None = None

    def defer(self, kind: str, result: Tensor, parts: tuple[Any, ...], compute: Callable[[], object]) -> None:
        """Leave an operation for later; one that was deferred before is computed now.

        Args:
            kind: Name of the operation, by which a kernel asks for it.
            result: Tensor that the operation will fill.
            parts: Operands, for the kernel that takes the operation over.
            compute: The operation itself, for when no kernel does.
        """
        self.finish()
        self._pending = kind, result, parts, compute

    def finish(self) -> None:
        """Compute the deferred operation, if there is one."""
        if self._pending is not None:
            compute, self._pending = self._pending[3], None
            compute()

    def take(self, kind: str, result: Tensor) -> Any:
        """The operands of a deferred operation, for the caller to compute now; None unless `result` waits for `kind`."""
        if self._pending is None or self._pending[0] != kind or self._pending[1] is not result:
            return None
        parts, self._pending = self._pending[2], None
        return parts


# Set while a round is recorded.
DEFERRED: ContextVar[Deferred | None] = ContextVar("deferred", default=None)


def take(kind: str, result: Tensor) -> Any:
    """As `Deferred.take`; None while no round is recorded."""
    deferred = DEFERRED.get()
    return None if deferred is None else deferred.take(kind, result)
