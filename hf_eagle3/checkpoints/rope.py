"""Rotary parameters of a published drafter, in the host's spelling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling import CheckpointError
from ..modeling.fields_eagle3 import DrafterFields, check_rope_values, refuse_second_rope
from ..modeling.text_eagle3 import show

ROPE_KEYS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "short_factor", "long_factor", "low_freq_factor"),
        *("high_freq_factor", "truncate", "partial_rotary_factor", "mrope_section", "mrope_interleaved"),
    }
)


def read_rope(file: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The host's `rope_parameters`, from either spelling, and where from. Multimodal rope is plain rope for text.

    Raises:
        CheckpointError: They are nonsense, or contradict each other.
    """
    tables = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None}
    ropes = {key: normalise_rope(f"{file}: {key}", table) for key, table in tables.items() if table != {}}
    source, rope = next(iter(ropes.items()), ("", {"rope_type": "default"}))
    try:
        for other in ropes.values():
            check_rope_values(other)
        check_rope_values({"rope_theta": config.get("rope_theta")})
        refuse_second_rope(rope, ropes.get("rope_scaling"), config.get("rope_theta"))
    except ValueError as error:
        raise CheckpointError(f"{file}: {source or 'rope_theta'}: {error}") from error
    theta = rope.get("rope_theta", config.get("rope_theta"))
    said = [key for key in (source, "rope_theta") if key and (key == source or config.get("rope_theta") is not None)]
    where = f"config.json: {' and '.join(said)}" if said else "not stated"
    where += "; no rope_theta, so 10000" if theta is None else ""
    return {**rope, "rope_theta": 10000.0 if theta is None else theta}, where


def normalise_rope(where: str, rope: Any) -> dict[str, Any]:  # Any: whatever config.json has there
    """Rotary parameters in the host's spelling, without nulls.

    Raises:
        CheckpointError: They are no table, have a key that no kind of rope has, or name two kinds.
    """
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where} must be a table or null, got {show(rope)}.")
    if unknown := sorted(rope.keys() - ROPE_KEYS):
        raise CheckpointError(f"{where}: rotary parameters {show(rope)} have keys that are not known: {unknown}.")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.pop("type", None)
    if kind is not None and rope.setdefault("rope_type", kind) != kind:
        raise CheckpointError(
            f"{where}: rotary parameters have rope_type {show(rope['rope_type'])} and type {show(kind)}. Remove the one that "
            "is wrong."
        )
    rope.setdefault("rope_type", "default")
    if rope["rope_type"] == "mrope" or (rope["rope_type"] == "default" and "mrope_section" in rope):
        rope = {"rope_type": "default"} | {key: rope[key] for key in ("rope_theta",) if key in rope}
    return rope


# Kinds whose tables come out whole with these parameters, each being what `ROPE_VALUES` says: they need not be computed.
PLAIN_ROPES = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


def is_plain_rope(rope: Mapping[str, Any]) -> bool:
    """Whether a table comes out of rotary parameters that pass `check_rope_values`."""
    kind = rope.get("rope_type")
    wanted = PLAIN_ROPES.get(kind) if isinstance(kind, str) else None
    return wanted is not None and all(rope.get(key) is not None for key in {"rope_theta", *wanted})


def check_rope(config: DrafterFields) -> None:
    """Raise ValueError if a drafter cannot have the rotary parameters of `config`: no export of it could be loaded."""
    rope = config.rope_parameters or {}
    if any(isinstance(value, dict) for value in rope.values()) or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"no drafter has rotary parameters {rope}: it rotates whole heads, in all layers alike. Leave out "
            "partial_rotary_factor, and give one set."
        )
    if is_plain_rope(rope):
        return
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # takes seconds to import

    try:
        frequencies = LlamaRotaryEmbedding(config).inv_freq
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"rotary parameters {rope} are of a kind that Transformers does not know: {type(error).__name__}: {error}"
        ) from error
    if frequencies.shape != (config.head_dim // 2,) or not torch.isfinite(frequencies).all():
        raise ValueError(f"rotary parameters {rope} do not give {config.head_dim // 2} frequencies")
