"""Kinds of decoding, run in turn over the same prompts."""

import gc
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import torch
from transformers import PreTrainedModel

from ..data_parallel import Team
from ..decoding.arena import count_cache_bytes, release_graphs
from ..speculation.stats import Speculation
from ..tensor_parallel import find_peers
from .equality import Agreement, OutputDiffersError, Text, compare
from .prompts import Prompts, first_rows
from .ways import DFLASH, DRAFTED, OF_OTHERS, ONE_ROW, PLAIN, STOCK, Call, Way

T = TypeVar("T")

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
    acceptance_length: float | None = None  # None too if no round verified a draft
    acceptance_rate_by_depth: list[float | None] = field(default_factory=list)  # [K], of ours; None: never reached
    peak_gib: float | None = None  # beyond the weights; of the process that needed most
    cache_gib: float | None = None  # of that, keys and values; where our loop keeps them
    by_category: dict[str, dict[str, float | None]] = field(default_factory=dict)
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


@dataclass
class Attempts:
    """Runs that may end for want of memory. What ends in one process is skipped in all."""

    target: PreTrainedModel
    team: Team
    batch_size: int
    skipped: list[Skipped] = field(default_factory=list)

    def run(self, kinds: Sequence[str], work: Callable[[], T], *, saying: str = "") -> T | None:
        """What `work` gives; None if it ended in some process, and then `kinds` are skipped, `saying` why."""
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
        gc.collect()  # what the traceback still holds
        free_memory(self.target)
        return None


def free_memory(target: PreTrainedModel) -> None:
    """Give back what earlier runs keep on a GPU."""
    if target.device.type == "cuda":
        release_graphs()
        torch.cuda.empty_cache()


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
    is_cuda = target.device.type == "cuda"
    attempts = Attempts(target, team, batch_size)

    def run_all(kind: str, limit: int) -> list[Call]:
        return [ways[kind](batch, limit) for batch in batches]

    def run_both(kind: str) -> tuple[list[Call], list[Call]]:
        return run_all(kind, max_new_tokens), run_all(kind, subtract) if subtract else []

    def run_sizes(kind: str) -> list[Call]:
        return [ways[kind](batch, max_new_tokens) for batch in {len(b.numbers): b for b in batches}.values()]

    firsts: dict[str, list[Call]] = {}
    peaks: dict[str, float | None] = {}
    caches: dict[str, float | None] = {}
    for kind in ways:
        free_memory(target)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(target.device)
            before = torch.cuda.memory_allocated(target.device)
        first = attempts.run([kind], partial(run_all, kind, max_new_tokens))
        if first is not None:
            firsts[kind] = first
        peak = (torch.cuda.max_memory_allocated(target.device) - before) / 2**30 if is_cuda else None
        peaks[kind] = None if peak is None else max(team.gather(peak))
        caches[kind] = max(team.gather(count_cache_bytes(target))) / 2**30 or None
        on_run()
    kinds = list(firsts)
    agreements: dict[str, Agreement] = {}
    if judged is not None and (ours := [kind for kind in OURS if kind in kinds]):
        # Where there was no room for stock `generate`, there may be for fewer rows.
        has_room = STOCK in firsts or STOCK not in ways
        work = partial(
            judge, *(target, judged, batches, firsts, max_new_tokens), is_greedy=is_greedy, has_room=has_room
        )
        judgement = attempts.run(ours, work, saying="could not be compared with generate(): ")
        if judgement is None:
            kinds = [kind for kind in kinds if kind not in ours]
        else:
            agreements = agree(*judgement, team)

    def capture() -> None:
        """On a GPU, graphs went with the memory of each kind before the next."""
        for kind in [kind for kind in OURS if kind in kinds and is_cuda]:
            if attempts.run([kind], partial(run_sizes, kind)) is None:
                kinds.remove(kind)

    capture()
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    calls: dict[str, list[Call]] = {}
    shorter: dict[str, list[Call]] = {}
    for _ in range(repeats):
        for kind in list(kinds):
            if kind not in kinds:
                continue
            team.wait()
            done = attempts.run([kind], partial(run_both, kind))
            on_run()
            if done is None:
                kinds.remove(kind)
                capture()
                continue
            calls[kind], shorter[kind] = done
            seconds = sum(call.seconds for call in calls[kind]) - sum(call.seconds for call in shorter[kind])
            tokens = count_tokens(calls[kind]) - count_tokens(shorter[kind])
            every = team.gather((tokens, seconds))
            speeds[kind].append(sum(n for n, _ in every) / max(s for _, s in every))

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
        add_times(result, calls[kind], shorter[kind], team)
        measured.append(result)
    return measured, attempts.skipped


def is_survivable(error: Exception, kinds: Sequence[str], target: PreTrainedModel) -> bool:
    """Whether other kinds can be measured after `error` in these."""
    if isinstance(error, torch.OutOfMemoryError):
        return find_peers(target) is None  # who share a target would wait for this process, in the middle of a forward
    return OF_OTHERS.issuperset(kinds)


def describe_failure(error: Exception) -> str:
    """Why there is no number, in a sentence without its full stop."""
    text = str(error)
    if text in ONE_ROW:
        return text
    if isinstance(error, torch.OutOfMemoryError):  # what else is in the memory, and how to set PyTorch up, is long
        text = re.split(r" (?=Process \d|Including |Of the allocated |If reserved )", text)[0]
    return f"{type(error).__name__}: {text}".rstrip(".")


def count_tokens(calls: Sequence[Call]) -> int:
    """New tokens of all rows."""
    return sum(len(row) for call in calls for row in call.rows)


def judge(
    target: PreTrainedModel,
    judged: Mapping[str, Way],
    batches: Sequence[Prompts],
    firsts: Mapping[str, list[Call]],
    max_new_tokens: int,
    *,
    is_greedy: bool,
    has_room: bool,
) -> tuple[dict[str, Agreement], str]:
    """How each kind of ours agrees with stock `generate`, and where one does not: over all prompts if it ran over them,
    else over a few, and over a few of a batch's rows where it has no room for all.
    """
    ours = [kind for kind in OURS if kind in firsts]
    if is_greedy and STOCK in firsts:
        known = dict(firsts)
    else:
        batches = batches[: max(1, FEW // len(batches[0].numbers))] if has_room else [first_rows(batches[0], FEW)]
        known = {STOCK: [judged[STOCK](batch, max_new_tokens) for batch in batches]}
        for kind in ours:
            again = [] if is_greedy else [judged[kind](batch, max_new_tokens) for batch in batches]
            known[kind] = again or firsts[kind][: len(batches)]
    agreements, problem = {}, ""
    for kind in ours:
        texts = []
        for batch, plain, said in zip(batches, known[STOCK], known[kind], strict=True):
            for i, number in enumerate(batch.numbers):
                prompt = batch.inputs["input_ids"][i][batch.inputs["attention_mask"][i].bool()]
                texts.append(Text(f"prompt {number}", prompt, plain.rows[i], said.rows[i]))
        try:
            agreements[kind] = compare(target, texts, kind=kind)
        except OutputDiffersError as error:
            problem = problem or str(error)
    return agreements, problem


def agree(agreements: Mapping[str, Agreement], problem: str, team: Team) -> dict[str, Agreement]:
    """What all processes found.

    Raises:
        OutputDiffersError: Texts differ, in any process.
    """
    if problems := [p for p in team.gather(problem) if p]:
        raise OutputDiffersError(problems[0])
    return {kind: sum(team.gather(agreement), Agreement()) for kind, agreement in agreements.items()}


def add_acceptance(
    result: Measured, calls: list[Call], firsts: list[Call], batches: Sequence[Prompts], team: Team
) -> None:
    """Acceptance length, overall and by category, and of ours the rate by depth."""
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
    counts = [(speculation.rounds_reaching, speculation.rounds_accepting) for speculation in told]
    result.acceptance_rate_by_depth = rates_by_depth([c for share in team.gather(counts) for c in share])
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


def mean_gain(counts: list[tuple[int, int, str]]) -> float | None:
    """Tokens gained a round, of (rounds, tokens, category); None without a round."""
    rounds = sum(r for r, *_ in counts)
    return sum(tokens for _, tokens, _ in counts) / rounds if rounds else None


def rates_by_depth(counts: Sequence[tuple[list[int], list[int]]]) -> list[float | None]:
    """[K] the acceptance rate of each draft token, of (rounds reaching it, rounds accepting it); None if none reached."""
    reached, accepted = ([sum(c) for c in zip_longest(*lists, fillvalue=0)] for lists in zip(*counts, strict=True))
    return [kept / reaching if reaching else None for kept, reaching in zip(accepted, reached, strict=True)]
