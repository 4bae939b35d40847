"""Draft shapes: how much room they take, and who sees whom."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eagle3.speculation.accept import accept_greedy
from hf_eagle3.speculation.shape import NONE, DraftShape, chain
from hf_eagle3.speculation.tree import find_ancestors, find_depths, find_paths, make_ancestry

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
    assert (shape.num_drafter_slots, shape.num_slots, shape.first_slots) == (2 * K, 2 * K + 2, 2 * K + 3)
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
