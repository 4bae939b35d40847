"""Logits over the temperature of each row."""

import pytest
import torch
from helpers.kernels import DEVICE

from hf_eagle3.kernels.temperature import BLOCK, divide_rows
from hf_eagle3.speculation.warpers import divide


def test_twin_is_a_division_of_each_row():
    logits, temperature = torch.randn(3, 4, 50), torch.tensor([0.3, 1.0, 1.7])
    out = divide(logits, temperature)
    for b in range(3):
        assert torch.equal(out[b], logits[b] / float(temperature[b]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [7, BLOCK, BLOCK + 3])
def test_division_equals_its_twin_to_the_bit(V, dtype):
    logits = torch.randn(5, 4, V, device=DEVICE).to(dtype)
    temperature = torch.tensor([0.3, 1.0, 1.7, 0.01, 3.0], device=DEVICE)
    expected = logits.float() * temperature.reciprocal()[:, None, None]
    assert torch.equal(divide_rows(logits, temperature), expected)
    apart = torch.randn(4, 5, V, device=DEVICE).to(dtype).transpose(0, 1)
    assert torch.equal(divide_rows(apart, temperature), apart.float() * temperature.reciprocal()[:, None, None])
