"""What a round proposes, and what comes of it."""

from typing import NamedTuple

from torch import Tensor


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
