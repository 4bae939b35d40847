"""The columns of a batch of prompts: which are real, in what order they stand, and what else belongs to each.

Shapes: B rows, S columns of the attention mask, P positions in the longest row.
"""

from typing import Any

import torch
from torch import Tensor

from ..compat import CACHE_NAME, count_cached, is_empty

# What a prompt may have one of for each column, beside its tokens; the last dimension but for embeddings.
PER_COLUMN = ("position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def read_mask(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """The attention mask [B, S] bool, over cached and new columns."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return mask.to(input_ids.device).bool()
    cache, embeds = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
    past = count_cached(cache) if cache is not None else 0
    given = input_ids.shape[1] if embeds is None else embeds.shape[1]
    # The host drops a mask of ones from 5.23 on. The position ids are as long as it was.
    position_ids = model_kwargs.get("position_ids")
    S = max(past + 1, given) if position_ids is None else max(position_ids.shape[-1], given)
    return torch.ones(len(input_ids), S, dtype=torch.bool, device=input_ids.device)


def real_first(mask: Tensor) -> Tensor:
    """[B, P] int64: the real columns of a mask [B, S] in their order, then pads; P real ones in the fullest row."""
    P = int(mask.sum(-1).max())
    return mask.long().sort(dim=-1, descending=True, stable=True).indices[:, :P]


def pads_to_the_left(mask: Tensor, past: int) -> Tensor:
    """[B, S] int64: the columns in an order that puts pads first, among new ones."""
    new = mask[:, past:].long().sort(dim=-1, stable=True).indices + past
    old = torch.arange(past, device=mask.device).expand(len(mask), past)
    return torch.cat([old, new], dim=-1)


def reorder(input_ids: Tensor, mask: Tensor, model_kwargs: dict[str, Any], order: Tensor) -> tuple[Tensor, Tensor]:
    """The prompt with its columns in `order` [B, S]: ids and mask; what belongs to columns changes in `model_kwargs`."""
    S = mask.shape[1]

    def take(x: Tensor) -> Tensor:  # [..., B, n], of the last n columns
        index = (order[:, S - x.shape[-1] :] - (S - x.shape[-1])).to(x.device)
        return x.gather(-1, index.expand(*x.shape[:-2], len(index), -1))

    mask = take(mask)
    for name in PER_COLUMN:
        if (given := model_kwargs.get(name)) is not None and given.dim() > 1:
            model_kwargs[name] = take(given.expand(*given.shape[:-2], len(mask), -1))
    if (embeds := model_kwargs.get("inputs_embeds")) is not None:
        index = (order[:, S - embeds.shape[1] :] - (S - embeds.shape[1])).to(embeds.device)
        model_kwargs["inputs_embeds"] = embeds.gather(1, index[..., None].expand_as(embeds))
    model_kwargs["attention_mask"] = mask.long()
    return take(input_ids) if input_ids.shape[1] else input_ids, mask


def is_text_only(model_kwargs: dict[str, Any]) -> bool:
    """Whether a prompt is nothing but tokens from the beginning of a text."""
    position_ids = model_kwargs.get("position_ids")
    others = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE_NAME}
    return (
        is_empty(model_kwargs[CACHE_NAME])
        and (position_ids is None or position_ids.dim() == 2)
        and all(value is None for name, value in model_kwargs.items() if name not in others)
    )


def counts_from_zero(model_kwargs: dict[str, Any], mask: Tensor) -> bool:
    """Whether the position ids of real columns are 0, 1, 2, ... in each row, so that nobody gave others."""
    position_ids = model_kwargs.get("position_ids")
    if position_ids is None:
        return True
    counted = mask.long().cumsum(-1) - 1  # [B, S]
    return bool(((position_ids.to(mask.device) == counted) | ~mask).all())
