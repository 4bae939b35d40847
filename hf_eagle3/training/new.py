"""A drafter to train from scratch, sized after its target."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling import Eagle3DrafterConfig, Eagle3DrafterModel
from ..peers import whole


def new_drafter(target: PreTrainedModel, draft_vocabulary: Tensor, **overrides: Any) -> Eagle3DrafterModel:
    """An EAGLE-3.1 drafter (fc_norm, norm_output) for `target`, float32, bound to it.

    Where processes share the target, all must call.

    Width, heads, MLP and rotary positions are the target's; the head starts as the target's rows, the rest at random.

    Args:
        target: Any decoder of the host.
        draft_vocabulary: [V_d] int64, ascending target ids (`choose_draft_vocabulary`).
        overrides: Any field of `Eagle3DrafterConfig`.
    """
    theirs = target.config.get_text_config(decoder=True)
    heads = theirs.num_attention_heads
    fields: dict[str, Any] = {
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(theirs, "num_key_value_heads", None) or heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        "vocab_size": theirs.vocab_size,
        "draft_vocab_size": len(draft_vocabulary),
        "target_hidden_size": theirs.hidden_size,
        "max_position_embeddings": theirs.max_position_embeddings,
        "rms_norm_eps": getattr(theirs, "rms_norm_eps", 1e-6),
        "rope_parameters": plain_rope(getattr(theirs, "rope_parameters", None)),
        "target_model_type": theirs.model_type,
        # The host's pipeline takes two models for one vocabulary only if these agree.
        **{name: getattr(theirs, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "fc_norm": True,
        "norm_output": True,
    }
    drafter = Eagle3DrafterModel(Eagle3DrafterConfig(**{**fields, **overrides}))
    drafter.set_draft_to_target_ids(draft_vocabulary)
    rows = whole(target.get_output_embeddings().weight.detach())
    if not drafter.config.share_lm_head and rows.shape[-1] == drafter.config.hidden_size:
        with torch.no_grad():
            drafter.lm_head.weight.copy_(rows[draft_vocabulary.to(rows.device)])
    drafter.bind(target)
    drafter.config.target_name_or_path = drafter.bound_target_name
    return drafter


def plain_rope(rope_parameters: dict | None) -> dict | None:
    """The target's rotary parameters where they are one set; a target with one set a layer kind gives its full one."""
    if rope_parameters and "full_attention" in rope_parameters:
        return dict(rope_parameters["full_attention"])
    return dict(rope_parameters) if rope_parameters else None
