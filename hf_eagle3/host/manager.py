"""What the host's continuous batching looks like from outside, with our engine behind it, in a thread of its own."""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from .desk import Desk, Request, Stats
from .request_rows import Asking

logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds that a full queue is waited for, as the host's is
BRIEF = 0.1  # seconds between looks at whether the thread still runs


class ThreadStatus:
    """What a server asks about the thread."""

    def __init__(self) -> None:
        self.fatal_error: BaseException | None = None


# Transformers 5.24 generation/continuous_batching/continuous_api.py:ContinuousBatchingManager
class Manager:
    """Takes requests, decodes them in a thread and hands out what is new, by the names of the host's manager.

    What differs: a request may have any settings of its own, a cancelled one is told of as failed, and `stats` says how it
    goes. As a context it starts, and stops when all requests have ended, or at once after an exception.

    Args:
        target: The model to generate with.
        desk: Decodes.
        asking: Makes requests.
        max_queue_size: Requests that may wait, 0 for any number.
    """

    def __init__(self, target: PreTrainedModel, desk: Desk, asking: Asking, *, max_queue_size: int = 0):
        self.model, self.generation_config = target, asking.maker.settings
        self.background_thread_status, self.warmed_up = ThreadStatus(), False
        self._desk, self._asking = desk, asking
        self._inbox: queue.Queue[list[Request]] = queue.Queue(max_queue_size)
        self._cancelled: queue.Queue[str] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._wake, self._changed = threading.Event(), threading.Condition()
        self._stops = self._stops_at_once = False
        # Guarded by `_changed`:
        self._results: deque[GenerationOutput] = deque()
        self._handlers: dict[str, tuple[Callable, asyncio.AbstractEventLoop]] = {}
        self._pausing: list[int] = []  # threads that hold a pause
        self._is_paused = False

    # ---- starting and stopping ----

    def is_running(self) -> bool:
        """Whether the thread is there."""
        return self._thread is not None and self._thread.is_alive()

    def warmup(self) -> None:
        """Nothing: graphs are recorded when they are first needed, and kept for the target."""
        self.warmed_up = True

    def start(self) -> None:
        """Begin to decode."""
        if self.is_running():
            logger.warning("The manager's thread is running already.")
            return
        self._stops = self._stops_at_once = False
        self.background_thread_status.fatal_error = None
        self._thread = threading.Thread(target=self._run, name="hf-eagle3 batching", daemon=True)
        self._thread.start()

    def stop(
        self,
        block: bool = True,  # as the host has it
        timeout: float | None = None,
        keep_for_next_session: bool = False,  # noqa: ARG002  graphs are the target's, and stay anyway
        hard_stop: bool = False,
    ) -> None:
        """Take no more requests, and end the thread: once those under way have ended, or at once.

        Args:
            block: Wait for that.
            timeout: So many seconds at most.
            keep_for_next_session: The host's.
            hard_stop: Let requests under way fail.
        """
        if self._thread is None:
            logger.warning("The manager was not started.")
            return
        if threading.get_ident() in self._pausing:
            raise RuntimeError("Cannot stop from inside a pause, which would never end: leave pause() first.")
        self._stops, self._stops_at_once = True, self._stops_at_once or hard_stop
        self._wake.set()
        if block:
            self._thread.join(timeout)
            if self._thread.is_alive():
                logger.warning("The thread goes on: requests under way have not ended after %s seconds.", timeout)
            else:
                self._thread = None

    def destroy(self) -> None:
        """Stop, if it runs."""
        if self.is_running():
            self.stop()

    def __enter__(self) -> "Manager":
        self.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is not None:
            self.stop(hard_stop=error is not None)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let nothing run for a while, so that the target may be changed; requests under way go on afterwards."""
        if not self.is_running():
            raise RuntimeError("Cannot pause generation while none is running.")
        with self._changed:
            self._pausing.append(threading.get_ident())
            self._wake.set()
            while not self._is_paused and self.is_running():
                self._changed.wait(BRIEF)
        try:
            if not self._is_paused:
                raise RuntimeError("Generation stopped before it could pause.")
            yield
        finally:
            with self._changed:
                self._pausing.remove(threading.get_ident())
                self._changed.notify_all()

    # ---- requests ----

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,  # as the host has it
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **settings: Any,  # of a generation config, and what `generate` takes beside it
    ) -> str | None:
        """Let a request wait for its turn; its id, or None if no more are taken.

        Args:
            input_ids: The prompt.
            request_id: One that no request under way has; one is made by default.
            max_new_tokens: Tokens that it may get.
            streaming: Tell of each round, not of the end alone.
            record_timestamps: Tell when each token came.
            eos_token_id: What ends it.
            settings: Its own, in the place of the manager's: `do_sample`, `temperature`, `seed`, `stop_strings` with
                `tokenizer`, `logits_processor`, `stopping_criteria`, `streamer`, ...

        Raises:
            ValueError: A setting is unknown or contradicts another one, or the id is another request's.
            queue.Full: Too many wait, for ten seconds.
        """
        if self._stops or self.background_thread_status.fatal_error is not None:
            logger.warning("Generation has stopped or failed: a request of %d tokens is dropped.", len(input_ids))
            return None
        requests = self._asking.ask(
            input_ids,
            request_id,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            settings=settings,
            is_streaming=streaming,
            records_times=record_timestamps,
        )
        try:
            self._inbox.put(requests, timeout=PATIENCE)
        except queue.Full:
            for request in requests:
                self._asking.forget(request.id)
            raise queue.Full(
                f"{self._inbox.maxsize} requests wait already, the most that max_queue_size allows."
            ) from None
        self._wake.set()
        return requests[-1].id

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,  # as the host has it
        record_timestamps: bool = False,
        **settings: Any,  # as of `add_request`
    ) -> list[str | None]:
        """The ids of several requests."""
        given = (None, max_new_tokens, streaming, record_timestamps)
        return [self.add_request(input_ids, *given, **settings) for input_ids in inputs]

    def cancel_request(self, request_id: str) -> None:
        """Let a request end where it is; its place is free from the next round on."""
        self._cancelled.put(request_id)
        self._wake.set()

    # ---- results ----

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next result, of one request if it is named; None after `timeout` seconds, or if there will be none."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                is_running = self.is_running()
                found = next((r for r in self._results if request_id in (None, r.request_id)), None)
                if found is not None:
                    self._results.remove(found)
                    return found
                left = BRIEF if deadline is None else deadline - time.monotonic()
                if left <= 0 or not is_running:
                    return None
                self._changed.wait(min(left, BRIEF))

    def __iter__(self) -> Iterator[GenerationOutput]:
        while self.is_running() or self._results:
            if (result := self.get_result(timeout=BRIEF)) is not None:
                yield result

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Results of one request, up to its last."""
        while self.is_running() or self._results:
            if (result := self.get_result(request_id, timeout=BRIEF)) is not None:
                yield result
                if result.is_finished():
                    return
            elif not self.is_running():
                return

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], Any]) -> None:
        """Call back in the running event loop whenever there is something new of a request, also what came before."""
        loop = asyncio.get_running_loop()
        with self._changed:
            waiting = [result for result in self._results if result.request_id == request_id]
            for result in waiting:
                self._results.remove(result)
                loop.call_soon_threadsafe(callback, result)
            if not any(result.is_finished() for result in waiting):
                self._handlers[request_id] = callback, loop

    @property
    def stats(self) -> Stats:
        """How it goes: requests, tokens a second, time to first tokens, acceptance length."""
        return self._desk.stats._replace(waiting=self._desk.stats.waiting + self._inbox.qsize())

    # ---- the thread ----

    def _run(self) -> None:
        status = self.background_thread_status
        try:
            with torch.no_grad(), self._desk.in_flight:
                while not self._is_over():
                    self._rest()
                    self._take_in()
                    if not self._desk.is_idle and not self._stops_at_once:
                        self._deliver(self._desk.step())
        except BaseException as error:  # whatever it is, nothing runs any more, and clients wait
            status.fatal_error = error
            logger.exception("Generation has failed.")
        finally:
            self._stops = True
            self._empty_inbox()
            self._deliver(self._desk.stop())
            with self._changed:
                self._changed.notify_all()

    def _is_over(self) -> bool:
        """Whether the thread is to end."""
        return self._stops_at_once or (self._stops and self._desk.is_idle and self._inbox.empty())

    def _rest(self) -> None:
        """Wait while others pause generation, or there is nothing to do."""
        with self._changed:
            if self._pausing:
                self._is_paused = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._pausing)
                self._is_paused = False
                self._desk.in_flight.look_again()
        if self._desk.is_idle and self._inbox.empty() and not self._stops:
            self._wake.wait(BRIEF)
        self._wake.clear()

    def _take_in(self) -> None:
        """Take requests from the queue, but leave there what would only wait elsewhere, and cancel others."""
        cancelled = []
        while not self._cancelled.empty():
            cancelled.append(self._cancelled.get())
        if cancelled:
            self._empty_inbox()  # some may be among them
        while self._desk.in_flight.num_waiting <= self._desk.in_flight.limits.num_places:
            try:
                requests = self._inbox.get_nowait()
            except queue.Empty:
                break
            for request in requests:
                self._deliver(self._desk.add(request))
        for request_id in cancelled:
            self._desk.cancel(request_id)

    def _empty_inbox(self) -> None:
        """Take in whatever waits."""
        while not self._inbox.empty():
            for request in self._inbox.get_nowait():
                self._deliver(self._desk.add(request))

    def _deliver(self, outputs: list[GenerationOutput]) -> None:
        """Hand out what is new."""
        with self._changed:
            for output in outputs:
                if output.is_finished():
                    self._asking.forget(output.request_id)
                if (handler := self._handlers.get(output.request_id)) is None:
                    self._results.append(output)
                    continue
                callback, loop = handler
                if output.is_finished():
                    del self._handlers[output.request_id]
                try:
                    loop.call_soon_threadsafe(callback, output)
                except RuntimeError:  # the loop is closed: the client has gone
                    self._handlers.pop(output.request_id, None)
                    self.cancel_request(output.request_id)
            self._changed.notify_all()
