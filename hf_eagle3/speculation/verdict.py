"""What a round proposes, and what comes of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .shape import DraftShape


class Proposal(NamedTuple):
    """What a round proposes, on the target's device."""

    tokens: Tensor  # [B, N] int64
    q: Tensor | None  # [B, N, V] float32, what they were drawn from; None where no ratio of p and q is needed


class Verdict(NamedTuple):
    """What a round gave: a path from the root, and a token behind it."""

    num_accepted: Tensor  # [B] int64 in 0..D, draft tokens kept
    next_token: Tensor  # [B] int64, correction token if a draft token was refused, else bonus token
    path: Tensor | None = None  # [B, D+1] int64, nodes from the root on, the first num_accepted+1 count; None: 0..D

    @property
    def ends(self) -> Tensor:
        """[B] the node at which each path ends."""
        return self.num_accepted if self.path is None else self.path.gather(-1, self.num_accepted[:, None])[:, 0]


def keep_matches(matches: Tensor, target_tokens: Tensor, shape: DraftShape | None = None) -> Verdict:
    """Keep the longest path of draft tokens that match.

    Args:
        matches: [B, N] bool, of a chain, unless their shape says otherwise.
        target_tokens: [B, N+1] int64, what the target says after the root and after each of them.
        shape: Theirs.
    """
    if shape is None or shape.is_chain:
        num_accepted = matches.long().cumprod(-1).sum(-1)  # [B]
        return Verdict(num_accepted, target_tokens.gather(-1, num_accepted[:, None]).squeeze(-1))

    _, is_no_ancestor, depths = shape.descent(matches.device)
    is_kept = (matches[:, None] | is_no_ancestor).all(-1)  # [B, N+1], with all that it follows
    num_accepted, end = torch.where(is_kept, depths, -1).max(-1)  # [B]; the first of the deepest
    next_token = target_tokens.gather(-1, end[:, None]).squeeze(-1)
    return Verdict(num_accepted, next_token, shape.paths(matches.device)[end])
