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

from ..compat import CACHE_NAME
from ..recorder import StateRecorder
from ..rows.block import is_by_rows
from ..rows.cache import RowCache
from ..rows.rotation import at_once, find_switch, rotating
from .preparation import HOST_DROPS_MASKS, AskedPositions, AskedRow, find_asked, name_of, prepare_next, shows_all

# What a prompt may have one of for each column, beside its tokens; the last dimension but for embeddings.
PER_COLUMN = ("position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class Prompt(NamedTuple):
    """The target after the prompts, without pads."""

    lengths: Tensor  # [B] int64, cached positions
    extra: int  # the first of them in each row, which no column of the attention mask stands for: virtual tokens
    columns: Tensor  # [B, P] int64, where each of the others was in the attention mask
    logits: Tensor  # [B, 1, V] float32, after the last
    tokens: Tensor  # [B, M] int64, of the last M positions that have states and token ids, pads last
    states: Tensor  # [B, M, A*Ht], theirs
    num_states: Tensor  # [B] int64, 1..M
    shift: Tensor  # [B, 1], or [axes, B, 1]: position id of each slot, less the slot
    cache: RowCache
    host_cache: Cache  # what plain decoding would go on with
    asked: AskedPositions | None  # position ids of later tokens, where `shift` does not say them


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


def is_text_only(model_kwargs: dict[str, Any]) -> bool:
    """Whether a prompt is nothing but tokens from the beginning of a text."""
    position_ids = model_kwargs.get("position_ids")
    others = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE_NAME}
    return (
        int(model_kwargs[CACHE_NAME].get_seq_length()) == 0
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


def keeps_what_rows_keep(target: PreTrainedModel, cache: Cache) -> bool:
    """Whether `cache`, still empty, would forget what the cache of a row alone forgets: the same windows."""
    kinds = [type(layer) for layer in DynamicCache(config=target.config.get_text_config(decoder=True)).layers]
    theirs = [type(layer) for layer in cache.layers] or [DynamicLayer] * len(kinds)
    return type(cache) is DynamicCache and theirs == kinds


def find_shift(prepared: dict[str, Any], lengths: Tensor, num_cached: int) -> Tensor:
    """[B, 1] or [axes, B, 1]: the position id of the next token, less its slot.

    Args:
        prepared: What plain decoding would give the next forward.
        lengths: [B], positions of each row without pads.
        num_cached: Positions of the host's cache, pads included.
    """
    position_ids = prepared.get("position_ids")
    if position_ids is None:  # a forward of the host then counts on from the cache, pads included
        return num_cached - lengths[:, None]
    position_ids = position_ids[..., -1:].to(lengths.device)  # [.., B or 1, 1]
    return position_ids.expand(*position_ids.shape[:-2], len(lengths), 1) - lengths[:, None]


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
    num_real = mask.sum(-1)  # [B]
    columns = real_first(mask)  # [B, P]
    P = columns.shape[1]
    tokens = input_ids.gather(1, columns)  # [B, P]
    places = torch.arange(P, device=input_ids.device)[None]  # [1, P]
    is_asked = find_asked(target) is not None
    logits, states, shifts, extras, asked = [], None, [], set(), []
    for b, length in enumerate(num_real.tolist()):
        own_cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        own = {**model_kwargs, CACHE_NAME: own_cache, "position_ids": places[:, :length]}
        has_mask = is_asked and not HOST_DROPS_MASKS
        own["attention_mask"] = torch.ones_like(places[:, :length]) if has_mask else None
        ids = tokens[b : b + 1, :length]
        with recorder.in_chunks():
            out = target._prefill(ids, generation_config, own)
        own_cache = out.get(CACHE_NAME, own_cache)  # a target may have made another
        num_cached = int(own_cache.get_seq_length())
        extras.add(num_cached - length)
        if is_asked:
            kwargs = target._update_model_kwargs_for_generation(out, own, is_encoder_decoder=False)
            asked.append(AskedRow(ids[0].tolist(), num_cached - length, {length + 1: kwargs}))
        else:
            prepared = prepare_next(target, out, ids, own)
            shifts.append(find_shift(prepared, num_real.new_tensor([num_cached]), num_cached))
        logits.append(out.logits[:, -1:].to(input_ids.device, torch.float32, copy=True))
        seen = recorder.take(device)[:, -length:]  # [1, length, A*Ht]
        states = seen.new_zeros(B, P, seen.shape[-1]) if states is None else states
        states[b, :length] = seen[0]
        cache.reserve(num_cached)
        cache.view(b, 1, of=B).from_host(own_cache, torch.arange(num_cached, device=places.device)[None], move=True)
    assert states is not None
    if len(extras) > 1:
        raise ValueError(
            f"After prompts of {num_real.tolist()} tokens, the caches of {type(target).__name__} hold "
            f"{sorted(extras)} positions more than that: rows must agree. Call generate() once for each row."
        )
    (extra,) = extras
    return Prompt(
        lengths=num_real + extra,
        extra=extra,
        columns=columns,
        logits=torch.cat(logits),
        tokens=tokens,
        states=states,
        num_states=num_real,
        shift=torch.zeros_like(num_real)[:, None] if is_asked else torch.cat(shifts, dim=-2),
        cache=cache,
        host_cache=model_kwargs[CACHE_NAME],
        asked=AskedPositions(target, asked) if is_asked else None,
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
    is_whole: bool = False,
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
        is_whole: Run the batch as it is given, since hooks of others count on its rows.

    Raises:
        ValueError: Rows would have to run by themselves, and cannot.
    """
    B, S = mask.shape
    is_padded = not bool(mask.all())
    can_part = is_text_only(model_kwargs) and counts_from_zero(model_kwargs, mask) and not is_whole
    in_chunks = generation_config.prefill_chunk_size is not None
    asked_by = find_asked(target)
    # A target that is asked for each token is asked as if a row were alone, and so must its prompt be. Chunks of padded
    # rows end elsewhere than those of rows alone, which matters where rotation depends on the length.
    must_part = asked_by is not None or (in_chunks and find_switch(target) is not None)
    should_part = (
        is_by_rows(mask.sum(-1), S) and not in_chunks and keeps_what_rows_keep(target, model_kwargs[CACHE_NAME])
    )
    if can_part and (should_part or (must_part and (B > 1 or is_padded))):
        models = (target, recorder)
        with rotating(at_once):
            return prefill_by_rows(
                *models, input_ids, mask, model_kwargs, generation_config, device=device, cache=cache
            )
    if asked_by is not None and (B > 1 or is_padded):
        raise ValueError(
            f"{type(target).__name__} prepares the inputs of its forwards in a way of its own ({name_of(asked_by)}), "
            "so a drafter can help with a batch of text alone, from its beginning; got a batch with more: call "
            "generate() once for each row, without pads."
        )
    with recorder.in_chunks(), rotating(at_once):
        out = target._prefill(input_ids, generation_config, model_kwargs)
    host_cache = out.get(CACHE_NAME, model_kwargs[CACHE_NAME])  # a target may have made another
    states = recorder.take(device)  # [B, N, A*Ht]

    num_cached = int(host_cache.get_seq_length())
    extra = num_cached - S
    prepared = None if asked_by is not None else prepare_next(target, out, input_ids, model_kwargs)
    is_seen = prepared is None or shows_all(prepared.get("attention_mask"), num_cached + 1)
    if extra < 0 or (extra and (is_padded or not is_seen)):
        raise ValueError(
            f"After a prompt of {S} columns, pads included, the cache of {type(target).__name__} holds {num_cached} "
            "positions: a drafter can help if there are as many, or more, all of which later tokens see, and no pads. "
            "Call generate() once for each row, without pads, or without assistant_model."
        )
    columns = real_first(mask)  # [B, P]
    lengths = mask.sum(-1) + extra  # [B]
    asked = None
    if prepared is None:
        kwargs = target._update_model_kwargs_for_generation(out, dict(model_kwargs), is_encoder_decoder=False)
        T = input_ids.shape[1]
        asked = AskedPositions(target, [AskedRow(input_ids[0].tolist(), num_cached - T, {T + 1: kwargs})])
        shift = torch.zeros_like(lengths)[:, None]
    else:
        shift = find_shift(prepared, lengths, num_cached)

    # Embeddings given as a prompt have no token ids: drafting starts where ids do, at the latest with the last state.
    num_ids = min(max(input_ids.shape[1], 1), states.shape[1])
    new = mask[:, S - num_ids :]  # [B, num_ids]
    num_states = new.sum(-1)  # [B]
    order = real_first(new)  # [B, M]
    tokens = torch.zeros_like(order) if not input_ids.shape[1] else input_ids[:, -num_ids:].gather(1, order)
    states = states[:, -num_ids:]
    index = order.to(device)[..., None].expand(-1, -1, states.shape[-1])
    cache.reserve(int(lengths.max()))
    before = torch.arange(extra, device=columns.device).expand(B, extra)
    cache.from_host(host_cache, torch.cat([before, columns + extra], dim=1), move=move)
    return Prompt(
        lengths=lengths,
        extra=extra,
        columns=columns,
        logits=out.logits[:, -1:].to(input_ids.device, torch.float32, copy=True),
        tokens=tokens,
        states=states.gather(1, index),
        num_states=num_states,
        shift=shift,
        cache=cache,
        host_cache=host_cache,
        asked=asked,
    )
