"""Whether samples have the distribution they should have."""

import torch
from scipy.stats import chisquare
from torch import Tensor

TINY_V = 8
ALPHA = 1e-3  # seeds are fixed: a right law fails never, or always


def assert_distributed_as(samples: Tensor, expected: Tensor, *, alpha: float = ALPHA) -> float:
    """Chi-square of `samples` [N, L] of tokens against `expected`, [V] * L probabilities; returns its p-value."""
    V = expected.shape[0]
    index = sum(samples[:, i] * V ** (samples.shape[1] - 1 - i) for i in range(samples.shape[1]))
    observed = torch.bincount(index, minlength=expected.numel()).double()
    wanted = expected.double().flatten() * len(samples)
    assert not observed[wanted == 0].any(), "tokens of probability zero were sampled"
    common = wanted >= 5  # rarer cells are pooled
    pooled = [(observed[common], wanted[common])]
    if wanted[~common].sum() >= 5:
        pooled.append((observed[~common].sum()[None], wanted[~common].sum()[None]))
    observed, wanted = (torch.cat(parts).numpy() for parts in zip(*pooled, strict=True))
    p_value = chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue if len(wanted) > 1 else 1.0
    assert p_value > alpha, f"p-value {p_value:.2e}"
    return p_value
