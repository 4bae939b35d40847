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
    """In layers alike at once, in another by itself, and where heads lie apart."""
    B, L = 3, 40
    sizes = [(H_kv, D, D_v)] * 3 + [(2 * H_kv, D, D_v), (H_kv, D, D_v)]
    held = [tuple(torch.randn(B, L, H, d, device=DEVICE).to(dtype) for d in (D, D_v)) for H, D, D_v in sizes]
    held[-1] = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in held[-1])
    start, path = torch.tensor([0, 7, 33], device=DEVICE), torch.tensor(paths, device=DEVICE)
    ours, found = [tuple(x.clone() for x in pair) for pair in held], {}
    for _ in range(2):  # the second finds where they lie
        for mine, pair in zip(ours, held, strict=True):
            for x, y in zip(mine, pair, strict=True):
                x.copy_(y)
        keep_rows(ours, start, path, found)
        for mine, pair in zip(ours, held, strict=True):
            twin = tuple(x.clone() for x in pair)
            keep_rows_eager(*twin, start, path)
            assert all(torch.equal(x, y) for x, y in zip(mine, twin, strict=True))
    assert 2 <= len(found) <= 3  # one head lies apart in no other way
    keys = held[0][0]
    for b, (first, row) in enumerate(zip(start.tolist(), paths, strict=True)):
        assert torch.equal(ours[0][0][b, first : first + len(row)], keys[b, [first + node for node in row]])
