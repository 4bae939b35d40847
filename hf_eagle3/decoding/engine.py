"""Decoding rows: admit them, run rounds, release them. It knows no `generate()`."""

import logging
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..compat import CACHE_NAME
from ..drafters.draft import DrafterMemory, Prompted
from ..drafters.kinds import find_kind
from ..kernels.onednn import PackedLinears
from ..recorder import StateRecorder
from ..rows.attention import over_masks
from ..rows.cache import RowCache, to_bucket
from ..rows.forwards import attends_itself, find_listed, own_windows
from ..rows.layers import find_kinds
from ..rows.recurrent import Stepping
from ..rows.rotation import own_lengths
from ..speculation.accept import RULES
from ..speculation.costs import Chooser
from ..speculation.numbers import has_nan, raise_if_nan
from ..speculation.shape import DraftShape
from ..speculation.shared_noise import draw_seed
from ..speculation.stats import Stopwatch
from ..speculation.verdict import Proposal, Verdict
from ..speculation.warpers import RowWarper
from ..tensor_parallel import is_true_for_any, make_agree
from .arena import Arena, KnownUnfitError, open_arena, take_fingerprint
from .captured import CapturedPhases, CudaGraphs, warn_once, why_kernels_do_not
from .choosing import Pace, make_chooser
from .chunks import Beginning, ChunkedPrompt
from .in_order import accept_in_order, accept_in_step, put_pads
from .lock import BUSY, LayerLock, give_arena_back, leave, lock_of, take_arena
from .loop import DeviceRead, HostTime, Launched, note_parts
from .phases import Models, Phases, Verified, list_models
from .prefill import Prompt, PromptCall, prefill
from .preparation import find_asked, name_of
from .room import Clocks, Room
from .row import Row
from .state import RoundConfig, RoundState
from .straight import count_at_once, make_drafter_cache, may_part, part, prefill_straight
from .transcript import Transcript

logger = logging.getLogger(__name__)

# Experts that copy the weights they choose: at 8 tokens GptOss-20b's take 34 ms a forward, grouped ones 18 at 32 tokens.
FEW_TOKENS = 4
# A model that attends otherwise or waits for the device, a shape that a kernel refuses, a card that cannot run one:
# eager rounds need none of it, and raise again what is the caller's own.
CAPTURE_ERRORS: tuple[type[Exception], ...] = (Exception,)
ASKED_FOR = "asked for"


class Engine:
    """Rounds of draft, verify, accept and commit over rows that accept different numbers. A context manager.

    Args:
        target: The model to generate with.
        drafter: Bound to it; None for rounds without drafting.
        config: What the rounds do.
        room: What they will hold.
        is_eager: Do not capture rounds.
        capturer: Captures them otherwise.
        chooser: Makes what chooses the shape of each round.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: PreTrainedModel | None,
        config: RoundConfig,
        room: Room,
        *,
        is_eager: bool = False,
        capturer: CudaGraphs | None = None,
        chooser: Callable[..., Chooser] = make_chooser,
    ):
        self.target, self.drafter, self.config, self.room = target, drafter, config, room
        self._models = list_models(target, drafter)
        self._proposer = drafter if config.shapes.drafts else None
        self._kind = find_kind(None if self._proposer is None else self._proposer.config)
        self._most_at_once = count_at_once(target)  # tokens of prompts
        self.is_eager, self.capturer, self._make_chooser = is_eager, capturer or CudaGraphs(), chooser
        self.rows: list[Row] = []  # in their places in the batch
        self.clocks = Clocks(
            Stopwatch(self._models[-1].device), Stopwatch(target.device), Stopwatch(torch.device("cpu"))
        )
        self._stack = ExitStack()
        self._launched: deque[Launched] = deque()
        # [n] int64, the tokens of each row's prompt, where its cache starts anew.
        self._prompts: weakref.WeakKeyDictionary[Row, Tensor] = weakref.WeakKeyDictionary()
        self._starts: list[int] = []  # new tokens in each row before the last round; none before the first
        self._num_pending = 1  # most states that the drafter has not read in a row
        self._is_steady = False  # whether the next round follows one like it
        self.is_torn = False  # whether rows that were to join others failed midway, so that none can go on
        self._is_stale = False  # whether phases have yet to adapt to rows that came
        self._pace = Pace()

    def __enter__(self) -> "Engine":
        with ExitStack() as stack:  # which undoes what was entered if something fails
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def _open(self, stack: ExitStack) -> None:
        """Take memory and hooks."""
        target, drafter, room, shapes = self.target, self.drafter, self.room, self.config.shapes
        stack.enter_context(own_lengths(target))
        stack.enter_context(own_windows(target))
        self.why_eager = ASKED_FOR if self.is_eager else self._find_why_eager()
        if self.why_eager is None and not take_arena(target):
            self.why_eager = BUSY
        elif self.why_eager is None:
            stack.callback(give_arena_back, target)
        self.arena: Arena | None = None
        self._drafter_cache: RowCache | None = None
        if self.why_eager is None:
            # Graphs are recorded on the current device.
            stack.enter_context(torch.cuda.device_of(torch.empty(0, device=target.device)))
            first = self.capturer.first_room
            num_new = first if room.max_new is None else min(room.max_new, first)
            sizes = {"num_rows": room.num_rows, "num_new": num_new, "prompt_length": room.prompt_length}
            self.arena = stack.enter_context(open_arena(target, drafter, shapes=shapes, **sizes))
        self.recorder = stack.enter_context(
            StateRecorder(target, None if self._proposer is None else self._proposer.bound_aux_layer_ids)
        )
        self.lock: LayerLock = lock_of(target)
        # Rounds that are not captured compute the same in other ways.
        exchanged = self._models[1:] if attends_itself(target) else self._models
        self.over_masks = over_masks(*exchanged, folds=not self.is_eager)
        self.stepping = Stepping(target)
        self._around: list[AbstractContextManager] = [self.over_masks, self.stepping]
        if self.why_eager is not None and not self.is_eager:  # layers on a CPU, if there are any
            self._around.append(PackedLinears(*self._models))
        for context in self._around:
            stack.callback(leave, context, self.lock)

    def _find_why_eager(self) -> str | None:
        """What keeps rounds from being captured, logged once; None if nothing does."""
        target, name = self.target, type(self.target).__name__
        why = self.capturer.why_not(target, self.drafter) or why_kernels_do_not(target)
        if why is None and (last := self.config.starts_anew) is not None:
            why = f"{name} computes its cache anew where a text passes {last} tokens"
        if why is None and (asked := find_asked(target)) is not None:
            why = f"{name} is asked for the position of each token by {name_of(asked)}"
        if why is not None:
            warn_once(target, why)
        return why

    def prefill(
        self,
        input_ids: Tensor,
        mask: Tensor,
        model_kwargs: dict[str, Any],
        generation_config: GenerationConfig,
        *,
        move: bool = True,
        is_whole: bool = False,
    ) -> Prompt:
        """The target's forward over the prompts; arguments as of `prefill.PromptCall`."""
        given = (self.target, self.recorder, input_ids, mask, model_kwargs, generation_config)
        if (
            not is_whole
            and len(mask) > 1
            and mask.numel() > self._most_at_once > 0
            and may_part(self.target, mask, model_kwargs, generation_config)
        ):
            texts, columns = part(input_ids, mask)
            return self.prefill_straight(texts)._replace(columns=columns, host_cache=model_kwargs[CACHE_NAME])
        with self.lock:
            cache = self._make_room(len(mask), int(mask.sum(-1).max()))
            # Some forwards count pads as positions; a CPU computes them like tokens.
            is_apart = self.room.is_open and (self.target.device.type == "cpu" or find_listed(self.target) is not None)
            return prefill(PromptCall(*given, self._models[-1].device, cache, move, is_whole, is_apart))

    def prefill_straight(self, prompts: Sequence[Tensor]) -> Prompt:
        """The same over whole prompts [T_b] of an open engine, where the target `runs_straight`."""
        longest = max(map(len, prompts))
        cache = self._make_room(len(prompts), longest)
        given = (self.target, self.recorder, prompts, cache, self._make_beginning(longest))
        with self.lock:
            return prefill_straight(*given, most=self._most_at_once)

    def prefill_in_chunks(self, input_ids: Tensor) -> ChunkedPrompt:
        """The same over one prompt [1, T], piece by piece, where the target `takes_chunks`."""
        longest = input_ids.shape[1]
        given = (self.target, self.recorder, input_ids, self._make_own_room(longest), self._make_beginning(longest))
        return ChunkedPrompt(*given, [self.lock, self.over_masks])

    def _make_beginning(self, longest: int) -> Beginning:
        """How the drafter begins, in the memory that `_make_room` found for it."""
        shapes = self.config.shapes
        cache = self._drafter_cache or make_drafter_cache(self._proposer, longest, shapes)
        return Beginning(self._kind, self._proposer, shapes, cache, self.clocks.draft)

    def _make_room(self, num_rows: int, prompt_length: int) -> RowCache:
        """Memory for prompts: their rows' own, or that from which they are copied to their places beside others."""
        if self.arena is None or self.is_running:
            return self._make_own_room(prompt_length)
        self.arena.reserve(prompt_length + self.config.shapes.first_slots)
        cache, self._drafter_cache = self.arena.first_rows(num_rows)
        return cache

    def _make_own_room(self, prompt_length: int) -> RowCache:
        cache = RowCache(find_kinds(self.target), to_bucket(prompt_length + self.config.shapes.first_slots))
        cache.is_stock, self._drafter_cache = self.is_eager, None
        return cache

    @property
    def is_running(self) -> bool:
        """Whether some row goes on."""
        return any(row.is_live for row in self.rows)

    def admit(self, rows: Sequence[Row], prompt: Prompt, transcript: Transcript | None = None) -> None:
        """Take in rows behind their prompts, and choose their first tokens.

        Where others run, which an open engine alone allows, they take the places of rows that have ended, and further ones.

        Args:
            rows: One for each row of the prompt.
            prompt: What `prefill` returned.
            transcript: Of these rows, where they are in step.
        """
        assert self.room.is_open or not self.rows, "rows come to an engine that has none"
        config = self._fit(rows) if self.room.is_open else self.config
        for b, row in enumerate(rows):
            row.start = prompt.extra + prompt.columns.shape[1]
            if config.starts_anew is not None:
                self._prompts[row] = prompt.tokens[b, : int(prompt.num_states[b])]
        seeds = [draw_seed() if row.seed is None and config.needs_seeds else row.seed or 0 for row in rows]
        state = RoundState.behind(prompt, max_length=config.max_length, seeds=seeds)
        models = Models(self.target, self._proposer, self._kind, self.recorder, make_agree(self.target))
        memory = prompt.memory
        if memory is None:
            first = prompt.lengths - prompt.num_states
            prompted = Prompted(prompt.tokens, prompt.states, prompt.num_states, first)
            with self.lock, self.clocks.draft:
                memory = self._kind.begin(self.drafter, prompted, config.shapes, cache=self._drafter_cache)
        nothing = Proposal(state.root.new_zeros(len(rows), 0), None)
        if self.is_running:
            newcomers = Phases(models, state, memory, self._make_warper(rows), config)
            self.is_torn = self.phases.rounds_in_flight > 0  # whose reports are read meanwhile
            self._accept(newcomers, list(rows), nothing, Verified(prompt.logits, None))
            self._join(rows, newcomers)
            return
        self.rows, self._transcript, self.config = list(rows), transcript, config
        self._begin(models, state, memory)
        self._accept(self.phases, self.rows, nothing, Verified(prompt.logits, None))

    def _fit(self, rows: Sequence[Row]) -> RoundConfig:
        """What rounds of these rows do, where each has settings of its own."""
        return replace(
            self.config,
            do_sample=any(not row.settings.is_greedy for row in rows),
            in_order=any(row.looks_at_text for row in rows),
        )

    def _make_warper(self, rows: Sequence[Row]) -> RowWarper:
        return RowWarper([row.settings for row in rows], self.config.further_warpers, self.target.device)

    def _begin(self, models: Models, state: RoundState, memory: DrafterMemory) -> None:
        """Let rounds run over rows where none did."""
        config = self.config
        self._launched.clear()
        if len(self.rows) * config.shape.num_verified <= FEW_TOKENS and not self.room.is_open:
            # As the host does after the prompt: experts that copy the weights they choose, good for few tokens.
            self._stack.enter_context(self.target._optimize_model_for_decode())
        if self.arena is not None and (state.cache.whole is None or state.cache.whole[0] is not self.arena.caches[0]):
            self._move_in(self.arena, state, memory)
        temperature, is_captured = self.rows[0].settings.temperature or 1.0, self.arena is not None
        self.chooser = self._make_chooser(self.target, self.drafter, config, temperature, is_captured=is_captured)
        self.phases = self._make_phases(models, state, memory, self._make_warper(self.rows))

    def _move_in(self, arena: Arena, state: RoundState, memory: DrafterMemory) -> None:
        """Let rows be where graphs look for them."""
        arena.reserve(max(row.start for row in self.rows) + self.config.shapes.first_slots)
        caches, places = arena.first_rows(len(self.rows)), torch.arange(len(self.rows), device=state.length.device)
        for cache, own in zip(caches, (state.cache, memory.cache), strict=True):
            cache.put(own, places, of=len(self.rows))
        state.cache, memory.cache = caches

    def _join(self, rows: Sequence[Row], newcomers: Phases) -> None:
        """Let rows that have their first tokens run beside others."""
        self.is_torn = True
        self.phases.reserve(max(row.start for row in rows) + self.config.shapes.first_slots)
        ended = [place for place, row in enumerate(self.rows) if not row.is_live]
        places = [*ended, *range(len(self.rows), len(self.rows) + len(rows))][: len(rows)]
        num_rows = self.phases.seat(newcomers.state, newcomers.memory, places)
        seated = [*self.rows, *(Row.make_ended(rows[0].prompt) for _ in range(num_rows - len(self.rows)))]
        for place, row in zip(places, rows, strict=True):
            seated[place] = row
        self.rows, self._is_stale, self._is_steady, self.is_torn = seated, True, False, False

    def _adapt(self) -> None:
        """Let rounds do what the rows need that are left."""
        config = self._fit([row for row in self.rows if row.is_live])
        if self._is_stale or config != self.config:
            self.config, self._is_stale, self._is_steady = config, False, False
            self.phases.adapt(config, self._make_warper(self.rows))

    def _make_phases(self, models: Models, state: RoundState, memory: DrafterMemory, warper: RowWarper) -> Phases:
        """Captured if that works, else eager."""
        parts = (models, state, memory, warper, self.config, [self.lock, *self._around])
        eager = Phases(*parts)
        eager.shape = self.chooser.begin(len(self.rows))
        if self.arena is None:
            return eager
        captured = CapturedPhases(*parts, self.arena, self.capturer)
        captured.shape = eager.shape
        try:
            captured.begin()
        except CAPTURE_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.why_eager = str(error)
            if not isinstance(error, KnownUnfitError):
                self.why_eager = f"{type(error).__name__}: {error}"
                logger.warning("Rounds cannot be captured in CUDA graphs, so they run eagerly: %s", self.why_eager)
        if is_true_for_any(self.target, self.why_eager is not None) and self.why_eager is None:
            self.why_eager = "another process could not capture them"
        if self.why_eager is None:
            return captured
        captured.give_up(self.why_eager)
        return eager

    @property
    def graphs(self) -> str:
        """How rounds ran, in words."""
        if isinstance(self.phases, CapturedPhases):
            return self.phases.how
        return f"none ({self.why_eager})"

    def round(self) -> None:
        """Draft, verify, accept, commit: once over all rows that are left. Texts grow, if not by this round, by one before."""
        phases, config = self.phases, self.config
        if config.keeps_rows:
            self.hold_states()
        self._drop_rows()
        if self.room.is_open:
            self._adapt()
        known = max(row.start + len(row.text) for row in self.rows)
        has_moved = phases.reserve(known + config.shapes.slots_ahead(len(self._launched)))
        self._is_steady = self._is_steady and not has_moved
        self._start_anew()
        self._choose_shape()
        with phases.entered():
            with self.clocks.draft:
                self._read_pending()
                proposal = phases.draft()
            if self._transcript is not None:
                put_pads(proposal.tokens, self._transcript)
            verified = phases.verify(proposal)
        self._accept(phases, self.rows, proposal, verified)

    def look_again(self) -> None:
        """Go on after others had the target: with weights and graphs as they are now."""
        for context in self._around:
            leave(context, self.lock)
        if self.arena is not None and (now := take_fingerprint(self.target, self.drafter)) != self.arena.fingerprint:
            self.arena.renew(now)
            self._is_stale = True

    def release(self, row: Row) -> None:
        """Let a row end here; it leaves the batch with the next round."""
        row.end(len(row.text), cuts=False)

    def hold_states(self) -> None:
        """Let recurrent states be those behind each row's text, where the last round got further or the row has ended.

        Keys and values that are too many lie behind a row's end; states that are too far cannot be brought back later.
        """
        cache = self.phases.state.cache
        if cache.has_states and self._starts:
            kept = [now - start for now, start in zip(self._count_texts(), self._starts, strict=True)]
            cache.keep_first(self.phases.state.length.new_tensor(kept).clamp(min=0))

    def _count_texts(self) -> list[int]:
        """[B] new tokens of each row; where rows are in step, the pads of those that have ended among them."""
        if self._transcript is not None:
            return [self._transcript.num_columns] * len(self.rows)
        lengths = (None if row.batch is None else row.batch.length for row in self.rows)
        return [
            len(row.text) if n is None else min(n, len(row.text)) for row, n in zip(self.rows, lengths, strict=True)
        ]

    def _drop_rows(self) -> None:
        """Go on without rows that have ended, if that pays."""
        kept = [b for b, row in enumerate(self.rows) if row.is_live]
        if len(kept) < len(self.rows) and not self.config.keeps_rows:
            num_left = max(self.rows[b].num_left for b in kept)
            places = self.phases.keep(kept, num_left=num_left)
            self._is_steady = self._is_steady and len(places) == len(self.rows)
            self.rows = [self.rows[b] for b in places]

    def _choose_shape(self) -> None:
        """Propose what brings the most tokens a second, by what is known of earlier rounds."""
        num_left = max((row.num_left for row in self.rows if row.is_live), default=0)
        can_try = self.arena is None or 2 * num_left >= self.capturer.worth_capture
        shape = self.chooser.choose(len(self.rows), can_try=can_try)
        if shape != self.phases.shape:
            self.phases.switch(shape)
            self._is_steady = False

    def _read_pending(self) -> None:
        """Let the drafter read pending states, if there are more than the next draft reads, or than are kept."""
        shape = self.phases.shape
        room = shape.max_new if shape.num_nodes else self.config.shapes.num_pending - 1
        if self._num_pending > room and not self.config.shapes.is_fixed:
            self.phases.read_pending()
            self._num_pending = 1
        self._num_pending = shape.max_new if shape.num_nodes else self._num_pending + 1

    def _start_anew(self) -> None:
        """Let rows have a cache of their whole text where the target computes its own anew."""
        for b, row in enumerate(self.rows):
            if self.config.starts_anew is not None and row.is_live:
                prompt = self._prompts[row]
                text = torch.cat([prompt, prompt.new_tensor(row.text)])
                if len(text) == self.config.starts_anew + 1:
                    self.phases.start_anew(b, text)

    def _accept(self, phases: Phases, rows: list[Row], proposal: Proposal, verified: Verified) -> None:
        """Accept and commit; texts grow by what is read, which is this round's report or an earlier one's."""
        shape = phases.shape if verified.states is not None else None
        is_steady, self._is_steady = self._is_steady and shape is not None, True
        if shape is not None:
            self._starts = self._count_texts()
        if phases.config.in_order:
            self._read_launched(0)  # of rounds before a row came whose text is looked at
            starts = [len(row.text) for row in rows]
            verdict = self._accept_in_python(phases, rows, proposal, verified)
            seconds = self._pace.measure(HostTime(), is_steady=is_steady)
            if shape is not None:
                self._teach(rows, shape, verdict.ends.tolist(), seconds)
            note_parts(rows, starts, shape)
            return
        with self.clocks.accept:
            report, scores, path = phases.accept(proposal, verified)
        read = DeviceRead(report)
        self._launched.append(Launched(rows, shape, is_steady, read, scores, verified.logits, path))
        self._read_launched(phases.rounds_in_flight)

    def _read_launched(self, most: int) -> None:
        """Read rounds until `most` are in flight."""
        while len(self._launched) > most:
            launched = self._launched.popleft()
            starts = [len(row.text) for row in launched.rows]
            self._take_in(launched)
            note_parts(launched.rows, starts, launched.shape)

    def _take_in(self, launched: Launched) -> None:
        """Read a round's report: the round's wait."""
        report = launched.read()
        raise_if_nan(report.is_nan)
        seconds = self._pace.measure(launched.device_read, is_steady=launched.is_steady)
        if launched.shape is not None:
            self._teach(launched.rows, launched.shape, report.ends, seconds)
        with self.clocks.host:
            launched.append(report)

    def _teach(self, rows: list[Row], shape: DraftShape, ends: list[int], seconds: float | None) -> None:
        """Tell the chooser of a round: at which nodes rows ended, and how long it took, if that says something."""
        least = self._mean_left()
        counted = [end for row, end in zip(rows, ends, strict=True) if row.is_live and row.num_left >= least]
        self.chooser.note(len(rows), shape, counted, seconds)

    def _mean_left(self) -> float:
        """Tokens that rows have yet to say: a batch waits for those with more, so their verdicts say what drafting brings."""
        left = [row.num_left for row in self.rows if row.is_live]
        return sum(left) / len(left) if left else 0.0

    def _accept_in_python(self, phases: Phases, rows: list[Row], proposal: Proposal, verified: Verified) -> Verdict:
        """Accept where processors look at the text, and commit."""
        config = phases.config
        with self.clocks.host:
            raise_if_nan(bool(has_nan(verified.logits[:, 0])))
            limits = [phases.shape.depth] * len(rows)
            if (last := config.starts_anew) is not None:
                limits = [last - n if n <= last else limits[0] for n in phases.state.length.tolist()]
            decide: Callable[..., Verdict] = partial(accept_in_order, rows=rows)
            if self._transcript is not None:
                decide = partial(accept_in_step, transcript=self._transcript)
            verdict = decide(
                proposal,
                verified.logits,
                rule=RULES[phases.rule],
                judging=phases.judging,
                agree=phases.models.agree,
                limits=limits,
            )
        phases.commit(proposal, verdict, verified.states)
        return verdict
