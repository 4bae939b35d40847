"""Attention of a TTT step: the merged form against every score in memory."""

import numpy as np
import pytest
import torch

from hf_eagle3.training.attention import FLASH, MATH, attend, attend_eagerly, pick_block
from hf_eagle3.training.batch import Collator

HQ, HKV, D = 4, 2, 8
MASKS = [[0] * 3 + [1] * 6, [0] * 2 + [1] * 5 + [0] * 3 + [1] * 7, [0, 0, 1, 1, 1]]


def inputs(steps, dtype=torch.float64, device="cpu", head_dim=D, masks=MASKS):
    """Spans with gaps and shared prefixes, and random tensors that want gradients."""
    rows = [{"input_ids": np.zeros(len(m), int), "loss_mask": np.array(m)} for m in masks]
    batch = Collator(steps + 1)(rows)
    spans, R, N = batch["spans"].to(device), len(batch["rows"]), len(batch["input_ids"])
    generator = torch.Generator().manual_seed(steps)

    def random(n, heads):
        x = torch.randn(n, heads, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        return x.requires_grad_()

    query, slots = random(R, HQ), (random(N, HKV), random(N, HKV))
    own = [(random(R, HKV), random(R, HKV)) for _ in range(steps)]
    return query, slots, own, spans


def run(function, query, slots, own, spans, window):
    block = tuple(x if spans.keys is None else x[spans.keys] for x in slots)
    out = function(query, block, own, spans, D**-0.5, window)
    leaves = [query, *slots, *(x for pair in own for x in pair)]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    return out.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_merged_is_one_softmax(steps, window):
    tensors = inputs(steps)
    ours, our_grads = run(attend, *tensors, window)
    theirs, their_grads = run(attend_eagerly, *tensors, window)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_gradients_are_numerically_right():
    query, slots, own, spans = inputs(2, masks=[[0, 1, 1, 1, 1]])
    block = tuple(x if spans.keys is None else x[spans.keys].detach().requires_grad_() for x in slots)
    flat = [query, *block, *(x for pair in own for x in pair)]

    def function(q, k, v, *branches):
        return attend(q, (k, v), list(zip(branches[::2], branches[1::2], strict=True)), spans, D**-0.5)

    assert torch.autograd.gradcheck(function, flat)


def test_a_log_sum_exp_without_its_gradient_would_be_noticed():
    """Negative control: merging by autograd around a detached log-sum-exp gives right outputs and wrong gradients."""
    query, slots, own, spans = inputs(2)

    def detached(query, block, own, spans, scale, window=None):
        _, lse = MATH.forward(query.detach(), *(x.detach() for x in block), spans, scale, window)
        with_grad = attend_eagerly(query, block, [], spans, scale, window)
        scores = torch.stack(
            [(query * k.repeat_interleave(HQ // HKV, 1)).sum(-1) * scale for k, _ in own], dim=-1
        )  # [R, Hq, t]
        total = torch.logsumexp(torch.cat([lse.T[..., None], scores], -1), -1)
        merged = with_grad * (lse.T - total).exp()[..., None]
        for s, (_, v) in enumerate(own):
            merged = merged + (scores[..., s] - total).exp()[..., None] * v.repeat_interleave(HQ // HKV, 1)
        return merged

    ours, our_grads = run(detached, query, slots, own, spans, None)
    theirs, their_grads = run(attend_eagerly, query, slots, own, spans, None)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    wrong = (our_grads[0] - their_grads[0]).norm() / their_grads[0].norm()
    assert wrong > 0.05


def test_the_cpu_and_wide_dtypes_take_the_math_kernel():
    assert pick_block(torch.zeros(1, 1, 8)) is MATH
    assert pick_block(torch.zeros(1, 1, 8, dtype=torch.bfloat16)) is MATH


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_flash_is_as_near_as_half_precision_allows(steps, window):
    """Error against float64 at most twice that of the eager form in bfloat16."""
    rng = np.random.default_rng(0)
    masks = [[0] * int(a) + [1] * int(b) + [0] * int(c) + [1] * int(d) for a, b, c, d in rng.integers(1, 400, (6, 4))]
    tensors = inputs(steps, torch.bfloat16, "cuda", 64, masks)
    assert pick_block(tensors[0]) is FLASH
    query, slots, own, spans = tensors
    exact = (
        query.detach().double().requires_grad_(),
        tuple(x.detach().double().requires_grad_() for x in slots),
        [tuple(x.detach().double().requires_grad_() for x in pair) for pair in own],
        spans,
    )
    truth, true_grads = run(attend_eagerly, *exact, window)
    ours, our_grads = run(attend, *tensors, window)
    eager, eager_grads = run(attend_eagerly, *tensors, window)
    for a, b, c in zip([ours, *our_grads], [eager, *eager_grads], [truth, *true_grads], strict=True):
        error, allowed = (a.double() - c).norm() / c.norm(), (b.double() - c).norm() / c.norm()
        assert error <= 2 * allowed + 1e-3
