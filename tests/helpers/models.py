"""Tiny random targets of several families, and drafters that agree with them never, always or sometimes."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from hf_eagle3.modeling import Eagle3DrafterConfig, Eagle3DrafterModel, Eagle3DrafterOutput

V, H, NUM_LAYERS, WINDOW = 64, 32, 8, 8
TEXT = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Wide enough for varied text, with gaps between logits far above rounding.
    "initializer_range": 0.3,
}
GEMMA = {
    **TEXT,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": False,  # else scaled embeddings make it repeat the last token
}
# Multi-head latent attention: values are narrower than keys, and so are what caches hold of either.
MLA = {
    **{key: value for key, value in TEXT.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": NUM_LAYERS,
}


def _gemma3_vlm() -> PreTrainedModel:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**GEMMA),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_id=60,
        tie_word_embeddings=False,
    )
    return Gemma3ForConditionalGeneration(config)


def _qwen_vlm() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**TEXT, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": H}
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


TARGETS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**MLA)),
    "gemma3_vlm": _gemma3_vlm,
    "qwen_vlm": _qwen_vlm,
}
NO_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
# Further families, for tests that name them.
FAMILIES = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=WINDOW)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**NO_HEAD_DIM)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NO_HEAD_DIM)),
}
OLD = ["llama", "qwen3", "gemma3", "gpt_oss", "gemma3_vlm"]


@functools.cache
def make_target(family: str) -> PreTrainedModel:
    """A tiny random target, float32. The same object each time: no call may change it."""
    torch.manual_seed(sum(map(ord, family)))
    target = {**FAMILIES, **TARGETS}[family]().eval().float()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "norm" in name:  # else all ones or zeros, and a wrong norm would go unnoticed
                parameter.add_(0.2 * torch.randn_like(parameter))
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    target.generation_config.do_sample = False
    return target


# The drafters in the field differ in these.
DRAFTERS: dict[str, dict] = {
    "full_vocab": {"draft_vocab_size": V},
    "reduced_vocab": {"draft_vocab_size": 40},
    "eagle31": {"draft_vocab_size": 40, "fc_norm": True, "norm_output": True},
    "norm_before": {"norm_before_fc": True, "norm_before_residual": True},
    "two_layers": {"num_hidden_layers": 2, "qk_norm": True, "has_own_embeddings": True, "sliding_window": 6},
    "no_fc": {"use_aux_hidden_state": False, "share_lm_head": True, "draft_vocab_size": V},
    "mla": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 10,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "v_head_dim": 5,
        "norm_output": True,
    },
    "peagle": {"num_hidden_layers": 2, "mask_token_id": 61, "has_own_embeddings": True},
    "four_states": {"num_aux_hidden_states": 4, "aux_layer_ids": [0, 3, 5, NUM_LAYERS]},
}


def drafter_config(**overrides) -> Eagle3DrafterConfig:
    """A drafter config that fits the tiny targets; 16 positions, so that prompts can be longer."""
    sizes = {
        "hidden_size": H,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": V,
        "draft_vocab_size": 40,
        "max_position_embeddings": 16,
        "initializer_range": 0.3,
    }
    return Eagle3DrafterConfig(**{**sizes, **overrides})


def randomize(drafter: Eagle3DrafterModel) -> Eagle3DrafterModel:
    """Random norms and a random draft vocabulary, so that no part of the drafter is an identity."""
    config = drafter.config
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    drafter.generation_config.num_assistant_tokens = 3  # what rounds bring is counted, so nothing goes by time
    drafter.set_draft_to_target_ids(torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values)
    return drafter.eval()


def make_drafter(target: PreTrainedModel, **overrides) -> Eagle3DrafterModel:
    """A drafter of random weights, bound to `target`."""
    torch.manual_seed(1)
    return randomize(Eagle3DrafterModel(drafter_config(**overrides))).bind(target)


class OracleDrafter(Eagle3DrafterModel):
    """Drafts the text it was told, and at some positions something else; checks everything it is given.

    The real network runs beside it. In each first draft step the tokens must be the text's, one after their states,
    and the cache must be worth a fresh run over all states so far.
    """

    def tell(self, text: Tensor, *, wrong_share: float = 0.4) -> "OracleDrafter":
        """Draft `text` [S], with a wrong token at a fixed random choice of positions."""
        generator = torch.Generator().manual_seed(7)
        self.text = text
        self.is_wrong = torch.rand(len(text) + 64, generator=generator) < wrong_share
        self.seen = []  # (tokens, states, positions) of the first draft steps
        return self

    def forward(
        self,
        input_ids,
        aux_hidden_states=None,
        hidden_states=None,
        position_ids=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """As the network's, with other logits."""
        assert not torch.is_grad_enabled()
        options = {"position_ids": position_ids, "logits_to_keep": logits_to_keep, **kwargs}
        out = super().forward(input_ids, aux_hidden_states, hidden_states, **options)
        if kwargs.get("writes_only"):  # the next draft step tells whether what was written is right
            self.seen.append((input_ids.clone(), aux_hidden_states.clone(), position_ids))
            return out
        is_each = isinstance(logits_to_keep, Tensor)  # the positions themselves; from the first on comes no text
        kept = logits_to_keep[0] if is_each else torch.arange(input_ids.shape[1])[-out.logits.shape[1] :]
        if aux_hidden_states is not None:
            n = int(kept[0]) + 1 if is_each else input_ids.shape[1]
            self._check(input_ids[:, :n], aux_hidden_states[:, :n], position_ids[:, :n], out)
        logits = torch.zeros_like(out.logits)
        for t, position in enumerate(position_ids[0, kept].tolist()):
            ids = self.draft_to_target_ids
            token = self.text[position + 2] if position + 2 < len(self.text) else 0
            wanted = (ids == token).nonzero()
            draft_id = int(wanted) if len(wanted) else 0
            if self.is_wrong[position]:
                draft_id = (draft_id + 1) % len(ids)
            logits[0, t, draft_id] = 5.0
        return Eagle3DrafterOutput(logits, out.feedback, out.past_key_values)

    def _check(self, input_ids, aux_hidden_states, position_ids, out):
        assert torch.equal(input_ids[0], self.text[position_ids[0] + 1])
        self.seen.append((input_ids.clone(), aux_hidden_states.clone(), position_ids))  # they change in place
        tokens, states, positions = (torch.cat(parts, dim=1) for parts in zip(*self.seen, strict=True))
        assert torch.equal(positions[0], torch.arange(positions.shape[1]) + positions[0, 0])
        fresh = super().forward(tokens, states, position_ids=positions)
        torch.testing.assert_close(out.logits[:, 0], fresh.logits[:, -1], rtol=1e-4, atol=1e-4)

    @property
    def seen_states(self) -> Tensor:
        """[1, S, A*Ht], all states of the last call."""
        return torch.cat([states for _, states, _ in self.seen], dim=1)


def make_oracle(target: PreTrainedModel, text: Tensor, *, wrong_share: float = 0.4, **overrides) -> OracleDrafter:
    """An oracle of `text` [S], bound to `target`."""
    torch.manual_seed(2)
    drafter = randomize(OracleDrafter(drafter_config(**{"draft_vocab_size": V, **overrides}))).bind(target)
    drafter.generation_config.decode_loop = "host"  # whose steps it checks; `batches.py` has one for ours
    return drafter.tell(text, wrong_share=wrong_share)


def make_prompt(length: int) -> Tensor:
    """[1, T] random tokens without special ones."""
    return torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))


def count_hooks(target: PreTrainedModel) -> int:
    """Forward hooks of ours on any module of `target`."""
    hooks = [h for m in target.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(getattr(hook, "__module__", "").startswith("hf_eagle3") for hook in hooks)
