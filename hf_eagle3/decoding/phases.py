"""The phases of a round in eager PyTorch: draft, verify, accept, commit. They define what a round does."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..compat import CACHE_NAME
from ..drafters.draft import Choose, Draft, choose_at_once, choose_greedy, make_choose_sampled
from ..recorder import StateRecorder, find_layers
from ..rows.cache import WRITING, RowCache
from ..rows.masks import Masks, make_masks
from ..rows.rotation import at_once, one_by_one, rotating
from ..speculation.accept import Verdict, accept_greedy, accept_sampled, accept_simulated
from ..speculation.numbers import has_nan
from ..speculation.sampling import make_to_probs, stateless_warpers
from ..tensor_parallel import make_agree
from .state import DecodeConfig, DecodeState, commit, keep_rows


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


def scatter_probs(drafter: PreTrainedModel, probs: Tensor, vocab_size: int) -> Tensor:
    """The probabilities q [B, K, V] of `probs` [B, K, V_d]: over the target's vocabulary, zero outside the drafter's."""
    q = probs.new_zeros(*probs.shape[:2], vocab_size)
    return q.scatter_(-1, drafter.draft_to_target_ids.expand_as(probs), probs)


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
