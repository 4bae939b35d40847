"""What `drift` measures, against chains drafted one at a time."""

import math

import pytest
import torch
from helpers.blocks import make_block_drafter
from helpers.models import DRAFTERS, make_drafter, make_prompt, make_target
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AttentionInterface, DynamicCache, PreTrainedTokenizerFast

from hf_eagle3 import drift
from hf_eagle3.diagnosis.chains import SETS, draft_everywhere, find_live
from hf_eagle3.diagnosis.drift import Conditions, Curve, lengthen, render_otherwise
from hf_eagle3.diagnosis.readings import record, score

PROMPTS = [make_prompt(7)[0], make_prompt(12)[0]]
NOTHING = Conditions(noise=(), windows=(), templates=False)
KINDS = {
    "eagle31": DRAFTERS["eagle31"],
    "window": {**DRAFTERS["two_layers"], "sliding_window": 9},
    "no_fc": DRAFTERS["no_fc"],
    "mla": DRAFTERS["mla"],
}
DEPTH = 4
_seen: list[torch.Tensor] = []


def weighing(module, query, key, value, attention_mask, *, scaling, **kwargs):
    """Plain attention of one chain, whose last query's weights [heads, S] are kept."""
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ keys.mT * scaling
    T, S = scores.shape[-2:]
    places = torch.arange(S - T, S)[:, None]
    hidden = torch.arange(S) > places
    if module.config.sliding_window is not None:
        hidden |= torch.arange(S) <= places - module.config.sliding_window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    _seen.append(weights[0, :, -1])
    return (weights @ values).transpose(1, 2), None


def chain_at(drafter, text, slot, depth):
    """Tokens, masses [depth, 4], entropies and RMS of what is fed in, of one chain drafted by itself behind a slot."""
    aux = torch.cat([text.states[i] for i in drafter.bound_aux_layer_ids or [0]], dim=-1)[:, : slot + 1]
    P, cache = int((~text.is_generated).sum()), DynamicCache()
    ids, given = text.ids[:, 1 : slot + 2], {"aux_hidden_states": aux}
    rms, rows = [drafter.fuse(aux)[0, -1].square().mean().sqrt()], []
    for t in range(depth):
        _seen.clear()
        places = torch.arange(slot + 1)[None] if not t else torch.tensor([[slot + t]])
        out = drafter(ids, position_ids=places, past_key_values=cache, **given)
        weights = torch.stack(_seen).mean(0)  # of the layers, [heads, S]
        mean = weights.mean(0)
        parts = [mean[:1], mean[1:P], mean[P : slot + 1], mean[slot + 1 :]]
        entropy = torch.stack([torch.special.entr(w).sum(-1).mean() for w in _seen]).mean()
        token = int(drafter.to_target_ids(out.logits[0, -1].argmax()))
        rows.append((token, torch.stack([part.sum() for part in parts]), entropy))
        state = out.feedback[:, -1:]
        rms.append(state.square().mean().sqrt())
        ids, given = torch.tensor([[token]]), {"hidden_states": state}
    return rows, rms


@pytest.fixture(scope="module", autouse=True)
def registered():
    AttentionInterface.register("weighing", weighing)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_chains_are_those_drafted_one_at_a_time(kind):
    target = make_target("llama")
    drafter = make_drafter(target, **KINDS[kind])
    text = record(target, PROMPTS[0][None], 14, list(drafter.bound_aux_layer_ids or ()))
    own = drafter.config._attn_implementation
    steps = list(draft_everywhere(drafter, text, DEPTH, window=drafter.config.sliding_window))
    assert drafter.config._attn_implementation == own
    drafter.config._attn_implementation = "weighing"
    for slot in find_live(text, DEPTH).nonzero()[:, 0].tolist():
        rows, rms = chain_at(drafter, text, slot, DEPTH)
        fed = rms[:-1]  # the last output is fed to no step
        for step, (token, mass, entropy), size in zip(steps, rows, fed, strict=True):
            assert int(step.tokens[slot]) == token
            torch.testing.assert_close(step.watch.mass[slot] / step.watch.num_layers, mass, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step.watch.entropy[slot] / step.watch.num_layers, entropy, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step.fed[slot].square().mean().sqrt(), size, rtol=1e-4, atol=1e-5)
    drafter.config._attn_implementation = own


@pytest.mark.parametrize("kind", KINDS)
def test_it_accepts_what_the_doctor_counts(kind):
    target = make_target("llama")
    drafter = make_drafter(target, **KINDS[kind])
    found = drift(target, drafter, PROMPTS, max_new_tokens=16, depth=DEPTH, conditions=NOTHING)
    texts = [record(target, prompt[None], 16, list(drafter.bound_aux_layer_ids or ())) for prompt in PROMPTS]
    counted = score(drafter, texts, DEPTH)
    assert found.base.accepted.tolist() == counted.accepted.tolist()
    assert found.base.acceptance_length == counted.acceptance_length
    assert str(found.base.rates) == str(counted.rates)  # NaN where no chain came so far
    for row in found.depths:
        assert math.isclose(sum(row.mass.values()), 1, rel_tol=1e-5)
        assert list(row.mass) == list(SETS)
    assert found.depths[0].mass["own"] == found.depths[0].uniform == 0
    assert 0 < found.depths[1].uniform < found.depths[3].uniform < 0.5
    assert list(found.streams)[-1] == "feature"


def test_conditions_are_measured_one_by_one():
    target = make_target("llama")
    drafter, prompts = make_drafter(target, **DRAFTERS["eagle31"]), PROMPTS
    said = []
    found = drift(
        target,
        drafter,
        prompts,
        max_new_tokens=16,
        depth=3,
        conditions=Conditions(noise=(1e-9, 5.0), windows=(3, 500), contexts=(40,)),
        on_step=lambda *step: said.append(step),
    )
    assert {kind: [c.name for c in curves] for kind, curves in found.curves.items()} == {
        "noise": ["1e-09 of the RMS", "5 of the RMS"],
        "window": ["3 positions", "500 positions"],
        "context": ["40 tokens"],
    }
    (little, much), (narrow, wide), (longer,) = found.curves.values()
    assert little.accepted.tolist() == wide.accepted.tolist() == found.base.accepted.tolist()
    assert len(much.accepted) == len(longer.accepted) == len(found.base.accepted)
    other = make_drafter(target, **DRAFTERS["eagle31"], sliding_window=3)
    alone = drift(target, other, prompts, max_new_tokens=16, depth=3, conditions=NOTHING)
    assert narrow.accepted.tolist() == alone.base.accepted.tolist()
    assert {what for what, _, _ in said} >= {
        "The target answers",
        "With another noise: 5 of the RMS",
        "Answers behind 40 tokens",
    }
    data = found.to_dict()
    assert data["num_chains"] == len(found.base.accepted)
    assert [row["depth"] for row in data["depths"]] == [1, 2, 3]
    assert len(found.rows) == 3
    assert len(found.head) == len(found.rows[0])
    assert [row[0] for row in found.curve_rows][:2] == ["as it is", "noise: 1e-09 of the RMS"]


def test_noise_is_as_large_as_it_says():
    target = make_target("llama")
    drafter = make_drafter(target, **DRAFTERS["eagle31"])
    text = record(target, PROMPTS[1][None], 40, list(drafter.bound_aux_layer_ids))
    plain, noisy = (list(draft_everywhere(drafter, text, 2, window=None, noise=x)) for x in (0.0, 0.5))
    added = noisy[1].fed - plain[1].fed
    share = added.square().mean().sqrt() / plain[1].fed.square().mean().sqrt()
    assert 0.45 < share < 0.55


def test_prompts_are_lengthened_by_other_texts():
    target = make_target("llama")
    drafter = make_drafter(target)
    texts = [record(target, prompt[None], 5, list(drafter.bound_aux_layer_ids)) for prompt in PROMPTS]
    prompts = [prompt[None] for prompt in PROMPTS]
    first, second = lengthen(prompts, texts, 30)
    assert first.shape == second.shape == (1, 30)
    assert first[0, -7:].tolist() == PROMPTS[0].tolist()
    assert first[0, :17].tolist() == texts[1].ids[0].tolist()
    assert lengthen(prompts, texts, 5)[0].tolist() == [PROMPTS[0].tolist()]


def test_other_renderings_have_other_beginnings():
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
    tokenizer.chat_template = "w1 {% for m in messages %}{{ m['content'] }}{% endfor %} w9"
    tokenizer.bos_token = "w1"
    found = {name: ids[0].tolist() for name, ids in render_otherwise("w5 w6", tokenizer).items()}
    assert found == {"raw text": [5, 6], "template, no BOS": [5, 6, 9], "raw text, and BOS": [1, 5, 6]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": 1}, "num_draft_tokens must be at least 2, got 1"),
        ({"conditions": Conditions(noise=(0.0,))}, "noise is a share of the state's RMS, above 0; got 0.0"),
        ({"conditions": Conditions(windows=(0,))}, "windows and contexts are numbers of tokens, at least 1; got 0"),
        (
            {"conditions": Conditions(contexts=(300,))},
            "contexts has 300 tokens, and LlamaForCausalLM knows 256 positions",
        ),
        ({"max_new_tokens": 3}, "generated no text of more than 8 tokens"),
    ],
)
def test_what_cannot_be_measured_is_said(options, says):
    target = make_target("llama")
    with pytest.raises(ValueError, match=says):
        drift(target, make_drafter(target), PROMPTS, **options)


def test_drafters_without_a_chain_are_refused():
    target = make_target("llama")
    with pytest.raises(ValueError, match=r"drafts in one forward \(P-EAGLE\): there is no chain"):
        drift(target, make_drafter(target, **DRAFTERS["peagle"]), PROMPTS)
    with pytest.raises(ValueError, match=r"DFlashDrafterModel drafts in one forward \(D-Flash\): there is no chain"):
        drift(target, make_block_drafter(target), PROMPTS)


def test_a_curve_of_nothing_has_no_numbers():
    curve = Curve("empty", torch.zeros(0, dtype=torch.long), 2)
    assert math.isnan(curve.acceptance_length)
    assert all(map(math.isnan, curve.rates))
