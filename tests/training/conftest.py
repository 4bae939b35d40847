"""Fixtures of several files of this folder."""

import pytest
import torch
from helpers.byte_models import tokenizer  # noqa: F401  a fixture
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@pytest.fixture
def exact_norms(monkeypatch):
    """The host computes RMSNorm in float32, whatever comes in; here in what comes in, so that float64 means it."""

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
