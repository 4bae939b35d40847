"""Rounds as CUDA graphs: the phases of `decode.Phases`, recorded once over static memory and replayed.

The phases themselves are those of the eager loop, run while the device records; what differs is who attends (row lengths
instead of masks) and that kernels stand in for stock layers (`kernels.fusion`). One arena a target keeps memory and
graphs between calls.
"""

import functools
import logging
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .decode import DecodeConfig, DecodeState, Drafted, Phases, Settled, Verified
from .features import StateRecorder
from .kernels.fusion import fused, has_forward_hooks
from .kernels.language import is_available
from .peers import call_before_groups_end, find_peers, is_spread, local
from .row_attention import attending_by_rows, own_attention
from .rows import RowCache, count_cached_layers, to_bucket

logger = logging.getLogger(__name__)

MAX_GRAPHS = 8  # sets of graphs that an arena keeps
FIRST_ROOM = 512  # new tokens that an arena is made for at first; it doubles as they come
BUSY = "another call of this target is under way"
WORTH_CAPTURE = 128  # tokens to come, or rounds that ran over too many rows, for which a smaller batch gets graphs
SMALL = ("length", "root", "block", "states", "num_pending", "first", "shift", "last_position")  # of DecodeState


class KnownUnfitError(RuntimeError):
    """These rounds could not be captured before."""


class CacheMemoryError(torch.OutOfMemoryError):
    """The device has no room for the caches of a call."""


@dataclass(slots=True)
class Recorded:
    """The graphs of a round, and where each leaves its results."""

    phases: Phases  # whose tensors they use
    draft: Callable[[], None]
    verify: Callable[[], None]
    settle: Callable[[], None] | None  # None where processors look at the text
    drafted: Drafted
    verified: Verified
    settled: Settled | None


class Arena:
    """Static memory for rounds of up to `num_rows` rows, and the graphs recorded over it.

    Caches are filled from the front; a smaller batch uses the first rows.
    """

    def __init__(
        self,
        num_rows: int,
        capacity: int,
        target_layers: int,
        drafter_layers: int,
        fingerprint: tuple,
        device: torch.device,
    ):
        self.num_rows, self.capacity, self.fingerprint, self.device = num_rows, capacity, fingerprint, device
        self.autocast = describe_autocast(device)  # on which the dtype of keys and values depends
        self.caches = (RowCache(target_layers, capacity), RowCache(drafter_layers, capacity))
        self.recorded: OrderedDict[tuple, Recorded] = OrderedDict()
        self.pool = new_pool()
        self.unfit: dict[tuple, str] = {}  # why capture failed, by what tells sets of graphs apart
        self.declined: Counter[tuple] = Counter()  # rounds, likewise, that ran over more rows than they needed

    def first_rows(self, num_rows: int) -> tuple[RowCache, RowCache]:
        """The target's and the drafter's cache, of the first rows."""
        target_cache, drafter_cache = (cache.view(0, num_rows, of=self.num_rows) for cache in self.caches)
        return target_cache, drafter_cache

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` in each row. Graphs go."""
        self.forget()
        for cache in self.caches:
            cache.reserve(num_slots)
        self.capacity = self.caches[0].capacity

    def forget(self) -> None:
        """Drop all graphs, and what a failed capture left."""
        synchronize(self.device)  # one may be running
        self.recorded.clear()
        self.pool = new_pool()


_lock = threading.Lock()  # of the next two: which calls and threads use a target
_busy: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()  # targets whose arena a call uses
_turns: "weakref.WeakKeyDictionary[PreTrainedModel, Turns]" = weakref.WeakKeyDictionary()
_one_capture = threading.Lock()  # PyTorch knows one at a time, and nobody may wait for a whole device meanwhile
_failed: list[torch.cuda.CUDAGraph] = []  # the allocator of pinned memory goes on asking them
_arenas: "weakref.WeakKeyDictionary[PreTrainedModel, Arena]" = weakref.WeakKeyDictionary()


def release_graphs() -> None:
    """Free what captured rounds keep on the GPU between calls: caches and CUDA graphs of all targets."""
    for arena in _arenas.values():
        arena.forget()
    _arenas.clear()


def count_cache_bytes(target: PreTrainedModel) -> int:
    """Bytes of keys and values, the drafter's too, that are kept for `target` between calls."""
    arena = _arenas.get(target)
    layers = [layer for cache in arena.caches for layer in cache.layers] if arena is not None else []
    return sum(x.nbytes for layer in layers if layer.is_initialized for x in (layer.keys, layer.values))


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


def why_busy(target: PreTrainedModel) -> str | None:
    """That another call uses the target's arena, if so."""
    return BUSY if target in _busy else None


def take_arena(target: PreTrainedModel) -> bool:
    """Have the target's arena to oneself, until `give_arena_back`; False if another call has it."""
    with _lock:
        is_free = target not in _busy
        _busy.add(target)
    return is_free


def give_arena_back(target: PreTrainedModel) -> None:
    """Let other calls have it."""
    with _lock:
        _busy.discard(target)


class Turns:
    """Any number of threads run a target's layers, or one records graphs over it, for which they are changed.

    A context: entered around what runs them. `alone` waits until nobody does.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running, self._records = 0, False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._records)
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the time of a recording."""
        with self._changed:
            self._changed.wait_for(lambda: not self._records and not self._running)
            self._records = True
        try:
            yield
        finally:
            with self._changed:
                self._records = False
                self._changed.notify_all()


def turns_of(target: PreTrainedModel) -> Turns:
    """Of the threads that use `target`."""
    with _lock:
        return _turns.setdefault(target, Turns())


def take_fingerprint(target: PreTrainedModel, drafter: PreTrainedModel) -> tuple:
    """What graphs rest on besides sizes: where each weight is, which adapters are on, how the models attend."""
    configs = [model.config.get_text_config(decoder=True) for model in (target, drafter)]
    marks: list[Any] = [*map(own_attention, configs), id(drafter)]
    for model in (target, drafter):
        for module in model.modules():
            marks.append(id(vars(module).get("forward")))  # no reference: the model may go
            if isinstance(getattr(type(module), "active_adapters", None), property):  # PEFT's layers
                marks.append((str(module.active_adapters), str(getattr(module, "scaling", None))))
                marks.append((getattr(module, "disable_adapters", None), getattr(module, "merged", None)))
        marks.extend((local(x).data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers()))
    marks.extend(tensor.data_ptr() for tensor in drafter._borrowed.values())
    return tuple(marks)


@contextmanager
def open_arena(
    target: PreTrainedModel, drafter: PreTrainedModel, *, num_rows: int, prompt_length: int, max_new: int, depth: int
) -> Iterator[Arena]:
    """The target's arena, with room for a call, for the length of that call."""
    slack = 4 * depth + 6  # rounds under way when the last row ends
    num_slots = to_bucket(prompt_length + min(max_new, FIRST_ROOM) + slack)
    fingerprint = take_fingerprint(target, drafter)
    arena = _arenas.get(target)
    is_too_small = arena is not None and (arena.num_rows < num_rows or arena.capacity < num_slots)
    if arena is not None and (is_too_small or arena.autocast != describe_autocast(target.device)):
        arena.forget()
        del _arenas[target]
        arena = None
    if arena is not None and arena.fingerprint != fingerprint:
        arena.forget()
        arena.fingerprint = fingerprint
        arena.unfit.clear()
    if arena is None:
        layers = count_cached_layers(target), drafter.config.num_hidden_layers
        arena = Arena(num_rows, num_slots, *layers, fingerprint, target.device)
        _arenas[target] = arena
    try:
        yield arena
    except torch.OutOfMemoryError as error:
        _arenas.pop(target, None)
        arena.forget()
        if isinstance(error, CacheMemoryError):
            raise
        raise CacheMemoryError(
            f"The device ran out of memory for {num_rows} rows of {arena.capacity} positions, "
            f"{describe_need(target, num_rows, arena.capacity)}: use fewer rows, a shorter prompt or a lower "
            f"max_new_tokens; hf_eagle3.release_graphs() frees what other targets keep. {error}"
        ) from error


def describe_need(target: PreTrainedModel, num_rows: int, num_slots: int) -> str:
    """How much memory the target's cache takes."""
    config = target.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * head_dim * num_slots * num_rows * target.dtype.itemsize
    return f"whose keys and values take {size / 2**30:.2f} GiB"


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


def describe_autocast(device: torch.device) -> torch.dtype | None:
    """What products on `device` are cast to in this thread, by `torch.autocast`; None if they are not."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


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


def warm_up(function: Callable[[], None], device: torch.device) -> None:
    """Run what is to be captured, so that kernels are compiled and libraries have their workspaces.

    Random numbers are drawn as if it had not run.
    """
    random_state = torch.cuda.get_rng_state(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.set_rng_state(random_state, device)


def capture(function: Callable, *args: Any, pool: Any) -> tuple[Callable[[], None], Any]:
    """How to replay `function(*args)` on the current device, and where its results will lie.

    A failure leaves PyTorch as it was.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream = stream_of_captures(before.device_index)
    with _one_capture, workspaces_apart():
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                results = function(*args)
        except BaseException:
            torch.cuda.set_stream(before)  # PyTorch leaves `stream` the current one
            clean_up_failed_capture(graph, stream, pool)
            raise
    return graph.replay, results


@functools.cache
def stream_of_captures(device_index: int) -> torch.cuda.Stream:
    """One for each device; PyTorch's own default is on the device that was current when it was first used."""
    return torch.cuda.Stream(device_index)


@contextmanager
def workspaces_apart() -> Iterator[None]:
    """Let cuBLAS have new workspaces inside, and forget them afterwards.

    PyTorch keeps one for each stream. Captured, it lies in the memory of the graphs that first used it, and would go with
    them, or whenever somebody clears all workspaces, as `torch.compile` does for graphs of its own: later graphs would
    write to memory that is gone.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def clean_up_failed_capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> None:
    """Undo what PyTorch begins with a capture, and leaves if CUDA refuses to end it.

    Memory stays set apart for it, and (to 2.11 at least) the device's random numbers wait for its end, so that nothing can
    be drawn outside of one. `pool` cannot be captured into again.
    """
    graph.reset()
    _failed.append(graph)
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # from PyTorch 2.8 on, and before
    end_allocation = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
    with suppress(RuntimeError):  # it ended well: the function failed, and CUDA did not mind
        end_allocation(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
    with (
        suppress(torch.OutOfMemoryError),  # the failure to tell of is the first
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"),  # one that ends
    ):
        torch.zeros(1, device=stream.device)


def new_pool() -> Any:
    """Memory for graphs that are replayed in turn."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched on `device`, and for a capture in another thread, which that would break."""
    if device.type == "cuda":
        with _one_capture:
            torch.cuda.synchronize(device)


def memory_in_use(device: torch.device) -> int:
    """Bytes that PyTorch holds on `device`."""
    return torch.cuda.memory_reserved(device)


def describe_warper(warper: Any) -> tuple:  # Any: one of the host's
    """What a warper does, as a key."""
    settings = {k: v.item() if isinstance(v, Tensor) else v for k, v in vars(warper).items()}
    return type(warper).__name__, *sorted(settings.items())
