"""Who may use a target's layers, and its arena, when."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from transformers import PreTrainedModel

BUSY = "another call of this target is under way"


_lock = threading.Lock()  # guards _busy and _locks
_busy: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()  # targets whose arena a call uses
_locks: "weakref.WeakKeyDictionary[PreTrainedModel, LayerLock]" = weakref.WeakKeyDictionary()


def why_busy(target: PreTrainedModel) -> str | None:
    """That another call uses the target's arena, if so."""
    return BUSY if target in _busy else None


def take_arena(target: PreTrainedModel) -> bool:
    """Reserve the target's arena for one call, until `give_arena_back`; False if another call has it."""
    with _lock:
        is_free = target not in _busy
        _busy.add(target)
    return is_free


def give_arena_back(target: PreTrainedModel) -> None:
    """End a reservation."""
    with _lock:
        _busy.discard(target)


class LayerLock:
    """A shared and exclusive lock on a target's layers.

    Any number of threads run them at once, inside the lock as a context. A capture changes them, so it takes the lock
    `alone`, after all others have left.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running, self._records = 0, False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._records)
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Exclusively, for a capture."""
        with self._changed:
            self._changed.wait_for(lambda: not self._records and not self._running)
            self._records = True
        try:
            yield
        finally:
            with self._changed:
                self._records = False
                self._changed.notify_all()


def lock_of(target: PreTrainedModel) -> LayerLock:
    """The lock on the layers of `target`."""
    with _lock:
        return _locks.setdefault(target, LayerLock())


def leave(context: AbstractContextManager, lock: LayerLock) -> None:
    """Let a call leave nothing of `context` behind, even if it is interrupted while that is entered."""
    with lock:
        context.__exit__(None, None, None)
