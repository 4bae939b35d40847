"""What a drafter cannot help with: refused in one line that says what to do, before any work."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import StaticCache

from .modeling import Eagle3DrafterConfig

# Settings that draft by other means.
OTHER_DRAFTS = ("assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "speculation_type")


def is_drafter(model: Any) -> bool:  # Any: whatever was passed as assistant_model
    """Whether `model` is an EAGLE-3 drafter: ours, or the same code loaded with `trust_remote_code=True`."""
    return getattr(getattr(model, "config", None), "model_type", None) == Eagle3DrafterConfig.model_type


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
    if config is None or model_type == Eagle3DrafterConfig.model_type:
        return
    is_marked = model_type == "llama" and any(hasattr(config, key) for key in ("draft_vocab_size", "eagle_config"))
    if is_marked or "eagle3" in str(getattr(config, "architectures", None)).lower():
        name = getattr(config, "_name_or_path", "") or "the drafter's folder"
        kind = "a Llama" if model_type == "llama" else model_type
        raise ValueError(
            f"assistant_model is an EAGLE-3 drafter that was loaded as {kind}, most of it with random weights. After "
            f'`import hf_eagle3`, load it again: AutoModel.from_pretrained("{name}").'
        )


def refuse_settings(setting: Callable[[str], Any]) -> None:
    """Raise if a drafter cannot help with a call of these settings; `setting(name)` is None for what is unset."""
    other_loops = {
        "num_beams": (setting("num_beams") or 1) > 1,
        "num_beam_groups": (setting("num_beam_groups") or 1) > 1,
        "penalty_alpha": bool(setting("penalty_alpha")) and not setting("do_sample"),
        "guidance_scale": (setting("guidance_scale") or 1) != 1,  # runs the target on a context of its own
        "use_cache": setting("use_cache") is False,
        **{name: bool(setting(name)) for name in ("constraints", "force_words_ids", "dola_layers")},
        **{name: bool(setting(name)) for name in OTHER_DRAFTS},
    }
    if refused := [name for name, is_set in other_loops.items() if is_set]:
        values = ", ".join(f"{name}={setting(name)!r}" for name in refused)
        raise ValueError(
            f"An EAGLE-3 drafter assists greedy decoding and sampling, with a cache; got {values}. "
            f"Leave out {' and '.join(refused)}, or assistant_model."
        )
    refuse_static_cache(setting("cache_implementation"), None)


def refuse_static_cache(implementation: str | None, cache: Any) -> None:  # Any: a user may pass anything
    """Raise if the target's cache cannot forget refused draft tokens."""
    is_compileable = implementation in ("static", "offloaded_static", "hybrid", "sliding_window", "hybrid_chunked")
    if is_compileable or isinstance(cache, StaticCache):
        raise ValueError(
            f"An EAGLE-3 drafter needs a target cache that can be cut back, not {implementation or 'a StaticCache'}: "
            "leave out cache_implementation and past_key_values, or call generate() without assistant_model."
        )


def advise(why: str) -> str:
    """What to leave out of a call that our own loop cannot take, if that is all; `why` is what rules it out."""
    return f"leave out {why.removesuffix(' is set')}, " if why.endswith(" is set") else ""


def refuse_inputs(input_ids: Tensor, model_kwargs: dict[str, Any], why: str) -> None:
    """Raise if there is not exactly one row with something in it; `why` says what rules out our own loop."""
    if len(input_ids) > 1:
        raise ValueError(
            f"An EAGLE-3 drafter can assist only one row at a time here ({why}), got a batch of {len(input_ids)}: "
            f"{advise(why)}call generate() once for each row, or without assistant_model."
        )
    if input_ids.shape[1] == 0 and model_kwargs.get("inputs_embeds") is None:
        raise ValueError("The prompt is empty (input_ids of length 0): give at least one token, such as BOS.")
