"""Caches whose rows have lengths of their own.

A slot is where a position lives: slot = position, in every row and layer. What lies in slots at or behind a row's
length is junk that the next write overwrites and no mask shows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..kernels.attention import keep_rows, keep_rows_eager
from .block import Block
from .layers import KINDS, LayerKind
from .memory import BY_KERNELS
from .states import States

# The cache that the current forward writes to.
WRITING: ContextVar["RowCache | None"] = ContextVar("writing", default=None)
# Whether recurrent layers take whole blocks, and first replay what counts of the last one: captured rounds.
REPLAYING: ContextVar[bool] = ContextVar("replaying", default=False)


def to_bucket(num_slots: int) -> int:
    """The capacity for `num_slots`: few distinct sizes, at most an eighth or 64 slots more than needed."""
    step = max(64, 1 << max(num_slots.bit_length() - 4, 0))
    return -(-num_slots // step) * step


class RowCache(Cache):
    """A cache [B, L] a layer. Each forward says by `writing` which block it adds.

    Args:
        kinds: Of the model's layers; a number stands for so many layers of full attention.
        capacity: L to begin with.
    """

    def __init__(self, kinds: Sequence[LayerKind] | int, capacity: int):
        self.kinds = [KINDS["full_attention"]] * kinds if isinstance(kinds, int) else kinds
        self.capacity = capacity
        self.block: Block | None = None  # while a forward runs: what it adds
        self.is_first = False  # while the first forward runs, over nothing but its own positions
        self.num_visible = capacity  # while a forward runs: how many of the L slots it attends to
        # While a forward runs that asks: how many of those are before the block, in the longest row.
        self.num_before = 0
        self.is_dense = False  # while a forward runs: whether it takes keys and values to be contiguous
        self.whole: tuple[RowCache, int, int] | None = None  # whose rows these are, of how many, and from which on
        self.part = slice(None)  # which rows of that
        self.is_stock = False  # whether recurrent layers run whole, token by token
        self._kept: Tensor | None = None  # [B] int64: what `settle` is to keep
        self._places: dict[tuple[int, ...], Tensor] = {}  # of layers in memory, for the kernel that keeps paths
        # [B] int64, where captured rounds read what counts of the last block; theirs is the word while `is_replaying`.
        self.replayed: Tensor | None = None
        self.is_replaying = False
        super().__init__(layers=[kind.memory(self) for kind in self.kinds])
        # Whether some layer keeps states: there is no way back to those before the last block.
        self.has_states = any(isinstance(layer, States) for layer in self.layers)

    @contextmanager
    def writing(
        self, block: Block, *, is_first: bool = False, most: int | None = None, like_hosts: bool = False
    ) -> Iterator["RowCache"]:
        """Let one forward add a block.

        On a CPU it attends to no more slots than the longest row needs; elsewhere to ask would be a wait.

        Args:
            block: What it adds.
            is_first: It runs over nothing but its own positions.
            most: Slots that it can attend to, if there is a limit.
            like_hosts: It asks how many positions are cached, and takes keys and values to be contiguous.
        """
        if not REPLAYING.get():
            self.settle()
        self.is_first = is_first
        self.num_visible = self.capacity if most is None else min(most, self.capacity)
        if block.start.device.type == "cpu":
            self.num_visible = min(to_bucket(int(block.start.max()) + block.num_tokens), self.num_visible)
        self.is_dense, self.num_before = like_hosts, self.num_visible - block.num_tokens if like_hosts else 0
        self.block = block._replace(start=block.start.contiguous())
        token = WRITING.set(self)
        try:
            yield self
            for layer in self.layers if self.has_states else ():
                layer.end(block.num_tokens)
        finally:
            WRITING.reset(token)
            self.block, self.is_first, self.is_dense, self.num_before = None, False, False, 0

    def keep_first(self, num_kept: Tensor) -> None:
        """Keep of the last block the first `num_kept` [B] int64 tokens of each row, 0 of them at least.

        Nothing moves until something goes on from there, so the newest word counts.
        """
        if self.is_replaying:
            assert self.replayed is not None
            self.replayed.copy_(num_kept)
        else:
            self._kept = num_kept

    def settle(self) -> None:
        """Let layers go on from what is kept of the last block, token by token if it was a captured one."""
        if self.is_replaying:
            assert self.replayed is not None
            for layer in self.layers:
                layer.end_replay(self.replayed)
            self.is_replaying = False
        elif self._kept is not None:
            kept = self._kept.cpu()  # a wait, which captured rounds do without
            for layer in self.layers:
                layer.settle(kept)
            self._kept = None

    def begin_replay(self, num_tokens: int) -> None:
        """Let captured rounds go on from here, over blocks of up to `num_tokens`, in memory that stays where it is."""
        if not self.has_states:
            return
        self.settle()
        assert self.whole is not None
        whole, num_rows, _ = self.whole
        for mine, theirs in zip(self.layers, whole.layers, strict=True):
            mine.begin_replay(theirs, self.part, num_tokens)
        if whole.replayed is None:
            device = next(layer.device for layer in self.layers if isinstance(layer, States))
            with torch.inference_mode(False):
                whole.replayed = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.join_replay()
        self.forget_block()

    def join_replay(self) -> None:
        """Be over the memory that another cache of the same rows has begun to replay from."""
        if self.whole is None or not self.has_states:
            return
        whole = self.whole[0]
        for mine, theirs in zip(self.layers, whole.layers, strict=True):
            mine.share(theirs, self.part)
        assert whole.replayed is not None
        self.replayed, self._kept, self.is_replaying = whole.replayed[self.part], None, True

    def forget_block(self) -> None:
        """Keep nothing of the last captured block."""
        if self.is_replaying:
            assert self.replayed is not None
            self.replayed.zero_()

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` in each row; what was a view has memory of its own then."""
        if num_slots <= self.capacity:
            return
        self.whole = None
        more = to_bucket(num_slots) - self.capacity
        self.capacity += more
        for layer in self.layers:
            layer.reserve(more)

    def from_host(self, cache: Cache, columns: Tensor, *, move: bool) -> None:
        """Hold what the host's `cache` holds, row by row.

        Args:
            cache: Of layers of these kinds.
            columns: [B, P] int64, the host's slot of each row's position.
            move: Empty the host's, layer by layer, so that no more than one is held twice.
        """
        for layer, theirs in zip(self.layers, cache.layers, strict=True):
            layer.from_host(theirs, columns, move=move)

    def to_host(self, cache: Cache, slots: Tensor) -> None:
        """Make the host's `cache` hold what lies in `slots` [B, S], -1 for pads, and nothing else."""
        self.settle()
        for index, layer in enumerate(self.layers):
            layer.to_host(cache, index, slots)

    def keep(self, start: Tensor, path: Tensor) -> None:
        """Keep of a block only the tokens on a path: token path[b, i] of row b moves to slot start[b] + i.

        Args:
            start: [B] int64, the block's.
            path: [B, n] int64, ascending.
        """
        held = [pair for layer in self.layers for pair in layer.held()]
        if BY_KERNELS.get():
            keep_rows(held, start, path, self._places)
            return
        for keys, values in held:
            keep_rows_eager(keys, values, start, path)

    def view(self, start: int, num_rows: int, *, of: int) -> "RowCache":
        """A cache over the same memory, of `num_rows` of its rows; `of` is how many it has or will have in all."""
        view = RowCache(self.kinds, self.capacity)
        view.whole, view.part = (self, of, start), slice(start, start + num_rows)
        for mine, theirs in zip(view.layers, self.layers, strict=True):
            mine.share(theirs, view.part)
        return view

    def beside(self) -> "RowCache":
        """Another view of what this one is a view of, or itself: `reserve` takes it away from there, and leaves this one."""
        if self.whole is None:
            return self
        whole, of, start = self.whole
        view = whole.view(start, self.part.stop - start, of=of)
        view._kept = self._kept
        if self.is_replaying:
            view.join_replay()
        return view

    def take_rows(self, other: "RowCache", rows: Tensor) -> None:
        """Hold the `rows` [B'] int64 of `other`, which may be over the same memory."""
        other.settle()
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.take_rows(theirs, rows)

    def put(self, other: "RowCache", places: Tensor, *, of: int) -> None:
        """Hold the rows of `other` in the `places` [B'] int64; `of` is how many rows there are in all."""
        self.settle()
        other.settle()
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.put(theirs, places, of)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] int64 only, as often as they are among them."""
        self.settle()
        for layer in self.layers:
            layer.select(rows)
