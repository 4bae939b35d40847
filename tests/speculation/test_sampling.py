"""What is sampled with a drafter has the target's own distribution, exactly.

The tests enumerate: vocabularies of eight tokens, and chi-square over all continuations of two or three tokens.
"""

import functools
import itertools

import pytest
import torch
from helpers.distributions import ALPHA, TINY_V, assert_distributed_as
from helpers.marks import slow_rows_but
from helpers.models import drafter_config, randomize
from scipy.stats import chisquare
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_eagle3.drafters.draft import Draft, make_choose_sampled
from hf_eagle3.host import candidates
from hf_eagle3.modeling import Eagle3DrafterModel
from hf_eagle3.speculation import noise
from hf_eagle3.speculation.noise import GlobalNoise
from hf_eagle3.speculation.numbers import has_nan
from hf_eagle3.speculation.sampling import STATELESS_WARPERS, draw, likeliest, stateless_warpers

pytestmark = pytest.mark.any_release

PROMPT = (3, 1, 6)


@functools.cache
def tiny_models(*, is_parallel: bool = False) -> tuple[LlamaForCausalLM, Eagle3DrafterModel]:
    """A target of eight tokens, and a drafter that proposes five of them."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "vocab_size": TINY_V, "initializer_range": 0.2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    target = LlamaForCausalLM(config).eval()
    target.generation_config.eos_token_id = None
    sizes |= {"num_hidden_layers": 1, "num_aux_hidden_states": 2, "aux_layer_ids": [0, 1]}
    sizes |= {"mask_token_id": 2} if is_parallel else {}
    drafter = Eagle3DrafterModel(drafter_config(**sizes, draft_vocab_size=5))
    return target, randomize(drafter).bind(target)


@functools.cache
def exact(prompt: tuple[int, ...], length: int, warpers: tuple[LogitsProcessor, ...]) -> Tensor:
    """[V] * length, the target's distribution of the next tokens after `prompt`."""
    target, _ = tiny_models()
    prefixes = [()]
    probs = torch.ones(1)
    for _ in range(length):
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        with torch.no_grad():
            logits = target(ids).logits[:, -1].float()
        for warper in warpers:
            logits = warper(ids, logits)
        probs = (probs[:, None] * logits.softmax(-1)).flatten()
        prefixes = [(*prefix, token) for prefix in prefixes for token in range(TINY_V)]
    return probs.view([TINY_V] * length)


LAWS = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 2.5},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 3},
    "top_k_1": {"top_k": 1},
    "all": {"temperature": 0.8, "top_k": 6, "top_p": 0.85},
    "min_p": {"min_p": 0.15},
}
MAKE = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


def generate_rows(rows: int = 350, loop: str = "host", is_parallel: bool = False, **law) -> Tensor:
    """[rows, 4] tokens sampled by whole calls: one of the prefill, the others from rounds of depth 2."""
    target, drafter = tiny_models(is_parallel=is_parallel)
    torch.manual_seed(11)
    options = {"top_k": 0, **law, "do_sample": True, "max_new_tokens": 4, "num_assistant_tokens": 2}
    options["decode_loop"] = loop
    prompt = torch.tensor([PROMPT])
    if loop == "own":
        return target.generate(prompt, assistant_model=drafter, num_return_sequences=4 * rows, **options)[:, 3:]
    return torch.cat([target.generate(prompt, assistant_model=drafter, **options)[:, 3:] for _ in range(rows)])


def assert_generated_as(samples: Tensor, law: Tensor) -> None:
    """The second and third token, which were drafted: each and both together. `law` is [V, V, V]."""
    for i in (0, 1, 2):
        others = [j for j in (0, 1, 2) if j != i]
        assert_distributed_as(samples[:, i : i + 1], law.sum(others))
    assert_distributed_as(samples[:, 1:3], law.sum(0))


@pytest.mark.parametrize(
    ("law", "loop"),
    # The loops share the warpers, and in "own" all rows are one call.
    slow_rows_but(
        [("all", "host_in_order"), ("all", "own_in_order"), ("all", "own"), ("plain", "own"), ("min_p", "own")],
        [("all", "host_in_order"), *itertools.product(LAWS, ("host", "own", "own_in_order"))],
    ),
)
def test_generate_samples_the_targets_distribution(law, loop):
    warpers = tuple(MAKE[name](value) for name, value in LAWS[law].items())
    options = dict(LAWS[law])
    if loop.endswith("in_order"):  # a processor that may look at the text is asked token by token
        options["logits_processor"] = LogitsProcessorList([Unchanged()])
    rows = 120 if loop == "host_in_order" else 350  # one call a row, in Python token by token
    assert_generated_as(generate_rows(rows, loop.split("_")[0], **options), exact(PROMPT, 3, warpers))


@pytest.mark.parametrize(
    ("law", "loop"),
    slow_rows_but([("all", "own")], itertools.product(("plain", "all"), ("host", "own", "own_in_order"))),
)
def test_a_parallel_draft_samples_the_targets_distribution(law, loop):
    warpers = tuple(MAKE[name](value) for name, value in LAWS[law].items())
    options = {**LAWS[law], "is_parallel": True}
    if loop == "own_in_order":
        options["logits_processor"] = LogitsProcessorList([Unchanged()])
    assert_generated_as(generate_rows(loop=loop.split("_")[0], **options), exact(PROMPT, 3, warpers))


def test_a_parallel_draft_is_drawn_from_what_it_is_told_to_be():
    """Each token independently of the others: the law of a pair is the product."""
    _, drafter = tiny_models(is_parallel=True)
    N = 20000
    logits = torch.randn(3, 5).expand(N, 3, 5)
    choose = make_choose_sampled(lambda x: x, GlobalNoise())
    draft_ids, probs = choose(logits, range(3), 1)
    draft = Draft(drafter.to_target_ids(draft_ids[..., 0]), probs)
    assert draft.tokens.shape == (N, 3)
    torch.testing.assert_close(draft.probs, logits.softmax(-1))
    q = torch.zeros(3, TINY_V)
    q[:, drafter.draft_to_target_ids] = draft.probs[0]
    assert_distributed_as(draft.tokens, q[0][:, None, None] * q[1][:, None] * q[2])


class Unchanged(LogitsProcessor):
    """Does nothing, and does not say so."""

    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.slow
def test_generate_with_the_wrong_law_is_noticed(monkeypatch):
    """The end-to-end test above has the power to see what it is for."""
    monkeypatch.setattr(noise, "draw", lambda weights: weights.argmax(-1))
    for loop in ("host", "own"):
        with pytest.raises(AssertionError, match="p-value"):
            assert_generated_as(generate_rows(300, loop=loop), exact(PROMPT, 3, ()))


# ---- the pieces ----


def test_draw_never_takes_what_has_no_weight():
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1e-30]).expand(40_000, 5)
    counts = torch.bincount(draw(weights), minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    assert chisquare(counts[[1, 3]].numpy(), [40_000 * 2 / 3, 40_000 / 3]).pvalue > ALPHA


class PrefixDependent(LogitsProcessor):
    """A custom processor; notes the width of what it is given."""

    def __init__(self):
        self.widths = set()

    def __call__(self, input_ids, scores):
        self.widths.add(scores.shape[-1])
        return scores + 0.01 * input_ids[:, -1:]


class CountingTopK(TopKLogitsWarper):
    """A subclass of a known warper that could do anything."""


def test_only_known_stateless_warpers_shape_the_draft():
    known = [TemperatureLogitsWarper(0.5), TopKLogitsWarper(3)]
    assert stateless_warpers([PrefixDependent(), known[0], CountingTopK(2), known[1]]) == known


def test_custom_processors_never_see_draft_logits():
    target, drafter = tiny_models()
    custom = PrefixDependent()
    target.generate(
        torch.tensor([PROMPT]),
        assistant_model=drafter,
        do_sample=True,
        repetition_penalty=1.3,
        max_new_tokens=20,
        logits_processor=LogitsProcessorList([custom]),
    )
    assert custom.widths == {TINY_V}  # the drafter's five would show


def test_stateless_warpers_ignore_the_tokens():
    logits = torch.randn(2, 9)
    values = [0.7, 3, 0.8, 0.1, 0.9, 0.05, 0.05]
    for make, value in zip(STATELESS_WARPERS, values, strict=True):
        warper = make(value)
        a = warper(torch.empty(2, 0, dtype=torch.long), logits.clone())
        b = warper(torch.arange(8).view(2, 4), logits.clone())
        assert torch.equal(a, b)


def test_log_q_is_the_law_drawn_from(monkeypatch):
    """What the host is given gives back q by softmax, and nothing outside the draft vocabulary."""
    target, drafter = tiny_models()
    seen = []
    original = candidates.Eagle3CandidateGenerator._scatter_log

    def spy(self, probs, target_logits):
        log_q = original(self, probs, target_logits)
        seen.append((probs, log_q.as_subclass(Tensor)))
        return log_q

    monkeypatch.setattr(candidates.Eagle3CandidateGenerator, "_scatter_log", spy)
    options = {"do_sample": True, "top_p": 0.8, "max_new_tokens": 12, "num_assistant_tokens": 3, "decode_loop": "host"}
    target.generate(torch.tensor([PROMPT]), assistant_model=drafter, **options)
    ids = drafter.draft_to_target_ids
    outside = [v for v in range(TINY_V) if v not in ids.tolist()]
    for probs, log_q in seen:
        q = log_q.softmax(-1)
        torch.testing.assert_close(q[..., ids], probs)
        assert (q[..., outside] == 0).all()
        assert any(0 < n < TINY_V for n in (q > 0).sum(-1).flatten().tolist())  # top-p has cut


def test_sampled_calls_with_one_seed_agree():
    target, drafter = tiny_models()
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(
            target.generate(torch.tensor([PROMPT]), assistant_model=drafter, do_sample=True, max_new_tokens=20)
        )
    assert runs[0].tolist() == runs[1].tolist()


def test_enumeration_agrees_with_a_forward_by_hand():
    joint = exact(PROMPT, 2, ())
    target, _ = tiny_models()
    with torch.no_grad():
        for a, b in itertools.product(range(0, TINY_V, 3), repeat=2):
            logits = target(torch.tensor([[3, 1, 6, a, b]])).logits[0].log_softmax(-1)
            torch.testing.assert_close(joint[a, b].log(), logits[2, a] + logits[3, b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_likeliest_is_the_first_of_the_largest(dtype):
    logits = torch.randn(3, 4, 700).to(dtype)
    logits[0, 1, [5, 9, 600]] = 20.0
    logits[2, 3, 650] = torch.inf
    assert torch.equal(likeliest(logits), logits.argmax(-1))
    assert likeliest(logits)[0, 1] == 5
    close = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert likeliest(close).item() == 1  # no digits are lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", [None, (0, 0), (2, 699), (1, 350)], ids=str)
def test_one_nan_is_found(place, dtype):
    logits = torch.randn(3, 700).to(dtype)
    logits[0, 7], logits[2, 8], logits[1] = torch.inf, -torch.inf, -torch.inf
    if place is not None:
        logits[place] = torch.nan
    assert bool(has_nan(logits)) == (place is not None)
