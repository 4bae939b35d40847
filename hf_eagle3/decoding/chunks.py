"""A prompt that runs piece by piece, so that rows which run beside it wait for no more than a piece."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from ..drafters.draft import DrafterKind, DrafterMemory, Prompted
from ..recorder import StateRecorder
from ..rows.block import Block
from ..rows.cache import RowCache, to_bucket
from ..rows.layers import has_states
from ..speculation.shape import Shapes
from .phases import run_block
from .prefill import Prompt
from .preparation import NAMES, find_override


def takes_chunks(target: PreTrainedModel) -> bool:
    """Whether a prompt of `target` may run in pieces of ours: it prepares its inputs in the host's way, and has slots.

    Positions of other targets are known behind the whole prompt only, and recurrent layers would go token by token.
    """
    return not has_states(target) and all(find_override(target, name) is None for name in NAMES)


class Beginning(NamedTuple):
    """How a drafter begins with rows, as soon as the target has run over some of them."""

    kind: DrafterKind
    drafter: PreTrainedModel | None
    shapes: Shapes
    cache: RowCache  # the drafter's of all rows, with room for the longest prompt
    clock: AbstractContextManager  # entered around it

    def begin(self, tokens: Tensor, states: Tensor, counts: Tensor, part: slice, *, of: int) -> DrafterMemory:
        """Its memory of a part of the rows.

        Args:
            tokens: [b, M].
            states: [b, M, A*Ht], the target's.
            counts: [b], how many there are.
            part: Which rows these are.
            of: How many there are in all.
        """
        num_rows = part.stop - part.start
        cache = self.cache if num_rows == of else self.cache.view(part.start, num_rows, of=of)
        prompted = Prompted(tokens, states, counts, torch.zeros_like(counts))
        return self.kind.begin(self.drafter, prompted, self.shapes, cache=cache)


class ChunkedPrompt:
    """The prompt of one row, as far as it has run. Its pieces are blocks, as rounds are.

    Args:
        target: The model to generate with, one that `takes_chunks`.
        recorder: Open, on it.
        input_ids: [1, T].
        cache: To hold what the target has seen, with room for it all.
        beginning: What the drafter begins with.
        around: Entered around each forward.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        recorder: StateRecorder,
        input_ids: Tensor,
        cache: RowCache,
        beginning: Beginning,
        around: Sequence[AbstractContextManager],
    ):
        self._target, self._recorder, self._ids, self._cache = target, recorder, input_ids, cache
        self._beginning, self._around = beginning, around
        self._memory: DrafterMemory | None = None  # with the last state alone pending
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
                visible=to_bucket(self.num_done + tokens.shape[1]),
                **options,
            )
            drafter = self._beginning.drafter
            states = self._recorder.take((self._target if drafter is None else drafter).device)
            with self._beginning.clock:
                self._memory = self._read(states)
        self._logits = logits[:, -1:].to(tokens.device, torch.float32, copy=True)
        self.num_done += tokens.shape[1]
        return tokens.shape[1]

    def _read(self, states: Tensor) -> DrafterMemory:
        """The drafter's memory behind the `states` [1, n, A*Ht] of a piece, of which it reads all but the last."""
        start, memory = self.num_done, self._memory
        following = self._ids[:, start + 1 : start + 1 + states.shape[1]].to(states.device)
        tokens = pad(following, (0, states.shape[1] - following.shape[1]))  # nobody knows the one behind the prompt
        begun = torch.zeros(1, dtype=torch.long, device=states.device)
        if memory is not None:
            tokens, states = torch.cat([memory.tokens, tokens], dim=1), torch.cat([memory.states, states], dim=1)
            begun = memory.start
        kind, drafter, shapes, cache, _ = self._beginning
        pending = torch.full_like(begun, states.shape[1])
        values = (tokens, states, pending, begun, torch.zeros_like(begun))
        memory = DrafterMemory(*values, room=shapes.num_drafter_slots, cache=cache)
        if drafter is None:
            return replace(memory, tokens=tokens[:, -1:], states=states[:, -1:])
        kind.read_pending(drafter, memory)
        return replace(memory, tokens=memory.tokens[:, :1].clone(), states=memory.states[:, :1].clone())

    def finish(self) -> Prompt:
        """What `prefill` returns for the whole prompt."""
        assert self._logits is not None
        assert self._memory is not None
        lengths = torch.tensor([self._ids.shape[1]], device=self._ids.device)
        columns = torch.arange(self._ids.shape[1], device=self._ids.device)[None]
        zeros = torch.zeros_like(lengths)[:, None]
        memory, more = self._memory, self._beginning.shapes.num_pending - 1
        memory = replace(
            memory, tokens=pad(torch.zeros_like(memory.tokens), (0, more)), states=pad(memory.states, (0, 0, 0, more))
        )
        if self._beginning.drafter is None:
            prompted = Prompted(self._ids, memory.states, lengths, lengths - 1)
            memory = self._beginning.kind.begin(None, prompted, self._beginning.shapes)
        parts = (self._logits, self._ids, zeros[..., None][:, :0], lengths, zeros)
        return Prompt(lengths, 0, columns, *parts, self._cache, DynamicCache(), None, memory)
