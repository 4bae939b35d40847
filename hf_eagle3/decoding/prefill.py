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

from ..compat import CACHE_NAME, count_cached
from ..drafters.draft import DrafterMemory
from ..recorder import StateRecorder
from ..rows.block import is_by_rows
from ..rows.cache import RowCache
from ..rows.forwards import pads_count_from
from ..rows.layers import has_states
from ..rows.rotation import at_once, find_switch, rotating
from .columns import counts_from_zero, is_text_only, real_first
from .preparation import HOST_DROPS_MASKS, AskedPositions, AskedRow, find_asked, name_of, prepare_next, shows_all


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
    memory: DrafterMemory | None = None  # where the drafter has read the states already, which are none then


class PromptCall(NamedTuple):
    """What a prompt's forward is given."""

    target: PreTrainedModel  # the model to generate with
    recorder: StateRecorder  # open, on it
    input_ids: Tensor  # [B, T] as the host passes them to its decode loop; no columns where embeddings are given
    mask: Tensor  # [B, S] bool, of cached and new columns; the last is real in every row
    model_kwargs: dict[str, Any]  # as the host passes them to its decode loop; the cache among them is filled
    generation_config: GenerationConfig
    device: torch.device  # the drafter's
    cache: RowCache  # to hold what the target has seen of each row, with room for the longest
    move: bool  # leave nothing in the host's cache
    is_whole: bool  # run the batch as it is given, since hooks of others count on its rows
    is_apart: bool = False  # run each row by itself: the batch is no call's, so its pads are nobody's

    @property
    def is_padded(self) -> bool:
        """Whether some column is no token."""
        return not bool(self.mask.all())


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


class RowPrompt(NamedTuple):
    """The target after one prompt of several that run one by one."""

    num_cached: int
    logits: Tensor  # [1, 1, V] float32
    states: Tensor  # [1, length, A*Ht]
    shift: Tensor | None  # [1, 1], or [axes, 1, 1]
    asked: AskedRow | None


def prefill_row(call: PromptCall, ids: Tensor, b: int, *, is_asked: bool) -> RowPrompt:
    """Run the target over the tokens of row `b` alone, [1, length]; the row's part of the cache is filled."""
    target, length = call.target, ids.shape[1]
    places = torch.arange(length, device=ids.device)[None]  # [1, length]
    host_cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    own = {**call.model_kwargs, CACHE_NAME: host_cache, "position_ids": places}
    own["attention_mask"] = torch.ones_like(places) if is_asked and not HOST_DROPS_MASKS else None
    with call.recorder.in_chunks():
        out = target._prefill(ids, call.generation_config, own)
    host_cache = out.get(CACHE_NAME, host_cache)  # a target may have made another
    num_cached = count_cached(host_cache) or length  # recurrent layers alone count nothing
    asked = shift = None
    if is_asked:
        kwargs = target._update_model_kwargs_for_generation(out, own, is_encoder_decoder=False)
        asked = AskedRow(ids[0].tolist(), num_cached - length, {length + 1: kwargs})
    else:
        lengths = torch.tensor([length], device=ids.device)
        prepared = prepare_next(target, out, ids, own)
        shift = find_shift(prepared, lengths.new_tensor([num_cached]), num_cached)
    logits = out.logits[:, -1:].to(ids.device, torch.float32, copy=True)
    states = call.recorder.take(call.device)[:, -length:]
    call.cache.reserve(num_cached)
    slots = torch.arange(num_cached, device=ids.device)[None]
    call.cache.view(b, 1, of=len(call.mask)).from_host(host_cache, slots, move=True)
    return RowPrompt(num_cached, logits, states, shift, asked)


def prefill_by_rows(call: PromptCall) -> Prompt:
    """One prompt after the other: no pads are computed, no [T, S] mask is made, and less lives at once."""
    num_real = call.mask.sum(-1)  # [B]
    columns = real_first(call.mask)  # [B, P]
    tokens = call.input_ids.gather(1, columns)  # [B, P]
    is_asked = find_asked(call.target) is not None
    rows, states = [], None
    for b, length in enumerate(num_real.tolist()):
        row = prefill_row(call, tokens[b : b + 1, :length], b, is_asked=is_asked)
        states = row.states.new_zeros(*columns.shape, row.states.shape[-1]) if states is None else states
        states[b, :length] = row.states[0]
        rows.append(row._replace(states=states[:0]))  # held once
    assert states is not None
    extras = {row.num_cached - length for row, length in zip(rows, num_real.tolist(), strict=True)}
    if len(extras) > 1:
        raise ValueError(
            f"After prompts of {num_real.tolist()} tokens, the caches of {type(call.target).__name__} hold "
            f"{sorted(extras)} positions more than that: rows must agree. Call generate() once for each row."
        )
    (extra,) = extras
    asked = [row.asked for row in rows if row.asked is not None]
    shifts = [row.shift for row in rows if row.shift is not None]
    return Prompt(
        lengths=num_real + extra,
        extra=extra,
        columns=columns,
        logits=torch.cat([row.logits for row in rows]),
        tokens=tokens,
        states=states,
        num_states=num_real,
        shift=torch.cat(shifts, dim=-2) if shifts else torch.zeros_like(num_real)[:, None],
        cache=call.cache,
        host_cache=call.model_kwargs[CACHE_NAME],
        asked=AskedPositions(call.target, asked) if is_asked else None,
    )


def prefill(call: PromptCall) -> Prompt:
    """Run the target over the prompts, as plain decoding would.

    Raises:
        ValueError: Rows would have to run by themselves, and cannot.
    """
    target, mask, settings = call.target, call.mask, call.generation_config
    B, S = mask.shape
    is_alone = B == 1 and not call.is_padded
    can_part = is_text_only(call.model_kwargs) and counts_from_zero(call.model_kwargs, mask) and not call.is_whole
    in_chunks = settings.prefill_chunk_size is not None
    asked_by = find_asked(target)
    # A target that is asked for each token is asked as if a row were alone, and so must its prompt be. Chunks of padded
    # rows end elsewhere than those of rows alone, which matters where rotation depends on the length. What pads leave in
    # recurrent states is nothing in some families and something in others.
    must_part = asked_by is not None or (in_chunks and find_switch(target) is not None)
    must_part = must_part or (call.is_padded and has_states(target)) or call.is_apart
    start = pads_count_from(target) if call.is_padded else None
    if start is not None and start <= S:
        must_part = True
        if not can_part:
            raise ValueError(
                f"{type(target).__name__} counts pads as positions, which changes what it computes from {start} positions on, "
                f"and this batch has {S}, pads included: call generate() once for each row, without pads."
            )
    keeps = keeps_what_rows_keep(target, call.model_kwargs[CACHE_NAME])
    should_part = is_by_rows(mask.sum(-1), S) and not in_chunks and keeps
    with rotating(at_once):
        if can_part and (should_part or (must_part and not is_alone)):
            return prefill_by_rows(call)
        if asked_by is not None and not is_alone:
            raise ValueError(
                f"{type(target).__name__} prepares the inputs of its forwards in a way of its own ({name_of(asked_by)}), "
                "so a drafter can help with a batch of text alone, from its beginning; got a batch with more: call "
                "generate() once for each row, without pads."
            )
        return prefill_batch(call, is_asked=asked_by is not None)


def prefill_batch(call: PromptCall, *, is_asked: bool) -> Prompt:
    """All prompts in one forward, or in the host's chunks."""
    target, input_ids, mask = call.target, call.input_ids, call.mask
    B, S = mask.shape
    with call.recorder.in_chunks():
        out = target._prefill(input_ids, call.generation_config, call.model_kwargs)
    host_cache = out.get(CACHE_NAME, call.model_kwargs[CACHE_NAME])  # a target may have made another
    states = call.recorder.take(call.device)  # [B, N, A*Ht]
    num_cached = count_cached(host_cache) or S  # recurrent layers alone count nothing
    extra = num_cached - S
    prepared = None if is_asked else prepare_next(target, out, input_ids, call.model_kwargs)
    is_seen = prepared is None or shows_all(prepared.get("attention_mask"), num_cached + 1)
    if extra < 0 or (extra and (call.is_padded or not is_seen)):
        raise ValueError(
            f"After a prompt of {S} columns, pads included, the cache of {type(target).__name__} holds {num_cached} "
            "positions: a drafter can help if there are as many, or more, all of which later tokens see, and no pads. "
            "Call generate() once for each row, without pads, or without assistant_model."
        )
    columns = real_first(mask)  # [B, P]
    lengths = mask.sum(-1) + extra  # [B]
    asked, shift = None, torch.zeros_like(lengths)[:, None]
    if prepared is None:
        kwargs = target._update_model_kwargs_for_generation(out, dict(call.model_kwargs), is_encoder_decoder=False)
        T = input_ids.shape[1]
        asked = AskedPositions(target, [AskedRow(input_ids[0].tolist(), num_cached - T, {T + 1: kwargs})])
    else:
        shift = find_shift(prepared, lengths, num_cached)
    call.cache.reserve(int(lengths.max()))
    before = torch.arange(extra, device=columns.device).expand(B, extra)
    call.cache.from_host(host_cache, torch.cat([before, columns + extra], dim=1), move=call.move)
    tokens, states, num_states = take_ids_and_states(call, states)
    logits = out.logits[:, -1:].to(input_ids.device, torch.float32, copy=True)
    parts = (logits, tokens, states, num_states, shift, call.cache, host_cache, asked)
    return Prompt(lengths, extra, columns, *parts)


def take_ids_and_states(call: PromptCall, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, M], states [B, M, A*Ht] and their number [B], of the last positions that have both; pads last.

    Embeddings given as a prompt have no token ids: drafting starts where ids do, at the latest with the last state.
    """
    input_ids, S = call.input_ids, call.mask.shape[1]
    num_ids = min(max(input_ids.shape[1], 1), states.shape[1])
    new = call.mask[:, S - num_ids :]  # [B, num_ids]
    order = real_first(new)  # [B, M]
    tokens = torch.zeros_like(order) if not input_ids.shape[1] else input_ids[:, -num_ids:].gather(1, order)
    states = states[:, -num_ids:]
    index = order.to(call.device)[..., None].expand(-1, -1, states.shape[-1])
    return tokens, states.gather(1, index), new.sum(-1)
