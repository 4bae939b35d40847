"""Losses of one draft step, unreduced."""

from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(draft_logits: Tensor, target_probs: Tensor) -> Tensor:
    """Cross-entropy of the draft distribution against the target's, both over the draft vocabulary (arXiv:2503.01840).

    Its gradient is that of the forward KL divergence: the two differ by the target's entropy.

    Args:
        draft_logits: [M, V_d].
        target_probs: [M, V_d] float32, the target's softmax *after* restriction to the draft vocabulary.

    Returns:
        [M] float32, in nats.
    """
    return F.cross_entropy(draft_logits.float(), target_probs, reduction="none")
