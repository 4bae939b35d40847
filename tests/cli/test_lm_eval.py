"""lm-evaluation-harness with a drafter: the answers of its own model, where it is installed."""

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

import hf_eagle3.lm_eval  # noqa: F401  which registers the model
from hf_eagle3.host.attaching import find_attached

ASKED = [
    ("abcab", {"until": ["q"], "max_gen_toks": 24}),
    ("ba", {"until": [], "max_gen_toks": 5}),
    ("cabbage and bac", {"until": ["ab", "e"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}),
    ("a", {"until": "b", "max_gen_toks": 12}),
]


def make_requests():
    return [
        Instance(request_type="generate_until", doc={}, arguments=asked, idx=number)
        for number, asked in enumerate(ASKED)
    ]


@pytest.fixture
def models(folders):
    served, drafter = (str(folders / name) for name in ("target", "drafter"))
    tokenizer = AutoTokenizer.from_pretrained(served, eos_token="~", pad_token="~")
    options = {"device": "cpu", "dtype": "float32", "max_length": 64, "tokenizer": tokenizer}
    plain = HFLM(served, batch_size=1, **options)
    return plain, get_model("hf-eagle3")(served, drafter=drafter, batch_size=2, num_draft_tokens=3, **options)


def test_answers_are_those_of_the_harness_own_model(models):
    plain, drafting = models
    assert find_attached(drafting.model, {}).settings == {"num_assistant_tokens": 3}
    wanted = plain.generate_until(make_requests(), disable_tqdm=True)
    assert drafting.generate_until(make_requests(), disable_tqdm=True) == wanted
    assert any(wanted)


def test_likelihoods_are_those_of_the_harness_own_model(models):
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=("abc", " ab"), idx=0)]
    assert len({model.loglikelihood(requests, disable_tqdm=True)[0] for model in models}) == 1


def test_samples_are_drawn_and_no_requests_are_no_answers(models):
    drafting = models[1]
    args = ("abcab", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 5.0})
    requests = [Instance(request_type="generate_until", doc={}, arguments=args, idx=n) for n in range(8)]
    assert len(set(drafting.generate_until(requests, disable_tqdm=True))) > 1
    assert drafting.generate_until([], disable_tqdm=True) == []


def test_without_room_for_a_prompt_it_says_so(models):
    request = Instance(request_type="generate_until", doc={}, arguments=("a", {"max_gen_toks": 64}), idx=0)
    with pytest.raises(ValueError, match="leave room for a prompt"):
        models[1].generate_until([request], disable_tqdm=True)
