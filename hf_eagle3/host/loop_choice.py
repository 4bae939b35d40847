"""Which decode loop a call gets, and why."""

import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from ..recorder import find_skippable
from ..rows.attention_trial import why_not_ours
from ..rows.forwards import find_special, why_not_handed
from ..rows.layers import find_kinds, has_states
from ..rows.recurrent import why_not_layers
from ..rows.rotation import why_not_rotated
from ..speculation.shape import Shapes, chain
from .refusals import advise
from .seeds import Seeds

logger = logging.getLogger(__name__)

HOST_LOOP = "host assisted decoding"
OWN_LOOP = "own decode loop"
ASKED = {"host": HOST_LOOP, "own": OWN_LOOP, "eager": OWN_LOOP}  # eager: our loop without CUDA graphs
# Arguments of `generate` that our loop reads, or that only the prompt's forward takes. Plain decoding passes any other
# input to each forward.
KNOWN_INPUTS = {
    *("attention_mask", "input_ids", "inputs_embeds", "past_key_values", "cache", "position_ids"),
    *("tokenizer", "assistant_tokenizer", "use_cache", "logits_to_keep"),
    *("token_type_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"),
    *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL,
}


class LoopChoice(NamedTuple):
    """The loop for one call."""

    loop: str
    why: str
    drafter: PreTrainedModel | None
    shapes: Shapes  # what rounds may propose
    has_cache: bool = False  # one of the user's, to be left as plain decoding leaves it
    is_eager: bool = False  # whether rounds must not be captured
    seeds: Seeds = None  # what sampled tokens are reproduced by, if they are to be


def kinds_of_layers(cache: Cache) -> set[str]:
    """The kinds of layers in a cache of the host."""
    return {type(layer).__name__ for layer in cache.layers}


def is_sliding(target: PreTrainedModel) -> bool:
    """Whether some layer of `target` attends within a window."""
    kinds = kinds_of_layers(DynamicCache(config=target.config.get_text_config(decoder=True)))
    special = find_special(target)
    return "DynamicSlidingWindowLayer" in kinds or (special is not None and special.keeps_windows)


def why_not_target(target: PreTrainedModel) -> str | None:
    """What about the target rules out our loop; None if nothing does."""
    config = target.config.get_text_config(decoder=True)
    name = type(target).__name__
    if type(target)._sample is not GenerationMixin._sample:
        return f"{name} decodes in a way of its own"
    if (reason := why_not_layers(target)) is not None:
        return reason
    if getattr(config, "attention_chunk_size", None) is not None and getattr(config, "layer_types", None) is None:
        return f"{name} attends in chunks"
    return why_not_handed(target) or why_not_rotated(target) or why_not_ours(target)


def why_not_cache(target: PreTrainedModel, cache: DynamicCache | None) -> str | None:
    """What about a cache that was given rules out our loop; None if nothing does. The layers of `target` are known."""
    if cache is None:
        return None
    kinds = find_kinds(target)
    places = [type(layer).__name__ for layer in cache.layers]
    if len(places) < len(kinds) and has_states(target):
        return "the cache given has no place for recurrent states"
    if any(place not in kind.host_layers for kind, place in zip(kinds, places, strict=False)):  # some share keys
        return f"the cache given has layers of other kinds than {type(target).__name__}"
    return None


def find_cache(inputs: Mapping[str, Any]) -> Any:  # Any: whatever was given
    """The cache that `generate` was given, by either of its names."""
    return next((inputs[name] for name in ("past_key_values", "cache") if inputs.get(name) is not None), None)


def holds_images(target: PreTrainedModel, cache: DynamicCache | None) -> bool:
    """Whether layers of `target` that a text without images skips have something in `cache`."""
    layers = dict(enumerate(cache.layers)) if cache is not None else {}
    return any(layers[i].is_initialized and layers[i].keys.numel() for i in find_skippable(target) if i in layers)


def has_holes(mask: Tensor) -> bool:
    """Whether some row of an attention mask [B, S] has pads behind its first token and before its last."""
    is_start = torch.nn.functional.pad(mask.long(), (1, 0)).diff(dim=-1) == 1  # [B, S], of a run of tokens
    return bool((is_start.sum(-1) > 1).any())


def why_not_call(
    settings: GenerationConfig, inputs: Mapping[str, Any], *, has_synced_gpus: bool
) -> str | None:  # Any: whatever was given
    """What about the call rules out our loop; None if nothing does."""
    if further := sorted(
        k for k, v in inputs.items() if v is not None and not hasattr(settings, k) and k not in KNOWN_INPUTS
    ):
        return f"the prompt has {', '.join(further)}"
    cache = find_cache(inputs)
    if cache is not None and type(cache) is not DynamicCache:
        return f"the cache given is a {type(cache).__name__}"
    if settings.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation is {settings.cache_implementation}"
    if getattr(settings, "assistant_ensemble_weight", None) is not None:  # the host's lossy rule
        return "assistant_ensemble_weight is set"
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(settings, name):
            return f"{name} is set"
    return "synced_gpus is set" if has_synced_gpus else None


def refuse_unknown_loop(asked: Any) -> None:  # Any: whatever was given
    """Raise if `decode_loop` names no loop."""
    if asked is not None and not (isinstance(asked, str) and asked in ASKED):
        raise ValueError(f'decode_loop is {asked!r}, expected "own", "eager", "host" or None for the best that fits.')


def choose_loop(
    target: PreTrainedModel,
    drafter: PreTrainedModel | None,
    *,
    asked: Any,  # whatever was given
    shapes: Shapes,
    settings: GenerationConfig,
    inputs: Mapping[str, Any],
    has_synced_gpus: bool,
) -> LoopChoice:
    """Our loop wherever it can take the call, unless asked otherwise; else the host's.

    Args:
        target: Given to `generate`.
        drafter: Bound to it, if there is one.
        asked: `decode_loop`: "own", "eager", "host" or None.
        shapes: What rounds may propose.
        settings: The call's, as the host resolves them.
        inputs: What else `generate` was given by name beside its own parameters.
        has_synced_gpus: Whether several processes must keep step.

    Raises:
        ValueError: What was asked for is unknown, or impossible.
    """
    refuse_unknown_loop(asked)
    why_not = why_not_call(settings, inputs, has_synced_gpus=has_synced_gpus) or why_not_target(target)
    if why_not is None:
        why_not = why_not_cache(target, find_cache(inputs))
    if why_not is None and holds_images(target, find_cache(inputs)):
        why_not = "the cache given holds images"
    if (
        why_not is None
        and is_sliding(target)
        and (mask := inputs.get("attention_mask")) is not None
        and has_holes(mask)
    ):
        why_not = "the attention mask has pads between tokens, which a sliding window counts"
    if drafter is not None and not shapes.drafts and (asked == "host" or why_not is not None):
        raise ValueError(
            f"num_assistant_tokens=0 is for our own decode loop ({why_not or 'decode_loop is host'}): to generate "
            "without drafting, leave out assistant_model."
        )
    if target._is_stateful and (asked == "host" or (why_not is not None and asked is None)):
        why = why_not or "decode_loop is host"
        raise ValueError(
            f"{type(target).__name__} keeps recurrent states, which the host's loop cannot take a refused draft out of, and "
            f"our own is ruled out ({why}): {advise(why)}call generate() without assistant_model."
        )
    if asked == "host":
        return LoopChoice(HOST_LOOP, "asked for", drafter, as_chain(shapes))
    if why_not is None:
        layers = "attention and recurrent layers" if has_states(target) else "attention caches only"
        why = "asked for" if asked else layers
        has_cache = find_cache(inputs) is not None
        return LoopChoice(OWN_LOOP, why, drafter, shapes, has_cache=has_cache, is_eager=asked == "eager")
    if asked is not None:
        raise ValueError(f'decode_loop="{asked}" cannot take this call: {why_not}. Leave out decode_loop or that.')
    return LoopChoice(HOST_LOOP, why_not, drafter, as_chain(shapes))


def as_chain(shapes: Shapes) -> Shapes:
    """The chain that the host's loop drafts in the place of `shapes`: it takes no other."""
    (shape, *others) = shapes.shapes
    if others or shape.is_chain:
        return Shapes((shape,))
    warn_of_chains(shape.name, shape.depth)
    return Shapes((chain(shape.depth),))


@functools.cache  # once
def warn_of_chains(name: str, depth: int) -> None:
    """Say that a tree is not drafted."""
    logger.warning("The host's loop takes chains: instead of a %s it drafts a chain of %d.", name, depth)
