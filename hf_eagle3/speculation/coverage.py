"""Acceptance without weights: as if drafts covered the target's tokens by depth and rank as a real drafter's do."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .rates import rank_nodes
from .sampling import likeliest
from .shape import DraftShape
from .verdict import Verdict

Coverage = tuple[tuple[float, ...], ...]  # [D][R], rates by depth and rank, as `rates.tabulate` finds them


@functools.cache  # graphs read these tensors for as long as they live
def make_children(parents: tuple[int, ...], device: torch.device) -> Tensor:
    """[N+1, R+1] int64: the child of each node of each rank, itself where it has none; the last column likewise."""
    ranks = [rank for _, rank in rank_nodes(parents)]
    children = torch.arange(len(parents) + 1)[:, None].repeat(1, max(ranks, default=-1) + 2)
    for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True), start=1):
        children[parent, rank] = node
    with torch.inference_mode(False):
        return children.to(device)


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
    device = target_logits.device
    children = make_children(shape.parents, device)
    node = torch.zeros(len(target_logits), dtype=torch.long, device=device)  # [B]
    num_accepted, is_over = node.clone(), node.bool()
    for bounds in make_bounds(coverage, shape.depth, device):
        drawn = torch.rand(len(node), 1, device=device)
        rank = (drawn >= bounds).sum(-1).clamp(max=children.shape[1] - 1)  # [B]; the last: none of them
        child = children[node, rank]
        is_over = is_over | (child == node)
        node = torch.where(is_over, node, child)
        num_accepted = num_accepted + (~is_over).long()
    next_token = likeliest(target_logits).gather(-1, node[:, None])[:, 0]
    return Verdict(num_accepted, next_token, None if shape.is_chain else shape.paths(device)[node])


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
