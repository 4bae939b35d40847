"""Sizes of a published drafter, from its tensors and checked against what config.json states."""

import logging
from collections.abc import Mapping
from typing import Any

from ..modeling import CheckpointError
from ..modeling.text_eagle3 import escape_record, show
from .flavours import Published, is_latent, is_parallel

logger = logging.getLogger(__name__)
logger.addFilter(escape_record)

# The first layer's query projection: of Llama's attention, or of MLA with a query latent.
FIRST_QUERY = ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_a_proj.weight")
LAYER_0 = "layers.0.self_attn"
LATENT_TENSORS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")


def measure(published: Published, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields that follow from the tensors.

    Args:
        stated: Fields as config.json has them, for sizes that tensors alone leave open.

    Raises:
        CheckpointError: Tensors contradict each other, or config.json.
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
    """Inputs of `fc`, and its norms."""
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
    """Check the state that a P-EAGLE drafter reads at drafted positions; no fields follow from it."""
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
