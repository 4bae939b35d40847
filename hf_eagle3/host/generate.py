"""`generate(assistant_model=drafter)`: from a call to the loop that takes it."""

import copy
import functools
import inspect
import logging
import numbers
from collections.abc import Callable
from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedModel,
)

from ..decoding.lock import turns_of
from .loop_choice import OWN_LOOP, choose_loop, take_choice
from .own_loop import run_own_loop
from .refusals import (
    advise,
    is_drafter,
    refuse_mistaken_llama,
    refuse_names,
    refuse_settings,
    refuse_target,
)

logger = logging.getLogger(__name__)

DEFAULT_DEPTH = 3
MAX_DEPTH = 64  # no drafter is right that often, and a round's kernels and caches are made for few tokens


def find_own_setting(name: str, target: PreTrainedModel, given: GenerationConfig | None, call: dict[str, Any]) -> Any:
    """A setting that the host gives a default, or does not know, from where the host takes those that it does know.

    What the call says goes first, even if it is None; then the config given to it, then the target's own.
    """
    if name in call:
        return call[name]
    places = (getattr(config, name, None) for config in (given, target.generation_config))
    return next((value for value in places if value is not None), None)


def resolve_depth(asked: Any, drafter: PreTrainedModel) -> int:  # Any: whatever was given
    """K: what the call says, else the drafter's generation config, else a default.

    Raises:
        ValueError: It is not a whole number from 0 to `MAX_DEPTH`.
    """
    depth = next(k for k in (asked, drafter.generation_config.num_assistant_tokens, DEFAULT_DEPTH) if k is not None)
    is_number = isinstance(depth, numbers.Real) and not isinstance(depth, bool)
    if not is_number or depth not in range(MAX_DEPTH + 1):
        raise ValueError(
            f"num_assistant_tokens is the number of tokens to draft each round, up to {MAX_DEPTH}, 0 for none; got "
            f"{depth!r}."
        )
    return int(depth)


# Transformers 5.23 generation/utils.py:GenerationMixin.generate
def wrap_generate(original: Callable) -> Callable:
    """Refuse early what cannot be done, bind the drafter, and settle the draft depth."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        drafter: Any = kwargs.get("assistant_model")  # Any: it may come from remote code
        if drafter is None and args:
            drafter = signature.bind(self, *args, **kwargs).arguments.get("assistant_model")
        refuse_names(drafter)
        refuse_mistaken_llama(drafter)
        if not is_drafter(drafter):
            return original(self, *args, **kwargs)

        call = signature.bind(self, *args, **kwargs)
        further = call.arguments.setdefault("kwargs", {})
        given = call.arguments.get("generation_config")
        if call.arguments.get("custom_generate") is not None:
            raise ValueError(
                "custom_generate brings its own decode loop, which an EAGLE-3 drafter cannot assist: leave out "
                "custom_generate or assistant_model."
            )
        depth = resolve_depth(find_own_setting("num_assistant_tokens", self, given, further), drafter)
        asked = find_own_setting("decode_loop", self, given, further)
        if asked is None and "decode_loop" not in further:
            asked = getattr(drafter.generation_config, "decode_loop", None)
        for name in ("num_assistant_tokens", "decode_loop"):
            further.pop(name, None)
        settings, inputs = self._prepare_generation_config(given, **further)  # copies
        drafter.bind(self)
        refuse_target(self)
        refuse_settings(settings)
        if settings.output_attentions and self.config.get_text_config()._attn_implementation != "eager":
            raise ValueError(
                "The target's attention gives no weights to return (output_attentions=True): call "
                "target.set_attn_implementation('eager') first, or leave out output_attentions."
            )
        # The host fills what is unset with a default of its own, 20, so the loop must find the depth settled.
        if given is None:
            further["num_assistant_tokens"] = depth
        else:
            call.arguments["generation_config"] = given = copy.deepcopy(given)
            given.num_assistant_tokens = depth
        with turns_of(self):  # while graphs are recorded, layers are not as they are
            choice = choose_loop(
                self,
                drafter,
                asked=asked,
                depth=depth,
                settings=settings,
                has_synced_gpus=bool(call.arguments.get("synced_gpus")),
                inputs=inputs,
            )
        logger.info(
            "%s (%s): depth %d, target states at boundaries %s.",
            *(choice.loop, choice.why, depth, drafter.bound_aux_layer_ids or "n, normed"),
        )
        # The host hands criteria through to the decode loop; this one is found, taken out and never asked.
        call.arguments["stopping_criteria"] = [*(call.arguments.get("stopping_criteria") or ()), choice]
        further.pop("assistant_tokenizer", None)  # draft tokens are the target's by their ids
        if choice.loop == OWN_LOOP:
            call.arguments["assistant_model"] = None  # to the host, a plain call
        elif settings.num_return_sequences > 1:
            raise ValueError(
                f"An EAGLE-3 drafter can assist only one row at a time here ({choice.why}): {advise(choice.why)}leave out "
                "num_return_sequences, or assistant_model."
            )
        return original(*call.args, **call.kwargs)

    return generate


# Transformers 5.23 generation/utils.py:GenerationMixin._sample
def wrap_sample(original: Callable) -> Callable:
    """Our own loop, where the call was given to it."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _sample(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind_partial(self, *args, **kwargs).arguments
        choice = take_choice(arguments.get("stopping_criteria"))
        if choice is None:
            return original(self, *args, **kwargs)
        given = arguments.get("model_kwargs", {})
        return run_own_loop(
            self,
            choice,
            arguments["input_ids"],
            given,
            processors=arguments["logits_processor"],
            criteria=arguments["stopping_criteria"],
            generation_config=arguments["generation_config"],
            streamer=arguments.get("streamer"),
        )

    return _sample
