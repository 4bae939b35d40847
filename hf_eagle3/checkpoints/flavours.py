"""The published families of EAGLE-3 checkpoints: how each spells our config fields and tensor names.

A flavour is a row of data. What all of them share is in `measuring.py` (sizes, from tensors), `rope.py` and `layer_ids.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..modeling.weights_eagle3 import StoredTensor


class Published(NamedTuple):
    """A checkpoint as it lies on disk."""

    file: Path  # config.json
    config: Mapping[str, Any]  # keys of `eagle_config` as `eagle_config.KEY`; those of LIFTED tables without the table
    tensors: Mapping[str, StoredTensor]  # by our names
    names: Mapping[str, str]  # our name -> published name
    tables: Mapping[str, str]  # key of `config` -> the LIFTED table it comes from

    def spell(self, key: str) -> str:
        """A key of `config` as it stands in config.json."""
        return f"{self.tables[key]}.{key}" if key in self.tables else key

    @property
    def architectures(self) -> str:
        """All of `architectures` in one lower-case string."""
        return str(self.config.get("architectures")).lower()

    def where(self, name: str) -> str:
        """File and published name of the tensor that is `name` here."""
        return f"{self.tensors[name].file}: {self.names[name]}"

    def has_tensor(self, *endings: str) -> bool:
        """Whether some tensor's name ends so."""
        return any(name.endswith(endings) for name in self.tensors)


@dataclass(frozen=True)
class Flavour:
    """How one family of published checkpoints spells what our config calls by our names."""

    name: str
    matches: Callable[[Published], bool]
    # Published key -> our field. Several keys for one field must not contradict each other.
    config_keys: Mapping[str, str]
    # Our field -> what it means that no key is there for it, where that is not our own default.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Keys that say something of a drafter elsewhere, and are the target's here.
    ignored: frozenset[str] = frozenset()
    # The config is the target's with keys added, so what is not known of it is the target's business.
    is_clone: bool = False
    # Ids in `eagle_config` are boundaries, unless the first is 1; else they count layer outputs.
    nested_ids_are_boundaries: bool = False


# Tables in config.json that hold the drafter's own keys: speculators, and vLLM's nested `model_type: eagle`.
LIFTED = ("transformer_layer_config", "model")

# Published tensor name (regular expression) -> ours. Applied in turn.
WEIGHT_NAMES: Mapping[str, str] = {
    r"^model\.": "",
    r"^midlayer\.(?=\d)": "layers.",
    r"^midlayer\.": "layers.0.",
    r"^aux_norm_low\.": "fc_norm.0.",
    r"^aux_norm_mid\.": "fc_norm.1.",
    r"^aux_norm_high\.": "fc_norm.2.",
}

SAME = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "draft_vocab_size", "target_hidden_size", "max_position_embeddings", "attention_bias", "mlp_bias"),
    *("rms_norm_eps", "hidden_act", "initializer_range", "attention_dropout", "target_model_type"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
LLAMA_KEYS: Mapping[str, str] = {
    **{key: key for key in SAME},
    "bias": "fc_bias",
    "truncated_vocab_size": "draft_vocab_size",  # nebius
}

EAGLE3_KEYS: Mapping[str, str] = {
    **LLAMA_KEYS,
    "intermediate_size_mlp": "intermediate_size",  # of Llama 4
    "num_aux_hidden_states": "num_aux_hidden_states",
    "num_aux_layers": "num_aux_hidden_states",
    "fc_norm": "fc_norm",
    "use_aux_norm": "fc_norm",  # before it was called fc_norm
    "norm_before_fc": "norm_before_fc",
    "norm_before_residual": "norm_before_residual",
    "norm_output": "norm_output",
    **{f"eagle_config.{key}": key for key in ("fc_norm", "norm_before_fc", "norm_output", "use_aux_hidden_state")},
    "eagle_config.use_aux_norm": "fc_norm",
    "eagle_aux_hidden_state_layer_ids": "aux_layer_ids",
    "eagle_config.eagle_aux_hidden_state_layer_ids": "aux_layer_ids",
}
PARALLEL_KEYS: Mapping[str, str] = {
    **EAGLE3_KEYS,
    **dict.fromkeys(("mask_token_id", "pard_token", "ptd_token_id"), "mask_token_id"),
}
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
LATENT_KEYS: Mapping[str, str] = {
    **{key: ours for key, ours in EAGLE3_KEYS.items() if key not in ("num_key_value_heads", "head_dim")},
    **{key: key for key in LATENT_SIZES},
    "qk_rope_head_dim": "head_dim",
}
# What the target has in these places, the drafter has not.
WINDOW_KEYS = frozenset({"sliding_window", "layer_types"})
HEAD_KEYS = frozenset({"num_key_value_heads", "head_dim", "qk_head_dim", "rope_interleave", "attention_bias"})
SOFTCAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
CLONE_KEYS = {"model_type": "target_model_type", "hidden_activation": "hidden_act"}


def is_latent(published: Published) -> bool:
    """Whether the first layer has multi-head latent attention."""
    return "layers.0.self_attn.kv_a_proj_with_mqa.weight" in published.tensors


def is_parallel(published: Published) -> bool:
    """Whether a key or a tensor marks it as P-EAGLE."""
    return (
        "mask_hidden" in published.tensors
        or bool(published.config.get("parallel_drafting"))
        or "peagle" in published.architectures
        or published.config.get("speculators_model_type") == "peagle"
    )


def is_nemo(published: Published) -> bool:
    """Whether every tensor of the drafter's body is under `model.`, and the head is not."""
    if "llamaeagle3draftmodel" in published.architectures:
        return True
    return published.names.get("fc.weight") == "model.fc.weight" and published.names.get("lm_head.weight") == (
        "lm_head.weight"
    )


def is_eagle31(published: Published) -> bool:
    """Whether the drafter has one of the two changes of EAGLE-3.1."""
    flags = (published.config.get("norm_output"), published.config.get("eagle_config.norm_output"))
    return any(flags) or any(name.startswith("fc_norm.") for name in published.tensors)


# The first that matches. A drafter of no known producer that is spelt like SGLang's is read like SGLang's.
FLAVOURS = (
    Flavour(
        name="P-EAGLE, speculators",
        matches=lambda published: published.config.get("speculators_model_type") == "peagle",
        config_keys=PARALLEL_KEYS,
        defaults={"norm_before_residual": False},  # as vLLM reads it
    ),
    Flavour(
        name="speculators",
        matches=lambda published: "speculators_model_type" in published.config,
        config_keys=EAGLE3_KEYS,
        defaults={"norm_before_residual": True},  # as vLLM reads it; the trainer writes the key
    ),
    Flavour(
        name="P-EAGLE, as SpecForge and vLLM write it",
        matches=is_parallel,
        config_keys=PARALLEL_KEYS,
    ),
    Flavour(
        name="NeMo Automodel, MLA",
        matches=lambda published: is_nemo(published) and is_latent(published),
        config_keys={**LATENT_KEYS, **CLONE_KEYS},
        ignored=WINDOW_KEYS | HEAD_KEYS | SOFTCAPS,
        is_clone=True,
    ),
    Flavour(
        name="NeMo Automodel",
        matches=is_nemo,
        config_keys={**EAGLE3_KEYS, **CLONE_KEYS},
        ignored=WINDOW_KEYS | SOFTCAPS,
        is_clone=True,
    ),
    Flavour(
        name="MLA",
        matches=is_latent,
        config_keys=LATENT_KEYS,
        ignored=HEAD_KEYS,
        nested_ids_are_boundaries=True,
    ),
    Flavour(
        name="NVIDIA Model-Optimizer",
        matches=lambda published: (
            any(
                f"eagle_config.{key}" in published.config
                for key in ("next_layer_regular", "use_last_layernorm", "use_mtp_layernorm")
            )
            or any(re.match(r"midlayer\.\d", name) for name in published.names.values())
            or "llamaforcausallmeagle3deep" in published.architectures
        ),
        config_keys=EAGLE3_KEYS,
    ),
    Flavour(
        name="AngelSlim",
        matches=lambda published: "eagle3llamaforcausallm" in published.architectures,
        config_keys=EAGLE3_KEYS,
        ignored=WINDOW_KEYS,
    ),
    Flavour(
        name="TorchSpec",
        matches=lambda published: "_torchspec_version" in published.config,
        config_keys=EAGLE3_KEYS,
    ),
    Flavour(
        name="EAGLE-3.1, as SpecForge and SGLang write it",
        matches=lambda published: "eagle3" in published.architectures and is_eagle31(published),
        config_keys=EAGLE3_KEYS,
    ),
    Flavour(
        name="SpecForge / SGLang",
        matches=lambda published: "eagle3" in published.architectures,
        config_keys=EAGLE3_KEYS,
    ),
    Flavour(
        name="SpecForge / SGLang without its architecture",
        matches=lambda published: bool(published.config.keys() & (EAGLE3_KEYS.keys() - LLAMA_KEYS.keys())),
        config_keys=EAGLE3_KEYS,
    ),
    Flavour(
        name="SafeAILab",
        matches=lambda _: True,
        config_keys=LLAMA_KEYS,
        ignored=WINDOW_KEYS,
    ),
)

# What is refused by name, before anything is read as EAGLE-3. The first that matches.
OTHERS: Mapping[str, Callable[[Published], bool]] = {
    "a vLLM speculators checkpoint of another algorithm, by speculators_model_type": lambda p: (
        p.config.get("speculators_model_type", "eagle3") not in ("eagle3", "peagle")
    ),
    "a DFlash drafter": lambda p: "dflash_config" in p.config or "dflash" in p.architectures,
    "a Medusa drafter": lambda p: any(name.startswith("medusa_heads.") for name in p.tensors),
    "a drafter with Medusa-like parallel heads": lambda p: any(
        n.startswith("parallel_draft_heads.") for n in p.tensors
    ),
    "a P-EAGLE drafter of NeMo Automodel, whose layout is not known": lambda p: is_parallel(p) and is_nemo(p),
    "a P-EAGLE drafter with multi-head latent attention, which no engine knows": lambda p: (
        is_parallel(p) and is_latent(p)
    ),
    "a drafter for Kimi-K3, whose gated attention no engine knows": lambda p: p.has_tensor("self_attn.g_proj.weight"),
    "a multi-token-prediction (MTP, NextN) layer": lambda p: p.has_tensor("eh_proj.weight", "enorm.weight"),
    "quantised, which is not supported: load a drafter in bf16 or fp16": lambda p: (
        p.has_tensor("weight_scale", "weight_packed", "qweight", "qzeros") or is_quantised(p.config)
    ),
}


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether the config asks for a quantised load. NVIDIA writes the key with null inside where nothing is."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(quantization, dict):
        return bool(quantization)
    return quantization.get("quant_algo", quantization.get("quant_method", True)) is not None


# Keys that must be as in every EAGLE-3 drafter, if they are there at all. Anything else is another network.
FIXED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "use_rotary_pos_emb": (True, None),
    "norm_type": ("rms", None),
    "logit_scale": (1, None),
    "residual_multiplier": (1, None),
    "embedding_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "eagle_config.use_last_layernorm": (True, None),
    "eagle_config.use_input_layernorm_in_first_layer": (True, None),
    "eagle_config.use_mtp_layernorm": (False, None),
    "eagle_config.next_layer_regular": (True, None),
    "eagle_config.parallel_draft_step": (1, None),
    "eagle_config.eh_proj_before_attn": (False, None),
    "eagle_config.return_hidden_post_norm": (False, None),
}

# Keys that `convert.py` reads itself.
READ_ELSEWHERE = frozenset(
    {
        *("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types"),
        *("tie_word_embeddings", "quantization_config", "compression_config", "architectures"),
        *("speculators_model_type", "speculators_config", "parallel_drafting"),
    }
)

# Keys that change nothing in a drafter: the host's bookkeeping, and what was left over from a target's config.
IGNORED_KEYS = frozenset(
    {
        # the host
        *(
            "_name_or_path",
            "add_cross_attention",
            "auto_map",
            "chunk_size_feed_forward",
            "cross_attention_hidden_size",
        ),
        *("decoder_start_token_id", "dtype", "finetuning_task", "id2label", "is_decoder", "is_encoder_decoder"),
        *("is_llama_config", "label2id", "model_type", "name_or_path", "num_labels", "output_attentions"),
        *("output_hidden_states", "prefix", "problem_type", "pruned_heads", "return_dict"),
        *("sep_token_id", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class"),
        *("torch_dtype", "torchscript", "transformers_version", "unsloth_version", "use_bfloat16"),
        # generation
        *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
        *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beams"),
        *("num_beam_groups", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty"),
        *("return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p", "use_cache"),
        # training
        *("embd_pdrop", "resid_pdrop", "pretraining_tp", "router_aux_loss_coef", "router_jitter_noise"),
        *("modal_type", "mask_token_id", "num_depths", "down_sample_ratio", "embed_requires_grad"),
        *("speculators_version", "has_no_defaults_at_init", "num_lookahead_tokens", "method"),
        # leftovers of targets: attention that a drafter does not have, experts, images
        *("attention_chunk_size", "cache_implementation", "max_window_layers", "use_sliding_window"),
        *("sliding_window_pattern", "use_qk_norm", "query_pre_attn_scalar", "original_max_position_embeddings"),
        *("initial_context_length", "swiglu_limit", "decoder_sparse_step", "first_k_dense_replace", "mlp_only_layers"),
        *("moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob"),
        *("num_experts", "num_experts_per_tok", "num_local_experts", "num_nextn_predict_layers"),
        *("output_router_logits", "routed_scaling_factor", "shared_expert_intermediate_size", "topk_group"),
        *("aux_loss_alpha", "seq_aux"),
        *("experts_per_token", "moe_topk", "scoring_func", "topk_method", "moe_layer_freq", "ep_size"),
        *("audio_token_id", "image_token_id", "image_token_index", "video_token_id", "vision_config"),
        *("vision_start_token_id", "vision_end_token_id", "vision_token_id", "boi_token_index", "eoi_token_index"),
        *("image_start_token_id", "image_end_token_id", "image_newline_token_id", "use_mrope", "rope_local_base_freq"),
        *("add_classification_head", "attention_head_dim", "class_num", "cla_share_factor", "dense_list", "use_cla"),
        *("hidden_activation", "max_sequence_length", "mask_init_id", "pool_type"),
        *("eod_token_id", "im_start_id", "im_end_id", "im_newline_id", "org_vocab_size", "pad_id", "text_start_id"),
        *("text_end_id", "mm_tokens_per_image", "mrope_section", "default_theta"),
        *("eagle_config.parallel_draft_heads_num_layers",),
    }
)
