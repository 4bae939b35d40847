"""Shapes to measure without weights: speed does not depend on values."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..modeling import Eagle3DrafterConfig, Eagle3DrafterModel
from .names import SHAPES

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
