"""What a cache of rows keeps of a recurrent layer: states after each token of a block, or what a block did to them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..kernels.delta_rule import DeltaMemory, settle_rows, settle_rows_eager
from ..kernels.language import is_available
from .memory import KeyValues, Nothing

if TYPE_CHECKING:
    from .cache import RowCache

CONV, RECURRENT = ("conv_states", 0), ("recurrent_states", 0)  # keys of rings


class States(LinearAttentionLayer, Nothing):
    """Convolution and recurrent states of one layer, kept after each token of a block.

    A layer of the host's reads and writes them as those of a `LinearAttentionLayer`, one token at a time (`advance`). A
    rejected tail is forgotten by going on from the state before it (`settle`). Captured rounds keep what a block's tokens
    did to the states instead, beside those before it (`begin_replay`), and never move them.
    """

    def __init__(self, cache: "RowCache"):
        Nothing.__init__(self, cache)
        LinearAttentionLayer.__init__(self)
        # [n, B, ...] by name and number of a state: a ring, where the states before a block are at `first`, and those
        # after each of its tokens at the places that follow. The host's layers see one of them.
        self.rings: dict[tuple[str, int], Tensor] = {}
        self.first = 0
        self.num_stepped = 0  # tokens of the last block that came through
        self._next = 0  # where the states after the token at hand come
        self.replay: DeltaMemory | None = (
            None  # of captured rounds; its state is what the ring of those has in its one place
        )

    def begin(self, num_tokens: int) -> None:
        """Make room for the states after each token of a block."""
        if all(len(ring) > num_tokens for ring in self.rings.values()):
            return
        for key, ring in self.rings.items():
            self.rings[key] = ring.new_empty(num_tokens + 1, *ring.shape[1:])
            self.rings[key][0] = ring[self.first]
        self.first = 0

    def _place(self, num_tokens: int) -> int:
        """Where the states after so many tokens of the block are."""
        return (self.first + num_tokens) % len(next(iter(self.rings.values())))

    def advance(self, token: int, *, is_in_place: bool) -> None:
        """Let the next token of the block write the states after it.

        Args:
            token: Of the block, in their order.
            is_in_place: Whether the host's layer changes recurrent states where they are, and not by
                `update_recurrent_state`. It does so with those of convolutions.
        """
        self._next, self.num_stepped = self._place(token + 1), token + 1
        for key, ring in self.rings.items():
            before = ring[self._place(token)]
            if is_in_place or key[0] == "conv_states":
                ring[self._next] = before
                self._show(key, ring[self._next])
            else:
                self._show(key, before)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:  # noqa: ARG002  the host's
        """Write the states after the token that `advance` began."""
        key = ("recurrent_states", state_idx)
        state = self.rings[key][self._next]
        if state.data_ptr() != recurrent_states.data_ptr():
            state.copy_(recurrent_states)
        self._show(key, state)
        return state

    def _show(self, key: tuple[str, int], state: Tensor) -> None:
        """Let layers of the host see that state."""
        name, number = key
        getattr(self, name)[number] = state

    def settle(self, kept: Tensor) -> None:
        """Go on from the states behind `kept` [B] tokens of the last block, on a CPU."""
        counts = set(kept.tolist())
        if len(counts) == 1:
            self.first = self._place(*counts) if self.rings else 0
        else:
            for ring in self.rings.values():
                places = ((kept + self.first) % len(ring)).to(ring.device)
                ring[self.first] = ring[places, torch.arange(len(kept), device=ring.device)]
        self._show_first()

    def end(self, num_tokens: int) -> None:
        """Be sure that each token of a block came through by itself."""
        assert self.num_stepped == num_tokens, "a recurrent layer ran over a block by itself"
        self.num_stepped = 0

    def _show_first(self) -> None:
        for key, ring in self.rings.items():
            self._show(key, ring[self.first])

    def make_room(self, key: tuple[str, int], like: Tensor, num_rows: int) -> None:
        """Memory for one state of `num_rows` rows, before the first block: of its own, or a part of what the cache is a view of."""
        if self.cache.whole is not None:
            _, whole_rows, start = self.cache.whole
            layer = self._above()
            if key not in layer.rings:
                layer.make_room(key, like, whole_rows)
            self.rings[key] = layer.rings[key][:, start : start + num_rows]
        else:
            with torch.inference_mode(False):  # it may outlive a call under that
                self.rings[key] = like.new_zeros(1, num_rows, *like.shape[1:])

    def _above(self) -> Any:  # Any: a layer of the same kind
        """The layer whose memory this one's is a part of; None if it has its own."""
        return None if self.cache.whole is None else self.cache.whole[0].layers[self.cache.layers.index(self)]

    def from_host(self, theirs: Any, columns: Tensor, *, move: bool) -> None:
        """Hold the states of the host's layer."""
        for name in ("conv_states", "recurrent_states"):
            for number, state in getattr(theirs, name).items():
                if state is None:
                    continue
                if (name, number) not in self.rings:
                    self.make_room((name, number), state, len(columns))
                self.rings[name, number][self.first] = state
                if move:
                    getattr(theirs, name)[number] = None
        self._mark(theirs)

    def _mark(self, source: Any) -> None:  # Any: a layer that keeps such states
        """Know of the states what `source` knows, wherever their memory is."""
        layer = self
        while layer is not None:
            copy_marks(source, layer)
            layer._show_first()
            layer = layer._above()

    def begin_replay(self, whole: Any, rows: slice, num_tokens: int) -> None:
        """Let the states be in the memory of `rows` of another layer, with room for what captured blocks do to them."""
        for key, ring in self.rings.items():
            home = whole.rings[key][0, rows]
            if home.data_ptr() != ring[self.first].data_ptr():
                home.copy_(ring[self.first])
        if whole.replay is None:
            with torch.inference_mode(False):
                whole.replay = DeltaMemory.make(whole.rings[RECURRENT][0], whole.rings[CONV][0], num_tokens)
        self.share(whole, rows)
        assert self.replay is not None
        before = self.rings[CONV][0].mT  # [B, S, C]
        self.replay.window[:, : before.shape[1]] = before

    def end_replay(self, kept: Tensor) -> None:
        """Let the states be those behind the first `kept` [B] tokens of the last captured block."""
        assert self.replay is not None
        settle = settle_rows if is_available(kept.device) else settle_rows_eager
        settle(self.replay, kept)
        conv_states = self.rings[CONV][0]  # [B, C, S]
        at = kept[:, None] + torch.arange(conv_states.shape[2], device=kept.device)  # [B, S]
        window = self.replay.window
        conv_states.copy_(window.gather(1, at[..., None].expand(-1, -1, window.shape[2])).mT)
        self._show_first()

    def list_memory(self) -> list[Tensor]:
        """The tensors that it keeps."""
        return [*self.rings.values(), *(self.replay or ())[1:]]  # the first is a ring's

    def to_host(self, cache: Cache, index: int, slots: Tensor) -> None:  # noqa: ARG002  states have no slots
        """Make layer `index` of the host's `cache` hold these states."""
        theirs = cache.layers[index]
        for (name, number), ring in self.rings.items():
            getattr(theirs, name)[number] = ring[self.first].clone()
        copy_marks(self, theirs)

    def share(self, whole: Any, rows: slice) -> None:
        """Be over the memory of `rows` of another layer."""
        self.rings, self.first = {key: ring[:, rows] for key, ring in whole.rings.items()}, whole.first
        self.replay = None if whole.replay is None else whole.replay.of_rows(rows)
        copy_marks(whole, self)
        self._show_first()

    def take_rows(self, other: Any, rows: Tensor) -> None:
        """Hold the `rows` of another layer, which may be over the same memory."""
        for key, ring in other.rings.items():
            if key not in self.rings:
                self.make_room(key, ring[other.first], len(rows))
                self._mark(other)
            self.rings[key][self.first] = ring[other.first, rows.to(ring.device)]

    def put(self, other: Any, places: Tensor, of: int) -> None:
        """Hold the rows of another layer in these places."""
        for key, ring in other.rings.items():
            if key not in self.rings:
                self.make_room(key, ring[other.first], of)
                self._mark(other)
            self.rings[key][self.first].index_copy_(0, places.to(ring.device), ring[other.first])

    def select(self, rows: Tensor) -> None:
        """Keep `rows` only."""
        for key, ring in self.rings.items():
            self.rings[key] = ring[self.first : self.first + 1, rows.to(ring.device)]
        self.first = 0
        self._show_first()


# What a layer of the host knows of its states, beside them.
MARKS = (
    *("number_of_states", "is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"),
    *("conv_kernel_size", "device", "dtype"),
)


def copy_marks(source: Any, to: Any) -> None:  # Any: layers of the host's, or ours
    """Let the layer `to` know of its states what `source` knows of the same ones."""
    for name in MARKS:
        value = getattr(source, name)
        setattr(to, name, dict(value) if isinstance(value, dict) else value)


class KeyValuesAndStates(States, KeyValues):
    """Both, of a layer that attends and has a recurrence beside it."""

    def lazy_initialization(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]  # the host's
        """As the host's layer of this kind: keys and values come by place, states by name."""
        (KeyValues if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def from_host(self, theirs: Any, columns: Tensor, *, move: bool) -> None:
        """Hold what the host's layer holds."""
        for kind in (KeyValues, States):
            kind.from_host(self, theirs, columns, move=move)

    def to_host(self, cache: Cache, index: int, slots: Tensor) -> None:
        """Make layer `index` of the host's `cache` hold what this one holds."""
        for kind in (KeyValues, States):
            kind.to_host(self, cache, index, slots)

    def make_room(self, *args: Any) -> None:
        """Keys and values come by place, states by name."""
        (States if isinstance(args[0], tuple) else KeyValues).make_room(self, *args)

    def list_memory(self) -> list[Tensor]:
        """The tensors that it keeps."""
        return [*KeyValues.list_memory(self), *States.list_memory(self)]

    def share(self, whole: Any, rows: slice) -> None:
        """Be over the memory of `rows` of another layer."""
        for kind in (KeyValues, States):
            kind.share(self, whole, rows)

    def take_rows(self, other: Any, rows: Tensor) -> None:
        """Hold the `rows` of another layer."""
        for kind in (KeyValues, States):
            kind.take_rows(self, other, rows)

    def put(self, other: Any, places: Tensor, of: int) -> None:
        """Hold the rows of another layer in these places."""
        for kind in (KeyValues, States):
            kind.put(self, other, places, of)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` only."""
        for kind in (KeyValues, States):
            kind.select(self, rows)
