"""Rows that come and go: who is admitted when, and what a failure takes with it. It knows no `generate()`."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ..compat import CACHE_NAME
from .chunks import ChunkedPrompt, takes_chunks
from .company import Company
from .engine import Engine, Room
from .prefill import Prompt
from .preparation import HOST_DROPS_MASKS
from .row import Row
from .straight import runs_straight


class Limits(NamedTuple):
    """What rows may take together."""

    num_places: int  # rows that run at once
    num_prompt_tokens: int  # of prompts between two rounds, where rows run
    num_slots: int | None = None  # of all rows, each as long as the longest; None: as memory allows


class NoRoomError(ValueError):
    """A row needs more slots than there are."""


class InFlight:
    """Decodes rows that come when they come. A context manager, which may be left and entered again.

    The engine is open while there is something to do: between texts it keeps neither hooks nor the target's arena.

    Args:
        target: The model to generate with.
        limits: What rows may take.
        settings: How prompts run.
        make_engine: An engine with that room, which is open to rows that come.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        limits: Limits,
        settings: GenerationConfig,
        make_engine: Callable[[Room], Engine],
    ):
        self._target, self.limits, self._settings, self._make_engine = target, limits, settings, make_engine
        self._waiting: deque[Row] = deque()
        self._chunked: tuple[Row, ChunkedPrompt] | None = None  # whose prompt is on its way, piece by piece
        self._engine: Engine | None = None
        self.begun: list[Row] = []  # rows that waited before the last step, and do no more
        self.graphs = ""  # how the newest rounds ran, in words
        self.rounds: Counter[str] = Counter()  # by what they proposed
        # A CPU runs each prompt by itself, so that none is cheaper in company.
        self._company = None if target.device.type == "cpu" else Company()
        self._takes_chunks, self._runs_straight = takes_chunks(target), runs_straight(target)

    def __enter__(self) -> "InFlight":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        engine, self._engine, self._chunked = self._engine, None, None
        if engine is not None:
            engine.__exit__(kind, error, trace)

    @property
    def running(self) -> list[Row]:
        """Rows that have their first token, or are about to. Other threads may ask."""
        engine = self._engine
        return [] if engine is None else [row for row in engine.rows if row.is_live]

    @property
    def num_waiting(self) -> int:
        """Rows that have not begun. Other threads may ask."""
        chunked = self._chunked
        waiting = [*tuple(self._waiting), *([] if chunked is None else [chunked[0]])]
        return sum(row.is_live for row in waiting)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._chunked is None and self._next_waiting() is None and not self.running

    def add(self, row: Row) -> None:
        """Let a row wait for a place.

        Raises:
            NoRoomError: It would never get one.
        """
        if self.limits.num_slots is not None and (needed := self._count_slots([row])) > self.limits.num_slots:
            raise NoRoomError(
                f"A prompt of {row.prompt.shape[1]} tokens and up to {row.max_new} new ones need {needed} slots, and "
                f"memory holds {self.limits.num_slots}."
            )
        self._waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Let a row end where it is; its place is free from the next step on."""
        row.end(len(row.text), cuts=False)

    def look_again(self) -> None:
        """Go on after others had the target, and may have changed it."""
        if self._engine is not None:
            self._engine.look_again()

    def step(self) -> None:
        """Admit what there is room for, and run a round. What fails ends those rows that it concerns (`Row.error`)."""
        self.begun = []
        self._admit()
        if self._engine is not None and self.running:
            start = time.perf_counter()
            try:
                self._engine.round()
                self.graphs = self._engine.graphs
                self.rounds[self._engine.phases.shape.name] += 1
                if self._company is not None:
                    self._company.note_round(time.perf_counter() - start)
            except Exception as error:  # noqa: BLE001  raised where the rows are asked for
                self._fail(self._engine.rows, error)
                self._close(error)
        if self.is_idle:
            self._close()

    # ---- admission ----

    def _admit(self) -> None:
        """Let rows begin, as many as fit, and as long prompts as others may wait for."""
        budget = self.limits.num_prompt_tokens if self.running else None  # else nobody waits
        budget = self._advance(budget)
        if self._is_company_awaited():
            return
        group: list[Row] = []
        while (row := self._next_waiting()) is not None and self._has_room([*group, row]):
            length, is_whole = row.prompt.shape[1], budget == self.limits.num_prompt_tokens and not group
            if budget is None or length <= budget or (is_whole and not self._takes_chunks):
                group.append(self._take_waiting())
                budget = None if budget is None else max(budget - length, 0)
            elif is_whole and self._chunked is None and length > self.limits.num_prompt_tokens:
                self._take_waiting()
                self._chunked = row, self._open([row]).prefill_in_chunks(row.prompt)
                self._advance(budget)
                break
            else:
                break
        if group:
            start, is_pause = time.perf_counter(), bool(self.running)
            self._begin(group, lambda engine: self._prefill(engine, group))
            if is_pause and self._company is not None:
                self._company.note_pause(time.perf_counter() - start)

    def _next_waiting(self) -> Row | None:
        while self._waiting and not self._waiting[0].is_live:  # cancelled
            self._take_waiting()
        return self._waiting[0] if self._waiting else None

    def _take_waiting(self) -> Row:
        self.begun.append(self._waiting.popleft())
        return self.begun[-1]

    def _is_company_awaited(self) -> bool:
        if self._company is None:
            return False
        num_running = len(self.running)
        numbers = {"num_running": num_running, "num_idle": self.limits.num_places - num_running}
        return self._company.is_awaited(**numbers, num_waiting=len(self._waiting))

    def _has_room(self, newcomers: list[Row]) -> bool:
        """Whether these rows fit beside those that run, however long all of them get."""
        rows = [*self.running, *newcomers, *([self._chunked[0]] if self._chunked is not None else [])]
        num_slots = self.limits.num_slots
        return len(rows) <= self.limits.num_places and (num_slots is None or self._count_slots(rows) <= num_slots)

    def _count_slots(self, rows: list[Row]) -> int:
        """Slots for these rows at the end: each gets as many as the longest."""
        lefts = [0 if row.max_new is None else row.max_new for row in rows]  # without a limit nobody can say
        return len(rows) * max(row.prompt.shape[1] + left for row, left in zip(rows, lefts, strict=True))

    def _advance(self, budget: int | None) -> int | None:
        """Run a piece of the prompt that is on its way; what is left of the budget."""
        if self._chunked is None:
            return budget
        row, prompt = self._chunked
        if not row.is_live:  # cancelled
            self._chunked = None
            return budget
        try:
            num_run = prompt.advance(prompt.num_left if budget is None else budget)
        except Exception as error:  # noqa: BLE001  that row's own
            self._chunked = None
            row.fail(error)
            return budget
        if not prompt.num_left:
            self._chunked = None
            self._begin([row], lambda _: prompt.finish())
        return None if budget is None else budget - num_run

    def _open(self, newcomers: list[Row]) -> Engine:
        """The engine, open, with room for these and for those that wait."""
        if self._engine is None:
            rows = [*newcomers, *self._waiting]
            longest = max(row.prompt.shape[1] for row in rows)
            most = max(row.max_new or 0 for row in rows)
            engine = self._make_engine(Room(self.limits.num_places, longest, most or None, is_open=True))
            self._engine = engine.__enter__()
        return self._engine

    def _close(self, error: Exception | None = None) -> None:
        """Let the engine go, and with it what is not to outlive an error."""
        engine, self._engine = self._engine, None
        if self._chunked is not None:  # its states were the engine's
            if error is not None:
                self._chunked[0].fail(error)
            self._chunked = None
        if engine is not None:
            try:
                engine.__exit__(None if error is None else type(error), error, None)
            except Exception as other:  # noqa: BLE001  it tells of no memory in other words
                self._fail(engine.rows, other)

    def _begin(self, rows: list[Row], prefill: Callable[[Engine], Prompt]) -> None:
        """Let rows run whose prompts come from `prefill`."""
        engine = None
        try:
            engine = self._open(rows)
            engine.admit(rows, prefill(engine))
        except Exception as error:  # noqa: BLE001  raised where the rows are asked for
            self._fail(rows, error)
            if engine is not None and (engine.is_torn or not self.running):
                self._fail(engine.rows, error)
                self._close(error)

    def _prefill(self, engine: Engine, rows: list[Row]) -> Prompt:
        if self._runs_straight:
            return engine.prefill_straight([row.prompt[0] for row in rows])
        ids, mask, inputs = make_inputs(self._target, [row.prompt[0] for row in rows])
        return engine.prefill(ids, mask, inputs, self._settings)

    def _fail(self, rows: Iterable[Row], error: Exception) -> None:
        for row in rows:
            if row.is_live:
                row.fail(error)


def make_inputs(target: PreTrainedModel, prompts: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Ids [B, T] and mask [B, T] of prompts [T_b], and what the host's prompt forward is given beside them."""
    flipped = [prompt.flip(0) for prompt in prompts]
    ids = pad_sequence(flipped, batch_first=True).flip(1)
    mask = pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in flipped], batch_first=True).flip(1)
    inputs = {
        "attention_mask": None if HOST_DROPS_MASKS and bool(mask.all()) else mask.long(),
        "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0),
        CACHE_NAME: DynamicCache(config=target.config.get_text_config(decoder=True)),
        "use_cache": True,
    }
    if target._supports_logits_to_keep():
        inputs["logits_to_keep"] = 1
    return ids, mask, inputs
