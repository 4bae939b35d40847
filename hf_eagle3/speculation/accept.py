"""Accept rules: which draft tokens are kept, and the one token the target adds (arXiv:2211.17192, algorithm 1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .sampling import draw, likeliest


class Verdict(NamedTuple):
    """What a round gave."""

    num_accepted: Tensor  # [B] int64 in 0..K, draft tokens kept
    next_token: Tensor  # [B] int64, correction token if num_accepted < K, else bonus token


def accept_greedy(draft_tokens: Tensor, target_logits: Tensor) -> Verdict:
    """Keep the longest prefix of `draft_tokens` [B, K] that greedy decoding of `target_logits` [B, K+1, V] repeats."""
    target_tokens = likeliest(target_logits)  # [B, K+1]
    matches = draft_tokens == target_tokens[:, :-1]  # [B, K]
    num_accepted = matches.long().cumprod(-1).sum(-1)  # [B]
    return Verdict(num_accepted, target_tokens.gather(-1, num_accepted[:, None]).squeeze(-1))


def accept_sampled(draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Verdict:
    """Speculative sampling: what is emitted is distributed as the target's own output.

    Args:
        draft_tokens: [B, K], drawn from `draft_probs`.
        draft_probs: [B, K, V], the paper's q.
        target_probs: [B, K+1, V], the paper's p.
    """
    index = draft_tokens[..., None]  # [B, K, 1]
    p = target_probs[:, :-1].gather(-1, index).squeeze(-1)  # [B, K]
    q = draft_probs.gather(-1, index).squeeze(-1)  # [B, K]
    accepted = torch.rand_like(q) * q < p  # [B, K]; strictly, so that p = 0 is never accepted
    num_accepted = accepted.long().cumprod(-1).sum(-1)  # [B]

    # The residual max(p - q, 0) after a refusal; past the last draft token there is no q to take off, and plain p is left.
    residual = p_next = pick(target_probs, num_accepted)  # [B, V]
    if K := draft_probs.shape[1]:
        q_next = pick(draft_probs, num_accepted.clamp(max=K - 1))  # [B, V]
        is_refused = (num_accepted < K).to(q_next.dtype)[:, None]  # [B, 1]
        residual = torch.addcmul(p_next, q_next, is_refused, value=-1).clamp_min_(0)  # [B, V]
    # Where p and q agree to the last bit, rounding can still refuse a token and leave nothing to draw from.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    return Verdict(num_accepted, draw(residual))


def accept_next(proposed: Tensor, q: Tensor | None, scores: Tensor, *, do_sample: bool) -> Verdict:
    """Decide about a single position: keep what is proposed there, or choose a token.

    Args:
        proposed: [B, 1] the draft token of each row, or [B, 0] past the last one.
        q: [B, 1, V] what it was drawn from, or [B, 0, V]; None where it was not drawn.
        scores: [B, V], the target's.
        do_sample: Whether tokens are drawn.
    """
    shape = (len(scores), 1 + proposed.shape[1], -1)  # a second position is not looked at
    if not do_sample:
        return accept_greedy(proposed, scores[:, None].expand(shape))
    p = scores.softmax(dim=-1)[:, None]  # [B, 1, V]
    return accept_sampled(proposed, p[:, :0] if q is None else q, p.expand(shape))


def pick(probs: Tensor, at: Tensor) -> Tensor:
    """[B, V]: of each row of `probs` [B, T, V], what stands `at` [B] there. Faster on a GPU than two indices."""
    B, T, _ = probs.shape
    return probs.flatten(0, 1).index_select(0, torch.arange(0, B * T, T, device=at.device) + at)


def accept_simulated(draft_tokens: Tensor, target_logits: Tensor, length: float) -> Verdict:
    """Keep as many draft tokens as gives an acceptance length of `length` on average, whatever they are. Not lossless.

    For measuring speed with weights that were never trained. The schedule of least variance, drawn for each row: the
    whole part always, one more with the fraction as its probability.

    Args:
        draft_tokens: [B, K].
        target_logits: [B, K+1, V].
        length: 1 to K+1, the target's own token included.
    """
    B, K = draft_tokens.shape
    whole, fraction = divmod(length - 1, 1)
    one_more = torch.rand(B, device=draft_tokens.device) < fraction
    num_accepted = (int(whole) + one_more.long()).clamp(max=K)  # [B]
    target_tokens = likeliest(target_logits)  # [B, K+1]
    return Verdict(num_accepted, target_tokens.gather(-1, num_accepted[:, None]).squeeze(-1))
