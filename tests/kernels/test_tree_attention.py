"""The attention kernel over blocks that are trees."""

import pytest
import torch
from helpers.kernels import DEVICE, assert_as_good, in_double, make_rows

from hf_eagle3.kernels.attention import attend_rows, attend_rows_eager
from hf_eagle3.speculation.tree import Ancestry, make_ancestry, make_block_ancestry

WIDE = tuple(0 for _ in range(7))  # children of the root
MIXED = (0, 0, 1, 1, 2, 3, 4, 4, 0, 9, 10, 11)
LARGEST = tuple(node // 2 for node in range(63))  # a binary tree: the last bit of an int64 is in use


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize("parents", [WIDE, MIXED, LARGEST], ids=["wide", "mixed", "largest"])
def test_trees_equal_their_twin(parents, window, num_splits, dtype):
    T = len(parents) + 1
    query, keys, values, start = make_rows(3, 4, 2, T, 32, T + 90, dtype)
    ancestry = make_ancestry(parents, torch.device(DEVICE))
    sinks = torch.randn(4, device=DEVICE, dtype=dtype)
    options = {"scaling": 0.2, "window": window, "sinks": sinks, "softcap": 20.0, "ancestry": ancestry}
    out = attend_rows(query, keys, values, start, num_splits=num_splits, **options)
    reference = attend_rows_eager(query, keys, values, start, **options)
    truth = attend_rows_eager(*in_double(query, keys, values, start), **{**options, "sinks": sinks.double()})
    assert_as_good(out, reference, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("begin", "end"), [(2, 3), (1, 5), (5, 13)])
def test_a_part_of_a_tree_equals_its_twin(begin, end, window):
    """A level of a draft: ancestors lie in the slots before it."""
    query, keys, values, start = make_rows(3, 4, 2, end - begin, 32, 90)
    start = start.clamp(min=begin)
    whole = make_ancestry(MIXED, torch.device(DEVICE))
    ancestry = Ancestry(whole.bits[begin:end], whole.depths[:end])
    keys, values = keys.nan_to_num(), values.nan_to_num()
    options = {"scaling": 0.2, "window": window, "ancestry": ancestry}
    out = attend_rows(query, keys, values, start, **options)
    reference = attend_rows_eager(query, keys, values, start, **options)
    truth = attend_rows_eager(*in_double(query, keys, values, start), **options)
    assert_as_good(out, reference, truth)


@pytest.mark.gpu
def test_a_chain_as_a_tree_is_a_chain_to_the_bit():
    query, keys, values, start = make_rows(3, 8, 2, 5, 64, 200)
    ancestry = make_ancestry((0, 1, 2, 3), torch.device(DEVICE))
    chain = attend_rows(query, keys, values, start, scaling=0.1)
    assert torch.equal(attend_rows(query, keys, values, start, scaling=0.1, ancestry=ancestry), chain)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_a_block_that_sees_itself_equals_its_twin(num_tokens, window, num_splits):
    """Also where it is more than one tile of queries: the first tokens see the last."""
    query, keys, values, start = make_rows(3, 8, 2, num_tokens, 32, num_tokens + 90)
    ancestry = make_block_ancestry(num_tokens, torch.device(DEVICE))
    options = {"scaling": 0.2, "window": window, "ancestry": ancestry}
    out = attend_rows(query, keys, values, start, num_splits=num_splits, **options)
    reference = attend_rows_eager(query, keys, values, start, **options)
    truth = attend_rows_eager(*in_double(query, keys, values, start), **options)
    assert_as_good(out, reference, truth)
    for row, first in enumerate(start.tolist()):
        values[row, first + num_tokens - 1] += 1.0
    assert not torch.equal(attend_rows(query, keys, values, start, **options)[:, 0], out[:, 0])
