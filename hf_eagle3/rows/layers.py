"""Kinds of layers, by the names that configs have for them: what is kept of each, and what its masks show.

A layer of a kind that is not in the table is refused by name, never run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from .block import Block
from .masks import BY_ROWS, make_mask
from .memory import BlockKeyValues, IndexedKeyValues, KeyValues, Nothing
from .states import KeyValuesAndStates, States

Masks = Tensor | dict[str, Tensor | None]
# Which slots the tokens of a block see, [B, 1, T, num_slots] bool; the config is the text decoder's.
MakeMask = Callable[[PreTrainedConfig, Block, int], Tensor]


def see_all(config: PreTrainedConfig, block: Block, num_slots: int) -> Tensor:  # noqa: ARG001  others look at it
    """All slots up to each token."""
    return make_mask(block, num_slots, window=None)


def see_window(config: PreTrainedConfig, block: Block, num_slots: int) -> Tensor:
    """Those within the window."""
    return make_mask(block, num_slots, window=config.sliding_window)


def see_chunk(config: PreTrainedConfig, block: Block, num_slots: int) -> Tensor:
    """Those of the same chunk of the text."""
    return make_mask(block, num_slots, window=None, chunk=config.attention_chunk_size)


@dataclass(frozen=True)
class LayerKind:
    """What rounds do for one kind of layer.

    Attributes:
        memory: What is kept of it, how a block writes that, and how a rejected tail is forgotten.
        host_layers: What the host's cache may have for it.
        masks: What such layers look for in a dict of masks, and what makes it; None where they take none.
        why_no_trees: Why a block must be a chain; "" if it may be a tree.
        attends_itself: Whether it looks at the name of its attention, which rounds then leave as it is.
        why_eager: What it does that our kernels do not; "" if they do.
        counts_pads: Whether it sees other positions behind pads, as plain decoding of a padded batch does.
    """

    memory: type[Nothing]
    host_layers: tuple[str, ...]
    masks: Mapping[str, MakeMask | None] = field(default_factory=dict)
    why_no_trees: str = ""
    attends_itself: bool = False
    why_eager: str = ""
    counts_pads: bool = False


def indexed(name: str) -> LayerKind:
    """The kind of layers whose indexer chooses, among what a mask shows, the positions that they attend to."""
    return LayerKind(
        IndexedKeyValues,
        ("DynamicIndexedLayer", "DummyLayer"),
        {name: see_all},
        attends_itself=True,
        why_eager="chooses the positions that it attends to by an indexer",
    )


ATTENTION = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DummyLayer",
)  # the last where another layer's keys are shared
ONE_LINE = "keeps recurrent states, which follow one line of tokens"
RECURRENT = LayerKind(States, ("LinearAttentionLayer",), why_no_trees=ONE_LINE)
# Up to Transformers 5.23 the host has an empty layer of states for what caches nothing.
FEED_FORWARD = LayerKind(Nothing, ("DummyLayer", "LinearAttentionLayer"))
KINDS: dict[str, LayerKind] = {
    "full_attention": LayerKind(KeyValues, ATTENTION, {"full_attention": see_all}),
    "sliding_attention": LayerKind(KeyValues, ATTENTION, {"sliding_attention": see_window}),
    "chunked_attention": LayerKind(
        KeyValues, ATTENTION, {"chunked_attention": see_chunk}, why_eager="attends in chunks"
    ),
    # The second name up to Transformers 5.23.
    **{name: indexed(name) for name in ("indexed_attention", "deepseek_sparse_attention")},
    "minimax_m3_sparse": LayerKind(
        BlockKeyValues,
        ("MiniMaxM3VLSparseCacheLayer",),
        {"minimax_m3_sparse": see_all},
        why_no_trees="chooses blocks of slots, which in a tree are not those of its positions",
        attends_itself=True,
        why_eager="chooses the blocks that it attends to by an indexer",
        counts_pads=True,
    ),
    "linear_attention": RECURRENT,
    "conv": RECURRENT,
    "hybrid": LayerKind(
        KeyValuesAndStates,
        ("LinearAttentionAndFullAttentionLayer",),
        {"hybrid": see_all, "full_attention": see_all, "linear_attention": None},
        why_no_trees=ONE_LINE,
    ),
    "hybrid_sliding": LayerKind(
        KeyValuesAndStates,
        ("LinearAttentionAndSlidingWindowAttentionLayer",),
        {"hybrid_sliding": see_window, "sliding_attention": see_window, "linear_attention": None},
        why_no_trees=ONE_LINE,
    ),
    "moe": FEED_FORWARD,
    "mlp": FEED_FORWARD,
}
# The kind of a layer that its config has no name for, by what the host's cache has for it.
BY_HOST_LAYER = {"DynamicLayer": "full_attention", "DynamicSlidingWindowLayer": "sliding_attention"}


def name_layers(config: PreTrainedConfig) -> list[tuple[str, str]]:
    """For each layer that the host's cache has a place for: the name of its kind, and the host's class of that place.

    Up to Transformers 5.23 layers that share the keys of others have no place at the end.
    """
    places = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    names = getattr(config, "layer_types", None) or [BY_HOST_LAYER.get(place, place) for place in places]
    return list(zip(names, places, strict=False))  # those without a place are left out


def find_kinds(model: PreTrainedModel) -> list[LayerKind]:
    """The kinds of the layers of `model`, all of which are in the table."""
    return [KINDS[name] for name, _ in name_layers(model.config.get_text_config(decoder=True))]


def find_unknown(config: PreTrainedConfig) -> str | None:
    """The name of a kind of layer that is not in the table; None if all are."""
    unknown = (
        name for name, place in name_layers(config) if name not in KINDS or place not in KINDS[name].host_layers
    )
    return next(unknown, None)


def known_kinds(model: PreTrainedModel) -> list[LayerKind]:
    """Those kinds of layers of `model` that are in the table, each once."""
    names = dict.fromkeys(name for name, _ in name_layers(model.config.get_text_config(decoder=True)))
    return [KINDS[name] for name in names if name in KINDS]


def has_states(model: PreTrainedModel) -> bool:
    """Whether some layer of `model` keeps states, as far as they are known."""
    return any(issubclass(kind.memory, States) for kind in known_kinds(model))


def make_masks(config: PreTrainedConfig, block: Block, num_slots: int, dtype: torch.dtype) -> Masks | None:
    """Masks as the host's models take them ready-made: one, or one for each of the config's `layer_types`."""
    if config._attn_implementation == BY_ROWS:
        return None

    def finish(mask: Tensor) -> Tensor:
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return finish(make_mask(block, num_slots, window=getattr(config, "sliding_window", None)))
    masks: dict[str, Any] = dict.fromkeys(layer_types)
    for kind in map(KINDS.__getitem__, set(layer_types)):
        for name, make in kind.masks.items():
            if masks.get(name) is None:
                masks[name] = None if make is None else finish(make(config, block, num_slots))
    return None if all(mask is None for mask in masks.values()) else masks
