"""Blocks that are trees: who sees whom in masks and attention, and what stays in the cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eagle3.kernels.attention import attend_rows_eager
from hf_eagle3.rows.attention import weigh
from hf_eagle3.rows.block import Block
from hf_eagle3.rows.cache import RowCache
from hf_eagle3.rows.masks import make_mask
from hf_eagle3.speculation.tree import Ancestry, find_depths, make_ancestry

pytestmark = pytest.mark.any_release

CPU = torch.device("cpu")
PARENTS = (0, 0, 1, 1, 2, 3)  # see tests/speculation/test_shape.py


def sees(parents, query: int, key: int) -> bool:
    """Whether a node sees another: climbing from it one gets there."""
    while query > key:
        query = parents[query - 1]
    return query == key


@given(
    parents=st.integers(1, 9).flatmap(lambda n: st.tuples(*(st.integers(0, node) for node in range(n)))),
    window=st.none() | st.integers(1, 8),
    start=st.integers(0, 6),
)
@settings(max_examples=80, deadline=None)
def test_a_token_sees_the_text_its_ancestors_and_itself(parents, window, start):
    T, L = len(parents) + 1, 20
    block, depths = Block(torch.tensor([start]), T, make_ancestry(parents, CPU)), find_depths(parents)
    mask = make_mask(block, L, window=window)
    assert mask.shape == (1, 1, T, L)
    for t in range(T):
        for slot in range(L):
            is_new = start <= slot < start + T
            position = start + depths[slot - start] if is_new else slot
            expected = slot < start or (is_new and sees(parents, t, slot - start))
            if window is not None:
                expected = expected and position > start + depths[t] - window
            assert mask[0, 0, t, slot] == expected, (t, slot)
    assert block.places.tolist() == [[start + d for d in depths]]
    assert block.slots.tolist() == [list(range(start, start + T))]


def test_a_tree_in_parts_is_the_tree():
    """A token sees the same in one block as behind earlier blocks that began the tree."""
    start, T, L = torch.tensor([3, 0, 9]), len(PARENTS) + 1, 20
    whole = make_ancestry(PARENTS, CPU)
    query, keys = torch.randn(3, 4, T, 8), torch.randn(3, L, 2, 8)
    for window in (None, 1, 3, 4):
        mask = make_mask(Block(start, T, whole), L, window=window)
        options = {"scaling": 0.4, "window": window, "softcap": 5.0, "sinks": torch.randn(4)}
        out = attend_rows_eager(query, keys, keys, start, ancestry=whole, **options)
        for begin, end in [(0, 2), (2, 5), (5, 7), (1, 7)]:
            part = Block(start + begin, end - begin, Ancestry(whole.bits[begin:end], whole.depths[:end]))
            assert part.places.tolist() == Block(start, T, whole).places[:, begin:end].tolist()
            assert torch.equal(make_mask(part, L, window=window), mask[:, :, begin:end])
            ours = attend_rows_eager(query[:, :, begin:end], keys, keys, part.start, ancestry=part.ancestry, **options)
            torch.testing.assert_close(ours, out[:, begin:end])


@pytest.mark.parametrize("window", [None, 4])
def test_a_chain_as_a_tree_is_a_chain(window):
    start = torch.tensor([3, 0, 9])
    as_tree = Block(start, 5, make_ancestry((0, 1, 2, 3), CPU))
    assert torch.equal(make_mask(as_tree, 20, window=window), make_mask(Block(start, 5), 20, window=window))
    query, keys = torch.randn(3, 4, 5, 8), torch.randn(3, 20, 2, 8)
    options = {"scaling": 0.4, "window": window}
    ours = attend_rows_eager(query, keys, keys, start, ancestry=as_tree.ancestry, **options)
    torch.testing.assert_close(ours, attend_rows_eager(query, keys, keys, start, **options), rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_over_a_tree_is_that_over_its_mask(window, softcap):
    B, H, H_kv, T, D, L = 3, 4, 2, len(PARENTS) + 1, 8, 24
    start = torch.tensor([0, 5, L - T])
    query, keys, values = torch.randn(B, H, T, D), torch.randn(B, L, H_kv, D), torch.randn(B, L, H_kv, D)
    block, sinks = Block(start, T, make_ancestry(PARENTS, CPU)), torch.randn(H)
    options = {"scaling": 0.3, "softcap": softcap}
    ours = attend_rows_eager(
        query, keys, values, start, window=window, sinks=sinks, ancestry=block.ancestry, **options
    )
    mask = make_mask(block, L, window=window)
    expected = weigh(query, keys.transpose(1, 2), values.transpose(1, 2), mask, s_aux=sinks, **options)
    torch.testing.assert_close(ours, expected)


def test_of_a_tree_the_path_stays():
    cache, start, T = RowCache(2, 32), torch.tensor([4, 11]), 7
    new = torch.arange(2 * T, dtype=torch.float32).view(2, 1, T, 1).expand(2, 3, T, 5)
    with cache.writing(Block(start, T, make_ancestry(PARENTS, CPU))):
        for layer in range(2):
            cache.update(new, -new, layer)
    cache.keep(start, torch.tensor([[0, 1, 3, 6], [0, 2, 5, 5]]))
    for layer in cache.layers:
        assert layer.keys[0, 4:8, 0, 0].tolist() == [0, 1, 3, 6]
        assert layer.keys[1, 11:14, 0, 0].tolist() == [7, 9, 12]
        assert torch.equal(layer.values[0, 4:8], -layer.keys[0, 4:8])
