"""The shape of each round: what brings the most tokens a second, by what rounds cost and accept."""

import itertools
import random

import pytest
from helpers.verdicts import walk

from hf_eagle3.speculation.costs import ENOUGH, Chooser, Costs
from hf_eagle3.speculation.rates import Rates
from hf_eagle3.speculation.shape import NONE, Shapes, chain

pytestmark = pytest.mark.any_release

MEASURED = ((0.75, 0.10, 0.04, 0.01), (0.72, 0.11, 0.04, 0.02), (0.70, 0.11, 0.04, 0.02)) + (
    (0.7, 0.1, 0.04, 0.02),
) * 5
NOTHING = ((0.002,) * 8,) * 8
TREES = [Rates(MEASURED).fit(n, max_depth=5) for n in (8, 16)]
SHAPES = Shapes((chain(3), NONE, chain(1), chain(2), chain(5), *TREES))


class Machine:
    """Decodes with made-up costs and rates, and counts seconds."""

    def __init__(self, rates, step, token, base=1.0, noise=0.0, seed=1):
        self.rates, self.step, self.token, self.base, self.noise = rates, step, token, base, noise
        self.generator = random.Random(seed)
        self.seconds, self.tokens = 0.0, 0

    def cost(self, shape):
        return self.base + self.step * shape.depth + self.token * shape.num_nodes

    def run(self, chooser, num_rounds, num_rows=1, can_try=True):
        """Decode; the shapes of the rounds."""
        shapes, last = [], None
        for _ in range(num_rounds):
            shape = chooser.choose(num_rows, can_try=can_try)
            seconds = self.cost(shape) * (1 + self.noise * self.generator.random())
            ends = [walk(shape, self.rates, self.generator) for _ in range(num_rows)]
            chooser.note(num_rows, shape, ends, seconds if shape == last else None)
            depths = [0, *(self.depth_of(shape, node) for node in range(1, shape.num_nodes + 1))]
            self.tokens += sum(1 + depths[end] for end in ends)
            self.seconds += seconds
            shapes.append(shape)
            last = shape
        return shapes

    @staticmethod
    def depth_of(shape, node):
        depth = 0
        while node:
            node, depth = shape.parents[node - 1], depth + 1
        return depth

    def best(self, shapes):
        """Most tokens a second of any fixed shape."""
        rates = Rates(tuple(map(tuple, self.rates)))
        return max(rates.expect(shape) / self.cost(shape) for shape in shapes.shapes)


def make_chooser(costs=None, rates=None, shapes=SHAPES):
    chooser = Chooser(shapes, costs or Costs(0.1, is_slow=True), rates or Rates(), shapes.shapes[0])
    chooser.begin(1)
    return chooser


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rates", "step", "token"),
    [
        (MEASURED, 0.07, 0.004),  # a GPU with few rows: a tree
        (MEASURED, 0.07, 0.19),  # with many: a chain
        (MEASURED, 0.3, 0.6),  # a slow drafter over a busy target
        (NOTHING, 0.07, 0.1),
        (((0.25, 0.1),) * 8, 0.07, 0.15),
    ],
)
def test_it_settles_on_what_is_fast(rates, step, token, noise, num_rows):
    chooser, machine = make_chooser(), Machine(rates, step, token, noise=noise)
    machine.run(chooser, 150, num_rows)
    machine.seconds = machine.tokens = 0
    shapes = machine.run(chooser, 600, num_rows)
    speed = machine.tokens / machine.seconds / num_rows * (1 + noise / 2)
    assert speed > 0.93 * machine.best(SHAPES)
    assert speed > 0.97  # of not drafting
    assert sum(a != b for a, b in itertools.pairwise(shapes)) < 40


def test_a_drafter_that_knows_nothing_costs_little():
    costs, rates = Costs(0.1, is_slow=True), Rates()
    chooser, machine = make_chooser(costs, rates), Machine(NOTHING, 0.1, 0.2)
    machine.run(chooser, 100)
    machine.seconds = machine.tokens = 0
    later = make_chooser(costs, rates)  # a call that knows what the first one found
    shapes = machine.run(later, 2000)
    assert machine.tokens / machine.seconds > 0.985
    assert shapes[0] == NONE
    assert 3 <= sum(bool(shape.num_nodes) for shape in shapes) < 40


@pytest.mark.parametrize("num_rows", [1, 16])
def test_it_notices_when_drafting_pays_again(num_rows):
    chooser, machine = make_chooser(), Machine(NOTHING, 0.07, 0.02)
    assert machine.run(chooser, 200, num_rows)[-1] == NONE
    machine.rates = MEASURED
    shapes = machine.run(chooser, 1200, num_rows)
    assert all(shape.num_nodes for shape in shapes[-100:])
    assert "drafting was looked at" in " ".join(chooser.reasons)


def test_nothing_is_tried_near_the_end():
    chooser, machine = make_chooser(), Machine(MEASURED, 0.07, 0.3)
    first = chooser.current
    assert set(machine.run(chooser, 60, can_try=False)) == {first}
    assert len(set(machine.run(chooser, 60))) > 1


@pytest.mark.parametrize("num_new", [20, 100])
def test_short_calls_look_at_drafting_again(num_new):
    """A drafter that got good, and calls that are over before any of them has waited long."""
    machine, costs, rates = Machine(NOTHING, 0.07, 0.02), Costs(0.1, is_slow=False), Rates()

    def call():
        chooser = Chooser(SHAPES, costs, rates)
        chooser.begin(1)
        return machine.run(chooser, num_new)

    shapes = [shape for _ in range(600 // num_new) for shape in call()]
    assert shapes[-10:].count(NONE) > 8
    machine.rates = MEASURED
    shapes = [shape for _ in range(1200 // num_new) for shape in call()]
    assert all(shape.num_nodes for shape in shapes[-20:])


@pytest.mark.parametrize("num_new", [30, 2000])
def test_rounds_that_were_slow_are_measured_again(num_new):
    """As on a CPU whose weights are not packed yet, or which others used."""
    machine, costs, rates = Machine(MEASURED, 0.4, 1.0), Costs(0.1, is_slow=True), Rates()
    chooser = Chooser(SHAPES, costs, rates)
    chooser.begin(1)
    assert machine.run(chooser, 300)[-1] == NONE
    machine.step, machine.token = 0.05, 0.1
    shapes = []
    for _ in range(2000 // num_new):
        chooser = Chooser(SHAPES, costs, rates)
        chooser.begin(1)
        shapes += machine.run(chooser, num_new)
    assert all(shape.num_nodes for shape in shapes[-200:])


def test_many_short_calls_try_what_a_long_one_would():
    """A drafter that is never right, and calls too short for any new shape to pay in them."""
    machine, costs, rates = Machine(NOTHING, step=0.1, token=0.01), Costs(0.1, is_slow=False), Rates()
    for number in range(12):
        chooser = Chooser(SHAPES, costs, rates)
        chooser.begin(1)
        shapes = machine.run(chooser, 30, can_try=False)
        if not number:
            assert NONE not in shapes
    assert shapes.count(NONE) > 25


def test_what_is_much_larger_is_tried_step_by_step():
    """A CPU takes as long for four tokens as for three, and further ones then look free."""
    machine = Machine(MEASURED, 0.02, 0.0)
    machine.cost = lambda shape: 1 + 0.02 * shape.depth + 0.25 * max(shape.num_nodes - 5, 0)
    chooser = make_chooser()
    shapes = machine.run(chooser, 200)
    assert TREES[0] in shapes
    assert TREES[1] not in shapes
    assert TREES[1] not in machine.run(make_chooser(chooser.costs), 200)


def test_a_call_begins_with_what_was_measured():
    costs = Costs(0.1, is_slow=True)
    for shape, seconds in ((NONE, 1.0), (chain(2), 0.9)):
        for _ in range(3):
            costs.add(1, shape, seconds)
    assert make_chooser(costs, Rates(MEASURED)).current == chain(2)


def test_a_fixed_shape_stays():
    chooser, machine = make_chooser(shapes=Shapes((chain(3),))), Machine(NOTHING, 1.0, 1.0)
    assert set(machine.run(chooser, 60)) == {chain(3)}
    assert chooser.rounds == {chain(3): 60}
    assert not chooser.reasons


def test_what_was_not_measured_is_predicted_from_what_was():
    costs = Costs(0.1, is_slow=False)
    for shape, seconds in ((NONE, 1.0), (chain(3), 1.6)):  # a token costs 0.1
        for _ in range(3):
            costs.add(4, shape, seconds)
    assert costs.seconds(4, chain(1)) == pytest.approx(1.2, rel=0.02)
    assert costs.seconds(4, chain(5)) == pytest.approx(2.0, rel=0.02)
    ratio = costs.seconds(8, chain(3)) / costs.seconds(8, NONE)  # twice the rows, twice as much a token
    assert ratio == pytest.approx(1.9, rel=0.02)


def test_a_measurement_takes_several_rounds_and_the_newest_count():
    costs = Costs(0.1, is_slow=False)
    costs.add(1, NONE, 5.0)
    assert not costs.is_known(1, NONE)
    for _ in range(20):
        costs.add(1, NONE, 2.0)
    assert costs.seconds(1, NONE) == 2.0


def test_a_deeper_block_is_no_dearer_to_draft():
    by_depth = Costs(0.2, is_slow=False)
    in_one = Costs(0.2, is_slow=False, count_forwards=lambda shape: min(shape.depth, 1))
    for costs in (by_depth, in_one):
        for _ in range(ENOUGH):
            costs.add(1, NONE, 1.0)
            costs.add(1, chain(1), 1.2)
    assert in_one.seconds(1, chain(7)) < 1.3 < by_depth.seconds(1, chain(7))
