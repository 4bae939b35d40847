"""A target and drafters in float64, and rows to unroll drafters over."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_eagle3.modeling import Eagle3DrafterConfig, Eagle3DrafterModel
from hf_eagle3.training.step.batch import Collator

V, V_D, K = 60, 32, 4
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": V,
    "draft_vocab_size": V_D,
    "rms_norm_eps": 1e-6,
}
VARIANTS = {
    "3": {},
    "3.1": {"fc_norm": True, "norm_output": True},
    "concat norm": {"norm_before_fc": True, "norm_before_residual": True},
    "two layers": {"num_hidden_layers": 2, "norm_output": True},
    "window": {"sliding_window": 3},
    "qk norm": {"qk_norm": True, "attention_bias": True},
}


def make_target():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double().eval()


def make(target, attn="sdpa", noise=0.3, **variant):
    torch.manual_seed(1)
    drafter = Eagle3DrafterModel(Eagle3DrafterConfig(**{**BASE, **variant})).double()
    drafter.set_attn_implementation(attn)
    assert drafter.config._attn_implementation == attn
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(noise * torch.randn_like(p))
    ids = torch.arange(drafter.config.draft_vocab_size)
    drafter.set_draft_to_target_ids(ids * 2 - ids // 8)
    return drafter.bind(target).eval()


def batch_of(*rows, steps=K, **options):
    """A flat batch of (input_ids, loss_mask)."""
    return Collator(steps, **options)(
        [{"input_ids": np.array(ids), "loss_mask": np.array(mask)} for ids, mask in rows]
    )


def several_rows(seed=0):
    """A short row, one of two turns, one that ends in the user's turn, one with nothing to train."""
    rng = np.random.default_rng(seed)
    masks = [
        [0] * 3 + [1] * 6,
        [0] * 2 + [1] * 5 + [0] * 3 + [1] * 7,
        [0] * 4 + [1] * 4 + [0] * 5,
        [0] * 5 + [1] * 1 + [0],
        [0] + [1] * 12,
    ]
    return [(rng.integers(0, V, len(mask)), mask) for mask in masks]
