"""Operations that are put off while a round is recorded, for whoever comes next to do in one kernel with its own.

Their results exist already, and hold nothing. Who can take an operation over asks for it by its result; before anything
else reads that, `finish` must run. `fusion` sees to this by looking at all that is asked of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor


class Late:
    """At most one operation."""

    def __init__(self) -> None:
        self._pending: tuple[str, Tensor, tuple[Any, ...], Callable[[], object]] | None = None

    def put_off(self, kind: str, result: Tensor, parts: tuple[Any, ...], compute: Callable[[], object]) -> None:
        """Leave an operation for later.

        Args:
            kind: What it is, for who takes it over.
            result: What it will have been asked for by.
            parts: What who takes it over needs.
            compute: The operation.
        """
        self.finish()
        self._pending = kind, result, parts, compute

    def finish(self) -> None:
        """Compute what was put off."""
        if self._pending is not None:
            compute, self._pending = self._pending[3], None
            compute()

    def take(self, kind: str, result: Tensor) -> Any:
        """The parts of what `result` will be, if that was put off, else None: whoever asks computes it now."""
        if self._pending is None or self._pending[0] != kind or self._pending[1] is not result:
            return None
        parts, self._pending = self._pending[2], None
        return parts


# While a round is recorded.
LATE: ContextVar[Late | None] = ContextVar("late", default=None)


def take(kind: str, result: Tensor) -> Any:
    """As `Late.take`; None where nothing is put off."""
    late = LATE.get()
    return None if late is None else late.take(kind, result)
