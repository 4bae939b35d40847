"""Caches whose rows have lengths of their own.

A slot is where a position lives: slot = position, in every row and layer. What lies in slots at or behind a row's
length is junk that the next write overwrites and no mask shows.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..kernels.attention import keep_rows, keep_rows_eager, write_rows, write_rows_eager
from .block import Block

# The cache that the current forward writes to.
WRITING: ContextVar["RowCache | None"] = ContextVar("writing", default=None)
# Whether kernels write to it: captured rounds. Eager rounds use PyTorch, since a card may run no kernel.
BY_KERNELS: ContextVar[bool] = ContextVar("by_kernels", default=False)


def to_bucket(num_slots: int) -> int:
    """The capacity for `num_slots`: few distinct sizes, at most an eighth or 64 slots more than needed."""
    step = max(64, 1 << max(num_slots.bit_length() - 4, 0))
    return -(-num_slots // step) * step


def count_cached_layers(model: PreTrainedModel) -> int:
    """Layers for which the host's cache of `model` has a place. Up to 5.23 those that share keys have none at the end."""
    return len(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)


class RowLayer(CacheLayerMixin):
    """Keys [B, L, H_kv, D] and values [B, L, H_kv, D_v] of one layer, written wherever the cache says."""

    is_sliding = False  # full length even under a sliding window: the mask cuts

    def __init__(self, cache: "RowCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for what is like `key_states` [B, H_kv, T, D] and `value_states` [B, H_kv, T, D_v]."""
        self.make_room(key_states, value_states, len(key_states))

    def make_room(self, keys_like: Tensor, values_like: Tensor, num_rows: int) -> None:
        """Memory for `num_rows` rows: of its own, or a part of what the cache is a view of."""
        if self.cache.whole is not None:
            whole, whole_rows, start = self.cache.whole
            layer = whole.layers[self.cache.layers.index(self)]
            if not layer.is_initialized:
                layer.make_room(keys_like, values_like, whole_rows)
            self.keys, self.values = layer.keys[start : start + num_rows], layer.values[start : start + num_rows]
        else:
            # Zeros, as a masked slot still takes part with weight 0, and 0 * NaN is NaN. Memory that outlives a call
            # under inference_mode must not belong to it.
            with torch.inference_mode(False):
                self.keys, self.values = (
                    like.new_zeros(num_rows, self.cache.capacity, like.shape[1], like.shape[3])
                    for like in (keys_like, values_like)
                )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]  # noqa: ARG002  the host's
        """Write T new positions; what to attend to, [B, H_kv, num_visible, D] and [.., D_v]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        assert self.cache.block is not None
        write = write_rows if BY_KERNELS.get() else write_rows_eager
        write(self.keys, self.values, key_states, value_states, self.cache.block.start)
        if self.cache.is_first:
            return key_states, value_states
        keys, values = (x[:, : self.cache.num_visible].transpose(1, 2) for x in (self.keys, self.values))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Asked for the first forward only; all others come with masks."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """As above: lengths are the rows' own."""
        return 0

    def get_max_length(self) -> int:
        """Slots in a row."""
        return self.cache.capacity


class RowCache(Cache):
    """A cache [B, L] a layer. Each forward says by `writing` which block it adds.

    Args:
        num_layers: Of the model.
        capacity: L to begin with.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity = capacity
        self.block: Block | None = None  # while a forward runs: what it adds
        self.is_first = False  # while the first forward runs, over nothing but its own positions
        self.num_visible = capacity  # while a forward runs: how many of the L slots it attends to
        self.whole: tuple[RowCache, int, int] | None = None  # whose rows these are, of how many, and from which on
        super().__init__(layers=[RowLayer(self) for _ in range(num_layers)])

    @contextmanager
    def writing(self, block: Block, *, is_first: bool = False) -> Iterator["RowCache"]:
        """Let one forward add a block.

        On a CPU it attends to no more slots than the longest row needs; elsewhere to ask would be a wait.
        """
        self.is_first = is_first
        self.num_visible = self.capacity
        if block.start.device.type == "cpu":
            self.num_visible = min(to_bucket(int(block.start.max()) + block.num_tokens), self.capacity)
        self.block = block._replace(start=block.start.contiguous())
        token = WRITING.set(self)
        try:
            yield self
        finally:
            WRITING.reset(token)
            self.block, self.is_first = None, False

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` in each row."""
        if num_slots <= self.capacity:
            return
        assert self.whole is None
        more = to_bucket(num_slots) - self.capacity
        self.capacity += more
        for layer in self.layers:
            if layer.is_initialized:
                with torch.inference_mode(False):
                    layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, 0, 0, 0, more))
                    layer.values = torch.nn.functional.pad(layer.values, (0, 0, 0, 0, 0, more))

    def from_host(self, cache: Cache, columns: Tensor, *, move: bool) -> None:
        """Hold what the host's `cache` holds, row by row.

        Args:
            cache: Of full and sliding-window layers.
            columns: [B, P] int64, the host's slot of each row's position.
            move: Empty the host's, layer by layer, so that no more than one is held twice.
        """
        rows = torch.arange(len(columns))[:, None]
        for layer, theirs in zip(self.layers, cache.layers, strict=True):
            if not theirs.is_initialized or theirs.keys is None:  # shares another layer's
                continue
            first = theirs.get_seq_length() - theirs.keys.shape[-2]  # before it, a window has forgotten
            index = (columns - first).clamp(min=0).to(theirs.keys.device)  # [B, P]
            if not layer.is_initialized:
                layer.lazy_initialization(theirs.keys, theirs.values)
            for mine, given in ((layer.keys, theirs.keys), (layer.values, theirs.values)):
                mine[:, : columns.shape[1]] = given.transpose(1, 2)[rows.to(given.device), index]
            if move:
                theirs.keys = theirs.values = None

    def to_host(self, cache: Cache, slots: Tensor) -> None:
        """Make the host's `cache` hold what lies in `slots` [B, S], -1 for pads, and nothing else."""
        is_pad = (slots < 0)[..., None, None]  # [B, S, 1, 1]
        rows = torch.arange(len(slots))[:, None]
        for index, layer in enumerate(self.layers):
            if not layer.is_initialized:
                continue
            if index < len(cache.layers):
                fresh = copy.copy(cache.layers[index])  # an empty one of that kind
                fresh.is_initialized = False
                if hasattr(fresh, "cumulative_length"):
                    fresh.cumulative_length = 0
                cache.layers[index] = fresh
            keys, values = (
                x[rows.to(x.device), slots.clamp(min=0).to(x.device)].masked_fill(is_pad.to(x.device), 0)
                for x in (layer.keys, layer.values)
            )  # [B, S, H_kv, D]
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), index)

    def keep(self, start: Tensor, path: Tensor) -> None:
        """Keep of a block only the tokens on a path: token path[b, i] of row b moves to slot start[b] + i.

        Args:
            start: [B] int64, the block's.
            path: [B, n] int64, ascending.
        """
        keep = keep_rows if BY_KERNELS.get() else keep_rows_eager
        for layer in self.layers:
            if layer.is_initialized:
                keep(layer.keys, layer.values, start, path)

    def view(self, start: int, num_rows: int, *, of: int) -> "RowCache":
        """A cache over the same memory, of `num_rows` of its rows; `of` is how many it has or will have in all."""
        view = RowCache(len(self.layers), self.capacity)
        view.whole = (self, of, start)
        for mine, theirs in zip(view.layers, self.layers, strict=True):
            if theirs.is_initialized:
                rows = slice(start, start + num_rows)
                mine.keys, mine.values = theirs.keys[rows], theirs.values[rows]
                mine.is_initialized = True
        return view

    def take_rows(self, other: "RowCache", rows: Tensor) -> None:
        """Hold the `rows` [B'] int64 of `other`, which may be over the same memory."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if theirs.is_initialized:
                mine.keys.copy_(theirs.keys[rows])
                mine.values.copy_(theirs.values[rows])

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] int64 only."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys = layer.keys[rows.to(layer.keys.device)]
                layer.values = layer.values[rows.to(layer.values.device)]
