"""From published keys and tensors to our config.

Sizes come from the tensors and are checked against what config.json states.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..console.quoting import is_model_name
from ..modeling import CheckpointError, Eagle3DrafterConfig
from ..modeling.configuration_eagle3 import check_rope_values, refuse_second_rope
from ..modeling.text_eagle3 import escape_record, show
from .flavours import FIXED_VALUES, IGNORED_KEYS, READ_ELSEWHERE, Flavour, Published, is_latent, is_parallel

logger = logging.getLogger(__name__)
logger.addFilter(escape_record)

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

# The first layer's query projection: of Llama's attention, or of MLA with a query latent.
FIRST_QUERY = ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_a_proj.weight")
LAYER_0 = "layers.0.self_attn"
LATENT_TENSORS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")


class Resolved(NamedTuple):
    """Our config's fields, and where each comes from, in words."""

    fields: dict[str, Any]
    sources: dict[str, str]


def convert_config(flavour: Flavour, published: Published) -> Resolved:
    """Our config's fields.

    Raises:
        CheckpointError: A key is not known, or contradicts the tensors.
    """
    file = published.file
    config = {key: value for key, value in published.config.items() if key not in flavour.ignored}
    known = flavour.config_keys.keys() | FIXED_VALUES.keys() | IGNORED_KEYS | READ_ELSEWHERE
    unknown = sorted(
        published.spell(key) for key in config.keys() - known if not key.startswith("_")
    )  # _name_or_path and the like
    if unknown and not flavour.is_clone:
        raise CheckpointError(
            f"{file}: {flavour.name} checkpoints are not known to have {unknown}. A key that is ignored may change the "
            "drafter's arithmetic, so none is: remove it if it changes nothing, or report it."
        )
    if unknown:
        logger.info("%s: %s are taken to be the target's, whose config this was made from.", file, unknown)
    for key in sorted(config.keys() & FIXED_VALUES.keys()):
        if config[key] not in FIXED_VALUES[key]:
            raise CheckpointError(
                f"{file}: {key} is {show(config[key])}, and no EAGLE-3 drafter that can be loaded has that."
            )

    stated: dict[str, dict[str, Any]] = {}  # our field -> {published key: value}
    for key, ours in flavour.config_keys.items():
        if config.get(key) is not None:
            stated.setdefault(ours, {})[published.spell(key)] = config[key]
    fields = {ours: next(iter(values.values())) for ours, values in stated.items()}
    sources = {ours: f"config.json: {next(iter(values))}" for ours, values in stated.items()}

    ids = read_layer_ids(file, stated.pop("aux_layer_ids", {}), flavour.nested_ids_are_boundaries)
    if ids is not None:
        number = f"{sources['aux_layer_ids'].removeprefix('config.json: ')}: the number of captured layer ids"
        stated["num_aux_hidden_states"] = {number: len(ids.boundaries)} | stated.get("num_aux_hidden_states", {})
        fields |= {"aux_layer_ids": ids.boundaries, "aux_layer_ids_from_outputs": ids.were_outputs}
        sources["aux_layer_ids"] += f" {ids.published}" + (", plus one each" if ids.were_outputs else "")
    else:
        fields["aux_layer_ids"] = None
    measured = measure(published, fields)
    for ours in sorted(stated.keys() & measured.keys()):
        check_stated(published, ours, stated[ours], measured[ours])
    for ours in sorted(stated.keys() - measured.keys()):
        check_unmeasured(file, stated[ours])
    sources |= dict.fromkeys(measured, "the tensors")
    for ours, value in flavour.defaults.items():
        if ours not in stated:
            logger.warning("%s: %s is not stated, which in a %s checkpoint means %r.", file, ours, flavour.name, value)
            fields[ours], sources[ours] = value, f"not stated; a {flavour.name} checkpoint then means so"
    if config.get("tie_word_embeddings"):
        if measured["share_lm_head"]:
            raise CheckpointError(
                f"{file}: tie_word_embeddings is true and there is no lm_head.weight, so the head would be the drafter's "
                "embedding table. That is not supported."
            )
        logger.warning("%s: tie_word_embeddings is ignored, since there is an lm_head.weight.", file)
    fields |= measured
    fields["sliding_window"] = read_sliding_window(file, config, measured["num_hidden_layers"])
    fields["rope_parameters"], sources["rope_parameters"] = read_rope(file, config)
    if fields["sliding_window"] is not None:
        sources["sliding_window"] = "config.json: layer_types and sliding_window"
    if (target := read_target_name(file, config)) is not None:
        fields["target_name_or_path"] = target
        sources["target_name_or_path"] = "config.json: speculators_config.verifier.name_or_path"
    return Resolved(fields, sources)


def check_unmeasured(file: Path, stated: Mapping[str, Any]) -> None:
    """Raise if keys for one field, of which the tensors say nothing, contradict each other."""
    first, *others = stated.values()
    if any(value != first for value in others):
        says = " and ".join(f"{key} is {show(value)}" for key, value in stated.items())
        raise CheckpointError(f"{file}: {says}. They mean the same; remove the one that is wrong.")


def check_stated(published: Published, ours: str, stated: Mapping[str, Any], measured: Any) -> None:
    """Compare what config.json states, under one key or several, with what the tensors say.

    Raises:
        CheckpointError: They differ in what matters.
    """
    if measured in stated.values():
        return
    says = " and ".join(f"{key} is {show(value)}" for key, value in stated.items())
    if ours in TENSORS_DECIDE or (ours in TENSORS_GRANT and measured):
        logger.warning("%s: %s, but by the tensors it is %s, which is taken.", published.file, says, measured)
        return
    raise CheckpointError(f"{published.file}: {says}, but by the tensors {ours} is {show(measured)}.")


def measure(published: Published, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields that the tensors tell.

    Args:
        stated: Fields as config.json has them, for what the tensors alone leave open.

    Raises:
        CheckpointError: Tensors contradict each other, or config.json in what only both together tell.
    """
    tensors = published.tensors
    H = read_shape(published, "layers.0.input_layernorm.weight", 1)[0]
    measure_attention = measure_latent if is_latent(published) else measure_heads
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
        | measure_attention(published, stated, H)
        | measure_vocabulary(published, stated)
        | measure_fc(published, stated, H)
        | measure_mask(published, stated)
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


def measure_latent(published: Published, stated: Mapping[str, Any], H: int) -> dict[str, Any]:  # noqa: ARG001  as above
    """Widths of multi-head latent attention, all but the number of heads from the tensors."""
    has_latent_query = f"{LAYER_0}.q_a_proj.weight" in published.tensors
    query = ("q_a_proj", "q_a_layernorm", "q_b_proj") if has_latent_query else ("q_proj",)
    if missing := [n for n in (*query, *LATENT_TENSORS) if f"{LAYER_0}.{n}.weight" not in published.tensors]:
        raise CheckpointError(
            f"{published.where(f'{LAYER_0}.kv_a_proj_with_mqa.weight')} makes this multi-head latent attention (MLA), but "
            f"{', '.join(f'{LAYER_0}.{name}.weight' for name in missing)} is missing."
        )

    def rows(name: str) -> int:
        return read_shape(published, f"{LAYER_0}.{name}.weight", 1 if name.endswith("norm") else 2)[0]

    heads = read_int(published, stated, "num_attention_heads")
    kv_rank = rows("kv_a_layernorm")
    rope = rows("kv_a_proj_with_mqa") - kv_rank
    widths = {name: divmod(rows(name), heads) for name in (query[-1], "kv_b_proj")}
    (qk, left), (nope_and_v, also_left) = widths.values()
    nope = qk - rope
    v = nope_and_v - nope
    columns = read_shape(published, f"{LAYER_0}.o_proj.weight", 2)[1]
    if left or also_left or rope < 1 or nope < 1 or v < 1 or columns != heads * v:
        sizes = {name: list(read_shape(published, f"{LAYER_0}.{name}.weight", 2)) for name in (*widths, "o_proj")}
        raise CheckpointError(
            f"{published.where(f'{LAYER_0}.kv_b_proj.weight')}: with num_attention_heads {heads}, kv_lora_rank {kv_rank} "
            f"and qk_rope_head_dim {rope} by the tensors, {sizes} do not fit together. Expected {query[-1]} heads x (nope "
            "+ rope), kv_b_proj heads x (nope + v) and o_proj heads x v."
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": rope,
        "kv_lora_rank": kv_rank,
        "q_lora_rank": rows("q_a_layernorm") if has_latent_query else None,
        "qk_nope_head_dim": nope,
        "v_head_dim": v,
    }


def measure_vocabulary(published: Published, stated: Mapping[str, Any]) -> dict[str, Any]:
    """V and V_d, and whether the head is the target's."""
    tensors = published.tensors
    measured: dict[str, Any] = {"share_lm_head": "lm_head.weight" not in tensors}
    if measured["share_lm_head"] and stated.get("draft_vocab_size") is not None:
        logger.warning("%s: there is no lm_head.weight, so the head is the target's.", published.file)
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


def measure_mask(published: Published, stated: Mapping[str, Any]) -> dict[str, Any]:
    """What a P-EAGLE drafter reads where the target has no states yet; nothing for any other drafter."""
    file, tensors = published.file, published.tensors
    if not is_parallel(published):
        return {}
    if "mask_hidden" not in tensors:
        raise CheckpointError(f"{file}: this is a P-EAGLE drafter, but its tensor mask_hidden is missing.")
    if published.config.get("parallel_drafting") is False:
        raise CheckpointError(f"{file}: parallel_drafting is False, but there is a tensor mask_hidden.")
    if stated.get("mask_token_id") is None:
        raise CheckpointError(
            f"{file}: this is a P-EAGLE drafter, but none of mask_token_id, pard_token and ptd_token_id says which token "
            "it reads at positions to be drafted."
        )
    if "fc.weight" not in tensors:
        raise CheckpointError(
            f"{file}: this is a P-EAGLE drafter, but fc.weight, which reads mask_hidden, is missing."
        )
    shape, columns = tensors["mask_hidden"].shape, read_shape(published, "fc.weight", 2)[1]
    if shape not in ((1, 1, columns), (columns,)):
        raise CheckpointError(
            f"{published.where('mask_hidden')} has shape {list(shape)}, expected [1, 1, {columns}] or [{columns}]: as wide "
            "as the states that fc reads."
        )
    return {}


def read_int(published: Published, fields: Mapping[str, Any], name: str) -> int:
    """A size that config.json must state.

    Raises:
        CheckpointError: It does not, or it is no positive whole number.
    """
    value = fields.get(name)
    if value is None:
        raise CheckpointError(f"{published.file}: {name} is missing, and the tensors do not tell it.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{published.file}: {name} must be a positive whole number, got {show(value)}.")
    return value


class LayerIds(NamedTuple):
    """What the target is read at."""

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
    for key, ids in stated.items():
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"{file}: {key} must be a list of layer numbers, got {show(ids)}.")
        if len(set(ids)) < len(ids) or (ids and min(ids) < 0):
            raise CheckpointError(f"{file}: {key} must be distinct layer numbers from 0, got {ids}.")
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
            f"{file}: layer_types starts with {sorted(map(str, kinds))} and sliding_window is {show(window)}. Expected "
            "full_attention, or sliding_attention with a window, the same for every layer of the drafter."
        )
    return window


def read_target_name(file: Path, config: Mapping[str, Any]) -> str | None:
    """The target's repository or folder, as speculators states it; None where what is stated can be neither."""
    table = config.get("speculators_config")
    verifier = table.get("verifier") if isinstance(table, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    if not name or (isinstance(name, str) and is_model_name(name)):
        return name or None
    logger.warning(
        "%s: speculators_config.verifier.name_or_path is %s, which is no repository and no folder; ignored.",
        *(file, show(name)),
    )
    return None


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


def make_config(published: Published, fields: dict[str, Any]) -> Eagle3DrafterConfig:
    """The config, checked by itself and by computing its rotary table.

    Raises:
        CheckpointError: A value is of the wrong type or out of range.
    """
    dtype = published.tensors[find_first_query(published)].dtype
    try:
        config = Eagle3DrafterConfig(**fields, dtype=dtype, architectures=["Eagle3DrafterModel"])
        check_rope(config)
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{published.file}: {error}") from error
    return config


def check_rope(config: Eagle3DrafterConfig) -> None:
    """Raise ValueError if a drafter cannot have the rotary parameters of `config`: no export of it could be loaded."""
    rope = config.rope_parameters or {}
    if any(isinstance(value, dict) for value in rope.values()) or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"no drafter has rotary parameters {rope}: it rotates whole heads, in all layers alike. Leave out "
            "partial_rotary_factor, and give one set."
        )
    try:
        frequencies = LlamaRotaryEmbedding(config).inv_freq
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"rotary parameters {rope} are of a kind that Transformers does not know: {type(error).__name__}: {error}"
        ) from error
    if frequencies.shape != (config.head_dim // 2,) or not torch.isfinite(frequencies).all():
        raise ValueError(f"rotary parameters {rope} do not give {config.head_dim // 2} frequencies")


def find_first_query(published: Published) -> str:
    """The name of the first layer's query projection; the Llama one where there is none."""
    return next((name for name in FIRST_QUERY if name in published.tensors), FIRST_QUERY[0])


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
