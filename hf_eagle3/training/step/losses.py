"""Losses of draft steps, unreduced, each with its gradient in closed form.

Letters: `p` the target's probabilities, `q` the drafter's, both of one step of one slot; `alpha` = sum of min(p, q) over
the draft vocabulary = the chance that speculative sampling accepts (arXiv:2302.01318). `p` has the partition function
of the target's whole vocabulary in losses of acceptance, and is renormed over the draft vocabulary in divergences. A new loss is a function and a row of `LOSSES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-30  # smallest probability whose logarithm is taken
NEVER = -1e30  # log-probability of a token that the target rules out: its exponential is 0, and so is 0 times it


class TargetStep(NamedTuple):
    """The target's distribution at steps 0 .. k-1 of C slots."""

    log_p: Tensor  # [k, C, V_d] float32, of the draft vocabulary, normed over the whole one
    best: Tensor  # [k, C] int64, draft id of the target's argmax; -1 where the drafter cannot propose it
    live: Tensor  # [k, C] bool, whether slot and step train
    mean_alpha: Tensor  # [k] float32, mean alpha by step as of the last update; 0 before the first


# Draft logits [k, C, V_d] float32 and the target's -> losses [k, C] and their gradients [k, C, V_d]. Where `live` is
# false both are ignored, and may be anything. A token that the target rules out, log p = -inf, counts by its q alone.
LossFunction = Callable[[Tensor, TargetStep], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loss:
    """A row of `LOSSES`."""

    function: LossFunction
    has_kernel: bool = False  # `kernels/head_loss.py` computes it on a GPU, with all other sums
    weighs_steps: bool = False  # the loss weighs its steps by itself, in the place of `ttt_decay`


def forward_kl(logits: Tensor, target: TargetStep) -> tuple[Tensor, Tensor]:
    """KL(p || q), p renormed, where the target's argmax can be proposed; 0 elsewhere (arXiv:2503.01840).

    Elsewhere no greedy draft can be accepted, and the renormed target is mostly noise. Gradient: q - p.
    """
    log_p = target.log_p.clamp_min(NEVER).log_softmax(-1)  # 0 log 0 = 0, and nothing is renormed to no number
    log_q = logits.log_softmax(-1)
    p, counts = log_p.exp(), (target.best >= 0)[..., None]
    loss = (p * (log_p - log_q)).sum(-1, keepdim=True)
    return (loss * counts)[..., 0], (log_q.exp() - p) * counts


def cross_entropy(logits: Tensor, target: TargetStep) -> tuple[Tensor, Tensor]:
    """-log q of the target's argmax, where it can be proposed; 0 elsewhere. Gradient: q - onehot."""
    counts, best = (target.best >= 0)[..., None], target.best.clamp_min(0)[..., None]
    log_q = logits.log_softmax(-1)
    loss = -log_q.gather(-1, best)
    grad = log_q.exp().scatter_add(-1, best, -torch.ones_like(loss))
    return (loss * counts)[..., 0], grad * counts


def total_variation(logits: Tensor, target: TargetStep) -> tuple[Tensor, Tensor]:
    """1 - alpha. Its gradient fades where q is far from p: for going on from a drafter that is trained already."""
    alpha, grad = _alpha(logits, target)
    return 1 - alpha, -grad


def cross_entropy_and_variation(logits: Tensor, target: TargetStep) -> tuple[Tensor, Tensor]:
    """0.1 cross entropy + 0.9 |p - q|_1, as DSpark weighs them (arXiv:2607.05147); the second is twice 1 - alpha."""
    entropy, entropy_grad = cross_entropy(logits, target)
    variation, variation_grad = total_variation(logits, target)
    return 0.1 * entropy + 1.8 * variation, 0.1 * entropy_grad + 1.8 * variation_grad


def negative_log_acceptance(logits: Tensor, target: TargetStep) -> tuple[Tensor, Tensor]:
    """-log alpha, LK-alpha (arXiv:2602.23881): a gradient that does not fade where alpha is small."""
    alpha, grad = _alpha(logits, target)
    alpha = alpha.clamp_min(TINY)
    return -alpha.log(), -grad / alpha[..., None]


def hybrid_acceptance(logits: Tensor, target: TargetStep) -> tuple[Tensor, Tensor]:
    """Sum of w KL(p || q) and (1 - w)(1 - alpha), w = exp(-3 mean alpha of the step), LK-lambda (arXiv:2602.23881).

    Divergence first, acceptance once there is some. The mean is of the last update, so that it is the same for all
    micro-batches and processes.
    """
    weight = (-3 * target.mean_alpha).exp()[:, None]  # [k, 1]
    kl, kl_grad = forward_kl(logits, target)
    tv, tv_grad = total_variation(logits, target)
    return weight * kl + (1 - weight) * tv, weight[..., None] * kl_grad + (1 - weight[..., None]) * tv_grad


def expected_acceptance(logits: Tensor, target: TargetStep) -> tuple[Tensor, Tensor]:
    """-log E at step 0 of a slot, E = sum over j of alpha_0 .. alpha_j: the draft tokens that a round accepts.

    dE/dalpha_t = C_t R_t with C_t the product of the alphas before t, and R_t = 1 + the sum over j > t of the products
    of alpha_{t+1} .. alpha_j: steps weigh by how likely they are reached and what follows from them. Of one step it is
    `negative_log_acceptance`. Along the data, alphas of later steps are those of the target's own text.
    """
    alpha, grad = _alpha(logits, target)
    alpha = alpha.where(target.live, 0)  # no step beyond the turn, whatever was computed there
    reached = torch.ones_like(alpha[0])
    before = []  # C_t
    for a in alpha:
        before.append(reached)
        reached = reached * a
    after, rest = [], torch.zeros_like(alpha[0])  # R_t, from the last step on
    for a in reversed(alpha.unbind()):
        after.append(1 + rest)
        rest = a * (1 + rest)
    expected = rest.clamp_min(TINY)  # [C]
    weights = torch.stack(before) * torch.stack(after[::-1]) / expected  # [k, C]
    loss = torch.zeros_like(alpha)
    loss[0] = -expected.log()
    return loss, -weights[..., None] * grad


def weighted_by_confidence(logits: Tensor, target: TargetStep) -> tuple[Tensor, Tensor]:
    """D-PACE (arXiv:2605.18810): `cross_entropy`, weighed by how far drafts are expected to go.

    With c = 0.5 + 0.5 q of the target's argmax, step t weighs the sum over live j >= t of the products c_0 .. c_j, as in
    vllm-project/speculators:src/speculators/losses/utils.py with its dpace_alpha at 0.5. Weights have no gradient.
    """
    loss, grad = cross_entropy(logits, target)
    confidence = (-loss).exp().where(target.best >= 0, 0)
    reached = (0.5 + 0.5 * confidence).where(target.live, 0).cumprod(0)  # [k, C]; live steps come first
    weights = reached.flip(0).cumsum(0).flip(0)
    return loss * weights, grad * weights[..., None]


def _alpha(logits: Tensor, target: TargetStep) -> tuple[Tensor, Tensor]:
    """Alpha [k, C], and its gradient with respect to the logits: q (1[q < p] - sum of q where q < p)."""
    q, p = logits.softmax(-1), target.log_p.exp()
    below = q * (q < p)  # [k, C, V_d]
    return torch.minimum(p, q).sum(-1), below - q * below.sum(-1, keepdim=True)


LOSSES: Mapping[str, Loss] = {
    "forward_kl": Loss(forward_kl, has_kernel=True),
    "cross_entropy": Loss(cross_entropy),
    "total_variation": Loss(total_variation),
    "ce_tv": Loss(cross_entropy_and_variation),
    "lk_alpha": Loss(negative_log_acceptance),
    "lk_hybrid": Loss(hybrid_acceptance),
    "expected_acceptance": Loss(expected_acceptance, weighs_steps=True),
    "dpace": Loss(weighted_by_confidence, weighs_steps=True),
}
