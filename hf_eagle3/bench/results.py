"""What was measured of a kind of decoding: speed, acceptance, and where the time of rounds went."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from ..data_parallel import Team
from ..speculation.stats import Speculation
from .equality import Agreement
from .names import DFLASH, is_drafting
from .prompts import Prompts
from .ways import Call

TIMES = ("seconds", "draft_seconds", "verify_seconds", "accept_seconds", "host_seconds")


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
    cache_gib: float | None = None  # part of `peak_gib`: keys and values, where our loop keeps them
    by_category: dict[str, dict[str, float | None]] = field(default_factory=dict)
    seconds_in: dict[str, float] = field(default_factory=dict)  # of a drafted call
    graphs: str = ""
    shapes: dict[str, int] = field(default_factory=dict)  # rounds by what they drafted, of ours
    num_identical: int | None = None  # rows whose text is that of generate(), in greedy runs
    num_rows: int = 0
    agreement: Agreement | None = None  # with generate(), asserted before anything was timed


class Skipped(NamedTuple):
    """A kind of decoding that a batch size has no number for."""

    kind: str
    batch_size: int
    reason: str


def count_tokens(calls: Sequence[Call]) -> int:
    """New tokens of all rows."""
    return sum(len(row) for call in calls for row in call.rows)


def add_acceptance(
    result: Measured, calls: list[Call], firsts: list[Call], batches: Sequence[Prompts], team: Team
) -> None:
    """Acceptance length, overall and by category, and of ours the rate by depth."""
    if calls and calls[0].num_forwards is not None:
        own = [(c.num_forwards, len(c.rows[0]), b.categories[0]) for c, b in zip(firsts, batches, strict=True)]
        every = [counts for counts_of_one in team.gather(own) for counts in counts_of_one]
        # The first forward is the prompt's, and gives the first token.
        add_lengths(result, [(max(forwards - 1, 0), tokens - 1, category) for forwards, tokens, category in every])
        return
    speculations = [call.speculation for call in calls if call.speculation is not None]
    if not (is_drafting(result.kind) or result.kind == DFLASH) or not speculations:
        return
    categories = [category for batch in batches for category in batch.categories]
    rows = [
        (r.rounds, r.rounds + r.num_accepted)
        for speculation in speculations
        for r in speculation.rows or [speculation]
    ]
    share = [(*counts, category) for counts, category in zip(rows, categories, strict=True)]
    add_lengths(result, [counts for counts_of_one in team.gather(share) for counts in counts_of_one])
    counts = [(speculation.rounds_reaching, speculation.rounds_accepting) for speculation in speculations]
    result.acceptance_rate_by_depth = rates_by_depth([c for share in team.gather(counts) for c in share])
    rounds = sum((Counter(speculation.shapes) for speculation in speculations), Counter[str]())
    result.shapes = dict(sum(team.gather(rounds), Counter[str]()))
    first = firsts[0].speculation
    result.graphs = first.graphs if first is not None else ""


def add_lengths(result: Measured, gained: list[tuple[int, int, str]]) -> None:
    """Acceptance lengths from (rounds, tokens, category) of each row."""
    result.acceptance_length = mean_gain(gained)
    for category in dict.fromkeys(c for *_, c in gained):
        result.by_category[category] = {"acceptance_length": mean_gain([g for g in gained if g[2] == category])}


def add_times(result: Measured, calls: list[Call], shorter: list[Call], team: Team) -> None:
    """Where the time of our drafted rounds went; that of shorter calls, prompts and all, is taken off."""
    speculations = [call.speculation for call in calls if call.speculation is not None]
    if not (is_drafting(result.kind) or result.kind == DFLASH) or not speculations:
        return
    whole, less = (
        sum_times(speculations),
        sum_times([call.speculation for call in shorter if call.speculation is not None]),
    )
    every_time = team.gather({name: value - less[name] for name, value in whole.items()})
    result.seconds_in = {name: sum(t[name] for t in every_time) for name in whole}


def sum_times(speculations: list[Speculation]) -> dict[str, float]:
    """Seconds of the parts of rounds, and the number of rounds."""
    times: dict[str, float] = {name: sum(getattr(s, name) for s in speculations) for name in TIMES}
    return times | {"rounds": sum(max(r.rounds for r in s.rows or [s]) for s in speculations)}


def mean_gain(counts: list[tuple[int, int, str]]) -> float | None:
    """Tokens gained a round, of (rounds, tokens, category); None without a round."""
    rounds = sum(r for r, *_ in counts)
    return sum(tokens for _, tokens, _ in counts) / rounds if rounds else None


def rates_by_depth(counts: Sequence[tuple[list[int], list[int]]]) -> list[float | None]:
    """[K] the acceptance rate of each draft token, of (rounds reaching it, rounds accepting it); None if none reached."""
    reached, accepted = ([sum(c) for c in zip_longest(*lists, fillvalue=0)] for lists in zip(*counts, strict=True))
    return [kept / reaching if reaching else None for kept, reaching in zip(accepted, reached, strict=True)]
