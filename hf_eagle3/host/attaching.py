"""Drafters that stay with a target: every `generate` of it drafts, whoever calls.

Kept beside the targets, not in them: copies of a target, pickles and saved folders have no drafter.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from .loop_choice import refuse_unknown_loop
from .refusals import is_drafter, refuse_mistaken_llama, refuse_names, refuse_target
from .seeds import resolve_seeds
from .shapes import SETTINGS as SHAPES
from .shapes import resolve_shapes

logger = logging.getLogger(__name__)

SETTINGS = (*SHAPES, "decode_loop", "seed")  # of a call, which `attach` takes too; those of shapes say one thing


class Attached(NamedTuple):
    """What calls get that say nothing else."""

    drafter: PreTrainedModel
    settings: dict[str, Any]


_attached: WeakKeyDictionary[PreTrainedModel, Attached] = WeakKeyDictionary()
_told: set[str] = set()  # why calls were not drafted


def attach(target: PreTrainedModel, drafter: PreTrainedModel, **settings: Any) -> None:
    """Let every `target.generate` and `generate_batch` draft from now on: pipelines, harnesses and trainers that hold it, too.

    A call that says `assistant_model=None` decodes plainly, and so does one that a drafter cannot help, which is said once
    for each reason. Neither copies of the target nor what it saves have the drafter. Attaching again replaces it.

        hf_eagle3.attach(target, drafter)
        pipe = pipeline("text-generation", model=target, tokenizer=tokenizer)

    Args:
        target: Any model that `drafter` may assist.
        drafter: As `assistant_model` of `generate`.
        settings: For calls that do not say otherwise: `num_assistant_tokens`, `draft_shape`, `decode_loop` or `seed`.

    Raises:
        ValueError: `drafter` is no drafter for `target`, or a setting is none of these or has a value that means nothing.
        TypeError: `target` is no model that generates.
    """
    refuse_names(drafter)
    refuse_mistaken_llama(drafter)
    if not isinstance(target, GenerationMixin):
        raise TypeError(
            f"attach(target, drafter): the target must be a model that generates, got {type(target).__name__}."
        )
    if not is_drafter(drafter):
        raise ValueError(f"attach(target, drafter): expected an EAGLE-3 drafter, got {type(drafter).__name__}.")
    if type(target).generate is not GenerationMixin.generate:
        raise ValueError(f"{type(target).__name__} has a generate() of its own, which knows no drafters.")
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        raise ValueError(
            f"attach() got {', '.join(unknown)}, expected {', '.join(SETTINGS)}. What else generate() takes goes into "
            "target.generation_config."
        )
    drafter.bind(target)
    refuse_target(target)
    resolve_shapes(target, drafter, None, dict(settings))
    resolve_seeds(settings.get("seed"))
    refuse_unknown_loop(settings.get("decode_loop"))
    _attached[target] = Attached(drafter, settings)


def detach(target: PreTrainedModel) -> None:
    """Undo `attach`; nothing happens where no drafter was attached."""
    _attached.pop(target, None)


def find_attached(target: PreTrainedModel, call: Mapping[str, Any]) -> Attached | None:
    """What is attached to `target`, with those of its settings that `call` says nothing about."""
    if (attached := _attached.get(target)) is None:
        return None
    said = {name for names in (SHAPES, ("decode_loop",), ("seed",)) if call.keys() & set(names) for name in names}
    return attached._replace(settings={name: v for name, v in attached.settings.items() if name not in said})


def say_plain(target: PreTrainedModel, why: str) -> None:
    """Say, once, why a call is decoded plainly though a drafter is attached."""
    if why not in _told:
        _told.add(why)
        logger.warning("%s has a drafter attached, which cannot help with this call: %s", type(target).__name__, why)
