"""`generate(assistant_model=drafter)`: from a call to the loop that takes it."""

import copy
import functools
import inspect
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ..decoding.captured import CudaGraphs
from ..decoding.choosing import make_chooser
from ..decoding.engine import Engine, Room
from ..decoding.lock import lock_of
from ..decoding.transcript import Transcript
from ..speculation.accept import describe_rules
from ..speculation.shape import NONE, Shapes
from ..speculation.stats import Speculation
from .assisted import choosing
from .attaching import SETTINGS, find_attached, say_plain
from .loop_choice import ASKED, OWN_LOOP, LoopChoice, choose_loop
from .output import fill_cache, make_output
from .refusals import (
    advise,
    is_drafter,
    refuse_mistaken_llama,
    refuse_names,
    refuse_settings,
    refuse_target,
    refuse_weights,
    why_not_drafted,
)
from .request import explain, has_hooks_of_others, make_round_config, make_transcript, read_prompts
from .seeds import resolve_seeds, seeds_of_rows
from .shapes import keep_taken, resolve_shapes

logger = logging.getLogger(__name__)

CAPTURER, CHOOSER = CudaGraphs(), make_chooser  # of all calls


def find_own_setting(name: str, target: PreTrainedModel, given: GenerationConfig | None, call: dict[str, Any]) -> Any:
    """A setting that the host gives a default, or does not know, from where the host takes those that it does know.

    What the call says goes first, even if it is None; then the config given to it, then the target's own.
    """
    if name in call:
        return call[name]
    places = (getattr(config, name, None) for config in (given, target.generation_config))
    return next((value for value in places if value is not None), None)


def find_saved_setting(
    name: str,
    target: PreTrainedModel,
    drafter: PreTrainedModel | None,
    given: GenerationConfig | None,
    call: dict[str, Any],
) -> Any:
    """Likewise a setting that may be saved with the drafter, where it is looked for last."""
    value = find_own_setting(name, target, given, call)
    if value is None and name not in call and drafter is not None:
        return getattr(drafter.generation_config, name, None)
    return value


# Transformers 5.23 generation/utils.py:GenerationMixin.generate
def wrap_generate(original: Callable) -> Callable:
    """Refuse early what cannot be done, bind the drafter, and choose the loop."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        drafter: Any = kwargs.get("assistant_model")  # Any: it may come from remote code
        if drafter is None and args:
            drafter = signature.bind(self, *args, **kwargs).arguments.get("assistant_model")
        refuse_names(drafter)
        refuse_mistaken_llama(drafter)
        if drafter is None and (attached := find_attached(self, kwargs)) is not None:
            call = signature.bind(self, *args, **attached.settings, **kwargs)
            if "assistant_model" in call.arguments:  # None, given on purpose
                pass
            elif kwargs.keys() & set(SETTINGS):  # of drafts, so there must be some
                drafter, kwargs = attached.drafter, {**attached.settings, **kwargs}
            elif draft_if_possible(self, attached.drafter, call):
                return original(*call.args, **call.kwargs)
        if drafter is None and not is_asked_for(kwargs):
            kwargs.pop("decode_loop", None)  # None
            return original(self, *args, **kwargs)
        if drafter is not None and not is_drafter(drafter):
            return original(self, *args, **kwargs)

        call = signature.bind(self, *args, **kwargs)
        choice = draft(self, drafter, call)
        with choosing(choice) if choice.loop != OWN_LOOP else nullcontext():
            return original(*call.args, **call.kwargs)

    return generate


def draft(target: PreTrainedModel, drafter: PreTrainedModel | None, call: inspect.BoundArguments) -> LoopChoice:
    """Make of a call what the host is to be called with, and say which loop takes it.

    Raises:
        ValueError: A drafter cannot help with this call.
    """
    arguments, further = call.arguments, call.arguments.setdefault("kwargs", {})
    settings, choice = settle(target, drafter, arguments, further)
    if choice.loop == OWN_LOOP:
        arguments["assistant_model"] = None  # to the host, a plain call with a loop of its own
        arguments["custom_generate"] = functools.partial(decode, choice, arguments.get("streamer"))
        use_tokenizer(target, arguments, further, settings)
    return choice


def draft_if_possible(target: PreTrainedModel, drafter: PreTrainedModel, call: inspect.BoundArguments) -> bool:
    """The same for a drafter that is attached, whose calls are plain where our loop cannot take them; whether it does."""
    try:
        choice = draft(target, drafter, call)
    except ValueError as error:
        say_plain(target, str(error))
        return False
    if choice.loop != OWN_LOOP:
        say_plain(target, choice.why)
    return choice.loop == OWN_LOOP


def is_asked_for(kwargs: dict[str, Any]) -> bool:
    """Whether a call without a drafter asks for our loop.

    Raises:
        ValueError: For the host's, which decodes without a drafter by itself, or for one that there is not.
    """
    asked = kwargs.get("decode_loop")
    if asked is not None and (not isinstance(asked, str) or ASKED.get(asked) != OWN_LOOP):
        raise ValueError(
            f'decode_loop is {asked!r}: without assistant_model, expected "own", "eager", or to leave it out.'
        )
    return asked is not None


def settle(
    target: PreTrainedModel, drafter: PreTrainedModel | None, arguments: dict[str, Any], further: dict[str, Any]
) -> tuple[GenerationConfig, LoopChoice]:
    """The settings of a call and the loop that takes it; the drafter is bound, and what is drafted settled.

    Args:
        target: What `generate` was called on.
        drafter: Given to it; None for our loop without drafting.
        arguments: The call's, by name; changed in place.
        further: Those of its `**kwargs`, likewise.

    Raises:
        ValueError: A drafter cannot help with this call.
    """
    given = arguments.get("generation_config")
    if arguments.get("custom_generate") is not None:
        raise ValueError(
            "custom_generate brings its own decode loop, which an EAGLE-3 drafter cannot assist: leave out "
            f"custom_generate or {'decode_loop' if drafter is None else 'assistant_model'}."
        )
    shapes = Shapes((NONE,)) if drafter is None else resolve_shapes(target, drafter, given, further)
    asked = find_saved_setting("decode_loop", target, drafter, given, further)
    seeds = resolve_seeds(find_saved_setting("seed", target, drafter, given, further))
    for name in SETTINGS:
        further.pop(name, None)
    settings, inputs = target._prepare_generation_config(given, **further)  # copies
    if drafter is not None:
        drafter.bind(target)
        refuse_target(target)
        shapes = keep_taken(target, shapes)
    elif why_not_drafted(target) is not None:
        raise ValueError(f"{type(target).__name__} does not run in our decode loop: leave out decode_loop.")
    refuse_settings(settings, drafts=drafter is not None)
    refuse_weights(target, settings)
    with lock_of(target):  # while graphs are recorded, layers are not as they are
        has_synced_gpus = bool(arguments.get("synced_gpus"))
        options = {"asked": asked, "shapes": shapes, "settings": settings, "inputs": inputs}
        choice = choose_loop(target, drafter, has_synced_gpus=has_synced_gpus, **options)
    logger.info(
        "%s (%s): %s, target states at boundaries %s.",
        *(choice.loop, choice.why),
        f"depth {choice.shapes.depth}" if choice.shapes.is_fixed else choice.shapes.name,
        "none" if drafter is None else drafter.bound_aux_layer_ids or "n, normed",
    )
    # The host fills what is unset with a default of its own, 20, so its loop must find the depth settled.
    if given is None:
        further["num_assistant_tokens"] = choice.shapes.depth
    else:
        arguments["generation_config"] = given = copy.deepcopy(given)
        given.num_assistant_tokens = choice.shapes.depth
    further.pop("assistant_tokenizer", None)  # draft tokens are the target's by their ids
    if choice.loop != OWN_LOOP and settings.num_return_sequences > 1:
        raise ValueError(
            f"An EAGLE-3 drafter can assist only one row at a time here ({choice.why}): {advise(choice.why)}leave out "
            "num_return_sequences, or assistant_model."
        )
    return settings, choice._replace(seeds=seeds)


def use_tokenizer(
    target: PreTrainedModel, arguments: dict[str, Any], further: dict[str, Any], settings: GenerationConfig
) -> None:
    """Do what the host does with a tokenizer: to a loop of its own it hands none (5.17 to 5.24).

    Stop strings become a criterion, and tokens are healed here. Without a tokenizer the host says what is missing.
    """
    if (tokenizer := further.get("tokenizer")) is None:
        return
    given = arguments.get("stopping_criteria") or ()
    if settings.stop_strings and not any(isinstance(c, StopStringCriteria) for c in given):  # else it takes that one
        criterion = StopStringCriteria(stop_strings=settings.stop_strings, tokenizer=tokenizer)
        arguments["stopping_criteria"] = [*given, criterion]
    if settings.token_healing:
        place, name = (further, "input_ids") if further.get("input_ids") is not None else (arguments, "inputs")
        place[name] = target.heal_tokens(place[name], tokenizer)
    for name in ("stop_strings", "token_healing"):
        if not getattr(settings, name):
            continue
        own = arguments.get("generation_config")  # a copy by now
        if own is not None:
            setattr(own, name, None)
        if own is None or getattr(target.generation_config, name):  # which the host would fill in again
            further[name] = None


def decode(
    choice: LoopChoice,
    streamer: BaseStreamer | None,
    target: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> ModelOutput | Tensor:
    """Decode as the host's `_sample` does, with our loop: same arguments, same results."""
    start = time.perf_counter()
    prompts = read_prompts(target, input_ids, model_kwargs)
    seeds = seeds_of_rows(choice.seeds, len(prompts.ids))
    keeps_cache, is_whole = generation_config.return_dict_in_generate or choice.has_cache, has_hooks_of_others(target)
    given = (target, prompts, logits_processor, stopping_criteria, generation_config, streamer)
    transcript = make_transcript(*given, seeds=seeds, keeps_cache=keeps_cache)
    config = make_round_config(
        *(target, choice, prompts, transcript, logits_processor, generation_config, model_kwargs),
        keeps_rows=keeps_cache or is_whole,
        keeps_cache=keeps_cache,
    )
    rows = transcript.rows
    room = Room(len(rows), max(prompts.lengths), rows[0].max_new)
    engine = Engine(target, choice.drafter, config, room, is_eager=choice.is_eager, capturer=CAPTURER, chooser=CHOOSER)
    with engine:
        prompt = engine.prefill(
            *(prompts.ids, prompts.mask, model_kwargs, generation_config), move=not choice.has_cache, is_whole=is_whole
        )
        engine.admit(rows, prompt, transcript if transcript.in_step else None)
        while show(transcript, engine):
            engine.round()
        cache = fill_cache(engine, prompt, transcript, prompts) if keeps_cache else None
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return transcript.sequences(prompts.given)
    speculation = Speculation(choice.loop, explain(choice, config, transcript, logits_processor), choice.shapes.depth)
    drafted = [shape for shape in engine.chooser.rounds if shape.num_nodes] or [NONE]
    speculation.rule = describe_rules(map(config.find_rule, drafted), in_order=config.in_order)
    return make_output(transcript, prompts, engine, cache, speculation, seconds=time.perf_counter() - start)


def show(transcript: Transcript, engine: Engine) -> bool:
    """Give new columns to the call's criteria and streamer; whether some row goes on.

    Raises:
        Exception: What a row's own processors or criteria raised.
    """
    if (error := next((row.error for row in transcript.rows if row.error is not None), None)) is not None:
        raise error
    with engine.clocks.host:
        transcript.show()
    return not transcript.is_over
