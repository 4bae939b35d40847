"""Static memory for captured rounds, and the graphs recorded over it: one arena a target, kept between calls."""

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafters.draft import DrafterMemory
from ..rows.attention import own_attention
from ..rows.cache import RowCache, to_bucket
from ..rows.layers import LayerKind, find_kinds
from ..rows.memory import KeyValues
from ..rows.states import States
from ..speculation.shape import Shapes
from ..speculation.verdict import Proposal
from ..speculation.warpers import RowWarper
from ..tensor_parallel import local
from .cuda_graphs import new_pool, synchronize
from .phases import Accepted, Verified, list_models
from .state import RoundState


class KnownUnfitError(RuntimeError):
    """These rounds could not be captured before."""


class CacheMemoryError(torch.OutOfMemoryError):
    """The device has no room for the caches of a call."""


@dataclass(slots=True)
class Recorded:
    """The graphs of a round, the tensors they work on, and where each leaves its results."""

    state: RoundState
    memory: DrafterMemory
    warper: RowWarper
    read_pending: Callable[[], None]
    draft: Callable[[], None]
    verify: Callable[[], None]
    accept: Callable[[], None] | None  # None where processors look at the text
    proposal: Proposal
    verified: Verified
    accepted: Accepted | None


class Arena:
    """Static memory for rounds of up to `num_rows` rows, and the graphs recorded over it.

    Caches are filled from the front; a smaller batch uses the first rows.
    """

    def __init__(
        self,
        num_rows: int,
        capacity: int,
        num_tokens: int,
        target_layers: Sequence[LayerKind],
        drafter_layers: int,
        fingerprint: tuple,
        device: torch.device,
    ):
        self.num_rows, self.capacity, self.fingerprint, self.device = num_rows, capacity, fingerprint, device
        self.num_tokens = num_tokens  # most of a block, where what a block does to states is kept
        self.autocast = describe_autocast(device)  # on which the dtype of keys and values depends
        self.caches = (RowCache(target_layers, capacity), RowCache(drafter_layers, capacity))
        self.recorded: OrderedDict[tuple, Recorded] = OrderedDict()
        self.pool = new_pool()
        self.unfit: dict[tuple, str] = {}  # why capture failed, by what tells sets of graphs apart
        # Rounds that ran over a larger batch because a smaller one had no graphs, by the smaller one's key.
        self.declined: Counter[tuple] = Counter()

    def fits(self, num_rows: int, num_slots: int, num_tokens: int, fingerprint: tuple) -> bool:
        """Whether a call with so many of each finds what it needs.

        Memory is as the models were that first wrote to it: layers, heads and dtype, of the drafter, too.
        """
        is_large = self.num_rows >= num_rows and self.capacity >= num_slots
        is_deep = not self.caches[0].has_states or self.num_tokens >= num_tokens
        return (
            is_large and is_deep and (self.fingerprint, self.autocast) == (fingerprint, describe_autocast(self.device))
        )

    def first_rows(self, num_rows: int) -> tuple[RowCache, RowCache]:
        """The target's and the drafter's cache, of the first rows."""
        target_cache, drafter_cache = (cache.view(0, num_rows, of=self.num_rows) for cache in self.caches)
        return target_cache, drafter_cache

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` in each row. If there is less, graphs go."""
        if num_slots <= self.capacity:
            return
        self.forget()
        for cache in self.caches:
            cache.reserve(num_slots)
        self.capacity = self.caches[0].capacity

    def renew(self, fingerprint: tuple) -> None:
        """Drop all graphs, since what they rest on is another."""
        self.forget()
        self.fingerprint = fingerprint
        self.unfit.clear()

    def forget(self) -> None:
        """Drop all graphs, and what a failed capture left."""
        synchronize(self.device)  # one may be running
        self.recorded.clear()
        self.pool = new_pool()


_arenas: "weakref.WeakKeyDictionary[PreTrainedModel, Arena]" = weakref.WeakKeyDictionary()


def release_graphs() -> None:
    """Free what captured rounds keep on the GPU between calls: caches and CUDA graphs of all targets."""
    for arena in _arenas.values():
        arena.forget()
    _arenas.clear()


def count_cache_bytes(target: PreTrainedModel) -> int:
    """Bytes of keys, values and states, the drafter's too, that are kept for `target` between calls."""
    arena = _arenas.get(target)
    layers = [layer for cache in arena.caches for layer in cache.layers] if arena is not None else []
    return sum(x.nbytes for layer in layers for x in layer.list_memory())


def take_fingerprint(target: PreTrainedModel, drafter: PreTrainedModel | None) -> tuple:
    """What graphs rest on besides sizes: where each weight is, which adapters are on, how the models attend."""
    models = list_models(target, drafter)
    configs = [model.config.get_text_config(decoder=True) for model in models]
    marks: list[Any] = [*map(own_attention, configs), id(drafter)]
    for model in models:
        for module in model.modules():
            marks.append(id(vars(module).get("forward")))  # no reference: the model may go
            if isinstance(getattr(type(module), "active_adapters", None), property):  # PEFT's layers
                marks.append((str(module.active_adapters), str(getattr(module, "scaling", None))))
                marks.append((getattr(module, "disable_adapters", None), getattr(module, "merged", None)))
        marks.extend((local(x).data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers()))
    marks.extend(tensor.data_ptr() for tensor in ({} if drafter is None else drafter._borrowed).values())
    return tuple(marks)


@contextmanager
def open_arena(
    target: PreTrainedModel,
    drafter: PreTrainedModel | None,
    *,
    num_rows: int,
    num_new: int,
    prompt_length: int,
    shapes: Shapes,
) -> Iterator[Arena]:
    """The target's arena, with room for a call that adds `num_new` tokens to each row, for the length of that call."""
    num_slots = to_bucket(prompt_length + num_new + shapes.slack)
    fingerprint = take_fingerprint(target, drafter)
    arena = _arenas.get(target)
    num_tokens = shapes.num_verified
    if arena is not None and not arena.fits(num_rows, num_slots, num_tokens, fingerprint):
        arena.forget()
        del _arenas[target]
        arena = None
    if arena is None:
        layers = find_kinds(target), 0 if drafter is None else drafter.config.num_hidden_layers
        arena = Arena(num_rows, num_slots, num_tokens, *layers, fingerprint, target.device)
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
    memories = [kind.memory for kind in find_kinds(target)]
    num_attending = sum(issubclass(memory, KeyValues) for memory in memories)
    size = 2 * num_attending * heads * head_dim * num_slots * num_rows * target.dtype.itemsize
    num_recurrent = sum(issubclass(memory, States) for memory in memories)
    beside = f", beside the states of {num_recurrent} recurrent layers" if num_recurrent else ""
    return f"whose keys and values take {size / 2**30:.2f} GiB{beside}"


def describe_autocast(device: torch.device) -> torch.dtype | None:
    """What products on `device` are cast to in this thread, by `torch.autocast`; None if they are not."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
