"""A drafter to train from scratch, sized after its target."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints.blocks import spread_boundaries
from ..checkpoints.convert import check_rope
from ..modeling import DFlashDrafterConfig, DFlashDrafterModel, DrafterModel, Eagle3DrafterConfig, Eagle3DrafterModel
from ..tensor_parallel import whole
from .sizes import find_size

logger = logging.get_logger(__name__)

Drafter = TypeVar("Drafter", bound=DrafterModel)

# Rotary embeddings that a new drafter takes over, with the keys that it keeps of them: those that rotate whole heads by
# the position alone, as Transformers, SGLang and vLLM read alike. The scale of yarn is left to its formula: engines read
# mscale and attention_factor each in a way of its own.
ROPES: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings"}),
}
COMMON_KEYS = frozenset({"rope_type", "rope_theta"})
THETA = 10000.0  # for a drafter whose target has no rotary embedding
MLP_SIZES = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "dff", "dim_ff")
MLP_RATIO = 4  # MLP width of a target that states none, in hidden sizes
HEAD_DIM = 64  # for a drafter whose target has no attention
NUM_BLOCK_LAYERS = 5  # of a new block drafter, and states that it reads
# The longest text of a drafter whose target has no limit of its own, such as one with ALiBi.
LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length", "context_length")


def new_drafter(target: PreTrainedModel, draft_vocabulary: Tensor, **overrides: Any) -> Eagle3DrafterModel:
    """An EAGLE-3.1 drafter (fc_norm, norm_output) for `target`, float32, bound to it.

    Where processes share the target, all must call.

    Width, heads, MLP and rotary positions are the target's, as far as it has them and a drafter can; the head (and
    embeddings of its own) start as the target's rows, the rest at random.

    Args:
        target: Any decoder of the host.
        draft_vocabulary: [V_d] int64, ascending target ids (`choose_draft_vocabulary`).
        overrides: Any field of `Eagle3DrafterConfig`.

    Raises:
        ValueError: `overrides` are no drafter's, or one that no engine could be given.
    """
    chosen = {"num_hidden_layers": 1, "fc_norm": True, "norm_output": True, **overrides}
    config = Eagle3DrafterConfig(**find_fields(target, len(draft_vocabulary), chosen))
    check_rope(config)
    return start(Eagle3DrafterModel(config), target, draft_vocabulary)


def new_block_drafter(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draft_vocabulary: Tensor | None = None,
    **overrides: Any,
) -> DFlashDrafterModel:
    """A D-Flash or DSpark drafter for `target`, float32, bound to it.

    Where processes share the target, all must call.

    Width, heads, MLP and rotary positions are the target's, as far as it has them; embeddings are the target's own where
    they are as wide, and so is the head, over the whole vocabulary, unless `draft_vocabulary` is given. Five layers read
    five states, spread over the target as z-lab does, unless told otherwise.

    Args:
        target: Any decoder of the host.
        tokenizer: The target's; names the mask token.
        draft_vocabulary: [V_d] int64, ascending target ids, for a head of its own that starts as the target's rows.
        overrides: Any field of `DFlashDrafterConfig`; `block_size` must be among them.

    Raises:
        ValueError: `overrides` are no drafter's.
    """
    theirs, head = target.config.get_text_config(decoder=True), target.get_output_embeddings()
    width = target.get_input_embeddings().weight.shape[-1]
    lends_head = draft_vocabulary is None and head is not None and head.weight.shape[-1] == width
    ids = torch.arange(theirs.vocab_size) if draft_vocabulary is None else draft_vocabulary
    chosen = {
        "num_hidden_layers": NUM_BLOCK_LAYERS,
        "share_lm_head": lends_head,
        "mask_token_id": choose_mask_token(theirs, tokenizer),
        **overrides,
    }
    chosen["aux_layer_ids"] = chosen.get("aux_layer_ids") or spread_boundaries(
        theirs.num_hidden_layers, NUM_BLOCK_LAYERS
    )
    chosen["num_aux_hidden_states"] = len(chosen["aux_layer_ids"])
    config = DFlashDrafterConfig(**find_fields(target, len(ids), chosen))
    check_rope(config)
    return start(DFlashDrafterModel(config), target, ids)


def find_fields(target: PreTrainedModel, draft_vocab_size: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a drafter's config: those `chosen`, and all that its target decides, whatever its kind."""
    theirs = target.config.get_text_config(decoder=True)
    width = target.get_input_embeddings().weight.shape[-1]
    fields = {
        **find_sizes(theirs, width),
        # No engine lends a drafter embeddings of another width than the target's states.
        "has_own_embeddings": width != theirs.hidden_size,
        "draft_vocab_size": draft_vocab_size,
        "rms_norm_eps": getattr(theirs, "rms_norm_eps", None) or 1e-6,
        "target_model_type": theirs.model_type,
        # The host's pipeline takes two models for one vocabulary only if these agree.
        **{name: getattr(theirs, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **chosen,
    }
    if "rope_parameters" not in chosen:
        fields["rope_parameters"] = choose_rope(getattr(theirs, "rope_parameters", None))
    return fields


def start(drafter: Drafter, target: PreTrainedModel, draft_vocabulary: Tensor) -> Drafter:
    """`drafter` with the draft vocabulary, its head and embeddings as the target's rows, bound to `target`."""
    config, embeddings = drafter.config, target.get_input_embeddings().weight
    drafter.set_draft_to_target_ids(draft_vocabulary)
    if (head := target.get_output_embeddings()) is not None and not config.share_lm_head:
        rows = whole(head.weight.detach())
        if rows.shape[-1] == config.hidden_size:
            with torch.no_grad():
                drafter.lm_head.weight.copy_(rows[draft_vocabulary.to(rows.device)])
    if config.has_own_embeddings and embeddings.shape[-1] == config.hidden_size:
        with torch.no_grad():
            drafter.embed_tokens.weight.copy_(whole(embeddings.detach())[: config.vocab_size])
    drafter.bind(target)
    drafter.config.target_name_or_path = drafter.bound_target_name
    return drafter


def choose_mask_token(theirs: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """A token that answers do not have: the tokenizer's mask, padding or unknown token, else the last of the vocabulary."""
    ends = getattr(theirs, "eos_token_id", None)
    taken = {*(ends if isinstance(ends, list) else [ends])}
    named = [getattr(tokenizer, f"{name}_token_id", None) for name in ("mask", "pad", "unk")]
    found = (token for token in named if token is not None and token not in taken and token < theirs.vocab_size)
    return next(found, theirs.vocab_size - 1)


def find_sizes(theirs: PreTrainedConfig, width: int) -> dict[str, int]:
    """The sizes of a drafter for a target of config `theirs`.

    Args:
        theirs: The config of the text decoder.
        width: The width of the target's token embeddings. They may be narrower than its states (OPT 350M).
    """
    heads = find_size(theirs, "num_attention_heads")
    head_dim = find_size(theirs, "head_dim") or (theirs.hidden_size // heads if heads else min(HEAD_DIM, width))
    heads = heads or max(1, width // HEAD_DIM)
    kv_heads = find_size(theirs, "num_key_value_heads") or heads
    sizes = {
        "hidden_size": width,
        "target_hidden_size": theirs.hidden_size,
        "intermediate_size": find_size(theirs, *MLP_SIZES) or MLP_RATIO * width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads if heads % kv_heads == 0 else heads,
        "head_dim": head_dim + head_dim % 2,  # rotary positions turn pairs
        "vocab_size": theirs.vocab_size,
    }
    if (length := find_size(theirs, *LENGTHS)) is not None:
        sizes["max_position_embeddings"] = length
    return sizes


def choose_rope(theirs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Rotary parameters for a new drafter: the target's where one of `ROPES` has them, else plain ones at its theta.

    A target with a set for each kind of layer gives that of full attention, or the first. What differs from the target's
    is logged: a drafter that is trained from scratch needs positions, and not those of its target.
    """
    sets = {name: value for name, value in (theirs or {}).items() if isinstance(value, Mapping)}
    one = sets.get("full_attention") or next(iter(sets.values()), theirs or {})
    known = {key: value for key, value in one.items() if value is not None}
    kind = known.get("rope_type", known.pop("type", "default"))
    known["rope_type"] = kind
    kept = ROPES.get(kind, frozenset()) | COMMON_KEYS
    ours = {key: value for key, value in known.items() if key in kept}
    if kind not in ROPES:
        ours["rope_type"] = "default"
    ours.setdefault("rope_theta", THETA)
    if theirs and known != ours:
        logger.warning(
            f"The target's rotary parameters are {dict(theirs)}. The new drafter takes {ours}: drafters rotate whole heads, "
            "by the position alone."
        )
    return ours
