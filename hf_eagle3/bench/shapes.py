"""Shapes to measure without weights: speed does not depend on values."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..checkpoints.blocks import spread_boundaries
from ..modeling import (
    DFlashDrafterConfig,
    DFlashDrafterModel,
    DrafterModel,
    Eagle3DrafterConfig,
    Eagle3DrafterModel,
)
from .names import SHAPES

DRAFT_VOCAB_SIZE = 32000
NUM_BLOCK_LAYERS = 5
# As z-lab and DeepSpec train them for targets of 4 to 14 billion weights.
BLOCKS: dict[str, dict[str, Any]] = {
    "dflash": {"block_size": 8},
    "dspark": {"block_size": 7, "drafts_from_root": True, "markov_rank": 256},
}


def make_target(shape: str, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A target of a known shape, with random weights made on the device."""
    fields = dict(SHAPES[shape])
    config: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields, tie_word_embeddings=False)
    config.eos_token_id = config.bos_token_id = None
    config.pad_token_id = 0
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_random_drafter(target: PreTrainedModel, kind: str = "eagle3") -> DrafterModel:
    """A drafter for `target`, of the shape that the field trains for it, with random weights; `kind` one of `RANDOM_DRAFTERS`."""
    text = target.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    sizes = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
    }
    if kind == "eagle3":
        draft_vocab_size = min(DRAFT_VOCAB_SIZE, text.vocab_size)
        config = Eagle3DrafterConfig(**sizes, num_hidden_layers=1, draft_vocab_size=draft_vocab_size)
        with target.device:
            return Eagle3DrafterModel(config).to(target.dtype).eval().bind(target)
    boundaries = spread_boundaries(text.num_hidden_layers, NUM_BLOCK_LAYERS)
    blocks = DFlashDrafterConfig(
        **sizes,
        **BLOCKS[kind],
        num_hidden_layers=NUM_BLOCK_LAYERS,
        draft_vocab_size=text.vocab_size,
        share_lm_head=True,
        aux_layer_ids=boundaries,
        num_aux_hidden_states=len(boundaries),
        mask_token_id=text.vocab_size - 1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with target.device:
        return DFlashDrafterModel(blocks).to(target.dtype).eval().bind(target)
