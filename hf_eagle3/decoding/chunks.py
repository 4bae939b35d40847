"""A prompt that runs piece by piece, so that rows which run beside it wait for no more than a piece."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..recorder import StateRecorder
from ..rows.block import Block
from ..rows.cache import RowCache
from ..rows.layers import has_states
from .phases import run_block
from .prefill import Prompt
from .preparation import NAMES, find_override


def takes_chunks(target: PreTrainedModel) -> bool:
    """Whether a prompt of `target` may run in pieces of ours: it prepares its inputs in the host's way, and has slots.

    Positions of other targets are known behind the whole prompt only, and recurrent layers would go token by token.
    """
    return not has_states(target) and all(find_override(target, name) is None for name in NAMES)


class ChunkedPrompt:
    """The prompt of one row, as far as it has run. Its pieces are blocks, as rounds are.

    Args:
        target: The model to generate with, one that `takes_chunks`.
        recorder: Open, on it.
        input_ids: [1, T].
        device: The drafter's.
        cache: To hold what the target has seen, with room for it all.
        around: Entered around each forward.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        recorder: StateRecorder,
        input_ids: Tensor,
        device: torch.device,
        cache: RowCache,
        around: Sequence[AbstractContextManager],
    ):
        self._target, self._recorder, self._ids, self._device = target, recorder, input_ids, device
        self._cache, self._around = cache, around
        self._states: list[Tensor] = []  # [1, n, A*Ht] each
        self._logits: Tensor | None = None  # [1, 1, V], after the last piece
        self.num_done = 0

    @property
    def num_left(self) -> int:
        """Tokens that have yet to run."""
        return self._ids.shape[1] - self.num_done

    def advance(self, num_tokens: int) -> int:
        """Run up to so many tokens more; how many there were."""
        tokens = self._ids[:, self.num_done : self.num_done + num_tokens]
        block = Block(torch.full((1,), self.num_done, device=tokens.device), tokens.shape[1])
        length = self._ids.shape[1]
        options: dict[str, Any] = {"logits_to_keep": 1} if self._target._supports_logits_to_keep() else {}
        with ExitStack() as stack:
            for context in self._around:
                stack.enter_context(context)
            logits = run_block(
                self._target,
                self._cache,
                tokens,
                block,
                block.places,
                to_lengths=lambda position_ids: torch.full_like(position_ids[..., :1], length),  # as at once
                **options,
            )
        self._logits = logits[:, -1:].to(tokens.device, torch.float32, copy=True)
        self._states.append(self._recorder.take(self._device))
        self.num_done += tokens.shape[1]
        return tokens.shape[1]

    def finish(self) -> Prompt:
        """What `prefill` returns for the whole prompt."""
        assert self._logits is not None
        lengths = torch.tensor([self._ids.shape[1]], device=self._ids.device)
        columns = torch.arange(self._ids.shape[1], device=self._ids.device)[None]
        states = torch.cat(self._states, dim=1)
        parts = (self._logits, self._ids, states, lengths, torch.zeros_like(lengths)[:, None])
        return Prompt(lengths, 0, columns, *parts, self._cache, DynamicCache(), None)
