"""What an engine has: how much its memory holds, and where its time goes."""

from typing import NamedTuple

from ..speculation.stats import Stopwatch


class Clocks(NamedTuple):
    """Where the time of a call goes; the rest is verification."""

    draft: Stopwatch
    accept: Stopwatch
    host: Stopwatch


class Room(NamedTuple):
    """How much an engine's memory holds at first."""

    num_rows: int
    prompt_length: int  # of the longest
    max_new: int | None  # tokens that a row may get, if there is a limit
    is_open: bool = False  # rows may come while others run, with settings of their own
