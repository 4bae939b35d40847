"""The network against the plain reference, its inputs and its config."""

import copy

import pytest
import torch
from helpers.models import DRAFTERS, drafter_config
from helpers.reference_drafter import DoubleRotary, ReferenceDrafter, inverse_frequencies
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from hf_eagle3.modeling import CheckpointError, Eagle3DrafterConfig, Eagle3DrafterModel

V, H, T = 64, 32, 9
SIZES = {
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": V,
    "draft_vocab_size": 40,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": PLAIN,
    "theta": {**PLAIN, "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {**YARN, "beta_fast": 8.0, "beta_slow": 1.0},
    "yarn_untruncated": {**YARN, "truncate": False},
}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "v_head_dim": 5}
KIMI = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8, "rope_theta": 50000.0}
VARIANTS: dict[str, dict] = {
    "plain": {},
    "fc_norm": {"fc_norm": True},
    "norm_before_fc": {"norm_before_fc": True},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_output": {"norm_output": True},
    "eagle31": {"fc_norm": True, "norm_output": True},
    "fc_bias": {"fc_bias": True},
    "one_state": {"num_aux_hidden_states": 1, "fc_norm": True, "aux_layer_ids": [3]},
    "five_states": {"num_aux_hidden_states": 5, "aux_layer_ids": [0, 1, 2, 5, 8], "fc_norm": True},
    "wider_target": {"target_hidden_size": 40, "has_own_embeddings": True, "fc_norm": True},
    "wider_target_norm_before_fc": {"target_hidden_size": 40, "has_own_embeddings": True, "norm_before_fc": True},
    "two_layers": {"num_hidden_layers": 2},
    "three_layers_norm_output": {"num_hidden_layers": 3, "norm_output": True},
    "qk_norm": {"qk_norm": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all_biases": {"attention_bias": True, "mlp_bias": True, "fc_bias": True, "num_hidden_layers": 2},
    "head_dim_apart": {"head_dim": 12, "num_attention_heads": 6, "num_key_value_heads": 3},
    "one_kv_head": {"num_key_value_heads": 1},
    "window": {"sliding_window": 3},
    "window_two_layers": {"sliding_window": 4, "num_hidden_layers": 2, "qk_norm": True},
    "own_embeddings": {"has_own_embeddings": True},
    "full_vocab": {"draft_vocab_size": V},
    "shared_head": {"draft_vocab_size": V, "share_lm_head": True},
    "no_fc": {"use_aux_hidden_state": False},
    "no_fc_shared_head": {"use_aux_hidden_state": False, "share_lm_head": True, "draft_vocab_size": V},
    "mla": {**MLA, "q_lora_rank": 12},
    "mla_two_layers_yarn": {**MLA, "q_lora_rank": 12, "num_hidden_layers": 2, "rope_parameters": KIMI},
    "mla_window_wide_values": {**MLA, "v_head_dim": 17, "sliding_window": 4, "norm_output": True},
    "eps": {"rms_norm_eps": 0.1},
    **{f"rope_{name}": {"rope_parameters": rope} for name, rope in ROPES.items()},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


class DoubleNorm(nn.Module):
    """The host's norm without its detour through float32, so that float64 is float64."""

    def __init__(self, norm: LlamaRMSNorm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        x = x.double()
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


def to_double(drafter: Eagle3DrafterModel) -> Eagle3DrafterModel:
    drafter = copy.deepcopy(drafter).double()
    for parent in list(drafter.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(parent, name, DoubleNorm(child))
    drafter.rotary_emb = DoubleRotary(drafter.config)
    return drafter


def make_config(**overrides) -> Eagle3DrafterConfig:
    return Eagle3DrafterConfig(**{**SIZES, "rope_parameters": dict(PLAIN), **overrides})


def make_drafter(**overrides) -> Eagle3DrafterModel:
    """Random everything: norms are not left at ones, biases not at zeros."""
    torch.manual_seed(0)
    drafter = Eagle3DrafterModel(make_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    drafter.set_draft_to_target_ids(torch.randperm(V)[: drafter.config.draft_vocab_size].sort().values)
    return drafter


def make_target(**overrides) -> LlamaForCausalLM:
    config = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(**{**config, "vocab_size": V, "hidden_size": H, "num_hidden_layers": 8, **overrides})
    ).eval()


def bind(drafter: Eagle3DrafterModel) -> Eagle3DrafterModel:
    return drafter.bind(make_target(hidden_size=drafter.config.target_hidden_size).to(drafter.dtype))


def make_reference(drafter: Eagle3DrafterModel) -> ReferenceDrafter:
    """The reference over the same weights, with what the drafter borrows put in."""
    weights = dict(drafter.state_dict())
    target = make_target(hidden_size=drafter.config.target_hidden_size)
    weights.setdefault("embed_tokens.weight", target.model.embed_tokens.weight.detach())
    weights.setdefault("lm_head.weight", target.lm_head.weight.detach())
    return ReferenceDrafter(weights, drafter.config.to_dict())


def make_inputs(config: Eagle3DrafterConfig, length: int = T, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens [1, T] and target states [1, T, A*Ht]."""
    generator = torch.Generator().manual_seed(3)
    width = config.num_captured_states * config.target_hidden_size
    states = 2 * torch.randn(1, length, width, generator=generator, dtype=torch.float64)
    return torch.randint(V, (1, length), generator=generator), states.to(torch.float32).to(dtype)


# ---- the arithmetic ----


@pytest.mark.sampled(3)
@variants
def test_first_step_and_feedback_equal_reference(variant):
    drafter = bind(make_drafter(**variant))
    ids, states = make_inputs(drafter.config)
    reference = make_reference(drafter)
    logits, feedback = reference.step(ids[0], states=states[0], positions=list(range(T)))

    with torch.no_grad():
        out = drafter(ids, aux_hidden_states=states)
    torch.testing.assert_close(out.logits[0].double(), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.feedback[0].double(), feedback, rtol=1e-4, atol=1e-4)

    double = bind(to_double(drafter))
    with torch.no_grad():
        out = double(ids, aux_hidden_states=states.double(), use_cache=True)
        torch.testing.assert_close(out.logits[0], logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(out.feedback[0], feedback, rtol=0, atol=1e-10)

        # Four later draft steps: each feeds back, one position on, over the cache.
        last, token = feedback[-1:], int(logits[-1].argmax())
        for position in range(T, T + 4):
            target_id = drafter.to_target_ids(torch.tensor([token]))
            logits, last = reference.step(target_id, feedback=last, positions=[position])
            out = double(target_id[None], hidden_states=out.feedback[:, -1:], past_key_values=out.past_key_values)
            torch.testing.assert_close(out.logits[0], logits, rtol=0, atol=1e-10)
            torch.testing.assert_close(out.feedback[0], last, rtol=0, atol=1e-10)
            token = int(logits[0].argmax())


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_frequencies_are_the_hosts(rope):
    drafter = Eagle3DrafterModel(make_config(rope_parameters=dict(rope), head_dim=16, max_position_embeddings=512))
    frequencies, scale = inverse_frequencies(rope, 16)
    torch.testing.assert_close(drafter.rotary_emb.inv_freq.double(), frequencies, rtol=1e-5, atol=0)
    assert drafter.rotary_emb.attention_scaling == pytest.approx(scale)


def test_positions_are_the_states_not_the_tokens():
    drafter = bind(to_double(make_drafter(rope_parameters=dict(ROPES["yarn"]))))
    ids, states = make_inputs(drafter.config, dtype=torch.float64)
    positions = list(range(7, 7 + T))
    expected, _ = make_reference(drafter).step(ids[0], states=states[0], positions=positions)
    with torch.no_grad():
        logits = drafter(ids, aux_hidden_states=states, position_ids=torch.tensor([positions])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.sampled(3)
@variants
def test_stepping_over_the_cache_equals_one_shot(variant):
    drafter = bind(to_double(make_drafter(**variant)))
    ids, states = make_inputs(drafter.config, dtype=torch.float64)
    with torch.no_grad():
        whole = drafter(ids, aux_hidden_states=states)
        cache, parts = DynamicCache(), []
        for a, b in ((0, 1), (1, 5), (5, 6), (6, T)):
            parts.append(drafter(ids[:, a:b], aux_hidden_states=states[:, a:b], past_key_values=cache))
    assert whole.past_key_values is None
    assert cache.get_seq_length() == T
    torch.testing.assert_close(torch.cat([p.logits for p in parts], 1), whole.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([p.feedback for p in parts], 1), whole.feedback, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["plain", "window_two_layers", "rope_yarn", "mla_two_layers_yarn"])
def test_left_padding_changes_nothing(variant, attn_implementation):
    drafter = bind(make_drafter(**VARIANTS[variant]))
    drafter.set_attn_implementation(attn_implementation)
    ids, states = make_inputs(drafter.config)
    pad = 4
    padded_ids, padded_states = torch.full((2, T), 5), torch.full((2, *states.shape[1:]), 9.0)
    padded_ids[0], padded_states[0] = ids, states
    padded_ids[1, pad:], padded_states[1, pad:] = ids[0, :-pad], states[0, :-pad]
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        batch = drafter(padded_ids, aux_hidden_states=padded_states, attention_mask=mask, position_ids=positions)
        long = drafter(ids, aux_hidden_states=states)
        short = drafter(ids[:, :-pad], aux_hidden_states=states[:, :-pad])
    torch.testing.assert_close(batch.logits[:1], long.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.logits[1:, pad:], short.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "window", "attention_bias", "mla"])
def test_eager_and_sdpa_agree(variant):
    drafter = bind(make_drafter(**VARIANTS[variant]))
    ids, states = make_inputs(drafter.config)
    outs = []
    for attn_implementation in ("eager", "sdpa"):
        drafter.set_attn_implementation(attn_implementation)
        with torch.no_grad():
            outs.append(drafter(ids, aux_hidden_states=states).logits)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_a_4d_mask_is_used_as_it_is():
    drafter = bind(make_drafter())
    ids, states = make_inputs(drafter.config)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    with torch.no_grad():
        a = drafter(ids, aux_hidden_states=states, attention_mask=mask).logits
        b = drafter(ids, aux_hidden_states=states).logits
        cut = drafter(ids, aux_hidden_states=states, attention_mask=torch.eye(T, dtype=torch.bool)[None, None]).logits
    torch.testing.assert_close(a, b)
    assert not torch.allclose(cut, b)


@pytest.mark.parametrize("shared", [False, True])
def test_logits_to_keep(shared):
    drafter = bind(make_drafter(share_lm_head=shared, draft_vocab_size=V))
    ids, states = make_inputs(drafter.config)
    with torch.no_grad():
        all_logits = drafter(ids, aux_hidden_states=states).logits
        last = drafter(ids, aux_hidden_states=states, logits_to_keep=2)
        some = drafter(ids, aux_hidden_states=states, logits_to_keep=torch.tensor([0, 4]))
    assert last.feedback.shape == (1, T, H)
    torch.testing.assert_close(last.logits, all_logits[:, -2:])
    torch.testing.assert_close(some.logits, all_logits[:, [0, 4]])


def test_gradients_reach_every_parameter_and_nothing_of_the_target():
    drafter = make_drafter(fc_norm=True, num_hidden_layers=2).train()
    target = make_target()
    drafter.bind(target)
    ids, states = make_inputs(drafter.config)
    drafter(ids, aux_hidden_states=states).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drafter.parameters())
    assert target.lm_head.weight.grad is None


# ---- the vocabulary ----


def test_draft_ids_become_target_ids():
    drafter = make_drafter(draft_vocab_size=5)
    drafter.set_draft_to_target_ids(torch.tensor([3, 9, 10, 40, 63]))
    assert drafter.d2t.tolist() == [3, 8, 8, 37, 59]
    assert drafter.draft_to_target_ids.tolist() == [3, 9, 10, 40, 63]
    assert drafter.to_target_ids(torch.tensor([[4, 0], [1, 1]])).tolist() == [[63, 3], [9, 9]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 64], "draft id 2 to target id 64, outside"),
        ([0, -1, 2], "target id -1"),
        ([7, 2, 7], "same target id, 7"),
    ],
)
def test_a_wrong_draft_vocabulary_is_refused(ids, message):
    drafter = Eagle3DrafterModel(make_config(draft_vocab_size=3))
    with pytest.raises(CheckpointError, match=message):
        drafter.set_draft_to_target_ids(torch.tensor(ids))


# ---- bad inputs ----


def works(drafter: Eagle3DrafterModel) -> bool:
    ids, states = make_inputs(drafter.config)
    with torch.no_grad():
        return bool(drafter(ids, aux_hidden_states=states).logits.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, states: {"input_ids": ids}, "exactly one of aux_hidden_states"),
        (
            lambda ids, states: {"input_ids": ids, "aux_hidden_states": states, "hidden_states": states},
            "exactly one of aux_hidden_states",
        ),
        (
            lambda ids, states: {"input_ids": ids, "aux_hidden_states": states[..., :-1]},
            rf"aux_hidden_states must be \[B, T, {3 * H}\].*got \[1, {T}, {3 * H - 1}\]",
        ),
        (
            lambda ids, states: {"input_ids": ids, "hidden_states": states},
            rf"^hidden_states must be \[B, T, {H}\].*got \[1, {T}, {3 * H}\]",
        ),
        (
            lambda ids, states: {"input_ids": ids[:, 1:], "aux_hidden_states": states},
            rf"\[B, T\] = \[1, {T - 1}\] as in input_ids, got \[1, {T}, {3 * H}\]",
        ),
    ],
    ids=["neither", "both", "width", "states_as_feedback", "length"],
)
def test_bad_inputs_are_refused_and_the_drafter_still_works(change, message):
    drafter = bind(make_drafter())
    cache = DynamicCache()
    with pytest.raises(ValueError, match=message):
        drafter(**change(*make_inputs(drafter.config)), past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert works(drafter)


@pytest.mark.parametrize(
    ("variant", "target", "message"),
    [
        ({}, {"hidden_size": 40}, "made for a target with hidden size 32, and this one has 40"),
        ({}, {"vocab_size": 65}, "vocabulary size 64, and this one has 65"),
        ({"aux_layer_ids": [2, 4, 9]}, {}, r"boundaries \[2, 4, 9\], but the target has 8 layers"),
        (
            {"num_aux_hidden_states": 4, "aux_layer_ids": None},
            {},
            "stands for three states, but this drafter reads 4. Set config.aux_layer_ids",
        ),
        ({"target_hidden_size": 40}, {"hidden_size": 40}, "no embed_tokens of its own and cannot borrow"),
    ],
    ids=["hidden_size", "vocabulary", "layer_ids", "unknown_layer_ids", "no_embeddings"],
)
def test_bind_refuses_a_wrong_target_and_keeps_the_old_one(variant, target, message):
    drafter = make_drafter(**variant)
    with pytest.raises(ValueError, match=message):
        drafter.bind(make_target(**target))
    assert drafter.bound_aux_layer_ids is None

    drafter = bind(make_drafter())
    before = drafter.bound_aux_layer_ids
    drafter.config.aux_layer_ids = [1, 2, 30]
    with pytest.raises(ValueError, match="another target"):
        drafter.bind(make_target())
    assert drafter.bound_aux_layer_ids == before == (2, 4, 5)
    assert works(drafter)


def test_bind_refuses_an_encoder_decoder():
    sizes = {"vocab_size": V, "d_model": H, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    drafter = bind(make_drafter())
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        drafter.bind(T5ForConditionalGeneration(T5Config(**sizes)))
    assert works(drafter)


def test_bind_refuses_an_offloaded_target():
    drafter = make_drafter()
    with pytest.raises(ValueError, match="embed_tokens, which is offloaded"):
        drafter.bind(make_target().to("meta"))
    assert works(bind(drafter))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_forward_before_bind_says_so(name):
    own = {"has_own_embeddings": name == "lm_head", "share_lm_head": name == "lm_head", "draft_vocab_size": V}
    drafter = make_drafter(**own)
    ids, states = make_inputs(drafter.config)
    with pytest.raises(ValueError, match=rf"borrows {name} from its target.*drafter.bind\(target\)"):
        drafter(ids, aux_hidden_states=states)
    assert works(bind(drafter))


def test_a_drafter_with_everything_of_its_own_needs_no_target():
    assert works(make_drafter(has_own_embeddings=True))


def test_what_is_borrowed_is_neither_saved_nor_counted():
    drafter = make_drafter(share_lm_head=True, draft_vocab_size=V)
    names = set(drafter.state_dict())
    bind(drafter)
    assert set(drafter.state_dict()) == names
    assert not {"embed_tokens.weight", "lm_head.weight"} & names


def test_padded_target_vocabularies_are_cut():
    # The config states V; the tables may have more rows.
    drafter = make_drafter(share_lm_head=True, draft_vocab_size=V)
    target = make_target()
    target.resize_token_embeddings(V + 8)
    target.config.vocab_size = V
    drafter.bind(target)
    ids, states = make_inputs(drafter.config)
    assert drafter(ids, aux_hidden_states=states).logits.shape == (1, T, V)


# ---- config ----


@pytest.mark.parametrize("name", SIZES)
def test_each_size_must_be_given(name):
    with pytest.raises(TypeError, match=name):
        Eagle3DrafterConfig(**{key: value for key, value in SIZES.items() if key != name})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"logit_scale": 2.0}, r"does not know: \['logit_scale'\]"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_aux_hidden_states": 0}, "num_aux_hidden_states must be at least 1"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) must divide num_attention_heads \(4\)"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a small positive number, got 0"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"draft_vocab_size": V + 1}, r"draft_vocab_size \(65\) is larger than the target's vocab_size \(64\)"),
        ({"share_lm_head": True}, "draft_vocab_size must equal vocab_size; got 40"),
        ({"fc_norm": True, "norm_before_fc": True}, "fc_norm and norm_before_fc both norm"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"sliding_window": 0}, "sliding_window must be at least 1 or null, got 0"),
        ({"use_aux_hidden_state": False, "fc_norm": True}, "use_aux_hidden_state=False has no fc"),
        ({"use_aux_hidden_state": False, "target_hidden_size": 40}, "width 40"),
        ({"aux_layer_ids": [1, 2]}, r"\[1, 2\] names 2 states, but num_aux_hidden_states is 3"),
        ({"aux_layer_ids": [1, 3, 2]}, "ascending order"),
        ({"aux_layer_ids": [1, 2, 2]}, "ascending order"),
        ({"aux_layer_ids": [-1, 2, 3]}, "ascending order"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({**MLA, "v_head_dim": None}, "v_head_dim must be at least 1 with multi-head latent attention"),
        ({**MLA, "num_key_value_heads": 2}, "num_key_value_heads must be 4, got 2"),
        ({**MLA, "q_lora_rank": 0}, "q_lora_rank must be at least 1 or null, got 0"),
        ({**MLA, "qk_norm": True}, "No drafter has multi-head latent attention with qk_norm"),
        ({"use_aux_hidden_state": False, "norm_last_state": True}, "norm_last_state must be false"),
        ({"fc_norm": "yes"}, "fc_norm"),
    ],
)
def test_config_refuses(overrides, message):
    with pytest.raises(Exception, match=message) as caught:
        make_config(**overrides)
    assert type(caught.value).__name__ in ("ValueError", "TypeError") or "Strict" in type(caught.value).__name__


def test_config_survives_a_round_trip(tmp_path):
    config = make_config(aux_layer_ids=(2, 3, 7), sliding_window=5, rope_parameters=dict(ROPES["llama3"]))
    config.save_pretrained(tmp_path)
    again = Eagle3DrafterConfig.from_pretrained(tmp_path)
    drop = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in again.to_dict().items() if k not in drop} == {
        k: v for k, v in config.to_dict().items() if k not in drop
    }


@pytest.mark.parametrize(("num_layers", "expected"), [(8, (2, 4, 5)), (32, (2, 16, 29)), (36, (2, 18, 33))])
def test_default_layer_ids(num_layers, expected):
    assert make_config().resolve_aux_layer_ids(num_layers) == expected


def test_last_boundary_is_allowed_and_the_next_is_not():
    config = make_config(aux_layer_ids=[0, 4, 8])
    assert config.resolve_aux_layer_ids(8) == (0, 4, 8)
    with pytest.raises(ValueError, match="boundaries 0 to 7"):
        config.resolve_aux_layer_ids(7)


@pytest.mark.parametrize("v_head_dim", [5, 17])
def test_latent_keys_and_values_are_cached_with_one_width(v_head_dim):
    """Kernels that write both to a cache take one width for both."""
    drafter = bind(make_drafter(**{**MLA, "v_head_dim": v_head_dim}))
    out = drafter(torch.zeros(1, 3, dtype=torch.long), aux_hidden_states=torch.randn(1, 3, 3 * H), use_cache=True)
    layer = out.past_key_values.layers[0]
    assert layer.keys.shape == layer.values.shape == (1, 4, 3, max(6 + 8, v_head_dim))


def test_ids_read_as_outputs_are_boundaries_where_they_must_be():
    """SGLang's rule for gpt-oss: the published [24, 30, 36] of a 36-layer target cannot be outputs."""
    config = make_config(aux_layer_ids=[25, 31, 37], aux_layer_ids_from_outputs=True)
    assert config.resolve_aux_layer_ids(36) == (24, 30, 36)
    assert config.resolve_aux_layer_ids(37) == (25, 31, 37)
    with pytest.raises(ValueError, match="boundaries 0 to 36"):
        make_config(aux_layer_ids=[25, 31, 37]).resolve_aux_layer_ids(36)


def test_last_boundary_may_be_the_normed_one():
    config = make_config(aux_layer_ids=[2, 4, 8], norm_last_state=True)
    assert config.resolve_aux_layer_ids(8) == (2, 4, 9)
    with pytest.raises(ValueError, match="norms boundary 9 of this target"):
        config.resolve_aux_layer_ids(9)


def test_a_config_table_with_a_fault_is_a_checkpoint_error(tmp_path):
    make_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"head_dim": 8', '"head_dim": 7'))
    with pytest.raises(CheckpointError, match=r"(?s)config.json: .*head_dim must be even") as caught:
        Eagle3DrafterConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_fc_means_no_boundaries():
    assert make_config(use_aux_hidden_state=False).resolve_aux_layer_ids(8) == ()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [3.0] * 8,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_that_depends_on_length_is_the_hosts(rope, tmp_path):
    """Within the trained length and beyond it the angles are a host model's, also after saving and loading."""
    drafter = make_drafter(
        rope_parameters=dict(rope), head_dim=16, max_position_embeddings=16, has_own_embeddings=True
    )
    host = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=16, rope_parameters=dict(rope)
    )
    theirs = LlamaRotaryEmbedding(host)
    drafter.save_pretrained(tmp_path)
    loaded = Eagle3DrafterModel.from_pretrained(tmp_path)
    for length in (8, 48, 8):
        positions = torch.arange(length)[None]
        for one, other in zip(
            loaded.rotary_emb(torch.ones(1), positions), theirs(torch.ones(1), positions), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        ids, states = torch.zeros(1, length, dtype=torch.long), torch.randn(1, length, drafter.fc.in_features)
        with torch.no_grad():
            assert torch.equal(
                loaded(ids, aux_hidden_states=states).logits, drafter(ids, aux_hidden_states=states).logits
            )


# ---- the tensors of a config ----


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("variant", [*DRAFTERS, "mla_direct"])
def test_shapes_are_those_of_the_network(variant, biases):
    overrides = {**DRAFTERS["mla"], "q_lora_rank": None} if variant == "mla_direct" else DRAFTERS[variant]
    is_latent, has_fc = "kv_lora_rank" in overrides, overrides.get("use_aux_hidden_state", True)
    further = {"mlp_bias": biases, "attention_bias": biases and not is_latent, "fc_bias": biases and has_fc}
    config = drafter_config(**{**overrides, **further})
    found = {name: tuple(tensor.shape) for name, tensor in Eagle3DrafterModel(config).state_dict().items()}
    assert config.tensor_shapes() == found


@pytest.mark.parametrize("overrides", [{}, {"qk_norm": True}, MLA, {**MLA, "q_lora_rank": 12}], ids=str)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_writes_only_leaves_the_cache_of_a_whole_forward(overrides, num_layers):
    drafter = bind(make_drafter(num_hidden_layers=num_layers, **overrides))
    ids, states = make_inputs(drafter.config)
    with torch.no_grad():
        whole = drafter(ids, aux_hidden_states=states, use_cache=True)
        part = drafter(ids, aux_hidden_states=states, use_cache=True, writes_only=True)
    assert part.logits.shape == (1, 0, drafter.config.draft_vocab_size)
    assert part.feedback.shape[1] == 0
    for ours, theirs in zip(part.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
