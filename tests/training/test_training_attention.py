"""Attention of a TTT step: the merged form against every score in memory."""

import numpy as np
import pytest
import torch
from helpers.spans import HKV, HQ, MASKS, D, inputs, run

from hf_eagle3.training.step.attention import (
    FLASH,
    MATH,
    SQUARES,
    attend,
    attend_eagerly,
    attend_in_squares,
    pick_block,
)
from hf_eagle3.training.step.batch import Collator, SquareRule

pytestmark = pytest.mark.any_release


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


def dense_scores(query, key, scale):
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("shqd,shkd->shqk", query, key.repeat_interleave(groups, 1)) * scale
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)


def dense_forward(query, key, value, scale):
    """What cuDNN computes, eagerly."""
    scores = dense_scores(query, key, scale)
    out = scores.softmax(-1) @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return out, scores.logsumexp(-1, keepdim=True)


def dense_backward(grad, query, key, value, out, lse, scale):
    weights, groups = (dense_scores(query, key, scale) - lse).exp(), query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    dscores = weights * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) * scale
    narrow = [x.unflatten(1, (-1, groups)).sum(2) for x in (dscores.mT @ query, weights.mT @ grad)]
    return dscores @ key, *narrow


@pytest.mark.parametrize("masks", [MASKS, [[0, 1, 1, 1, 1, 1, 1, 1]], [[0] * 3 + [1] * 6, [0, 1, 1, 1, 1]]])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_squares_are_one_softmax(steps, masks):
    """Spans that begin late or end early, places that nobody asks for, squares that are full."""
    tensors = inputs(steps, masks=masks, squares=SquareRule(step=4, min_side=4, max_cost=99))
    kernel = attend_in_squares(dense_forward, dense_backward)
    ours, our_grads = run(attend, *tensors, None, kernel=kernel)
    theirs, their_grads = run(attend_eagerly, *tensors, None)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("masks", "shape"),
    [
        ([[0] + [1] * 4000], (1, 4096)),
        ([[0] + [1] * 4200], (1, 4352)),
        ([[0] + [1] * 2000], None),
        ([[0] * 1200 + [1] * 2800], (1, 4096)),  # the last 70 % ask for 91 % of the scores
        ([[0] * 2800 + [1] * 1200], None),
        ([[0] + [1] * 4000, [0] * 400 + [1] * 3400], (2, 4096)),
        ([[0] + [1] * 4000, [0, 1, 1]], None),
        ([[0] * 9], None),
    ],
)
def test_squares_are_for_spans_that_fill_them(masks, shape):
    rows = [{"input_ids": np.zeros(len(m), int), "loss_mask": np.array(m)} for m in masks]
    squares = Collator(1)(rows).spans.squares
    assert (squares and squares.shape) == shape


def test_the_cpu_and_wide_dtypes_take_the_math_kernel():
    spans = inputs(1)[-1]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 1, 8, dtype=dtype)
        assert pick_block(x, x, spans, None) is MATH


RAGGED = [
    [0] * int(a) + [1] * int(b) + [0] * int(c) + [1] * int(d)
    for a, b, c, d in np.random.default_rng(0).integers(1, 400, (6, 4))
]
FULL = [[0] + [1] * 1000, [0] * 100 + [1] * 850, [0] * 5 + [1] * 1018]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("steps", [0, 1, 6])
@pytest.mark.parametrize("masks", [RAGGED, FULL], ids=["ragged", "full"])
def test_kernels_are_as_near_as_half_precision_allows(masks, steps, window):
    """Error against float64 at most twice that of the eager form in bfloat16."""
    tensors = inputs(steps, torch.bfloat16, "cuda", 64, masks, squares=SquareRule(min_side=512))
    query, slots, own, spans = tensors
    is_hopper = torch.cuda.get_device_capability() >= (9, 0)
    assert (spans.squares is not None) == (masks is FULL)
    fills = masks is FULL and window is None and is_hopper
    assert pick_block(query, slots[0], spans, window) is (SQUARES if fills else FLASH)
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
