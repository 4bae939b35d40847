"""A drafter whose right reading is known, declared wrongly in every way that is met; the doctor finds each by measuring."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.marks import slow_but, slow_rows_but
from helpers.models import DRAFTERS, NUM_LAYERS, TARGETS, V, make_drafter, make_target
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

import hf_eagle3
from hf_eagle3 import doctor
from hf_eagle3.diagnosis.readings import Score, reread
from hf_eagle3.modeling import Eagle3DrafterModel
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.step.batch import Collator
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary
from hf_eagle3.training.step.ttt import ttt

pytestmark = pytest.mark.any_release

BOUNDARIES = [2, 4, NUM_LAYERS]
NEW_TOKENS, NUM_PROMPTS = 40, 6
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_target("llama")


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    return list(torch.randint(V, (NUM_PROMPTS, 6), generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def trained(target, prompts) -> Eagle3DrafterModel:
    """A drafter that knows by heart what the target writes after `prompts`: EAGLE-3, so un-normed feedback."""
    drafter = make_drafter(target, draft_vocab_size=V, aux_layer_ids=BOUNDARIES, initializer_range=0.05).train()
    ids = torch.cat([target.generate(p[None], max_new_tokens=NEW_TOKENS, do_sample=False) for p in prompts])
    batch = Collator(4)(
        [{"input_ids": row, "loss_mask": np.arange(len(row)) >= len(prompts[0])} for row in ids.numpy()]
    )
    source = OnlineStates(target, drafter.bound_aux_layer_ids)
    states, vocabulary = source.states(batch), DraftVocabulary(drafter.draft_to_target_ids, V)
    live = (batch.depth > torch.arange(4)[:, None]).sum(1)
    method = Method(LOSSES["forward_kl"], 1 / (4 * live), torch.zeros(4))
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    for _ in range(160):
        optimizer.zero_grad()
        loss, _ = ttt(drafter, batch, states, source.head, vocabulary, method)
        loss.backward()
        optimizer.step()
    return drafter.eval()


def state(**keys: object) -> Callable[[dict, Weights], None]:
    return lambda config, _weights: config.update(keys)


def replace_embeddings(_config: dict, weights: Weights) -> None:
    weights["embed_tokens.weight"] = torch.randn(V, 32, generator=torch.Generator().manual_seed(9))


def write_ids_for_offsets(config: dict, weights: Weights) -> None:
    """A reduced vocabulary whose table holds target ids, and could as well hold offsets."""
    ids = torch.arange(0, 44, 2)  # as offsets: 0, 3, 6, ... 63
    config["draft_vocab_size"] = len(ids)
    weights["lm_head.weight"] = weights["lm_head.weight"][ids].clone()
    weights["d2t"] = ids


def both(*edits: Callable[[dict, Weights], None]) -> Callable[[dict, Weights], None]:
    return lambda config, weights: [edit(config, weights) for edit in edits]


# Layout, what is done to config.json and weights, and what the doctor must say: trait -> fields of the right reading.
FAULTS: dict[str, tuple[str, Callable[[dict, Weights], object], dict[str, dict]]] = {
    "outputs_at_the_top": (
        "vllm",
        state(eagle_aux_hidden_state_layer_ids=[i - 1 for i in BOUNDARIES], eagle_config={}),
        {"layers": {"aux_layer_ids": BOUNDARIES}},
    ),
    "specforge_norm_output": ("vllm", state(norm_output=True), {"recurrence": {"norm_output": False}}),
    "speculators_residual": (
        "speculators",
        lambda config, _: config.pop("norm_before_residual"),
        {"residual": {"norm_before_residual": False}},
    ),
    "rope_scaling": (
        "vllm",
        state(rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}, rope_scaling=None),
        {"rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
    "random_embeddings": ("vllm", replace_embeddings, {"embeddings": {"has_own_embeddings": False}}),
    "ids_for_offsets": ("vllm", write_ids_for_offsets, {"d2t": {}}),
    "last_boundary_normed": ("hf", state(norm_last_state=True), {"layers": {"norm_last_state": False}}),
    "two_at_once": (
        "vllm",
        both(state(norm_output=True), replace_embeddings),
        {"recurrence": {"norm_output": False}, "embeddings": {"has_own_embeddings": False}},
    ),
    "none": ("vllm", lambda _c, _w: None, {}),
}


def plant(trained: Eagle3DrafterModel, fault: str, folder: Path) -> Eagle3DrafterModel:
    layout, edit, _ = FAULTS[fault]
    trained.export(folder, to=layout, target="some-owner/some-target")
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    edit(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("fault", slow_but(["ids_for_offsets"], FAULTS))
def test_planted_fault_is_found_and_named(fault, trained, target, prompts, tmp_path):
    trained.bind(target)
    drafter = plant(trained, fault, tmp_path / "published")
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    found = doctor(target, drafter, prompts, max_new_tokens=NEW_TOKENS)
    wanted = FAULTS[fault][2]
    assert {reading.trait for reading in found.faults} == wanted.keys(), str(found)
    for reading in found.faults:
        assert reading.overrides.items() >= wanted[reading.trait].items()
    assert found.is_declared_best == (not wanted)
    assert ("WARNING: the declared reading is NOT the best" in str(found)) == bool(wanted)
    assert all(f"{reading.trait}: {reading.name}" in str(found) for reading in found.faults)
    assert len(found.declared.accepted) > 30 * NUM_PROMPTS
    if wanted:
        assert found.best.acceptance_length > found.declared.acceptance_length + 0.1
    after = drafter.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # Pinned: what is saved says the right thing by itself.
    found.drafter.save_pretrained(tmp_path / "pinned")
    again = doctor(target, AutoModel.from_pretrained(tmp_path / "pinned"), prompts, max_new_tokens=NEW_TOKENS)
    assert again.is_declared_best, str(again)
    assert torch.equal(again.declared.accepted, found.best.accepted)


def test_overrides_can_be_given_at_loading(trained, target, prompts, tmp_path):
    drafter = plant(trained.bind(target), "two_at_once", tmp_path)
    found = doctor(target, drafter, prompts, max_new_tokens=NEW_TOKENS)
    assert found.overrides == {"norm_output": False, "has_own_embeddings": False}
    assert any("cosine of" in note for note in found.notes)


@pytest.mark.slow
def test_agreement_is_what_generation_accepts(trained, target, prompts):
    """The unrolled measurement against the decode loop: each slot that starts a round accepts so many."""
    found = doctor(target, trained, prompts, max_new_tokens=NEW_TOKENS, depth=3)
    trained.generation_config.num_assistant_tokens = 3
    rounds, accepted, slots = 0, 0, iter(found.declared.accepted.tolist())
    for prompt in prompts:
        out = target.generate(
            prompt[None], assistant_model=trained.bind(target), max_new_tokens=NEW_TOKENS, return_dict_in_generate=True
        )
        rounds += out.speculation.rounds
        accepted += out.speculation.num_accepted
    assert abs(found.declared.acceptance_length - (1 + accepted / rounds)) < 0.35
    assert all(0 <= count <= 3 for count in slots)


def test_another_target_is_told(trained, prompts):
    torch.manual_seed(8)
    other = type(make_target("llama"))(make_target("llama").config).eval()
    other.generation_config.eos_token_id = None
    found = doctor(other, trained, prompts, max_new_tokens=NEW_TOKENS)
    assert "no reading agrees with the target" in str(found)


def test_a_rereading_shares_memory(trained):
    again = reread(trained, ())
    assert again.fc.weight.data_ptr() == trained.fc.weight.data_ptr()
    assert again.d2t.data_ptr() != trained.d2t.data_ptr()
    assert torch.equal(again.rotary_emb.inv_freq, trained.rotary_emb.inv_freq)


def test_scores():
    score = Score(torch.tensor([0, 1, 2, 2]), depth=2)
    assert score.acceptance_length == 2.25
    assert score.rates == [0.75, 2 / 3]
    assert not score.beats(score)
    many = Score(torch.tensor([1, 2] * 100), depth=2)
    assert many.beats(Score(torch.tensor([0, 1] * 100), depth=2))
    assert not many.beats(Score(torch.tensor([2, 1] * 100), depth=2))


EXAMINED = [
    *((family, "eagle31") for family in TARGETS),
    *(("qwen3", variant) for variant in DRAFTERS if variant not in ("eagle31", "peagle")),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "variant"), slow_rows_but(EXAMINED[::3], EXAMINED))
def test_every_target_and_variant_can_be_examined(family, variant, prompts):
    target = make_target(family)
    drafter = make_drafter(target, **DRAFTERS[variant])
    found = doctor(target, drafter, prompts[:2], max_new_tokens=14, depth=2)
    traits = {reading.trait for reading, _ in found.readings}
    assert traits >= {"recurrence", "residual"}
    assert ("layers" in traits) == drafter.config.use_aux_hidden_state
    assert ("embeddings" in traits) == drafter.config.has_own_embeddings
    assert all(len(score.accepted) == len(found.declared.accepted) for _, score in found.readings)


def test_parallel_drafter_is_refused(target, prompts):
    with pytest.raises(ValueError, match="mask_token_id=61: a P-EAGLE drafter cannot be examined"):
        doctor(target, make_drafter(target, **DRAFTERS["peagle"]), prompts[:1])


def test_too_little_text_is_said(trained, target, prompts):
    with pytest.raises(ValueError, match="generated no text of more than 5 tokens"):
        doctor(target, trained, prompts[:1], max_new_tokens=3)
    with pytest.raises(ValueError, match="tokenizer is needed"):
        doctor(target, trained)


def test_doctor_is_public():
    assert hf_eagle3.doctor is doctor
