"""From rows back to what the host returns: its cache, with its pads."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..decoding.phases import run_target
from ..decoding.prefill import Prompt
from ..decoding.state import DecodeState
from ..decoding.transcript import Transcript


def fill_pads(target: PreTrainedModel, prompt: Prompt, state: DecodeState, transcript: Transcript) -> None:
    """Let the target's cache hold what plain decoding leaves there behind rows that end early: its own pads."""
    assert transcript.length is not None
    num_known = torch.tensor([min(len(text), transcript.length) for text in transcript.texts])  # [B]
    width = transcript.length - int(num_known.min())
    if not width:
        return
    new = transcript.sequences(prompt.lengths.new_zeros(len(num_known), 0))  # [B, n]
    # Each row from its last text token on; what comes too much lies behind the end.
    at = (num_known - 1)[:, None] + torch.arange(width)  # [B, width]
    tokens = new.gather(1, at.clamp(max=new.shape[1] - 1).to(new.device))
    state.length.copy_(prompt.lengths + num_known.to(prompt.lengths.device))
    state.target_cache.reserve(int(state.length.max()) + width)
    run_target(target, state, tokens)


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
