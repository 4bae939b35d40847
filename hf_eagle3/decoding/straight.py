"""Prompts of text that run straight into the caches of their rows: nothing of the host's between, no wait for the device.

Rows are padded behind, so no mask is needed: what stands before a token is its own text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ..compat import CACHE_NAME
from ..drafters.draft import DrafterMemory
from ..recorder import StateRecorder
from ..rows.block import whole_rows
from ..rows.cache import WRITING, RowCache, to_bucket
from ..rows.forwards import find_special
from ..rows.rotation import at_once, rotating
from ..speculation.numbers import send
from ..speculation.shape import Shapes
from .chunks import Beginning, takes_chunks
from .columns import counts_from_zero, is_text_only, real_first
from .prefill import Prompt, keeps_what_rows_keep

# Tokens of one forward, times weights: they fill a GPU, and what more would leave behind is memory.
WORK_AT_ONCE, LEAST_AT_ONCE, MOST_AT_ONCE = 3.3e13, 4096, 32768


def count_at_once(target: PreTrainedModel) -> int:
    """Tokens that prompts may have in one forward of `target`; 0 on a CPU, which computes pads like tokens."""
    if target.device.type == "cpu":
        return 0
    return min(max(int(WORK_AT_ONCE / target.num_parameters()), LEAST_AT_ONCE), MOST_AT_ONCE)


def runs_straight(target: PreTrainedModel) -> bool:
    """Whether prompts of `target` may: positions are its own affair alone, and its forward takes them in the usual way."""
    return takes_chunks(target) and find_special(target) is None


def make_drafter_cache(drafter: PreTrainedModel | None, longest: int, shapes: Shapes) -> RowCache:
    """With room for prompts of up to `longest` tokens and a draft."""
    num_layers = 0 if drafter is None else drafter.config.num_hidden_layers
    return RowCache(num_layers, to_bucket(longest + shapes.num_drafter_slots))


def part(input_ids: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
    """The tokens [T_b] of each row of a batch [B, S], and in which columns [B, P] they stand."""
    columns = real_first(mask)
    rows = input_ids.gather(1, columns)
    return [row[:n] for row, n in zip(rows, mask.sum(-1).tolist(), strict=True)], columns


def may_part(target: PreTrainedModel, mask: Tensor, model_kwargs: dict[str, Any], settings: GenerationConfig) -> bool:
    """Whether the rows of a call's batch may run straight; arguments as of `prefill.PromptCall`."""
    is_plain = is_text_only(model_kwargs) and counts_from_zero(model_kwargs, mask)
    is_plain = is_plain and settings.prefill_chunk_size is None
    return is_plain and keeps_what_rows_keep(target, model_kwargs[CACHE_NAME]) and runs_straight(target)


def prefill_straight(
    target: PreTrainedModel,
    recorder: StateRecorder,
    prompts: Sequence[Tensor],
    cache: RowCache,
    beginning: Beginning,
    *,
    most: int,
) -> Prompt:
    """The target after `prompts` [T_b], and the drafter, which reads states as they come; what `prefill` returns.

    Args:
        target: One that `runs_straight`.
        recorder: Open, on it.
        prompts: Of the rows, on the target's device.
        cache: To hold what the target has seen of each row, with room for the longest.
        beginning: What the drafter begins with.
        most: Tokens in one forward, with their pads, where rows need not run by themselves for that.
    """
    counts = [len(prompt) for prompt in prompts]
    ids = pad_sequence(list(prompts), batch_first=True)  # [B, P]
    lengths = send(counts, ids.device)
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    positions = torch.minimum(columns, lengths[:, None] - 1)  # pads have the last one's
    logits, memories = [], []
    device = (target if beginning.drafter is None else beginning.drafter).device
    for part in split(counts, most):
        width, B = max(counts[part]), len(counts[part])
        its = cache if len(counts) == B else cache.view(part.start, B, of=len(counts))
        ends = lengths[part] - 1 if min(counts[part]) < width else None
        logits.append(run_first(target, its, ids[part, :width], positions[part, :width], ends))
        states = recorder.take(device)
        with beginning.clock:
            memories.append(beginning.begin(ids[part, :width], states, lengths[part], part, of=len(counts)))
    zeros = torch.zeros_like(lengths)[:, None]
    return Prompt(
        lengths=lengths,
        extra=0,
        columns=columns,
        logits=torch.cat(logits),
        tokens=ids,
        states=zeros[..., None][:, :0],
        num_states=lengths.clone(),
        shift=zeros,
        cache=cache,
        host_cache=DynamicCache(),
        asked=None,
        memory=memories[0] if len(memories) == 1 else DrafterMemory.joined(memories, beginning.cache),
    )


def split(counts: list[int], most: int) -> Iterator[slice]:
    """Which rows of so many tokens run together: those one behind the other that come to `most`, with their pads."""
    start = 0
    for end in range(1, len(counts) + 1):
        if end == len(counts) or (end + 1 - start) * max(counts[start : end + 1]) > most:
            yield slice(start, end)
            start = end


def run_first(
    target: PreTrainedModel, cache: RowCache, ids: Tensor, position_ids: Tensor, ends: Tensor | None
) -> Tensor:
    """Logits [B, 1, V] float32 after the tokens at `ends` [B] of `ids` [B, T], after the last ones if that is None."""
    options: dict[str, Any] = {}
    if ends is None and target._supports_logits_to_keep():
        options["logits_to_keep"] = 1
    block = whole_rows(len(ids), ids.shape[1], ids.device)
    with cache.writing(block, is_first=True), rotating(at_once), asking_at(target, cache, ends):
        arguments = {CACHE_NAME: cache, "use_cache": True, "return_dict": True, **options}
        logits = target(input_ids=ids, position_ids=position_ids, **arguments).logits
    if ends is not None and logits.shape[1] > 1:
        logits = logits.gather(1, ends.to(logits.device)[:, None, None].expand(-1, 1, logits.shape[-1]))
    return logits[:, -1:].to(ids.device, torch.float32, copy=True)


@contextmanager
def asking_at(target: PreTrainedModel, cache: RowCache, ends: Tensor | None) -> Iterator[None]:
    """Let the target's head look at states at `ends` [B] alone: the vocabulary is wide, and pads are many."""
    head = target.get_output_embeddings()
    if ends is None or head is None:
        yield
        return

    def narrow(_module: nn.Module, args: tuple) -> tuple:
        states = args[0]
        if WRITING.get() is not cache or states.dim() != 3:
            return args
        index = ends.to(states.device)[:, None, None].expand(-1, 1, states.shape[-1])
        return states.gather(1, index), *args[1:]

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()
