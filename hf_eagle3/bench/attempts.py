"""Runs that may fail, for want of memory or in other people's code, and what is left after that."""

import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from ..data_parallel import Team
from ..decoding.arena import release_graphs
from ..tensor_parallel import find_peers
from .results import Skipped
from .ways import OF_OTHERS, ONE_ROW

T = TypeVar("T")

# Errors of other people's code, which cost its column and not the run.
FOREIGN_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)


@dataclass
class Attempts:
    """Runs that may fail for want of memory. A run that fails in one process is skipped in all."""

    target: PreTrainedModel
    team: Team
    batch_size: int
    skipped: list[Skipped] = field(default_factory=list)

    def run(self, kinds: Sequence[str], work: Callable[[], T], *, saying: str = "") -> T | None:
        """The result of `work`; None if it failed in some process, and then `kinds` are skipped for the reason given."""
        done, reason = None, ""
        try:
            done = work()
        except FOREIGN_ERRORS as error:
            if not is_survivable(error, kinds, self.target):
                raise
            reason = saying + describe_failure(error)
        reasons = [r for r in self.team.gather(reason) if r]
        if not reasons:
            return done
        self.skipped += [Skipped(kind, self.batch_size, reasons[0]) for kind in kinds]
        gc.collect()  # frees tensors that the traceback holds
        free_memory(self.target)
        return None


def free_memory(target: PreTrainedModel) -> None:
    """Give back what earlier runs keep on a GPU."""
    if target.device.type == "cuda":
        release_graphs()
        torch.cuda.empty_cache()


def is_survivable(error: Exception, kinds: Sequence[str], target: PreTrainedModel) -> bool:
    """Whether other kinds can be measured after `error` in these."""
    if isinstance(error, torch.OutOfMemoryError):
        return find_peers(target) is None  # processes that share a target would wait for this one inside a forward
    return OF_OTHERS.issuperset(kinds)


def describe_failure(error: Exception) -> str:
    """Why there is no number, in a sentence without its full stop."""
    text = str(error)
    if text in ONE_ROW:
        return text
    if isinstance(error, torch.OutOfMemoryError):  # the rest of the message, on memory and settings, is long
        text = re.split(r" (?=Process \d|Including |Of the allocated |If reserved )", text)[0]
    return f"{type(error).__name__}: {text}".rstrip(".")
