"""The engine of rows: settings and seeds of each row, errors of each row, and what is new in a table."""

import random
from dataclasses import replace

import pytest
import torch
from helpers.batches import GREEDY, make_oracle, pad, prompts_of
from helpers.capture import GraphsOnCpus, capture_on_cpus
from helpers.engine import run_rows
from helpers.marks import slow_but
from helpers.models import DRAFTERS, make_drafter, make_prompt, make_target
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_eagle3 import release_graphs
from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.decoding.engine import Engine, Room
from hf_eagle3.decoding.row import Row
from hf_eagle3.decoding.state import RoundConfig
from hf_eagle3.drafters.chain import CHAIN, begin, catch_up, read_pending
from hf_eagle3.drafters.draft import Draft, DrafterKind
from hf_eagle3.drafters.kinds import KINDS
from hf_eagle3.speculation.accept import RULES, accept_greedy
from hf_eagle3.speculation.noise import SeededNoise
from hf_eagle3.speculation.shape import chain
from hf_eagle3.speculation.warpers import RowSettings, RowWarper, read_settings

pytestmark = pytest.mark.any_release

CPU = torch.device("cpu")


# ---- settings and seeds of each row ----

SETTINGS = [
    RowSettings(temperature=0.5),
    RowSettings(temperature=1.7, top_k=3),
    RowSettings(top_p=0.8),
    RowSettings(),
    RowSettings(temperature=0.9, top_k=20, top_p=0.95, min_p=0.05),
]
SAMPLED = RoundConfig(shape=chain(3), do_sample=True, is_seeded=True)


def make_rows(prompts, settings=SETTINGS, seeds=(5, 6, 7, 8, 9), **options):
    options = {"max_new": 16, **options}
    return [
        Row(prompt, settings=own, seed=seed, **options)
        for prompt, own, seed in zip(prompts, settings, seeds, strict=True)
    ]


@pytest.mark.parametrize("kind", slow_but(["reduced_vocab"], ["reduced_vocab", "peagle"]))
@pytest.mark.parametrize("family", slow_but(["llama"], ["llama", "gemma3"]))
def test_a_row_samples_as_if_alone(family, kind):
    """Whatever the settings and seeds of the others are: from a seed comes one text."""
    target, prompts = make_target(family), prompts_of(5, 9, 3, 12, 7)
    drafter, rows = make_drafter(target, **DRAFTERS[kind]), make_rows(prompts)
    run_rows(target, drafter, prompts, rows, SAMPLED)
    for prompt, row, own, seed in zip(prompts, rows, SETTINGS, (5, 6, 7, 8, 9), strict=True):
        (alone,) = make_rows([prompt], [own], [seed])
        run_rows(target, drafter, [prompt], [alone], SAMPLED)
        assert alone.text == row.text
        (other,) = make_rows([prompt], [own], [seed + 100])
        run_rows(target, drafter, [prompt], [other], SAMPLED)
        assert other.text != row.text


def test_one_set_of_graphs_serves_rows_of_any_settings(target):
    graphs, drafter, prompts = GraphsOnCpus(), make_drafter(target), prompts_of(5, 9, 3)
    release_graphs()
    for shift in range(3):
        settings = [
            RowSettings(temperature=0.4 + 0.5 * b + shift, top_k=4 + b + shift, top_p=0.9 - 0.1 * b, min_p=0.01 * b)
            for b in range(3)
        ]
        seeds = (1 + shift, 2, 3 + shift)
        rows, eager = (make_rows(prompts, settings, seeds) for _ in range(2))
        how = run_rows(target, drafter, prompts, rows, SAMPLED, capturer=graphs)
        assert how.startswith("captured" if shift == 0 else "replayed")
        run_rows(target, drafter, prompts, eager, SAMPLED, is_eager=True)
        assert [row.text for row in rows] == [row.text for row in eager]
    assert graphs.counts.captured == 3
    release_graphs()


def test_rows_whose_text_is_looked_at_draw_by_their_seeds_too(target):
    class Looks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    prompts, drafter = prompts_of(5, 9, 3), make_drafter(target)
    config = RoundConfig(shape=chain(3), do_sample=True, is_seeded=True, in_order=True)
    options = {"settings": [RowSettings()] * 3, "processors": LogitsProcessorList([Looks()])}
    rows = make_rows(prompts, seeds=(5, 6, 7), **options)
    run_rows(target, drafter, prompts, rows, config)
    for b in range(3):
        options["settings"] = [RowSettings()]
        (alone,) = make_rows(prompts[b : b + 1], seeds=(5 + b,), **options)
        run_rows(target, drafter, prompts[b : b + 1], [alone], config)
        assert alone.text == rows[b].text


@pytest.mark.parametrize(
    "warpers",
    [
        [TemperatureLogitsWarper(0.7)],
        [TopKLogitsWarper(5)],
        [TopKLogitsWarper(99)],
        [TopPLogitsWarper(0.8)],
        [TopPLogitsWarper(1.0)],
        [MinPLogitsWarper(0.1)],
        [TemperatureLogitsWarper(1.3), TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
        [TemperatureLogitsWarper(1.3), TypicalLogitsWarper(0.9)],
        [TopKLogitsWarper(9), TemperatureLogitsWarper(1.3)],  # not in the host's order
        [TopPLogitsWarper(0.7, min_tokens_to_keep=3)],
        [TopKLogitsWarper(2, min_tokens_to_keep=4)],
        [TopKLogitsWarper(3, filter_value=-1e4)],
    ],
    ids=lambda warpers: "-".join(type(w).__name__.removesuffix("LogitsWarper") for w in warpers),
)
def test_settings_of_a_row_warp_as_the_hosts_warpers(warpers):
    """To the bit, beside rows of other settings."""
    scores = 3 * torch.randn(3, 4, 30)
    scores[0, 0, :5] = scores[0, 0, 5]  # ties
    expected = scores.flatten(0, 1)
    for warper in warpers:
        expected = warper(torch.empty(12, 0, dtype=torch.long), expected)
    settings, further = read_settings(warpers)
    warper = RowWarper([settings] * 3, further, CPU)
    assert torch.equal(warper(scores), expected.view_as(scores))
    others = [RowSettings(temperature=2.0, top_k=2), RowSettings(top_p=0.3, min_p=0.5)]
    mixed = RowWarper([settings, *others], further, CPU)
    assert torch.equal(mixed(scores)[0], expected.view_as(scores)[0])


def test_numbers_of_a_seed_are_spread_evenly():
    """Of many rows, tokens and purposes; a generator that repeated itself would fail by far."""
    noise = SeededNoise(torch.arange(500), torch.arange(500) % 7)
    numbers = torch.cat([noise.uniform(torch.zeros(500, 8), purpose).flatten() for purpose in (0, 1, 2, 1 << 20)])
    assert len(numbers.unique()) > 0.99 * len(numbers)
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert ((counts - len(numbers) / 20).abs() < 5 * (len(numbers) / 20) ** 0.5).all()
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0]).expand(500, 8, 4)
    drawn = noise.draw(weights, 0).flatten()
    assert set(drawn.tolist()) == {1, 2}
    assert abs(float((drawn == 2).float().mean()) - 0.75) < 0.05


# ---- errors of a row are its own ----


class Fails(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        if input_ids.shape[1] > 11:
            raise LookupError("no more")
        return torch.zeros(1, dtype=torch.bool)


class FailsToo(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 11:
            raise LookupError("no more")
        return scores


@pytest.mark.parametrize("what", ["criteria", "processors"])
def test_what_fails_ends_its_own_row(target, what):
    prompts, drafter = prompts_of(5, 9, 3), make_drafter(target)
    config = RoundConfig(shape=chain(3), in_order=what == "processors")
    failing = {"criteria": [Fails()]} if what == "criteria" else {"processors": LogitsProcessorList([FailsToo()])}
    rows = [Row(prompt, max_new=12, **(failing if b == 1 else {})) for b, prompt in enumerate(prompts)]
    run_rows(target, drafter, prompts, rows, config)
    assert isinstance(rows[1].error, LookupError)
    assert len(rows[1].text) <= 3
    for prompt, row in ((prompts[0], rows[0]), (prompts[2], rows[2])):
        assert row.error is None
        plain = target.generate(prompt, max_new_tokens=12, **GREEDY)
        assert row.text == plain[0, prompt.shape[1] :].tolist()


def test_a_released_row_leaves_the_others(target):
    prompts, drafter = prompts_of(5, 9), make_drafter(target)
    rows = [Row(prompt, max_new=12) for prompt in prompts]
    batch = pad(prompts)
    with torch.no_grad(), Engine(target, drafter, RoundConfig(shape=chain(2)), Room(2, 9, 12)) as engine:
        inputs = {"attention_mask": batch["attention_mask"], CACHE_NAME: DynamicCache(config=target.config)}
        mask = batch["attention_mask"].bool()
        inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        engine.admit(rows, engine.prefill(batch["input_ids"], mask, inputs, GenerationConfig()))
        engine.round()
        engine.release(rows[0])
        length = len(rows[0].text)
        while rows[1].is_live:
            engine.round()
        assert engine.rows == rows[1:]
    assert len(rows[0].text) == length < 12
    plain = target.generate(prompts[1], max_new_tokens=12, **GREEDY)
    assert rows[1].text == plain[0, 9:].tolist()


# ---- a new kind, shape and rule are a row each ----


def make_branching_kind(drafter, seed: int = 3) -> DrafterKind:
    """Proposes for any shape: under each node the token that follows there, on one of its children, and others."""
    generator = random.Random(seed)

    def propose(model, memory, shape, choose):
        positions = memory.first + memory.start + memory.num_pending  # of the root
        roots = memory.tokens.gather(1, memory.num_pending[:, None] - 1)[:, 0]
        tokens = []
        for b in range(len(roots)):
            nodes, depths, right = [int(roots[b])], [0], set()
            for parent in shape.parents:
                follows = drafter.follow[int(positions[b]) + depths[parent], nodes[parent]]
                is_right = parent not in right and generator.random() < 0.6
                right |= {parent} if is_right else set()
                nodes.append(int(follows) if is_right else (int(follows) + 1 + len(nodes)) % 60)
                depths.append(depths[parent] + 1)
            tokens.append(nodes[1:])
        return Draft(torch.tensor(tokens), None)

    return DrafterKind("toy", lambda _: True, begin, catch_up, read_pending, propose, lambda shape: 0)


TREES = {
    "wide": (0, 0, 0),
    "deep": (0, 0, 1, 1, 2, 2, 3, 4, 7),
    "chain": (0, 1, 2),
}


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("tree", slow_but(["deep"], TREES))
@pytest.mark.parametrize(
    "family", slow_but(["llama", "gemma3"], ["llama", "gemma3", "gpt_oss", "deepseek_v3", "qwen_vlm"])
)
def test_a_shape_and_a_kind_are_rows_of_their_tables(family, tree, captured, monkeypatch):
    """A tree of drafts through `generate`: masks, positions, windows, the path in the cache and in the states."""
    target, batch = make_target(family), pad(prompts_of(9, 4, 14))
    options = {"max_new_tokens": 20, **GREEDY}
    plain = target.generate(**batch, **options)
    oracle = make_oracle(target, plain, batch)
    KINDS.insert(0, make_branching_kind(oracle))
    graphs = capture_on_cpus(monkeypatch) if captured else None
    try:
        out = target.generate(
            **batch, assistant_model=oracle, draft_shape=TREES[tree], return_dict_in_generate=True, **options
        )
    finally:
        KINDS.pop(0)
        release_graphs()
    assert KINDS[-1] is CHAIN
    assert out.sequences.tolist() == plain.tolist()
    assert out.speculation.num_accepted > 0
    assert graphs is None or out.speculation.graphs.startswith("captured")
    whole = target.generate(**batch, return_dict_in_generate=True, **options)
    for ours, theirs in zip(out[CACHE_NAME].layers, whole[CACHE_NAME].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)


def test_a_rule_is_a_row_of_its_table(target, monkeypatch):
    """One that keeps at most one draft token, which is lossless, too."""

    def judge_one(proposal, scores, judging):
        return accept_greedy(proposal.tokens[:, :1], scores[:, :2])

    prompt = make_prompt(7)
    plain = target.generate(prompt, max_new_tokens=15, **GREEDY)
    oracle = make_oracle(target, plain, pad([prompt]), wrong_share=0.0)
    row = Row(prompt, max_new=15)
    monkeypatch.setitem(RULES, "greedy", replace(RULES["greedy"], judge=judge_one))
    run_rows(target, oracle, [prompt], [row], RoundConfig(shape=chain(3)))
    assert row.text == plain[0, 7:].tolist()
