"""Masks over row caches."""

import torch
from torch import Tensor

from .block import Block

BY_ROWS = "eagle3_rows"  # the attention that asks the cache and no mask; see attention.py


def make_mask(block: Block, num_slots: int, *, window: int | None, chunk: int | None = None) -> Tensor:
    """[B, 1, T, num_slots] bool: which slots each token of a block sees.

    Args:
        block: Of tokens.
        num_slots: In each row.
        window: Of positions, the token's own included; None for all before it.
        chunk: Positions of each of the pieces that a row is cut into from its beginning; a token sees its own piece.
    """
    keys = torch.arange(num_slots, device=block.start.device)
    if block.ancestry is None:
        queries = block.slots[:, None, :, None]  # [B, 1, T, 1]
        return (keys <= queries) & is_near(keys, queries, window=window, chunk=chunk)

    ancestry, num_before = block.ancestry, block.ancestry.num_before
    bits, depths = ancestry.bits[:, None], ancestry.depths[num_before:, None]  # [T, 1]
    start = block.start[:, None, None] - num_before  # [B, 1, 1], of the tree
    within = keys - start  # [B, 1, num_slots], a slot's token of the tree
    token = within.clamp(0, len(ancestry.depths) - 1)
    is_ancestor = (bits >> token & 1).bool() & (within >= 0) & (within < len(ancestry.depths))  # [B, T, num_slots]
    mask = is_ancestor | (within < 0)
    position = torch.where(within < 0, keys, start + ancestry.depths[token])  # [B, 1, num_slots]
    return (mask & is_near(position, start + depths, window=window, chunk=chunk))[:, None]


def is_near(keys: Tensor, queries: Tensor, *, window: int | None, chunk: int | None) -> Tensor:
    """Whether positions of keys and queries, which broadcast, are within one window and one piece of the text."""
    is_seen = keys >= 0
    if window is not None:
        is_seen = is_seen & (keys > queries - window)
    if chunk is not None:
        is_seen = is_seen & (keys // chunk == queries // chunk)
    return is_seen
