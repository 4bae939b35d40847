"""Losses of one draft step, unreduced."""

import torch
from torch import Tensor


def soft_cross_entropy(draft_logits: Tensor, target_probs: Tensor) -> Tensor:
    """Cross-entropy of the draft distribution against the target's, both over the draft vocabulary (arXiv:2503.01840).

    Its gradient, draft minus target probabilities, is that of the forward KL divergence: the two differ by the
    target's entropy.

    Args:
        draft_logits: [M, V_d].
        target_probs: [M, V_d] float32, each row summing to one: the target's softmax *after* restriction to the draft
            vocabulary.

    Returns:
        [M] float32, in nats.
    """
    return _SoftCrossEntropy.apply(draft_logits, target_probs)


class _SoftCrossEntropy(torch.autograd.Function):
    """Autograd of the definition keeps four [M, V_d] tensors a step; the closed form needs two."""

    @staticmethod
    def forward(ctx, draft_logits: Tensor, target_probs: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        log_q = draft_logits.log_softmax(-1, dtype=target_probs.dtype)
        ctx.save_for_backward(log_q, target_probs)
        ctx.dtype = draft_logits.dtype
        with torch.autocast(draft_logits.device.type, enabled=False):  # which would round it to half precision
            return -torch.linalg.vecdot(target_probs, log_q)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        log_q, target_probs = ctx.saved_tensors
        return log_q.exp().sub_(target_probs).mul_(grad[:, None]).to(ctx.dtype), None
