"""The boundaries that a published drafter reads its target at: some count inputs of layers, some outputs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..modeling import CheckpointError
from ..modeling.fields_eagle3 import default_boundaries
from ..modeling.text_eagle3 import escape_record, show

logger = logging.getLogger(__name__)
logger.addFilter(escape_record)


class LayerIds(NamedTuple):
    """Where the target is read."""

    boundaries: list[int]  # ascending
    were_outputs: bool  # one was added to each
    published: list[int]


def read_layer_ids(file: Path, stated: Mapping[str, Any], nested_are_boundaries: bool) -> LayerIds | None:
    """The captured boundaries. Top-level ids are boundaries; ids in `eagle_config` count layer outputs, from 0.

    Args:
        file: config.json.
        stated: Published key -> ids.
        nested_are_boundaries: Ids in `eagle_config` are boundaries too, unless the first is 1 (SGLang's DeepSeek rule).

    Raises:
        CheckpointError: The ids are no distinct numbers, or the two places contradict each other.
    """
    check_layer_ids(file, stated)
    nested = sorted(stated.get("eagle_config.eagle_aux_hidden_state_layer_ids") or ())
    top = sorted(next((ids for key, ids in stated.items() if not key.startswith("eagle_config.")), None) or ())
    if top and nested and top not in (nested, [i + 1 for i in nested]):
        raise CheckpointError(
            f"{file}: eagle_aux_hidden_state_layer_ids is {top} at the top, and {nested} in eagle_config. Expected the "
            "same, or one more each at the top (boundaries against layer outputs)."
        )
    if top:
        if is_default(top, first=1):
            logger.warning(
                "%s: captured layer ids %s are read as boundaries, but look like layer outputs. If drafts are poor, try "
                "aux_layer_ids=%s.",
                *(file, top, [i + 1 for i in top]),
            )
        return LayerIds(top, False, top)
    if not nested:
        return None
    if nested[0] != 1 and nested_are_boundaries:
        return LayerIds(nested, False, nested)
    if is_default(nested, first=2):
        logger.warning("%s: captured layer ids %s in eagle_config are the default boundaries; taken so.", file, nested)
        return LayerIds(nested, False, nested)
    if nested[0] != 1:
        logger.warning(
            "%s: captured layer ids %s in eagle_config are read as layer outputs. vLLM reads them as boundaries; "
            "`hf-eagle3 doctor` measures which is right.",
            *(file, nested),
        )
    return LayerIds([i + 1 for i in nested], True, nested)


def check_layer_ids(file: Path, stated: Mapping[str, Any]) -> None:
    """Raise unless each key has a list of distinct layer numbers."""
    for key, ids in stated.items():
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"{file}: {key} must be a list of layer numbers, got {show(ids)}.")
        if len(set(ids)) < len(ids) or (ids and min(ids) < 0):
            raise CheckpointError(f"{file}: {key} must be distinct layer numbers from 0, got {ids}.")


def is_default(ids: list[int], first: int) -> bool:
    """Whether `ids` are the default three of some target, counted so that the lowest is `first`."""
    shift = 2 - first
    boundaries = [i + shift for i in ids]
    return boundaries == default_boundaries(boundaries[-1] + 3)
