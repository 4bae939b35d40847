"""Block verification (arXiv:2403.10444, algorithm 2): which part of a sampled chain is kept, decided over all of it.

Token by token (arXiv:2211.17192, algorithm 1) the first refusal ends the draft. Here every prefix has a chance of its own,
and the longest that is kept counts. Given the first i draft tokens, at least i are kept with the probability
`weigh_prefixes` says, which is never less than the product of min(1, p/q) that keeps them token by token.

The paper's M_b is p, its M_s is q, its p_i is the weight of prefix i, and its h_i is `remainder / (remainder + 1 - weight)`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .noise import ACCEPT, RESIDUAL, GlobalNoise, Noise
from .sampling import pick
from .verdict import Verdict


def weigh_prefixes(draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """[B, K+1]: given the first i draft tokens, how likely at least i are kept. Arguments as of `accept_block`."""
    index = draft_tokens[..., None]  # [B, K, 1]
    q = draft_probs.gather(-1, index).squeeze(-1)  # [B, K]
    p = target_probs[:, :-1].gather(-1, index).squeeze(-1)  # [B, K]
    # A quotient that is no number would spoil all that follow: p is at most 1, so this is finite.
    ratios = p / q.clamp_min(torch.finfo(q.dtype).tiny)  # [B, K]
    weights = [target_probs.new_ones(len(draft_tokens))]  # [B] each
    for k in range(draft_tokens.shape[1]):
        weights.append((weights[-1] * ratios[:, k]).clamp_max(1))
    return torch.stack(weights, dim=1)


def weigh_remainders(weights: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """[B, K]: what the residual behind each prefix of one token or more sums to. `weights` are those of the prefixes."""
    K = draft_probs.shape[1]
    # The distribution behind the whole draft is p, with nothing taken off.
    whole = weights[:, K:]
    if K < 2:
        return whole[:, :K]
    excess = torch.addcmul(draft_probs[:, 1:], target_probs[:, 1:K], weights[:, 1:K, None], value=-1)  # [B, K-1, V]
    return torch.cat([-excess.clamp_max_(0).sum(-1), whole], dim=1)


def accept_block(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, noise: Noise | None = None
) -> Verdict:
    """Keep a prefix of a sampled chain: what is emitted is distributed as the target's own output.

    Args:
        draft_tokens: [B, K], drawn from `draft_probs`.
        draft_probs: [B, K, V], the paper's M_s.
        target_probs: [B, K+1, V], the paper's M_b.
        noise: Where chance comes from; PyTorch's generator if it is not said.
    """
    noise = noise or GlobalNoise()
    K = draft_tokens.shape[1]
    weights = weigh_prefixes(draft_tokens, draft_probs, target_probs)  # [B, K+1]
    remainders = weigh_remainders(weights, draft_probs, target_probs)  # [B, K]
    chance = noise.uniform(remainders, ACCEPT)  # [B, K]
    is_kept = chance * (remainders + (1 - weights[:, 1:])) < remainders  # strictly: a weight of 0 is never kept
    lengths = torch.arange(1, K + 1, device=is_kept.device)
    num_accepted = functional.pad(torch.where(is_kept, lengths, 0), (1, 0)).amax(-1)  # [B]

    residual = p_next = pick(target_probs, num_accepted)  # [B, V]
    if K:
        q_next = pick(draft_probs, num_accepted.clamp(max=K - 1))  # [B, V]
        is_refused = (num_accepted < K).to(q_next.dtype)[:, None]  # [B, 1]; behind the whole draft there is no q
        weight = weights.gather(1, num_accepted[:, None])  # [B, 1]
        residual = torch.addcmul(weight * p_next, q_next, is_refused, value=-1).clamp_min_(0)  # [B, V]
    # Where p and q agree to the last bit, rounding can still refuse a token and leave nothing to draw from.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    return Verdict(num_accepted, noise.draw(residual[:, None], RESIDUAL)[:, 0])
