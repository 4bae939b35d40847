"""Rounds as CUDA graphs: the phases of `decode.Phases`, recorded once over static memory and replayed.

The phases themselves are those of the eager loop, run while the device records; what differs is who attends (row lengths
instead of masks) and that kernels stand in for stock layers (`kernels.fusion`). One arena a target keeps memory and
graphs between calls.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..kernels.fusion import fused, has_forward_hooks
from ..kernels.language import is_available
from ..recorder import StateRecorder
from ..rows.attention import attending_by_rows
from ..tensor_parallel import call_before_groups_end, find_peers, is_spread
from .arena import FIRST_ROOM, MAX_GRAPHS, Arena, KnownUnfitError, Recorded, describe_autocast, release_graphs
from .cuda_graphs import capture, memory_in_use, synchronize, warm_up
from .lock import turns_of, why_busy
from .phases import Drafted, Phases, Settled, Verified
from .state import DecodeConfig, DecodeState

logger = logging.getLogger(__name__)
WORTH_CAPTURE = 128  # tokens to come, or rounds that ran over too many rows, for which a smaller batch gets graphs
SMALL = ("length", "root", "block", "states", "num_pending", "first", "shift", "last_position")  # of DecodeState


def why_not_captured(target: PreTrainedModel, drafter: PreTrainedModel) -> str | None:
    """What about the models keeps rounds from being captured; None if nothing does."""
    if is_spread(target) and find_peers(target) is None:  # by FSDP, which gathers weights as it goes
        return "processes have shards of the target's weights"
    theirs, its = ({p.device for p in model.parameters()} for model in (target, drafter))
    devices = theirs | its
    if len(theirs) == len(its) == 1 and target.device.type == "cuda" != drafter.device.type:
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
    if target.training or drafter.training:
        return "a model is in training mode"
    for module in (*target.modules(), *drafter.modules()):
        if has_forward_hooks(module):
            return f"{type(module).__name__} has forward hooks"
    return why_busy(target)


class CapturedPhases(Phases):
    """The phases of a round, replayed from graphs.

    Args:
        around: Entered around the forwards of rounds that cannot be replayed.
        arena: Open. `state` uses its caches.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: PreTrainedModel,
        recorder: StateRecorder,
        state: DecodeState,
        config: DecodeConfig,
        around: Sequence[AbstractContextManager],
        arena: Arena,
        *,
        keeps_scores: bool,
    ):
        super().__init__(target, drafter, recorder, state, config, around)
        self.arena, self.keeps_scores = arena, keeps_scores
        self.told = "replayed"
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
    def lateness(self) -> int:
        """As of the eager phases, but scores that are kept would be overwritten."""
        return 0 if self.keeps_scores else super().lateness

    def draft(self) -> Drafted:
        """Replay."""
        if self.recorded is None:
            return super().draft()
        self.recorded.draft()
        return self.recorded.drafted

    def verify(self, drafted: Drafted) -> Verified:
        """Replay."""
        if self.recorded is None:
            return super().verify(drafted)
        self.recorded.verify()
        return self.recorded.verified

    def settle(self, drafted: Drafted, verified: Verified) -> Settled:
        """Replay; the prompt's own first tokens are settled eagerly."""
        if self.recorded is None or drafted is not self.recorded.drafted:
            return super().settle(drafted, verified)
        assert self.recorded.settle is not None
        assert self.recorded.settled is not None
        self.recorded.settle()
        return self.recorded.settled

    def reserve(self, num_slots: int) -> None:
        """Make room. Graphs over the smaller memory are recorded anew."""
        if num_slots <= self.arena.capacity:
            return
        num_rows = len(self.state.length)
        self.arena.reserve(num_slots + min(num_slots, 4 * FIRST_ROOM))
        self.state.target_cache, self.state.drafter_cache = self.arena.first_rows(num_rows)
        self.recorded = self._record_or_not()

    def keep(self, rows: list[int], *, num_left: float) -> list[int]:
        """Once half of the batch is done, go on with a smaller one, if that is worth its graphs.

        It is if much is still to come, or if calls before would have gained as much by now.
        """
        num_rows = len(self.state.length)
        size = 1 << (len(rows) - 1).bit_length()  # few sizes, few graphs
        if 2 * size > num_rows:
            return list(range(num_rows))
        key = self._key(size)
        if key not in self.arena.recorded and num_left < WORTH_CAPTURE:
            self.arena.declined[key] += 1
            if self.arena.declined[key] < WORTH_CAPTURE:
                return list(range(num_rows))
        done = [b for b in range(num_rows) if b not in rows]
        rows = [*rows, *done[: size - len(rows)]]
        caches = self.arena.first_rows(size)
        index = torch.tensor(rows, device=self.state.length.device)
        for cache, whole in zip(caches, (self.state.target_cache, self.state.drafter_cache), strict=True):
            cache.take_rows(whole, index)
        values = {name: getattr(self.state, name) for name in SMALL}
        values |= {name: value[index] for name, value in values.items() if name not in ("shift", "last_position")}
        values["shift"] = values["shift"][..., index, :]
        self.state = DecodeState(**values, target_cache=caches[0], drafter_cache=caches[1])
        self.recorded = self._record_or_not()
        return rows

    def _record_or_not(self) -> Recorded | None:
        """As `_record` in the middle of a call, which can go on without."""
        try:
            return self._record()
        except Exception as error:  # noqa: BLE001  whatever it is, the eager phases need none of it
            self.told = f"none from here on ({type(error).__name__}: {error})"
            logger.warning(
                "Rounds of %d rows cannot be captured, so they run eagerly: %s", len(self.state.length), error
            )
            return None

    def _record(self) -> Recorded:
        """The graphs for this batch: found, or captured. The state goes over to their tensors."""
        num_rows = len(self.state.length)
        key = self._key(num_rows)
        recorded = self.arena.recorded.pop(key, None)
        if recorded is None:
            if (reason := self.arena.unfit.get(key)) is not None:
                raise KnownUnfitError(reason)
            device = self.arena.device
            torch.cuda.empty_cache()  # as a capture does first: what is more afterwards is its own
            start, before = time.perf_counter(), memory_in_use(device)
            with turns_of(self.target).alone():
                recorded = self._capture()
            self._seconds += time.perf_counter() - start
            self._bytes += memory_in_use(device) - before
            self.told = f"captured in {self._seconds:.2f} s, {max(self._bytes, 0) / 2**20:.0f} MiB"
            logger.info("Rounds of %d rows, depth %d: %s.", num_rows, self.config.depth, self.told)
        self.arena.recorded[key] = recorded  # the newest last
        while len(self.arena.recorded) > MAX_GRAPHS:
            synchronize(self.arena.device)
            self.arena.recorded.popitem(last=False)
        theirs = recorded.phases.state
        for name in SMALL:
            getattr(theirs, name).copy_(getattr(self.state, name))
        self.state = theirs
        return recorded

    def give_up(self, reason: str) -> None:
        """Never capture these rounds again."""
        self.arena.unfit[self._key(len(self.state.length))] = reason

    def _key(self, num_rows: int) -> tuple:
        """What tells sets of graphs apart."""
        config = self.config
        what = (config.depth, config.do_sample, config.simulated_length, self.in_order, self.state.shift.dim())
        return num_rows, *what, *describe_arithmetic(), *map(describe_warper, self.warpers)

    def _capture(self) -> Recorded:
        if find_peers(self.target) is not None:
            call_before_groups_end(release_graphs)
        with torch.inference_mode(False), torch.no_grad():
            small = {name: getattr(self.state, name).clone() for name in SMALL}
            # A warm-up must not write over what the caches hold. Before the first token of a call that reaches one
            # slot further than the lengths say.
            small["length"] += 1
            state = DecodeState(**small, target_cache=self.state.target_cache, drafter_cache=self.state.drafter_cache)
        phases = Phases(self.target, self.drafter, self.recorder, state, self.config)

        def run_all() -> None:
            drafted = phases.draft()
            verified = phases.verify(drafted)
            if not self.in_order:
                phases.settle(drafted, verified)

        pool = self.arena.pool
        with ExitStack() as stack:
            for model in (self.target, self.drafter):
                stack.enter_context(attending_by_rows(model))
            stack.enter_context(fused(self.target, self.drafter))
            stack.enter_context(casting_within(self.arena.device))
            warm_up(run_all, state.length.device)
            if self.config.depth:
                draft, drafted = capture(phases.draft, pool=pool)
            else:
                draft, drafted = do_nothing, phases.draft()
            verify, verified = capture(phases.verify, drafted, pool=pool)
            settle = settled = None
            if not self.in_order:
                settle, settled = capture(phases.settle, drafted, verified, pool=pool)
        phases.target = phases.drafter = phases.recorder = None  # type: ignore[assignment]  # the models may go first
        return Recorded(phases, draft, verify, settle, drafted, verified, settled)


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
    """The draft of depth 0."""


def describe_warper(warper: Any) -> tuple:  # Any: one of the host's
    """What a warper does, as a key."""
    settings = {k: v.item() if isinstance(v, Tensor) else v for k, v in vars(warper).items()}
    return type(warper).__name__, *sorted(settings.items())
