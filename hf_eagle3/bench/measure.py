"""Kinds of decoding, run in turn over the same prompts."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from ..data_parallel import Team
from ..decoding.arena import count_cache_bytes
from .attempts import Attempts, free_memory
from .equality import Agreement
from .judging import agree, judge
from .names import STOCK, is_drafting, is_ours
from .prompts import Prompts
from .results import Measured, Skipped, add_acceptance, add_times, count_tokens
from .ways import Call, Way


@dataclass(frozen=True)
class Plan:
    """How much is decoded, and how often."""

    batch_size: int  # of each batch but the last
    max_new_tokens: int  # of each row
    repeats: int  # timed runs of each kind, after one warm-up
    subtract: int = 0  # new tokens of a second, shorter run, whose tokens and time are taken off; 0 for none
    is_greedy: bool = True


def measure(
    target: PreTrainedModel,
    ways: Mapping[str, Way],
    batches: Sequence[Prompts],
    plan: Plan,
    *,
    team: Team,
    judged: Mapping[str, Way] | None = None,
    on_run: Callable[[], None] = lambda: None,
) -> tuple[list[Measured], list[Skipped]]:
    """Run all kinds of decoding over `batches` in turn, after a check that ours write what stock `generate` writes.

    Args:
        target: The model that all of them decode with.
        ways: The kinds to compare.
        batches: Prompts, this process's own.
        plan: How much, and how often.
        team: The processes that do the same over other prompts.
        judged: Greedy ways of stock `generate` and of ours, whose texts must agree; None where acceptance is simulated,
            so that ours write something else.
        on_run: Called before each pass.

    Raises:
        OutputDiffersError: Ours write something else.
    """
    runs = Runs(target, ways, batches, plan, team, on_run)
    runs.warm_up()
    if judged is not None:
        runs.judge(judged)
    runs.capture()
    for _ in range(plan.repeats):
        runs.time_each()
    measured = [runs.summarise(kind, is_judged=judged is not None) for kind in runs.kinds]
    return measured, runs.attempts.skipped


class Runs:
    """All runs at one batch size. A kind that fails leaves `kinds`, in all processes."""

    def __init__(
        self,
        target: PreTrainedModel,
        ways: Mapping[str, Way],
        batches: Sequence[Prompts],
        plan: Plan,
        team: Team,
        on_run: Callable[[], None],
    ):
        self.target, self.ways, self.batches, self.plan = target, ways, batches, plan
        self.team, self.on_run = team, on_run
        self.attempts = Attempts(target, team, plan.batch_size)
        self.kinds: list[str] = []  # those that still run
        self.firsts: dict[str, list[Call]] = {}
        self.peaks: dict[str, float | None] = {}  # GiB
        self.caches: dict[str, float | None] = {}  # GiB
        self.agreements: dict[str, Agreement] = {}
        self.speeds: dict[str, list[float]] = {}
        self.calls: dict[str, list[Call]] = {}
        self.shorter: dict[str, list[Call]] = {}

    def warm_up(self) -> None:
        """Run each kind once, and note the memory it takes."""
        device = self.target.device
        is_cuda = device.type == "cuda"
        for kind in self.ways:
            self.on_run()
            free_memory(self.target)
            if is_cuda:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            first = self.attempts.run([kind], partial(self._run_all, kind, self.plan.max_new_tokens))
            if first is not None:
                self.firsts[kind] = first
            peak = (torch.cuda.max_memory_allocated(device) - before) / 2**30 if is_cuda else None
            self.peaks[kind] = None if peak is None else max(self.team.gather(peak))
            self.caches[kind] = max(self.team.gather(count_cache_bytes(self.target))) / 2**30 or None
        self.kinds = list(self.firsts)
        self.speeds = {kind: [] for kind in self.kinds}

    def judge(self, judged: Mapping[str, Way]) -> None:
        """Compare texts; without room for that, ours are not timed either.

        Raises:
            OutputDiffersError: Ours write something else than stock `generate`.
        """
        ours = [kind for kind in self.kinds if is_ours(kind)]
        if not ours:
            return
        work = partial(
            judge,
            *(self.target, judged, self.batches, self.firsts, self.plan.max_new_tokens),
            is_greedy=self.plan.is_greedy,
            # Where there was no room for stock `generate`, there may be for fewer rows.
            has_room=STOCK in self.firsts or STOCK not in self.ways,
        )
        judgement = self.attempts.run(ours, work, saying="could not be compared with generate(): ")
        if judgement is None:
            self.kinds = [kind for kind in self.kinds if kind not in ours]
        else:
            self.agreements = agree(*judgement, self.team)

    def capture(self) -> None:
        """On a GPU, capture graphs again: they are released with the memory of each kind before the next."""
        if self.target.device.type != "cuda":
            return
        for kind in [kind for kind in self.kinds if is_ours(kind)]:
            if self.attempts.run([kind], partial(self._run_sizes, kind)) is None:
                self.kinds.remove(kind)

    def time_each(self) -> None:
        """One timed run of each kind."""
        for kind in list(self.kinds):
            if kind not in self.kinds:  # it failed in a `capture` of this very loop
                continue
            self.on_run()
            self.team.wait()
            done = self.attempts.run([kind], partial(self._run_both, kind))
            if done is None:
                self.kinds.remove(kind)
                self.capture()
                continue
            self.calls[kind], self.shorter[kind] = calls, shorter = done
            seconds = sum(call.seconds for call in calls) - sum(call.seconds for call in shorter)
            every = self.team.gather((count_tokens(calls) - count_tokens(shorter), seconds))
            self.speeds[kind].append(sum(n for n, _ in every) / max(s for _, s in every))

    def summarise(self, kind: str, *, is_judged: bool) -> Measured:
        """The results of a kind."""
        speeds, calls, firsts = self.speeds[kind], self.calls[kind], self.firsts[kind]
        result = Measured(
            kind,
            self.plan.batch_size,
            statistics.median(speeds),
            min(speeds),
            max(speeds),
            peak_gib=self.peaks[kind],
            cache_gib=self.caches[kind],
            num_rows=sum(self.team.gather(sum(len(call.rows) for call in calls))),
            agreement=self.agreements.get(kind),
        )
        # The text of a simulated draft means nothing.
        if self.plan.is_greedy and STOCK in self.firsts and (is_judged or not is_drafting(kind)):
            pairs = zip(self.firsts[STOCK], firsts, strict=True)
            same = sum(a == b for x, y in pairs for a, b in zip(x.rows, y.rows, strict=True))
            result.num_identical = sum(self.team.gather(same))
        add_acceptance(result, calls, firsts, self.batches, self.team)
        add_times(result, calls, self.shorter[kind], self.team)
        return result

    def _run_all(self, kind: str, limit: int) -> list[Call]:
        return [self.ways[kind](batch, limit) for batch in self.batches]

    def _run_both(self, kind: str) -> tuple[list[Call], list[Call]]:
        subtract = self.plan.subtract
        return self._run_all(kind, self.plan.max_new_tokens), self._run_all(kind, subtract) if subtract else []

    def _run_sizes(self, kind: str) -> list[Call]:
        """One batch of each size."""
        sizes = {len(batch.numbers): batch for batch in self.batches}
        return [self.ways[kind](batch, self.plan.max_new_tokens) for batch in sizes.values()]
