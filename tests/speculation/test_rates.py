"""Acceptance by depth and rank: counted from verdicts, and what shapes may expect of it."""

import itertools
import random

import pytest
from helpers.verdicts import walk

from hf_eagle3.speculation.rates import Rates, find_trials, rank_nodes
from hf_eagle3.speculation.shape import NONE, DraftShape, chain
from hf_eagle3.speculation.tree import find_depths

pytestmark = pytest.mark.any_release

MEASURED = ((0.75, 0.10, 0.04, 0.01), (0.72, 0.11, 0.04, 0.02), (0.70, 0.11, 0.04, 0.02))
TREE = DraftShape((0, 0, 1, 1, 2, 3))


def test_places_of_nodes():
    assert rank_nodes(TREE.parents) == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 0), (2, 0))


def test_a_verdict_tries_all_children_on_its_path():
    assert find_trials(TREE.parents)[0] == ((0, 0, False), (0, 1, False))
    assert sorted(find_trials(TREE.parents)[6]) == [
        *((0, 0, True), (0, 1, False), (1, 0, True), (1, 1, False), (2, 0, True)),
    ]
    assert sorted(find_trials(TREE.parents)[5]) == [(0, 0, False), (0, 1, True), (1, 0, True)]


@pytest.mark.parametrize("shape", [chain(3), TREE], ids=["chain", "tree"])
def test_rates_are_found_from_verdicts(shape):
    generator, rates = random.Random(1), Rates()
    for _ in range(200):
        ends = [walk(shape, MEASURED, generator) for _ in range(20)]
        rates.count(shape, {end: ends.count(end) for end in set(ends)})
    for depth, rank in set(rank_nodes(shape.parents)):
        assert rates.rate(depth, rank) == pytest.approx(MEASURED[depth][rank], abs=0.06)
    lengths = [1 + find_depths(shape.parents)[walk(shape, MEASURED, generator)] for _ in range(4000)]
    assert rates.expect(shape) == pytest.approx(sum(lengths) / len(lengths), abs=0.12)


def test_what_was_never_tried_is_as_before_it():
    rates = Rates(MEASURED)
    assert rates.rate(7, 0) == pytest.approx(rates.rate(2, 0))
    assert rates.rate(7, 1) == pytest.approx(rates.rate(2, 1), rel=0.05)
    for depth, most in itertools.product(range(4), range(1, 9)):
        assert 0 < sum(rates.rate(depth, rank) for rank in range(most)) <= 1
    assert rates.rate(0, 20) == 0


def test_a_drafter_that_is_never_right_expects_next_to_nothing():
    rates = Rates()
    for _ in range(30):
        rates.count(chain(3), {0: 8})
    assert rates.expect(chain(3)) < 1.05
    assert rates.expect(NONE) == 1
    rates.fade(4.0)
    before = rates.rate(0, 0)
    rates.count(chain(3), {3: 4})
    assert rates.rate(0, 0) > before + 0.4


def best_of_all(rates, num_nodes, max_depth):
    """The most that any tree expects, by trying all."""
    most = 0.0
    for parents in itertools.product(*(range(n + 1) for n in range(num_nodes))):
        if max(find_depths(parents)) <= max_depth:
            most = max(most, rates.expect(DraftShape(parents)))
    return most


@pytest.mark.parametrize(("num_nodes", "max_depth"), [(1, 4), (3, 1), (4, 2), (5, 3), (6, 4)])
@pytest.mark.parametrize("first", [MEASURED, ((0.3, 0.2, 0.1), (0.3, 0.2, 0.1)), ((0.9, 0.01), (0.2, 0.19))])
def test_no_tree_expects_more_than_the_one_that_fits(num_nodes, max_depth, first):
    rates = Rates(first)
    tree = rates.fit(num_nodes, max_depth=max_depth)
    assert (tree.num_nodes, tree.depth <= max_depth) == (num_nodes, True)
    assert rates.expect(tree) == pytest.approx(best_of_all(rates, num_nodes, max_depth))


@pytest.mark.parametrize("num_nodes", [8, 16, 32, 63])
def test_nodes_come_level_by_level_and_siblings_by_rank(num_nodes):
    tree = Rates(MEASURED).fit(num_nodes, max_depth=6, max_rank=3)
    depths = find_depths(tree.parents)
    assert depths == sorted(depths)
    assert list(tree.parents) == sorted(tree.parents)  # siblings are together
    assert max(map(tree.parents.count, set(tree.parents))) <= 3
    assert DraftShape(tree.parents).num_nodes == num_nodes
