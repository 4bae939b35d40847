"""Every causal and image-text family of the installed host as a tiny random model.

A family is a class of the host's Auto mappings with its config. Sizes are shrunk by the names of config fields; where
names do not say enough, `OVERRIDES` does.
"""

import dataclasses
import re
import traceback
from functools import partial
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from conftest import drafter_config, make_prompt
from conftest import randomize as randomize_drafter
from test_decode import BatchOracle, pad
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

NUM_LAYERS, HIDDEN, HEADS, HEAD_DIM, VOCAB, WINDOW = 4, 64, 4, 16, 128, 8
NEW = 20  # tokens to generate
STD = 0.2
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FIRST_SPECIAL = 100  # token ids from here on stand for images and the like
MAPPINGS = {
    "causal": (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING),
    "image-text": (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
}

# Field names of any config, and the tiny value of an integer that is larger.
LAYERS = "num_hidden_layers|n_layers?|num_layers|layers|depth|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks"
SIZES = (
    (rf"{LAYERS}|conf_num_hidden_layers|decoder_num_layers", NUM_LAYERS),
    (r"vocab_size\w*|decoder_vocab_size|unpadded_vocab_size|encoder_hash_byte_group_vocab", VOCAB),
    (r"(swa_|index_)?(num_key_value_heads|num_kv_heads|num_global_key_value_heads|num_query_groups)|linear_num_key_heads", 2),
    (r"mamba_n(um)?_heads|n_mamba_heads", 8),
    (r"\w*num_attention_heads|\w*attention_heads|n_heads?|num_heads|linear_num_(value_)?heads|index_n_heads", HEADS),
    (r"(swa_|global_|index_|linear_|mamba_|attention_)?(key_|value_)?head_dim|d_head|dim_head|mamba_d_head|d_kv|kv_channels|attention_head_size|qk_nope_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"\w*hidden_size|d_model|n_embd|dim_model|emb(edding)?_dim|embed_dim|word_embed_proj_dim|embedding_size|hidden_size_per_layer_input", HIDDEN),
    (r"\w*intermediate_size\w*|\w*ffn_dim|d_ff|dff|dim_ff|d_inner|ffn_hidden_size|mlp_dim|feed_forward_size|expert_ffn_hidden_size", 96),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts|num_local_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group", 1),
    (r"\w*lora_rank|\w*lowrank|laurel_rank|\w*_rank", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|context_length", 512),
    (r"\w*sliding_window\w*|attention_window_size|local_attention|window_size|attention_chunk_size", WINDOW),
    (r"\w*d_state|state_size|ssm_state_size", 16),
    (r"chunk_size|mamba_chunk_size", 8),
)


class Family(NamedTuple):
    """One class of the host with one config class."""

    model_type: str
    kind: str  # the mapping that has it

    @property
    def class_name(self) -> str:
        return MAPPINGS[self.kind][0][self.model_type]


def families() -> Iterator[Family]:
    """Each model type once: as a causal model where it is one."""
    seen = set()
    for kind, (names, _) in MAPPINGS.items():
        for model_type, name in names.items():
            if (model_type, name) not in seen:
                seen.add((model_type, name))
                yield Family(model_type, kind)


def tiny_value(name: str, value: Any) -> Any:
    """What becomes of a config field; None if it stays."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return size if value > size else None
    return None


def field_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config was made with, by the names its class takes."""
    own = vars(config)  # a getter of the config may refuse what differs from layer to layer
    names = [field.name for field in dataclasses.fields(config)]
    return {name: own[name] if name in own else getattr(config, config.attribute_map.get(name, name), None) for name in names}


def tiny_id(name: str, value: Any) -> Any:
    """A token id inside the tiny vocabulary; None if it stays."""
    if re.fullmatch(r"_?(pad|bos|eos|sep|cls|decoder_start)_token_id", name):
        return SPECIAL_IDS.get(name.removeprefix("_"), 3) if value is not None else None
    if isinstance(value, int) and value >= VOCAB and re.fullmatch(r"\w*_(id|index|offset)", name):
        return FIRST_SPECIAL + value % (VOCAB - FIRST_SPECIAL)
    if isinstance(value, (list, tuple)) and value and re.fullmatch(r"\w*_ids", name):
        return [FIRST_SPECIAL + v % (VOCAB - FIRST_SPECIAL) for v in value]
    return None


def tiny_rope(rope: Any) -> Any:
    """Rotary parameters whose sections fit the tiny heads; None if they stay."""
    sections = rope.get("mrope_section") if isinstance(rope, dict) else None
    if sections is None:
        return None
    total = HEAD_DIM // 2 if rope.get("partial_rotary_factor", 1) == 1 else int(HEAD_DIM // 2 * rope["partial_rotary_factor"])
    scaled = [max(total * s // sum(sections), 1) for s in sections]
    return {**rope, "mrope_section": [scaled[0] + total - sum(scaled), *scaled[1:]]}


def shrink(default: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """A config of the same class as `default`, tiny."""
    values = field_values(default)
    names = values.keys()
    fields: dict[str, Any] = {}
    num_layers = next((v for k, v in vars(default).items() if re.fullmatch(LAYERS, k)), None)
    lists = {k: v for k, v in vars(default).items() if k in names and isinstance(v, (list, tuple)) and len(v) == num_layers}
    for name in names:
        value = values[name]
        if (name in overrides and not isinstance(value, PreTrainedConfig)):
            continue
        if isinstance(value, PreTrainedConfig):
            fields[name] = shrink(value, overrides.get(name, {}))
        else:
            tiny = [change(value) for change in (partial(tiny_value, name), partial(tiny_id, name), tiny_rope)]
            fields |= {name: new for new in tiny if new is not None}
    if "is_decoder" in names:
        fields["is_decoder"] = True
    if "head_dim" in names and "head_dim" not in {**fields, **overrides} and values["head_dim"] is None:
        fields["head_dim"] = HEAD_DIM
    if values.get("head_dim") and values["head_dim"] == values.get("qk_rope_head_dim"):
        fields["head_dim"] = fields["qk_rope_head_dim"]
    if "num_key_value_heads" in names and values["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = 2
    if "tie_word_embeddings" in names:
        fields["tie_word_embeddings"] = False  # else a wide embedding makes it repeat the last token
    if "kv_lora_rank" in names and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = HEADS  # keys and values come out of one latent for each head
    fields = {name: value for name, value in fields.items() if name not in overrides or isinstance(value, PreTrainedConfig)}
    if lists and num_layers > NUM_LAYERS:
        kept = pick_layers(list(zip(*lists.values(), strict=True)))
        fields |= {name: [value[i] for i in kept] for name, value in lists.items() if name not in overrides}
    parts = {name for name in fields if isinstance(fields[name], PreTrainedConfig)}
    return type(default)(**fields, **{name: value for name, value in overrides.items() if name not in parts})


def pick_layers(kinds: list) -> list[int]:
    """Places of NUM_LAYERS layers that have each kind if they can."""
    names = list(map(str, kinds))
    first = [names.index(name) for name in dict.fromkeys(names)]
    rest = [i for i in range(len(kinds)) if i not in first]
    return sorted((first + rest)[:NUM_LAYERS])


LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"] * 2
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
VOCABULARY = {"<image>": FIRST_SPECIAL, "<|extra_200|>": FIRST_SPECIAL + 1, "<|image token|>": FIRST_SPECIAL + 2}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "embed_dim": 16, "latent_channels": 16}
SMALL_MLA = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": HEAD_DIM, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": HEAD_DIM + 8}
DOTS = {"num_key_value_heads": HEADS, **{f"swa_{name}": size for name, size in SMALL_MLA.items()}}
SAM = {"downsample_channels": [32, 64], "output_channels": 32}

# What a family needs beyond `SIZES`; parts of a config by their names.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {"audio_config": {"codebook_dim": HIDDEN, "codebook_size": 8}, "vision_config": {"codebook_size": 8, **VQ}, "image_token_offset": 104, "audio_token_offset": 112},
    "chameleon": {"vocabulary_map": VOCABULARY, "vq_config": VQ},
    "cohere_compass": {"text_config": {"layer_types": LOCAL_AND_GLOBAL, "rope_parameters": dict.fromkeys(LOCAL_AND_GLOBAL, MROPE)}},
    "cohere_compass_text": {"layer_types": LOCAL_AND_GLOBAL, "rope_parameters": dict.fromkeys(LOCAL_AND_GLOBAL, MROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_ocr2": {"vision_config": {"sam_config": SAM, "encoder_config": {"num_key_value_heads": 2}}, "text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"] * 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "layer_types": LOCAL_AND_GLOBAL},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": DOTS, "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN}, "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN}},
    "dots3_note_text": DOTS,
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "emu3": {"vocabulary_map": VOCABULARY, "vq_config": VQ},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]}}},
    "florence2": {
        "vision_config": {"depths": [1] * 4, "embed_dim": [8, 16, 32, HIDDEN], "num_heads": [2] * 4, "num_groups": [2] * 4, "projection_dim": HIDDEN}
    },
    "gemma3n_text": {"layer_types": LOCAL_AND_GLOBAL, "num_kv_shared_layers": 2, "intermediate_size": 96, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"deepstack_layer_map": [], "use_spatial_sampling": False, "downsample_rate": "1/2"},
    "hy_v4_vl": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1]}}},
    "inkling_mm_model": {"vision_config": {"patch_size": 4, "num_hidden_layers": 4}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus": {"vq_config": {"projection_dim": HIDDEN, "image_token_embed_dim": HIDDEN, "num_embeddings": VOCAB, "base_channels": 32}, "vision_config": {"projection_dim": HIDDEN}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"vision_config": {"vision_output_dim": HIDDEN, "projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN}},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "muse_spark": {"audio_config": {"hidden_sizes": [8, 16, 32, HIDDEN]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM, "indexer_budget": 16, "indexer_compress_ratio": 4}},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM, "indexer_budget": 16, "indexer_compress_ratio": 4},
    "roc_bert": {"shape_vocab_size": VOCAB, "pronunciation_vocab_size": VOCAB, "shape_embed_dim": HIDDEN, "pronunciation_embed_dim": HIDDEN},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 2},
    "unlimited_ocr": {"vision_config": {"sam_config": SAM}},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
}


def tiny_config(family: Family) -> PreTrainedConfig:
    """The config of a family, tiny."""
    default = CONFIG_MAPPING[family.model_type]()
    return shrink(default, OVERRIDES.get(family.model_type, {}))


def build(family: Family) -> PreTrainedModel:
    """A tiny random model in float32, the same one each time."""
    config = tiny_config(family)
    model_class = MAPPINGS[family.kind][1][type(config)]
    if not isinstance(config, model_class.config_class):  # a part of a larger model
        parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
        config = parts[0] if parts else config  # Llama's class with a config of its own
    torch.manual_seed(0)
    model = model_class(config).eval().float()
    randomize(model)
    generation_config = model.generation_config
    generation_config.eos_token_id, generation_config.pad_token_id, generation_config.do_sample = None, 0, False
    return model


def randomize(model: PreTrainedModel) -> None:
    """Weights wide enough for varied text; no part of a layer is an identity."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.dim() > 1 and not re.search(r"A_log|dt_|conv1d|\.D$", name):
                parameter.normal_(std=STD)
        if head is not None and len(head) > FIRST_SPECIAL:
            head[FIRST_SPECIAL:] = 0  # tokens for images are no text


class Outcome(NamedTuple):
    """What became of a call with a drafter."""

    verdict: str  # same, tie, wrong, refused, raw; host: plain decoding itself fails
    loop: str
    detail: str


def make_oracle(target: PreTrainedModel, plain: Tensor, batch: dict[str, Tensor]) -> BatchOracle:
    """A drafter that knows the text `plain` [B, S] and errs at some positions."""
    text = target.config.get_text_config(decoder=True)
    n = text.num_hidden_layers
    vocab = target.get_output_embeddings().weight.shape[0]
    T = batch["input_ids"].shape[1]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    texts = [
        [*ids[m.bool()].tolist(), *row[T:].tolist()]
        for ids, m, row in zip(batch["input_ids"], mask, plain, strict=True)
    ]
    torch.manual_seed(2)
    config = drafter_config(
        hidden_size=text.hidden_size, vocab_size=vocab, draft_vocab_size=vocab, aux_layer_ids=sorted({1, n // 2, n}),
        num_aux_hidden_states=len({1, n // 2, n}), target_hidden_size=text.hidden_size,
    )
    drafter = randomize_drafter(BatchOracle(config)).bind(target).tell(texts, wrong_share=0.4)
    drafter.generation_config.decode_loop = None
    return drafter.to(target.device, target.dtype)


def decode(target: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> Outcome:
    """A greedy call with a drafter beside one without."""
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, **options}
    try:
        plain = target.generate(**batch, output_logits=True, **options)
    except Exception as error:
        return Outcome("host", "", where(error))
    if plain.sequences.shape[1] <= batch["input_ids"].shape[1]:
        return Outcome("host", "", "no new tokens")
    try:
        oracle = make_oracle(target, plain.sequences, batch)
        out = target.generate(**batch, assistant_model=oracle, **options)
    except Exception as error:
        return Outcome(*refusal_or_raw(error))
    loop, why = out.speculation.loop, f"{out.speculation.why} | {out.speculation.acceptance_length:.2f} {out.speculation.graphs}"
    T = batch["input_ids"].shape[1]
    distinct = min(len(set(row.tolist())) for row in plain.sequences[:, T:])
    if distinct < 6:
        why += f" | only {distinct} distinct tokens"
    if out.sequences.shape != plain.sequences.shape:
        return Outcome("wrong", loop, f"{tuple(out.sequences.shape)} {tuple(plain.sequences.shape)} {why}")
    gaps, first = [], []
    for b in range(len(out.sequences)):
        differs = (out.sequences[b] != plain.sequences[b]).nonzero()
        if len(differs):
            t = int(differs[0]) - T
            logits = plain.logits[t][b].float()
            gaps.append(float(logits.max() - logits[out.sequences[b, T + t]]) / float(logits.abs().max()))
            first.append((b, t))
    if not gaps:
        return Outcome("same", loop, why)
    return Outcome("tie" if max(gaps) < 1e-5 else "wrong", loop, f"first differences (row, token) {first}, gaps {[f'{g:.2g}' for g in gaps]} of the largest | {why}")


def where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "hf_eagle3" in f.filename]
    place = "/".join(frames[-1].filename.split("/")[-2:])
    via = f" via {ours[-1].filename.split('/')[-1]}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}: {str(error)[:400]} @{place}:{frames[-1].lineno}{via}"


def refusal_or_raw(error: BaseException) -> tuple[str, str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename
    if isinstance(error, (ValueError, NotImplementedError)) and ("hf_eagle3" in last or "/modeling/" in last):
        return "refused", "ours", str(error)
    if isinstance(error, (ValueError, NotImplementedError)) and "/generation/" in last:
        return "refused", "host", str(error)
    return "raw", "", where(error)
