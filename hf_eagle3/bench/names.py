"""What the command line can name: kinds of decoding, and shapes of targets. Imports nothing."""

from typing import Any

STOCK, PLAIN, DRAFTED = "generate()", "our loop, no drafting", "our loop, drafting"
STATIC = 'generate(cache_implementation="static")'  # which the host compiles
LOOKUP = 'generate(prompt_lookup_num_tokens, cache_implementation="static")'  # likewise, from Transformers 5.24 on
DFLASH = "D-Flash"
SWEPT = "our loop, {}"  # drafting a shape that --draft-shapes names
CHOSEN = SWEPT.format("shapes chosen by cost")
KINDS = {"stock": STOCK, "static": STATIC, "lookup": LOOKUP, "plain": PLAIN, "drafted": DRAFTED}


def is_ours(kind: str) -> bool:
    """Whether a kind of decoding is our loop's."""
    return kind.startswith("our loop, ")


def is_drafting(kind: str) -> bool:
    """Whether it drafts, too."""
    return is_ours(kind) and kind != PLAIN


RANDOM_DRAFTERS = ("eagle3", "dflash", "dspark")
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
    # Qwen/Qwen3.5-9B's text: three of four layers are gated delta nets. 64 of 256 numbers of a head are rotated.
    "qwen3.5-9b": {
        "model_type": "qwen3_5_text",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    },
    "tiny-hybrid": {
        "model_type": "qwen3_5_text",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
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
