"""The recipe of a checkpoint, written beside it, and compared when training goes on from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling import DrafterModel
from .arguments import Eagle3TrainingArguments
from .data.vocabulary import vocabulary_fingerprint
from .kinds import Plan
from .states.folder import fingerprint_data

FILE_NAME = "hf_eagle3_recipe.json"
ALL_THE_SAME = "ignore_recipe_mismatch=True resumes all the same."
SHAPE = (
    *("fc_norm", "norm_before_fc", "norm_output", "norm_before_residual", "num_hidden_layers", "hidden_size"),
    *("intermediate_size", "draft_vocab_size"),
)
# Of block drafters.
BLOCKS = ("block_size", "drafts_from_root", "is_causal", "markov_rank", "markov_head_type", "has_confidence_head")


def describe_recipe(
    drafter: DrafterModel, plan: Plan, args: Eagle3TrainingArguments, rows: Any, target_fingerprint: str | None
) -> dict[str, Any]:
    """The facts that must be the same for training to go on as if it had never stopped.

    Args:
        drafter: Bound to its target.
        plan: How it is trained.
        args: The training's.
        rows: The training rows by index, of any class; None if there are none.
        target_fingerprint: That of the target's weights or of the stored hidden states; None where there is none.
    """
    return {
        "target": drafter.config.target_name_or_path or drafter.bound_target_name,
        "teacher": target_fingerprint,  # the key that checkpoints have
        "aux_layer_ids": list(drafter.bound_aux_layer_ids or ()),
        "draft_vocabulary": vocabulary_fingerprint(drafter.draft_to_target_ids, drafter.config.vocab_size),
        **{name: getattr(drafter.config, name) for name in (*SHAPE, *BLOCKS) if hasattr(drafter.config, name)},
        "ttt_steps": plan.num_steps,
        **{name: getattr(args, name) for name in ("ttt_decay", "loss_type", "packing")},
        "data": None if rows is None else f"{len(rows)} rows, {fingerprint_data(rows)[:16]}",
    }


def write_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write `recipe` into a checkpoint."""
    (folder / FILE_NAME).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a checkpoint.

    Raises:
        ValueError: It has none, or one that cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE_NAME}, so how it was trained is not known. {ALL_THE_SAME}")
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}), so how it was trained is not known. {ALL_THE_SAME}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is damaged: expected a table, got {recipe!r:.60}. {ALL_THE_SAME}")
    return recipe


def check_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Compare the recipe in `folder` with that of now. Fields that are null in either are not compared.

    Raises:
        ValueError: They differ, or there is none; the message names the fields.
    """
    stored = read_recipe(folder)
    other = [
        f"{name} was {stored[name]!r}, and is {recipe[name]!r}" if name in stored else f"{name} was not written down"
        for name in recipe
        if name not in stored or (None not in (stored[name], recipe[name]) and stored[name] != recipe[name])
    ]
    if other:
        raise ValueError(
            f"{folder} was trained in another way: {'; '.join(other)}. Go on with what it was trained with, or start "
            f"from its weights (model=...) instead of resuming. {ALL_THE_SAME}"
        )
