"""What holds for every call, over loops, families, batches, padding, processors, stopping rules, dtypes and drafters.

Greedy output is the target's own: token by token in float32; in half precision up to ties, which float64 decides. The
cases are a covering design: every two levels of different factors meet in some case.
"""

import copy
import functools
import itertools
import random
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from helpers.arguments import StopOn
from helpers.batches import BatchOracle
from helpers.marks import slow_but
from helpers.models import (
    FAMILIES,
    TARGETS,
    TEXT,
    WINDOW,
    V,
    count_hooks,
    drafter_config,
    make_prompt,
    make_target,
    randomize,
)
from helpers.tokenizers import word_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper

from hf_eagle3.host.loop_choice import ASKED
from hf_eagle3.modeling import Eagle3DrafterModel

# A router that chooses between near-equal experts has ties of its own, which no bound on logits covers. In half
# precision the mixtures therefore use all of their experts.
ALL_EXPERTS = {
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**TEXT, num_local_experts=3, num_experts_per_tok=3, sliding_window=WINDOW)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=3)),
}
MAX_NEW = 20


class BanByPrefix(LogitsProcessor):
    """Somebody's own: bans a third of the tokens, by a hash of the last three."""

    def __call__(self, input_ids, scores):
        seed = input_ids[:, -3:].sum(-1, keepdim=True) + input_ids[:, -1:]  # [B, 1]
        return scores.masked_fill((torch.arange(V) * 7 + seed * 5) % 3 == 0, -torch.inf)


def allow_two_in_three(_row: int, prefix: Tensor) -> list[int]:
    """A `prefix_allowed_tokens_fn`."""
    return [token for token in range(3, V) if (token + int(prefix[-1])) % 3]


# Pads are tokens to a processor that looks at the text. That rows do not see them holds once no row may say one.
NO_PAD = {"suppress_tokens": [0]}
PROCESSORS = {
    "none": {},
    "repetition_penalty": {"repetition_penalty": 1.4, **NO_PAD},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2, **NO_PAD},
    "bad_words": {"bad_words_ids": [[7], [11, 12]], "sequence_bias": [[[5], 3.0]]},
    "min_new_tokens": {"min_new_tokens": 7},
    "prefix_allowed": {"prefix_allowed_tokens_fn": allow_two_in_three},
    "custom": {"logits_processor": LogitsProcessorList([BanByPrefix()])},
    "sampled_top_1": {"do_sample": True, "top_k": 1, "temperature": 0.7},
}
SOME = [5, 17, 23, 40, 51]  # tokens that end a row
STOPS = {
    "length": {},
    "eos": {"eos_token_id": SOME},
    "strings": {"stop_strings": [f"w{token}" for token in SOME]},
    "criterion": {"stopping_criteria": StoppingCriteriaList([StopOn(SOME)])},
    "criterion_and_eos": {"stopping_criteria": StoppingCriteriaList([StopOn(SOME[:2])]), "eos_token_id": SOME[2:]},
}
BATCHES = {"one": (9,), "one_token": (1,), "ragged": (20, 7, 1), "grows": (62, 58), "even": (8, 8)}
WRONG_SHARES = {"perfect": 0.0, "good": 0.3, "random": None}


class Case(NamedTuple):
    """One level of each factor."""

    loop: str
    family: str
    batch: str
    side: str
    processors: str
    stop: str
    dtype: str
    drafter: str
    depth: int


FACTORS = Case(
    loop=list(ASKED),
    family=["llama", "qwen3", "gemma3", "gpt_oss", *FAMILIES],
    batch=list(BATCHES),
    side=["left", "right"],
    processors=list(PROCESSORS),
    stop=list(STOPS),
    dtype=["float32", "bfloat16", "float16"],
    drafter=list(WRONG_SHARES),
    depth=[1, 3, 5],
)


def is_possible(case: Case) -> bool:
    """Whether a user can ask for this: the host's loop takes one row, and goes wrong on pads to its right."""
    return case.loop != "host" or (len(BATCHES[case.batch]) == 1 and case.side == "left")


# Factors whose levels all meet: any two, and those that decide how many draft tokens a round keeps.
MEET = [*itertools.combinations(Case._fields, 2), ("loop", "drafter", "depth")]


def meetings(levels: Case, fields: tuple[str, ...]) -> set[tuple]:
    """All ((field, level), ...) of `fields`, where each field of `levels` lists several."""
    return set(itertools.product(*[[(field, level) for level in getattr(levels, field)] for field in fields]))


def met_by(case: Case) -> set[tuple]:
    return {tuple((field, getattr(case, field)) for field in fields) for fields in MEET}


def cover(*, tries: int = 40) -> list[Case]:
    """Cases in which all levels meet that can; greedy, the same each time."""
    generator = random.Random(3)
    missing = set().union(*(meetings(FACTORS, fields) for fields in MEET))
    cases: list[Case] = []
    while missing:
        wanted = min(missing, key=str)
        guesses = [Case(*map(generator.choice, FACTORS))._replace(**dict(wanted)) for _ in range(tries)]
        guesses = [case for case in guesses if is_possible(case)]
        missing.discard(wanted)
        if guesses:
            cases.append(max(guesses, key=lambda case: len(met_by(case) & missing)))
            missing -= met_by(cases[-1])
    return cases


# Beside them, for each loop and family, text that nothing cuts short: long blocks need room.
ROOMY = [
    Case(loop, family, batch, "left", "none", "length", "float32", "good", 5)
    for loop in FACTORS.loop
    for family, batch in zip(FACTORS.family, itertools.cycle(["one", "one_token"]))
]
ROOMY += [  # rows in step keep little of a draft, and at some depth all others may be of such
    Case(loop, family, batch, "left", "none", "length", "float32", "good", depth)
    for loop, depth in itertools.product(FACTORS.loop, FACTORS.depth)
    for family, batch in zip(["llama", "qwen3", "gemma3"], itertools.cycle(["one", "one_token"]))
]
CASES = list(dict.fromkeys([*cover(), *ROOMY]))


def meeting_each_level(cases: list[Case]) -> list[Case]:
    """The first cases in which each level of each factor occurs."""
    met: set[tuple] = set()
    first = []
    for case in cases:
        levels = set(case._asdict().items())
        if not levels <= met:
            first.append(case)
        met |= levels
    return first


@pytest.fixture(autouse=True)
def _families(monkeypatch):
    for name, make in FAMILIES.items():
        monkeypatch.setitem(TARGETS, name, make)
    for name, make in ALL_EXPERTS.items():
        monkeypatch.setitem(TARGETS, f"{name}_all_experts", make)


@functools.cache
def target_of(family: str, dtype: str) -> PreTrainedModel:
    if dtype == "float32":
        return make_target(family)
    name = f"{family}_all_experts" if family in ALL_EXPERTS else family
    return copy.deepcopy(make_target(name)).to(getattr(torch, dtype))


@functools.cache
def judges_of(family: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The target in float64, and in its own dtype with eager attention: what rounding may do."""
    target = target_of(family, dtype)
    eager = copy.deepcopy(target)
    eager.set_attn_implementation("eager")
    exact = copy.deepcopy(eager).double()
    if family in ALL_EXPERTS:
        exact.set_experts_implementation("eager")  # the grouped product takes no float64
    return exact, eager


def pad(prompts: list[Tensor], side: str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], at least two pads wider than the shortest prompt."""
    T = max(min(len(p) for p in prompts) + 2, *(len(p) for p in prompts))
    rows = [[0] * (T - len(p)) + p.tolist() if side == "left" else p.tolist() + [0] * (T - len(p)) for p in prompts]
    input_ids = torch.tensor(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def prompts_of(lengths: tuple[int, ...]) -> list[Tensor]:
    """[T] each; those of one length differ."""
    return [(make_prompt(n)[0] + 5 * i) % 57 + 3 for i, n in enumerate(lengths)]


def options_of(case: Case) -> dict:
    options = {"do_sample": False, "max_new_tokens": MAX_NEW, **PROCESSORS[case.processors], **STOPS[case.stop]}
    if case.stop == "strings":
        options["tokenizer"] = word_tokenizer()
    return options


def make_mimic(target: PreTrainedModel, texts: list[list[int]], *, wrong_share: float | None) -> Eagle3DrafterModel:
    """A drafter of `texts`, prompts included; of random weights and nothing else where `wrong_share` is None."""
    torch.manual_seed(2)
    kind = Eagle3DrafterModel if wrong_share is None else BatchOracle
    drafter = randomize(kind(drafter_config(draft_vocab_size=V))).bind(target).to(target.dtype)
    if wrong_share is not None:
        drafter.tell(texts, wrong_share=wrong_share)
        drafter.is_wrong = drafter.is_wrong.roll(sum(map(sum, texts)))  # at other positions in each case
    return drafter


class Outcome(NamedTuple):
    """A case without and with a drafter."""

    prompts: list[Tensor]
    options: dict
    plain: Tensor  # [B, n] new tokens
    out: Tensor  # [B, n'] new tokens
    scores: Tensor  # [n', B, V], with a drafter
    told: object  # Speculation


@functools.cache
def run(case: Case) -> Outcome:
    target, prompts, options = target_of(case.family, case.dtype), prompts_of(BATCHES[case.batch]), options_of(case)
    left, batch = pad(prompts, "left"), pad(prompts, case.side)
    T = left["input_ids"].shape[1]
    plain = target.generate(**left, **options)[:, T:]
    texts = [[*p.tolist(), *row.tolist()] for p, row in zip(prompts, plain, strict=True)]
    drafter = make_mimic(target, texts, wrong_share=WRONG_SHARES[case.drafter])
    out = target.generate(
        **batch,
        **options,
        assistant_model=drafter,
        num_assistant_tokens=case.depth,
        decode_loop=case.loop,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert out.sequences[:, :T].tolist() == batch["input_ids"].tolist()
    assert out.speculation.loop == ASKED[case.loop]
    assert count_hooks(target) == 0
    return Outcome(prompts, options, plain, out.sequences[:, T:], torch.stack(out.scores), out.speculation)


def case_id(case: Case) -> str:
    return "-".join(map(str, case))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", slow_but(meeting_each_level(CASES), CASES), ids=case_id)
def test_output_is_the_targets(case):
    outcome = run(case)
    if case.dtype == "float32":
        assert outcome.out.tolist() == outcome.plain.tolist()
        assert_rows_are_those_alone(target_of(case.family, case.dtype), outcome)
    else:
        assert_same_up_to_ties(case, outcome)


def assert_rows_are_those_alone(target: PreTrainedModel, outcome: Outcome) -> None:
    """Each row begins with what the target says to its prompt by itself; what follows its end is another matter."""
    for prompt, row in zip(outcome.prompts, outcome.out, strict=True):
        alone = target.generate(prompt[None], **outcome.options)[0, len(prompt) :]
        assert row[: len(alone)].tolist() == alone.tolist()


WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper)


def processors_of(target: PreTrainedModel, prompt: Tensor, options: dict) -> LogitsProcessorList:
    """The host's own list for a call, without what only sampling has."""
    found = []
    options = {name: value for name, value in options.items() if name not in ("stop_strings", "tokenizer")}

    def look(_model, input_ids, *, logits_processor, **_):
        found.extend(p for p in logits_processor if not isinstance(p, WARPERS))
        return input_ids

    target.generate(prompt, **options, custom_generate=look)
    return LogitsProcessorList(found)


@torch.no_grad()
def scores_along(model: PreTrainedModel, processors: LogitsProcessorList, text: Tensor, start: int) -> Tensor:
    """[S - start, V] float64: what plain decoding would choose by at each token of `text` [S] from `start` on."""
    logits = model(text[None, :-1]).logits[0, start - 1 :].double()
    rows = [processors(text[None, : start + t], logits[t : t + 1]) for t in range(len(logits))]
    return torch.cat(rows)


def error_of(model: PreTrainedModel, exact_model: PreTrainedModel, processors: LogitsProcessorList, text: Tensor):
    """By how much `model` is off at most, in one forward over `text` [S]."""
    scores, exact = (scores_along(m, processors, text, 1) for m in (model, exact_model))
    assert torch.equal(scores.isfinite(), exact.isfinite())
    return (scores - exact)[exact.isfinite()].abs().max()


def assert_same_up_to_ties(case: Case, outcome: Outcome) -> None:
    """Rounding may swap near-equal tokens, and nothing else.

    The budget: a logit may be off by twice what it is off in one eager forward over the same texts, so two of them
    by four times. Against float64, all along the text that was said; and where that first differs from what plain
    decoding says, for the token of either.
    """
    exact_model, eager_model = judges_of(case.family, case.dtype)
    warper = PROCESSORS[case.processors].get("temperature", 1.0)
    eos = outcome.options.get("eos_token_id", [])
    processors = [processors_of(eager_model, prompt[None], outcome.options) for prompt in outcome.prompts]
    texts = [torch.cat([prompt, out]) for prompt, out in zip(outcome.prompts, outcome.out, strict=True)]
    budget = 2 * max(error_of(eager_model, exact_model, *both) for both in zip(processors, texts, strict=True))
    for b, prompt in enumerate(outcome.prompts):
        out, plain = outcome.out[b], outcome.plain[b]
        end = next((t + 1 for t, token in enumerate(out.tolist()) if token in eos), len(out))
        if "criterion_and" in case.stop:  # pads follow what the criterion ends, too
            end = next((t + 1 for t, token in enumerate(out.tolist()) if token in SOME), end)
        text = torch.cat([prompt, out[:end]])
        exact = scores_along(exact_model, processors[b], text, len(prompt))
        is_finite = exact.isfinite()
        ours = outcome.scores[:end, b].double() * warper
        both = is_finite & ours.isfinite()
        assert (ours - exact)[both].abs().max() <= budget
        behind = exact.max(-1).values - exact.gather(1, out[:end, None])[:, 0]
        assert behind.max() <= 2 * budget, (
            f"row {b}, token {int(behind.argmax())}: {float(behind.max())} below the top"
        )

        common = min(end, len(plain))
        if (differ := (out[:common] != plain[:common]).nonzero()).numel():
            t = int(differ[0])
            gaps = [float(exact[t].max() - exact[t, token]) for token in (out[t], plain[t])]
            assert max(gaps) <= 2 * budget, f"row {b}, token {t}: {gaps} below the top, budget {2 * float(budget)}"
        else:
            assert end == len(out) or plain[end:].tolist() == [0] * (len(plain) - end)
    width = min(outcome.out.shape[1], outcome.plain.shape[1])
    if torch.equal(outcome.out[:, :width], outcome.plain[:, :width]):
        assert outcome.out.shape == outcome.plain.shape


# ---- whether the cases reach what they are for: slow where that runs them all ----


def test_all_levels_meet_that_can():
    met = set().union(*map(met_by, cover()))
    apart = set().union(*(meetings(FACTORS, fields) for fields in MEET)) - met
    many_rows = [name for name, lengths in BATCHES.items() if len(lengths) > 1]
    host = ("loop", "host")
    assert apart == {(host, ("side", "right")), *((host, ("batch", name)) for name in many_rows)}


@pytest.mark.slow
@pytest.mark.parametrize("loop", ASKED)
def test_blocks_of_every_accepted_length_occur(loop):
    for depth in FACTORS.depth:
        kept = Counter()
        for case in CASES:
            if (case.loop, case.depth, case.drafter) == (loop, depth, "good"):
                told = run(case).told
                counts = [told.rounds, *told.rounds_accepting, 0]
                kept.update({k: a - b for k, (a, b) in enumerate(itertools.pairwise(counts))})
        assert all(kept[k] > 0 for k in range(depth + 1)), (depth, kept)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ASKED)
def test_each_stopping_rule_ends_rows_early(loop):
    for stop in FACTORS.stop:
        lengths = {run(case).out.shape[1] for case in CASES if (case.loop, case.stop) == (loop, stop)}
        assert (min(lengths) < MAX_NEW) == (stop != "length"), (stop, lengths)


@pytest.mark.slow
def test_random_drafters_are_hardly_ever_right():
    told = [run(case).told for case in CASES if case.drafter == "random"]
    assert 0 <= sum(t.num_accepted for t in told) < 0.2 * sum(t.num_drafted for t in told)


# ---- a row depends on its own prompt only ----


@functools.cache
def text_of(family: str, length: int) -> list[int]:
    """What the target says by itself to the prompt of `length`."""
    return make_target(family).generate(make_prompt(length), max_new_tokens=16, do_sample=False)[0, length:].tolist()


LENGTHS = [1, 2, 3, 5, 8, 9, 13, 30, 47, 61, 62, 63, 64, 65, 66]  # windows and buckets end here


@given(
    loop=st.sampled_from(list(ASKED)),
    family=st.sampled_from(["llama", "gemma3"]),
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    depth=st.integers(1, 6),
    wrong_share=st.sampled_from([0.0, 0.3, 1.0]),
    max_new=st.integers(1, 16),
    stop_after=st.lists(st.integers(0, 15), max_size=3),
    pads_rows=st.booleans(),
    by_criterion=st.booleans(),
)
@settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_row_is_what_it_is_alone(
    loop, family, lengths, side, depth, wrong_share, max_new, stop_after, pads_rows, by_criterion
):
    """Whatever stands beside it, on whichever side the pads are, wherever in a block it ends; text known beforehand."""
    target = make_target(family)
    if loop == "host":
        lengths, side = lengths[:1], "left"
    texts = [text_of(family, n) for n in lengths]
    # Rows end on tokens that stand somewhere in the first row's text, so often inside a block.
    stops = {texts[0][i] for i in stop_after}
    options = {"max_new_tokens": max_new, "do_sample": False}
    if stops and by_criterion:
        options["stopping_criteria"] = StoppingCriteriaList([StopOn(stops)])
        options["eos_token_id"] = 2 if pads_rows else None
    elif stops:
        options["eos_token_id"] = sorted(stops)
    ends = [next((t + 1 for t, token in enumerate(text[:max_new]) if token in stops), max_new) for text in texts]
    has_eos = options.get("eos_token_id") is not None
    assume_silent = [2 not in text for text in texts]  # else the end-of-sequence token itself is said
    if has_eos and not all(assume_silent):
        return
    expected = [
        [token if t < end or not has_eos else 0 for t, token in enumerate(text[: max(ends)])]
        for text, end in zip(texts, ends, strict=True)
    ]
    prompts = [make_prompt(n)[0] for n in lengths]
    drafter = make_mimic(
        target, [[*p.tolist(), *t] for p, t in zip(prompts, texts, strict=True)], wrong_share=wrong_share
    )
    batch = pad(prompts, side)
    out = target.generate(**batch, **options, assistant_model=drafter, num_assistant_tokens=depth, decode_loop=loop)
    assert out[:, batch["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("loop", slow_but(["own"], ASKED))
@pytest.mark.parametrize("family", slow_but(["llama", "gemma3", "gpt_oss"], FACTORS.family))
def test_a_call_is_what_it_is_first(family, loop):
    """Neither models nor loop keep anything of the calls before: greedy, sampled, longer, failed."""
    target = make_target(family)
    drafter = make_mimic(target, [], wrong_share=None)
    options = {"assistant_model": drafter, "decode_loop": loop, "max_new_tokens": 8, "return_dict_in_generate": True}
    weights = [parameter.clone() for model in (target, drafter) for parameter in model.parameters()]
    configs = [copy.deepcopy(m.generation_config).to_dict() for m in (target, drafter)]

    def call():
        torch.manual_seed(5)
        outs = [target.generate(make_prompt(6), do_sample=do_sample, **options) for do_sample in (False, True)]
        return [(out.sequences.tolist(), out.speculation.rounds_accepting) for out in outs]

    first = call()
    target.generate(make_prompt(70), do_sample=True, temperature=0.4, repetition_penalty=1.3, **options)
    with pytest.raises(ZeroDivisionError):
        target.generate(make_prompt(6), prefix_allowed_tokens_fn=lambda _row, _prefix: [1 // 0], **options)
    assert call() == first
    assert all(torch.equal(a, b) for a, b in zip(weights, (*target.parameters(), *drafter.parameters()), strict=True))
    assert [m.generation_config.to_dict() for m in (target, drafter)] == configs
