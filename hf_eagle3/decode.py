"""Our decode loop: chains, any number of rows, targets with attention caches.

Rounds of draft, verify, accept, commit over a batch whose rows accept different numbers. Sizes in a round are fixed by
the number of rows and the depth; between prepare and read there are tensors only, and one read a round.

Shapes: B rows in the batch, K draft tokens.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LogitsProcessorList, PreTrainedModel

from .accept import Verdict, accept_greedy, accept_next, accept_sampled, accept_simulated
from .cache import CACHE_NAME
from .draft import Choose, Draft, choose_at_once, choose_greedy, make_choose_sampled
from .features import StateRecorder, find_layers
from .peers import Agree, make_agree
from .prefill import Prompt, is_by_rows
from .preparation import AskedPositions
from .rotation import at_once, one_by_one, rotating
from .rows import WRITING, Masks, RowCache, make_masks
from .sampling import make_to_probs, stateless_warpers
from .stats import Speculation, Stopwatch
from .stopping import has_nan, raise_if_nan
from .transcript import Transcript, processors_for_rows


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


class Clocks(NamedTuple):
    """Where the time of a call goes; the rest is verification."""

    draft: Stopwatch
    accept: Stopwatch
    host: Stopwatch


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


def draft(drafter: PreTrainedModel, state: DecodeState, *, depth: int, choose: Choose) -> Draft:
    """Propose `depth` tokens after each row's root.

    The first draft step runs over K+1 positions in every row; what it writes behind a row's last pending state is junk,
    as is all that the later steps write. Lengths say so, and no mask shows it.
    """
    if drafter.config.is_parallel:
        return draft_parallel(drafter, state, depth=depth, choose=choose)
    cache, device = state.drafter_cache, drafter.device
    first = state.first[:, None].to(device)  # [B, 1]
    last = (state.num_pending - 1)[:, None].to(device)  # [B, 1]
    start = (state.length - 1 - state.num_pending)[:, None].to(device) - first  # [B, 1], of the first pending state
    slots = start + torch.arange(state.block.shape[1], device=device)  # [B, K+1]
    with cache.writing(slots):
        out = drafter(
            input_ids=state.block.to(device),
            aux_hidden_states=state.states,
            attention_mask=make_masks(drafter.config, slots, cache.num_visible, drafter.dtype),
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
                    attention_mask=make_masks(drafter.config, slots, cache.num_visible, drafter.dtype),
                    position_ids=slots + first,
                    past_key_values=cache,
                )
            feedback = out.feedback
        draft_ids, q = choose(out.logits[:, -1])  # [B], [B, V_d]
        tokens.append(drafter.to_target_ids(draft_ids))
        if q is not None:
            probs.append(q)
    return Draft(torch.stack(tokens, dim=1), torch.stack(probs, dim=1) if probs else None)


def draft_parallel(drafter: PreTrainedModel, state: DecodeState, *, depth: int, choose: Choose) -> Draft:
    """Propose `depth` tokens after each row's root by one forward of a P-EAGLE drafter.

    It runs over 2K positions in every row: the pending states, and masks from there on, of which the first K-1 count.
    """
    cache, device = state.drafter_cache, drafter.device
    first = state.first[:, None].to(device)  # [B, 1]
    num_pending = state.num_pending[:, None].to(device)  # [B, 1]
    start = state.length[:, None].to(device) - 1 - num_pending - first  # [B, 1], the slot of the first pending state
    # A row that is done and stays goes on over junk. It must not leave the cache.
    slots = start.clamp(max=cache.capacity - 2 * depth) + torch.arange(2 * depth, device=device)  # [B, 2K]
    ids = functional.pad(state.block.to(device), (0, depth - 1))  # [B, 2K]
    states = functional.pad(state.states, (0, 0, 0, depth - 1))  # [B, 2K, A*Ht]
    ids, states = drafter.with_masks(ids, states, num_pending)
    with cache.writing(slots):
        out = drafter(
            input_ids=ids,
            aux_hidden_states=states,
            attention_mask=make_masks(drafter.config, slots, cache.num_visible, drafter.dtype),
            position_ids=slots + first,
            past_key_values=cache,
            logits_to_keep=num_pending - 1 + torch.arange(depth, device=device),  # [B, K]
        )
    return choose_at_once(drafter, out.logits, choose)


def verify(target: PreTrainedModel, state: DecodeState, draft_tokens: Tensor) -> Tensor:
    """Logits [B, K+1, V] after the root and each of `draft_tokens` [B, K]: float32, or 16 bits if the target's are."""
    tokens = torch.cat([state.root[:, None], draft_tokens.to(state.root.device)], dim=1)  # [B, K+1]
    logits = run_target(target, state, tokens).to(tokens.device)
    return logits if logits.itemsize == 2 else logits.float()


def run_target(target: PreTrainedModel, state: DecodeState, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of `tokens` [B, T], the first in each row's slot length-1."""
    cache = state.target_cache
    slots = (state.length - 1)[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    places = torch.minimum(slots, state.last_position)
    position_ids = places + state.shift if state.asked is None else state.asked(places, tokens)
    text_config = target.config.get_text_config(decoder=True)
    with cache.writing(slots):
        masks = make_masks(text_config, slots, cache.num_visible, target.dtype)
        with handing_over(masks, target) as masks, rotating(one_by_one):
            out = target(
                input_ids=tokens,
                attention_mask=masks,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
                use_cache=True,
                return_dict=True,
            )
    return out.logits


@contextmanager
def handing_over(masks: Masks | None, target: PreTrainedModel) -> Iterator[Masks | None]:
    """What to give `target` as a mask so that its text decoder gets `masks`.

    Masks by layer type go to the decoder itself where another module calls it, since that may want a tensor.
    """
    decoder, _ = find_layers(target)
    if not isinstance(masks, dict) or target.config is target.config.get_text_config(decoder=True):
        yield masks
        return
    cache = WRITING.get()

    def hand_over(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, ({**kwargs, "attention_mask": masks} if WRITING.get() is cache else kwargs)

    handle = decoder.register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        yield None
    finally:
        handle.remove()


def start_anew(target: PreTrainedModel, cache: RowCache, text: Tensor) -> None:
    """Let the `cache` of one row hold what it would if `text` [1, n] had been its prompt."""
    slots = torch.arange(text.shape[1], device=text.device)[None]  # [1, n]
    cache.reserve(text.shape[1])
    options = {"logits_to_keep": 1} if target._supports_logits_to_keep() else {}
    with cache.writing(slots, is_first=True), rotating(at_once):
        target(input_ids=text, position_ids=slots, **{CACHE_NAME: cache}, use_cache=True, return_dict=True, **options)


def stop_before(verdict: Verdict, draft_tokens: Tensor, limit: Tensor) -> Verdict:
    """`verdict` over `draft_tokens` [B, K], with no more of them kept than `limit` [B]: the next one is the next token."""
    if not draft_tokens.shape[1]:
        return verdict
    limit = limit.clamp(max=draft_tokens.shape[1])
    kept = draft_tokens.gather(1, limit.clamp(max=draft_tokens.shape[1] - 1)[:, None])[:, 0]
    is_over = verdict.num_accepted > limit
    return Verdict(torch.minimum(verdict.num_accepted, limit), torch.where(is_over, kept, verdict.next_token))


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


def scatter_probs(drafter: PreTrainedModel, probs: Tensor, vocab_size: int) -> Tensor:
    """The probabilities q [B, K, V] of `probs` [B, K, V_d]: over the target's vocabulary, zero outside the drafter's."""
    q = probs.new_zeros(*probs.shape[:2], vocab_size)
    return q.scatter_(-1, drafter.draft_to_target_ids.expand_as(probs), probs)


def accept_in_order(
    draft_tokens: Tensor,  # [B, K]
    q: Tensor | None,  # [B, K, V], None for a greedy draft
    logits: Tensor,  # [B, K+1, V]
    *,
    rows: list[int],
    transcript: Transcript,
    processors: list[LogitsProcessorList],
    do_sample: bool,
    agree: Agree,
    limits: list[int],  # draft tokens that may be kept, for each of the rows
) -> Verdict:
    """Accept token by token in Python, for processors that look at the text.

    Each token is chosen, appended and only then followed by the next position, so that processors are called with
    exactly the prefixes that become text, once each and in order, as in plain decoding.
    """
    K = draft_tokens.shape[1]
    counts, last = [], []
    for b, row in enumerate(rows):
        k, token = 0, 0
        for k in range(min(K, limits[b]) + 1 if transcript.is_live(row) else 0):
            # [1, V]. Processors that write in place change what is returned as logits, too, as in plain decoding.
            chosen_from = logits[b, k][None].to(torch.float32, copy=True)
            scores = processors[row](transcript.prefix(row), chosen_from)  # [1, V]
            proposed = draft_tokens[b : b + 1, k : k + 1]  # [1, 1], or [1, 0] past the last draft token
            q_here = None if q is None else q[b : b + 1, k : k + 1]  # [1, 0 or 1, V]
            verdict = accept_next(proposed, q_here, scores, do_sample=do_sample)
            verdict = Verdict(*map(agree, verdict))
            is_accepted = bool(verdict.num_accepted)  # a wait for each token: the next prefix depends on it
            token = int(proposed) if is_accepted else int(verdict.next_token)
            is_done = transcript.append(row, token, scores[0], chosen_from[0])
            if is_done or not is_accepted:
                break
        # A row that ends on a draft token is dropped, so its next token does not matter.
        counts.append(k)
        last.append(token)
    device = draft_tokens.device
    return Verdict(torch.tensor(counts, device=device), torch.tensor(last, device=device))


def accept_in_step(
    draft_tokens: Tensor,  # [B, K]
    q: Tensor | None,  # [B, K, V], None for a greedy draft
    logits: Tensor,  # [B, K+1, V]
    *,
    rows: list[int],  # all of them: none leaves
    transcript: Transcript,
    processors: list[LogitsProcessorList],  # one, for all rows
    do_sample: bool,
    agree: Agree,
    limits: list[int],  # draft tokens that may be kept, for each of the rows
) -> Verdict:
    """Accept column by column over all rows, for processors that may look at the whole batch.

    They are called with exactly the batches of plain decoding, once each and in order. Since the next batch depends on
    all rows, the round ends for all where one refuses its draft token. Rows that have ended are in the batches with the
    pads that were put in the place of their drafts; a row that ends here has a draft of its own, so the round ends, too.
    """
    B, K = draft_tokens.shape
    assert len(rows) == B == len(transcript.texts)
    drafts = draft_tokens.tolist()
    last = min([K, *(limits[b] for b in range(B) if not transcript.is_padded(b))])
    for k in range(last + 1):
        chosen_from = logits[:, k].to(torch.float32, copy=True)  # [B, V]
        scores = processors[0](transcript.shown, chosen_from)  # [B, V]
        proposed = draft_tokens[:, k : k + 1]  # [B, 1], or [B, 0] past the last draft token
        q_here = None if q is None else q[:, k : k + 1]  # [B, 0 or 1, V]
        verdict = accept_next(proposed, q_here, scores, do_sample=do_sample)
        is_kept, tokens = (agree(x).tolist() for x in verdict)  # a wait for each column, as in plain decoding
        goes_on = k < last
        for b in range(B):
            if transcript.is_padded(b):
                tokens[b] = transcript.pad
            elif is_kept[b]:
                tokens[b] = drafts[b][k]
            else:
                goes_on = False
        num_padded = transcript.num_padded
        transcript.append_column(tokens, scores, chosen_from)
        if not goes_on or transcript.is_over or transcript.num_padded > num_padded:
            break
    device = draft_tokens.device
    return Verdict(torch.full((B,), k, device=device), torch.tensor(tokens, device=device))


def put_pads(draft_tokens: Tensor, transcript: Transcript) -> None:
    """Let rows that have ended draft their pads, [B, K] in place, as plain decoding goes on with those."""
    if padded := [b for b in range(len(draft_tokens)) if transcript.is_padded(b)]:
        draft_tokens[padded] = transcript.pad


class Drafted(NamedTuple):
    """What a round proposes, on the target's device."""

    tokens: Tensor  # [B, K] int64
    q: Tensor | None  # [B, K, V] float32, the law they were drawn from; None for a greedy draft


class Verified(NamedTuple):
    """What the target says to it."""

    logits: Tensor  # [B, K+1, V], float32 or 16 bits
    states: Tensor | None  # [B, K+1, A*Ht]; None of the prompt, whose last state is pending already


class Settled(NamedTuple):
    """What came of it."""

    report: Tensor  # [B*(K+1) + B + 1] int64: the new block, how many draft tokens were kept, whether there is a NaN
    scores: Tensor  # [B, K+1, V], what tokens were chosen by; float32 but where the logits themselves were


class Letter:
    """A report on its way to the host, which need not wait for it yet."""

    def __init__(self, report: Tensor):
        self._copy = torch.empty(report.shape, dtype=report.dtype, pin_memory=report.is_cuda)
        self._copy.copy_(report, non_blocking=report.is_cuda)
        self._event = torch.cuda.Event() if report.is_cuda else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(report.device))

    def read(self) -> list[int]:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


class Launched(NamedTuple):
    """A settled round that the host has not looked at yet."""

    rows: list[int]  # [B] which rows of the call take part
    K: int
    letter: Letter
    scores: Tensor
    logits: Tensor


class Phases:
    """The phases of a round over one batch, in eager PyTorch: tensors in, tensors out, and no wait for the device.

    This defines what a round does; `graphs.CapturedPhases` replays it.

    Args:
        around: Entered around the forwards of each eager round, to let the models compute the same in other ways.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: PreTrainedModel,
        recorder: StateRecorder,
        state: DecodeState,
        config: DecodeConfig,
        around: Sequence[AbstractContextManager] = (),
    ):
        self._around = around
        self.target, self.drafter, self.recorder, self.state, self.config = target, drafter, recorder, state, config
        self.warpers = stateless_warpers(config.processors)
        # Whether some processor looks at the text, so that tokens are chosen one after the other.
        self.in_order = config.in_step or len(self.warpers) < len(config.processors)
        self.agree = make_agree(target)
        self.choose: Choose = make_choose_sampled(make_to_probs(self.warpers)) if config.do_sample else choose_greedy

    def draft(self) -> Drafted:
        """Propose K tokens in each row."""
        if not self.config.depth:
            return Drafted(self.state.block[:, :0], None)
        tokens, probs = draft(self.drafter, self.state, depth=self.config.depth, choose=self.choose)
        device = self.state.root.device
        tokens = self.agree(tokens.to(device))
        if probs is None:
            return Drafted(tokens, None)
        V = self.target.config.get_text_config(decoder=True).vocab_size
        return Drafted(tokens, scatter_probs(self.drafter, probs, V).to(device))

    def verify(self, drafted: Drafted) -> Verified:
        """Run the target over the root and the draft."""
        logits = verify(self.target, self.state, drafted.tokens)
        return Verified(logits, self.recorder.take(self.drafter.device))

    def settle(self, drafted: Drafted, verified: Verified) -> Settled:
        """Accept and commit, where processors look at scores alone."""
        tokens, q = drafted
        # The likeliest of 16 bits is the likeliest of 32; what processors and probabilities see is the host's float32.
        scores = verified.logits.float() if self.warpers or self.config.do_sample else verified.logits
        for warper in self.warpers:
            flat = scores.flatten(0, 1)  # [B*(K+1), V]
            scores = warper(flat.new_empty(len(flat), 0, dtype=torch.long), flat).view_as(scores)
        if self.config.simulated_length is not None:
            verdict = accept_simulated(tokens, scores, self.config.simulated_length)
        elif self.config.do_sample:
            verdict = accept_sampled(tokens, scores[:, :0] if q is None else q, scores.softmax(-1))
        else:
            verdict = accept_greedy(tokens, scores)
        verdict = Verdict(*map(self.agree, verdict))
        if (last := self.config.starts_anew) is not None:
            # Behind so many tokens the draft was verified over a cache that plain decoding no longer has.
            room = (last - self.state.length).clamp(min=0)
            verdict = stop_before(verdict, tokens, torch.where(self.state.length <= last, room, tokens.shape[1]))
        commit(self.state, tokens, verdict, verified.states)
        block = self.state.block[:, : tokens.shape[1] + 1]
        is_nan = has_nan(verified.logits[:, 0])
        return Settled(torch.cat([block.flatten(), verdict.num_accepted, is_nan.long()[None]]), scores)

    @property
    def around(self) -> Sequence[AbstractContextManager]:
        """What to enter around the forwards of the next round."""
        return self._around

    @property
    def lateness(self) -> int:
        """How many rounds may be launched before one is read: on a GPU it then need not wait for the host."""
        return int(self.state.length.is_cuda and self.config.starts_anew is None)

    def start_anew(self, place: int, text: Tensor) -> None:
        """Let the row in that place of the batch have a cache as if its `text` [n] had been the prompt."""
        with self.entered():
            start_anew(self.target, self.state.target_cache.view(place, 1, of=len(self.state.length)), text[None])
            self.recorder.take(self.drafter.device)  # the drafter has seen states of these positions

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside of all that is entered around the forwards of a round."""
        with ExitStack() as stack:
            for context in self.around:
                stack.enter_context(context)
            yield

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` in each row."""
        for cache in (self.state.target_cache, self.state.drafter_cache):
            cache.reserve(num_slots)

    def keep(self, rows: list[int], *, num_left: float) -> list[int]:  # noqa: ARG002  for graphs
        """Go on without the others if that pays; the places in the batch that stay, of `rows` at least.

        `num_left` is how many tokens they may still say.
        """
        keep_rows(self.state, rows)
        return rows


def decode(
    phases: Phases,
    prompt: Prompt,
    *,
    transcript: Transcript,
    told: Speculation,
    clocks: Clocks,
) -> Iterator[list[int]]:
    """Generate until the transcript is over; yields after each round which rows of the call took part, in their places.

    The first of them only chooses first tokens.
    """
    config = phases.config
    rows = list(range(len(prompt.lengths)))
    processors = [config.processors]
    if not config.in_step or len(rows) == 1:
        processors = processors_for_rows(config.processors, transcript.num_hidden, transcript.prompt)
    accept = accept_in_step if config.in_step else accept_in_order
    taken: list[list[Taken]] = [[] for _ in rows]
    told.rows = [Speculation(told.loop, told.why, told.depth) for _ in rows]
    longest_prompt = prompt.extra + prompt.columns.shape[1]
    launched: deque[Launched] = deque()

    drafted, verified = Drafted(phases.state.block[:, :0], None), Verified(prompt.logits, None)
    while True:
        done, K, started = rows, drafted.tokens.shape[1], transcript.num_tokens
        if phases.in_order:
            with clocks.host:
                raise_if_nan(bool(has_nan(verified.logits[:, 0])))
                limits = [K] * len(rows)
                if (last := config.starts_anew) is not None and K:
                    limits = [last - n if n <= last else K for n in phases.state.length.tolist()]
                verdict = accept(
                    *drafted,
                    verified.logits,
                    rows=rows,
                    transcript=transcript,
                    processors=processors,
                    do_sample=config.do_sample,
                    agree=phases.agree,
                    limits=limits,
                )
            commit(phases.state, drafted.tokens, verdict, verified.states)
        else:
            with clocks.accept:
                report, scores = phases.settle(drafted, verified)
            launched.append(Launched(rows, K, Letter(report), scores, verified.logits))
            if len(launched) > phases.lateness:
                done, K, letter, scores, logits = launched.popleft()
                read = letter.read()  # the round's wait
                raise_if_nan(bool(read[-1]))
                with clocks.host:
                    take_down(read, scores, logits, rows=done, K=K, transcript=transcript)

        if transcript.num_tokens != started:
            for row in done:
                # Near the length limit the last draft tokens never had a chance.
                room = K if transcript.max_new is None else min(K, transcript.max_new - started[row] - 1)
                taken[row].append(Taken(room, started[row], transcript.num_tokens[row]))
            with clocks.host:
                transcript.show()
            yield done
            if transcript.is_over:
                count(taken, transcript, told)
                return
            kept = [b for b, row in enumerate(rows) if transcript.is_live(row)]
            if len(kept) < len(rows) and not config.keeps_rows:
                num_left = math.inf
                if transcript.max_new is not None:
                    num_left = transcript.max_new - min(transcript.num_tokens[rows[b]] for b in kept)
                rows = [rows[b] for b in phases.keep(kept, num_left=num_left)]

        unseen = len(launched) * (config.depth + 1)
        phases.reserve(longest_prompt + max(transcript.num_tokens) + unseen + 2 * config.depth + 2)
        for b, row in enumerate(rows):
            if config.starts_anew is not None and transcript.is_live(row):
                said = prompt.tokens.new_tensor(transcript.texts[row])
                text = torch.cat([prompt.tokens[row, : prompt.num_states[row]], said])
                if len(text) == config.starts_anew + 1:
                    phases.start_anew(b, text)
        with phases.entered():
            with clocks.draft:
                drafted = phases.draft()
            if config.in_step:
                put_pads(drafted.tokens, transcript)
            verified = phases.verify(drafted)


class Taken(NamedTuple):
    """What a round gave a row, before anything was cut off."""

    room: int  # draft tokens that could have been kept
    start: int  # new tokens before the round
    end: int  # and after it


def count(taken: list[list[Taken]], transcript: Transcript, told: Speculation) -> None:
    """Count the rounds of each row, up to where its text ends."""
    assert transcript.length is not None
    for row, rounds in enumerate(taken):
        end = min(len(transcript.texts[row]), transcript.length)
        for room, start, end_of_round in rounds:
            if (new := min(end_of_round, end) - start) > 0:
                told.count(room, new - 1)
                told.rows[row].count(room, new - 1)


def take_down(
    read: list[int],  # a report
    scores: Tensor,  # [B, K+1, V]
    logits: Tensor,  # [B, K+1, V]
    *,
    rows: list[int],
    K: int,
    transcript: Transcript,
) -> None:
    """Append what a round settled to the text of each row that has not ended."""
    keeps = transcript.scores is not None or transcript.logits is not None  # a view of each is most of the time here
    for b, row in enumerate(rows):
        if not transcript.is_live(row):
            continue
        for k in range(read[len(rows) * (K + 1) + b] + 1):
            chosen_by = (scores[b, k], logits[b, k]) if keeps else (None, None)
            if transcript.append(row, read[b * (K + 1) + k], *chosen_by):
                break
