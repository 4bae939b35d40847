"""Shared noise on scores, in one pass."""

import pytest
import torch
from helpers.kernels import DEVICE

from hf_eagle3.kernels.noise import BLOCK, add_noise_rows
from hf_eagle3.speculation.shared_noise import add_noise, make_keys

# Two logarithms, of which either side may round each by a unit in the last place; the noise reaches 22.
ROUNDING = {"rtol": 0, "atol": 8e-6}


def make_positions(B, m):
    return torch.arange(B, device=DEVICE), torch.arange(m, device=DEVICE).expand(B, m) + 2**31


@pytest.mark.gpu
@pytest.mark.parametrize("V", [7, BLOCK, BLOCK + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_noise_equals_its_twin(V, dtype):
    scores = torch.randn(3, 4, V, device=DEVICE).to(dtype)
    scores[1, :, 2] = -torch.inf
    keys = make_keys(*make_positions(3, 4))
    torch.testing.assert_close(add_noise_rows(scores, keys), add_noise(scores, keys), **ROUNDING)
    apart = scores.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(add_noise_rows(apart, keys), add_noise_rows(scores, keys))


@pytest.mark.gpu
def test_noise_alone_chooses_the_twins_tokens():
    keys, V = make_keys(*make_positions(5, 3)), 4096
    zeros = torch.zeros(5, 3, V, device=DEVICE)
    ours, twin = add_noise_rows(zeros, keys), add_noise(zeros, keys)
    torch.testing.assert_close(ours, twin, **ROUNDING)
    assert torch.equal(ours.argmax(-1), twin.argmax(-1))
    assert torch.equal(ours.topk(4).indices, twin.topk(4).indices)


@pytest.mark.gpu
def test_keys_and_tokens_are_the_twins_too():
    scores = torch.randn(3, 5, 40, device=DEVICE)
    keys = make_keys(*make_positions(3, 4))
    places = torch.tensor([0, 1, 1, 3, 2], device=DEVICE)
    ids = torch.randperm(90, device=DEVICE)[:40].sort().values
    for given in [(keys, places, None), (keys, places, ids), (keys[:, 1:2], None, ids), (keys[:, 1:2], None, None)]:
        torch.testing.assert_close(add_noise_rows(scores, *given), add_noise(scores, *given), **ROUNDING)
