"""How often drafts are right, by depth and rank, and what a shape may expect of that."""

import functools
import heapq
from collections import Counter
from collections.abc import Mapping

from .shape import DraftShape
from .tree import find_children, find_depths

# Of the tokens that are not the likeliest draft, the share whose rank is 2, 3, ...: measured with a drafter for a small
# model along greedy answers (docs/log.md). Counts of the drafter itself soon outweigh them.
SHARES = (0.42, 0.155, 0.06, 0.045, 0.03, 0.025, 0.02)
FIRST_RATE = 0.65
PRIOR_WEIGHT = 4.0  # verdicts that what was assumed counts for
MEMORY = 400.0  # verdicts at a depth that are remembered; older ones fade
# Rounds without a draft, of any calls, after which drafting is looked at again; doubles each time that does not pay.
LOOK_AFTER = 64
MAX_RANKS = len(SHARES) + 1


@functools.cache
def rank_nodes(parents: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Depth and rank, from 0 on, of each draft token of a shape: siblings come in the order of their ranks."""
    depths, num_children = find_depths(parents), [0] * (len(parents) + 1)
    places = []
    for parent in parents:
        places.append((depths[parent], num_children[parent]))
        num_children[parent] += 1
    return tuple(places)


def tabulate(ends: Mapping[DraftShape, Mapping[int, int]]) -> list[list[float]]:
    """[D][R] how often the target's token had each rank, of the rounds whose path got to that depth; NaN if none did.

    Args:
        ends: How many verdicts ended at each node, by shape.
    """
    tried: dict[tuple[int, int], float] = {}
    hits: dict[tuple[int, int], float] = {}
    for shape, counts in ends.items():
        add_trials(tried, hits, shape, counts)
    num_ranks = Counter(depth for depth, _ in tried)
    depths = range(max(num_ranks, default=-1) + 1)
    return [[hits[d, r] / tried[d, r] if tried[d, r] else float("nan") for r in range(num_ranks[d])] for d in depths]


def add_trials(
    tried: dict[tuple[int, int], float], hits: dict[tuple[int, int], float], shape: DraftShape, ends: Mapping[int, int]
) -> None:
    """Add to both, by depth and rank, what verdicts over a shape say that ended so often at the root (0) or each node."""
    trials = find_trials(shape.parents)
    for end, number in ends.items():
        for depth, rank, is_hit in trials[end]:
            place = depth, rank
            tried[place] = tried.get(place, 0.0) + number
            hits[place] = hits.get(place, 0.0) + number * is_hit


@functools.cache
def find_trials(parents: tuple[int, ...]) -> tuple[tuple[tuple[int, int, bool], ...], ...]:
    """What a verdict that ends at the root, or at each node, says: (depth, rank, whether it was that one) of each trial."""
    ranks, children = rank_nodes(parents), find_children(parents)
    trials = []
    for end in range(len(parents) + 1):
        found, node, kept = [], end, None
        while True:
            found += [(*ranks[child - 1], child == kept) for child in children[node]]
            if not node:
                break
            node, kept = parents[node - 1], node
        trials.append(tuple(found))
    return tuple(trials)


class Rates:
    """How often the token that the target says is a node's child of rank r, where the path got to depth d.

    Exclusive events, so the rates of a depth add up to 1 at most. What was never tried is taken to be as one depth
    earlier, and there as with other drafters.

    Args:
        first: Rates by depth and rank to begin with, as a drafter may carry them.
    """

    def __init__(self, first: tuple[tuple[float, ...], ...] = ()):
        self.first = first
        start = first[0][0] if first else FIRST_RATE
        self.tried: dict[tuple[int, int], float] = {(0, 0): PRIOR_WEIGHT}
        self.hits: dict[tuple[int, int], float] = {(0, 0): PRIOR_WEIGHT * start}
        self._known: dict[tuple[int, int], float] = {}
        self.num_idle = 0  # rounds without a draft since it was looked at
        self.look_after = LOOK_AFTER

    def count(self, shape: DraftShape, ends: Mapping[int, int]) -> None:
        """Add verdicts over a shape: how many ended at the root (0) or at each node."""
        add_trials(self.tried, self.hits, shape, ends)
        self.fade(MEMORY)

    def fade(self, most: float) -> None:
        """Let what was counted weigh no more than `most` verdicts at any place."""
        for place, tried in list(self.tried.items()):  # another thread may count, too
            if tried > most:
                self.hits[place] *= most / tried
                self.tried[place] = most
        self._known.clear()

    def rate(self, depth: int, rank: int) -> float:
        """The rate there."""
        place = depth, rank
        if place not in self._known:
            weight = PRIOR_WEIGHT if any(place) else 0.0  # what is assumed of the first fades as counts do
            tried, hits = self.tried.get(place, 0.0), self.hits.get(place, 0.0)
            self._known[place] = (hits + weight * (self._assume(depth, rank) if weight else 0.0)) / (tried + weight)
        return self._known[place]

    def _assume(self, depth: int, rank: int) -> float:
        """The rate there, from what is known elsewhere."""
        if depth < len(self.first) and rank < len(self.first[depth]):
            return self.first[depth][rank]
        if rank >= MAX_RANKS:
            return 0.0
        if not rank:
            return self.rate(depth - 1, 0)
        missed = 1 - self.rate(depth, 0)
        likelier = self.rate(depth, rank - 1)  # a drafter that is never right is not right at a second try either
        if not depth:
            return min(SHARES[rank - 1] * missed, likelier)
        before = 1 - self.rate(depth - 1, 0)
        return min(self.rate(depth - 1, rank) / before * missed, likelier) if before else 0.0

    def expect(self, shape: DraftShape) -> float:
        """Tokens that a round of `shape` may bring, the target's own included."""
        reached = [1.0]
        for parent, (depth, rank) in zip(shape.parents, rank_nodes(shape.parents), strict=True):
            reached.append(reached[parent] * self.rate(depth, rank))
        return sum(reached)

    def fit(self, num_nodes: int, *, max_depth: int, max_rank: int = MAX_RANKS) -> DraftShape:
        """The tree of `num_nodes` draft tokens that may expect most. Parents come first, siblings by rank.

        Args:
            num_nodes: N.
            max_depth: Of its longest path: a level is a forward of the drafter.
            max_rank: Most children of a node, for a small draft vocabulary.
        """
        # Each entry: how likely it is that the text goes there, and the node as (depth, rank) below its parent.
        heap = [(-self.rate(0, 0), 0, 0, 0)]  # likelihood, parent, depth, rank
        chosen: list[tuple[float, int, int, int]] = []
        while heap and len(chosen) < num_nodes:
            likely, parent, depth, rank = entry = heapq.heappop(heap)
            chosen.append(entry)
            node, own = len(chosen), self.rate(depth, rank)
            if rank + 1 < max_rank and own:
                heapq.heappush(heap, (likely / own * self.rate(depth, rank + 1), parent, depth, rank + 1))
            if depth + 1 < max_depth:
                heapq.heappush(heap, (likely * self.rate(depth + 1, 0), node, depth + 1, 0))
        return DraftShape(order_by_levels([parent for _, parent, _, _ in chosen]))


def order_by_levels(parents: list[int]) -> tuple[int, ...]:
    """The same tree with its nodes numbered level by level, siblings together and in their order."""
    depths = find_depths(parents)
    path: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(parents, start=1):
        path.append((*path[parent], node))
    order = sorted(range(1, len(parents) + 1), key=lambda node: (depths[node], path[node]))
    number = {0: 0} | {node: new for new, node in enumerate(order, start=1)}
    return tuple(number[parents[node - 1]] for node in order)
