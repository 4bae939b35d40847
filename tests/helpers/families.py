"""Every causal and image-text family of the installed host as a tiny random model, and what a drafter makes of it.

A family is a class of the host's Auto mappings with one config class. Sizes are shrunk by the names of config fields;
where names do not say enough, `OVERRIDES` does. `PYTHONPATH=tests python -m helpers.families RESULTS.jsonl` prints
the table of a sweep that `test_families.py` wrote; `docs/targets.md` behind it puts the table into that page.
"""

import dataclasses
import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from helpers.models import drafter_config, make_prompt
from helpers.models import randomize as randomize_drafter
from helpers.published import KNOWN_DRAFTERS
from hf_eagle3.bench.equality import Text, measure_gap
from hf_eagle3.decoding.captured import why_kernels_do_not
from hf_eagle3.modeling import Eagle3DrafterModel, Eagle3DrafterOutput

NUM_LAYERS, HIDDEN, HEADS, HEAD_DIM, VOCAB, WINDOW = 4, 64, 4, 16, 128, 8
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FIRST_SPECIAL = 100  # token ids from here on stand for images and the like
MAPPINGS = {
    "causal": (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING),
    "image-text": (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
}


class Family(NamedTuple):
    """One class of the host with one config class."""

    model_type: str
    kind: str  # the mapping that has it
    variant: str = ""  # a key of `VARIANTS`

    @property
    def class_name(self) -> str:
        return MAPPINGS[self.kind][0][self.model_type]

    @property
    def name(self) -> str:
        return f"{self.model_type} ({self.variant})" if self.variant else self.model_type

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"


def families() -> list[Family]:
    """Each model type of each mapping, but not one class twice, and the variants that this host has."""
    found: dict[tuple[str, str], Family] = {}
    for kind, (names, _) in MAPPINGS.items():
        for model_type, class_name in names.items():
            found.setdefault((model_type, class_name), Family(model_type, kind))
    variants = [Family(model_type, kind, variant) for model_type, kind, variant in VARIANTS]
    return [*found.values(), *(f for f in variants if f.model_type in MAPPINGS[f.kind][0])]


# ---- tiny configs ----

LAYERS = "num_hidden_layers|n_layers?|num_layers|layers|depth|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks"
# Names of config fields, and the tiny value of an integer that is larger; the first that fits.
SIZES = (
    (rf"{LAYERS}|conf_num_hidden_layers|decoder_num_layers", NUM_LAYERS),
    (r"vocab_size\w*|decoder_vocab_size|unpadded_vocab_size|encoder_hash_byte_group_vocab", VOCAB),
    (r"(swa_|index_)?num_key_value_heads|num_kv_heads|num_global_key_value_heads|num_query_groups", 2),
    (r"linear_num_key_heads", 2),
    (r"mamba_n(um)?_heads|n_mamba_heads", 8),
    (r"index_n_heads", 16),  # with few, many scores are zero, and which of those are chosen is chance
    (r"index_topk", 8),
    (r"index_kpool", 4),
    (r"\w*attention_heads|n_heads?|num_heads|linear_num_(value_)?heads", HEADS),
    (r"(swa_|global_|index_|linear_|mamba_|attention_)?(key_|value_)?head_dim|mamba_d_head|d_kv", HEAD_DIM),
    (r"d_head|dim_head|kv_channels|attention_head_size|qk_nope_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"\w*hidden_size|d_model|n_embd|dim_model|emb(edding)?_dim|embed_dim|word_embed_proj_dim|embedding_size", HIDDEN),
    (r"hidden_size_per_layer_input", HIDDEN),
    (r"\w*intermediate_size\w*|\w*ffn_dim|d_ff|dff|dim_ff|d_inner|ffn_hidden_size|mlp_dim|feed_forward_size", 96),
    (r"expert_ffn_hidden_size", 96),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group", 1),
    (r"\w*lora_rank|\w*lowrank|laurel_rank|\w*_rank", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|context_length", 512),
    (r"\w*sliding_window\w*|attention_window_size|local_attention|window_size|attention_chunk_size", WINDOW),
    (r"\w*d_state|state_size|ssm_state_size", 16),
    (r"chunk_size|mamba_chunk_size", 8),
)
# Tied to a wide embedding, a head repeats the last token.
EVERYWHERE = {"is_decoder": True, "tie_word_embeddings": False}
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"] * 2
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
ROPES = dict.fromkeys(LOCAL_AND_GLOBAL, MROPE)
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
SMALL_MLA = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": HEAD_DIM + 8,
}
DOTS = {"num_key_value_heads": HEADS, **{f"swa_{name}": size for name, size in SMALL_MLA.items()}}
ADAPTER = {"adapter_out_dim": HIDDEN}
SAM = {"downsample_channels": [32, 64], "output_channels": 32}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "embed_dim": 16, "latent_channels": 16}
VOCABULARY = {"<image>": FIRST_SPECIAL, "<|extra_200|>": FIRST_SPECIAL + 1, "<|image token|>": FIRST_SPECIAL + 2}

# What a family needs beyond `SIZES`; parts of a config by their names.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config": {"codebook_dim": HIDDEN, "codebook_size": 8},
        "vision_config": {"codebook_size": 8, **VQ},
        "image_token_offset": 104,
        "audio_token_offset": 112,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": NUM_LAYERS},
    "chameleon": {"vocabulary_map": VOCABULARY, "vq_config": VQ},
    "cohere_compass": {
        "text_config": {"layer_types": LOCAL_AND_GLOBAL, "rope_parameters": dict.fromkeys(LOCAL_AND_GLOBAL, MROPE)}
    },
    "cohere_compass_text": {
        "layer_types": LOCAL_AND_GLOBAL,
        "rope_parameters": dict.fromkeys(LOCAL_AND_GLOBAL, MROPE),
    },
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0, "kv_n_heads": 2}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_ocr2": {
        "vision_config": {"sam_config": SAM, "encoder_config": {"num_key_value_heads": 2}},
        "text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"] * 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {
        "canvas_length": 16,
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "layer_types": LOCAL_AND_GLOBAL},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": DOTS,
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": DOTS,
    "emu3": {"vocabulary_map": VOCABULARY, "vq_config": VQ},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]}}},
    "florence2": {
        "vision_config": {
            "depths": [1] * 4,
            "embed_dim": [8, 16, 32, HIDDEN],
            "num_heads": [2] * 4,
            "num_groups": [2] * 4,
            "projection_dim": HIDDEN,
        }
    },
    "gemma3n_text": {
        "layer_types": LOCAL_AND_GLOBAL,
        "num_kv_shared_layers": 2,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "glm46v": {"text_config": {"rope_parameters": MROPE}},
    "glm4v": {"text_config": {"rope_parameters": MROPE}},
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}
    },
    "glm_ocr": {"text_config": {"rope_parameters": MROPE}},
    "glmga": {"text_config": {"rope_parameters": MROPE}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"deepstack_layer_map": [], "use_spatial_sampling": False, "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [2, 2, 2, 2]}}},
    "hy_v4_vl": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1]}}},
    "inkling_mm_model": {"vision_config": {"patch_size": 4, "num_hidden_layers": 4}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus": {
        "vq_config": {
            "projection_dim": HIDDEN,
            "image_token_embed_dim": HIDDEN,
            "num_embeddings": VOCAB,
            "base_channels": 32,
        },
        "vision_config": {"projection_dim": HIDDEN},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {
        "vision_config": {"vision_output_dim": HIDDEN, "projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN}
    },
    # As the published ones, it has text behind the last layer that looks at images.
    "mllama": {"cross_attention_layers": [1], "text_config": {"cross_attention_layers": [1]}},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "muse_spark": {"audio_config": {"hidden_sizes": [8, 16, 32, HIDDEN]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 103, "text_config": {"rope_parameters": MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 103, "text_config": {"rope_parameters": MROPE}},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 2},
    "roc_bert": {
        "shape_vocab_size": VOCAB,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": HIDDEN,
        "pronunciation_embed_dim": HIDDEN,
    },
    "step3p7": {"text_config": {"sliding_window": WINDOW}},
    "unlimited_ocr": {"vision_config": {"sam_config": SAM}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HIDDEN // HEADS,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * (HEAD_DIM // 2),
    "long_factor": [2.0 + i for i in range(HEAD_DIM // 2)],
    "original_max_position_embeddings": 32,
    "factor": 16.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
# Configs of a family that decode in another way than its default.
VARIANTS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("minimax_m3_vl_text", "causal", "sparse"): {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 3,
        "index_n_heads": 2,
        "index_head_dim": HEAD_DIM,
    },
    # What loading an encoder as a causal model gives.
    **{
        (encoder, "causal", "is_decoder=False"): {"is_decoder": False}
        for encoder in ("big_bird", "megatron-bert", "roformer")
    },
    ("falcon", "causal", "alibi"): {"alibi": True},
    ("gemma4_text", "causal", "shared keys"): {"layer_types": LOCAL_AND_GLOBAL, "num_kv_shared_layers": 2},
    ("llama", "causal", "dynamic NTK"): {"rope_parameters": DYNAMIC, "max_position_embeddings": 20},
    ("mpt", "causal", "use_cache=True"): {"use_cache": True},
    ("paligemma", "image-text", "Gemma 2"): {"text_config": "gemma2"},
    ("phi3", "causal", "longrope"): {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
}


def tiny_size(name: str, value: Any) -> Any:
    """A size in place of a larger one; None if it stays."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
    return size if value > size else None


def tiny_id(name: str, value: Any) -> Any:
    """A token id inside the tiny vocabulary; None if it stays."""
    if re.fullmatch(r"_?(pad|bos|eos|sep|cls|decoder_start)_token_id", name):
        return SPECIAL_IDS.get(name.removeprefix("_"), 3) if value is not None else None
    if isinstance(value, int) and value >= VOCAB and re.fullmatch(r"\w*_(id|index|offset)", name):
        return FIRST_SPECIAL + value % (VOCAB - FIRST_SPECIAL)
    if isinstance(value, (list, tuple)) and value and re.fullmatch(r"\w*_ids", name):
        return [FIRST_SPECIAL + v % (VOCAB - FIRST_SPECIAL) for v in value]
    return None


def tiny_rope(_name: str, value: Any) -> Any:
    """Rotary parameters whose sections fit the tiny heads; None if they stay."""
    sections = value.get("mrope_section") if isinstance(value, dict) else None
    if sections is None:
        return None
    total = int(HEAD_DIM // 2 * value.get("partial_rotary_factor", 1))
    scaled = [max(total * s // sum(sections), 1) for s in sections]
    return {**value, "mrope_section": [scaled[0] + total - sum(scaled), *scaled[1:]]}


def tiny_layers(values: dict[str, Any]) -> dict[str, list]:
    """Lists with an entry a layer, cut to NUM_LAYERS layers that have each kind if so many can."""
    num_layers = next((value for name, value in values.items() if re.fullmatch(LAYERS, name)), None)
    lists = {name: v for name, v in values.items() if isinstance(v, (list, tuple)) and len(v) == num_layers}
    if not lists or num_layers <= NUM_LAYERS:
        return {}
    kinds = list(map(str, zip(*lists.values(), strict=True)))
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    rest = [i for i in range(num_layers) if i not in first]
    kept = sorted((first + rest)[:NUM_LAYERS])
    return {name: [value[i] for i in kept] for name, value in lists.items()}


def tiny_heads(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Sizes of heads that depend on others."""
    heads = {}
    if "head_dim" in values and values["head_dim"] is None:
        heads["head_dim"] = HEAD_DIM
    elif values.get("head_dim") and values["head_dim"] == values.get("qk_rope_head_dim"):
        heads["head_dim"] = fields["qk_rope_head_dim"]
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        heads["num_key_value_heads"] = 2
    if "kv_lora_rank" in values and "num_key_value_heads" in {**fields, **heads}:
        heads["num_key_value_heads"] = HEADS  # keys and values come out of one latent for each head
    return heads


def field_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config was made with, by the names its class takes."""
    own = vars(config)  # getters may refuse what differs from layer to layer
    return {f.name: own.get(config.attribute_map.get(f.name, f.name)) for f in dataclasses.fields(config)}


def shrink(default: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """A config of the same class as `default`, tiny."""
    values, usual = field_values(default), field_values(type(default)())
    parts = {name: value for name, value in values.items() if isinstance(value, PreTrainedConfig)}
    fields: dict[str, Any] = {}
    for name in values.keys() - parts.keys():
        value = values[name]
        tiny = [tiny(name, value) for tiny in (tiny_size, tiny_id, tiny_rope)]
        # A part's default may be another in the whole than by itself.
        kept = value if isinstance(value, (bool, int, float, str)) and value != usual[name] else None
        fields[name] = next((new for new in (*tiny, kept) if new is not None), None)
    fields = {name: value for name, value in fields.items() if value is not None}
    fields |= {**tiny_heads(values, fields), **tiny_layers(values)}
    fields |= {name: value for name, value in EVERYWHERE.items() if name in values}
    fields |= {name: value for name, value in overrides.items() if name not in parts}
    return type(default)(**fields, **{name: shrink(part, overrides.get(name, {})) for name, part in parts.items()})


# ---- tiny models ----

STD = 0.5  # of weights: wide enough for varied text
# Layers that end in a norm repeat one token unless they are narrow, others unless they are wide.
STD_OF = {
    **dict.fromkeys(
        (
            *("bart", "bert-generation", "bigbird_pegasus", "blenderbot-small", "bloom", "camembert"),
            *("ctrl", "data2vec-text", "mvp", "nanochat", "plbart", "roberta", "trocr", "xlm-roberta", "xmod"),
            *("kosmos-2.5", "roc_bert"),
        ),
        0.05,
    ),
    **dict.fromkeys(("bert", "big_bird", "ernie", "rembert", "marian"), 0.1),
    **dict.fromkeys(("gptj", "xglm"), 0.3),
    **dict.fromkeys(
        ("apertus", "apertus1p5_text", "electra", "gpt2", "gpt-sw3", "jais2", "starcoder2", "roformer"), 1.0
    ),
}


def tiny_config(family: Family, **fields: Any) -> PreTrainedConfig:
    """The config of a family, tiny, with `fields` of one's own."""
    parts = VARIANTS.get((family.model_type, family.kind, family.variant), {})
    overrides = {**OVERRIDES.get(family.model_type, {}), **parts, **fields}
    inner = {
        name: CONFIG_MAPPING[part]()
        for name, part in overrides.items()
        if name == "text_config" and isinstance(part, str)
    }
    default = CONFIG_MAPPING[family.model_type](**inner)
    return shrink(default, {name: part for name, part in overrides.items() if name not in inner})


def build(family: Family, **fields: Any) -> PreTrainedModel:
    """A tiny random model in float32, the same one each time, with `fields` of the config of one's own."""
    config = tiny_config(family, **fields)
    model_class = MAPPINGS[family.kind][1][type(config)]
    if not isinstance(config, model_class.config_class):  # a part of a larger model
        parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
        config = parts[0] if parts else config  # Llama's class with a config of its own
    torch.manual_seed(0)
    model = model_class(config).eval().float()
    randomize(model, STD_OF.get(family.model_type, STD))
    generation_config = model.generation_config
    generation_config.eos_token_id, generation_config.pad_token_id, generation_config.do_sample = None, 0, False
    return model


def randomize(model: PreTrainedModel, std: float) -> None:
    """Weights wide enough for varied text; no part of a layer is an identity."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.dim() > 1 and not re.search(r"A_log|dt_|conv1d|\.D$", name):
                parameter.normal_(std=std)
        if head is not None and len(head) > FIRST_SPECIAL:
            head[FIRST_SPECIAL:] = 0  # tokens for images are no text


# ---- what a drafter makes of it ----

NEW = 12  # tokens to generate
# Lengths of prompts, padded on the left. A single row has no attention mask.
CALLS = {"one row": (24,), "another length": (5,), "three rows": (9, 4, 13)}
FEW_TOKENS = 3  # distinct ones in a text that says little about what was decoded
# Gaps between logits, as a share of the largest, that float32 does not resolve over a few layers.
FLOAT32_TIE = 1e-4
PASSES = ("same", "tie", "alone", "refused", "ignored")


def cast(model: PreTrainedModel, device: str | torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model on a device and in a dtype, but for rotary frequencies, which loading leaves in float32."""
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    model.to(device, dtype)
    for name, buffer in model.named_buffers():
        if name in frequencies:
            buffer.data = frequencies[name].to(device)
    return model


class Outcome(NamedTuple):
    """What became of one call with a drafter."""

    # same, tie, alone (rows of a batch as by themselves, where plain decoding mixes them), refused; wrong, raw, ignored;
    # untried where there is no plain text to compare with.
    verdict: str
    loop: str = ""  # which loop ran, or who refused
    why: str = ""  # the reason for the loop, the words of a refusal, or what went wrong
    graphs: str = ""  # how rounds ran on a GPU, or on a CPU how they would
    num_distinct: int = 0  # tokens in the least varied plain text
    acceptance_length: float = 0.0


class Oracle(Eagle3DrafterModel):
    """Drafts what follows a token at its position in the texts it was told, and at some places of each row something else.

    Tables of tensors, so that its rounds can be captured.
    """

    def tell(self, texts: list[list[int]], *, wrong_share: float = 0.4) -> "Oracle":
        follow = torch.zeros(512, self.config.vocab_size, dtype=torch.long)
        for text in texts:
            follow[torch.arange(len(text) - 1), torch.tensor(text[:-1])] = torch.tensor(text[1:])
        is_wrong = torch.rand(512, generator=torch.Generator().manual_seed(7)) < wrong_share
        self.register_buffer("follow", follow, persistent=False)
        self.register_buffer("is_wrong", is_wrong.long(), persistent=False)
        return self

    def forward(self, input_ids, *args, position_ids=None, logits_to_keep=0, **kwargs):
        out = super().forward(input_ids, *args, position_ids=position_ids, logits_to_keep=logits_to_keep, **kwargs)
        if kwargs.get("writes_only"):
            return out
        position_ids = position_ids.expand_as(input_ids)
        if isinstance(logits_to_keep, Tensor):
            input_ids, position_ids = input_ids.gather(1, logits_to_keep), position_ids.gather(1, logits_to_keep)
        n = out.logits.shape[1]
        ids, positions = input_ids[:, -n:], (position_ids[:, -n:] + 1).clamp(max=511)  # [B, n]
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        is_wrong = self.is_wrong[(positions + 37 * rows) % 512]
        token = (self.follow[positions, ids] + is_wrong) % self.config.vocab_size
        logits = torch.zeros_like(out.logits).scatter(-1, token[..., None], 5.0)
        return Eagle3DrafterOutput(logits, out.feedback, out.past_key_values)


def make_oracle(
    target: PreTrainedModel, plain: Tensor, batch: dict[str, Tensor], *, wrong_share: float = 0.4
) -> Oracle:
    """An oracle of the rows of `plain` [B, S], bound to `target`."""
    text_config = target.config.get_text_config(decoder=True)
    head = target.get_output_embeddings()
    vocab_size = text_config.vocab_size if head is None else len(head.weight)
    T = batch["input_ids"].shape[1]
    texts = [[*prompt, *row[T:].tolist()] for prompt, row in zip(prompts_of(batch), plain, strict=True)]
    n = text_config.num_hidden_layers
    aux_layer_ids = sorted({1, n // 2, n})
    torch.manual_seed(2)
    config = drafter_config(
        hidden_size=text_config.hidden_size,
        target_hidden_size=text_config.hidden_size,
        vocab_size=vocab_size,
        draft_vocab_size=vocab_size,
        aux_layer_ids=aux_layer_ids,
        num_aux_hidden_states=len(aux_layer_ids),
    )
    oracle = randomize_drafter(Oracle(config)).bind(target).tell(texts, wrong_share=wrong_share)
    return cast(oracle, target.device, target.dtype)


def prompts_of(batch: dict[str, Tensor]) -> list[list[int]]:
    """The rows of a batch without pads."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def make_batch(lengths: tuple[int, ...], device: str | torch.device) -> dict[str, Tensor]:
    """Random prompts, padded on the left."""
    T = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(make_prompt(n), (T - n, 0)) for n in lengths]).to(device)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()} if len(lengths) > 1 else {"input_ids": ids}


def decode(target: PreTrainedModel, batch: dict[str, Tensor]) -> Outcome:
    """A greedy call with a drafter beside one without. Any exception becomes an outcome: that is what is looked for."""
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True}
    T = batch["input_ids"].shape[1]
    try:
        plain = target.generate(**batch, output_logits=True, **options)
    except Exception as error:  # noqa: BLE001
        return Outcome("untried", why=f"generate() of text alone fails without a drafter: {describe(error)}")
    if target.config.is_encoder_decoder or plain.sequences.shape[1] <= T:
        return Outcome("untried", why="encoder and decoder")
    try:
        oracle = make_oracle(target, plain.sequences, batch)
        out = target.generate(**batch, assistant_model=oracle, **options)
    except Exception as error:  # noqa: BLE001
        return refusal_or_raw(error)
    if getattr(out, "speculation", None) is None:
        return Outcome("ignored", why=f"{type(target).__name__}.generate never looks at the drafter")
    num_distinct = min(len(set(row.tolist())) for row in plain.sequences[:, T:])
    told = out.speculation
    graphs = told.graphs if target.device.type == "cuda" else expect_graphs(target, told.loop)
    outcome = Outcome("same", told.loop, told.why, graphs, num_distinct, told.acceptance_length)
    differences = list(first_differences(plain.sequences, out.sequences))
    if not differences:
        return outcome
    where = ", ".join(f"row {b} at new token {t - T}" for b, t in differences)
    outcome = outcome._replace(why=f"{told.why}; texts part: {where}")
    if out.sequences.shape != plain.sequences.shape:
        return outcome._replace(verdict="wrong")
    rows = [(b, prompts_of(batch)[b], out.sequences[b, T:], plain.sequences[b, T:]) for b, _ in differences]
    if all(is_near_tie(target, *texts, [logits[b] for logits in plain.logits]) for b, *texts in rows):
        return outcome._replace(verdict="tie")
    is_alone = all(torch.equal(ours, decode_alone(target, prompt)) for _, prompt, ours, _ in rows)
    return outcome._replace(verdict="alone" if is_alone else "wrong")


def expect_graphs(target: PreTrainedModel, loop: str) -> str:
    """How rounds of a target would run on a GPU, as far as the code knows without one."""
    if loop != "own decode loop":
        return ""
    reason = why_kernels_do_not(target)
    return "captured" if reason is None else f"eager: {reason}"


def decode_alone(target: PreTrainedModel, prompt: list[int], num_new: int = NEW) -> Tensor:
    """The new tokens [n] after a row that is in no batch."""
    ids = torch.tensor([prompt], device=target.device)
    return target.generate(ids, max_new_tokens=num_new)[0, len(prompt) :]


def first_differences(plain: Tensor, ours: Tensor) -> Iterable[tuple[int, int]]:
    """Row and column where texts [B, S] and [B, S'] first differ, or the shorter ends."""
    S = min(plain.shape[1], ours.shape[1])
    for b, differs in enumerate(plain[:, :S] != ours[:, :S]):
        if differs.any() or plain.shape != ours.shape:
            yield b, int(differs.long().argmax()) if differs.any() else S


def is_near_tie(
    target: PreTrainedModel, prompt: list[int], ours: Tensor, theirs: Tensor, logits: list[Tensor]
) -> bool:
    """Whether rounding explains where two texts [n] first differ; `logits` are n of [V], plain decoding's."""
    t = int((ours != theirs).long().argmax())
    if target.dtype == torch.float32:
        gap = logits[t].max() - logits[t][ours[t]]
        return bool(gap <= FLOAT32_TIE * logits[t].abs().max())
    text = Text("the text", torch.tensor(prompt, device=target.device), theirs.tolist(), ours.tolist())
    gap, budget = measure_gap(target, text, t)
    return gap <= budget


def describe(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error).strip()[:300]} ({Path(last.filename).name}:{last.lineno})"


def refusal_or_raw(error: Exception) -> Outcome:
    """A refusal is a ValueError of ours or of the host's generation, before a forward ran into something."""
    frames = traceback.extract_tb(error.__traceback__)
    in_forward = any(frame.name == "forward" for frame in frames)
    is_ours, is_hosts = "eagle3" in frames[-1].filename, "/transformers/generation/" in frames[-1].filename
    if isinstance(error, ValueError) and not in_forward and (is_ours or is_hosts):
        return Outcome("refused", "hf-eagle3" if is_ours else "the host", str(error))
    ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "hf_eagle3" in frame.filename]
    return Outcome("raw", why=f"{describe(error)}, from {ours[-1] if ours else 'the host'}")


def sweep(
    family: Family, *, device: str = "cpu", dtype: torch.dtype = torch.float32, calls=CALLS
) -> dict[str, Outcome]:
    """The outcome of each call, by its name."""
    try:
        target = build(family)
    except Exception as error:  # noqa: BLE001  a package that is not there, or sizes that are not known here
        return dict.fromkeys(calls, Outcome("untried", why=f"not built: {describe(error)}"))
    cast(target, device, dtype)
    return {call: decode(target, make_batch(lengths, device)) for call, lengths in calls.items()}


# ---- tables ----

MARKS = "<!-- table: begin -->\n", "<!-- table: end -->\n"
HEADER = "| family | class | one row | three rows | on a GPU | public drafters |\n|---|---|---|---|---|---|\n"
LOOPS = {
    "own decode loop": "our loop",
    "host assisted decoding": "host's loop",
    "hf-eagle3": "refused",
    "the host": "refused by the host",
}


def record(path: Path, family: Family, outcomes: dict[str, Outcome], **further: str) -> None:
    """Append a line to the results of a sweep; several processes may."""
    line = {"family": family.name, "class": family.class_name, "kind": family.kind, **further}
    line |= {"transformers": transformers.__version__, "torch": torch.__version__}
    line["calls"] = {call: outcome._asdict() for call, outcome in outcomes.items()}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def say(outcome: Outcome, class_name: str) -> str:
    """An outcome in a few words, without the name of the class."""
    parts = [LOOPS.get(outcome.loop, "")]
    if outcome.verdict == "alone":
        parts.append("each row as by itself")
    elif outcome.verdict not in ("same", "refused"):
        parts.insert(0, outcome.verdict)
    if outcome.loop != "own decode loop" or outcome.verdict == "wrong":
        # The reason, without the advice that follows it.
        why = re.sub(rf"\b{class_name}\b", "it", outcome.why.replace("\n", " ").replace("|", "/"))
        why = re.split(r", got a batch|: (?=call |leave )|\. (?=Call|Leave)|, or assistant_model", why)[0]
        parts.append(why.replace("An EAGLE-3 drafter can assist only one row at a time here", "one row at a time"))
    if 0 < outcome.num_distinct < FEW_TOKENS:
        parts.append("text repeats itself")
    return "; ".join(filter(None, parts))


def row_of(name: str, class_name: str, outcomes: dict[str, Outcome]) -> str:
    """A line of the table."""
    *single, batch = (say(outcome, class_name) for outcome in outcomes.values())
    graphs = dict.fromkeys(re.sub(rf"\b{class_name}\b", "it", o.graphs) for o in outcomes.values() if o.graphs)
    drafters = ", ".join(f"`{name}`" for name in KNOWN_DRAFTERS.get(name, ()))
    cells = (name, f"`{class_name}`", " / ".join(dict.fromkeys(single)), batch, " / ".join(graphs), drafters)
    return f"| {' | '.join(cells)} |"


def table(lines: list[dict[str, Any]]) -> str:
    """The results of a sweep, counted and one by one."""
    calls = {(line["family"], line["class"]): {c: Outcome(**o) for c, o in line["calls"].items()} for line in lines}
    counts = Counter(
        (LOOPS.get(o.loop, o.verdict) if o.verdict in PASSES else o.verdict, call)
        for outcomes in calls.values()
        for call, o in outcomes.items()
        if call != "another length"
    )
    count = {
        call: ", ".join(f"{n} {what}" for (what, c), n in counts.most_common() if c == call) for _, call in counts
    }
    rows = sorted(row_of(*family, outcomes) for family, outcomes in calls.items())
    versions = f"Transformers {lines[0]['transformers']}, torch {lines[0]['torch']}"
    device = "".join(f", {lines[0][key]}" for key in ("device", "dtype") if key in lines[0])
    told = "; ".join(f"{call}: {numbers}" for call, numbers in count.items())
    return (
        f"{versions}{device}. {len(rows)} families. {told[:1].upper()}{told[1:]}.\n\n{HEADER}" + "\n".join(rows) + "\n"
    )


def main(results: str, page: str | None = None) -> None:
    """Print the tables of `results`, one a dtype, or put that of a sweep on a CPU into `page`."""
    lines = [json.loads(line) for line in Path(results).read_text().splitlines()]
    by_dtype = [
        [line for line in lines if line.get("dtype") == d] for d in dict.fromkeys(x.get("dtype") for x in lines)
    ]
    if page is None:
        print("\n".join(map(table, by_dtype)))  # noqa: T201
        return
    before, _, rest = Path(page).read_text().partition(MARKS[0])
    Path(page).write_text(f"{before}{MARKS[0]}{table(by_dtype[0])}{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
