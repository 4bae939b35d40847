"""From rows back to what the host returns: its cache, with its pads."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from ..compat import CACHE_NAME
from ..decoding.engine import Engine
from ..decoding.phases import run_target
from ..decoding.prefill import Prompt
from ..decoding.state import RoundState
from ..decoding.transcript import Transcript
from ..rows.block import Block
from ..rows.cache import RowCache
from ..speculation.rates import tabulate
from ..speculation.stats import Speculation
from .request import Prompts

FEW_STATES = 8  # tokens of a block after which states are kept, where there are pads to feed


def make_output(
    transcript: Transcript,
    prompts: Prompts,
    engine: Engine,
    cache: Cache | None,
    speculation: Speculation,
    *,
    seconds: float,
) -> GenerateDecoderOnlyOutput:
    """What `generate` returns with `return_dict_in_generate`, and what speculation brought."""
    speculation.graphs = engine.graphs
    speculation.shapes = {shape.name: number for shape, number in engine.chooser.rounds.most_common()}
    speculation.changes = list(engine.chooser.reasons)
    speculation.acceptance_by_rank = tabulate(engine.chooser.ends)
    told = (speculation.loop, speculation.why, speculation.depth, speculation.rule)
    speculation.rows = [Speculation(*told) for _ in transcript.rows]
    for row, own in zip(transcript.rows, speculation.rows, strict=True):
        row.count(speculation, own, length=transcript.length)
    speculation.seconds = seconds
    clocks = engine.clocks
    speculation.draft_seconds, speculation.accept_seconds, speculation.host_seconds = (
        c.read_seconds() for c in clocks
    )
    output = GenerateDecoderOnlyOutput(
        sequences=transcript.sequences(prompts.given),
        scores=transcript.scores,
        logits=transcript.logits,
        **{CACHE_NAME: cache},
    )
    output.speculation = speculation
    return output


def fill_cache(engine: Engine, prompt: Prompt, transcript: Transcript, prompts: Prompts) -> Cache:
    """The host's cache, holding what plain decoding leaves there."""
    engine.hold_states()
    with engine.lock, engine.over_masks, engine.stepping:
        cache = fill_pads(engine.target, prompt, engine.phases.state, transcript)
    assert transcript.length is not None
    slots = slots_of_output(prompt, transcript.length, prompts.mask.shape[1], prompts.order)
    cache.to_host(prompt.host_cache, slots)
    return prompt.host_cache


def fill_pads(target: PreTrainedModel, prompt: Prompt, state: RoundState, transcript: Transcript) -> RowCache:
    """The target's cache, holding what plain decoding leaves there behind rows that end early: its own pads."""
    assert transcript.length is not None
    num_known = torch.tensor([min(len(row.text), transcript.length) for row in transcript.rows])  # [B]
    width = transcript.length - int(num_known.min())
    if not width or transcript.in_step:  # rows in step have gone on over their pads
        return state.cache
    new = transcript.sequences(prompt.lengths.new_zeros(len(num_known), 0))  # [B, n]
    # Feed each row from its last token, or from one before it where the cache ends; surplus positions lie past its end.
    lengths = prompt.lengths + num_known.to(prompt.lengths.device)
    if state.cache.has_states:  # which would see tokens twice: they get the room, beside the arena's memory
        state = state.over(state.cache.beside())
    if state.cache.whole is None or state.cache.has_states:  # else the arena's, which graphs are recorded over
        state.cache.reserve(int(lengths.max()) + width)
    start = (lengths - 1).clamp(max=state.cache.capacity - width)  # [B]
    at = (start - prompt.lengths)[:, None] + torch.arange(width, device=start.device)  # [B, width]
    tokens = new.gather(1, at.clamp(max=new.shape[1] - 1))
    num_missing = prompt.lengths + transcript.length - lengths  # [B] tokens
    size = FEW_STATES if state.cache.has_states else width
    for first in range(0, width, size):
        part = tokens[:, first : first + size]
        run_target(target, state, part, Block(start + first, part.shape[1]))
        if state.cache.has_states:
            state.cache.keep_first((num_missing - first).clamp(0, part.shape[1]))
    return state.cache


def slots_of_output(prompt: Prompt, num_new: int, S: int, order: Tensor | None) -> Tensor:
    """[B, extra + S + num_new - 1] int64: our slot of each column that plain decoding caches, -1 for pads of the prompt.

    `order` is that in which the prompt's columns were put, if they were.
    """
    lengths, columns = prompt.lengths, prompt.columns
    B, P = columns.shape
    if order is not None:
        columns = order.gather(1, columns)
    slots = torch.full((B, S), -1, device=lengths.device)
    position = prompt.extra + torch.arange(P, device=lengths.device).expand(B, P)
    slots.scatter_(1, columns, position.masked_fill(position >= lengths[:, None], -1))
    before = torch.arange(prompt.extra, device=lengths.device).expand(B, prompt.extra)
    new = lengths[:, None] + torch.arange(num_new - 1, device=lengths.device)
    return torch.cat([before, slots, new], dim=1)
