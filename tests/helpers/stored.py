"""Tiny targets and rows for stored hidden states."""

import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_eagle3.training.step.batch import Collator

V, EOS, STEPS = 64, 1, 3
TINY = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "initializer_range": 0.3,
}
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 5.0, "tie_word_embeddings": False}
TARGETS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)),
    "soft cap": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**TINY, **GEMMA)),
    "factor": lambda: GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=4.0)),
}


def make_target(family="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return TARGETS[family]().to(dtype).eval().requires_grad_(False)


def make_rows(count=12, seed=0):
    """Conversations of one to three turns, ragged; some end with the user, some start with the answer."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        mask = []
        for turn in range(1 + i % 3):
            mask += [0] * (0 if i == 4 and turn == 0 else int(rng.integers(1, 6))) + [1] * int(rng.integers(2, 9))
        mask += [0] * (7 * (i % 4 == 3))
        rows.append({"input_ids": rng.integers(2, V, len(mask)).tolist(), "loss_mask": mask})
    return rows


ROWS = make_rows()


def batch_of(dataset, indices, steps=STEPS, **options):
    return Collator(steps, **options)([dataset[i] for i in indices])
