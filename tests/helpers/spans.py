"""Inputs for the attention of TTT steps, and its gradients."""

import numpy as np
import torch

from hf_eagle3.training.step.batch import Collator

HQ, HKV, D = 4, 2, 8
MASKS = [[0] * 3 + [1] * 6, [0] * 2 + [1] * 5 + [0] * 3 + [1] * 7, [0, 0, 1, 1, 1]]


def inputs(steps, dtype=torch.float64, device="cpu", head_dim=D, masks=MASKS, **options):
    """Spans with gaps and shared prefixes, and random tensors that want gradients."""
    rows = [{"input_ids": np.zeros(len(m), int), "loss_mask": np.array(m)} for m in masks]
    batch = Collator(steps + 1, **options)(rows)
    spans, R, N = batch.spans.to(device), len(batch.rows), len(batch.input_ids)
    generator = torch.Generator().manual_seed(steps)

    def random(n, heads):
        x = torch.randn(n, heads, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        return x.requires_grad_()

    query, slots = random(R, HQ), (random(N, HKV), random(N, HKV))
    own = [(random(R, HKV), random(R, HKV)) for _ in range(steps)]
    return query, slots, own, spans


def run(function, query, slots, own, spans, window, **options):
    block = tuple(x if spans.keys is None else x[spans.keys] for x in slots)
    out = function(query, block, own, spans, D**-0.5, window, **options)
    leaves = [query, *slots, *(x for pair in own for x in pair)]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    return out.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
