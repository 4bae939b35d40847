"""The phases of a round in eager PyTorch: draft, verify, accept, commit. They define what a round does.

Shapes: B rows in the batch, N draft tokens of which a path has up to D; a chain has N = D = K.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import CACHE_NAME
from ..drafters.draft import (
    Choose,
    DrafterKind,
    DrafterMemory,
    FindTop,
    make_choose_greedy,
    make_choose_sampled,
    make_choose_shared,
)
from ..kernels.top import top_rows_eager
from ..recorder import StateRecorder, find_layers
from ..rows.block import Block, whole_rows
from ..rows.cache import WRITING, RowCache
from ..rows.forwards import Forward, find_special, handing
from ..rows.layers import Masks, make_masks
from ..rows.rotation import ToLengths, at_once, one_by_one, rotating
from ..speculation.accept import RULES, SHARED, Judging, stop_before
from ..speculation.coverage import accept_covered
from ..speculation.noise import GlobalNoise, SeededNoise
from ..speculation.numbers import has_nan, send
from ..speculation.shape import NONE, DraftShape
from ..speculation.shared_noise import AddNoise, SharedNoise, add_noise
from ..speculation.verdict import Proposal, Verdict
from ..speculation.warpers import RowWarper
from ..tensor_parallel import Agree
from .state import RoundConfig, RoundState


def verify(target: PreTrainedModel, state: RoundState, draft_tokens: Tensor, shape: DraftShape) -> Tensor:
    """Logits [B, N+1, V] after the root and each of `draft_tokens` [B, N]: float32, or 16 bits if the target's are."""
    tokens = torch.cat([state.root[:, None], draft_tokens.to(state.root.device)], dim=1)  # [B, N+1]
    block = Block(state.length - 1, tokens.shape[1], shape.ancestry(tokens.device))
    logits = run_target(target, state, tokens, block).to(tokens.device)
    return logits if logits.itemsize == 2 else logits.float()


def run_target(target: PreTrainedModel, state: RoundState, tokens: Tensor, block: Block) -> Tensor:
    """Logits [B, T, V] of the `tokens` [B, T] of a block."""
    places = torch.minimum(block.places, state.last_position)
    position_ids = places + state.shift if state.asked is None else state.asked(places, tokens, block.ancestry)
    return run_block(target, state.cache, tokens, block, position_ids)


def run_block(
    target: PreTrainedModel,
    cache: RowCache,
    tokens: Tensor,
    block: Block,
    position_ids: Tensor,
    *,
    to_lengths: ToLengths = one_by_one,
    visible: int | None = None,  # slots that it can attend to, where that is known to be few
    **options: Any,  # of the target's forward
) -> Tensor:
    """Logits [B, T, V] of the `tokens` [B, T] of a block, which `cache` then holds."""
    text_config = target.config.get_text_config(decoder=True)
    special = find_special(target)
    most = getattr(text_config, special.most_slots) if special is not None and special.most_slots else None
    most = min((n for n in (most, visible) if n is not None), default=None)
    with cache.writing(block, most=most, like_hosts=special is not None and special.attends_itself):
        masks = make_masks(text_config, block, cache.num_visible, target.dtype)
        with handing_over(target, special, masks, position_ids) as arguments, rotating(to_lengths):
            arguments = {**arguments, CACHE_NAME: cache, "use_cache": True, "return_dict": True, **options}
            return target(input_ids=tokens, **arguments).logits


@contextmanager
def handing_over(
    target: PreTrainedModel, special: Forward | None, masks: Masks | None, position_ids: Tensor
) -> Iterator[dict[str, Any]]:
    """What to give `target` as arguments so that its text decoder goes by `masks` and `position_ids` [B, T]."""
    with handing_to_decoder(masks, target) as masks:
        if special is None:
            yield {"attention_mask": masks, "position_ids": position_ids}
            return
        with handing(target, special, masks, position_ids) as arguments:
            yield arguments


@contextmanager
def handing_to_decoder(masks: Masks | None, target: PreTrainedModel) -> Iterator[Masks | None]:
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
    block = whole_rows(1, text.shape[1], text.device)
    cache.reserve(text.shape[1])
    options = {"logits_to_keep": 1} if target._supports_logits_to_keep() else {}
    with cache.writing(block, is_first=True), rotating(at_once):
        target(
            input_ids=text,
            position_ids=block.places,
            **{CACHE_NAME: cache},
            use_cache=True,
            return_dict=True,
            **options,
        )


def scatter_probs(drafter: PreTrainedModel, probs: Tensor, vocab_size: int) -> Tensor:
    """The probabilities q [B, K, V] of `probs` [B, K, V_d]: over the target's vocabulary, zero outside the drafter's."""
    q = probs.new_zeros(*probs.shape[:2], vocab_size)
    return q.scatter_(-1, drafter.draft_to_target_ids.expand_as(probs), probs)


def agree_on(verdict: Verdict, agree: Agree) -> Verdict:
    """The verdict of the first of the processes that run a target together."""
    path = None if verdict.path is None else agree(verdict.path)
    return Verdict(agree(verdict.num_accepted), agree(verdict.next_token), path)


class Verified(NamedTuple):
    """What the target says to a proposal."""

    logits: Tensor  # [B, N+1, V], float32 or 16 bits
    states: Tensor | None  # [B, N+1, A*Ht]; None of the prompt, whose last state is pending already


class Accepted(NamedTuple):
    """What came of it."""

    report: Tensor  # [B*(D+1) + 2*B + 1] int64: new tokens, how many draft tokens were kept, where that ended, any NaN
    scores: Tensor  # [B, N+1, V], what tokens were chosen by; float32 but where the logits themselves were
    path: Tensor | None  # [B, D+1], as of `Verdict`


def list_models(target: PreTrainedModel, drafter: PreTrainedModel | None) -> list[PreTrainedModel]:
    """The target, and the drafter if there is one."""
    return [target] if drafter is None else [target, drafter]


class Models(NamedTuple):
    """Who takes part in a round."""

    target: PreTrainedModel
    drafter: PreTrainedModel | None  # bound to it
    kind: DrafterKind
    recorder: StateRecorder  # open, on the target
    agree: Agree

    @property
    def present(self) -> list[PreTrainedModel]:
        """Those that there are."""
        return list_models(self.target, self.drafter)

    def take_states(self) -> Tensor:
        """The states [B, T, A*Ht] of the target's last forward, where the drafter is."""
        return self.recorder.take(self.present[-1].device)


class Phases:
    """The phases of a round over one batch, in eager PyTorch: tensors in, tensors out, and no wait for the device.

    This defines what a round does; `captured.CapturedPhases` replays it.

    Args:
        models: Who takes part.
        state: Of the batch; `accept` writes to it.
        memory: The drafter's, likewise.
        warper: Warps the scores of each row, unless processors look at the text.
        config: What the rounds do.
        around: Entered around the forwards of each eager round, to let the models compute the same in other ways.
    """

    def __init__(
        self,
        models: Models,
        state: RoundState,
        memory: DrafterMemory,
        warper: RowWarper,
        config: RoundConfig,
        around: Sequence[AbstractContextManager] = (),
    ):
        self.models, self.state, self.memory, self.warper, self.config = models, state, memory, warper, config
        self.add_noise: AddNoise = add_noise  # captured rounds have a kernel, and so it is with the next
        self.find_top: FindTop = top_rows_eager
        self._around = around
        self.shape = config.shape  # of the next round

    @property
    def judging(self) -> Judging:
        """What the accept rule may need."""
        state, config = self.state, self.config
        noise = SeededNoise(state.seeds, state.length) if config.is_seeded else GlobalNoise()
        shared = SharedNoise(state.seeds, state.length, self.add_noise)
        return Judging(self.shape, noise, shared, config.simulated_length)

    @property
    def rule(self) -> str:
        """The name of the accept rule of the next round."""
        return self.config.find_rule(self.shape)

    @property
    def choose(self) -> Choose:
        """How draft tokens are chosen, which the accept rule must know."""
        if self.rule == SHARED:
            assert self.models.drafter is not None
            ids = self.models.drafter.draft_to_target_ids
            return make_choose_shared(self.warper, self.judging.shared, ids, self.find_top)
        if self.config.do_sample:
            return make_choose_sampled(self.warper, self.judging.noise)
        return make_choose_greedy(self.find_top)

    def draft(self) -> Proposal:
        """Propose the shape's tokens in each row."""
        models = self.models
        if not self.shape.num_nodes or models.drafter is None:
            return Proposal(self.state.root.new_zeros(len(self.state.root), 0), None)
        memory = self.memory.narrowed(self.shape.max_new)
        tokens, probs = models.kind.propose(models.drafter, memory, self.shape, self.choose)
        device = self.state.root.device
        tokens = models.agree(tokens.to(device))
        if probs is None:
            return Proposal(tokens, None)
        V = models.target.config.get_text_config(decoder=True).vocab_size
        return Proposal(tokens, scatter_probs(models.drafter, probs, V).to(device))

    def verify(self, proposal: Proposal) -> Verified:
        """Run the target over the root and the draft."""
        logits = verify(self.models.target, self.state, proposal.tokens, self.shape)
        return Verified(logits, self.models.take_states())

    def accept(self, proposal: Proposal, verified: Verified) -> Accepted:
        """Accept and commit, where processors look at scores alone."""
        config, shape = self.config, self.shape if proposal.tokens.shape[1] else NONE
        # The likeliest of 16 bits is the likeliest of 32; what processors and probabilities see is the host's float32.
        scores = self.warper(verified.logits) if self.warper or config.do_sample else verified.logits
        # What a sampling rule says is dropped where a coverage is simulated, and its work is not; the greedy rule's is alike.
        if config.coverage is None or config.do_sample:
            verdict = RULES[self.rule].judge(proposal, scores, self.judging._replace(shape=shape))
        if config.coverage is not None:
            verdict = accept_covered(verified.logits, shape, config.coverage)
        verdict = agree_on(verdict, self.models.agree)
        if (last := config.starts_anew) is not None:
            # Behind so many tokens the draft was verified over a cache that plain decoding no longer has.
            room = (last - self.state.length).clamp(min=0)
            room = torch.where(self.state.length <= last, room, proposal.tokens.shape[1])
            verdict = stop_before(verdict, proposal.tokens, room)
        tokens = self.commit(proposal, verdict, verified.states)
        is_nan = has_nan(verified.logits[:, 0])
        ends = verdict.num_accepted if verdict.path is None else verdict.path[:, -1]
        report = torch.cat([tokens.flatten(), verdict.num_accepted, ends, is_nan.long()[None]])
        return Accepted(report, scores, verdict.path)

    def commit(self, proposal: Proposal, verdict: Verdict, states: Tensor | None) -> Tensor:
        """Make the accepted tokens and the next token text, for both models; those tokens [B, D+1], junk behind them."""
        committed = self.state.commit(proposal, verdict, states, self.config.shapes.num_verified)
        self.models.kind.catch_up(self.memory, committed, self.shape)
        return committed.tokens

    def read_pending(self) -> None:
        """Let the drafter read what is pending, but for the last state."""
        if self.models.drafter is not None:
            self.models.kind.read_pending(self.models.drafter, self.memory)

    def switch(self, shape: DraftShape) -> None:
        """Propose another shape from now on."""
        self.shape = shape

    @property
    def around(self) -> Sequence[AbstractContextManager]:
        """What to enter around the forwards of the next round."""
        return self._around

    @property
    def rounds_in_flight(self) -> int:
        """How many rounds may be launched before one is read: on a GPU it then need not wait for the host.

        States of rows that have ended are kept from going on (`Engine.hold_states`) where somebody is to have them, which is
        decided before the next round.
        """
        holds_states = self.state.cache.has_states and (self.config.keeps_rows or self.config.keeps_cache)
        is_read_first = self.config.starts_anew is not None or holds_states
        return int(self.state.length.is_cuda and not is_read_first)

    def start_anew(self, place: int, text: Tensor) -> None:
        """Let the row in that place of the batch have a cache as if its `text` [n] had been the prompt."""
        with self.entered():
            start_anew(self.models.target, self.state.cache.view(place, 1, of=len(self.state.length)), text[None])
            self.models.take_states()  # the drafter has seen states of these positions

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside of all that is entered around the forwards of a round."""
        with ExitStack() as stack:
            for context in self.around:
                stack.enter_context(context)
            yield

    def reserve(self, num_slots: int) -> bool:
        """Make room for `num_slots` in each row; whether that took time."""
        is_small = num_slots > self.state.cache.capacity
        for cache in (self.state.cache, self.memory.cache):
            cache.reserve(num_slots)
        return is_small

    def keep(self, rows: list[int], *, num_left: float) -> list[int]:
        """Go on without the others if that pays; the places in the batch that stay, of `rows` at least.

        `num_left` is how many tokens they may still say.
        """
        places = self._choose_places(rows, num_left=num_left)
        if len(places) < len(self.state.length):
            self._select(places)
        return places

    def seat(self, state: RoundState, memory: DrafterMemory, places: list[int]) -> int:
        """Let the rows of another batch be in these places, behind the last one too; how many rows there are then.

        `adapt` must follow before the next round.
        """
        num_rows, needed = len(self.state.length), max(places) + 1
        if needed > num_rows:  # what stands in new places is written over, or has ended
            self._select([*range(num_rows), *[0] * (self._choose_size(needed) - num_rows)])
            num_rows = len(self.state.length)
        index = send(places, self.state.length.device)
        for cache, theirs in ((self.state.cache, state.cache), (self.memory.cache, memory.cache)):
            cache.put(theirs, index, of=num_rows)
        self.state.put(state, index)
        self.memory.put(memory, index)
        return num_rows

    def adapt(self, config: RoundConfig, warper: RowWarper) -> None:
        """Go on with other settings of the rows."""
        self.config, self.warper = config, warper

    def _choose_size(self, num_rows: int) -> int:
        """How many rows a batch is made for that has so many."""
        return num_rows

    def _select(self, rows: list[int]) -> None:
        """Be the batch of these rows of this one, as often as they are among them."""
        index = send(rows, self.state.length.device)
        target_cache, drafter_cache = self._take_rows(index)
        self.state, self.memory = self.state.over(target_cache, index), self.memory.over(drafter_cache, index)
        self.warper = self.warper.clone()  # the other one may be that of graphs
        self.warper.select(index)

    def _choose_places(self, rows: list[int], *, num_left: float) -> list[int]:  # noqa: ARG002  captured rounds look at it
        """Which places are worth keeping."""
        return rows

    def _take_rows(self, index: Tensor) -> tuple[RowCache, RowCache]:
        """Caches of the rows `index` [B'] alone."""
        for cache in (self.state.cache, self.memory.cache):
            cache.select(index)
        return self.state.cache, self.memory.cache
