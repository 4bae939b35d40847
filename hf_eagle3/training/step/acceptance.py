"""Acceptance lengths of greedy chain drafting, computed from greedy text without decoding it."""

import itertools
from typing import NamedTuple

import numpy as np


class Walk(NamedTuple):
    """Rounds along a text, and the acceptances at each depth."""

    rounds: int
    accepted: np.ndarray  # [K] int64, rounds that accepted draft token k (and all before it)

    @property
    def acceptance_length(self) -> float:
        """Tokens gained a round: mean of `num_accepted + 1`. NaN without rounds."""
        return 1 + self.accepted.sum() / self.rounds if self.rounds else float("nan")

    @property
    def rate_by_depth(self) -> list[float]:
        """Acceptance rate at each depth that any round reached: the share of rounds that accepted it among those before."""
        reached = [self.rounds, *self.accepted.tolist()]
        return [kept / before for before, kept in itertools.pairwise(reached) if before]

    def __add__(self, other: "Walk") -> "Walk":  # type: ignore[override]  # sums, not a longer tuple
        return Walk(self.rounds + other.rounds, self.accepted + other.accepted)


def walk(hits: np.ndarray, loss_mask: np.ndarray, *, is_cut: bool = False) -> Walk:
    """Decode one document without running a model: from slot i, a round of m matches goes on at slot i + m + 1.

    Exact when the text is what the target generates greedily. The first token of a turn comes from the prompt's own
    forward, so no round is counted for it.

    Args:
        hits: [K, T] bool, whether the draft token k at slot i is token i + 2 + k of the text; false past the turn.
        loss_mask: [T] bool, the tokens the target generated.
        is_cut: A limit ended the turns. A decoder knows it, and drafts nothing where one token is left.
    """
    K, T = hits.shape
    prefix = np.logical_and.accumulate(hits, axis=0)  # [K, T]
    rounds, accepted = 0, np.zeros(K, dtype=np.int64)
    starts = np.flatnonzero(loss_mask & ~np.concatenate([[False], loss_mask[:-1]]))
    for start in starts:
        end = start + np.argmin(loss_mask[start:]) if not loss_mask[start:].all() else T  # one past the turn
        slot = start - 1
        while slot >= 0 and slot + 2 + is_cut < end:
            # The round adds a token of the target's own, and the turn has room for so many, as a decoder counts.
            matched = prefix[:, slot] & (np.arange(K) < end - slot - 3)
            rounds += 1
            accepted += matched
            slot += int(matched.sum()) + 1
    return Walk(rounds, accepted)
