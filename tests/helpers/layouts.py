"""Checkpoints of every published layout, written by hand."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

H, Ht, I, V, V_d, A = 16, 24, 40, 50, 20, 4
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
USED = torch.randperm(V, generator=torch.Generator().manual_seed(5))[:V_d].sort().values
Weights = dict[str, Tensor]


def make_weights(*, num_states: int = 3, num_layers: int = 1, target_size: int = H, vocab: int = V_d) -> Weights:
    """Random weights in SpecForge's spelling, bfloat16, with both vocabulary tables."""
    generator = torch.Generator().manual_seed(11)

    def tensor(*shape: int) -> Tensor:
        return (0.4 * torch.randn(*shape, generator=generator) + (len(shape) == 1)).to(torch.bfloat16)

    weights = {"fc.weight": tensor(H, num_states * target_size)}
    for i in range(num_layers):
        name, width = (f"layers.{i}" if i or num_layers > 1 else "midlayer"), (H if i else 2 * H)
        weights |= {
            f"{name}.self_attn.q_proj.weight": tensor(HEADS * HEAD_DIM, width),
            f"{name}.self_attn.k_proj.weight": tensor(KV_HEADS * HEAD_DIM, width),
            f"{name}.self_attn.v_proj.weight": tensor(KV_HEADS * HEAD_DIM, width),
            f"{name}.self_attn.o_proj.weight": tensor(H, HEADS * HEAD_DIM),
            f"{name}.mlp.gate_proj.weight": tensor(I, H),
            f"{name}.mlp.up_proj.weight": tensor(I, H),
            f"{name}.mlp.down_proj.weight": tensor(H, I),
            f"{name}.hidden_norm.weight": tensor(H),
            f"{name}.post_attention_layernorm.weight": tensor(H),
        }
        if i == 0:  # SGLang's spelling of further layers
            weights[f"{name}.input_layernorm.weight"] = tensor(H)
    used = USED if vocab == V_d else torch.arange(vocab)
    return weights | {
        "norm.weight": tensor(H),
        "lm_head.weight": tensor(vocab, H),
        "d2t": used - torch.arange(vocab),
        "t2d": torch.isin(torch.arange(V), used),
    }


def make_config(**overrides) -> dict:
    """SpecForge's config.json; a key set to ... is left out."""
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "draft_vocab_size": V_d,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": H,
        "initializer_range": 0.02,
        "intermediate_size": I,
        "max_position_embeddings": 64,
        "max_window_layers": 36,
        "mlp_bias": False,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "num_key_value_heads": KV_HEADS,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 5000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": V,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True},
    }
    return {key: value for key, value in {**config, **overrides}.items() if value is not ...}


SAFEAILAB = {
    "architectures": ["LlamaForCausalLM"],
    "eagle_config": ...,
    "num_hidden_layers": 40,
    "torch_dtype": "float16",
    "mlp_bias": ...,
    "head_dim": ...,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def write(folder: Path, config: dict, weights: Weights, files: str = "safetensors") -> Path:
    """A checkpoint folder as a producer leaves it, with a file that is none of our business."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "training_state.pt").write_bytes(b"an optimizer, as a pickle that nobody may open")
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    if files == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    if files == "sharded_bin":
        names = sorted(weights)
        for i, part in enumerate((names[::2], names[1::2])):
            torch.save({name: weights[name] for name in part}, folder / f"pytorch_model-{i}.bin")
        index = {name: f"pytorch_model-{names.index(name) % 2}.bin" for name in names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return folder
    if files == "old_bin":
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        return folder
    if files == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def change(weights: Weights, **renames: str | None) -> Weights:
    """With tensors renamed (prefix -> prefix, `__` for a dot) or, for None, dropped."""
    out = {}
    for name, tensor in weights.items():
        old = next((old for old in renames if name.startswith(old.replace("__", "."))), None)
        if old is None:
            out[name] = tensor
        elif renames[old] is not None:
            out[renames[old] + name.removeprefix(old.replace("__", "."))] = tensor
    return out


def two_names(weights: Weights) -> Weights:
    norm = weights["layers.1.hidden_norm.weight"]
    return {**weights, "layers.1.input_layernorm.weight": norm.clone()}


def with_norms(weights: Weights, names: list[str], size: int = H) -> Weights:
    generator = torch.Generator().manual_seed(12)
    norms = {name: (1 + 0.3 * torch.randn(size, generator=generator)).to(torch.bfloat16) for name in names}
    return {**weights, **norms}


def with_embeddings(weights: Weights) -> Weights:
    generator = torch.Generator().manual_seed(13)
    return {**weights, "embed_tokens.weight": torch.randn(V, H, generator=generator).to(torch.bfloat16)}


def with_biases(weights: Weights) -> Weights:
    generator = torch.Generator().manual_seed(14)
    biases = {
        name.replace(".weight", ".bias"): torch.randn(len(tensor), generator=generator).to(torch.bfloat16)
        for name, tensor in weights.items()
        if "_proj." in name or name.startswith("fc.")
    }
    return {**weights, **biases}


def as_speculators(**overrides: object) -> dict:
    """The config.json of vLLM's speculators: the layer's keys in a table of their own, and no model_type."""
    plain = make_config(eagle_config=..., draft_vocab_size=..., architectures=..., torch_dtype=...)
    top = {
        "architectures": ["Eagle3DraftModel"],
        "auto_map": {"": "config.Eagle3SpeculatorConfig"},
        "draft_vocab_size": V_d,
        "dtype": "bfloat16",
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "embed_requires_grad": False,
        "fc_norm": False,
        "has_no_defaults_at_init": False,
        "norm_before_fc": False,
        "norm_before_residual": False,
        "norm_output": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 3, "accept_tolerance": 0.0, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "some-owner/some-target"},
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": plain,
        "transformers_version": "4.57.1",
    }
    return {key: value for key, value in {**top, **overrides}.items() if value is not ...}


def with_qk_norms(weights: Weights) -> Weights:
    return with_norms(weights, [f"layers.0.self_attn.{n}_norm.weight" for n in "qk"], HEAD_DIM)


def with_mask(weights: Weights, *, flat: bool = False) -> Weights:
    mask = torch.randn(3 * H, generator=torch.Generator().manual_seed(16)).to(torch.bfloat16)
    return {**weights, "mask_hidden": mask if flat else mask[None, None]}


def with_qkv_biases(weights: Weights) -> Weights:
    biases = {n: t for n, t in with_biases(weights).items() if re.search(r"[qkvo]_proj\.bias$", n)}
    return {**weights, **biases}


def peagle_weights(num_layers: int) -> Weights:
    """Names as speculators and SpecForge have them: further layers with an `input_layernorm`."""
    weights = make_weights(num_layers=num_layers)
    return {re.sub(r"(layers\.[1-9]\.)hidden_norm", r"\1input_layernorm", n): t for n, t in weights.items()}


def as_peagle_speculators(*, inner: dict | None = None, **overrides: object) -> dict:
    """The config of speculators for a P-EAGLE drafter."""
    options = {"num_hidden_layers": 2, **(inner or {})}
    plain = make_config(eagle_config=..., draft_vocab_size=..., architectures=..., torch_dtype=..., **options)
    keys = {
        "architectures": ["PEagleDraftModel"],
        "auto_map": {"": "config.PEagleSpeculatorConfig"},
        "mask_token_id": 7,
        "norm_before_residual": True,
        "speculators_model_type": "peagle",
        "speculators_config": {
            "algorithm": "peagle",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 8}],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "some-owner/some-target"},
        },
        "transformer_layer_config": plain,
    }
    return as_speculators(**{**keys, **overrides})


Q_RANK, KV_RANK, NOPE, ROPE, V_DIM = 12, 10, 6, 4, 5
KIMI_ROPE = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}


def make_mla_weights(*, q_rank: int | None = Q_RANK, num_layers: int = 1, layer: str = "midlayer") -> Weights:
    """A DeepSeek layer over 2H inputs, as TorchSpec and Model-Optimizer write it for Kimi: full vocabulary, no tables."""
    generator = torch.Generator().manual_seed(15)

    def tensor(*shape: int) -> Tensor:
        return (0.4 * torch.randn(*shape, generator=generator) + (len(shape) == 1)).to(torch.bfloat16)

    weights = {"fc.weight": tensor(H, 3 * H), "norm.weight": tensor(H), "lm_head.weight": tensor(V, H)}
    for i in range(num_layers):
        name, width = (layer if not i else f"layers.{i}"), (H if i else 2 * H)
        query = {"q_proj": (HEADS * (NOPE + ROPE), width)}
        if q_rank is not None:
            query = {"q_a_proj": (q_rank, width), "q_a_layernorm": (q_rank,)}
            query["q_b_proj"] = (HEADS * (NOPE + ROPE), q_rank)
        shapes = {
            **{f"self_attn.{part}": shape for part, shape in query.items()},
            "self_attn.kv_a_proj_with_mqa": (KV_RANK + ROPE, width),
            "self_attn.kv_a_layernorm": (KV_RANK,),
            "self_attn.kv_b_proj": (HEADS * (NOPE + V_DIM), KV_RANK),
            "self_attn.o_proj": (H, HEADS * V_DIM),
            "mlp.gate_proj": (I, H),
            "mlp.up_proj": (I, H),
            "mlp.down_proj": (H, I),
            "input_layernorm": (H,),
            "post_attention_layernorm": (H,),
            **({} if i else {"hidden_norm": (H,)}),
        }
        weights |= {f"{name}.{part}.weight": tensor(*shape) for part, shape in shapes.items()}
    return weights


def make_mla_config(**overrides: object) -> dict:
    """Kimi's: DeepSeek-V3 keys, those of its experts among them, which say nothing of the drafter."""
    keys = {
        "architectures": ["Eagle3DeepseekV2ForCausalLM"],
        "model_type": "kimi_k2",
        "draft_vocab_size": V,
        "q_lora_rank": Q_RANK,
        "kv_lora_rank": KV_RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": V_DIM,
        "num_key_value_heads": 2,
        "rope_scaling": KIMI_ROPE,
        "rope_theta": 50000.0,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_nextn_predict_layers": 0,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "ep_size": 1,
        "seq_aux": True,
        "aux_loss_alpha": 0.001,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 30, 58], "use_aux_hidden_state": True},
    }
    return make_config(**{"head_dim": ..., **keys, **overrides})


def as_nemo(weights: Weights) -> Weights:
    """NeMo Automodel's names: all but the head and the tables under `model.`."""
    plain = change(weights, midlayer="layers.0")
    return {n if n in ("lm_head.weight", "d2t", "t2d") else f"model.{n}": tensor for n, tensor in plain.items()}


NEMO = {
    "architectures": ["LlamaEagle3DraftModel"],
    "model_type": "qwen3_moe",  # the target's, like most of the config
    "num_hidden_layers": 48,
    "eagle_config": ...,
    "layer_types": ["sliding_attention"] * 48,
    "sliding_window": 4,
    "a_key_of_the_target": {"router": 3},
    "final_logit_softcapping": 30.0,
    "parallel_drafting": False,
    "num_depths": 8,
    "num_aux_hidden_states": 3,
    "target_hidden_size": H,
}
MODEL_OPTIMIZER = {
    "use_aux_hidden_state": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "use_input_layernorm_in_first_layer": True,
    "parallel_draft_step": 1,
    "parallel_draft_heads_num_layers": 1,
}
EAGLE31 = {"fc_norm": True, "norm_output": True}
POST5 = {"eagle_aux_hidden_state_layer_ids": [1, 5, 9, 13], "use_aux_hidden_state": True}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {**LLAMA3, "original_max_position_embeddings": 32}
# name -> (config, weights, what our config must say)
LAYOUTS: dict[str, tuple[dict, Weights, dict]] = {
    "specforge": (make_config(), make_weights(), {"aux_layer_ids": [2, 4, 5]}),
    "sglang_layers_0": (make_config(), change(make_weights(), midlayer="layers.0"), {"aux_layer_ids": [2, 4, 5]}),
    "no_t2d_as_nvidia": (
        make_config(
            num_key_value_heads=KV_HEADS,
            eagle_config={
                "eagle_aux_hidden_state_layer_ids": [4, 1, 3],  # once saved from a set
                "use_aux_hidden_state": True,
                "use_last_layernorm": True,
                "use_mtp_layernorm": False,
                "next_layer_regular": True,
                "use_input_layernorm_in_first_layer": True,
                "parallel_draft_step": 1,
            },
        ),
        change(make_weights(), t2d=None),
        {"aux_layer_ids": [2, 4, 5]},
    ),
    "no_d2t": (make_config(), change(make_weights(), d2t=None), {}),
    "no_ids": (make_config(eagle_config=...), make_weights(), {"aux_layer_ids": None}),
    "both_conventions": (
        make_config(eagle_aux_hidden_state_layer_ids=[2, 4, 5]),
        make_weights(),
        {"aux_layer_ids": [2, 4, 5]},
    ),
    "top_level_ids": (
        make_config(eagle_config=..., eagle_aux_hidden_state_layer_ids=[24, 30, 36]),
        make_weights(),
        {"aux_layer_ids": [24, 30, 36]},
    ),
    "boundaries_in_both_as_nvidia_v3": (
        make_config(
            eagle_aux_hidden_state_layer_ids=[24, 30, 36],
            norm_before_fc=True,
            eagle_config={"eagle_aux_hidden_state_layer_ids": [24, 30, 36], "norm_before_fc": True},
            layer_types=["sliding_attention"],
            sliding_window=4,
        ),
        with_norms(make_weights(), ["input_norm.weight"], 3 * H),
        {"aux_layer_ids": [24, 30, 36], "norm_before_fc": True, "sliding_window": 4},
    ),
    "default_boundaries_nested": (
        make_config(eagle_config={"eagle_aux_hidden_state_layer_ids": [2, 18, 33]}),
        make_weights(),
        {"aux_layer_ids": [2, 18, 33]},
    ),
    "eagle31_four_states": (
        make_config(num_aux_hidden_states=4, eagle_config=POST5, **EAGLE31),
        with_norms(make_weights(num_states=4), [f"fc_norm.{k}.weight" for k in range(4)]),
        {"aux_layer_ids": [2, 6, 10, 14], "num_aux_hidden_states": 4, **EAGLE31},
    ),
    "eagle31_old_names": (
        make_config(use_aux_norm=True, norm_output=True),
        with_norms(make_weights(), [f"aux_norm_{k}.weight" for k in ("low", "mid", "high")]),
        dict(EAGLE31),
    ),
    "norm_before_fc": (
        make_config(eagle_config={"norm_before_fc": True}),
        with_norms(make_weights(), ["input_norm.weight"], 3 * H),
        {"norm_before_fc": True, "aux_layer_ids": None},
    ),
    "norm_before_fc_denied": (
        make_config(norm_before_fc=False),
        with_norms(make_weights(), ["input_norm.weight"], 3 * H),
        {"norm_before_fc": True},
    ),
    "norm_before_residual": (make_config(norm_before_residual=True), make_weights(), {"norm_before_residual": True}),
    "wider_target": (
        make_config(target_hidden_size=Ht, **EAGLE31),
        with_norms(with_embeddings(make_weights(target_size=Ht)), [f"fc_norm.{k}.weight" for k in range(3)], size=Ht),
        {"target_hidden_size": Ht, "has_own_embeddings": True},
    ),
    "two_layers": (
        make_config(num_hidden_layers=2),
        make_weights(num_layers=2),
        {"num_hidden_layers": 2},
    ),
    "two_layers_both_names": (
        make_config(num_hidden_layers=2),
        two_names(make_weights(num_layers=2)),
        {"num_hidden_layers": 2},
    ),
    "two_layers_as_nvidia_megatron": (
        make_config(num_hidden_layers=2, architectures=["LlamaForCausalLMEagle3Deep"]),
        change(make_weights(num_layers=2), layers="midlayer"),
        {"num_hidden_layers": 2},
    ),
    "two_layers_mixed": (
        make_config(num_hidden_layers=2),
        change(make_weights(num_layers=2), layers__0="midlayer"),
        {"num_hidden_layers": 2},
    ),
    "biases": (make_config(bias=True), with_biases(make_weights()), {"fc_bias": True, "mlp_bias": True}),
    "full_vocabulary_with_tables": (
        make_config(draft_vocab_size=V),
        make_weights(vocab=V),
        {"draft_vocab_size": V},
    ),
    "full_vocabulary": (
        make_config(draft_vocab_size=None),
        change(make_weights(vocab=V), d2t=None, t2d=None),
        {"draft_vocab_size": V, "share_lm_head": False},
    ),
    "targets_head_as_nvidia": (
        make_config(draft_vocab_size=None),
        change(make_weights(), lm_head=None, d2t=None, t2d=None),
        {"draft_vocab_size": V, "share_lm_head": True},
    ),
    "no_fc": (
        make_config(eagle_config={"use_aux_hidden_state": False}),
        change(make_weights(), fc=None),
        {"use_aux_hidden_state": False, "aux_layer_ids": None},
    ),
    "old_rope": (
        make_config(rope_scaling=LLAMA3),
        make_weights(),
        {"rope_parameters": {**{k: v for k, v in LLAMA3.items() if k != "type"}, "rope_type": "llama3"}},
    ),
    "new_rope_beside_its_mirror": (
        make_config(
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0},
            rope_scaling={"rope_type": "linear", "factor": 2.0},
            rope_theta=700.0,
        ),
        make_weights(),
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}},
    ),
    "mrope": (
        make_config(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
        make_weights(),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ),
    "mrope_of_qwen3_vl": (
        make_config(rope_scaling={"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]}),
        make_weights(),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ),
    "window_without_layer_types": (make_config(sliding_window=512), make_weights(), {"sliding_window": None}),
    "window_with_full_layers": (
        make_config(sliding_window=512, layer_types=["full_attention"] * 36),
        make_weights(),
        {"sliding_window": None},
    ),
    "llama4": (
        make_config(model_type="llama4_text", intermediate_size=999, intermediate_size_mlp=I),
        make_weights(),
        {"intermediate_size": I},
    ),
    "angelslim": (
        make_config(
            architectures=["Eagle3LlamaForCausalLM"],
            tie_word_embeddings=True,
            eagle_config=...,
            num_hidden_layers=24,
            use_qk_norm=True,
            modal_type="VLM",
            image_token_id=7,
            target_model_type="qwen3_vl",
        ),
        make_weights(),
        {"num_hidden_layers": 1, "qk_norm": False, "target_model_type": "qwen3_vl"},
    ),
    "nebius": (
        make_config(
            architectures=["LlamaForCausalLM"], eagle_config=..., draft_vocab_size=..., truncated_vocab_size=V_d
        ),
        make_weights(),
        {"draft_vocab_size": V_d},
    ),
    "sglang_without_its_architecture": (
        make_config(architectures=["LlamaForCausalLM"], **EAGLE31),
        with_norms(make_weights(), [f"fc_norm.{k}.weight" for k in range(3)]),
        {**EAGLE31, "aux_layer_ids": [2, 4, 5]},
    ),
    "safeailab": (
        make_config(**{**SAFEAILAB, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM}),
        make_weights(),
        {"num_hidden_layers": 1, "aux_layer_ids": None},
    ),
    "speculators": (
        as_speculators(),
        with_embeddings(change(make_weights(), midlayer="layers.0")),
        {
            "aux_layer_ids": [2, 4, 5],
            "norm_before_residual": False,
            "has_own_embeddings": True,
            "target_name_or_path": "some-owner/some-target",
        },
    ),
    "speculators_converted": (  # what its converter makes of others' drafters
        as_speculators(
            architectures=["Eagle3Speculator"],
            auto_map={"": "eagle3.Eagle3SpeculatorConfig"},
            eagle_aux_hidden_state_layer_ids=None,
            norm_before_residual=...,
            norm_output=...,
            fc_norm=...,
        ),
        change(make_weights(), midlayer="layers.0"),
        {"aux_layer_ids": None, "norm_before_residual": True, "norm_output": False},
    ),
    "speculators_qwen3_eagle31": (
        as_speculators(
            **EAGLE31,
            transformer_layer_config=make_config(
                eagle_config=...,
                draft_vocab_size=...,
                architectures=...,
                model_type="qwen3",
                sliding_window=4,
                layer_types=["sliding_attention"],
            ),
        ),
        with_norms(
            with_qk_norms(change(make_weights(), midlayer="layers.0")), [f"fc_norm.{k}.weight" for k in range(3)]
        ),
        {"qk_norm": True, "sliding_window": 4, **EAGLE31},
    ),
    "speculators_norm_before": (
        as_speculators(norm_before_fc=True, norm_before_residual=True, speculators_config={"algorithm": "eagle3"}),
        with_norms(change(make_weights(), midlayer="layers.0"), ["input_norm.weight"], 3 * H),
        {"norm_before_fc": True, "norm_before_residual": True, "target_name_or_path": None},
    ),
    "speculators_two_layers_four_states": (
        as_speculators(
            eagle_aux_hidden_state_layer_ids=[2, 46, 91, 93],
            transformer_layer_config=make_config(
                eagle_config=..., draft_vocab_size=..., architectures=..., num_hidden_layers=2
            ),
        ),
        {
            n.replace("1.hidden_norm", "1.input_layernorm"): t
            for n, t in make_weights(num_states=4, num_layers=2).items()
        },
        {"aux_layer_ids": [2, 46, 91, 93], "num_hidden_layers": 2},
    ),
    "peagle_speculators": (
        as_peagle_speculators(),
        with_mask(with_embeddings(peagle_weights(2))),
        {
            "mask_token_id": 7,
            "aux_layer_ids": [2, 4, 5],
            "num_hidden_layers": 2,
            "norm_before_residual": True,
            "target_name_or_path": "some-owner/some-target",
        },
    ),
    "peagle_speculators_qwen3": (
        as_peagle_speculators(norm_before_residual=..., inner={"model_type": "qwen3", "num_hidden_layers": 1}),
        with_mask(with_qk_norms(change(make_weights(), midlayer="layers.0"))),
        {"mask_token_id": 7, "qk_norm": True, "norm_before_residual": False},
    ),
    "peagle_specforge": (
        make_config(
            architectures=["PEagleDraftModel"], num_hidden_layers=4, norm_before_residual=True, mask_token_id=V - 1
        ),
        with_mask(peagle_weights(4)),
        {"mask_token_id": V - 1, "num_hidden_layers": 4, "norm_before_residual": True, "aux_layer_ids": [2, 4, 5]},
    ),
    "peagle_flat_mask_and_pard_token": (
        make_config(parallel_drafting=True, pard_token=0, ptd_token_id=0, norm_before_fc=True, attention_bias=True),
        with_norms(with_mask(with_qkv_biases(make_weights()), flat=True), ["input_norm.weight"], 3 * H),
        {"mask_token_id": 0, "norm_before_fc": True, "attention_bias": True},
    ),
    "model_optimizer": (
        make_config(
            eagle_config={**MODEL_OPTIMIZER, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, rope_scaling=None
        ),
        change(make_weights(), midlayer="layers.0", t2d=None),
        {"aux_layer_ids": [2, 4, 5]},
    ),
    "model_optimizer_two_layers_full_vocabulary": (
        make_config(
            eagle_config={**MODEL_OPTIMIZER, "eagle_aux_hidden_state_layer_ids": [1, 23, 44]},
            num_hidden_layers=2,
            draft_vocab_size=V,
            attention_bias=None,
            mlp_bias=None,
        ),
        {
            n.replace("1.hidden_norm", "1.input_layernorm"): t
            for n, t in change(make_weights(num_layers=2, vocab=V), d2t=None, t2d=None).items()
        },
        {"aux_layer_ids": [2, 24, 45], "num_hidden_layers": 2, "draft_vocab_size": V},
    ),
    "torchspec": (
        make_config(
            _torchspec_version="0.1.0",
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            draft_vocab_size=...,
        ),
        change(make_weights(vocab=V), d2t=None, t2d=None),
        {"draft_vocab_size": V, "aux_layer_ids": [2, 4, 5]},
    ),
    "nested_vllm": (
        {
            "model_type": "eagle",
            "architectures": ["EAGLEModel"],
            "truncated_vocab_size": V_d,
            "model": make_config(eagle_config=..., architectures=["LlamaForCausalLM"], draft_vocab_size=...),
        },
        make_weights(),
        {"draft_vocab_size": V_d, "aux_layer_ids": None},
    ),
    "nemo": (
        make_config(**NEMO),
        as_nemo(make_weights()),
        {"num_hidden_layers": 1, "sliding_window": None, "target_model_type": "qwen3_moe", "aux_layer_ids": None},
    ),
    "nemo_gemma_eagle31": (
        make_config(
            **{**NEMO, "model_type": "gemma3_text", "hidden_act": ..., "hidden_activation": "gelu_pytorch_tanh"},
            **EAGLE31,
        ),
        as_nemo(with_norms(with_embeddings(make_weights()), [f"fc_norm.{k}.weight" for k in range(3)])),
        {"hidden_act": "gelu_pytorch_tanh", "has_own_embeddings": True, **EAGLE31},
    ),
    "nemo_mla": (
        make_mla_config(**{**NEMO, "model_type": "deepseek_v3"}),
        as_nemo(make_mla_weights()),
        {"kv_lora_rank": KV_RANK, "target_model_type": "deepseek_v3"},
    ),
    "mla_kimi": (
        make_mla_config(),
        make_mla_weights(),
        {"aux_layer_ids": [2, 30, 58], "head_dim": ROPE, "num_key_value_heads": HEADS, "q_lora_rank": Q_RANK},
    ),
    "mla_eagle31_layers_0": (
        make_mla_config(
            model_type="deepseek_v3", eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 29, 57]}, **EAGLE31
        ),
        with_norms(make_mla_weights(layer="layers.0"), [f"fc_norm.{k}.weight" for k in range(3)]),
        {"aux_layer_ids": [2, 30, 58], "v_head_dim": V_DIM, **EAGLE31},
    ),
    "mla_two_layers_without_query_latent": (
        make_mla_config(q_lora_rank=None, num_hidden_layers=2, rope_scaling=None, draft_vocab_size=V_d),
        {
            **make_mla_weights(q_rank=None, num_layers=2),
            "lm_head.weight": make_weights()["lm_head.weight"],
            "d2t": USED - torch.arange(V_d),
        },
        {"q_lora_rank": None, "num_hidden_layers": 2, "draft_vocab_size": V_d},
    ),
    "absolute_table": (
        make_config(),
        {**make_weights(), "d2t": USED.clone()},
        {"draft_vocab_size": V_d},
    ),
    "flags_in_eagle_config": (
        make_config(eagle_config={"fc_norm": True, "norm_output": True}),
        with_norms(make_weights(), [f"fc_norm.{k}.weight" for k in range(3)]),
        dict(EAGLE31),
    ),
    "safeailab_70b": (
        make_config(
            **{**SAFEAILAB, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM},
            target_hidden_size=Ht,
        ),
        with_embeddings(make_weights(target_size=Ht)),
        {"target_hidden_size": Ht},
    ),
}


def bf16(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bfloat16)


FUZZED = [
    *("specforge", "sglang_layers_0", "safeailab", "two_layers_both_names", "speculators", "nemo", "mla_kimi"),
    *("eagle31_four_states", "model_optimizer", "nested_vllm", "peagle_speculators", "peagle_specforge", "ours"),
]
# What else the error may call it: the field that a tensor's size decides, or what a cut index leads to.
ALSO = {
    "t2d": "vocab_size|d2t",
    "d2t": "vocab_size|lm_head",
    "lm_head": "vocab_size|d2t",
    "embed_tokens": "vocab_size|t2d",
    "fc": "hidden_state|fc_norm|layer ids",
    "gate_proj": "intermediate_size",
    "input_layernorm": "width|hidden_size|hidden_norm|q_a?_?proj",
    "hidden_norm": "input_layernorm|layers",
    "kv_a_layernorm": "kv_b_proj",
    "kv_a_proj_with_mqa": "kv_b_proj|head_dim|k_proj",
    "q_a_layernorm": "q_lora_rank|q_a_proj",
    "rope_parameters": "rope|rotary|yarn",
    "attention_dropout": "dropout",
    "vocab_size": "draft.vocab",
    "xfc": "fc",
    "q_b_proj": "kv_b_proj",
    "o_proj": "kv_b_proj",
    "layers": "layer",
    "intermediate_size": "mlp",
    "draft_vocab_size": "d2t",
}
