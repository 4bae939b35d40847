"""Which target a drafter was made for, by what its publisher wrote: the config, the model card, the names of files."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..console.quoting import is_model_name, is_repository
from ..modeling.fields_eagle3 import DrafterFields
from ..modeling.text_eagle3 import escape_record, show

logger = logging.getLogger(__name__)
logger.addFilter(escape_record)

CARD = "README.md"
LONGEST_HEAD = 65536  # characters of a card that are looked at
HEAD = re.compile(r"\A\s*---\n(.*?)\n---", re.DOTALL)
BASE_MODEL = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?\[?['\"]?([^\s'\",\[\]#]+)", re.MULTILINE)

# Words in the names of drafters that are no part of a target's name.
WORDS = "eagle-?3(?:[.]1)?|eagle|p-?eagle|speculators?|specdrift|specforge|sglang|vllm|drafter|draft|converted|mla|gqa"
NOT_THE_TARGETS = re.compile(rf"(?<![a-z0-9])(?:{WORDS})(?![a-z0-9])", re.IGNORECASE)
SIZE = re.compile(r"(?<![a-z0-9])\d+(?:[.]\d+)?[mb](?![a-z0-9])", re.IGNORECASE)  # such as 8B
GENERIC = re.compile(r"(?:pytorch_)?model|adapter_model|training_state")


class NamedTarget(NamedTuple):
    """A target's name, and where it stands."""

    name: str
    source: str


def read_recorded_name(config: DrafterFields) -> str | None:
    """The target's name in a drafter's config, if it can be one: the config may come from anybody."""
    name = config.target_name_or_path
    if name is None or is_model_name(name):
        return name
    logger.warning(
        "The config says target_name_or_path %s, which is no repository and no folder; ignored.", show(name)
    )
    return None


def find_target(
    config: DrafterFields, sources: Mapping[str, str], card: Path | None, names: Iterable[str]
) -> NamedTarget | None:
    """The first of config, card and names that says what the target is.

    Args:
        config: The drafter's.
        sources: Field of the config -> where its value comes from.
        card: The drafter's card, if it has one.
        names: Names of repository, folder and files. What they say is a guess.
    """
    if (recorded := read_recorded_name(config)) is not None:
        return NamedTarget(recorded, sources.get("target_name_or_path", "config.json"))
    if card is not None and (base := read_base_model(card)) is not None:
        return NamedTarget(base, f"{CARD}: base_model")
    guesses = ((guess_target(name), name) for name in names)
    return next((NamedTarget(guess, f"the name {name}, a guess") for guess, name in guesses if guess), None)


def read_base_model(card: Path) -> str | None:
    """The repository that a card's head names as `base_model`, the first of several; None if it names none."""
    with card.open(encoding="utf-8", errors="replace") as file:
        head = HEAD.match(file.read(LONGEST_HEAD))
    found = BASE_MODEL.search(head[1]) if head is not None else None
    return found[1] if found is not None and is_repository(found[1]) else None


def guess_target(name: str) -> str | None:
    """What is left of a drafter's name without the words that make it one; None if that is no model's name."""
    rest = NOT_THE_TARGETS.sub("", name)
    rest = re.sub(r"([-_. ])[-_. ]+", r"\1", rest).strip("-_. ")
    is_drafters = rest != name or SIZE.search(name) is not None
    is_models = bool(re.search(r"[a-z]{2}", rest, re.IGNORECASE) and re.search(r"\d", rest))
    return rest if is_drafters and is_models and not GENERIC.match(rest) else None
