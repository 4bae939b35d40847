"""Which serving engine can run which drafter, and how each wants it described. What SGLang 0.5.23 and vLLM 0.33 read.

SGLang and vLLM read one layout; where both can serve a drafter, one folder does for both. vLLM's speculators layout is
the third.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..modeling import Eagle3DrafterConfig
    from ..modeling.fields_eagle3 import DrafterFields

SGLANG, VLLM, SPECULATORS, HF = "sglang", "vllm", "speculators", "hf"
ENGINES: Mapping[str, str] = {
    SGLANG: "SGLang",
    VLLM: "vLLM",
    SPECULATORS: "vLLM, speculators layout",
    HF: "Transformers",
}


class Refusal(NamedTuple):
    """A variant that some engines cannot serve."""

    field: str
    is_set: "Callable[[Any], bool]"  # Any: fields of the kind whose table it is in
    engines: tuple[str, ...]
    why: str


REFUSALS = (
    Refusal("norm_before_residual", lambda c: c.norm_before_residual, (SGLANG,), "its residual is never normed"),
    Refusal("qk_norm", lambda c: c.qk_norm, (SGLANG,), "it has no norms over query and key heads"),
    Refusal("attention_bias", lambda c: c.attention_bias, (SGLANG,), "it has no biases on q, k and v"),
    Refusal("mlp_bias", lambda c: c.mlp_bias, (SGLANG,), "it has no biases in the MLP"),
    Refusal(
        "fc_bias", lambda c: c.fc_bias, (VLLM, SPECULATORS), "it reads the key `bias` as a bias on o_proj, never on fc"
    ),
    Refusal("hidden_act", lambda c: c.hidden_act != "silu", (SGLANG, VLLM, SPECULATORS), "its MLP is silu only"),
    Refusal(
        "norm_last_state",
        lambda c: c.norm_last_state,
        (SGLANG, VLLM, SPECULATORS),
        "it captures the last layer before the final norm",
    ),
    Refusal("mask_token_id", lambda c: c.is_parallel, (SGLANG,), "it has no parallel drafting (P-EAGLE)"),
    Refusal(
        "fc_norm",
        lambda c: c.is_parallel and c.fc_norm,
        (SPECULATORS,),
        "vLLM does not read it from a P-EAGLE drafter's config in that layout",
    ),
    Refusal("kv_lora_rank", lambda c: c.is_latent, (SPECULATORS,), "its layers are Llama's or Qwen3's, not MLA"),
    Refusal(
        "num_hidden_layers",
        lambda c: c.is_latent and c.num_hidden_layers > 1,
        (SGLANG,),
        "an MLA drafter has one layer there",
    ),
    Refusal(
        "q_lora_rank",
        lambda c: c.is_latent and c.q_lora_rank is None,
        (SGLANG,),
        "MLA needs a latent for queries there",
    ),
    Refusal(
        "norm_before_fc",
        lambda c: c.is_latent and c.norm_before_fc,
        (SGLANG, VLLM),
        "an MLA drafter has no norm over the concatenation there",
    ),
    Refusal(
        "sliding_window",
        lambda c: c.is_latent and c.sliding_window is not None,
        (SGLANG, VLLM),
        "an MLA drafter has no window there",
    ),
    Refusal(
        "use_aux_hidden_state",
        lambda c: not c.use_aux_hidden_state,
        (SPECULATORS,),
        "its config has no key for a drafter without fc",
    ),
    Refusal(
        "use_aux_hidden_state",
        lambda c: c.is_latent and not c.use_aux_hidden_state,
        (VLLM,),
        "an MLA drafter needs fc there",
    ),
    Refusal(
        "aux_layer_ids",
        lambda c: bool(c.aux_layer_ids) and min(c.aux_layer_ids) == 0,
        (SGLANG,),
        "it cannot capture the embeddings' output (boundary 0)",
    ),
)


# The same of block drafters. SGLang and vLLM read those that draft from the root in DeepSpec's layout, the others in z-lab's.
BOTH = (SGLANG, VLLM)
BLOCK_REFUSALS = (
    Refusal(
        "draft_vocab_size",
        lambda c: c.draft_vocab_size < c.vocab_size,
        BOTH,
        "z-lab's and DeepSpec's layouts have the target's whole vocabulary",
    ),
    Refusal(
        "has_own_embeddings",
        lambda c: c.has_own_embeddings and not c.drafts_from_root,
        BOTH,
        "z-lab's layout has the target's embeddings",
    ),
    Refusal(
        "share_lm_head",
        lambda c: not c.share_lm_head and not c.drafts_from_root,
        BOTH,
        "z-lab's layout has the target's head",
    ),
    Refusal(
        "markov_rank",
        lambda c: c.markov_rank > 0 and not c.drafts_from_root,
        BOTH,
        "z-lab's layout has no Markov head",
    ),
    Refusal(
        "has_confidence_head",
        lambda c: c.has_confidence_head and not c.drafts_from_root,
        BOTH,
        "z-lab's layout has no confidence head",
    ),
    Refusal(
        "is_causal",
        lambda c: c.is_causal and c.drafts_from_root,
        BOTH,
        "in DeepSpec's layout a block sees all of itself",
    ),
    Refusal(
        "is_causal",
        lambda c: c.is_causal and c.sliding_window is None,
        (SPECULATORS,),
        "in that layout only sliding layers can be causal within the block",
    ),
    Refusal(
        "layer_types",
        lambda c: c.is_causal and c.layer_types is not None,
        (SPECULATORS,),
        "in that layout full layers are never causal within the block",
    ),
)


def find_refusals(config: "DrafterFields", engine: str) -> list[str]:
    """Why `engine` cannot serve a drafter of this config, one line each; empty if it can."""
    return [
        f"{refusal.field}={getattr(config, refusal.field)!r}: {refusal.why}"
        for refusal in (REFUSALS if getattr(config, "block_size", None) is None else BLOCK_REFUSALS)
        if engine in refusal.engines and refusal.is_set(config)
    ]


@dataclass(frozen=True)
class Target:
    """What an engine's reading of a drafter depends on. None: not known."""

    name: str | None = None
    model_type: str | None = None
    num_layers: int | None = None
    architectures: list[str] | None = None


# How SGLang turns ids in `eagle_config` into boundaries, by target. All others add one to each.
DEEPSEEK = frozenset({"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm4_moe_lite"})
GPT_OSS = "gpt_oss"
OWN_DEFAULT = frozenset({"minimax_m3_vl"})  # reads other states than (2, n // 2, n - 3) where no ids are given


def to_sglang_ids(boundaries: list[int], target: Target) -> list[int]:
    """The ids in `eagle_config` that make SGLang capture `boundaries` of `target`.

    Raises:
        ValueError: It cannot, or the target is not known well enough to tell.
    """
    if target.model_type is None or target.num_layers is None:
        raise ValueError(
            f"SGLang counts captured layers by target, and this drafter reads boundaries {boundaries}: give the target "
            "(target=..., --target), as a model, a folder or a repository whose config can be read."
        )
    n = target.num_layers
    if target.model_type == GPT_OSS and boundaries[-1] == n:
        return boundaries
    if boundaries[-1] == n:
        raise ValueError(
            f"aux_layer_ids={boundaries}: SGLang captures what leaves the last of {n} layers from gpt-oss only, and the "
            f"target is {target.model_type}."
        )
    if target.model_type in DEEPSEEK:
        if boundaries[0] == 1:
            raise ValueError(
                f"aux_layer_ids={boundaries}: for {target.model_type} SGLang takes a list that starts with 1 for layer "
                "outputs, so it cannot start at boundary 1."
            )
        return [i - 1 for i in boundaries] if boundaries[0] == 2 else boundaries
    return [i - 1 for i in boundaries]


LATENT_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")


def make_layer_config(config: "Eagle3DrafterConfig", *, model_type: str) -> dict[str, Any]:
    """The keys that describe a drafter's layers, as a Llama-like config has them."""
    rope = dict(config.rope_parameters or {"rope_type": "default"})
    rope.setdefault("rope_theta", 10000.0)
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    fields = {
        "model_type": model_type,
        **{
            name: getattr(config, name)
            for name in (
                *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                *("vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
                *("initializer_range", "attention_bias", "mlp_bias", "attention_dropout"),
            )
        },
        **{
            name: getattr(config, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            if getattr(config, name) is not None
        },
        # Readers built on Transformers 4 know the old spelling only, and take theta 10000 without it.
        "rope_parameters": rope,
        "rope_scaling": None if old.get("rope_type") == "default" else old,
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": False,
    }
    if config.is_latent:
        fields |= {name: getattr(config, name) for name in LATENT_FIELDS}
        fields |= {"qk_rope_head_dim": config.head_dim, "num_key_value_heads": config.num_key_value_heads}
        fields |= {"num_nextn_predict_layers": 0}
    else:
        fields |= {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    if config.sliding_window is not None:
        fields |= {
            "sliding_window": config.sliding_window,
            "layer_types": ["sliding_attention"] * config.num_hidden_layers,
        }
    if config.num_aux_hidden_states != 3 and config.use_aux_hidden_state:
        fields["num_aux_hidden_states"] = config.num_aux_hidden_states
    return fields


def make_native_config(
    config: "Eagle3DrafterConfig", boundaries: list[int] | None, sglang_ids: list[int] | None
) -> dict[str, Any]:
    """config.json as SGLang and vLLM read it, boundaries at the top for vLLM and SGLang's ids in `eagle_config`."""
    if config.is_latent:
        architecture, model_type = "Eagle3DeepseekV2ForCausalLM", "deepseek_v3"
    elif config.is_parallel and config.qk_norm:
        architecture, model_type = "PeagleQwen3ForCausalLM", "qwen3"
    elif config.is_parallel:
        architecture, model_type = "PEagleDraftModel", "llama"
    elif config.qk_norm:
        architecture, model_type = "Eagle3Qwen3ForCausalLM", "qwen3"
    else:
        architecture, model_type = "LlamaForCausalLMEagle3", "llama"
    nested: dict[str, Any] = {"use_aux_hidden_state": config.use_aux_hidden_state}
    out = {
        "architectures": [architecture],
        **make_layer_config(config, model_type=model_type),
        "draft_vocab_size": None if config.share_lm_head else config.draft_vocab_size,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }
    # Null would be multiplied, and an integer makes readers expect embeddings of the drafter's own.
    if config.target_hidden_size != config.hidden_size:
        out["target_hidden_size"] = config.target_hidden_size
    if config.target_model_type is not None:
        out["target_model_type"] = config.target_model_type
    out |= {name: True for name in ("fc_norm", "norm_output", "norm_before_residual") if getattr(config, name)}
    if config.norm_before_fc:
        out["norm_before_fc"] = nested["norm_before_fc"] = True
    if config.is_parallel:
        out["pard_token"] = config.mask_token_id
    if config.fc_bias:
        out["bias"] = True
    if boundaries is not None:
        out["eagle_aux_hidden_state_layer_ids"] = boundaries
    if sglang_ids is not None:
        nested["eagle_aux_hidden_state_layer_ids"] = sglang_ids
    return {**out, "eagle_config": nested}


def make_speculators_config(
    config: "Eagle3DrafterConfig", boundaries: list[int] | None, target: Target, depth: int
) -> dict[str, Any]:
    """config.json as speculators writes it: flags at the top, the layer in a table, no model_type."""
    algorithm = "peagle" if config.is_parallel else "eagle3"
    return {
        "architectures": ["PEagleDraftModel" if config.is_parallel else "Eagle3DraftModel"],
        "speculators_model_type": algorithm,
        **({"mask_token_id": config.mask_token_id} if config.is_parallel else {}),
        "draft_vocab_size": config.draft_vocab_size,
        **{
            name: getattr(config, name)
            for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        },
        "target_hidden_size": None if config.target_hidden_size == config.hidden_size else config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": boundaries,
        "tie_word_embeddings": False,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "transformer_layer_config": make_layer_config(config, model_type="qwen3" if config.qk_norm else "llama"),
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": depth}],
            "verifier": {"name_or_path": target.name, "architectures": target.architectures or []},
        },
    }
