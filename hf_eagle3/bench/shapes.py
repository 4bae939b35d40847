"""Shapes to measure without weights: speed does not depend on values."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..modeling import Eagle3DrafterConfig, Eagle3DrafterModel

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
DRAFT_VOCAB_SIZE = 32000


def make_target(shape: str, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A target of a known shape, with random weights made on the device."""
    fields = dict(SHAPES[shape])
    config: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields, tie_word_embeddings=False)
    config.eos_token_id = config.bos_token_id = None
    config.pad_token_id = 0
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_random_drafter(target: PreTrainedModel) -> Eagle3DrafterModel:
    """A drafter for `target`, of the shape that the field trains for it, with random weights."""
    text = target.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    config = Eagle3DrafterConfig(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        draft_vocab_size=min(DRAFT_VOCAB_SIZE, text.vocab_size),
        max_position_embeddings=text.max_position_embeddings,
    )
    with target.device:
        return Eagle3DrafterModel(config).to(target.dtype).eval().bind(target)
