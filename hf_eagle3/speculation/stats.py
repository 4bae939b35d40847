"""What speculation brought in one call: counts of verdicts, and where the time went."""

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch


@dataclass
class Speculation:
    """Counts and times of one `generate` call, or the counts of one of its rows.

    In a batch, each row of a round counts as a round of its own. A round counts when it verified a draft. The first
    token of a call comes from the prefill, and the last may come from a round without room for a draft; neither is a
    round, both are in `num_tokens`. A last round that end-of-sequence or the length limit cut short counts with the
    tokens it still emitted.
    """

    loop: str  # which decode loop ran
    why: str  # and why that one
    depth: int  # K, draft steps a round at most
    rule: str = ""  # how draft tokens were accepted
    shapes: dict[str, int] = field(default_factory=dict)  # our loop: rounds of the batch by what they proposed
    changes: list[str] = field(default_factory=list)  # our loop: when that changed, and why
    graphs: str = ""  # our loop: whether rounds ran as CUDA graphs, and if not, why
    num_tokens: int = 0  # new tokens, by whatever means
    num_drafted: int = 0  # draft tokens verified
    num_accepted: int = 0  # draft tokens kept
    seconds: float = 0.0  # the whole loop, prefill included
    draft_seconds: float = 0.0  # drafter forwards; on a GPU, measured by its own clock
    accept_seconds: float = 0.0  # the accept rule; the host loop does not tell it from verification
    host_seconds: float = 0.0  # our loop: processors, criteria and streamers, in Python
    acceptance_by_rank: list[list[float]] = field(default_factory=list)  # our loop: see `rates.tabulate`
    rounds_reaching: list[int] = field(default_factory=list)  # [K] rounds that kept k draft tokens and had one more
    rounds_accepting: list[int] = field(default_factory=list)  # [K] rounds that kept that one too
    rows: list["Speculation"] = field(default_factory=list)  # our loop: counts of each row, without times

    def count(self, num_drafted: int, num_accepted: int) -> None:
        """Add one verdict of one row: `num_accepted` of `num_drafted` draft tokens kept, and one token more."""
        self.num_tokens += num_accepted + 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        for counts in (self.rounds_reaching, self.rounds_accepting):
            counts.extend([0] * (num_drafted - len(counts)))
        for k in range(num_drafted):
            self.rounds_reaching[k] += num_accepted >= k
            self.rounds_accepting[k] += num_accepted > k

    @property
    def rounds(self) -> int:
        """Rounds that verified a draft."""
        return self.rounds_reaching[0] if self.rounds_reaching else 0

    @property
    def acceptance_length(self) -> float:
        """Tokens gained per round, the target's own included: mean of `num_accepted + 1`. NaN without a round."""
        return 1 + self.num_accepted / self.rounds if self.rounds else float("nan")

    @property
    def acceptance_rate_by_depth(self) -> list[float]:
        """At index k: the share of rounds keeping draft token k+1, among those that kept k. NaN if none did."""
        pairs = zip(self.rounds_accepting, self.rounds_reaching, strict=True)
        return [kept / reached if reached else float("nan") for kept, reached in pairs]

    @property
    def verify_seconds(self) -> float:
        """All other time: target forwards, the prompt's included, and the loop around them."""
        return max(self.seconds - self.draft_seconds - self.accept_seconds - self.host_seconds, 0.0)

    def __str__(self) -> str:
        rates = " ".join(f"{rate:.2f}" for rate in self.acceptance_rate_by_depth) or "-"
        speed = f", {self.num_tokens / self.seconds:.1f} tokens/s" if self.seconds else ""
        kinds = ", ".join(self.shapes) if len(self.shapes) > 1 else f"depth {self.depth}"
        return (
            f"{self.num_tokens} tokens in {self.rounds} rounds of {kinds}{speed} | "
            f"acceptance length {self.acceptance_length:.2f} | acceptance rate by depth {rates} | "
            f"draft {self.draft_seconds:.3f} s, verify {self.verify_seconds:.3f} s | {self.loop} ({self.why})"
        )


class Stopwatch:
    """Adds up the time of a `with` block that runs many times, on the device's own clock where it has one.

    Events on a GPU cost no waiting; they are read once, at the end.
    """

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._marks: list[tuple] = []
        self._start: Any = None  # a time in seconds, or a torch.cuda.Event

    def _now(self) -> Any:  # a time in seconds, or a torch.cuda.Event
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def __enter__(self) -> "Stopwatch":
        self._start = self._now()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._marks.append((self._start, self._now()))

    def read_seconds(self) -> float:
        """Seconds so far. Waits for the device."""
        if not self._is_cuda:
            return sum(stop - start for start, stop in self._marks)
        for _, stop in self._marks:  # to wait for the whole device would break another thread's capture
            stop.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self._marks) / 1000
