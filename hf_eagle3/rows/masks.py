"""Masks over row caches."""

import torch
from torch import Tensor

from .block import Block

BY_ROWS = "eagle3_rows"  # the attention that asks the cache and no mask; see attention.py


def make_mask(block: Block, num_slots: int, *, window: int | None) -> Tensor:
    """[B, 1, T, num_slots] bool: which slots each token of a block sees, at most `window` positions, its own included."""
    keys = torch.arange(num_slots, device=block.start.device)
    if block.ancestry is None:
        queries = block.slots[:, None, :, None]  # [B, 1, T, 1]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)

    ancestry, num_before = block.ancestry, block.ancestry.num_before
    bits, depths = ancestry.bits[:, None], ancestry.depths[num_before:, None]  # [T, 1]
    start = block.start[:, None, None] - num_before  # [B, 1, 1], of the tree
    within = keys - start  # [B, 1, num_slots], a slot's token of the tree
    token = within.clamp(0, len(ancestry.depths) - 1)
    is_ancestor = (bits >> token & 1).bool() & (within >= 0) & (within < len(ancestry.depths))  # [B, T, num_slots]
    mask = is_ancestor | (within < 0)
    if window is not None:
        position = torch.where(within < 0, keys, start + ancestry.depths[token])  # [B, 1, num_slots]
        mask &= position > start + depths - window
    return mask[:, None]
