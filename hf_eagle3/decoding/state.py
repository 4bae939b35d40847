"""What a batch carries from round to round."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessorList, PreTrainedModel

from ..rows.cache import RowCache
from ..speculation.accept import Verdict
from .prefill import Prompt, is_by_rows
from .preparation import AskedPositions


@dataclass(frozen=True)
class DecodeConfig:
    """What a call asks of the loop."""

    depth: int  # K; 0: decode without drafting
    do_sample: bool
    processors: LogitsProcessorList
    max_length: int | None  # of a row without pads: nothing at or behind that position is ever read
    simulated_length: float | None = None  # accept as if drafts were that good, to measure speed
    keeps_rows: bool = False  # rows that are done stay: their cache is returned, or hooks of others count on them
    in_step: bool = False  # rows accept as many tokens as one another, since a processor may look at the whole batch
    starts_anew: int | None = None  # after so many tokens of a text the target computes its cache anew


@dataclass(slots=True)
class DecodeState:
    """What a batch carries from round to round. Only `commit` and `keep_rows` write to it.

    Between rounds, row by row: the target's cache holds the slots 0..length-2, all verified tokens but the root. The
    drafter's cache holds those before the pending states, each computed from the target's own states. A drafter that
    has not seen the beginning of a text has its slots counted from `first`.
    """

    length: Tensor  # [B] int64, verified tokens
    root: Tensor  # [B] int64, the newest of them
    block: Tensor  # [B, K+1] int64, the token after each pending state; junk from num_pending on
    states: Tensor  # [B, K+1, A*Ht], pending: made by the target, not seen by the drafter
    num_pending: Tensor  # [B] int64, 1..K+1; the last pending state is at position length-2
    first: Tensor  # [B] int64, position of the drafter's slot 0
    shift: Tensor  # [B, 1] or [axes, B, 1] int64, the target's position ids less its slots
    last_position: Tensor  # [] int64: nothing behind it is ever read, and a learned position embedding may end there
    target_cache: RowCache
    drafter_cache: RowCache
    asked: AskedPositions | None = None  # the target's position ids where `shift` does not say them


def prepare(
    drafter: PreTrainedModel, prompt: Prompt, *, depth: int, max_length: int | None, cache: RowCache | None = None
) -> DecodeState:
    """The state behind the prompts, without a root yet: the drafter has seen all states but the last of each row.

    `cache` is the drafter's, if there is one to write to; `max_length` that of `DecodeConfig`.
    """
    B, M, width = prompt.states.shape
    first = prompt.lengths - prompt.num_states  # [B]
    if cache is None:
        # As long as the target's, since a row that is done may run on to the end of that.
        cache = RowCache(drafter.config.num_hidden_layers, prompt.cache.capacity)
    if is_by_rows(prompt.num_states, M):
        parts = [(slice(b, b + 1), num_states - 1) for b, num_states in enumerate(prompt.num_states.tolist())]
    else:
        parts = [(slice(0, B), M - 1)]  # behind a row's last state but one comes junk, which later writes cover
    for part, num_slots in parts if depth else []:
        if not num_slots:
            continue
        slots = torch.arange(num_slots, device=drafter.device).expand(part.stop - part.start, num_slots)
        view = cache if len(parts) == 1 else cache.view(part.start, 1, of=B)
        with view.writing(slots, is_first=True):
            drafter(
                input_ids=prompt.tokens[part, 1 : num_slots + 1].to(drafter.device),
                aux_hidden_states=prompt.states[part, :num_slots],
                position_ids=slots + first[part, None].to(drafter.device),
                past_key_values=view,
                logits_to_keep=1,
            )
    states = prompt.states.new_zeros(B, depth + 1, width)
    rows = torch.arange(B, device=states.device)
    states[:, 0] = prompt.states[rows, (prompt.num_states - 1).to(states.device)]
    return DecodeState(
        length=prompt.lengths.clone(),
        root=torch.zeros_like(prompt.lengths),
        block=prompt.lengths.new_zeros(B, depth + 1),
        states=states,
        num_pending=torch.ones_like(prompt.lengths),
        first=first,
        shift=prompt.shift,
        last_position=prompt.lengths.new_tensor(2**62 if max_length is None else max_length - 1 + prompt.extra),
        target_cache=prompt.cache,
        drafter_cache=cache,
        asked=prompt.asked,
    )


def commit(state: DecodeState, draft_tokens: Tensor, verdict: Verdict, states: Tensor | None) -> None:
    """Make the accepted tokens and the next token text: lengths move, the caches stay as they are.

    Args:
        state: Changed in place, each tensor where it is.
        draft_tokens: [B, K].
        verdict: Over them.
        states: [B, K+1, A*Ht], the target's, of root and draft tokens; None after the prompt's forward, K = 0, whose
            last state is pending already.
    """
    K = draft_tokens.shape[1]
    block = functional.pad(draft_tokens, (0, 1)).scatter(1, verdict.num_accepted[:, None], verdict.next_token[:, None])
    state.block[:, : K + 1].copy_(block)
    if states is not None:
        state.states.copy_(states)
    state.num_pending.copy_(verdict.num_accepted + 1)
    # A row that is done and stays goes on over junk. It must not leave the cache.
    longest = state.target_cache.capacity - state.block.shape[1]
    state.length.copy_((state.length + verdict.num_accepted + 1).clamp(max=longest))
    state.root.copy_(verdict.next_token)


def keep_rows(state: DecodeState, kept: list[int]) -> None:
    """Drop all rows but `kept`, places in the batch."""
    rows = torch.tensor(kept, dtype=torch.long, device=state.length.device)
    state.length, state.root, state.block = state.length[rows], state.root[rows], state.block[rows]
    state.states, state.num_pending = state.states[rows.to(state.states.device)], state.num_pending[rows]
    state.first, state.shift = state.first[rows], state.shift[..., rows, :]
    state.target_cache.select(rows)
    state.drafter_cache.select(rows)
    if state.asked is not None:
        state.asked.keep(kept)
