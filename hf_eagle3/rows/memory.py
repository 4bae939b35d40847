"""What a cache of rows keeps of one layer: keys and values by slot, or nothing; states are in `states.py`.

Each kind says how a block writes it and how a rejected tail is forgotten. `RowCache` has one of them for each layer.
"""

import copy
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ..kernels.attention import write_rows, write_rows_eager

if TYPE_CHECKING:
    from .cache import RowCache

# Whether kernels write to caches: captured rounds. Eager rounds use PyTorch, since a card may run no kernel.
BY_KERNELS: ContextVar[bool] = ContextVar("by_kernels", default=False)


class Nothing(CacheLayerMixin):
    """A layer that caches nothing, as a feed-forward one. The others override what concerns them."""

    def __init__(self, cache: "RowCache"):
        super().__init__()
        self.cache = cache

    def reserve(self, more: int) -> None:
        """Make room for `more` slots in each row."""

    def from_host(self, theirs: Any, columns: Tensor, *, move: bool) -> None:  # Any: a layer of the host's cache
        """Hold what the host's layer holds; arguments as of `RowCache.from_host`."""

    def to_host(self, cache: Cache, index: int, slots: Tensor) -> None:
        """Make layer `index` of the host's `cache` hold what this one holds; `slots` as of `RowCache.to_host`."""

    def held(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [B, L, H_kv, D] by slots, of which a path of the last block may be kept."""
        return iter(())

    def end(self, num_tokens: int) -> None:
        """Look at what a forward over a block of so many tokens has left."""

    def settle(self, kept: Tensor) -> None:
        """Forget the last block behind its first `kept` [B] tokens."""

    def begin_replay(self, whole: Any, rows: slice, num_tokens: int) -> None:  # Any: a layer of the same kind
        """Let what captured rounds go on from be in the memory of `rows` of another layer, for blocks of `num_tokens`."""

    def end_replay(self, kept: Tensor) -> None:
        """Forget the last captured block behind its first `kept` [B] tokens."""

    def share(self, whole: Any, rows: slice) -> None:  # Any: likewise
        """Be over the memory of `rows` of another layer."""

    def take_rows(self, other: Any, rows: Tensor) -> None:  # Any: likewise
        """Hold the `rows` [B'] int64 of another layer."""

    def put(self, other: Any, places: Tensor, of: int) -> None:  # Any: likewise
        """Hold the rows of another layer in the `places` [B'] int64; `of` is how many rows there are in all."""

    def list_memory(self) -> list[Tensor]:
        """The tensors that it keeps."""
        return [x for pair in self.held() for x in pair]

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] int64 only."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make room for."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]  # noqa: ARG002  the host's
        """Keep nothing of what comes."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that are seen, and the first of them. Most forwards come with masks."""
        return query_length + self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        """Slots before the block where a forward counts by itself, as of the longest row; lengths are the rows' own."""
        return self.cache.num_before

    def get_max_length(self) -> int:
        """Slots in a row."""
        return self.cache.capacity


class KeyValues(Nothing):
    """Keys [B, L, H_kv, D] and values [B, L, H_kv, D_v] of one layer, written wherever the cache says.

    A rejected tail lies behind its row's length, where no mask shows it and the next write covers it.
    """

    is_sliding = False  # full length even under a sliding window: the mask cuts

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for what is like `key_states` [B, H_kv, T, D] and `value_states` [B, H_kv, T, D_v]."""
        self.make_room(key_states, value_states, len(key_states))

    def make_room(self, keys_like: Tensor, values_like: Tensor, num_rows: int) -> None:
        """Memory for `num_rows` rows: of its own, or a part of what the cache is a view of."""
        if self.cache.whole is not None:
            whole, whole_rows, start = self.cache.whole
            layer = self.find_same(whole)
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

    def find_same(self, whole: "RowCache") -> Any:  # Any: a layer of the same kind
        """The layer of another cache that stands where this one does in its own."""
        return whole.layers[self.cache.layers.index(self)]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]  # noqa: ARG002  the host's
        """Write T new positions; what to attend to, [B, H_kv, num_visible, D] and [.., D_v]."""
        if not self.is_initialized:
            KeyValues.lazy_initialization(self, key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        assert self.cache.block is not None
        if self.cache.is_first:
            for memory, new in ((self.keys, key_states), (self.values, value_states)):
                memory[:, : new.shape[2]] = new.transpose(1, 2)
            return key_states, value_states
        write = write_rows if BY_KERNELS.get() else write_rows_eager
        write(self.keys, self.values, key_states, value_states, self.cache.block.start)
        keys, values = (x[:, : self.cache.num_visible].transpose(1, 2) for x in (self.keys, self.values))
        return (keys.contiguous(), values.contiguous()) if self.cache.is_dense else (keys, values)

    def _each(self) -> Iterator[tuple[str, Tensor]]:
        """Keys and values by their names, where there are any yet."""
        for name in ("keys", "values") if self.is_initialized else ():
            yield name, getattr(self, name)

    def reserve(self, more: int) -> None:
        """Make room for `more` slots in each row."""
        for name, memory in self._each():
            with torch.inference_mode(False):
                setattr(self, name, torch.nn.functional.pad(memory, (0, 0, 0, 0, 0, more)))

    def from_host(self, theirs: Any, columns: Tensor, *, move: bool) -> None:
        """Hold what the host's layer holds, position by position."""
        if not theirs.is_initialized or theirs.keys is None:  # shares another layer's
            return
        rows = torch.arange(len(columns))[:, None]
        first = theirs.get_seq_length() - theirs.keys.shape[-2]  # before it, a window has forgotten
        index = (columns - first).clamp(min=0).to(theirs.keys.device)  # [B, P]
        if not self.is_initialized:
            KeyValues.lazy_initialization(self, theirs.keys, theirs.values)
        assert self.keys is not None
        assert self.values is not None
        for mine, given in ((self.keys, theirs.keys), (self.values, theirs.values)):
            mine[:, : columns.shape[1]] = given.transpose(1, 2)[rows.to(given.device), index]
        if move:
            theirs.keys = theirs.values = None

    def to_host(self, cache: Cache, index: int, slots: Tensor) -> None:
        """Make layer `index` of the host's `cache` hold what lies in `slots`, and nothing else."""
        if not self.is_initialized:
            return
        is_pad = (slots < 0)[..., None, None]  # [B, S, 1, 1]
        rows = torch.arange(len(slots))[:, None]
        if index < len(cache.layers):
            fresh = copy.copy(cache.layers[index])  # an empty one of that kind
            fresh.is_initialized = False
            if hasattr(fresh, "cumulative_length"):
                fresh.cumulative_length = 0
            cache.layers[index] = fresh
        keys, values = (
            x[rows.to(x.device), slots.clamp(min=0).to(x.device)].masked_fill(is_pad.to(x.device), 0)
            for _, x in self._each()
        )  # [B, S, H_kv, D]
        cache.update(keys.transpose(1, 2), values.transpose(1, 2), index)

    def held(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Its own, where there are any yet."""
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            yield self.keys, self.values

    def share(self, whole: Any, rows: slice) -> None:
        """Be over the memory of `rows` of another layer."""
        if whole.is_initialized:
            self.keys, self.values = whole.keys[rows], whole.values[rows]
            self.is_initialized = True

    def take_rows(self, other: Any, rows: Tensor) -> None:
        """Hold the `rows` of another layer, which may be over the same memory."""
        if not other.is_initialized:
            return
        if not self.is_initialized:
            self.make_room(other.keys.transpose(1, 2), other.values.transpose(1, 2), len(rows))
        for name, memory in self._each():
            given = getattr(other, name)[
                rows, : memory.shape[1]
            ]  # slots behind its rows' lengths may be fewer, or more
            memory[:, : given.shape[1]].copy_(given)

    def put(self, other: Any, places: Tensor, of: int) -> None:
        """Hold the rows of another layer in these places."""
        if not other.is_initialized:
            return
        if not self.is_initialized:
            self.make_room(other.keys.transpose(1, 2), other.values.transpose(1, 2), of)
        for name, memory in self._each():
            given = getattr(other, name)[:, : memory.shape[1]]  # likewise
            memory[:, : given.shape[1]].index_copy_(0, places.to(memory.device), given)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` only."""
        for name, memory in self._each():
            setattr(self, name, memory[rows.to(memory.device)])


class IndexerKeys(KeyValues):
    """Keys of an indexer, [B, L, 1, D], with values of no width beside them."""

    def __init__(self, owner: "IndexedKeyValues"):
        super().__init__(owner.cache)
        self.owner = owner

    def find_same(self, whole: "RowCache") -> Any:
        """The indexer's keys of the layer that stands where this one's owner does."""
        return self.owner.find_same(whole).indexer


class IndexedKeyValues(KeyValues):
    """Keys and values, and the keys by which an indexer chooses among the positions; those are written and forgotten alike."""

    def __init__(self, cache: "RowCache"):
        super().__init__(cache)
        self.indexer = IndexerKeys(self)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Write the indexer's keys [B, T, D] of T new positions; those to choose from, [B, num_visible, D]."""
        keys = indexer_key_states[:, None]
        return self.indexer.update(keys, keys[..., :0])[0][:, 0]

    def reserve(self, more: int) -> None:
        """Make room for `more` slots in each row."""
        super().reserve(more)
        self.indexer.reserve(more)

    def take_from(self, theirs: Any, *, move: bool) -> Tensor | None:  # Any: a layer of the host's cache
        """The indexer's keys [B, 1, S, D] of the host's layer, which forgets them if they are to `move`."""
        given = getattr(theirs, "indexer_keys", None)
        if move and given is not None:
            theirs.indexer_keys, theirs.is_indexer_initialized = None, False
        return None if given is None else given[:, None]

    def give_to(self, theirs: Any, keys: Tensor) -> None:  # Any: likewise
        """Let the host's layer have the indexer's keys [B, 1, S, D]."""
        theirs.is_indexer_initialized = False
        theirs.update_indexer(keys[:, 0])

    def from_host(self, theirs: Any, columns: Tensor, *, move: bool) -> None:
        """Hold what the host's layer holds."""
        super().from_host(theirs, columns, move=move)
        keys = self.take_from(theirs, move=move)
        if keys is not None:  # else another layer's choice counts
            held = DynamicLayer()
            held.update(keys, keys[..., :0])
            self.indexer.from_host(held, columns, move=True)

    def to_host(self, cache: Cache, index: int, slots: Tensor) -> None:
        """Make layer `index` of the host's `cache` hold what this one holds."""
        super().to_host(cache, index, slots)
        if self.indexer.is_initialized:
            held = DynamicCache()
            self.indexer.to_host(held, 0, slots)
            self.give_to(cache.layers[index], held.layers[0].keys)

    def held(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Its own, and the indexer's."""
        yield from super().held()
        yield from self.indexer.held()

    def share(self, whole: Any, rows: slice) -> None:
        """Be over the memory of `rows` of another layer."""
        super().share(whole, rows)
        self.indexer.share(whole.indexer, rows)

    def take_rows(self, other: Any, rows: Tensor) -> None:
        """Hold the `rows` of another layer, which may be over the same memory."""
        super().take_rows(other, rows)
        self.indexer.take_rows(other.indexer, rows)

    def put(self, other: Any, places: Tensor, of: int) -> None:
        """Hold the rows of another layer in these places."""
        super().put(other, places, of)
        self.indexer.put(other.indexer, places, of)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` only."""
        super().select(rows)
        self.indexer.select(rows)


class BlockKeyValues(IndexedKeyValues):
    """The same where an indexer chooses blocks of slots, as MiniMax M3's does."""

    def update_index(self, idx_k: Tensor) -> Tensor:
        """Write the indexer's keys [B, 1, T, D] of T new positions; those to choose from, [B, 1, num_visible, D]."""
        return self.indexer.update(idx_k, idx_k[..., :0])[0]

    def take_from(self, theirs: Any, *, move: bool) -> Tensor | None:
        """The indexer's keys of the host's layer."""
        given = theirs.idx_keys
        if move:
            theirs.idx_keys = None
        return given

    def give_to(self, theirs: Any, keys: Tensor) -> None:
        """Let the host's layer have the indexer's keys."""
        theirs.idx_keys = keys
