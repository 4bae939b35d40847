"""Acceptance without weights: as if drafts covered the target's tokens by depth and rank as a real drafter's do."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rates import rank_nodes
from .sampling import likeliest
from .shape import DraftShape
from .verdict import Verdict, keep_matches

Coverage = tuple[tuple[float, ...], ...]  # [D][R], rates by depth and rank, as `rates.tabulate` finds them


class Places(NamedTuple):
    """Where each draft token is among those that could follow a path."""

    levels: Tensor  # [N] int64, the level before it, from 0 on
    ranks: Tensor  # [N] int64, among its siblings


@functools.cache  # graphs read these tensors for as long as they live
def make_places(parents: tuple[int, ...], device: torch.device) -> Places:
    """The tensors of a shape."""
    pairs = rank_nodes(parents)
    with torch.inference_mode(False):
        return Places(*(torch.tensor([pair[i] for pair in pairs], dtype=torch.long, device=device) for i in (0, 1)))


@functools.cache
def make_bounds(coverage: Coverage, depth: int, device: torch.device) -> Tensor:
    """[D, R] the sums of the rates of a depth up to each rank; the last known depth goes on."""
    num_ranks = max(map(len, coverage))
    rows = [coverage[min(d, len(coverage) - 1)] for d in range(depth)]
    rates = torch.tensor([[*row, *[0.0] * (num_ranks - len(row))] for row in rows]).view(depth, num_ranks)
    with torch.inference_mode(False):
        return rates.cumsum(-1).to(device)


def accept_covered(target_logits: Tensor, shape: DraftShape, coverage: Coverage) -> Verdict:
    """Walk down the shape as the coverage says, whatever was drafted. Not lossless: it measures speed.

    Args:
        target_logits: [B, N+1, V].
        shape: Of the proposal.
        coverage: How often the target's token has each rank, by depth.
    """
    device, (B, num_verified) = target_logits.device, target_logits.shape[:2]
    matches = torch.zeros(B, 0, dtype=torch.bool, device=device)
    if num_verified > 1:
        drawn = torch.rand(B, shape.depth, 1, device=device)
        ranks = (drawn >= make_bounds(coverage, shape.depth, device)).sum(-1)  # [B, D], of the target's token
        places = make_places(shape.parents, device)
        matches = ranks.index_select(1, places.levels) == places.ranks
    return keep_matches(matches, likeliest(target_logits), shape)


def read_coverage(values: Sequence[Sequence[float]]) -> Coverage:
    """Rates by depth and rank, checked.

    Raises:
        ValueError: They are none.
    """
    coverage = tuple(tuple(float(rate) for rate in row) for row in values)
    if not coverage or not all(
        row and all(0 <= rate <= 1 for rate in row) and sum(row) <= 1 + 1e-9 for row in coverage
    ):
        raise ValueError(
            "A coverage has for each depth the share of tokens that have rank 1, 2, ... among the drafts: numbers from 0 "
            f"to 1 that add up to 1 at most; got {[list(row) for row in coverage][:4]}."
        )
    return coverage
