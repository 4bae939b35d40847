"""Masks over row caches, ready-made for the host's models."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Masks = Tensor | dict[str, Tensor]
BY_ROWS = "eagle3_rows"  # the attention that asks the cache and no mask; see row_attention.py


def make_mask(slots: Tensor, num_slots: int, *, window: int | None) -> Tensor:
    """[B, 1, T, num_slots] bool: a query at `slots` [B, T] sees its own slot and those before, at most `window` in all."""
    keys = torch.arange(num_slots, device=slots.device)
    queries = slots[:, None, :, None]  # [B, 1, T, 1]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def make_masks(config: PreTrainedConfig, slots: Tensor, num_slots: int, dtype: torch.dtype) -> Masks | None:
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
        return finish(make_mask(slots, num_slots, window=window))
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: finish(make_mask(slots, num_slots, window=windows[kind])) for kind in set(layer_types)}
