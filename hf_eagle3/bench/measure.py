"""Kinds of decoding, run in turn over the same prompts."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..graphs import count_cache_bytes, release_graphs
from ..processes import Team
from ..stats import Speculation
from . import dflash
from .equality import Agreement, OutputDiffersError, Text, compare
from .prompts import Prompts
from .ways import DFLASH, DRAFTED, PLAIN, STOCK, Call, Way

OURS = (PLAIN, DRAFTED)
FEW = 4  # prompts to compare where stock `generate` does not run over all of them

# What other people's code may end in; that costs its column, not the run.
FOREIGN_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)


@dataclass
class Measured:
    """One kind of decoding at one batch size, over all processes."""

    kind: str
    batch_size: int  # of each process
    tokens_per_second: float  # median over repeats
    slowest: float
    fastest: float
    acceptance_length: float | None = None
    peak_gib: float | None = None  # beyond the weights; of the process that needed most
    cache_gib: float | None = None  # of that, keys and values; where our loop keeps them
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds_in: dict[str, float] = field(default_factory=dict)  # of a drafted call
    graphs: str = ""
    num_identical: int | None = None  # rows whose text is that of generate(), in greedy runs
    num_rows: int = 0
    agreement: Agreement | None = None  # with generate(), asserted before anything was timed


class Skipped(NamedTuple):
    """A kind of decoding that a batch size has no number for."""

    kind: str
    batch_size: int
    reason: str


def measure(
    target: PreTrainedModel,
    ways: Mapping[str, Way],
    batches: Sequence[Prompts],
    *,
    batch_size: int,
    max_new_tokens: int,
    repeats: int,
    team: Team,
    subtract: int = 0,
    is_greedy: bool = True,
    judged: Mapping[str, Way] | None = None,
    on_run: Callable[[], None] = lambda: None,
) -> tuple[list[Measured], list[Skipped]]:
    """Run all kinds of decoding over `batches` in turn, and ask before that whether ours say what stock does.

    Args:
        target: What they decode with.
        ways: What to compare.
        batches: Prompts, this process's own.
        batch_size: Of each batch but the last.
        max_new_tokens: Of each row.
        repeats: How often each kind runs, after one warm-up.
        team: The processes that do the same over other prompts.
        subtract: New tokens of a second, shorter run, whose tokens and time are taken off; 0 for none.
        is_greedy: Whether `ways` are.
        judged: Greedy ways of stock `generate` and of ours, whose texts must agree; None where acceptance is simulated,
            so that ours say something else.
        on_run: Called after each pass.

    Raises:
        OutputDiffersError: Ours say something else.
    """

    def run_all(kind: str, limit: int) -> list[Call]:
        return [ways[kind](batch, limit) for batch in batches]

    firsts: dict[str, list[Call]] = {}
    peaks: dict[str, float | None] = {}
    caches: dict[str, float | None] = {}
    skipped: list[Skipped] = []
    for kind in ways:
        if target.device.type == "cuda":
            release_graphs()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(target.device)
            before = torch.cuda.memory_allocated(target.device)
        reason = ""
        try:
            firsts[kind] = run_all(kind, max_new_tokens)
        except FOREIGN_ERRORS as error:
            if kind != DFLASH:
                raise
            reason = str(error) if str(error) == dflash.ONE_ROW else f"{type(error).__name__}: {error}"
        is_cuda = target.device.type == "cuda"
        peak = (torch.cuda.max_memory_allocated(target.device) - before) / 2**30 if is_cuda else None
        peaks[kind] = None if peak is None else max(team.gather(peak))
        caches[kind] = max(team.gather(count_cache_bytes(target))) / 2**30 or None
        if kind == DFLASH and (reasons := [r for r in team.gather(reason) if r]):
            firsts.pop(kind, None)
            skipped.append(Skipped(kind, batch_size, reasons[0]))
        on_run()
    kinds = list(firsts)
    agreements = (
        {} if judged is None else assert_equal(target, judged, batches, firsts, max_new_tokens, is_greedy, team)
    )

    # On a GPU, graphs went with the memory of each kind before the next.
    for kind in (kind for kind in OURS if kind in kinds and target.device.type == "cuda"):
        for batch in {len(batch.numbers): batch for batch in batches}.values():
            ways[kind](batch, max_new_tokens)

    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    calls: dict[str, list[Call]] = {}
    shorter: dict[str, list[Call]] = {}
    for _ in range(repeats):
        for kind in kinds:
            team.wait()
            calls[kind] = run_all(kind, max_new_tokens)
            seconds = sum(call.seconds for call in calls[kind])
            tokens = sum(len(row) for call in calls[kind] for row in call.rows)
            if subtract:
                shorter[kind] = run_all(kind, subtract)
                seconds -= sum(call.seconds for call in shorter[kind])
                tokens -= sum(len(row) for call in shorter[kind] for row in call.rows)
            every = team.gather((tokens, seconds))
            speeds[kind].append(sum(n for n, _ in every) / max(s for _, s in every))
            on_run()

    measured = []
    for kind in kinds:
        result = Measured(
            kind,
            batch_size,
            statistics.median(speeds[kind]),
            min(speeds[kind]),
            max(speeds[kind]),
            peak_gib=peaks[kind],
            cache_gib=caches[kind],
            num_rows=sum(team.gather(sum(len(call.rows) for call in calls[kind]))),
            agreement=agreements.get(kind),
        )
        # Of a simulated draft, what is said means nothing.
        if is_greedy and STOCK in firsts and (judged is not None or kind != DRAFTED):
            pairs = zip(firsts[STOCK], firsts[kind], strict=True)
            same = sum(a == b for x, y in pairs for a, b in zip(x.rows, y.rows, strict=True))
            result.num_identical = sum(team.gather(same))
        add_acceptance(result, calls[kind], firsts[kind], batches, team)
        add_times(result, calls[kind], shorter.get(kind, []), team)
        measured.append(result)
    return measured, skipped


def assert_equal(
    target: PreTrainedModel,
    judged: Mapping[str, Way],
    batches: Sequence[Prompts],
    firsts: Mapping[str, list[Call]],
    max_new_tokens: int,
    is_greedy: bool,
    team: Team,
) -> dict[str, Agreement]:
    """How each kind of ours agrees with stock `generate`: over all prompts if it ran over them, else over a
    few.

    Raises:
        OutputDiffersError: It does not, in any process.
    """
    if is_greedy and STOCK in firsts:
        known: Mapping[str, list[Call]] = firsts
    else:
        batches = batches[: max(1, FEW // len(batches[0].numbers))]
        wanted = [STOCK, *(kind for kind in OURS if kind in firsts)]
        known = {kind: [judged[kind](batch, max_new_tokens) for batch in batches] for kind in wanted}
    agreements, problem = {}, ""
    for kind in OURS:
        if kind not in known:
            continue
        texts = []
        for batch, plain, ours in zip(batches, known[STOCK], known[kind], strict=True):
            for i, number in enumerate(batch.numbers):
                prompt = batch.inputs["input_ids"][i][batch.inputs["attention_mask"][i].bool()]
                texts.append(Text(f"prompt {number}", prompt, plain.rows[i], ours.rows[i]))
        try:
            agreements[kind] = compare(target, texts, kind=kind)
        except OutputDiffersError as error:
            problem = problem or str(error)
    if problems := [p for p in team.gather(problem) if p]:
        raise OutputDiffersError(problems[0])
    return {kind: sum(team.gather(agreement), Agreement()) for kind, agreement in agreements.items()}


def add_acceptance(
    result: Measured, calls: list[Call], firsts: list[Call], batches: Sequence[Prompts], team: Team
) -> None:
    """Acceptance length, overall and by category."""
    if result.kind == DFLASH:
        own = [(c.num_forwards, len(c.rows[0]), b.categories[0]) for c, b in zip(firsts, batches, strict=True)]
        every = [counts for counts_of_one in team.gather(own) for counts in counts_of_one]
        # The first forward is the prompt's, and gives the first token.
        gained = [(max(forwards - 1, 0), tokens - 1, category) for forwards, tokens, category in every]
        result.acceptance_length = mean_gain(gained)
        for category in dict.fromkeys(c for *_, c in gained):
            result.by_category[category] = {"acceptance_length": mean_gain([g for g in gained if g[2] == category])}
        return
    told = [call.told for call in calls if call.told is not None]
    if result.kind != DRAFTED or not told:
        return
    categories = [category for batch in batches for category in batch.categories]
    rows = [(r.rounds, r.rounds + r.num_accepted) for speculation in told for r in speculation.rows or [speculation]]
    share = [(*counts, category) for counts, category in zip(rows, categories, strict=True)]
    gained = [counts for counts_of_one in team.gather(share) for counts in counts_of_one]
    result.acceptance_length = mean_gain(gained)
    for category in dict.fromkeys(c for *_, c in gained):
        result.by_category[category] = {"acceptance_length": mean_gain([g for g in gained if g[2] == category])}
    first = firsts[0].told
    result.graphs = first.graphs if first is not None else ""


def add_times(result: Measured, calls: list[Call], shorter: list[Call], team: Team) -> None:
    """Where the time of our drafted rounds went; that of shorter calls, prompts and all, is taken off."""
    told = [call.told for call in calls if call.told is not None]
    if result.kind != DRAFTED or not told:
        return

    def add(speculations: list[Speculation]) -> dict[str, float]:
        names = ("seconds", "draft_seconds", "verify_seconds", "accept_seconds", "host_seconds")
        times: dict[str, float] = {name: sum(getattr(s, name) for s in speculations) for name in names}
        return times | {"rounds": sum(max(r.rounds for r in s.rows or [s]) for s in speculations)}

    whole, less = add(told), add([call.told for call in shorter if call.told is not None])
    every_time = team.gather({name: value - less[name] for name, value in whole.items()})
    result.seconds_in = {name: sum(t[name] for t in every_time) for name in whole}


def mean_gain(counts: list[tuple[int, int, str]]) -> float:
    """Tokens gained a round, of (rounds, tokens, category)."""
    rounds = sum(r for r, *_ in counts)
    return sum(tokens for _, tokens, _ in counts) / rounds if rounds else float("nan")
