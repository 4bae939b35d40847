"""Our decode loop: chains, any number of rows, targets with attention caches.

Rounds of draft, verify, accept, commit over a batch whose rows accept different numbers. Sizes in a round are fixed by
the number of rows and the depth; between prepare and read there are tensors only, and one read a round.

Shapes: B rows in the batch, K draft tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessorList, PreTrainedModel

from .accept import Verdict, accept_greedy, accept_sampled
from .cache import CACHE_NAME
from .draft import Choose, Draft, choose_greedy, make_choose_sampled
from .features import StateRecorder
from .prefill import Prompt
from .rows import RowCache, make_masks, to_bucket
from .sampling import make_to_probs, stateless_warpers
from .stats import Speculation, Stopwatch
from .transcript import Transcript, processors_for_rows


@dataclass(frozen=True)
class DecodeConfig:
    """What a call asks of the loop."""

    depth: int  # K
    do_sample: bool
    processors: LogitsProcessorList
    max_length: int | None  # of a row without pads: no position at or behind it is ever read
    keeps_rows: bool = False  # rows that are done stay, so that the target's cache can be returned


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
    target_cache: RowCache
    drafter_cache: RowCache


class Clocks(NamedTuple):
    """Where the time of a call goes; the rest is verification."""

    draft: Stopwatch
    accept: Stopwatch
    host: Stopwatch


class Round(NamedTuple):
    """A round as `decode` reports it, once all is committed."""

    rows: list[int]  # [B] which rows of the call took part
    state: DecodeState
    num_new: list[int]  # [B] tokens that became text


class NotANumberError(ValueError):
    """The target's logits are NaN."""


def prepare(drafter: PreTrainedModel, prompt: Prompt, *, depth: int) -> DecodeState:
    """The state behind the prompts, without a root yet: the drafter has seen all states but the last of each row."""
    B, M, width = prompt.states.shape
    first = prompt.lengths - prompt.num_states  # [B]
    capacity = to_bucket(M)
    cache = RowCache(drafter.config.num_hidden_layers, capacity)
    if M > 1:
        # Behind a row's last state but one comes junk, which later writes cover.
        slots = torch.arange(M - 1, device=drafter.device).expand(B, M - 1)
        with cache.writing(slots, is_first=True):
            drafter(
                input_ids=prompt.tokens[:, 1:].to(drafter.device),
                aux_hidden_states=prompt.states[:, :-1],
                position_ids=slots + first[:, None].to(drafter.device),
                past_key_values=cache,
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
        target_cache=prompt.cache,
        drafter_cache=cache,
    )


def draft(drafter: PreTrainedModel, state: DecodeState, *, depth: int, choose: Choose) -> Draft:
    """Propose `depth` tokens after each row's root.

    The first draft step runs over K+1 positions in every row; what it writes behind a row's last pending state is junk,
    as is all that the later steps write. Lengths say so, and no mask shows it.
    """
    cache, device = state.drafter_cache, drafter.device
    first = state.first[:, None].to(device)  # [B, 1]
    last = (state.num_pending - 1)[:, None].to(device)  # [B, 1]
    start = (state.length - 1 - state.num_pending)[:, None].to(device) - first  # [B, 1], of the first pending state
    slots = start + torch.arange(state.block.shape[1], device=device)  # [B, K+1]
    with cache.writing(slots):
        out = drafter(
            input_ids=state.block.to(device),
            aux_hidden_states=state.states,
            attention_mask=make_masks(drafter.config, slots, cache.capacity, drafter.dtype),
            position_ids=slots + first,
            past_key_values=cache,
            logits_to_keep=last,
        )
    feedback = out.feedback.gather(1, last[..., None].expand(-1, -1, out.feedback.shape[-1]))  # [B, 1, H]
    slots = start + last  # [B, 1]
    tokens: list[Tensor] = []
    probs: list[Tensor] = []
    for step in range(depth):
        if step:
            slots = slots + 1
            with cache.writing(slots):
                out = drafter(
                    input_ids=tokens[-1][:, None],
                    hidden_states=feedback,
                    attention_mask=make_masks(drafter.config, slots, cache.capacity, drafter.dtype),
                    position_ids=slots + first,
                    past_key_values=cache,
                )
            feedback = out.feedback
        draft_ids, q = choose(out.logits[:, -1])  # [B], [B, V_d]
        tokens.append(drafter.to_target_ids(draft_ids))
        if q is not None:
            probs.append(q)
    return Draft(torch.stack(tokens, dim=1), torch.stack(probs, dim=1) if probs else None)


def verify(target: PreTrainedModel, state: DecodeState, draft_tokens: Tensor, *, max_length: int | None) -> Tensor:
    """Logits [B, K+1, V] float32 after the root and each of `draft_tokens` [B, K]."""
    tokens = torch.cat([state.root[:, None], draft_tokens.to(state.root.device)], dim=1)  # [B, K+1]
    return run_target(target, state, tokens, max_length=max_length).to(tokens.device, torch.float32)


def run_target(target: PreTrainedModel, state: DecodeState, tokens: Tensor, *, max_length: int | None) -> Tensor:
    """Logits [B, T, V] of `tokens` [B, T], the first in each row's slot length-1."""
    cache = state.target_cache
    slots = (state.length - 1)[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    # Nothing behind the end is kept, but a learned position embedding has no row for it.
    position_ids = slots if max_length is None else slots.clamp(max=max_length - 1)
    text_config = target.config.get_text_config(decoder=True)
    with cache.writing(slots):
        out = target(
            input_ids=tokens,
            attention_mask=make_masks(text_config, slots, cache.capacity, target.dtype),
            position_ids=position_ids + state.shift,
            **{CACHE_NAME: cache},
            use_cache=True,
            return_dict=True,
        )
    return out.logits


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


def scatter_probs(drafter: PreTrainedModel, drafted: Draft, like: Tensor) -> Tensor | None:
    """The probabilities q [B, K, V] over the target's vocabulary, zero outside the draft vocabulary, where `like` [B, K+1, V] is."""
    if drafted.probs is None:
        return None
    B, K, _ = drafted.probs.shape
    probs = drafted.probs.new_zeros(B, K, like.shape[-1])
    return probs.scatter_(-1, drafter.draft_to_target_ids.expand(B, K, -1), drafted.probs).to(like.device)


def accept_in_order(
    draft_tokens: Tensor,  # [B, K]
    q: Tensor | None,  # [B, K, V], None for a greedy draft
    logits: Tensor,  # [B, K+1, V]
    *,
    rows: list[int],
    transcript: Transcript,
    processors: list[LogitsProcessorList],
    do_sample: bool,
) -> Verdict:
    """Accept token by token in Python, for processors that look at the text.

    Each token is chosen, appended and only then followed by the next position, so that processors are called with
    exactly the prefixes that become text, once each and in order, as in plain decoding.
    """
    K = draft_tokens.shape[1]
    counts, last = [], []
    for b, row in enumerate(rows):
        k, token = 0, 0
        for k in range(K + 1 if transcript.is_live(row) else 0):
            scores = processors[row](transcript.prefix(row), logits[b, k][None].clone())  # [1, V]
            proposed = draft_tokens[b : b + 1, k : k + 1]  # [1, 1], or [1, 0] past the last draft token
            if do_sample:
                p = scores.softmax(dim=-1)[:, None]  # [1, 1, V]
                # Past the last draft token, and as the second position, which is not looked at: p itself.
                q_here = p[:, :0] if k == K or q is None else q[b : b + 1, k : k + 1]  # [1, 0 or 1, V]
                verdict = accept_sampled(proposed, q_here, p.expand(1, 1 + proposed.shape[1], -1))
            else:
                verdict = accept_greedy(proposed, scores[:, None].expand(1, 1 + proposed.shape[1], -1))
            is_accepted = bool(verdict.num_accepted)  # a wait for each token: the next prefix depends on it
            token = int(proposed) if is_accepted else int(verdict.next_token)
            is_done = transcript.append(row, token, scores[0], logits[b, k])
            if is_done or not is_accepted:
                break
        # A row that ends on a draft token is dropped, so its next token does not matter.
        counts.append(k)
        last.append(token)
    device = draft_tokens.device
    return Verdict(torch.tensor(counts, device=device), torch.tensor(last, device=device))


def decode(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    recorder: StateRecorder,
    prompt: Prompt,
    *,
    config: DecodeConfig,
    transcript: Transcript,
    told: Speculation,
    clocks: Clocks,
) -> Iterator[Round]:
    """Generate until the transcript is over; yields after each round, the one that only chooses first tokens included."""
    warpers = stateless_warpers(config.processors)
    to_probs = make_to_probs(warpers)
    choose = make_choose_sampled(to_probs) if config.do_sample else choose_greedy
    in_order = len(warpers) < len(config.processors)
    rows = list(range(len(prompt.lengths)))
    processors = processors_for_rows(config.processors, len(rows))
    told.rows = [Speculation(told.loop, told.why, told.depth) for _ in rows]

    with clocks.draft:
        state = prepare(drafter, prompt, depth=config.depth)
    logits, draft_tokens, q, states = prompt.logits, state.block[:, :0], None, None
    while True:
        started = [len(transcript.texts[row]) for row in rows]
        if in_order:
            with clocks.host:
                raise_if_nan(bool(logits[:, 0].isnan().any()))
                verdict = accept_in_order(
                    draft_tokens,
                    q,
                    logits,
                    rows=rows,
                    transcript=transcript,
                    processors=processors,
                    do_sample=config.do_sample,
                )
        else:
            with clocks.accept:
                scores = logits
                for warper in warpers:
                    flat = scores.flatten(0, 1)  # [B*(K+1), V]
                    scores = warper(flat.new_empty(len(flat), 0, dtype=torch.long), flat).view_as(scores)
                if config.do_sample:
                    verdict = accept_sampled(draft_tokens, scores[:, :0] if q is None else q, scores.softmax(-1))
                else:
                    verdict = accept_greedy(draft_tokens, scores)
                is_nan = logits[:, 0].isnan().any()
        commit(state, draft_tokens, verdict, states)

        K = draft_tokens.shape[1]
        if not in_order:
            told_by_device = [state.block[:, : K + 1].flatten(), verdict.num_accepted, is_nan.long()[None]]
            report = torch.cat(told_by_device).tolist()  # the round's read
            raise_if_nan(bool(report[-1]))
            with clocks.host:
                for b, row in enumerate(rows):
                    for k in range(report[len(rows) * (K + 1) + b] + 1 if transcript.is_live(row) else 0):
                        if transcript.append(row, report[b * (K + 1) + k], scores[b, k], logits[b, k]):
                            break

        num_new = [len(transcript.texts[row]) - before for row, before in zip(rows, started, strict=True)]
        for row, before, new in zip(rows, started, num_new, strict=True):
            # Near the length limit the last draft tokens never had a chance.
            room = K if transcript.max_new is None else min(K, transcript.max_new - before - 1)
            for speculation in (told, told.rows[row]) if new else ():
                speculation.count(room, new - 1)
        with clocks.host:
            transcript.stream()
        yield Round(rows, state, num_new)
        if transcript.is_over:
            return
        kept = [b for b, row in enumerate(rows) if transcript.is_live(row)]
        if len(kept) < len(rows) and not config.keeps_rows:
            keep_rows(state, kept)
            rows = [rows[b] for b in kept]

        longest = int(prompt.lengths.max()) + max(len(text) for text in transcript.texts)
        for cache in (state.target_cache, state.drafter_cache):
            cache.reserve(longest + 2 * config.depth + 2)
        with clocks.draft:
            drafted = draft(drafter, state, depth=config.depth, choose=choose)
        draft_tokens = drafted.tokens.to(state.root.device)
        logits = verify(target, state, draft_tokens, max_length=config.max_length)
        states = recorder.take(drafter.device)
        q = scatter_probs(drafter, drafted, logits)


def raise_if_nan(is_nan: bool) -> None:
    """Name what would otherwise end in token 0, or in a complaint of the sampler."""
    if is_nan:
        raise NotANumberError(
            "The target's logits are NaN. Its weights are broken, or it overflows in this dtype: load it in bfloat16 "
            "or float32."
        )
