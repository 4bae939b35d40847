"""What a drafter cannot help with: refused in one line that says what to do, before any work."""

import inspect
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, QuantizedCache, StaticCache
from transformers.generation.configuration_utils import GenerationMode

from ..compat import CACHE_NAME
from ..console.quoting import quote_python
from ..decoding.preparation import UnfollowableError, find_asked
from ..decoding.preparation import find_switch as find_cache_switch
from ..modeling import MODEL_TYPES
from ..modeling.text_eagle3 import one_line
from ..recorder import find_layers, find_skippable
from ..rows.recurrent import find_mixers, why_not_layers
from ..rows.rotation import find_switch as find_rotation_switch


def is_given(value: Any) -> bool:  # Any: whatever was set
    """Whether it is set at all: 0 and an empty list count, too."""
    return value is not None


# Settings that lead the host to another way of decoding, and for which of their values.
OTHER_WAYS: Mapping[str, Callable[[Any], bool]] = {
    "num_beams": lambda value: value not in (None, 1),
    "num_beam_groups": lambda value: value not in (None, 1),
    "guidance_scale": lambda value: value not in (None, 1),  # runs the target on a context of its own
    "use_cache": lambda value: not value,  # the host goes wrong on its own where it is None
    "cache_implementation": lambda value: value == "paged",  # continuous batching
    **dict.fromkeys(("constraints", "force_words_ids", "dola_layers"), is_given),
    # They draft by other means.
    **dict.fromkeys(("assistant_early_exit", "prompt_lookup_num_tokens", "speculation_type"), is_given),
    "use_mtp": bool,
}


# Families by `model_type`, and what keeps any drafter from helping them.
NOT_DRAFTED = {
    "dory": "runs its layers several times in a forward",
    **dict.fromkeys(("hy_v4", "hy_v4_vl"), "hands several streams of states from layer to layer"),
}
# Families that compute something else over several tokens at once than over one after the other, which the host's loop
# takes for the same; the second lot up to 5.23.
ONE_BY_ONE = {"cpmant", "prophetnet"}
if Version(transformers.__version__).release < (5, 24):
    ONE_BY_ONE |= {"big_bird", "git", "inkling_mm_model", "inkling_text", "megatron-bert", "roformer"}

ENCODERS = {"big_bird", "megatron-bert", "roformer"}  # see tokens to come unless `is_decoder` is set


def is_drafter(model: Any) -> bool:  # Any: whatever was passed as assistant_model
    """Whether `model` is an EAGLE-3 drafter: ours, or the same code loaded with `trust_remote_code=True`."""
    return is_drafter_config(getattr(model, "config", None))


def is_drafter_config(config: Any) -> bool:  # Any: as above
    """Whether `config` is that of an EAGLE-3 drafter."""
    return getattr(config, "model_type", None) in MODEL_TYPES


def refuse_other_models(model: Any, source: str) -> None:  # Any: whatever was loaded
    """Raise if `model`, from `source`, is no drafter."""
    refuse_mistaken_llama(model)
    if not is_drafter(model):
        raise ValueError(
            f"{source} is a {type(model).__name__}, and no EAGLE-3 drafter. Give one made for the target."
        )


def refuse_mistaken_llama(model: Any) -> None:  # Any: whatever was passed as assistant_model
    """Raise if `model` is a published drafter that was loaded as a stock model, with random layers."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if config is None or model_type in MODEL_TYPES:
        return
    architectures = str(getattr(config, "architectures", None)).lower()
    if hasattr(config, "dflash_config") or any(word in architectures for word in ("dflashdraft", "dsparkmodel")):
        name = quote_python(getattr(config, "_name_or_path", "") or "the drafter's folder")
        raise ValueError(
            f"assistant_model is a block drafter that was loaded as {type(model).__name__}, which only its own code can use. "
            f"After `import hf_eagle3`, load it again, without trust_remote_code: AutoModel.from_pretrained({name})."
        )
    is_marked = model_type == "llama" and any(hasattr(config, key) for key in ("draft_vocab_size", "eagle_config"))
    if is_marked or "eagle3" in architectures:
        name = getattr(config, "_name_or_path", "") or "the drafter's folder"
        kind = "a Llama" if model_type == "llama" else one_line(str(model_type))
        raise ValueError(
            f"assistant_model is an EAGLE-3 drafter that was loaded as {kind}, most of it with random weights. After "
            f"`import hf_eagle3`, load it again: AutoModel.from_pretrained({quote_python(name)})."
        )


def refuse_names(model: Any) -> None:  # Any: whatever was passed as assistant_model
    """Raise if a name or a path was given where a loaded drafter is expected."""
    if isinstance(model, (str, os.PathLike)):
        name = quote_python(str(os.fspath(model)))
        raise ValueError(
            f"assistant_model is {name}, expected a loaded model: a drafter loads by AutoModel.from_pretrained({name})."
        )


def refuse_settings(settings: GenerationConfig, *, drafts: bool = True) -> None:
    """Raise if a call of these settings, as the host resolves them, is none for a drafter, or for our loop without one."""
    values = {name: getattr(settings, name, None) for name in OTHER_WAYS}
    refused = [name for name, value in values.items() if OTHER_WAYS[name](value)]
    if not refused and settings.get_generation_mode() == GenerationMode.CONTRASTIVE_SEARCH:
        refused, values = ["penalty_alpha"], {"penalty_alpha": settings.penalty_alpha}
    if refused:
        given = ", ".join(f"{name}={values[name]!r}" for name in refused)
        subject, ours = (
            ("An EAGLE-3 drafter assists", "assistant_model") if drafts else ("Our loop does", "decode_loop")
        )
        raise ValueError(
            f"{subject} greedy decoding and sampling, with a cache; got {given}. "
            f"Leave out {' and '.join(refused)}, or {ours}."
        )


def refuse_weights(target: PreTrainedModel, settings: GenerationConfig) -> None:
    """Raise if attention weights are asked for that the target's attention does not give."""
    if settings.output_attentions and target.config.get_text_config()._attn_implementation != "eager":
        raise ValueError(
            "The target's attention gives no weights to return (output_attentions=True): call "
            "target.set_attn_implementation('eager') first, or leave out output_attentions."
        )


def refuse_cache(cache: Any) -> None:  # Any: a user may pass anything
    """Raise if the target's cache cannot forget refused draft tokens: a quantised one, or a static one of some kinds.

    Which static ones can, the host says: up to 5.23 none, from 5.24 on those that no window can make forget.
    """
    if isinstance(cache, QuantizedCache) or (isinstance(cache, StaticCache) and not cache.is_croppable):
        raise ValueError(
            f"An EAGLE-3 drafter needs a target cache that can be cut back, not this {type(cache).__name__}: leave out "
            "cache_implementation and past_key_values, or call generate() without assistant_model."
        )


def advise(why: str) -> str:
    """What to leave out of a call that our own loop cannot take, if that is all; `why` is what rules it out."""
    return f"leave out {why.removesuffix(' is set')}, " if why.endswith(" is set") else ""


def how_compiled(module: nn.Module) -> str | None:
    """How to undo what `torch.compile` did to `module`, as a line with NAME in the place of the module; None if nothing."""
    if getattr(module, "_compiled_call_impl", None) is not None:  # module.compile()
        return "NAME._compiled_call_impl = None"
    if hasattr(module, "_orig_mod"):  # torch.compile(module)
        return "NAME = NAME._orig_mod"
    if hasattr(module.forward, "_torchdynamo_orig_callable"):  # module.forward = torch.compile(module.forward)
        return "del NAME.forward" if "forward" in vars(module) else "load the model with its own class"
    return None


class Compiled(NamedTuple):
    """A part of a model that `torch.compile` has compiled."""

    place: str
    undo: str  # a line of Python


def find_compiled(target: PreTrainedModel) -> Compiled | None:
    """The first part of `target` that is compiled and holds a layer whose states are read, an attention or a recurrence.

    Compiled code calls no hooks of such layers, each attention, length of text and hook has it compiled again, and it
    would take no block token by token. None if there is none.
    """
    undone = {path: undo for path, module in target.named_modules() if (undo := how_compiled(module)) is not None}
    hooked = set(map(id, (*find_layers(target)[1], *find_mixers(target).values()))) if undone else set()
    for path, undo in undone.items():
        children = target.get_submodule(path).modules()
        if any(id(child) in hooked or hasattr(child, "is_causal") for child in children):
            place = re.sub(r"\.(\d+)", r"[\1]", ".".join(["target", *filter(None, [path])]))
            return Compiled(place, undo.replace("NAME", place))
    return None


def refuse_compiled(target: PreTrainedModel) -> None:
    """Raise if `target` is compiled where it is to be run over texts of every length."""
    if (compiled := find_compiled(target)) is not None:
        raise ValueError(
            f"{type(target).__name__} is compiled at {compiled.place}, and would be compiled again for each length of text, "
            f"for minutes: undo that ({compiled.undo})."
        )


def counts_from_the_end(hook: Any) -> bool:  # Any: whatever is called before a forward
    """Whether `hook` is PEFT's for an activated LoRA, which begins so many tokens before the end of each forward."""
    offsets = (getattr(hook, "keywords", None) or {}).get("alora_offsets")
    return any(offset is not None for offset in offsets or ())


def why_not_drafted(target: PreTrainedModel) -> str | None:
    """What about `target` keeps any drafter from helping it, in words for who loaded it; None if nothing does."""
    name = type(target).__name__
    if getattr(target, "_is_stateful", False) and (reason := why_not_layers(target)) is not None:
        return (
            f"{reason}, so neither our decode loop nor the host's can take tokens of a refused draft out of its states. "
            "Call generate() without assistant_model."
        )
    if (reason := NOT_DRAFTED.get(target.config.model_type)) is not None:
        return f"{name} {reason}, so its states cannot be read at layer boundaries. Call generate() without assistant_model."
    find_layers(target)  # or there are none, and that is said
    for module in target.modules():
        if any(map(counts_from_the_end, module._forward_pre_hooks.values())):
            return (
                f"{name} has an activated LoRA (alora_invocation_tokens), which counts tokens from the end of each forward, "
                "and a draft makes forwards of other lengths. Disable the adapter, or call generate() without "
                "assistant_model."
            )
    if (compiled := find_compiled(target)) is not None:
        return (
            f"{name} is compiled at {compiled.place}, and compiled code does not let a drafter read the target's states: "
            f"undo that ({compiled.undo}), since rounds on a GPU run as CUDA graphs without it, or call generate() without "
            "assistant_model."
        )
    return None


def refuse_target(target: PreTrainedModel) -> None:
    """Raise if no drafter can help `target`."""
    if (reason := why_not_drafted(target)) is not None:
        raise ValueError(reason)


def why_not_several(target: PreTrainedModel) -> str | None:
    """What keeps a forward over several tokens from being worth several over one; None if nothing is known to."""
    parameters = inspect.signature(target.forward).parameters
    if (
        CACHE_NAME not in parameters
        or target.config.model_type == "xlm"
        or not target._supports_default_dynamic_cache()
    ):
        return "keeps no cache that refused draft tokens can be taken out of"
    if target.config.model_type in ENCODERS and not target.config.is_decoder:
        return "was loaded as an encoder (config.is_decoder is False), so tokens of a draft see those after them"
    if target.config.model_type in ONE_BY_ONE:
        return "computes something else over several tokens at once than over one after the other"
    return None


def refuse_host_loop(target: PreTrainedModel, max_length: int, why: str) -> None:
    """Raise if assisted decoding of the host could give other text than plain decoding.

    Args:
        target: The model to generate with.
        max_length: Of the text.
        why: What rules out our own loop.
    """
    name = type(target).__name__
    if (reason := why_not_several(target)) is not None:
        raise ValueError(f"{name} {reason}: call generate() without assistant_model ({why}).")
    if find_asked(target) is not None:
        raise UnfollowableError(target, f"the host's loop prepares several tokens at once ({why})")
    if find_skippable(target):
        raise ValueError(
            f"{name} keeps what it sees in images in the same cache as text, where the host's loop would cut it off with "
            f"a refused draft ({why}): call generate() without assistant_model, or with text alone in our own loop."
        )
    switches = [find_rotation_switch(target), *(switch.after for switch in [find_cache_switch(target)] if switch)]
    switch = min((s for s in switches if s is not None), default=None)
    if switch is not None and max_length > switch:
        raise ValueError(
            f"Behind {switch} tokens, {name} computes each token by the length of the text, where the host's loop would "
            f"take one length for a whole draft; this text may get {max_length} tokens, and our own loop is ruled out "
            f"({why}). Leave that out, lower max_new_tokens, or call generate() without assistant_model."
        )


def refuse_foreign_tokens(target: PreTrainedModel, input_ids: Tensor) -> None:
    """Raise if a prompt has tokens that the target does not have: on a GPU, looking them up would end the process.

    Raises:
        IndexError: As PyTorch does on a CPU, without a drafter.
    """
    V = getattr(target.config.get_text_config(decoder=True), "vocab_size", None)
    if V is not None and input_ids.numel() and (highest := int(input_ids.max())) >= V:
        raise IndexError(
            f"The prompt has the token {highest}, and {type(target).__name__} has the tokens 0 to {V - 1}: make it with the "
            "target's own tokenizer."
        )


def refuse_inputs(input_ids: Tensor, model_kwargs: dict[str, Any], why: str) -> None:
    """Raise if there is not exactly one row with something in it; `why` says what rules out our own loop."""
    if len(input_ids) > 1:
        raise ValueError(
            f"An EAGLE-3 drafter can assist only one row at a time here ({why}), got a batch of {len(input_ids)}: "
            f"{advise(why)}call generate() once for each row, or without assistant_model."
        )
    if input_ids.shape[1] == 0 and model_kwargs.get("inputs_embeds") is None:
        raise ValueError("The prompt is empty (input_ids of length 0): give at least one token, such as BOS.")
