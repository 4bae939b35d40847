"""Prompts of text that run straight into the caches of their rows: nothing of the host's between, no wait for the device.

Rows are padded behind, so no mask is needed: what stands before a token is its own text.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from ..compat import CACHE_NAME
from ..recorder import StateRecorder
from ..rows.block import whole_rows
from ..rows.cache import WRITING, RowCache
from ..rows.forwards import find_special
from ..rows.rotation import at_once, rotating
from ..speculation.numbers import send
from .chunks import takes_chunks
from .prefill import Prompt

# They fill a GPU, and what more would leave behind is memory. A CPU computes pads like tokens: rows run by themselves.
MOST_AT_ONCE = {"cpu": 0, "cuda": 4096}


def runs_straight(target: PreTrainedModel) -> bool:
    """Whether prompts of `target` may: positions are its own affair alone, and its forward takes them in the usual way."""
    return takes_chunks(target) and find_special(target) is None


def prefill_straight(
    target: PreTrainedModel,
    recorder: StateRecorder,
    prompts: Sequence[Tensor],
    device: torch.device,
    cache: RowCache,
    around: Sequence[AbstractContextManager],
    *,
    most: int,
) -> Prompt:
    """The target after `prompts` [T_b]; what `prefill` returns.

    Args:
        target: One that `runs_straight`.
        recorder: Open, on it.
        prompts: Of the rows, on the target's device.
        device: The drafter's.
        cache: To hold what the target has seen of each row, with room for the longest.
        around: Entered around each forward.
        most: Tokens in one, with their pads, where rows need not run by themselves for that.
    """
    counts = [len(prompt) for prompt in prompts]
    ids = pad_sequence(list(prompts), batch_first=True)  # [B, P]
    lengths = send(counts, ids.device)
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    positions = torch.minimum(columns, lengths[:, None] - 1)  # pads have the last one's
    parts = list(split(counts, most))
    logits, states = [], None
    for part in parts:
        width = max(counts[part])
        view = cache if len(parts) == 1 else cache.view(part.start, part.stop - part.start, of=len(counts))
        with ExitStack() as stack:
            for context in around:
                stack.enter_context(context)
            ends = lengths[part] - 1 if min(counts[part]) < width else None
            logits.append(run_first(target, view, ids[part, :width], positions[part, :width], ends))
        new = recorder.take(device)  # [b, width, A*Ht]
        if len(parts) == 1:
            states = new
            break
        states = new.new_zeros(*ids.shape, new.shape[-1]) if states is None else states
        states[part, :width] = new
    assert states is not None
    shift = torch.zeros_like(lengths)[:, None]
    return Prompt(
        lengths, 0, columns, torch.cat(logits), ids, states, lengths.clone(), shift, cache, DynamicCache(), None
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
