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


def without_overflow(logits: Tensor) -> Tensor:
    """A drafter's `logits`, float32 and finite: in half precision it can overflow."""
    return logits.float().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)


def to_probs(logits: Tensor, warp: Callable[[Tensor], Tensor]) -> Tensor:
    """The probabilities [B, n, V_d] that `warp` leaves of logits [B, n, V_d]."""
    # Any finite distribution is lossless, NaN is none.
    return warp(without_overflow(logits)).softmax(dim=-1)


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


def pick(probs: Tensor, at: Tensor) -> Tensor:
    """[B, V]: of each row of `probs` [B, T, V], what stands `at` [B] there. Faster on a GPU than two indices."""
    B, T, _ = probs.shape
    return probs.flatten(0, 1).index_select(0, torch.arange(0, B * T, T, device=at.device) + at)
