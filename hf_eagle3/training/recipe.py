"""What a checkpoint was trained with, written beside it, and compared when training goes on from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling import Eagle3DrafterModel
from .arguments import Eagle3TrainingArguments
from .state_writer import fingerprint_data
from .vocabulary import vocabulary_fingerprint

FILE_NAME = "hf_eagle3_recipe.json"
SHAPE = (
    *("fc_norm", "norm_before_fc", "norm_output", "norm_before_residual", "num_hidden_layers", "hidden_size"),
    *("intermediate_size", "draft_vocab_size"),
)


def describe_recipe(
    drafter: Eagle3DrafterModel, args: Eagle3TrainingArguments, rows: Any, teacher: str | None
) -> dict[str, Any]:
    """What must be the same for training to go on as if it had never stopped.

    Args:
        drafter: Bound to its target.
        args: Of the training.
        rows: The training rows by index, of whatever class; None if there are none.
        teacher: What the target's weights, or the stored hidden states, are known by; None where they cannot be told.
    """
    return {
        "target": drafter.config.target_name_or_path or drafter.bound_target_name,
        "teacher": teacher,
        "aux_layer_ids": list(drafter.bound_aux_layer_ids or ()),
        "draft_vocabulary": vocabulary_fingerprint(drafter.draft_to_target_ids, drafter.config.vocab_size),
        **{name: getattr(drafter.config, name) for name in SHAPE},
        **{name: getattr(args, name) for name in ("ttt_steps", "ttt_decay", "loss_type", "packing")},
        "data": None if rows is None else f"{len(rows)} rows, {fingerprint_data(rows)[:16]}",
    }


def write_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write `recipe` into a checkpoint."""
    (folder / FILE_NAME).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of a checkpoint; None if it has none."""
    path = folder / FILE_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def check_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Compare the recipe in `folder`, if there is one, with that of now.

    Raises:
        ValueError: They differ; the message names the fields.
    """
    stored = read_recipe(folder) or {}
    other = [
        f"{name} was {stored[name]!r}, and is {recipe[name]!r}"
        for name in recipe
        if stored.get(name) is not None and recipe[name] is not None and stored[name] != recipe[name]
    ]
    if other:
        raise ValueError(
            f"{folder} was trained in another way: {'; '.join(other)}. Go on with what it was trained with, or start "
            "from its weights (model=...) instead of resuming. ignore_recipe_mismatch=True resumes all the same."
        )
