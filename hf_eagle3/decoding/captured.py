"""Rounds as CUDA graphs: the phases of `phases.Phases`, recorded once over static memory and replayed.

The phases themselves are those of the eager loop, run while the device records; what differs is who attends (row lengths
instead of masks) and that kernels stand in for stock layers (`kernels.fusion`). One arena a target keeps memory and
graphs between calls.
"""

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafters.draft import DrafterMemory
from ..kernels.fusion import fused, has_forward_hooks
from ..kernels.language import is_available
from ..kernels.noise import add_noise_rows
from ..kernels.temperature import divide_rows
from ..kernels.top import top_rows
from ..rows.cache import RowCache
from ..rows.forwards import find_listed
from ..rows.layers import known_kinds
from ..rows.recurrent import running_by_rows, why_not_replayed
from ..rows.recurrent_trial import refuse_unequal
from ..speculation.shape import DraftShape
from ..speculation.verdict import Proposal
from ..speculation.warpers import RowWarper
from ..tensor_parallel import call_before_groups_end, find_peers, is_spread
from .arena import Arena, KnownUnfitError, Recorded, describe_autocast, release_graphs
from .cuda_graphs import capture, memory_in_use, synchronize, warm_up
from .lock import BUSY, lock_of, why_busy
from .phases import Accepted, Models, Phases, Verified, list_models
from .state import RoundConfig, RoundState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CudaGraphs:
    """How rounds are captured, and when that pays. The engine is given one.

    Attributes:
        first_room: New tokens that memory is made for at first; it doubles as they come.
        worth_capture: Tokens to come, or rounds that ran over too many rows, for which a smaller batch gets graphs.
        max_graphs: Sets of graphs that an arena keeps.
        rounds_in_flight: Rounds launched before one is read; None: as many as the device allows.
    """

    first_room: int = 512
    worth_capture: int = 128
    max_graphs: int = 32
    rounds_in_flight: int | None = None

    def why_not(self, target: PreTrainedModel, drafter: PreTrainedModel | None) -> str | None:
        """What keeps rounds from being captured; None if nothing does."""
        return why_not_captured(target, drafter) or why_busy(target)

    def warm_up(self, function: Callable[[], None], device: torch.device) -> None:
        """Run what is to be captured, leaving random numbers as they were."""
        warm_up(function, device)

    def capture(self, function: Callable, *args: Any, pool: Any) -> tuple[Callable[[], None], Any]:
        """How to replay `function(*args)`, and where its results will lie."""
        return capture(function, *args, pool=pool)


def why_not_captured(target: PreTrainedModel, drafter: PreTrainedModel | None) -> str | None:
    """What about the models keeps rounds from being captured; None if nothing does."""
    if is_spread(target) and find_peers(target) is None:  # by FSDP, which gathers weights as it goes
        return "processes have shards of the target's weights"
    models = list_models(target, drafter)
    theirs, *its = ({p.device for p in model.parameters()} for model in models)
    devices = theirs.union(*its)
    is_on_one = all(len(places) == 1 for places in (theirs, *its))
    if drafter is not None and is_on_one and target.device.type == "cuda" != drafter.device.type:
        return (
            f"the drafter is on {drafter.device} and the target on {target.device}: call "
            f'drafter.to("{target.device}"), or load it with device_map="{target.device}"'
        )
    if any(device.type != "cuda" for device in devices):
        return f"the models are on {', '.join(sorted({d.type for d in devices}))}"
    if len(devices) > 1:
        return "the models are on several devices"
    if not is_available(next(iter(devices))):
        return "Triton is not installed"
    if any(model.training for model in models):
        return "a model is in training mode"
    for module in (module for model in models for module in model.modules()):
        if has_forward_hooks(module):
            return f"{type(module).__name__} has forward hooks"
    return why_kernels_do_not(target)


# Reasons for eager rounds that were logged, by target.
_logged: "weakref.WeakKeyDictionary[PreTrainedModel, set[str]]" = weakref.WeakKeyDictionary()


def warn_once(target: PreTrainedModel, why_eager: str) -> None:
    """Warn of what keeps rounds on a GPU from being captured, once for a target and a reason."""
    logged = _logged.setdefault(target, set())
    if target.device.type == "cuda" and why_eager not in (*logged, BUSY):
        logged.add(why_eager)
        logger.warning("Rounds run eagerly, several times as slow as CUDA graphs: %s.", why_eager)


def why_kernels_do_not(target: PreTrainedModel) -> str | None:
    """Why rounds of `target` are not captured, by its layers; None if they may be."""
    name = type(target).__name__
    if (kind := next((kind for kind in known_kinds(target) if kind.why_eager), None)) is not None:
        return f"{name} {kind.why_eager}, which our kernels do not"
    if (why := why_not_replayed(target)) is not None:
        return why
    if find_listed(target) is not None:
        return f"CUDA graphs of {name} were never compared with its own forwards"
    return None


class CapturedPhases(Phases):
    """The phases of a round, replayed from graphs.

    Args:
        models: As of `Phases`, and so are `state`, `memory`, `warper` and `config`; the caches are the arena's.
        around: Entered around the forwards of rounds that cannot be replayed.
        arena: Open.
        capturer: Captures.
    """

    def __init__(
        self,
        models: Models,
        state: RoundState,
        memory: DrafterMemory,
        warper: RowWarper,
        config: RoundConfig,
        around: Sequence[AbstractContextManager],
        arena: Arena,
        capturer: CudaGraphs,
    ):
        super().__init__(models, state, memory, warper, config, around)
        self.arena, self.capturer = arena, capturer
        self.how = "replayed"  # how rounds ran, in words
        self._seconds, self._bytes = 0.0, 0  # of captures
        # None also where a capture in the middle of a call failed: rounds run eagerly.
        self.recorded: Recorded | None = None

    def begin(self) -> None:
        """Find or record the graphs.

        Raises:
            KnownUnfitError: That failed before.
            Exception: Whatever comes of it.
        """
        self.recorded = self._record()

    @property
    def around(self) -> Sequence[AbstractContextManager]:
        """Nothing around what is replayed."""
        return super().around if self.recorded is None else ()

    @property
    def rounds_in_flight(self) -> int:
        """As of the eager phases, but scores that are kept would be overwritten."""
        if self.config.keeps_scores:
            return 0
        asked = self.capturer.rounds_in_flight
        return super().rounds_in_flight if asked is None else asked

    def read_pending(self) -> None:
        """Replay."""
        if self.recorded is None:
            super().read_pending()
        else:
            self.recorded.read_pending()

    def switch(self, shape: DraftShape) -> None:
        """As of the eager phases; each shape has graphs of its own."""
        super().switch(shape)
        self.recorded = self._record_or_not()

    def draft(self) -> Proposal:
        """Replay."""
        if self.recorded is None:
            return super().draft()
        self.recorded.draft()
        return self.recorded.proposal

    def verify(self, proposal: Proposal) -> Verified:
        """Replay."""
        if self.recorded is None:
            return super().verify(proposal)
        self.recorded.verify()
        return self.recorded.verified

    def accept(self, proposal: Proposal, verified: Verified) -> Accepted:
        """Replay; first tokens, which the prompt's logits give, are accepted eagerly."""
        if self.recorded is None or proposal is not self.recorded.proposal:
            return super().accept(proposal, verified)
        assert self.recorded.accept is not None
        assert self.recorded.accepted is not None
        self.recorded.accept()
        return self.recorded.accepted

    def reserve(self, num_slots: int) -> bool:
        """As of the eager phases. Graphs over the smaller memory are recorded anew."""
        if num_slots <= self.arena.capacity:
            return False
        num_rows = len(self.state.length)
        self.state.cache.begin_replay(self.arena.num_tokens)  # states are in the arena then
        self.arena.reserve(num_slots + min(num_slots, 4 * self.capturer.first_room))
        self.state.cache, self.memory.cache = self.arena.first_rows(num_rows)
        self.recorded = self._record_or_not()
        return True

    def keep(self, rows: list[int], *, num_left: float) -> list[int]:
        """As of the eager phases; a smaller batch has graphs of its own."""
        num_rows = len(self.state.length)
        places = super().keep(rows, num_left=num_left)
        if len(places) < num_rows:
            self.recorded = self._record_or_not()
        return places

    def adapt(self, config: RoundConfig, warper: RowWarper) -> None:
        """As of the eager phases; other settings have graphs of their own, and so has a larger batch."""
        super().adapt(config, warper)
        self.recorded = self._record_or_not()

    def _choose_size(self, num_rows: int) -> int:
        """Few sizes, few graphs."""
        return min(1 << (num_rows - 1).bit_length(), self.arena.num_rows)

    def _choose_places(self, rows: list[int], *, num_left: float) -> list[int]:
        """All until half of the batch is done, and then those of a smaller one if that is worth its graphs.

        It is if much is still to come, or if calls before would have gained as much by now.
        """
        num_rows = len(self.state.length)
        size = 1 << (len(rows) - 1).bit_length()  # few sizes, few graphs
        if 2 * size > num_rows:
            return list(range(num_rows))
        key = self._key(size)
        if key not in self.arena.recorded and num_left < self.capturer.worth_capture:
            self.arena.declined[key] += 1
            if self.arena.declined[key] < self.capturer.worth_capture:
                return list(range(num_rows))
        done = [b for b in range(num_rows) if b not in rows]
        return [*rows, *done[: size - len(rows)]]

    def _take_rows(self, index: Tensor) -> tuple[RowCache, RowCache]:
        """As of the eager phases, within the arena."""
        caches = self.arena.first_rows(len(index))
        for cache, whole in zip(caches, (self.state.cache, self.memory.cache), strict=True):
            cache.take_rows(whole, index)
        return caches

    def _record_or_not(self) -> Recorded | None:
        """As `_record` in the middle of a call, which can go on without."""
        try:
            return self._record()
        except Exception as error:  # noqa: BLE001  whatever it is, the eager phases need none of it
            self.how = f"none from here on ({type(error).__name__}: {error})"
            logger.warning(
                "Rounds of %d rows cannot be captured, so they run eagerly: %s", len(self.state.length), error
            )
            return None

    def _record(self) -> Recorded:
        """The graphs for this batch: found, or captured. State, memory and settings go over to their tensors."""
        num_rows = len(self.state.length)
        key = self._key(num_rows)
        refuse_unequal(self.models.target)
        self.state.cache.begin_replay(self.arena.num_tokens)
        recorded = self.arena.recorded.pop(key, None)
        if recorded is None:
            if (reason := self.arena.unfit.get(key)) is not None:
                raise KnownUnfitError(reason)
            device = self.arena.device
            # Capturing empties the allocator anyway. Before measuring: the difference then is the graphs' memory.
            torch.cuda.empty_cache()
            start, before = time.perf_counter(), memory_in_use(device)
            try:
                with lock_of(self.models.target).alone():
                    recorded = self._capture()
            finally:
                self.state.cache.forget_block()  # of a warm-up
            self._seconds += time.perf_counter() - start
            self._bytes += memory_in_use(device) - before
            self.how = f"captured in {self._seconds:.2f} s, {max(self._bytes, 0) / 2**20:.0f} MiB"
            logger.info("Rounds of %d rows, %s: %s.", num_rows, self.shape.name, self.how)
        self.arena.recorded[key] = recorded  # the newest last
        while len(self.arena.recorded) > self.capturer.max_graphs:
            synchronize(self.arena.device)
            self.arena.recorded.popitem(last=False)
        recorded.state.cache.join_replay()  # that of an earlier call, over the same memory
        recorded.state.copy_from(self.state)
        recorded.memory.copy_from(self.memory)
        recorded.warper.copy_from(self.warper)
        self.state, self.memory, self.warper = recorded.state, recorded.memory, recorded.warper
        return recorded

    def give_up(self, reason: str) -> None:
        """Never capture these rounds again."""
        self.arena.unfit[self._key(len(self.state.length))] = reason

    def _key(self, num_rows: int) -> tuple:
        """What tells sets of graphs apart."""
        config = self.config
        rule = (self.rule, config.do_sample, config.simulated_length, config.coverage, config.is_seeded)
        return (
            num_rows,
            self.shape,
            self.memory.tokens.shape[1],
            *rule,
            config.in_order,
            self.state.shift.dim(),
            *describe_arithmetic(),
            *self.warper.key,
        )

    def _capture(self) -> Recorded:
        models = self.models.present
        if find_peers(self.models.target) is not None:
            call_before_groups_end(release_graphs)
        with torch.inference_mode(False), torch.no_grad():
            state, memory = self.state.over(self.state.cache), self.memory.over(self.memory.cache)
            # A warm-up must not write over what the caches hold: before a call's first token they hold one slot more
            # than `length` counts.
            state.length += 1
        phases = Phases(self.models, state, memory, self.warper.clone(), self.config)
        phases.switch(self.shape)
        if is_available(self.arena.device):
            phases.warper.divide = divide_rows
            phases.add_noise, phases.find_top = add_noise_rows, top_rows

        is_fixed = self.config.shapes.is_fixed

        def run_all() -> None:
            state.cache.forget_block()  # so that states stay what they are
            if not is_fixed:
                phases.read_pending()
            proposal = phases.draft()
            verified = phases.verify(proposal)
            if not self.config.in_order:
                phases.accept(proposal, verified)

        options = {"pool": self.arena.pool}
        with ExitStack() as stack:
            stack.enter_context(running_by_rows(*models))
            stack.enter_context(fused(*models))
            stack.enter_context(casting_within(self.arena.device))
            self.capturer.warm_up(run_all, state.length.device)
            state.cache.forget_block()
            read_pending = do_nothing
            if not is_fixed:
                read_pending, _ = self.capturer.capture(phases.read_pending, **options)
            if self.shape.num_nodes:
                draft, proposal = self.capturer.capture(phases.draft, **options)
            else:
                draft, proposal = do_nothing, phases.draft()
            verify, verified = self.capturer.capture(phases.verify, proposal, **options)
            accept = accepted = None
            if not self.config.in_order:
                accept, accepted = self.capturer.capture(phases.accept, proposal, verified, **options)
        return Recorded(
            state, memory, phases.warper, read_pending, draft, verify, accept, proposal, verified, accepted
        )


def casting_within(device: torch.device) -> AbstractContextManager[Any]:
    """Let what is recorded cast weights anew each time, if `torch.autocast` is on: those that it keeps go when it ends."""
    dtype = describe_autocast(device)
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def describe_arithmetic() -> tuple:
    """The global switches that products are chosen by when they are recorded."""
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on the old name cannot be read once the new one was set.
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    return (
        getattr(matmul, name),
        getattr(torch.backends, "fp32_precision", None),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


def do_nothing() -> None:
    """What a round leaves out."""
