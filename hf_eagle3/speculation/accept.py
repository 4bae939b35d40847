"""Accept rules: which draft tokens are kept, and the one token the target adds.

Two families. Where the target's token is chosen whatever was drafted, draft tokens are kept as far as they are those:
greedy decoding, and `shared_noise`. Where draft tokens were drawn by other numbers, chance decides by the ratio of p and q:
`block_verification`, for chains.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .block_verification import accept_block
from .noise import Noise
from .sampling import likeliest
from .shape import DraftShape
from .shared_noise import SharedNoise
from .verdict import Proposal, Verdict, keep_matches


class Judging(NamedTuple):
    """What else an accept rule may need."""

    shape: DraftShape
    noise: Noise  # of ratio tests
    shared: SharedNoise
    simulated_length: float | None = None

    def of_row(self, row: int) -> "Judging":
        """That of a single row of the batch."""
        return self._replace(noise=self.noise.further(0, row), shared=self.shared.of_row(row))


def accept_matching(draft_tokens: Tensor, target_tokens: Tensor, shape: DraftShape | None = None) -> Verdict:
    """Keep the longest path of `draft_tokens` [B, N] that are the target's own.

    Args:
        draft_tokens: [B, N], a chain, unless their shape says otherwise.
        target_tokens: [B, N+1], what the target says after the root and after each of them.
        shape: Theirs.
    """
    if shape is None or shape.is_chain:
        return keep_matches(draft_tokens == target_tokens[:, :-1], target_tokens, shape)
    said = target_tokens.index_select(1, shape.descent(draft_tokens.device).parents)  # [B, N], before each of them
    return keep_matches(draft_tokens == said, target_tokens, shape)


def accept_greedy(draft_tokens: Tensor, target_logits: Tensor, shape: DraftShape | None = None) -> Verdict:
    """Keep the longest path of `draft_tokens` [B, N] that greedy decoding of `target_logits` [B, N+1, V] repeats."""
    return accept_matching(draft_tokens, likeliest(target_logits), shape)


def accept_shared(draft_tokens: Tensor, scores: Tensor, shape: DraftShape, shared: SharedNoise) -> Verdict:
    """Keep the longest path of `draft_tokens` [B, N] that sampling from `scores` [B, N+1, V] by that noise repeats."""
    ancestry = shape.ancestry(scores.device)
    places = None if ancestry is None else ancestry.depths
    noisy = shared.perturb(scores, range(shape.depth + 1), places=places)
    return accept_matching(draft_tokens, likeliest(noisy), shape)


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
    """`verdict` over `draft_tokens` [B, N], with at most `limit` [B] of them kept: the next is the next token."""
    if not draft_tokens.shape[1]:
        return verdict
    num_accepted, next_token, path = verdict
    at = limit[:, None]  # [B, 1], of the next among draft tokens
    if path is not None:
        at = path.gather(1, (at + 1).clamp(max=path.shape[1] - 1)) - 1
    kept = draft_tokens.gather(1, at.clamp(0, draft_tokens.shape[1] - 1))[:, 0]
    return Verdict(torch.minimum(num_accepted, limit), torch.where(num_accepted > limit, kept, next_token), path)


# ---- over a whole proposal ----


def judge_greedy(proposal: Proposal, scores: Tensor, judging: Judging) -> Verdict:
    """`accept_greedy`."""
    return accept_greedy(proposal.tokens, scores, judging.shape)


def judge_block(proposal: Proposal, scores: Tensor, judging: Judging) -> Verdict:
    """`accept_block`, for chains."""
    q = scores[:, :0] if proposal.q is None else proposal.q
    return accept_block(proposal.tokens, q, scores.softmax(-1), judging.noise)


def judge_shared(proposal: Proposal, scores: Tensor, judging: Judging) -> Verdict:
    """`accept_shared`."""
    return accept_shared(proposal.tokens, scores, judging.shape, judging.shared)


def judge_simulated(proposal: Proposal, scores: Tensor, judging: Judging) -> Verdict:
    """`accept_simulated`."""
    assert judging.simulated_length is not None
    return accept_simulated(proposal.tokens, scores, judging.simulated_length)


# ---- one token after the other ----


def next_greedy(offered: Proposal, scores: Tensor, depth: int, judging: Judging) -> Tensor:  # noqa: ARG001
    """The likeliest tokens [B]."""
    return likeliest(scores)


def next_by_ratio(offered: Proposal, scores: Tensor, depth: int, judging: Judging) -> Tensor:
    """The token of a draft if it is kept, else another [B]: block verification of a draft that has no second token."""
    B, num_offered = offered.tokens.shape
    p = scores.softmax(dim=-1)[:, None]  # [B, 1, V]
    q = p[:, :0] if offered.q is None else offered.q
    # What follows an offered token is not looked at.
    verdict = accept_block(offered.tokens, q, p.expand(B, num_offered + 1, -1), judging.noise.further(depth))
    if not num_offered:
        return verdict.next_token
    return torch.where(verdict.num_accepted > 0, offered.tokens[:, 0], verdict.next_token)


def next_by_noise(offered: Proposal, scores: Tensor, depth: int, judging: Judging) -> Tensor:  # noqa: ARG001
    """The tokens [B] that shared noise chooses."""
    return likeliest(judging.shared.perturb(scores[:, None], range(depth, depth + 1))[:, 0])


@dataclass(frozen=True)
class AcceptRule:
    """How a round decides. A row of `RULES`.

    Attributes:
        judge: Decides about a proposal by the target's scores [B, N+1, V].
        choose_next: The token [B] after a node of some depth by scores [B, V], where processors look at the text. A draft
            token that is equal to it is kept. Offered is the node's child in a chain, [B, 1], or nothing, [B, 0].
    """

    judge: Callable[[Proposal, Tensor, Judging], Verdict]
    choose_next: Callable[[Proposal, Tensor, int, Judging], Tensor]


GREEDY, BLOCK, SHARED, SIMULATED = "greedy", "block verification", "shared noise", "simulated"
# By the name that `RoundConfig.rule` gives.
RULES: Mapping[str, AcceptRule] = {
    GREEDY: AcceptRule(judge_greedy, next_greedy),
    BLOCK: AcceptRule(judge_block, next_by_ratio),
    SHARED: AcceptRule(judge_shared, next_by_noise),
    SIMULATED: AcceptRule(judge_simulated, next_greedy),
}


def describe_rules(rules: Iterable[str], *, in_order: bool) -> str:
    """Rules in words. Token by token, block verification is the ratio test that it is made of."""
    if not in_order:
        return " and ".join(dict.fromkeys(rules))
    return " and ".join(dict.fromkeys(f"{'ratio test' if rule == BLOCK else rule}, token by token" for rule in rules))
