"""Our decode loop: chains, any number of rows, targets with attention caches.

Rounds of draft, verify, accept, commit over a batch whose rows accept different numbers. Sizes in a round are fixed by
the number of rows and the depth; between prepare and read there are tensors only, and one read a round.

Shapes: B rows in the batch, K draft tokens.
"""

import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..speculation.numbers import has_nan, raise_if_nan
from ..speculation.stats import Speculation, Stopwatch
from .in_order import accept_in_order, accept_in_step, put_pads
from .phases import Drafted, Phases, Verified
from .prefill import Prompt
from .state import commit
from .transcript import Transcript


class Clocks(NamedTuple):
    """Where the time of a call goes; the rest is verification."""

    draft: Stopwatch
    accept: Stopwatch
    host: Stopwatch


class Letter:
    """A report on its way to the host, which need not wait for it yet."""

    def __init__(self, report: Tensor):
        self._copy = torch.empty(report.shape, dtype=report.dtype, pin_memory=report.is_cuda)
        self._copy.copy_(report, non_blocking=report.is_cuda)
        self._event = torch.cuda.Event() if report.is_cuda else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(report.device))

    def read(self) -> list[int]:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


class Launched(NamedTuple):
    """A settled round that the host has not looked at yet."""

    rows: list[int]  # [B] which rows of the call take part
    K: int
    letter: Letter
    scores: Tensor
    logits: Tensor


def decode(
    phases: Phases,
    prompt: Prompt,
    *,
    transcript: Transcript,
    processors: list[LogitsProcessorList],  # of each row; where rows are in step, one for all
    told: Speculation,
    clocks: Clocks,
) -> Iterator[list[int]]:
    """Generate until the transcript is over; yields after each round which rows of the call took part, in their places.

    The first of them only chooses first tokens.
    """
    config = phases.config
    rows = list(range(len(prompt.lengths)))
    accept = accept_in_step if config.in_step else accept_in_order
    taken: list[list[Taken]] = [[] for _ in rows]
    told.rows = [Speculation(told.loop, told.why, told.depth) for _ in rows]
    longest_prompt = prompt.extra + prompt.columns.shape[1]
    launched: deque[Launched] = deque()

    drafted, verified = Drafted(phases.state.block[:, :0], None), Verified(prompt.logits, None)
    while True:
        done, K, started = rows, drafted.tokens.shape[1], transcript.num_tokens
        if phases.in_order:
            with clocks.host:
                raise_if_nan(bool(has_nan(verified.logits[:, 0])))
                limits = [K] * len(rows)
                if (last := config.starts_anew) is not None and K:
                    limits = [last - n if n <= last else K for n in phases.state.length.tolist()]
                verdict = accept(
                    *drafted,
                    verified.logits,
                    rows=rows,
                    transcript=transcript,
                    processors=processors,
                    do_sample=config.do_sample,
                    agree=phases.agree,
                    limits=limits,
                )
            commit(phases.state, drafted.tokens, verdict, verified.states)
        else:
            with clocks.accept:
                report, scores = phases.settle(drafted, verified)
            launched.append(Launched(rows, K, Letter(report), scores, verified.logits))
            if len(launched) > phases.lateness:
                done, K, letter, scores, logits = launched.popleft()
                read = letter.read()  # the round's wait
                raise_if_nan(bool(read[-1]))
                with clocks.host:
                    take_down(read, scores, logits, rows=done, K=K, transcript=transcript)

        if transcript.num_tokens != started:
            for row in done:
                # Near the length limit the last draft tokens never had a chance.
                room = K if transcript.max_new is None else min(K, transcript.max_new - started[row] - 1)
                taken[row].append(Taken(room, started[row], transcript.num_tokens[row]))
            with clocks.host:
                transcript.show()
            yield done
            if transcript.is_over:
                count(taken, transcript, told)
                return
            kept = [b for b, row in enumerate(rows) if transcript.is_live(row)]
            if len(kept) < len(rows) and not config.keeps_rows:
                num_left = math.inf
                if transcript.max_new is not None:
                    num_left = transcript.max_new - min(transcript.num_tokens[rows[b]] for b in kept)
                rows = [rows[b] for b in phases.keep(kept, num_left=num_left)]

        unseen = len(launched) * (config.depth + 1)
        phases.reserve(longest_prompt + max(transcript.num_tokens) + unseen + 2 * config.depth + 2)
        for b, row in enumerate(rows):
            if config.starts_anew is not None and transcript.is_live(row):
                said = prompt.tokens.new_tensor(transcript.texts[row])
                text = torch.cat([prompt.tokens[row, : prompt.num_states[row]], said])
                if len(text) == config.starts_anew + 1:
                    phases.start_anew(b, text)
        with phases.entered():
            with clocks.draft:
                drafted = phases.draft()
            if config.in_step:
                put_pads(drafted.tokens, transcript)
            verified = phases.verify(drafted)


class Taken(NamedTuple):
    """What a round gave a row, before anything was cut off."""

    room: int  # draft tokens that could have been kept
    start: int  # new tokens before the round
    end: int  # and after it


def count(taken: list[list[Taken]], transcript: Transcript, told: Speculation) -> None:
    """Count the rounds of each row, up to where its text ends."""
    assert transcript.length is not None
    for row, rounds in enumerate(taken):
        end = min(len(transcript.texts[row]), transcript.length)
        for room, start, end_of_round in rounds:
            if (new := min(end_of_round, end) - start) > 0:
                told.count(room, new - 1)
                told.rows[row].count(room, new - 1)


def take_down(
    read: list[int],  # a report
    scores: Tensor,  # [B, K+1, V]
    logits: Tensor,  # [B, K+1, V]
    *,
    rows: list[int],
    K: int,
    transcript: Transcript,
) -> None:
    """Append what a round settled to the text of each row that has not ended."""
    keeps = transcript.scores is not None or transcript.logits is not None  # a view of each is most of the time here
    for b, row in enumerate(rows):
        if not transcript.is_live(row):
            continue
        for k in range(read[len(rows) * (K + 1) + b] + 1):
            chosen_by = (scores[b, k], logits[b, k]) if keeps else (None, None)
            if transcript.append(row, read[b * (K + 1) + k], *chosen_by):
                break
