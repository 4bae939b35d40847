"""What rounds emit has the target's distribution, whatever the rule, the shape, the warpers and the draft vocabulary.

Chi-square over all continuations of three tokens of a vocabulary of eight: the real draft, accept rule and commit, many
rows at once, between a target and a drafter of tables.
"""

import itertools

import pytest
import torch
from helpers.distributions import TINY_V, assert_distributed_as
from helpers.marks import slow_but, slow_rows_but
from helpers.rounds import expected_law, make_tables, run_rounds
from torch.nn import functional
from transformers.generation.logits_process import TypicalLogitsWarper

from hf_eagle3.drafters.chain import CHAIN
from hf_eagle3.drafters.parallel import PARALLEL
from hf_eagle3.speculation.accept import BLOCK, SHARED, accept_matching
from hf_eagle3.speculation.block_verification import accept_block
from hf_eagle3.speculation.noise import ACCEPT, GlobalNoise, SeededNoise
from hf_eagle3.speculation.sampling import draw, likeliest, pick
from hf_eagle3.speculation.shape import NONE, DraftShape, chain
from hf_eagle3.speculation.shared_noise import SharedNoise
from hf_eagle3.speculation.warpers import RowSettings

pytestmark = pytest.mark.any_release

SHAPES = {
    "none": NONE,
    "chain_1": chain(1),
    "chain_2": chain(2),
    "chain_3": chain(3),
    "wide": DraftShape((0, 0, 0)),
    "deep": DraftShape((0, 0, 1, 1, 2, 3, 3)),
    "depth_first": DraftShape((0, 1, 1, 0, 4, 5)),  # nodes are not numbered level by level
}
WARPERS = {
    "none": RowSettings(),
    "cold": RowSettings(temperature=0.4),
    "top_k": RowSettings(top_k=3),
    "top_p": RowSettings(temperature=1.4, top_p=0.75),
    "all": RowSettings(temperature=0.8, top_k=6, top_p=0.9, min_p=0.05),
}
RULES = {BLOCK: ["chain_1", "chain_2", "chain_3"], SHARED: list(SHAPES)}
LAWS = [
    (rule, shape, warper, V_d)
    for rule, shapes in RULES.items()
    for shape, warper, V_d in itertools.product(shapes, WARPERS, (TINY_V, 5))
]
EVERYDAY = [
    (BLOCK, "chain_3", "all", 5),
    (BLOCK, "chain_2", "none", TINY_V),
    (SHARED, "deep", "all", 5),
    (SHARED, "depth_first", "none", TINY_V),
    (SHARED, "chain_3", "top_p", 5),
]


def assert_lawful(samples, law, **options):
    """The first token, each pair, and all three."""
    for i in range(2):
        assert_distributed_as(samples[:, i : i + 1], law.sum([j for j in range(3) if j != i]), **options)
    assert_distributed_as(samples[:, :2], law.sum(2), **options)
    assert_distributed_as(samples, law, **options)


@pytest.mark.parametrize(("rule", "shape", "warper", "V_d"), slow_rows_but(EVERYDAY, LAWS))
def test_rounds_emit_the_targets_distribution(rule, shape, warper, V_d):
    tables, settings = make_tables(3, V_d), WARPERS[warper]
    samples, _ = run_rounds(tables, SHAPES[shape], rule, [settings] * 20_000)
    assert_lawful(samples, expected_law(tables, settings))


@pytest.mark.parametrize(
    ("rule", "shape"),
    slow_rows_but([(SHARED, "deep")], [(BLOCK, "chain_3"), (SHARED, "chain_3"), (SHARED, "deep"), (SHARED, "wide")]),
)
def test_parallel_drafts_emit_it_too(rule, shape):
    tables, settings = make_tables(4, 6), WARPERS["all"]
    samples, _ = run_rounds(tables, SHAPES[shape], rule, [settings] * 20_000, kind=PARALLEL)
    assert_lawful(samples, expected_law(tables, settings))


@pytest.mark.parametrize(
    ("rule", "shape"), slow_rows_but([(BLOCK, "chain_3")], [(BLOCK, "chain_3"), (SHARED, "chain_2"), (SHARED, "deep")])
)
def test_rows_of_one_batch_have_laws_of_their_own(rule, shape):
    """Two kinds of rows by turns, whose ratio tests draw by seeds of their own; and a warper for all of them."""
    tables, kinds = make_tables(5, 5), [WARPERS["cold"], WARPERS["top_p"]]
    further = [TypicalLogitsWarper(0.9)]
    samples, _ = run_rounds(tables, SHAPES[shape], rule, kinds * 10_000, make_noise=SeededNoise, further=further)
    for i, settings in enumerate(kinds):
        assert_lawful(samples[i::2], expected_law(tables, settings, further=further))


TURNS = [(chain(2), BLOCK), (SHAPES["wide"], SHARED), (NONE, BLOCK), (SHAPES["depth_first"], SHARED)]


@pytest.mark.parametrize("first", slow_but([1], range(4)))
def test_rounds_of_different_rules_emit_it_together(first):
    """A call may go over from a chain to a tree and back: what a rule has drawn beyond the text is forgotten."""
    tables, settings = make_tables(8, 5), WARPERS["all"]
    (shape, rule), *others = TURNS[first:] + TURNS[:first]
    samples, _ = run_rounds(tables, shape, rule, [settings] * 20_000, others=others)
    assert_lawful(samples, expected_law(tables, settings))


@pytest.mark.parametrize("kind", [CHAIN, PARALLEL], ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_shared_noise_says_the_same_with_any_draft(shape, kind):
    """Token by token, not on average only: what is drafted changes nothing."""
    rows = [settings for settings in WARPERS.values() for _ in range(40)]
    plain, _ = run_rounds(make_tables(6, 5), NONE, SHARED, rows, num_tokens=12)
    drafted, num_accepted = run_rounds(make_tables(6, 5), SHAPES[shape], SHARED, rows, num_tokens=12, kind=kind)
    assert drafted.tolist() == plain.tolist()
    assert num_accepted > 0.1 or SHAPES[shape] is NONE


def test_a_good_drafter_is_right_more_often_by_the_same_noise():
    """Drafts of p itself are always right, since noise is shared; by other noise they would be so now and then."""
    tables = make_tables(7, TINY_V)
    same = tables._replace(q=torch.cat([tables.p, tables.p[:1]]))
    _, num_accepted = run_rounds(same, chain(3), SHARED, [RowSettings()] * 500)
    assert num_accepted == 3
    _, others = run_rounds(tables, chain(3), SHARED, [RowSettings()] * 500)
    assert others < 2


# ---- what is wrong is noticed, and what is right is not ----


class SharesNoise(GlobalNoise):
    """The known bug: a draft token is the largest of log q + G, and what replaces it is chosen by the same G."""

    def __init__(self, seeds, length):
        self.shared = SharedNoise(seeds, length)

    def draw(self, weights, purpose):
        return likeliest(self.shared.perturb(weights.log(), range(1)))


class SharesNumbers(SeededNoise):
    """The same bug for numbers of a seed: one number for all purposes."""

    def uniform(self, like, purpose):
        return super().uniform(like, 0)


class DraftsGreedily(GlobalNoise):
    """The likeliest draft token, told as one that was drawn."""

    def draw(self, weights, purpose):
        return weights.argmax(-1) if purpose < ACCEPT else super().draw(weights, purpose)


def judge_with(q=lambda proposal: proposal.q, p=lambda proposal, probs: probs):
    """Block verification with another q or another p."""

    def judge(proposal, scores, judging):
        return accept_block(proposal.tokens, q(proposal), p(proposal, scores.softmax(-1)), judging.noise)

    return judge


def flatten(proposal):
    flat = proposal.q.sqrt()
    return flat / flat.sum(-1, keepdim=True)


def make_uniform(proposal):
    return torch.full_like(proposal.q, 1 / TINY_V)


def renormalise(proposal, probs):
    inside = probs * (proposal.q > 0).any(1, keepdim=True)
    return inside / inside.sum(-1, keepdim=True)


def judge_by_one_noise(proposal, scores, judging):
    """Shared noise of the first position at all of them."""
    return accept_matching(proposal.tokens, likeliest(judging.shared.perturb(scores, range(1))), judging.shape)


def residual_is_p(proposal, scores, judging):
    verdict = judge_with()(proposal, scores, judging)
    return verdict._replace(next_token=draw(pick(scores.softmax(-1), verdict.num_accepted)))


def residual_forgets_the_weight(proposal, scores, judging):
    """As token by token."""
    verdict, p = judge_with()(proposal, scores, judging), scores.softmax(-1)
    q = functional.pad(proposal.q, (0, 0, 0, 1))
    residual = (pick(p, verdict.num_accepted) - pick(q, verdict.num_accepted)).clamp(min=0)
    return verdict._replace(next_token=draw(residual))


WRONG = {
    "shares noise": {"make_noise": SharesNoise},
    "shares numbers": {"make_noise": SharesNumbers},
    "drafts greedily": {"make_noise": lambda *_: DraftsGreedily()},
    "q is flattened": {"judge": judge_with(q=flatten)},
    "q is uniform": {"judge": judge_with(q=make_uniform)},
    "p is renormalised": {"judge": judge_with(p=renormalise)},
    "residual is p": {"judge": residual_is_p},
    "residual forgets the weight": {"judge": residual_forgets_the_weight},
    "one noise for all": {"rule": SHARED, "judge": judge_by_one_noise},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_rule_is_noticed(what):
    options = {"rule": BLOCK, **WRONG[what]}
    tables = make_tables(4, 5)
    samples, _ = run_rounds(tables, chain(3), settings=[RowSettings()] * 20_000, **options)
    with pytest.raises(AssertionError, match="p-value"):
        assert_lawful(samples, expected_law(tables, RowSettings()), alpha=1e-6)


def test_calling_any_draft_certain_is_lossless_too():
    def certain(proposal):
        return torch.zeros_like(proposal.q).scatter_(-1, proposal.tokens[..., None], 1.0)

    tables = make_tables(3, 5)
    samples, _ = run_rounds(tables, chain(3), BLOCK, [RowSettings()] * 20_000, judge=judge_with(q=certain))
    assert_lawful(samples, expected_law(tables, RowSettings()))
