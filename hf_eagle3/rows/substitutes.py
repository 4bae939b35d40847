"""What stands in the place of a module's method for as long as somebody needs it."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_lock = threading.Lock()  # of all modules' namespaces


class Substitute:
    """Stands in the place of a method of a module while `in_place`, for all threads that are inside at once.

    Args:
        module: The host's. Only a weak reference is kept.
        name: Of the method.
    """

    def __init__(self, module: nn.Module, name: str = "forward"):
        self._reference, self._name = weakref.ref(module), name
        self.original: Callable | None = None  # while this stands in its place
        self.had_its_own = False  # whether the original was the instance's
        self._users: set[int] = set()

    @property
    def module(self) -> Any:  # Any: attributes of the host's are no part of a Module
        """The host's."""
        module = self._reference()
        assert module is not None
        return module

    def enter(self, user: object) -> None:
        """Stand in the module's place, whoever else uses it. Twice for one user is once."""
        namespace = vars(self.module)
        with _lock:
            if not self._users:
                self.had_its_own, self.original = self._name in namespace, getattr(self.module, self._name)
                namespace[self._name] = self
            self._users.add(id(user))

    def leave(self, user: object) -> None:
        """Undo the `enter` of a user, if there was one; the last one gives the module its own method back."""
        namespace = vars(self.module)
        with _lock:
            is_used = bool(self._users)
            self._users.discard(id(user))
            if not is_used or self._users:
                return
            if self.had_its_own:
                namespace[self._name] = self.original
            else:
                del namespace[self._name]
            self.original = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Stand in the module's place."""
        user = object()
        self.enter(user)
        try:
            yield
        finally:
            self.leave(user)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: the module's
        """What the module computes meanwhile."""
        raise NotImplementedError
