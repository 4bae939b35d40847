"""The doctor on drafters of blocks: what it counts is what a block drafts, and planted faults are found."""

import copy

import pytest
import torch
from helpers.blocks import BLOCK_DRAFTERS, make_block_drafter
from helpers.marks import slow_but
from helpers.models import V, make_target
from torch import Tensor
from torch.nn import functional as F

from hf_eagle3 import doctor
from hf_eagle3.diagnosis.readings import change, record, reread, score
from hf_eagle3.diagnosis.traits import Reading, list_readings
from hf_eagle3.drafters import block_unroll
from hf_eagle3.drafters.block_unroll import unroll_blocks

pytestmark = pytest.mark.any_release

PROMPTS = list(torch.randint(V, (6, 6), generator=torch.Generator().manual_seed(3)))
DEPTH, NEW_TOKENS = 4, 40


@pytest.fixture(scope="module")
def target():
    return make_target("llama")


def draft_one(drafter, ids: Tensor, aux: Tensor, slot: int, depth: int) -> list[int]:
    """The tokens of the block at `slot`, by its own tokens, run by itself."""
    config = drafter.config
    block = drafter.make_block(ids[0, slot + 1][None], config.block_size)
    out = drafter(input_ids=block, aux_hidden_states=aux[:, : slot + 1])
    before, state, tokens = ids[0, slot + 1][None], None, []
    for t in range(config.block_size - config.max_draft_depth, config.block_size)[:depth]:
        logits, state = drafter.add_markov(out.logits[:, t], before, out.hidden_states[:, t], state)
        before = drafter.to_target_ids(logits.argmax(-1))
        tokens.append(int(before))
    return tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", BLOCK_DRAFTERS)
@torch.no_grad()
def test_it_counts_what_each_block_drafts(target, kind, attention, monkeypatch):
    monkeypatch.setattr(block_unroll, "MOST_TOKENS", 40)  # five blocks at once
    drafter = make_block_drafter(target, kind)
    drafter.set_attn_implementation(attention)
    texts = [record(target, prompt[None], 16, list(drafter.bound_aux_layer_ids)) for prompt in PROMPTS[:2]]
    wanted = []
    for ids, _, states in texts:
        # As if the target had written what is drafted: random drafters agree with no other text.
        aux = torch.cat([states[i] for i in drafter.bound_aux_layer_ids], dim=-1)
        first = len(PROMPTS[0]) - 1
        ids[0, first + 2 : first + 5] = torch.tensor(draft_one(drafter, ids, aux, first, DEPTH)[:3])
        for slot in range(first, ids.shape[1] - DEPTH - 1):
            drafted = draft_one(drafter, ids, aux, slot, DEPTH)
            told = ids[0, slot + 2 : slot + 2 + DEPTH].tolist()
            wanted.append(next((i for i in range(DEPTH) if drafted[i] != told[i]), DEPTH))
    assert max(wanted) >= 3
    assert score(drafter, texts, DEPTH).accepted.tolist() == wanted


@pytest.fixture(scope="module")
def trained(target):
    """A drafter that knows by heart what the target writes after the prompts; its last boundary is not the top."""
    drafter = make_block_drafter(target, "dflash", aux_layer_ids=[1, 3, 4], initializer_range=0.05).train()
    texts = [record(target, prompt[None], NEW_TOKENS, list(drafter.bound_aux_layer_ids)) for prompt in PROMPTS]
    optimizer = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=5e-3)
    k = drafter.config.max_draft_depth
    for _ in range(70):
        optimizer.zero_grad()
        for ids, _, states in texts:
            slots = torch.arange(len(PROMPTS[0]) - 1, ids.shape[1] - k - 1)
            aux = torch.cat([states[i] for i in drafter.bound_aux_layer_ids], dim=-1).clone()
            logits = drafter.compute_logits(unroll_blocks(drafter, ids.clone(), aux, slots))  # [L, k, V]
            labels = ids[0, slots[:, None] + 2 + torch.arange(k)].clone()
            F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
    return drafter.eval()


FAULTS = {
    "none": {},
    "layers": {"aux_layer_ids": [2, 4, 5]},
    "proposes": {"drafts_from_root": True},
    "sees": {"is_causal": True},
    "mask token": {"mask_token_id": 7},
    "block size": {"block_size": 4},
}


@pytest.mark.parametrize("fault", slow_but(["none", "layers"], FAULTS))
def test_planted_fault_is_found_and_named(fault, trained, target):
    right = copy.deepcopy(trained.config)
    if fault == "mask token":  # what it was trained with must be among what is tried
        right_target = copy.deepcopy(target)
        right_target.config.pad_token_id = right.mask_token_id
    else:
        right_target = target
    drafter = reread(trained, [Reading(fault, "planted", FAULTS[fault])])
    found = doctor(right_target, drafter, PROMPTS, max_new_tokens=NEW_TOKENS, depth=3)
    assert {reading.trait for reading in found.faults} == ({fault} if FAULTS[fault] else set()), str(found)
    for name in FAULTS[fault]:
        assert found.overrides[name] == getattr(right, name)
    assert found.best.acceptance_length > 2.5


def test_every_trait_is_tried(target):
    for kind, fields in BLOCK_DRAFTERS.items():
        drafter = make_block_drafter(target, kind)
        found = list_readings(drafter, target)
        traits = {reading.trait for reading in found}
        assert traits >= {"layers", "proposes", "sees", "mask token"}
        assert ("block size" in traits) == (not fields.get("is_causal", False))
        assert ("embeddings" in traits) == drafter.config.has_own_embeddings
        for reading in found:
            assert reading.overrides
            change(drafter.config, reading.overrides)  # a config that is none is refused


def test_no_deeper_than_a_block(target):
    found = doctor(target, make_block_drafter(target, block_size=3), PROMPTS[:1], max_new_tokens=12)
    assert found.declared.depth == 2
    assert any(reading.trait == "proposes" for reading, _ in found.readings)
