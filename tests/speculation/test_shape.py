"""Draft shapes: how much room they take, and who sees whom."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eagle3.speculation.accept import accept_greedy
from hf_eagle3.speculation.shape import NONE, DraftShape, chain
from hf_eagle3.speculation.tree import (
    find_ancestors,
    find_children,
    find_depth_order,
    find_depths,
    find_heights,
    find_paths,
    make_ancestry,
)

pytestmark = pytest.mark.any_release

CPU = torch.device("cpu")

#        0
#      /   \
#     1     2
#    / \    |
#   3   4   5
#   |
#   6
PARENTS = (0, 0, 1, 1, 2, 3)


@st.composite
def trees(draw, most=12):
    """Parents of up to so many nodes."""
    return tuple(draw(st.integers(0, node)) for node in range(draw(st.integers(1, most))))


def test_a_tree_by_hand():
    assert find_depths(PARENTS) == [0, 1, 1, 2, 2, 2, 3]
    assert [bin(bits) for bits in find_ancestors(PARENTS)] == [
        *("0b1", "0b11", "0b101", "0b1011", "0b10011", "0b100101", "0b1001011")
    ]
    assert find_paths(PARENTS)[5:] == [[0, 2, 5, 5], [0, 1, 3, 6]]
    shape = DraftShape(PARENTS)
    assert (shape.num_nodes, shape.depth, shape.num_verified, shape.max_new) == (6, 3, 7, 4)
    assert not shape.is_chain


@given(K=st.integers(0, 64))
def test_room_of_a_chain(K):
    """What the loop has always reserved for a chain of K."""
    shape = chain(K)
    assert shape.is_chain
    assert (shape.num_nodes, shape.depth, shape.num_verified, shape.max_new) == (K, K, K + 1, K + 1)
    assert (shape.num_drafter_slots, shape.num_slots, shape.first_slots) == (2 * K + 2, 2 * K + 2, 2 * K + 3)
    assert (shape.slack, shape.slots_ahead(1)) == (4 * K + 6, 3 * K + 3)
    assert shape.ancestry(torch.device("cpu")) is None


def test_no_draft_is_a_chain_too():
    assert chain(0) == NONE
    assert NONE.is_chain
    assert (NONE.depth, NONE.max_new) == (0, 1)


@pytest.mark.parametrize("parents", [(1,), (0, 2), (-1,), (0, 1, 5)], ids=str)
def test_a_node_follows_an_earlier_one(parents):
    with pytest.raises(ValueError, match="Each draft token follows an earlier one"):
        DraftShape(parents)


def test_a_tree_fits_into_the_bits_of_a_number():
    largest = DraftShape((0, *(0 for _ in range(62))))
    bits, depths = make_ancestry(largest.parents, torch.device("cpu"))
    assert bits[63] == 1 - 2**63  # its own bit is the sign, and the root's
    assert (bits[63] >> 63 & 1, bits[63] >> 62 & 1, depths[63]) == (1, 0, 1)
    with pytest.raises(ValueError, match="at most 63 tokens, got 64"):
        DraftShape((0, *(0 for _ in range(63))))
    assert chain(64).num_nodes == 64


@given(parents=trees())
def test_a_path_leads_from_the_root_over_ancestors(parents):
    depths, ancestors, paths = find_depths(parents), find_ancestors(parents), find_paths(parents)
    for node, path in enumerate(paths):
        way = path[: depths[node] + 1]
        assert way[0] == 0
        assert way[-1] == node
        assert all(parents[b - 1] == a for a, b in itertools.pairwise(way))
        assert sum(1 << n for n in way) == ancestors[node]
        assert set(path[len(way) :]) <= {node}


@given(parents=trees(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_longest_path_that_the_target_repeats_is_kept(parents, data):
    B, V, N = 2, 3, len(parents)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    tokens = torch.randint(V, (B, N), generator=generator)
    logits = torch.randn(B, N + 1, V, generator=generator)
    verdict = accept_greedy(tokens, logits, DraftShape(parents))
    for b in range(B):
        wanted = logits[b].argmax(-1).tolist()
        kept = {0}
        for node, parent in enumerate(parents, start=1):
            if parent in kept and tokens[b, node - 1] == wanted[parent]:
                kept.add(node)
        depths = find_depths(parents)
        end = max(kept, key=lambda node: depths[node])
        num = int(verdict.num_accepted[b])
        assert num == depths[end]
        path = (torch.arange(num + 1) if verdict.path is None else verdict.path[b]).tolist()[: num + 1]
        assert set(path) <= kept
        assert path == find_paths(parents)[path[-1]][: num + 1]
        assert verdict.next_token[b] == wanted[path[-1]]


@given(parents=trees())
def test_children_and_heights(parents):
    children, heights, paths = find_children(parents), find_heights(parents), find_paths(parents)
    assert sorted(child for nodes in children for child in nodes) == list(range(1, len(parents) + 1))
    assert all(parents[child - 1] == node for node, nodes in enumerate(children) for child in nodes)
    depths = find_depths(parents)
    for node, height in enumerate(heights):
        assert height == max(depths[end] - depths[node] for end, path in enumerate(paths) if node in path)
    assert DraftShape(parents).width == max(map(len, children))


def pick(values, index):
    """Those at an index of a `Level`."""
    return list(values) if index is None else [values[i] for i in index.tolist()]


@given(parents=trees())
def test_level_by_level_each_node_is_drafted_behind_its_parent(parents):
    shape, depths, children = DraftShape(parents), find_depths(parents), find_children(parents)
    nodes, before, drafted, slots = [0], [], [], []  # those of a depth, and those fed before
    levels = shape.levels(CPU)
    assert len(levels) == shape.depth
    for depth, level in enumerate(levels):
        assert level.num_before == len(slots)
        fed = pick(nodes, level.fed)
        assert fed == [node for node in nodes if children[node]]
        assert level.num_fed == len(fed)
        assert level.width == max(len(children[node]) for node in fed)
        if depth:
            assert pick(before, level.parents) == [parents[node - 1] for node in fed]
            slots += fed
            for i, node in enumerate(fed):
                ancestors = {n for n in find_paths(parents)[node] if n}
                bits = (1 << len(slots)) - 1 if level.ancestry is None else int(level.ancestry.bits[i])
                assert {slots[k] for k in range(len(slots)) if bits >> k & 1} == ancestors
            if level.ancestry is not None:
                assert level.ancestry.num_before == level.num_before
                assert level.ancestry.depths.tolist() == [depths[node] - 1 for node in slots]
        best = [(node, rank) for node in fed for rank in range(level.width)]
        nodes = [children[node][rank] for node, rank in pick(best, level.children)]
        drafted, before = drafted + nodes, fed
    assert drafted == find_depth_order(parents)
    assert pick(drafted, shape.node_order(CPU)) == list(range(1, len(parents) + 1))


@given(K=st.integers(1, 64))
def test_levels_of_a_chain_need_no_index(K):
    for number, level in enumerate(chain(K).levels(CPU)):
        assert level == (max(number - 1, 0), 1, None, None, None, 1, None)
    assert chain(K).node_order(CPU) is None
    assert chain(K).ranks(CPU) is None


@given(parents=trees())
def test_of_the_best_of_each_depth_a_node_is_one(parents):
    """As a parallel drafter gives them: nodes of one depth have the same children."""
    shape, depths, children = DraftShape(parents), find_depths(parents), find_children(parents)
    best = [(depth, rank) for depth in range(1, shape.depth + 1) for rank in range(shape.width)]
    expected = [(depths[n], children[parents[n - 1]].index(n)) for n in range(1, len(parents) + 1)]
    assert pick(best, shape.ranks(CPU)) == expected
