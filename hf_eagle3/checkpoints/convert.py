"""From published keys and tensors to our config.

Sizes come from the tensors and are checked against what config.json states.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..modeling import CheckpointError, Eagle3DrafterConfig
from .flavours import FIXED_VALUES, IGNORED_KEYS, READ_ELSEWHERE, Flavour, Published

logger = logging.getLogger(__name__)

# A disagreement between config and tensors on these is common, harmless, and settled by the tensors.
TENSORS_DECIDE = frozenset({"num_hidden_layers", "attention_bias", "mlp_bias"})
# So is a tensor on these for which config.json denies the flag; a flag without its tensor is an error.
TENSORS_GRANT = frozenset({"norm_before_fc"})

ROPE_KEYS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "short_factor", "long_factor", "low_freq_factor"),
        *("high_freq_factor", "truncate", "partial_rotary_factor", "mrope_section", "mrope_interleaved"),
    }
)

FIRST_QUERY = "layers.0.self_attn.q_proj.weight"


def convert_config(flavour: Flavour, published: Published) -> dict[str, Any]:
    """Our config's fields.

    Raises:
        CheckpointError: A key is not known, or contradicts the tensors.
    """
    file, config = published.file, published.config
    known = flavour.config_keys.keys() | FIXED_VALUES.keys() | IGNORED_KEYS | READ_ELSEWHERE
    if unknown := sorted(
        key for key in config.keys() - known if not key.startswith("_")
    ):  # _name_or_path and the like
        raise CheckpointError(
            f"{file}: {flavour.name} checkpoints are not known to have {unknown}. A key that is ignored may change the "
            "drafter's arithmetic, so none is: remove it if it changes nothing, or report it."
        )
    for key in sorted(config.keys() & FIXED_VALUES.keys()):
        if config[key] not in FIXED_VALUES[key]:
            raise CheckpointError(
                f"{file}: {key} is {config[key]!r}, and no EAGLE-3 drafter that can be loaded has that."
            )

    stated: dict[str, dict[str, Any]] = {}  # our field -> {published key: value}
    for key, ours in flavour.config_keys.items():
        if config.get(key) is not None:
            stated.setdefault(ours, {})[key] = config[key]
    fields = {ours: next(iter(values.values())) for ours, values in stated.items()}

    layer_ids = read_layer_ids(file, stated.pop("aux_layer_ids", {}))
    if layer_ids is not None:
        stated["num_aux_hidden_states"] = {"the number of captured layer ids": len(layer_ids)} | stated.get(
            "num_aux_hidden_states", {}
        )
    measured = measure(published, fields)
    for ours in sorted(stated.keys() & measured.keys()):
        check_stated(published, ours, stated[ours], measured[ours])
    if config.get("tie_word_embeddings"):
        if measured["share_lm_head"]:
            raise CheckpointError(
                f"{file}: tie_word_embeddings is true and there is no lm_head.weight, so the head would be the drafter's "
                "embedding table. That is not supported."
            )
        logger.warning("%s: tie_word_embeddings is ignored, since there is an lm_head.weight.", file)
    window = read_sliding_window(file, config, measured["num_hidden_layers"])
    rope = read_rope(file, config)
    return {**fields, **measured, "aux_layer_ids": layer_ids, "sliding_window": window, "rope_parameters": rope}


def check_stated(published: Published, ours: str, stated: Mapping[str, Any], measured: Any) -> None:
    """Compare what config.json states, under one key or several, with what the tensors say.

    Raises:
        CheckpointError: They differ in what matters.
    """
    if measured in stated.values():
        return
    says = " and ".join(f"{key} is {value!r}" for key, value in stated.items())
    if ours in TENSORS_DECIDE or (ours in TENSORS_GRANT and measured):
        logger.warning("%s: %s, but by the tensors it is %s, which is taken.", published.file, says, measured)
        return
    raise CheckpointError(f"{published.file}: {says}, but by the tensors {ours} is {measured!r}.")


def measure(published: Published, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields that the tensors tell.

    Args:
        stated: Fields as config.json has them, for what the tensors alone leave open.

    Raises:
        CheckpointError: Tensors contradict each other, or config.json in what only both together tell.
    """
    tensors = published.tensors
    H = read_shape(published, "layers.0.input_layernorm.weight", 1)[0]
    layers = {
        int(name.split(".")[1]) for name in tensors if name.startswith("layers.") and name.split(".")[1].isdigit()
    }
    measured = {
        "hidden_size": H,
        "intermediate_size": read_shape(published, "layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": len(layers),
        "attention_bias": "layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in tensors,
        "qk_norm": "layers.0.self_attn.q_norm.weight" in tensors,
        "has_own_embeddings": "embed_tokens.weight" in tensors,
    }
    return (
        measured
        | measure_heads(published, stated, H)
        | measure_vocabulary(published, stated)
        | measure_fc(published, stated, H)
    )


def measure_heads(published: Published, stated: Mapping[str, Any], H: int) -> dict[str, Any]:
    """Numbers of heads and their width; no tensor tells them apart, so they are read and checked."""
    heads = read_int(published, stated, "num_attention_heads")
    kv_heads = read_int(published, {"num_key_value_heads": heads, **stated}, "num_key_value_heads")
    head_dim = read_int(published, {"head_dim": H // max(heads, 1), **stated}, "head_dim")
    for name, count, which in (("q_proj", heads, "num_attention_heads"), ("k_proj", kv_heads, "num_key_value_heads")):
        tensor = f"layers.0.self_attn.{name}.weight"
        if (rows := read_shape(published, tensor, 2)[0]) != count * head_dim:
            raise CheckpointError(
                f"{published.where(tensor)} has {rows} rows, expected {which} ({count}) x head_dim ({head_dim}) = "
                f"{count * head_dim}."
            )
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def measure_vocabulary(published: Published, stated: Mapping[str, Any]) -> dict[str, Any]:
    """V and V_d, and whether the head is the target's."""
    tensors = published.tensors
    measured: dict[str, Any] = {"share_lm_head": "lm_head.weight" not in tensors}
    for field, names in (
        ("vocab_size", ("embed_tokens.weight", "t2d")),
        ("draft_vocab_size", ("lm_head.weight", "d2t")),
    ):
        rows = {name: tensors[name].shape[0] if tensors[name].shape else 0 for name in names if name in tensors}
        if len(set(rows.values())) > 1:
            raise CheckpointError(
                f"{published.where(names[0])} and {published.names[names[1]]} differ in length: {rows}. Both are {field}."
            )
        if rows:
            measured[field] = next(iter(rows.values()))
    V = measured.get("vocab_size") or read_int(published, stated, "vocab_size")
    V_d = measured.get("draft_vocab_size") or read_int(
        published, {"draft_vocab_size": V, **stated}, "draft_vocab_size"
    )
    if V_d != V:
        lacks = "a vocabulary table (d2t or t2d)" if not tensors.keys() & {"d2t", "t2d"} else ""
        lacks = "an lm_head.weight of its own" if measured["share_lm_head"] else lacks
        if lacks:
            raise CheckpointError(
                f"{published.file}: the draft vocabulary has {V_d} tokens and the target's {V}, so the checkpoint needs "
                f"{lacks}. It is incomplete."
            )
    return measured | {"vocab_size": V, "draft_vocab_size": V_d}


def measure_fc(published: Published, stated: Mapping[str, Any], H: int) -> dict[str, Any]:
    """What `fc` reads, and through which norms."""
    tensors, file = published.tensors, published.file
    has_fc = "fc.weight" in tensors
    if has_fc != stated.get("use_aux_hidden_state", True):
        raise CheckpointError(
            f"{file}: fc.weight is {'there' if has_fc else 'missing'}, but use_aux_hidden_state is {not has_fc}. A "
            "drafter without fc reads the target's final state, and says so: eagle_config.use_aux_hidden_state is false."
        )
    norms = [name for name in tensors if name.startswith("fc_norm.")]
    measured = {
        "fc_norm": bool(norms),
        "norm_before_fc": "input_norm.weight" in tensors,
        "fc_bias": "fc.bias" in tensors,
    }
    if not has_fc:
        return measured | {"use_aux_hidden_state": False}
    rows, columns = read_shape(published, "fc.weight", 2)
    Ht = read_int(published, {"target_hidden_size": H, **stated}, "target_hidden_size")
    if rows != H or Ht < 1 or columns % Ht or not columns:
        raise CheckpointError(
            f"{published.where('fc.weight')} has shape {[rows, columns]}, expected [{H}, A x {Ht}]: hidden_size by the "
            "captured states, each target_hidden_size wide."
        )
    A = columns // Ht
    if norms and len(norms) != A:
        raise CheckpointError(
            f"{file}: there are {len(norms)} fc norms ({', '.join(sorted(published.names[name] for name in norms))}), but "
            f"fc reads {A} states."
        )
    if Ht != H and "embed_tokens.weight" not in tensors:
        raise CheckpointError(
            f"{file}: the target is {Ht} wide and the drafter {H}, so it cannot borrow embeddings and needs its own "
            "embed_tokens.weight. The checkpoint is incomplete."
        )
    if norms and measured["norm_before_fc"]:
        raise CheckpointError(
            f"{file}: there are tensors of fc_norm and of norm_before_fc; a drafter has one of them."
        )
    return measured | {"target_hidden_size": Ht, "num_aux_hidden_states": A, "use_aux_hidden_state": True}


def read_int(published: Published, fields: Mapping[str, Any], name: str) -> int:
    """A size that config.json must state.

    Raises:
        CheckpointError: It does not, or it is no positive whole number.
    """
    value = fields.get(name)
    if value is None:
        raise CheckpointError(f"{published.file}: {name} is missing, and the tensors do not tell it.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{published.file}: {name} must be a positive whole number, got {value!r}.")
    return value


def read_layer_ids(file: Path, stated: Mapping[str, Any]) -> list[int] | None:
    """The captured boundaries. Top-level ids are boundaries; ids in `eagle_config` count layer outputs, from 0.

    Raises:
        CheckpointError: The ids are no distinct numbers, or the two places contradict each other.
    """
    for key, ids in stated.items():
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"{file}: {key} must be a list of layer numbers, got {ids!r}.")
        if len(set(ids)) < len(ids) or (ids and min(ids) < 0):
            raise CheckpointError(f"{file}: {key} must be distinct layer numbers from 0, got {ids}.")
    top = sorted(stated.get("eagle_aux_hidden_state_layer_ids") or ())
    nested = sorted(stated.get("eagle_config.eagle_aux_hidden_state_layer_ids") or ())
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
        return top
    if nested and is_default(nested, first=2):
        logger.warning("%s: captured layer ids %s in eagle_config are the default boundaries; taken so.", file, nested)
        return nested
    return [i + 1 for i in nested] or None


def is_default(ids: list[int], first: int) -> bool:
    """Whether `ids` are the default three of some target, counted so that the lowest is `first`."""
    shift = 2 - first
    boundaries = [i + shift for i in ids]
    num_layers = boundaries[-1] + 3
    return boundaries == [2, num_layers // 2, num_layers - 3]


def read_sliding_window(file: Path, config: Mapping[str, Any], num_layers: int) -> int | None:
    """The window, which counts only if `layer_types` says so; alone it is a leftover of the target's.

    Raises:
        CheckpointError: Some layers have it and some not, or a layer is of another type.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    kinds = set(kinds[:num_layers]) if isinstance(kinds, list) else {repr(kinds)}
    if kinds == {"full_attention"}:
        return None
    window = config.get("sliding_window")
    if kinds != {"sliding_attention"} or not isinstance(window, int) or isinstance(window, bool):
        raise CheckpointError(
            f"{file}: layer_types starts with {sorted(map(str, kinds))} and sliding_window is {window!r}. Expected "
            "full_attention, or sliding_attention with a window, the same for every layer of the drafter."
        )
    return window


def read_rope(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The host's `rope_parameters`, from either spelling. Multimodal rope is plain rope for text.

    Raises:
        CheckpointError: They have a key that no kind of rope has.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{file}: rope_parameters or rope_scaling must be a table or null, got {rope!r}.")
    if unknown := sorted(rope.keys() - ROPE_KEYS):
        raise CheckpointError(f"{file}: rotary parameters {rope} have keys that are not known: {unknown}.")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    if rope["rope_type"] == "mrope" or (rope["rope_type"] == "default" and "mrope_section" in rope):
        rope = {"rope_type": "default"} | {key: rope[key] for key in ("rope_theta",) if key in rope}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    return {**rope, "rope_theta": 10000.0 if theta is None else theta}


def make_config(published: Published, fields: dict[str, Any]) -> Eagle3DrafterConfig:
    """The config, checked by itself and by computing its rotary table.

    Raises:
        CheckpointError: A value is of the wrong type or out of range.
    """
    dtype = published.tensors[FIRST_QUERY].dtype
    try:
        config = Eagle3DrafterConfig(**fields, dtype=dtype, architectures=["Eagle3DrafterModel"])
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {config.hidden_act!r} is not known to Transformers")
        rope = config.rope_parameters or {}
        if any(isinstance(value, dict) for value in rope.values()) or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"no drafter has rotary parameters {rope}")
        frequencies = LlamaRotaryEmbedding(config).inv_freq
        if frequencies.shape != (config.head_dim // 2,) or not torch.isfinite(frequencies).all():
            raise ValueError(f"rotary parameters {rope} do not give {config.head_dim // 2} frequencies")
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{published.file}: {error}") from error
    return config


def read_shape(published: Published, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with so many dimensions.

    Raises:
        CheckpointError: It is not, or has not.
    """
    if name not in published.tensors:
        files = ", ".join(sorted({str(tensor.file) for tensor in published.tensors.values()}))
        spelling = name.replace("layers.0.", "midlayer.")
        raise CheckpointError(f"{files}: {name}{f' (or {spelling})' if spelling != name else ''} is missing.")
    shape = published.tensors[name].shape
    if len(shape) != dims:
        raise CheckpointError(f"{published.where(name)} has shape {list(shape)}, expected {dims} dimensions.")
    return shape
