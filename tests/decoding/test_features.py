"""The recorder reads the target's states at the boundaries asked for, and nowhere else."""

import pytest
import torch
from helpers.marks import slow_but
from helpers.models import NUM_LAYERS, TARGETS, count_hooks, make_oracle, make_prompt, make_target
from torch import nn

from hf_eagle3.recorder import StateRecorder, find_layers


@pytest.mark.parametrize("family", TARGETS)
def test_states_are_the_hosts_hidden_states(family):
    target, prompt = make_target(family), make_prompt(12)
    boundaries = tuple(range(NUM_LAYERS))
    with torch.no_grad(), StateRecorder(target, boundaries) as recorder:
        out = target(prompt, output_hidden_states=True)
        states = recorder.take("cpu")
    expected = torch.cat([out.hidden_states[i] for i in boundaries], dim=-1)
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", TARGETS)
def test_last_boundary_is_before_the_final_norm(family):
    target, prompt = make_target(family), make_prompt(12)
    decoder, _ = find_layers(target)
    with torch.no_grad():
        with StateRecorder(target, (NUM_LAYERS,)) as recorder:
            out = target(prompt, output_hidden_states=True)
            state = recorder.take("cpu")
        # Once more, with the final norm taken out: the host then returns what comes before it.
        norm, decoder.norm = decoder.norm, nn.Identity()
        try:
            bare = decoder(inputs_embeds=target.get_input_embeddings()(prompt)).last_hidden_state
        finally:
            decoder.norm = norm
    torch.testing.assert_close(state, bare, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoder.norm(state), out.hidden_states[-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(state, out.hidden_states[-1], atol=0.1)


@pytest.mark.parametrize("family", TARGETS)
def test_no_boundaries_means_the_final_normed_state(family):
    target, prompt = make_target(family), make_prompt(5)
    with torch.no_grad(), StateRecorder(target, ()) as recorder:
        out = target(prompt, output_hidden_states=True)
        torch.testing.assert_close(recorder.take("cpu"), out.hidden_states[-1], rtol=0, atol=0)


@pytest.mark.parametrize("family", TARGETS)
def test_the_boundary_after_the_last_is_the_normed_state(family):
    target, prompt = make_target(family), make_prompt(5)
    with torch.no_grad(), StateRecorder(target, (2, NUM_LAYERS + 1)) as recorder:
        out = target(prompt, output_hidden_states=True)
        expected = torch.cat([out.hidden_states[2], out.hidden_states[-1]], dim=-1)
        torch.testing.assert_close(recorder.take("cpu"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", TARGETS)
def test_only_the_boundaries_asked_for_are_hooked(family):
    target = make_target(family)
    _, layers = find_layers(target)
    with StateRecorder(target, (2, 4, NUM_LAYERS)):
        assert count_hooks(target) == 3
        assert [i for i, layer in enumerate(layers) if count_hooks(layer)] == [2, 4, NUM_LAYERS - 1]
    assert count_hooks(target) == 0


def test_taking_twice_says_what_is_missing(target):
    with torch.no_grad(), StateRecorder(target, (2, 4)) as recorder:
        target(make_prompt(5))
        assert recorder.take("cpu", drop_last=2).shape == (1, 3, 2 * target.config.hidden_size)
        with pytest.raises(RuntimeError, match="No target forward ran"):
            recorder.take("cpu")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize(
    "aux_layer_ids", slow_but([[0, 5, NUM_LAYERS]], [None, [0, 5, NUM_LAYERS]]), ids=["default", "ends"]
)
def test_drafter_is_fed_the_states_of_the_committed_text(family, aux_layer_ids):
    target, prompt = make_target(family), make_prompt(7)
    text = target.generate(prompt, max_new_tokens=20, do_sample=False)
    oracle = make_oracle(target, text[0], aux_layer_ids=aux_layer_ids)
    target.generate(prompt, max_new_tokens=20, do_sample=False, assistant_model=oracle)
    assert oracle.bound_aux_layer_ids == tuple(aux_layer_ids or (2, NUM_LAYERS // 2, NUM_LAYERS - 3))
    with torch.no_grad(), StateRecorder(target, oracle.bound_aux_layer_ids) as recorder:
        target(text)
        fresh = recorder.take("cpu")
    seen = oracle.seen_states
    assert seen.shape[1] > 7 + 10  # all but the last block or two
    torch.testing.assert_close(seen, fresh[:, : seen.shape[1]], rtol=1e-4, atol=1e-4)


def test_target_without_a_list_of_layers_is_refused(target):
    class Odd(type(target)):
        def get_decoder(self):
            return nn.ModuleList([nn.Identity()])

    odd = Odd(target.config)
    with pytest.raises(ValueError, match="no list of 8 decoder layers"), StateRecorder(odd, (1,)):
        pass
