"""What a round of each shape costs, and which shape brings the most tokens a second."""

import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from .rates import LOOK_AFTER, Rates
from .shape import NONE, DraftShape, Shapes

SAMPLES = 9  # newest measurements that count: their median
ENOUGH = 3  # rounds that make a measurement
CHECK_EVERY = 8  # rounds between choices
HYSTERESIS = 1.03  # how much more a shape must promise to be taken
DOUBT = 0.6  # of the current shape's speed: where not drafting may reach that, it is measured
CURIOSITY = 1.05  # how much more one must promise that was never measured here
GROWTH = 2  # times as many tokens as were ever verified here that a shape may have which is to be measured
REFUSALS = 8  # choices, of any calls, that go without a shape worth measuring before its price counts as earned
RECOVERED = 0.9  # of the seconds known, at which those of other shapes are not believed any more
LOOK_AT_MOST = 512  # rounds without a draft
LEAST_TOKEN = 0.0005  # of a round; noise can make further tokens look free
RECENT, OLD = 4.0, 32.0  # verdicts that what is known counts for: when drafting is looked at again, in a new call


class Costs:
    """Seconds of rounds, by rows and shape. Kept between calls of a target and a drafter.

    Args:
        step: What a forward of the drafter costs, as a share of a round without a draft.
        is_slow: Whether a forward takes as long as it has tokens, as on a CPU; else it takes as long as weights to read.
        count_forwards: How many of them a shape takes; by default one for each depth.
    """

    def __init__(
        self,
        step: float,
        *,
        is_slow: bool,
        count_forwards: Callable[[DraftShape], int] = attrgetter("depth"),
    ):
        self.step, self.is_slow, self.count_forwards = step, is_slow, count_forwards
        self.samples: dict[tuple[int, DraftShape], deque[float]] = {}
        self.refused: Counter[tuple[int, DraftShape]] = Counter()  # choices that went without measuring it

    def add(self, num_rows: int, shape: DraftShape, seconds: float) -> None:
        """Note a round."""
        self.samples.setdefault((num_rows, shape), deque(maxlen=SAMPLES)).append(seconds)

    def forget(self, num_rows: int, shapes: Iterable[DraftShape]) -> None:
        """Measure these anew."""
        for shape in shapes:
            self.samples.pop((num_rows, shape), None)

    def is_known(self, num_rows: int, shape: DraftShape) -> bool:
        """Whether it was measured often enough."""
        return len(self.samples.get((num_rows, shape), ())) >= ENOUGH - 1

    def measured(self, num_rows: int) -> list[DraftShape]:
        """Shapes that were measured with so many rows."""
        return [shape for rows, shape in list(self.samples) if rows == num_rows and self.is_known(rows, shape)]

    def seconds(self, num_rows: int, shape: DraftShape) -> float:
        """What a round takes: measured, else from what was, else as a share of a round without a draft."""
        if self.is_known(num_rows, shape):
            return statistics.median_low(tuple(self.samples[num_rows, shape]))  # noise only adds
        known = self.measured(num_rows)
        if not known:
            return self._predict(num_rows, shape)
        nearest = min(known, key=lambda one: (abs(one.num_nodes - shape.num_nodes), one.num_nodes))
        return self.seconds(num_rows, nearest) * self._predict(num_rows, shape) / self._predict(num_rows, nearest)

    def _predict(self, num_rows: int, shape: DraftShape) -> float:
        """A round's share, by rows alone."""
        return self._drafted(shape) + self._token(num_rows) * shape.num_nodes

    def _drafted(self, shape: DraftShape) -> float:
        """The share of a round of one token in each row, and of the draft before it."""
        return 1 + self.step * self.count_forwards(shape)

    def _token(self, num_rows: int) -> float:
        """What a further token verified in each row costs: by two shapes measured with so many rows, or nearly so many."""
        rows = sorted({rows for rows, _ in list(self.samples)}, key=lambda rows: (abs(rows - num_rows), rows))
        for near in rows:
            if (found := self._measure_token(near)) is not None:
                return found * self._guess_token(num_rows) / self._guess_token(near)
        return self._guess_token(num_rows)

    def _measure_token(self, num_rows: int) -> float | None:
        known = sorted(self.measured(num_rows), key=lambda shape: shape.num_nodes)
        if not known or known[0].num_nodes == known[-1].num_nodes:
            return None
        few, many = known[0], known[-1]
        ratio = self.seconds(num_rows, many) / self.seconds(num_rows, few)
        # 1 + step * f2 + token * n2 = ratio * (1 + step * f1 + token * n1)
        above = ratio * self._drafted(few) - self._drafted(many)
        below = many.num_nodes - ratio * few.num_nodes
        return max(above / below, LEAST_TOKEN) if below > 0 else None

    def _guess_token(self, num_rows: int) -> float:
        return 0.15 + 0.05 * num_rows if self.is_slow else 0.005 * num_rows


@dataclass
class Chooser:
    """Chooses the shape of each round of a call.

    Attributes:
        shapes: To choose from.
        costs: Of the models.
        rates: Of the drafter, on texts like these.
        current: The shape of the next round.
        reasons: Why it changed, in words.
        rounds: By shape.
        ends: How many rows' verdicts ended at each node, by shape.
    """

    shapes: Shapes
    costs: Costs
    rates: Rates
    current: DraftShape = NONE
    reasons: list[str] = field(default_factory=list)
    rounds: Counter[DraftShape] = field(default_factory=Counter)
    ends: dict[DraftShape, Counter[int]] = field(default_factory=dict)
    _since: int = 0  # rounds of the current shape, in this call
    _is_looking: bool = False
    _cost_before: float | None = None  # of the shape that is looked at

    def begin(self, num_rows: int) -> DraftShape:
        """The shape of the first round."""
        self.rates.fade(OLD)
        known = [shape for shape in self.shapes.shapes if self.costs.is_known(num_rows, shape)]
        self.current = self._best(num_rows, known or self._near(num_rows))
        return self.current

    def note(self, num_rows: int, shape: DraftShape, ends: Iterable[int], seconds: float | None) -> None:
        """Take in a round: where each row's accepted path ended, and how long it took if nothing else ran in between."""
        self.rounds[shape] += 1
        counts = Counter(ends)
        self.ends.setdefault(shape, Counter()).update(counts)
        if self.shapes.is_fixed:
            return
        if shape.num_nodes:
            self.rates.count(shape, counts)
        else:
            self.rates.num_idle += 1
        if seconds is not None:
            self.costs.add(num_rows, shape, seconds)

    def choose(self, num_rows: int, *, can_try: bool = True) -> DraftShape:
        """The shape of the next round.

        Args:
            num_rows: Rows in the batch.
            can_try: Whether enough is to come that a shape which was never measured is worth its price. Where calls are
                short, it is once earlier choices would have earned that.
        """
        if self.shapes.is_fixed:
            return self.current
        self._since += 1
        if self._is_looking:
            return self.current if self._since < ENOUGH else self._end_look(num_rows)
        if not self.current.num_nodes and self.rates.num_idle >= self.rates.look_after:
            return self._look(num_rows)
        is_new = len(self.costs.samples.get((num_rows, self.current), ())) < SAMPLES
        if self._since % CHECK_EVERY and not (is_new and self._since == ENOUGH):
            return self.current
        best = self._best(num_rows, self._known(num_rows))
        if self._gain(num_rows, best) > HYSTERESIS:
            return self._decide(num_rows, f"{self._gain(num_rows, best) - 1:+.0%} tokens a second")
        if (shape := self._find_worth_measuring(num_rows)) is not None:
            if can_try or self.costs.refused[num_rows, shape] >= REFUSALS:
                return self._take(num_rows, shape, "to measure it")
            self.costs.refused[num_rows, shape] += 1
        return self.current

    def _find_worth_measuring(self, num_rows: int) -> DraftShape | None:
        """A shape that was never measured with so many rows and promises enough, or is on the way to one that does."""
        unknown = [shape for shape in self.shapes.shapes if not self.costs.is_known(num_rows, shape)]
        if not unknown or not self.costs.is_known(num_rows, self.current):
            return None
        if NONE in unknown and self._gain(num_rows, NONE) > DOUBT:
            return NONE
        best = self._best(num_rows, unknown)
        if self._gain(num_rows, best) <= CURIOSITY or not (near := self._near(num_rows, unknown)):
            return None
        # What much larger ones would cost is a guess: step by step.
        return best if best in near else max(near, key=lambda shape: shape.num_nodes)

    def _look(self, num_rows: int) -> DraftShape:
        """Draft again for a few rounds: what was known of rates and costs may be so no more."""
        shape = self._cheapest(num_rows)
        self.rates.num_idle = 0
        self.rates.fade(RECENT)
        self._is_looking = True
        self._cost_before = self.costs.seconds(num_rows, shape) if self.costs.is_known(num_rows, shape) else None
        self.costs.forget(num_rows, [shape])
        return self._take(num_rows, shape, "to look at drafting again")

    def _end_look(self, num_rows: int) -> DraftShape:
        before, self._cost_before = self._cost_before, None
        is_measured = self.costs.is_known(num_rows, self.current)
        if before and is_measured and self.costs.seconds(num_rows, self.current) < RECOVERED * before:
            # A CPU that was busy, or had not packed its weights, was slow with the other shapes as well.
            self.costs.forget(num_rows, [s for s in self.shapes.shapes if s.num_nodes and s != self.current])
        return self._decide(num_rows, "drafting was looked at")

    def _decide(self, num_rows: int, why: str) -> DraftShape:
        """Take the best of the shapes that are known."""
        best = self._best(num_rows, self._known(num_rows))
        if self._is_looking:
            self._is_looking = False
            self.rates.look_after = LOOK_AFTER if best.num_nodes else min(2 * self.rates.look_after, LOOK_AT_MOST)
        return self._take(num_rows, best, why)

    def _known(self, num_rows: int) -> list[DraftShape]:
        known = {*self.costs.measured(num_rows), self.current}
        return [shape for shape in self.shapes.shapes if shape in known]

    def _near(self, num_rows: int, shapes: Iterable[DraftShape] | None = None) -> list[DraftShape]:
        """Those of `shapes`, by default all, that are not much larger than what was measured with so many rows."""
        known = self.costs.measured(num_rows) or self.shapes.shapes[:1]
        most = GROWTH * max(shape.num_verified for shape in known)
        return [shape for shape in shapes or self.shapes.shapes if shape.num_verified <= most]

    def _cheapest(self, num_rows: int) -> DraftShape:
        """The shape that tells about drafting at the least price."""
        return min(
            (shape for shape in self.shapes.shapes if shape.num_nodes),
            key=lambda shape: (not self.costs.is_known(num_rows, shape), self.costs.seconds(num_rows, shape)),
        )

    def _speed(self, num_rows: int, shape: DraftShape) -> float:
        return self.rates.expect(shape) / self.costs.seconds(num_rows, shape)

    def _gain(self, num_rows: int, shape: DraftShape) -> float:
        return self._speed(num_rows, shape) / self._speed(num_rows, self.current)

    def _best(self, num_rows: int, shapes: Iterable[DraftShape]) -> DraftShape:
        return max(shapes, key=lambda shape: self._speed(num_rows, shape))

    def _take(self, num_rows: int, shape: DraftShape, why: str) -> DraftShape:
        if shape != self.current:
            number = sum(self.rounds.values())
            self.reasons.append(f"round {number}, {num_rows} rows: {self.current.name} -> {shape.name} ({why})")
            self.current = shape
        self._since = 0
        return shape
