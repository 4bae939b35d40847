"""Rounds whose shape changes: the same text, and drafts as good as if it had not."""

import dataclasses
import itertools
import random

import pytest
import torch
from helpers.batches import GREEDY, make_oracle, pad, prompts_of
from helpers.capture import capture_on_cpus
from helpers.marks import slow_rows_but
from helpers.models import make_drafter, make_prompt, make_target

from hf_eagle3.decoding import choosing
from hf_eagle3.drafters import kinds
from hf_eagle3.drafters.kinds import find_kind
from hf_eagle3.host import generate
from hf_eagle3.host.shapes import list_candidates
from hf_eagle3.speculation.costs import Chooser
from hf_eagle3.speculation.shape import NONE, PATIENCE, Shapes, chain

pytestmark = pytest.mark.any_release

FAMILIES = ["llama", "gemma3", "gpt_oss", "deepseek_v3", "qwen_vlm"]


class AtRandom(Chooser):
    """Takes another shape in each round, or stays without a draft for long."""

    generator = random.Random(5)

    def begin(self, num_rows):
        return self.choose(num_rows)

    def choose(self, num_rows, *, can_try=True):
        if self.shapes.is_fixed:
            return self.current
        number = sum(self.rounds.values())
        self.current = NONE if 6 <= number < 6 + 2 * PATIENCE + 3 else self.generator.choice(self.shapes.shapes)
        return self.current


@pytest.fixture
def at_random(monkeypatch):
    def make(*args, **kwargs):
        chooser = choosing.make_chooser(*args, **kwargs)
        AtRandom.generator = random.Random(5)
        return AtRandom(chooser.shapes, chooser.costs, chooser.rates, chooser.current)

    monkeypatch.setattr(generate, "CHOOSER", make)


@pytest.fixture
def graphs(captured, monkeypatch):
    """Counts of captured rounds, if they are to be captured."""
    return capture_on_cpus(monkeypatch) if captured else None


@pytest.fixture
def proposals(graphs, monkeypatch):
    """What was drafted, [row, root's position] -> tokens; what is drafted while rounds are recorded is junk."""
    found = {}

    def watch(kind):
        def propose(drafter, memory, shape, choose):
            draft = kind.propose(drafter, memory, shape, choose)
            roots = memory.first + memory.start + memory.num_pending
            for row, (root, tokens) in enumerate(zip(roots.tolist(), draft.tokens.tolist(), strict=True)):
                if shape.is_chain and (graphs is None or graphs.is_replaying):
                    found[row, root] = tokens
            return draft

        return dataclasses.replace(kind, propose=propose)

    monkeypatch.setattr(kinds, "KINDS", [watch(kind) for kind in kinds.KINDS])
    return found


def decode(target, drafter, batch, **options):
    options = {"max_new_tokens": 70, "return_dict_in_generate": True, **GREEDY, **options}
    return target.generate(**batch, assistant_model=drafter, **options)


@pytest.mark.parametrize(
    ("family", "kind", "captured"),
    slow_rows_but(
        [("llama", "eagle31", True), ("gemma3", "eagle31", False)],
        itertools.product(FAMILIES, ["eagle31", "peagle"], [False, True]),
    ),
)
def test_the_text_is_plain_decodings(family, kind, captured, graphs, at_random):
    target, batch = make_target(family), pad(prompts_of(9, 4, 14))
    plain = target.generate(**batch, max_new_tokens=70, **GREEDY)
    overrides = {"mask_token_id": 2} if kind == "peagle" else {}
    oracle = make_oracle(target, plain, batch, wrong_share=0.2, **overrides)
    out = decode(target, oracle, batch, draft_shape="auto")
    assert out.sequences.tolist() == plain.tolist()
    assert len(out.speculation.shapes) > 3
    assert out.speculation.num_accepted > 20
    assert out.speculation.graphs.startswith("captured" if captured else "none")


@pytest.mark.parametrize(
    ("family", "captured", "sampled"),
    slow_rows_but(
        [("llama", False, False), ("gemma3", True, True)], itertools.product(FAMILIES, [False, True], [False, True])
    ),
)
def test_processors_that_look_at_the_text_see_plain_decodings(family, captured, sampled, graphs, at_random):
    target, batch = make_target(family), pad(prompts_of(9, 4, 14))
    options = {**GREEDY, "repetition_penalty": 1.1, **({"do_sample": True, "seed": 3} if sampled else {})}
    plain = target.generate(**batch, max_new_tokens=70, **options, **({"decode_loop": "own"} if sampled else {}))
    oracle = make_oracle(target, plain, batch, wrong_share=0.2)
    out = decode(target, oracle, batch, draft_shape="auto", **options)
    assert out.sequences.tolist() == plain.tolist()
    assert len(out.speculation.shapes) > 3
    assert out.speculation.num_accepted > 20


def test_what_rounds_accept_is_known_where_processors_look_at_the_text():
    target, batch = make_target("llama"), pad(prompts_of(9, 4))
    options = {"max_new_tokens": 100, "repetition_penalty": 1.1}
    plain = target.generate(**batch, **GREEDY, **options)
    for wrong_share, low, high in ((0.0, 0.9, 1.0), (1.0, 0.0, 0.2)):
        oracle = make_oracle(target, plain, batch, wrong_share=wrong_share)
        told = decode(target, oracle, batch, draft_shape="auto", **options).speculation
        assert low <= told.acceptance_by_rank[0][0] <= high
        assert len(told.shapes) > 1 or list(told.shapes) != ["chain of 3"]


@pytest.mark.parametrize(
    ("family", "captured"),
    slow_rows_but([("gemma3", True)], itertools.product(FAMILIES, [False, True])),
)
def test_drafts_are_what_they_are_without_a_change(family, captured, at_random, proposals):
    """The drafter has read the same states at the same places, whatever rounds there were, and rounds without it."""
    target, batch = make_target(family), pad(prompts_of(9, 4))
    drafter, expected = make_drafter(target), {}
    plain = decode(target, drafter, batch, num_assistant_tokens=5)
    expected.update(proposals)
    proposals.clear()
    out = decode(target, drafter, batch, draft_shape="auto")
    assert out.sequences.tolist() == plain.sequences.tolist()
    shared = expected.keys() & proposals.keys()
    assert len(shared) > 20
    for place in shared:
        n = min(len(expected[place]), len(proposals[place]))
        assert proposals[place][:n] == expected[place][:n], place


@pytest.mark.slow
def test_rows_that_end_leave_rounds_that_change(target, at_random, monkeypatch):
    batch = pad(prompts_of(9, 4, 30, 6))
    plain = target.generate(**batch, max_new_tokens=80, eos_token_id=[7, 50], **GREEDY)
    oracle = make_oracle(target, plain, batch)
    for captured in (False, True):
        if captured:
            capture_on_cpus(monkeypatch, worth_capture=4)
        out = target.generate(
            **batch, assistant_model=oracle, draft_shape="auto", max_new_tokens=80, eos_token_id=[7, 50], **GREEDY
        )
        assert out.tolist() == plain.tolist()


@pytest.mark.slow
def test_memory_grows_under_rounds_that_change(target, at_random, monkeypatch):
    capture_on_cpus(monkeypatch, first_room=8)
    prompt = make_prompt(9)
    plain = target.generate(prompt, max_new_tokens=300, min_new_tokens=300, **GREEDY)
    options = {"max_new_tokens": 300, "min_new_tokens": 300, **GREEDY}
    drafter = make_drafter(target)
    assert torch.equal(target.generate(prompt, assistant_model=drafter, draft_shape="auto", **options), plain)


def test_what_was_learnt_is_kept_between_calls(target, monkeypatch):
    choosers = []

    def make(*args, **kwargs):
        choosers.append(choosing.make_chooser(*args, **kwargs))
        return choosers[-1]

    monkeypatch.setattr(generate, "CHOOSER", make)
    drafter, batch = make_drafter(target), pad(prompts_of(9))
    auto = {"draft_shape": "auto"}
    for options in (auto, auto, {**auto, "do_sample": True}, {"num_assistant_tokens": 3}):
        decode(target, drafter, batch, max_new_tokens=30, **options)
    first, second, sampled, fixed = choosers
    assert first.costs is second.costs is sampled.costs is not fixed.costs
    assert first.rates is second.rates is not sampled.rates
    assert second.costs.samples
    assert not fixed.reasons
    decode(target, make_drafter(target), batch, max_new_tokens=4, draft_shape="auto")
    assert choosers[-1].costs is not first.costs


def test_candidates_are_shapes_that_the_drafter_can_propose(target):
    shapes = Shapes(list_candidates(make_drafter(target, draft_vocab_size=3)))
    assert {NONE, chain(1), chain(3)} <= set(shapes.shapes)
    assert all(shape.parents.count(node) <= 3 for shape in shapes.shapes for node in range(shape.num_nodes))
    assert find_kind(None).name == "none"
