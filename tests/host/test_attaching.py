"""Drafters that stay with a target."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers.batches import GREEDY, pad, prompts_of
from helpers.models import make_drafter, make_prompt, make_target
from helpers.training import make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TextGenerationPipeline

import hf_eagle3
from hf_eagle3 import attach, detach

pytestmark = pytest.mark.any_release


@pytest.fixture
def drafter(target):
    drafter = make_drafter(target)
    attach(target, drafter)
    yield drafter
    detach(target)


def decode(target, **options):
    options = {"max_new_tokens": 10, "return_dict_in_generate": True, **GREEDY, **options}
    return target.generate(**pad(prompts_of(9, 4)), **options)


def drafts(out) -> bool:
    return getattr(out, "speculation", None) is not None and out.speculation.rounds > 0


def test_calls_draft_until_it_is_detached(target, drafter):
    out = decode(target)
    assert drafts(out)
    assert drafts(decode(target, do_sample=True))
    detach(target)
    detach(target)  # nothing happens
    plain = decode(target)
    assert not drafts(plain)
    assert torch.equal(out.sequences, plain.sequences)


def test_none_decodes_plainly(target, drafter):
    assert not drafts(decode(target, assistant_model=None))
    assert drafts(decode(target, decode_loop=None))


def test_another_drafter_of_a_call_goes_first(target, drafter):
    other = make_drafter(target)
    other.generation_config.num_assistant_tokens = 5
    assert decode(target, assistant_model=other).speculation.shapes.keys() == {"chain of 5"}


@pytest.mark.parametrize(
    ("settings", "call", "shape"),
    [
        ({}, {}, "chain of 3"),
        ({"num_assistant_tokens": 2}, {}, "chain of 2"),
        ({"num_assistant_tokens": 2}, {"num_assistant_tokens": 1}, "chain of 1"),
        ({"num_assistant_tokens": 2}, {"draft_shape": [0, 0, 1, 1]}, "tree of 4, depth 2"),
        ({"draft_shape": [0, 0, 1, 1]}, {"num_assistant_tokens": 4}, "chain of 4"),
        ({"draft_shape": [0, 0, 1, 1], "decode_loop": "eager"}, {}, "tree of 4, depth 2"),
    ],
    ids=["drafters", "attached", "of_the_call", "tree_of_the_call", "chain_of_the_call", "eager"],
)
def test_settings_are_those_of_calls_that_say_nothing(settings, call, shape, target, drafter):
    attach(target, drafter, **settings)
    assert decode(target, **call).speculation.shapes.keys() == {shape}


def test_a_seed_stays_with_a_target(target, drafter):
    attach(target, drafter, seed=7)
    sampled = decode(target, do_sample=True).sequences
    assert torch.equal(sampled, decode(target, do_sample=True).sequences)
    assert torch.equal(sampled, decode(target, do_sample=True, seed=7, num_assistant_tokens=1).sequences)
    assert not torch.equal(sampled, decode(target, do_sample=True, seed=8).sequences)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2, "do_sample": False},
        {"output_hidden_states": True},
        {"cache_implementation": "static"},
    ],
    ids=["beams", "lookup", "states", "static"],
)
def test_what_a_drafter_cannot_help_is_plain_and_said_once(options, target, drafter, caplog):
    prompt = make_prompt(6)
    call = {"max_new_tokens": 8, "return_dict_in_generate": True, **GREEDY, **options}
    found = [target.generate(prompt, **call) for _ in range(2)]
    plain = target.generate(prompt, assistant_model=None, **call)
    assert all(torch.equal(out.sequences, plain.sequences) and type(out) is type(plain) for out in found)
    assert not any(drafts(out) for out in found)
    said = [r.message for r in caplog.records if "has a drafter attached, which cannot help" in r.message]
    assert len(said) <= 1  # another test may have heard it


def test_settings_of_drafts_that_are_impossible_are_errors(target, drafter):
    with pytest.raises(ValueError, match="num_beams"):
        target.generate(make_prompt(6), num_beams=2, num_assistant_tokens=2)


def test_copies_and_files_have_no_drafter(tmp_path):
    shared = make_target("llama")
    target = type(shared)(shared.config).eval()  # without hooks of calls before, which no pickle takes
    attach(target, make_drafter(target))
    copied, pickled = copy.deepcopy(target), pickle.loads(pickle.dumps(target))
    target.save_pretrained(tmp_path)
    with torch.no_grad():
        copied.lm_head.weight.neg_()  # a copy that generates by the original's weights would be wrong
    for model in (copied, pickled, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert not drafts(out := decode(model))
        assert torch.equal(out.sequences, decode(target).sequences) == (model is not copied)
    assert drafts(decode(target))


def test_who_holds_the_target_drafts(target, drafter):
    target = copy.deepcopy(target)
    attach(target, drafter)
    wrapped = get_peft_model(target, LoraConfig(target_modules=["q_proj"], r=2))
    assert drafts(decode(wrapped))
    assert drafts(decode(target))


def test_pipelines_draft(target, drafter, caplog):
    target = copy.deepcopy(target)  # a pipeline changes its config
    attach(target, drafter)
    pipe = TextGenerationPipeline(model=target, tokenizer=make_tokenizer())
    with caplog.at_level("INFO", logger="hf_eagle3.host.generate"):
        (drafted,) = pipe("a b c", max_new_tokens=9, do_sample=False)
    assert "own decode loop" in caplog.text
    detach(target)
    assert pipe("a b c", max_new_tokens=9, do_sample=False) == [drafted]


def test_nothing_is_kept_of_a_target_that_is_gone():
    target = copy.deepcopy(make_target("llama"))
    drafter = make_drafter(target)
    attach(target, drafter)
    decode(target)
    hf_eagle3.release_graphs()
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None


def test_uninstalled_calls_are_the_hosts(target, drafter, plain_host):
    assert not drafts(decode(target))


def of_another(drafter):
    drafter = copy.deepcopy(drafter)
    drafter.config.vocab_size = 99
    return drafter


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda target, drafter: attach(target, "a/drafter"), ValueError, "expected a loaded model"),
        (lambda target, drafter: attach(target, target), ValueError, "expected an EAGLE-3 drafter, got Llama"),
        (lambda target, drafter: attach(drafter, drafter), (TypeError, ValueError), "target"),
        (
            lambda target, drafter: attach(torch.nn.Linear(2, 2), drafter),
            TypeError,
            "a model that generates, got Linear",
        ),
        (lambda target, drafter: attach(target, drafter, temperature=1), ValueError, "attach.. got temperature"),
        (lambda target, drafter: attach(target, drafter, num_assistant_tokens=-1), ValueError, "num_assistant_tokens"),
        (lambda target, drafter: attach(target, drafter, draft_shape="wide"), ValueError, "draft_shape is 'wide'"),
        (lambda target, drafter: attach(target, drafter, decode_loop="fast"), ValueError, "decode_loop is 'fast'"),
        (lambda target, drafter: attach(target, drafter, seed="x"), (ValueError, TypeError), "seed"),
        (
            lambda target, drafter: attach(target, of_another(drafter)),
            ValueError,
            "made for a target with vocabulary size 99",
        ),
    ],
    ids=["name", "no_drafter", "swapped", "no_model", "unknown", "depth", "shape", "loop", "seed", "another_target"],
)
def test_what_cannot_be_attached_is_refused_at_once(make, error, says, target):
    drafter = make_drafter(target)
    with pytest.raises(error, match=says):
        make(target, drafter)
    assert not drafts(decode(target))
