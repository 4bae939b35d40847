"""The D-Flash and DSpark network against plain tensor code in float64, and its config."""

import contextlib
import copy

import pytest
import torch
from helpers.blocks import BLOCK_DRAFTERS, block_config, make_block_drafter
from helpers.models import H, V, make_target
from helpers.reference_blocks import markov_bias, run_block
from helpers.reference_drafter import in_float64
from transformers import AutoConfig, AutoModel, DynamicCache, MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
from transformers.cache_utils import DFlashCache

from hf_eagle3.modeling import CheckpointError, DFlashDrafterConfig, DFlashDrafterModel

KINDS = list(BLOCK_DRAFTERS)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def make_exact():
    """Makes a drafter in float64, and its weights."""
    with contextlib.ExitStack() as stack:

        def make(kind, **overrides):
            drafter = make_block_drafter(copy.deepcopy(make_target("llama")).double(), kind, **overrides)
            drafter = stack.enter_context(in_float64(drafter))
            return drafter, {name: x.detach() for name, x in drafter.state_dict().items()}

        yield make


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_context", [1, 7])
def test_a_block_is_as_the_definition_says(make_exact, kind, attention, num_context):
    drafter, weights = make_exact(kind)
    drafter.set_attn_implementation(attention)
    config = drafter.config
    states = torch.randn(2, num_context, 3 * H, dtype=torch.float64)
    ids = drafter.make_block(torch.tensor([5, 9]), 6)
    assert ids.tolist() == [[5, *[61] * 5], [9, *[61] * 5]]
    with torch.no_grad():
        out = drafter(input_ids=ids, aux_hidden_states=states)
        embeddings = drafter.embed(ids)
        for b in range(2):
            wanted = run_block(weights, config, states[b], embeddings[b])
            torch.testing.assert_close(out.hidden_states[b], wanted, **CLOSE)
            torch.testing.assert_close(out.logits[b], drafter.compute_logits(wanted), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_may_hold_the_context(make_exact, kind):
    drafter, _ = make_exact(kind)
    states, ids = torch.randn(2, 9, 3 * H, dtype=torch.float64), drafter.make_block(torch.tensor([5, 9]), 5)
    with torch.no_grad():
        wanted = drafter(input_ids=ids, aux_hidden_states=states).logits
        for first in (4, 9):  # the rest comes with the block
            cache = DynamicCache()
            written = drafter(aux_hidden_states=states[:, :first], past_key_values=cache, writes_only=True)
            assert written.logits.shape == (2, 0, drafter.config.draft_vocab_size)
            assert cache.get_seq_length() == first
            rest = states[:, first:] if first < 9 else None
            out = drafter(input_ids=ids, aux_hidden_states=rest, past_key_values=cache)
            torch.testing.assert_close(out.logits, wanted, **CLOSE)
            assert cache.get_seq_length() == 14
            cache.crop(-5)
            again = drafter(input_ids=ids, past_key_values=cache)
            torch.testing.assert_close(again.logits, wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["dspark", "gated", "rnn"])
def test_what_the_tokens_before_add(make_exact, kind):
    drafter, weights = make_exact(kind)
    config = drafter.config
    outputs, logits = torch.randn(4, H, dtype=torch.float64), torch.randn(4, config.draft_vocab_size).double()
    tokens = [5, 17, 0, V - 1]
    wanted = logits + markov_bias(weights, config.markov_head_type, tokens, outputs)
    state = None
    for t, token in enumerate(tokens):
        scores, state = drafter.add_markov(logits[t], torch.tensor(token), outputs[t], state)
        torch.testing.assert_close(scores, wanted[t], **CLOSE)
    assert (state is not None) == (kind == "rnn")


def test_a_drafter_without_the_head_adds_nothing(make_exact):
    drafter, _ = make_exact("dflash")
    logits = torch.randn(3, V).double()
    scores, state = drafter.add_markov(logits, torch.tensor([1, 2, 3]), torch.randn(3, H).double(), None)
    assert scores is logits
    assert state is None


def test_confidence_reads_the_output_and_the_token_before(make_exact):
    drafter, weights = make_exact("dspark")
    outputs, tokens = torch.randn(3, H, dtype=torch.float64), torch.tensor([5, 7, 9])
    read = torch.cat([outputs, weights["markov_head.markov_w1.weight"][tokens]], dim=-1)
    wanted = read @ weights["confidence_head.proj.weight"][0] + weights["confidence_head.proj.bias"]
    torch.testing.assert_close(drafter.find_confidence(tokens, outputs), wanted, **CLOSE)
    plain, weights = make_exact("dflash", has_confidence_head=True)
    wanted = outputs @ weights["confidence_head.proj.weight"][0] + weights["confidence_head.proj.bias"]
    torch.testing.assert_close(plain.find_confidence(tokens, outputs), wanted, **CLOSE)


# ---- files ----


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    drafter = make_block_drafter(make_target("llama"), kind)
    shapes = {name: tuple(x.shape) for name, x in drafter.state_dict().items()}
    assert drafter.config.tensor_shapes() == shapes
    drafter.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is DFlashDrafterModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is DFlashDrafterConfig
    assert again.config.to_dict() == {**drafter.config.to_dict(), "_name_or_path": str(tmp_path)}
    for name, weight in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    copied = copy.deepcopy(drafter)
    assert copied.bound_aux_layer_ids == drafter.bound_aux_layer_ids
    assert not copied._borrowed


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"mask_token_id": None}, "mask_token_id must be given"),
        ({"mask_token_id": V}, "mask_token_id must be a token"),
        ({"block_size": 1}, "block_size must be from 2 to 64, got 1"),
        ({"block_size": 0, "drafts_from_root": True}, "block_size must be from 1 to 64, got 0"),
        ({"block_size": 65}, "block_size must be from 2 to 64, got 65"),
        ({"aux_layer_ids": None}, "aux_layer_ids must be given"),
        ({"layer_types": ["full_attention"]}, "layer_types must name one of"),
        ({"layer_types": ["full_attention", "conv"]}, "layer_types must name one of"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window must be given"),
        ({"markov_rank": -1}, "markov_rank must be at least 0"),
        ({"markov_head_type": "lstm"}, "markov_head_type must be one of vanilla, gated, rnn, got 'lstm'"),
        ({"has_confidence_head": True, "confidence_reads_markov": True}, "needs has_confidence_head and markov_rank"),
        ({"fc_norm": True}, "DFlashDrafterConfig got keys it does not know: .'fc_norm'."),
        ({"draft_vocab_size": 40}, "share_lm_head borrows the target's head"),
    ],
)
def test_configs_of_no_drafter(overrides, words):
    given = {**block_config().to_dict(), **overrides}
    with pytest.raises(CheckpointError, match=words):
        DFlashDrafterConfig.from_dict(given)


def test_a_missing_tensor_is_named(tmp_path):
    drafter = make_block_drafter(make_target("llama"), "dspark")
    drafter.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"markov_rank": 6', '"markov_rank": 7'))
    with pytest.raises(CheckpointError, match=r"markov_head.markov_w1.weight has shape \[64, 6\], expected \[64, 7\]"):
        AutoModel.from_pretrained(tmp_path)


def test_a_block_needs_tokens(make_exact):
    drafter, _ = make_exact("dflash")
    with pytest.raises(ValueError, match="Give input_ids, the tokens of a block"):
        drafter(aux_hidden_states=torch.zeros(1, 2, 3 * H, dtype=torch.float64))


def test_outputs_are_those_of_the_hosts_network():
    """Of Muse Glimmer's assistant, with our weights: a block behind seven positions, and one behind three more."""
    drafter = make_block_drafter(make_target("llama"))
    ours = drafter.config
    shared = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "rms_norm_eps", "rope_parameters", "hidden_act", "block_size", "mask_token_id"),
    )
    config = MuseGlimmerAssistantConfig(
        **{name: getattr(ours, name) for name in shared},
        layer_types=["full_attention"] * 2,  # its windows reach one position further than z-lab's
        target_layer_ids=[0, 3, 5],
    )
    theirs = MuseGlimmerAssistantModel(config).eval()
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    weights = {names.get(name, name): x for name, x in drafter.state_dict().items()}
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    states, cache = torch.randn(1, 10, 3 * H), DFlashCache(config=config)
    with torch.no_grad():
        for first, end in ((0, 7), (7, 10)):
            ids = drafter.make_block(torch.tensor([end]), 4)
            cache.set_previous_accepted_tokens(end - first)
            places = torch.arange(first, end + 4)[None]
            given = (drafter.embed(ids), states[:, first:end], None, places, cache)
            wanted = theirs(*given).last_hidden_state
            got = drafter(input_ids=ids, aux_hidden_states=states[:, :end]).hidden_states
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
            cache.crop(-4)
