"""The best few of long rows, and the tokens of a path in a cache: kernels and their twins."""

import pytest
import torch
from helpers.kernels import DEVICE

from hf_eagle3.kernels.attention import keep_rows, keep_rows_eager
from hf_eagle3.kernels.top import BLOCK, MOST, top_rows, top_rows_eager


@pytest.mark.gpu
@pytest.mark.parametrize("V", [8, 700, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("k", [1, 3, MOST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_best_are_the_twins(V, k, dtype):
    x = torch.randn(2, 3, V, device=DEVICE).to(dtype)
    x[0, 0] = x[0, 0].round()  # many equals
    x[0, 1] = -torch.inf
    x[0, 1, V // 2] = 1.0
    x[1, 0, [0, V - 1]] = torch.nan
    x[1, 1] = torch.where(x[1, 1] > 0, 0.0, -0.0)
    found = top_rows(x, k)
    assert torch.equal(found, top_rows_eager(x, k))
    assert all(len(set(row.tolist())) == k for row in found.flatten(0, 1))
    assert torch.equal(top_rows(x[:, ::2], k), found[:, ::2])


def test_the_first_is_argmax_and_the_rest_follow_by_value():
    x = torch.randn(50, 400).round(decimals=1)
    found = top_rows_eager(x, 5)
    assert torch.equal(found[:, 0], x.argmax(-1))
    assert torch.equal(x.gather(1, found), x.topk(5).values)
    for row, places in zip(x.tolist(), found.tolist(), strict=True):
        assert places == sorted(range(400), key=lambda place: (-row[place], place))[:5]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H_kv", "D", "D_v"), [(2, 16, 16), (8, 128, 128), (1, 80, 64), (3, 24, 40)])
@pytest.mark.parametrize("paths", [[[0, 1, 3, 6], [0, 2, 5, 5], [0, 0, 0, 0]], [[0, 4], [0, 1], [0, 2]]])
def test_paths_are_kept_as_by_the_twin(dtype, H_kv, D, D_v, paths):
    B, L = 3, 40
    keys = torch.randn(B, L, H_kv, D, device=DEVICE).to(dtype)
    values = torch.randn(B, L, H_kv, D_v, device=DEVICE).to(dtype)
    start, path = torch.tensor([0, 7, 33], device=DEVICE), torch.tensor(paths, device=DEVICE)
    ours, twin = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    keep_rows(*ours, start, path)
    keep_rows_eager(*twin, start, path)
    assert torch.equal(ours[0], twin[0])
    assert torch.equal(ours[1], twin[1])
    for b, (first, row) in enumerate(zip(start.tolist(), paths, strict=True)):
        assert torch.equal(ours[0][b, first : first + len(row)], keys[b, [first + node for node in row]])
