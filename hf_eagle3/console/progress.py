"""What a command is doing, on stderr: a line that moves in a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from ..modeling.text_eagle3 import one_line
from .terminal import note

SELDOM = 10.0  # seconds between lines of one step, where there is no terminal


class Progress:
    """The steps of a command, each named before it begins.

        with Progress() as step:
            step("Loading the target")
            for i, prompt in enumerate(prompts):
                step("Answering", i, len(prompts))

    Args:
        is_silent: Say nothing: in processes other than the first.
    """

    def __init__(self, *, is_silent: bool = False):
        self._is_silent = is_silent
        self._bar: Any = None  # rich's, in a terminal
        self._text, self._time = "", 0.0

    def __call__(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Begin a step, or go on with it: `done` of `total`."""
        if self._is_silent:
            return
        text = one_line(text)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=text, completed=done, total=total)
            return
        now = time.monotonic()
        if text != self._text or now - self._time > SELDOM:
            note(text + (f" ({done} of {total})" if total and done else "") + " ...")
            self._text, self._time = text, now

    @contextmanager
    def aside(self, text: str) -> Iterator[None]:
        """A step with bars of its own, as the host has for downloads: the moving line makes room for them."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()
        self(text)
        yield
        if bar is not None:
            self._bar = bar
            bar.start()

    def __enter__(self) -> "Progress":
        if not self._is_silent and sys.stderr.isatty():
            self._bar = make_bar()
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_bar() -> Any:  # rich's Progress
    """A line with a spinner, the step, how far it is, and the time since it began."""
    from rich.console import Console  # a tenth of a second, and of no use to most commands
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    class Counted(BarColumn):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.total else ""

    class Count(MofNCompleteColumn):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.total else ""

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        Counted(),
        Count(),
        TimeElapsedColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=None)
    return bar
