"""The prompt's forward: the host's own, whatever the prompt is made of, then held row by row.

Text, embeddings, images, a cache to go on from, chunks: `GenerationMixin._prefill` knows them all, and so the first
token's logits are those of plain decoding to the last bit; of rows run one by one, those of the row alone.

Shapes: B rows, S columns of the attention mask, N of them new in this call, P positions in the longest row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from .cache import CACHE_NAME
from .features import StateRecorder
from .rows import RowCache

# What a prompt may have one of for each column, beside its tokens; the last dimension but for embeddings.
PER_COLUMN = ("position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")

LONG_PROMPT = 2048  # columns from which on rows are run one by one
# Of a row on average, from which on a CPU does so too: to read the weights once more should cost less than to compute them.
MANY_PADS = 32


class Prompt(NamedTuple):
    """The target after the prompts, without pads."""

    lengths: Tensor  # [B] int64, real positions
    columns: Tensor  # [B, P] int64, where each of them was in the attention mask
    logits: Tensor  # [B, 1, V] float32, after the last
    tokens: Tensor  # [B, M] int64, of the last M positions that have states and token ids, pads last
    states: Tensor  # [B, M, A*Ht], theirs
    num_states: Tensor  # [B] int64, 1..M
    shift: Tensor  # [B, 1], or [axes, B, 1]: position id of each slot, less the slot
    cache: RowCache


def read_mask(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """The attention mask [B, S] bool, over cached and new columns."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return mask.to(input_ids.device).bool()
    cache, embeds = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
    past = int(cache.get_seq_length()) if cache is not None else 0
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


def is_text_only(model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
    """Whether a prompt is nothing but tokens from the beginning of a text, to be run in one go."""
    position_ids = model_kwargs.get("position_ids")
    others = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE_NAME}
    return (
        int(model_kwargs[CACHE_NAME].get_seq_length()) == 0
        and (position_ids is None or position_ids.dim() == 2)
        and generation_config.prefill_chunk_size is None
        and all(value is None for name, value in model_kwargs.items() if name not in others)
    )


def counts_from_zero(model_kwargs: dict[str, Any], mask: Tensor) -> bool:
    """Whether the position ids of real columns are 0, 1, 2, ... in each row, so that nobody gave others."""
    position_ids = model_kwargs.get("position_ids")
    if position_ids is None:
        return True
    counted = mask.long().cumsum(-1) - 1  # [B, S]
    return bool(((position_ids.to(mask.device) == counted) | ~mask).all())


def keeps_what_rows_keep(target: PreTrainedModel, cache: Cache) -> bool:
    """Whether `cache`, still empty, would forget what the cache of a row alone forgets: the same windows."""
    kinds = [type(layer) for layer in DynamicCache(config=target.config.get_text_config(decoder=True)).layers]
    theirs = [type(layer) for layer in cache.layers] or [DynamicLayer] * len(kinds)
    return type(cache) is DynamicCache and theirs == kinds


def is_by_rows(lengths: Tensor, width: int) -> bool:
    """Whether rows of `lengths` [B], padded to `width`, are better run one by one: long, or a CPU would compute pads."""
    B = len(lengths)
    num_pads = int(B * width - lengths.sum()) if lengths.device.type == "cpu" else 0
    return B > 1 and (width >= LONG_PROMPT or num_pads >= MANY_PADS * B)


def prefill_by_rows(
    target: PreTrainedModel,
    recorder: StateRecorder,
    input_ids: Tensor,
    mask: Tensor,
    model_kwargs: dict[str, Any],
    generation_config: GenerationConfig,
    *,
    device: torch.device,
    cache: RowCache,
) -> Prompt:
    """As `prefill`, one prompt after the other: no pads are computed, no [T, S] mask is made, and less lives at once."""
    B, _ = mask.shape
    lengths = mask.sum(-1)  # [B]
    columns = real_first(mask)  # [B, P]
    P = columns.shape[1]
    tokens = input_ids.gather(1, columns)  # [B, P]
    places = torch.arange(P, device=input_ids.device)[None]  # [1, P]
    logits, states = [], None
    for b, length in enumerate(lengths.tolist()):
        own_cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        own = {**model_kwargs, CACHE_NAME: own_cache, "position_ids": places[:, :length]}
        own.pop("attention_mask", None)
        out = target._prefill(tokens[b : b + 1, :length], generation_config, own)
        logits.append(out.logits[:, -1:].to(input_ids.device, torch.float32, copy=True))
        seen = recorder.take(device)  # [1, length, A*Ht]
        states = seen.new_zeros(B, P, seen.shape[-1]) if states is None else states
        states[b, :length] = seen[0]
        cache.view(b, 1, of=B).from_host(own_cache, places[:, :length], move=True)
    assert states is not None
    return Prompt(
        lengths=lengths,
        columns=columns,
        logits=torch.cat(logits),
        tokens=tokens,
        states=states,
        num_states=lengths,
        shift=torch.zeros_like(lengths)[:, None],
        cache=cache,
    )


def prefill(
    target: PreTrainedModel,
    recorder: StateRecorder,
    input_ids: Tensor,
    mask: Tensor,
    model_kwargs: dict[str, Any],
    generation_config: GenerationConfig,
    *,
    device: torch.device,
    cache: RowCache,
    move: bool,
) -> Prompt:
    """Run the target over the prompts, as plain decoding would.

    Args:
        target: The model to generate with.
        recorder: Open, on it.
        input_ids: As the host passes them to its decode loop, [B, T]; no columns where embeddings are given.
        mask: [B, S] bool, of cached and new columns; the last is real in every row.
        model_kwargs: As the host passes them to its decode loop; the cache among them is filled.
        generation_config: The call's.
        device: The drafter's.
        cache: To hold what the target has seen of each row, with room for the longest.
        move: Leave nothing in the host's.
    """
    B, S = mask.shape
    can_part = is_by_rows(mask.sum(-1), S) and is_text_only(model_kwargs, generation_config)
    if can_part and counts_from_zero(model_kwargs, mask) and keeps_what_rows_keep(target, model_kwargs[CACHE_NAME]):
        models = (target, recorder)
        return prefill_by_rows(*models, input_ids, mask, model_kwargs, generation_config, device=device, cache=cache)
    host_cache = model_kwargs[CACHE_NAME]
    with recorder.in_chunks():
        out = target._prefill(input_ids, generation_config, model_kwargs)
    states = recorder.take(device)  # [B, N, A*Ht]

    lengths = mask.sum(-1)  # [B]
    columns = real_first(mask)  # [B, P]
    position_ids = model_kwargs["position_ids"][..., -1:].to(mask.device)  # [..., B or 1, 1]
    shift = position_ids.expand(*position_ids.shape[:-2], B, 1) - (lengths - 1)[:, None]

    # Embeddings given as a prompt have no token ids: drafting starts where ids do, at the latest with the last state.
    num_ids = min(max(input_ids.shape[1], 1), states.shape[1])
    new = mask[:, S - num_ids :]  # [B, num_ids]
    num_states = new.sum(-1)  # [B]
    order = real_first(new)  # [B, M]
    tokens = torch.zeros_like(order) if not input_ids.shape[1] else input_ids[:, -num_ids:].gather(1, order)
    index = order.to(device)[..., None].expand(-1, -1, states.shape[-1])
    cache.from_host(host_cache, columns, move=move)
    return Prompt(
        lengths=lengths,
        columns=columns,
        logits=out.logits[:, -1:].to(input_ids.device, torch.float32, copy=True),
        tokens=tokens,
        states=states[:, -num_ids:].gather(1, index),
        num_states=num_states,
        shift=shift,
        cache=cache,
    )
