"""Ctrl-C: a quiet end while the command line is still importing, as later; and an end of one answer alone."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType

from .terminal import note

INTERRUPTED = 130  # exit status, as shells have it


def is_command_line() -> bool:
    """Whether this process is `hf-eagle3` or `python -m hf_eagle3.cli`, and not a user's own program."""
    if sys.argv[:1] == ["-m"]:  # while Python looks for the module
        return next((module for flag, module in pairwise(sys.orig_argv) if flag == "-m"), "") == "hf_eagle3.cli"
    return Path(sys.argv[0] if sys.argv else "").name.removesuffix(".exe") == "hf-eagle3"


def end_quietly() -> None:
    """Let Ctrl-C end a process of the command line without a traceback, until `raise_again`."""
    if is_command_line() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, for which commands clean up."""
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def saying_on_interrupt(describe: Callable[[], str | None]) -> Iterator[None]:
    """Say what becomes of a run that Ctrl-C ends: `describe`, asked then, gives one sentence or more, or None."""
    try:
        yield
    except KeyboardInterrupt:
        if (kept := describe()) is not None:
            note(f"Interrupted. {kept}")
        raise


@contextmanager
def noticing_interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, in the place of KeyboardInterrupt; a second one raises as ever."""
    event = threading.Event()

    def notice(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            signal.default_int_handler(number, frame)
        event.set()

    if threading.current_thread() is not threading.main_thread():  # where no signal can be heard
        yield event
        return
    before = signal.signal(signal.SIGINT, notice)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
