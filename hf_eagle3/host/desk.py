"""Requests under way, and what is told of each: the host's `GenerationOutput`s. It knows no threads."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.streamers import BaseStreamer

from ..decoding.in_flight import InFlight
from ..decoding.row import Row
from ..speculation.stats import Speculation

WINDOW = 1024  # finished requests that times are told of


class CancelledError(Exception):
    """A request was taken back."""


class StoppedError(Exception):
    """A request was left when the engine stopped."""


@dataclass(slots=True)
class Request:
    """One request, and how far its row was told of."""

    id: str
    prompt: list[int]
    row: Row | None = None  # None if there never was one
    is_streaming: bool = False
    records_times: bool = False
    streamer: BaseStreamer | None = None
    created: float = field(default_factory=time.perf_counter)
    started: float = -1.0
    finished: float = -1.0
    times: list[float] = field(default_factory=list)  # of each new token
    logprobs: list[float] = field(default_factory=list)
    error: Exception | None = None
    speculation: Speculation | None = None

    @property
    def text(self) -> list[int]:
        """Its new tokens."""
        return [] if self.row is None else self.row.text

    @property
    def status(self) -> RequestStatus:
        """In the host's words."""
        if self.error is not None:
            return RequestStatus.FAILED
        if self.finished >= 0:
            return RequestStatus.FINISHED
        if self.text:
            return RequestStatus.DECODING
        return RequestStatus.PENDING if self.started < 0 else RequestStatus.PREFILLING

    def tell(self) -> GenerationOutput:
        """What there is of it, in the host's words; `.speculation` once it has ended."""
        output = GenerationOutput(
            request_id=self.id,
            prompt_ids=self.prompt,
            generated_tokens=list(self.text),
            logprobs=list(self.logprobs),
            error=None if self.error is None else f"{self.error}" or type(self.error).__name__,
            status=self.status,
            created_time=self.created,
            lifespan=(self.started, self.finished),
            timestamps=list(self.times) if self.records_times else None,
        )
        output.speculation = self.speculation
        return output


class Stats(NamedTuple):
    """What an engine has done. Seconds are None before there are any."""

    running: int
    waiting: int
    finished: int
    failed: int
    tokens: int  # new ones, of all requests
    tokens_per_second: float  # while there was something to do
    time_to_first_token: float | None  # seconds, the median of the newest requests
    time_to_first_token_p95: float | None
    time_per_token: float | None  # seconds behind the first, the median likewise
    acceptance_length: float  # tokens gained per round of a row; NaN without a draft
    rounds: dict[str, int]  # of all rows that ran, by what they proposed
    graphs: str  # whether rounds run as CUDA graphs, and if not, why


class Desk:
    """Takes requests, steps, and tells what is new.

    Args:
        in_flight: Decodes their rows.
        depth: Most draft tokens one behind the other.
        rule: How they are accepted, in words.
    """

    def __init__(self, in_flight: InFlight, *, depth: int, rule: str):
        self.in_flight, self._depth, self._rule = in_flight, depth, rule
        self._open: dict[str, Request] = {}
        self._begun: dict[str, Request] = {}  # of these, those that have more to tell than that they wait
        self._by_row: dict[int, Request] = {}
        self._counts: Counter[str] = Counter()
        self._busy = 0.0  # seconds of steps
        self._firsts: deque[float] = deque(maxlen=WINDOW)  # seconds to first tokens
        self._paces: deque[float] = deque(maxlen=WINDOW)  # seconds for each further one
        self._total = self._new_speculation()

    def _new_speculation(self) -> Speculation:
        return Speculation("own decode loop", "in flight", self._depth, self._rule)

    @property
    def is_idle(self) -> bool:
        """Whether all requests have ended, and been told of."""
        return not self._open

    def add(self, request: Request) -> list[GenerationOutput]:
        """Take a request in; what is to be told at once if it can never run."""
        self._open[request.id] = request
        if request.error is None and request.row is not None:
            try:
                if request.streamer is not None:
                    request.streamer.put(request.row.prompt.cpu())
                self.in_flight.add(request.row)
                self._by_row[id(request.row)] = request
            except Exception as error:  # noqa: BLE001  no room, or the streamer's own
                request.error = error
        return [] if request.error is None else [self._finish(request)]

    def cancel(self, request_id: str) -> None:
        """Let a request end where it is; nothing happens if it has ended."""
        if (request := self._open.get(request_id)) is not None and request.row is not None:
            request.error = CancelledError(f"Request {request_id} was cancelled.")
            self.in_flight.cancel(request.row)
            self._begun[request_id] = request

    def step(self) -> list[GenerationOutput]:
        """Go on by a round; what is new."""
        start = time.perf_counter()
        self.in_flight.step()
        self._busy += time.perf_counter() - start
        for row in self.in_flight.begun:
            if (request := self._by_row.get(id(row))) is not None:
                self._begun[request.id] = request
        running = set(map(id, self.in_flight.running))
        told = [self._look(request, start, id(request.row) in running) for request in list(self._begun.values())]
        return [output for output in told if output is not None]

    def stop(self) -> list[GenerationOutput]:
        """Let all requests end where they are."""
        for request in self._open.values():
            if request.row is not None:
                self.in_flight.cancel(request.row)
            request.error = StoppedError(f"Request {request.id} was under way when generation stopped.")
        return [self._finish(request) for request in list(self._open.values())]

    @property
    def stats(self) -> Stats:
        """What was done so far."""
        return Stats(
            running=len(self.in_flight.running),
            waiting=self.in_flight.num_waiting,
            finished=self._counts["finished"],
            failed=self._counts["failed"],
            tokens=self._counts["tokens"],
            tokens_per_second=self._counts["tokens"] / self._busy if self._busy else 0.0,
            time_to_first_token=find_quantile(self._firsts, 0.5),
            time_to_first_token_p95=find_quantile(self._firsts, 0.95),
            time_per_token=find_quantile(self._paces, 0.5),
            acceptance_length=self._total.acceptance_length,
            rounds=dict(self.in_flight.rounds),
            graphs=self.in_flight.graphs,
        )

    def _look(self, request: Request, start: float, is_running: bool) -> GenerationOutput | None:
        """What is new of a request after a step that began at `start`."""
        row = request.row
        assert row is not None
        new = row.text[len(request.times) :]
        if request.started < 0 and (new or is_running):
            request.started = start
        if new:
            request.times += [time.perf_counter()] * len(new)
            request.logprobs += take_logprobs(row, new)
            self._counts["tokens"] += len(new)
            if request.streamer is not None and request.error is None:
                self._stream(request, new)
        if not row.is_live:
            request.error = request.error or row.error
            return self._finish(request)
        return request.tell() if new and request.is_streaming else None

    def _stream(self, request: Request, new: list[int]) -> None:
        """Give new tokens to the request's streamer, whose failure is the request's own."""
        try:
            assert request.streamer is not None
            for token in new:
                request.streamer.put(torch.tensor([token]))
        except Exception as error:  # noqa: BLE001
            request.error = error
            assert request.row is not None
            self.in_flight.cancel(request.row)

    def _finish(self, request: Request) -> GenerationOutput:
        """Let go of a request that has ended; the last that is told of it."""
        del self._open[request.id]
        self._begun.pop(request.id, None)
        self._by_row.pop(id(request.row), None)
        request.finished = time.perf_counter()
        if request.row is not None:
            request.speculation = self._new_speculation()
            request.row.count(self._total, request.speculation)
        if request.streamer is not None and request.error is None:
            try:
                request.streamer.end()
            except Exception as error:  # noqa: BLE001  the request's own
                request.error = error
        self._counts["finished" if request.error is None else "failed"] += 1
        if request.times:
            self._firsts.append(request.times[0] - request.created)
        if len(request.times) > 1:
            self._paces.append((request.times[-1] - request.times[0]) / (len(request.times) - 1))
        return request.tell()


def find_quantile(seconds: deque[float], share: float) -> float | None:
    """That of some seconds; None if there are none."""
    ordered = sorted(seconds)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def take_logprobs(row: Row, new: list[int]) -> list[float]:
    """How likely each of the `new` tokens was, which the row then forgets; none if it keeps nothing."""
    kept: Any = row.scores if row.scores is not None else row.logits  # a list of [V]
    if kept is None:
        return []
    logprobs = [float(scores.log_softmax(-1)[token]) for scores, token in zip(kept, new, strict=True)]
    kept.clear()
    return logprobs
