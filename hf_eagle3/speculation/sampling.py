"""Logits to probabilities, and draws from them.

`q` is the drafter's distribution as in arXiv:2211.17192: whatever a draft token was drawn from. Any `q` is lossless as
long as verification is told exactly that one.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# They look at the scores alone, so they may be given scores over any vocabulary and at any position.
STATELESS_WARPERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)


def stateless_warpers(processors: Iterable[LogitsProcessor]) -> list[LogitsProcessor]:
    """The warpers among `processors` that may be applied to a drafter's logits, in their order.

    Exact types only: a subclass may look at the tokens, or count its calls.
    """
    return [p for p in processors if type(p) in STATELESS_WARPERS]


def to_probs(logits: Tensor, warp: Callable[[Tensor], Tensor]) -> Tensor:
    """The probabilities [B, n, V_d] that `warp` leaves of logits [B, n, V_d]."""
    # A drafter in half precision can overflow. Any finite distribution is lossless, NaN is none.
    return warp(logits.float().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)).softmax(dim=-1)


def likeliest(logits: Tensor) -> Tensor:
    """[...] int64, where the largest of `logits` [..., V] is.

    On a CPU, PyTorch finds the largest of 32-bit numbers three times as fast, so 16-bit logits are widened first.
    """
    return (logits.float() if logits.is_cpu and logits.itemsize == 2 else logits).argmax(-1)


def draw(weights: Tensor) -> Tensor:
    """Draw one index per row of unnormalised `weights` [B, V], without waiting for the host."""
    noise = torch.empty_like(weights).exponential_()
    # A zero over a zero would be NaN, which argmax takes for the largest.
    return (weights / noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(-1)  # [B]
