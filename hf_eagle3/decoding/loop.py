"""Reading rounds late: reports on their way to the host while later rounds are launched."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..speculation.shape import DraftShape
from .row import Row


class DeviceRead:
    """A report on its way to the host, which need not wait for it yet."""

    def __init__(self, report: Tensor):
        self._copy = torch.empty(report.shape, dtype=report.dtype, pin_memory=report.is_cuda)
        self._copy.copy_(report, non_blocking=report.is_cuda)
        self._event = torch.cuda.Event(enable_timing=True) if report.is_cuda else None
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(report.device))

    def read(self) -> list[int]:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()

    def seconds_since(self, earlier: "DeviceRead") -> float:
        """Seconds of the device between two reports; both have been waited for."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1000


class HostTime:
    """When a round ended that the host waited for."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def seconds_since(self, earlier: "HostTime") -> float:
        """Seconds between two of them."""
        return self._time - earlier._time


class Report(NamedTuple):
    """What a round gave, on the host."""

    tokens: list[list[int]]  # [B][D+1], the first num_accepted+1 count
    num_accepted: list[int]  # [B]
    ends: list[int]  # [B], the nodes at which accepted paths end
    is_nan: bool


class Launched(NamedTuple):
    """An accepted round that the host has not looked at yet."""

    rows: list[Row]  # [B]
    shape: DraftShape | None  # None after the prompt
    is_steady: bool  # whether nothing but a round of this shape ran since the one before
    device_read: DeviceRead
    scores: Tensor  # [B, N+1, V]
    logits: Tensor  # [B, N+1, V]
    path: Tensor | None  # [B, D+1], as of `Verdict`

    def read(self) -> Report:
        """Wait for its report: the round's wait."""
        B = len(self.rows)
        flat = self.device_read.read()
        width = (len(flat) - 2 * B - 1) // B
        tokens = [flat[b * width : (b + 1) * width] for b in range(B)]
        return Report(tokens, flat[B * width : -B - 1], flat[-B - 1 : -1], bool(flat[-1]))

    def append(self, report: Report) -> None:
        """Append what was accepted to the text of each row that has not ended. What fails is the row's own."""
        for b, row in enumerate(self.rows):
            if not row.is_live:
                continue
            keeps = row.scores is not None or row.logits is not None  # a view of each is most of the time here
            try:
                for k in range(report.num_accepted[b] + 1):
                    node = k if self.path is None else self.path[b, k]
                    chosen_by = (self.scores[b, node], self.logits[b, node]) if keeps else (None, None)
                    if row.append(report.tokens[b][k], *chosen_by):
                        break
            except Exception as error:  # noqa: BLE001  raised where the row is asked for
                row.fail(error)


def note_parts(rows: list[Row], starts: list[int], shape: DraftShape | None) -> None:
    """Note a round of that shape in its rows, which had `starts` new tokens before it."""
    for row, start in zip(rows, starts, strict=True):
        row.took_part(shape.depth if shape is not None else 0, start)
