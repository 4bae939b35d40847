"""What the forward of a target takes in a round: most take masks and position ids as arguments, some do not."""

import inspect
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import CACHE_NAME
from ..recorder import find_layers
from .attention import own_attention, weigh
from .cache import WRITING
from .layers import Masks, has_states, known_kinds
from .masks import make_mask
from .memory import KeyValues
from .substitutes import Substitute


class Forward(NamedTuple):
    """How a forward gets the mask [B, 1, T, S] and the position ids [B, T] of a block; the defaults are the usual way.

    Attributes:
        attends_itself: Layers attend by code of their own, which `AttentionInterface` does not reach.
        embeds_positions: Position ids go to the module `embed_positions`: the forward counts its own.
        rotates_in_layers: What that module gives goes to each layer as its third argument [1, 1, T, D], for all rows.
        narrows_masks: The forward makes its masks together with a bias, and takes none that is ready-made: layers get
            its masks, in which what the block's mask hides is hidden, too.
        is_by_slot: Scores depend on the distance between slots, so a token's slot must be its position: chains only.
        most_slots: The config field that says how many slots a forward can attend to; "" for any number.
        keeps_windows: Attention modules keep masks of their own, which take all rows to be equally long: `_attn` of
            those is ours.
        tempers_queries: Layers without rotation scale queries by how many positions are cached, the same for all rows.
    """

    attends_itself: bool = False
    embeds_positions: bool = False
    rotates_in_layers: bool = False
    narrows_masks: bool = False
    is_by_slot: bool = False
    most_slots: str = ""
    keeps_windows: bool = False
    tempers_queries: bool = False


USUAL = Forward()
ALIBI = Forward(attends_itself=True, narrows_masks=True, is_by_slot=True)
# By the `model_type` of the text decoder. Those of the usual kind are not marked by the host as ones whose attention can
# be exchanged.
FORWARDS: dict[str, Forward] = {
    **dict.fromkeys(("biogpt", "stablelm", "whisper"), USUAL),
    **dict.fromkeys(("falcon", "gpt_neox_japanese", "xglm"), Forward(attends_itself=True)),
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart"),
        Forward(embeds_positions=True),
    ),
    **dict.fromkeys(("mvp", "trocr"), Forward(attends_itself=True, embeds_positions=True)),
    "bloom": ALIBI,
    "gpt_neo": Forward(attends_itself=True, keeps_windows=True),
    "llama4_text": Forward(tempers_queries=True),
    "mpt": Forward(attends_itself=True, is_by_slot=True, most_slots="max_seq_len"),
}
if Version(transformers.__version__).release >= (5, 24):  # before, they make masks that several tokens share
    FORWARDS |= dict.fromkeys(("big_bird", "megatron-bert"), Forward(attends_itself=True))
    FORWARDS["roformer"] = Forward(attends_itself=True, embeds_positions=True, rotates_in_layers=True)
# Families of the usual kind by their marks, whose layers make positions of their own all the same.
OWN_POSITIONS = {"kosmos-2", "kosmos_2_text_model", "kosmos-2.5"}
# Classes of the host that choose for each token among its row's slots, by keys that the cache keeps.
INDEXERS = {
    *("AXK2Indexer", "DeepseekV32Indexer", "Dots3NoteTextIndexer", "GlmMoeDsaIndexer", "MistralLarge4TextIndexer"),
    "MiniMaxM3VLIndexer",
}
MASKED = {"eager", "sdpa"}  # attentions that take a mask for each row, where layers attend by code of their own


def find_forward(target: PreTrainedModel) -> Forward | None:
    """What the forward of `target` takes; None if that is not known."""
    if target.config.model_type in OWN_POSITIONS:
        return None
    if (listed := find_listed(target)) is not None:
        return listed
    decoder = target.get_decoder()
    part = decoder if isinstance(decoder, PreTrainedModel) else target
    # All families with recurrent layers attend in the host's way.
    is_marked = getattr(part, "_supports_attention_backend", False) or has_states(target)
    return USUAL if is_marked and "position_ids" in inspect.signature(target.forward).parameters else None


def find_listed(target: PreTrainedModel) -> Forward | None:
    """What the table says of the host's code that runs in `target`; None if it does not have it."""
    config = target.config.get_text_config(decoder=True)
    listed = FORWARDS.get(config.model_type)
    if listed is None or not type(find_layers(target)[0]).__module__.startswith("transformers.models."):
        return None
    return ALIBI if config.model_type == "falcon" and config.alibi else listed


def why_not_handed(target: PreTrainedModel) -> str | None:
    """What keeps a round from giving `target` masks and positions for each row; None if nothing does."""
    name = type(target).__name__
    if not any(issubclass(kind.memory, KeyValues) for kind in known_kinds(target)):  # nothing looks at either
        takes_cache = CACHE_NAME in inspect.signature(target.forward).parameters
        return None if takes_cache else f"up to Transformers 5.23 {name} has another name for its cache"
    forward = find_forward(target)
    if forward is None or (forward.embeds_positions and find_embedder(target) is None):
        return f"{name} does not take masks and positions for each row"
    own = own_attention(target.config.get_text_config(decoder=True))
    if attends_itself(target) and own not in MASKED:
        return f"{name} attends by {own}, which takes no masks for each row"
    for module in target.modules():
        if type(module).__name__.endswith("Indexer") and type(module).__name__ not in INDEXERS:
            return f"{name} chooses what it attends to in a way that our loop does not know ({type(module).__name__})"
    return None


def find_embedder(target: PreTrainedModel) -> nn.Module | None:
    """The module of the text decoder that embeds position ids which it can be given."""
    module = getattr(find_layers(target)[0], "embed_positions", None)
    takes_ids = module is not None and "position_ids" in inspect.signature(module.forward).parameters
    return module if takes_ids else None


def find_special(target: PreTrainedModel) -> Forward | None:
    """What the forward of `target` takes where that is not the usual; None if it is."""
    listed = find_listed(target)
    return None if listed == USUAL else listed


def attends_itself(target: PreTrainedModel) -> bool:
    """Whether rounds must leave the name of the attention of `target` as it is."""
    special = find_special(target)
    return (special is not None and special.attends_itself) or any(kind.attends_itself for kind in known_kinds(target))


def why_no_trees(target: PreTrainedModel) -> str | None:
    """What about `target` keeps tokens of a draft from branching; None if nothing does."""
    forward = find_special(target)
    if forward is not None and forward.is_by_slot:
        return "attends by the distance between slots, which in a tree is not that of its tokens"
    return next((kind.why_no_trees for kind in known_kinds(target) if kind.why_no_trees), None)


@contextmanager
def handing(
    target: PreTrainedModel, forward: Forward, masks: Masks | None, position_ids: Tensor
) -> Iterator[dict[str, Any]]:
    """Let a forward go by the `masks` and `position_ids` [B, T] of the block being written; what to give it as arguments.

    Args:
        target: What runs.
        forward: What its forward takes.
        masks: [B, 1, T, S], as the attention of `target` takes it: bool, or added to scores; or by kind of layer.
        position_ids: Of the block.
    """
    arguments: dict[str, Any] = {}
    with ExitStack() as stack:
        if forward.narrows_masks:
            assert isinstance(masks, Tensor)
            for layer in find_layers(target)[1]:
                hook = layer.register_forward_pre_hook(_narrow_to(masks), with_kwargs=True)
                stack.callback(hook.remove)
        else:
            arguments["attention_mask"] = masks
        for module in find_tempered(target) if forward.tempers_queries else ():
            stack.callback(module.q_proj.register_forward_hook(_temper(target)).remove)
        if forward.embeds_positions:
            embedder = find_embedder(target)
            assert embedder is not None
            stack.callback(embedder.register_forward_pre_hook(_give(position_ids), with_kwargs=True).remove)
            if forward.rotates_in_layers:
                for layer in find_layers(target)[1]:
                    stack.callback(layer.register_forward_pre_hook(_rotate_rows(position_ids)).remove)
            else:
                stack.callback(embedder.register_forward_hook(_unflatten(position_ids)).remove)
        else:
            arguments["position_ids"] = position_ids
        yield arguments


def _narrow_to(mask: Tensor) -> Any:  # Any: a hook
    cache = WRITING.get()

    def narrow(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if WRITING.get() is not cache:
            return args, kwargs
        return args, {**kwargs, "attention_mask": narrow_mask(kwargs["attention_mask"], mask)}

    return narrow


def narrow_mask(theirs: Tensor | None, mask: Tensor) -> Tensor:
    """A layer's mask [B, n, T, S], without what `mask` [B, 1, T, S] hides; both bool, or added to scores."""
    if theirs is None:
        return mask
    if theirs.dtype == torch.bool:
        return theirs & mask
    is_seen = mask if mask.dtype == torch.bool else mask == 0
    return theirs.masked_fill(~is_seen, torch.finfo(theirs.dtype).min)


def _give(position_ids: Tensor) -> Any:  # Any: a hook
    cache = WRITING.get()

    def give(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # Flat: some of these modules add a dimension, as to ids that all rows share.
        return args, {**kwargs, "position_ids": position_ids.flatten()} if WRITING.get() is cache else kwargs

    return give


def _unflatten(position_ids: Tensor) -> Any:  # Any: a hook
    cache = WRITING.get()

    def unflatten(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return output.reshape(*position_ids.shape, -1) if WRITING.get() is cache else output

    return unflatten


def _rotate_rows(position_ids: Tensor) -> Any:  # Any: a hook
    cache, (B, T) = WRITING.get(), position_ids.shape

    def rotate_rows(_module: nn.Module, args: tuple) -> tuple:
        return (*args[:2], args[2].reshape(B, 1, T, -1), *args[3:]) if WRITING.get() is cache else args

    return rotate_rows


# ---- queries that are scaled by position ----


def find_tempered(target: PreTrainedModel) -> list[Any]:  # Any: attributes of the host's are no part of a Module
    """The attention modules of Llama 4 that scale queries by how many positions are cached."""
    modules = (layer.get_submodule("self_attn") for layer in find_layers(target)[1])
    return [module for module in modules if module.attn_temperature_tuning and not module.use_rope]


def pads_count_from(target: PreTrainedModel) -> int | None:
    """Columns of a padded prompt from which on plain decoding computes something else for pads; None if it never does.

    A row alone has none of them, and rounds have rows as if they were alone.
    """
    special = find_special(target)
    tempered = find_tempered(target) if special is not None and special.tempers_queries else []
    starts = [math.ceil(module.floor_scale) for module in tempered]
    starts += [1 for kind in known_kinds(target) if kind.counts_pads]
    return min(starts, default=None)


def temperatures(config: Any, positions: Tensor) -> Tensor:  # Any: the host's
    """Scales of queries at `positions`. Transformers 5.24 models/llama4/modeling_llama4.py:Llama4TextAttention."""
    return torch.log1p(torch.floor((positions.float() + 1) / config.floor_scale)) * config.attn_scale + 1


def _temper(target: PreTrainedModel) -> Any:  # Any: a hook
    cache, config = WRITING.get(), target.config.get_text_config(decoder=True)

    def temper(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        if (now := WRITING.get()) is not cache or now is None or now.block is None:
            return output
        places = now.block.places.to(output.device)  # [B, T]
        # The host scales by the positions from 0 on, as our cache says that it is empty.
        theirs = temperatures(config, torch.arange(places.shape[1], device=output.device))
        return (output * (temperatures(config, places) / theirs)[..., None]).to(output.dtype)

    return temper


# ---- windows that modules keep ----


class OwnWindow(Substitute):
    """Attends by the mask of a block, in the place of the `_attn` of a module: GPT-Neo's, which does not scale scores.

    Args:
        module: The host's.
        window: Of positions, the token's own included; None for all.
    """

    def __init__(self, module: nn.Module, window: int | None):
        super().__init__(module, "_attn")
        self._window = window

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attended values [B, H, T, D], and weights where the host's own code ran."""
        cache = WRITING.get()
        if cache is None or cache.block is None:
            assert self.original is not None
            return self.original(query, key, value, attention_mask)
        mask = make_mask(cache.block, key.shape[2], window=self._window)
        return weigh(query, key, value, mask, scaling=1.0).transpose(1, 2), None


_lock = threading.Lock()  # of the next
_windows: "weakref.WeakKeyDictionary[nn.Module, OwnWindow]" = weakref.WeakKeyDictionary()


def find_windows(target: PreTrainedModel) -> list[OwnWindow]:
    """What stands in for modules of `target` that keep windows of their own."""
    forward = find_special(target)
    if forward is None or not forward.keeps_windows:
        return []
    config, found = target.config.get_text_config(decoder=True), []
    for layer, kind in zip(find_layers(target)[1], config.attention_layers, strict=True):
        module = layer.get_submodule("attn.attention")
        with _lock:
            found.append(
                _windows.setdefault(module, OwnWindow(module, config.window_size if kind == "local" else None))
            )
    return found


@contextmanager
def own_windows(target: PreTrainedModel) -> Iterator[None]:
    """Let forwards of rounds inside go by the masks of their blocks, also in modules that keep windows of their own."""
    with ExitStack() as stack:
        for window in find_windows(target):
            stack.enter_context(window.in_place())
        yield
