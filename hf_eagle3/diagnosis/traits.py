"""The ways to read a checkpoint: what published configs leave open, or mean differently by the same key."""

import copy
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ..drafters.blocks import drafts_blocks
from ..modeling import DFlashDrafterConfig, DrafterModel, Eagle3DrafterConfig
from ..modeling.fields_dflash import LARGEST_BLOCK
from ..modeling.fields_eagle3 import default_boundaries


class Reading(NamedTuple):
    """One way to read a checkpoint."""

    trait: str  # the question it answers; readings of one trait exclude each other
    name: str
    overrides: dict[str, Any]  # fields of the drafter's config
    target_ids: Tensor | None = None  # [V_d] int64, another draft vocabulary


def list_readings(drafter: DrafterModel, target: PreTrainedModel) -> list[Reading]:
    """Every plausible reading that differs from the declared one in one trait."""
    config: Any = drafter.config
    theirs = target.config.get_text_config(decoder=True)
    n = theirs.num_hidden_layers
    readings = list_block_readings(config, n, theirs) if drafts_blocks(config) else list_chain_readings(config, n)
    readings += list_rope_readings(config, target)
    width = target.get_input_embeddings().weight.shape[-1]
    if config.has_own_embeddings and width == config.hidden_size:
        readings.append(Reading("embeddings", "the target's", {"has_own_embeddings": False}))
    d2t: Any = drafter.d2t
    if len(d2t) < config.vocab_size and d2t[0] >= 0 and d2t[-1] < config.vocab_size and (d2t.diff() > 0).all():
        readings.append(Reading("d2t", "target ids, not offsets", {}, d2t.clone()))
    return [reading._replace(overrides=differences(reading.overrides, config)) for reading in readings]


def list_chain_readings(config: Eagle3DrafterConfig, n: int) -> list[Reading]:
    """Those of an EAGLE-3 drafter's own fields, for a target of `n` layers."""
    readings = [
        Reading(
            "recurrence",
            f"the {'un-normed' if config.norm_output else 'normed'} output is fed back",
            {"norm_output": not config.norm_output},
        ),
        Reading(
            "residual",
            f"starts from the {'un-normed' if config.norm_before_residual else 'normed'} state",
            {"norm_before_residual": not config.norm_before_residual},
        ),
    ]
    if config.use_aux_hidden_state:
        readings += list_layer_readings(config, n)
    return readings


def list_block_readings(config: DFlashDrafterConfig, n: int, theirs: Any) -> list[Reading]:
    """Those of a block drafter's own fields, for a target of `n` layers with the config `theirs`."""
    ids, size = config.resolve_aux_layer_ids(n), config.block_size
    moved = {"one up": [i + 1 for i in ids], "one down": [i - 1 for i in ids]}
    readings = [
        Reading("layers", f"boundaries {there}, {way}", {"aux_layer_ids": there, "aux_layer_ids_from_outputs": False})
        for way, there in moved.items()
        if there[0] >= 0 and there[-1] <= n
    ]
    if size > 1:
        name = "its own" if config.drafts_from_root else "the next"
        readings.append(
            Reading("proposes", f"each place {name} token", {"drafts_from_root": not config.drafts_from_root})
        )
    name = "both sides" if config.is_causal else "what is before it alone"
    readings.append(Reading("sees", f"of its block {name}", {"is_causal": not config.is_causal}))
    if config.sliding_window:
        readings.append(Reading("sees", "all of the context", {"sliding_window": None, "layer_types": None}))
    eos = theirs.eos_token_id
    tokens = {
        "the target's pad": theirs.pad_token_id,
        "its end": eos[0] if isinstance(eos, list) else eos,
        "the last of the vocabulary": config.vocab_size - 1,
    }
    seen = {None, config.mask_token_id}
    for name, token in tokens.items():
        if token not in seen and 0 <= token < config.vocab_size:
            seen.add(token)
            readings.append(Reading("mask token", f"{token}, {name}", {"mask_token_id": token}))
    if not config.is_causal:  # else what follows in a block is of no account
        sizes = sorted({size - 1, size + 1, size // 2, 2 * size} - {size})
        readings += [
            Reading("block size", f"{other}", {"block_size": other}) for other in sizes if 1 < other <= LARGEST_BLOCK
        ]
    return readings


def differences(overrides: dict[str, Any], config: Any) -> dict[str, Any]:
    """Those of `overrides` that the config does not have already."""
    return {key: value for key, value in overrides.items() if getattr(config, key) != value}


def list_layer_readings(config: Eagle3DrafterConfig, n: int) -> list[Reading]:
    """Other boundaries: one up, one down, the default, and the last one normed or not."""
    normed = config.norm_last_state
    plain = copy.copy(config)
    plain.norm_last_state = False
    declared = list(plain.resolve_aux_layer_ids(n))
    ways = {
        "one up": [i + 1 for i in declared],
        "one down": [i - 1 for i in declared],
    }
    if config.num_aux_hidden_states == 3:
        ways["the default"] = default_boundaries(n)
    readings, seen = [], [declared]
    for name, ids in ways.items():
        if ids not in seen and ids[0] >= 0 and ids[-1] <= n and len(set(ids)) == len(ids):
            seen.append(ids)
            overrides = {"aux_layer_ids": ids, "aux_layer_ids_from_outputs": False, "norm_last_state": False}
            readings.append(Reading("layers", f"boundaries {ids}, {name}", overrides))
            if ids[-1] == n:
                overrides = {**overrides, "norm_last_state": True}
                readings.append(Reading("layers", f"boundaries {ids}, {name}, the last one normed", overrides))
    if declared[-1] == n:
        name = f"the last boundary {'before' if normed else 'after'} the final norm"
        overrides = {"norm_last_state": not normed, "aux_layer_ids": declared, "aux_layer_ids_from_outputs": False}
        readings.append(Reading("layers", name, overrides))
    return readings


def list_rope_readings(config: Any, target: PreTrainedModel) -> list[Reading]:
    """Other rotary parameters: the target's, and those that follow if keys are missing or ignored."""
    declared = config.rope_parameters or {}
    theirs = getattr(target.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    theirs = theirs.get("full_attention", theirs)
    theta = declared.get("rope_theta", 10000.0)
    ways = {
        "the target's": {k: v for k, v in theirs.items() if k not in ("mrope_section", "mrope_interleaved")},
        "no scaling": {"rope_type": "default", "rope_theta": theta},
        "theta 10000": {**declared, "rope_theta": 10000.0},
        "no scaling and theta 10000": {"rope_type": "default", "rope_theta": 10000.0},
    }
    readings, seen = [], [declared]
    for name, rope in ways.items():
        if rope.get("rope_type") and rope.get("partial_rotary_factor", 1) == 1 and rope not in seen:
            seen.append(rope)
            readings.append(
                Reading("rope", f"{name} ({rope['rope_type']}, {rope['rope_theta']:g})", {"rope_parameters": rope})
            )
    return readings
