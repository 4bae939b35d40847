"""Masks over row caches, ready-made for the host's models."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .block import Block

Masks = Tensor | dict[str, Tensor]
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


def make_masks(config: PreTrainedConfig, block: Block, num_slots: int, dtype: torch.dtype) -> Masks | None:
    """Masks as the host's models take them ready-made: one, or one for each of the config's `layer_types`."""
    if config._attn_implementation == BY_ROWS:
        return None

    def finish(mask: Tensor) -> Tensor:
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return finish(make_mask(block, num_slots, window=window))
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: finish(make_mask(block, num_slots, window=windows[kind])) for kind in set(layer_types)}
