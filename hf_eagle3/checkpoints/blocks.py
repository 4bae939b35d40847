"""From a published D-Flash or DSpark checkpoint to our config. Sizes come from the tensors, and config.json must agree."""

import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..modeling import CheckpointError
from ..modeling.text_eagle3 import escape_record, show
from .block_flavours import FIXED, BlockFlavour
from .convert import Resolved, check_unmeasured, read_target_name
from .flavours import Published
from .measuring import read_shape
from .rope import read_rope

logger = logging.getLogger(__name__)
logger.addFilter(escape_record)

QUERY = "layers.0.self_attn.q_proj.weight"
NEEDED = (
    *(
        QUERY,
        "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.q_norm.weight",
        "layers.0.self_attn.k_norm.weight",
    ),
    *(
        "layers.0.mlp.gate_proj.weight",
        "layers.0.input_layernorm.weight",
        "fc.weight",
        "hidden_norm.weight",
        "norm.weight",
    ),
)
# Tensors of networks that ours is not -> what they are.
FOREIGN = {
    "self_attn.g_proj.weight": "gated attention",
    "self_attn.qkv_proj.weight": "one tensor for queries, keys and values",
    "self_attn.sinks": "attention sinks",
    "aux_hidden_norms.0.weight": "a norm for each captured state",
}


def convert_blocks(flavour: BlockFlavour, published: Published) -> Resolved:
    """Our config's fields, and where each comes from.

    Args:
        flavour: Of the checkpoint.
        published: Under our tensor names; `config` with the keys of the flavour's tables in their places.

    Raises:
        CheckpointError: A key contradicts another or the tensors, or the network is none of ours.
    """
    file, config = published.file, published.config
    refuse_foreign(flavour, published)
    stated: dict[str, dict[str, Any]] = {}
    for key, ours in flavour.config_keys.items():
        if config.get(key) is not None:
            stated.setdefault(ours, {})[published.spell(key)] = config[key]
    fields = {ours: next(iter(values.values())) for ours, values in stated.items()}
    sources = {ours: f"config.json: {next(iter(values))}" for ours, values in stated.items()}
    for values in stated.values():
        check_unmeasured(file, values)
    for ours, value in flavour.defaults.items():
        if ours not in fields:
            fields[ours], sources[ours] = value, f"not stated; a {flavour.name} checkpoint then means so"
    read_boundaries(flavour, published, fields, sources)
    measured = measure_blocks(published, fields)
    for ours in sorted(stated.keys() & measured.keys()):
        if fields[ours] != measured[ours]:
            (key, value) = next(iter(stated[ours].items()))
            raise CheckpointError(
                f"{file}: {key} is {show(value)}, but by the tensors {ours} is {show(measured[ours])}."
            )
    fields |= measured
    sources |= dict.fromkeys(measured, "the tensors")
    if "block_size" not in fields or "mask_token_id" not in fields:
        missing = [name for name in ("block_size", "mask_token_id") if name not in fields]
        raise CheckpointError(f"{file}: {' and '.join(missing)} must be given in a {flavour.name} checkpoint.")
    read_layer_types(published, fields, sources)
    fields["rope_parameters"], sources["rope_parameters"] = read_rope(file, config)
    if (target := read_target_name(file, config)) is not None:
        fields["target_name_or_path"] = target
        sources["target_name_or_path"] = "config.json: speculators_config.verifier.name_or_path"
    return Resolved(fields, sources)


def refuse_foreign(flavour: BlockFlavour, published: Published) -> None:
    """Raise if the network is none of ours, or has no weights."""
    file, config, tensors = published.file, published.config, published.tensors
    if not tensors:
        raise CheckpointError(
            f"{file}: a {flavour.name} block drafter without weights beside it. Expected model.safetensors or "
            "pytorch_model.bin."
        )
    for ending, what in FOREIGN.items():
        if (name := next((name for name in tensors if name.endswith(ending)), None)) is not None:
            raise CheckpointError(
                f"{published.where(name)}: this drafter has {what}, which our network does not compute."
            )
    if (why := flavour.why_not(config)) is not None:
        raise CheckpointError(f"{file}: a {flavour.name} drafter that our network does not compute: {why}.")
    for key in sorted(config.keys() & FIXED.keys()):
        if config[key] not in FIXED[key]:
            raise CheckpointError(
                f"{file}: {key} is {show(config[key])}, and our network of blocks does not compute that."
            )
    if missing := [name for name in NEEDED if name not in tensors]:
        raise CheckpointError(
            f"{file}: a {flavour.name} block drafter, but {', '.join(missing)} is missing. It has "
            f"{', '.join(sorted(tensors)[:8])}, ..."
        )


def read_boundaries(
    flavour: BlockFlavour, published: Published, fields: dict[str, Any], sources: dict[str, str]
) -> None:
    """Put the captured boundaries into `fields`.

    Raises:
        CheckpointError: They are no ascending layer numbers, or lie behind the target's final norm.
    """
    file, config = published.file, published.config
    key = next((key for key in flavour.layer_ids if config.get(key) is not None), None)
    num_layers = config.get("num_target_layers")
    if key is None:
        if not isinstance(num_layers, int) or not flavour.spreads_layers:
            raise CheckpointError(
                f"{file}: {flavour.layer_ids[0]} must be given: which layers of the target are read."
            )
        num_draft = count_layers(published)
        ids: Any = default_outputs(num_layers, num_draft)
        said = f"not stated; {num_draft} of {num_layers} layers as z-lab spreads them"
    else:
        ids, said = config[key], f"config.json: {published.spell(key)}"
    least = -1 if flavour.ids_are_outputs else 0
    is_list = isinstance(ids, list) and ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not is_list or ids[0] < least or any(a >= b for a, b in pairwise(ids)):
        raise CheckpointError(
            f"{file}: {key} must be ascending layer numbers from {least}, since states are joined in that order; got "
            f"{show(ids)}."
        )
    boundaries = [i + 1 for i in ids] if flavour.ids_are_outputs else list(ids)
    if flavour.ids_are_outputs and isinstance(num_layers, int) and boundaries[-1] >= num_layers:
        raise CheckpointError(
            f"{file}: {key} names layer {ids[-1]} of {num_layers}, whose output {flavour.name} reads behind the target's "
            "final norm; our network of blocks reads states before it."
        )
    fields["aux_layer_ids"] = boundaries
    sources["aux_layer_ids"] = f"{said} {ids}" + (", plus one each" if flavour.ids_are_outputs else "")


# z-lab/dflash:dflash/model.py build_target_layer_ids
def default_outputs(num_layers: int, num_draft: int) -> list[int]:
    """The layers whose outputs are read where nothing is stated: from the second to the fourth from the end, evenly."""
    if num_draft == 1:
        return [num_layers // 2]
    first, last = 1, num_layers - 3
    return [round(first + i * (last - first) / (num_draft - 1)) for i in range(num_draft)]


def spread_boundaries(num_layers: int, count: int) -> list[int]:
    """The boundaries that a new block drafter reads of a target of so many layers: `count`, or as many as there are."""
    return sorted({min(max(output + 1, 0), num_layers) for output in default_outputs(num_layers, count)})


def count_layers(published: Published) -> int:
    """Layers of the drafter, by its tensors."""
    indices = {name.split(".")[1] for name in published.tensors if name.startswith("layers.")}
    return len([index for index in indices if index.isdigit()])


def measure_blocks(published: Published, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields that follow from the tensors."""
    tensors = published.tensors
    head_dim = read_shape(published, "layers.0.self_attn.q_norm.weight", 1)[0]
    H, columns = read_shape(published, "fc.weight", 2)
    num_states = len(fields["aux_layer_ids"])
    if columns % num_states:
        raise CheckpointError(
            f"{published.where('fc.weight')} has {columns} columns, which is no multiple of the {num_states} captured layers."
        )
    heads, left = divmod(read_shape(published, QUERY, 2)[0], head_dim)
    kv_heads, also_left = divmod(read_shape(published, "layers.0.self_attn.k_proj.weight", 2)[0], head_dim)
    if left or also_left:
        raise CheckpointError(
            f"{published.where(QUERY)} is no whole number of heads of {head_dim}, the width of q_norm."
        )
    measured: dict[str, Any] = {
        "hidden_size": H,
        "intermediate_size": read_shape(published, "layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": count_layers(published),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "target_hidden_size": columns // num_states,
        "num_aux_hidden_states": num_states,
        "attention_bias": "layers.0.self_attn.q_proj.bias" in tensors,
        "has_own_embeddings": "embed_tokens.weight" in tensors,
        "share_lm_head": "lm_head.weight" not in tensors,
        "has_confidence_head": "confidence_head.proj.weight" in tensors,
        "markov_rank": 0,
    }
    if "markov_head.markov_w1.weight" in tensors:
        measured["markov_rank"] = read_shape(published, "markov_head.markov_w1.weight", 2)[1]
    if "embed_tokens.weight" in tensors:
        measured["vocab_size"] = read_shape(published, "embed_tokens.weight", 2)[0]
    vocab_size = measured.get("vocab_size", fields.get("vocab_size"))
    has_head = "lm_head.weight" in tensors
    measured["draft_vocab_size"] = read_shape(published, "lm_head.weight", 2)[0] if has_head else vocab_size
    if "confidence_reads_markov" in fields and not measured["has_confidence_head"]:
        measured["confidence_reads_markov"] = False
    return measured


def read_layer_types(published: Published, fields: dict[str, Any], sources: dict[str, str]) -> None:
    """Put the sliding window into `fields`: by `layer_types`, or by z-lab's `use_swa`; alone it is the target's.

    Raises:
        CheckpointError: A window is asked for and not given, or layers are of other kinds.
    """
    file, config, n = published.file, published.config, fields["num_hidden_layers"]
    window, types = config.get("sliding_window"), config.get("layer_types")
    for prefix in ("", "dflash_config."):
        if config.get(f"{prefix}use_swa"):
            window, types = config.get(f"{prefix}swa_window_size", window), ["sliding_attention"] * n
            sources["sliding_window"] = f"config.json: {published.spell(prefix + 'use_swa')} and its window"
    fields["sliding_window"] = fields["layer_types"] = None
    if types is None or set(types[:n]) == {"full_attention"}:
        return
    if not isinstance(window, int) or isinstance(window, bool):
        raise CheckpointError(f"{file}: layer_types asks for windows, and sliding_window is {show(window)}.")
    fields["sliding_window"] = window
    sources.setdefault("sliding_window", "config.json: layer_types and sliding_window")
    if set(types[:n]) != {"sliding_attention"}:
        fields["layer_types"], sources["layer_types"] = list(types[:n]), "config.json: layer_types"
    elif fields.get("is_causal") is None and "speculators_model_type" in config:
        fields["is_causal"] = not config.get("sliding_window_non_causal", False)
        sources["is_causal"] = "config.json: sliding_window_non_causal"
