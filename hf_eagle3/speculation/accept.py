"""Accept rules: which draft tokens are kept, and the one token the target adds (arXiv:2211.17192, algorithm 1)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import ACCEPT, RESIDUAL, GlobalNoise, Noise
from .sampling import likeliest
from .shape import DraftShape


class Verdict(NamedTuple):
    """What a round gave: a path from the root, and a token behind it."""

    num_accepted: Tensor  # [B] int64 in 0..D, draft tokens kept
    next_token: Tensor  # [B] int64, correction token if a draft token was refused, else bonus token
    path: Tensor | None = None  # [B, D+1] int64, nodes from the root on, the first num_accepted+1 count; None: 0..D


class Proposal(NamedTuple):
    """What a round proposes, on the target's device."""

    tokens: Tensor  # [B, N] int64
    q: Tensor | None  # [B, N, V] float32, what they were drawn from; None for a greedy draft


class Judging(NamedTuple):
    """What else an accept rule may need."""

    shape: DraftShape
    noise: Noise
    simulated_length: float | None = None


def accept_greedy(draft_tokens: Tensor, target_logits: Tensor, shape: DraftShape | None = None) -> Verdict:
    """Keep the longest path of `draft_tokens` [B, N] that greedy decoding of `target_logits` [B, N+1, V] repeats.

    They are a chain, unless their `shape` says otherwise.
    """
    target_tokens = likeliest(target_logits)  # [B, N+1]
    if shape is None or shape.is_chain:
        matches = draft_tokens == target_tokens[:, :-1]  # [B, K]
        num_accepted = matches.long().cumprod(-1).sum(-1)  # [B]
        return Verdict(num_accepted, target_tokens.gather(-1, num_accepted[:, None]).squeeze(-1))

    ancestry, paths = shape.ancestry(draft_tokens.device), shape.paths(draft_tokens.device)
    assert ancestry is not None
    parents = paths.gather(1, (ancestry.depths - 1).clamp(min=0)[:, None])[1:, 0]  # [N]
    matches = draft_tokens == target_tokens[:, parents]  # [B, N]
    matches = torch.nn.functional.pad(matches, (1, 0), value=True)  # [B, N+1], the root's too
    nodes = torch.arange(len(paths), device=paths.device)
    sees = (ancestry.bits[:, None] >> nodes & 1).bool()  # [N+1, N+1]
    is_kept = (matches[:, None] | ~sees).all(-1)  # [B, N+1], with all that it follows
    num_accepted, end = torch.where(is_kept, ancestry.depths, -1).max(-1)  # [B]; the first of the deepest
    return Verdict(num_accepted, target_tokens.gather(-1, end[:, None]).squeeze(-1), paths[end])


def accept_sampled(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, noise: Noise | None = None
) -> Verdict:
    """Speculative sampling: what is emitted is distributed as the target's own output.

    Args:
        draft_tokens: [B, K], drawn from `draft_probs`.
        draft_probs: [B, K, V], the paper's q.
        target_probs: [B, K+1, V], the paper's p.
        noise: Where chance comes from; PyTorch's generator if it is not said.
    """
    noise = noise or GlobalNoise()
    index = draft_tokens[..., None]  # [B, K, 1]
    p = target_probs[:, :-1].gather(-1, index).squeeze(-1)  # [B, K]
    q = draft_probs.gather(-1, index).squeeze(-1)  # [B, K]
    accepted = noise.uniform(q, ACCEPT) * q < p  # [B, K]; strictly, so that p = 0 is never accepted
    num_accepted = accepted.long().cumprod(-1).sum(-1)  # [B]

    # The residual max(p - q, 0) after a refusal; past the last draft token there is no q to take off, and plain p is left.
    residual = p_next = pick(target_probs, num_accepted)  # [B, V]
    if K := draft_probs.shape[1]:
        q_next = pick(draft_probs, num_accepted.clamp(max=K - 1))  # [B, V]
        is_refused = (num_accepted < K).to(q_next.dtype)[:, None]  # [B, 1]
        residual = torch.addcmul(p_next, q_next, is_refused, value=-1).clamp_min_(0)  # [B, V]
    # Where p and q agree to the last bit, rounding can still refuse a token and leave nothing to draw from.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    return Verdict(num_accepted, noise.draw(residual[:, None], RESIDUAL)[:, 0])


def accept_next(
    proposed: Tensor, q: Tensor | None, scores: Tensor, *, do_sample: bool, noise: Noise | None = None
) -> Verdict:
    """Decide about a single position: keep what is proposed there, or choose a token.

    Args:
        proposed: [B, 1] the draft token of each row, or [B, 0] past the last one.
        q: [B, 1, V] what it was drawn from, or [B, 0, V]; None where it was not drawn.
        scores: [B, V], the target's.
        do_sample: Whether tokens are drawn.
        noise: Where chance comes from.
    """
    shape = (len(scores), 1 + proposed.shape[1], -1)  # a second position is not looked at
    if not do_sample:
        return accept_greedy(proposed, scores[:, None].expand(shape))
    p = scores.softmax(dim=-1)[:, None]  # [B, 1, V]
    return accept_sampled(proposed, p[:, :0] if q is None else q, p.expand(shape), noise)


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


def stop_before(verdict: Verdict, draft_tokens: Tensor, limit: Tensor) -> Verdict:
    """`verdict` over a chain of `draft_tokens` [B, K], with at most `limit` [B] of them kept: the next is the next token."""
    if not draft_tokens.shape[1]:
        return verdict
    limit = limit.clamp(max=draft_tokens.shape[1])
    kept = draft_tokens.gather(1, limit.clamp(max=draft_tokens.shape[1] - 1)[:, None])[:, 0]
    is_over = verdict.num_accepted > limit
    return Verdict(torch.minimum(verdict.num_accepted, limit), torch.where(is_over, kept, verdict.next_token))


# A rule decides about a proposal by the target's scores [B, N+1, V].
AcceptRule = Callable[[Proposal, Tensor, Judging], Verdict]


def judge_greedy(proposal: Proposal, scores: Tensor, judging: Judging) -> Verdict:
    """`accept_greedy`."""
    return accept_greedy(proposal.tokens, scores, judging.shape)


def judge_sampled(proposal: Proposal, scores: Tensor, judging: Judging) -> Verdict:
    """`accept_sampled`, for chains."""
    q = scores[:, :0] if proposal.q is None else proposal.q
    return accept_sampled(proposal.tokens, q, scores.softmax(-1), judging.noise)


def judge_simulated(proposal: Proposal, scores: Tensor, judging: Judging) -> Verdict:
    """`accept_simulated`."""
    assert judging.simulated_length is not None
    return accept_simulated(proposal.tokens, scores, judging.simulated_length)


# By the name that a call's `RoundConfig` says.
RULES: Mapping[str, AcceptRule] = {
    "greedy": judge_greedy,
    "sampled": judge_sampled,
    "simulated": judge_simulated,
}
