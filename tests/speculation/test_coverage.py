"""Acceptance without weights, by depth and rank."""

import pytest
import torch

from hf_eagle3.speculation.coverage import accept_covered, read_coverage
from hf_eagle3.speculation.rates import Rates
from hf_eagle3.speculation.shape import NONE, DraftShape, chain
from hf_eagle3.speculation.tree import find_depths

pytestmark = pytest.mark.any_release

COVERAGE = ((0.6, 0.2, 0.1), (0.5, 0.2, 0.1), (0.4, 0.3))
TREES = {"chain": chain(4), "tree": DraftShape((0, 0, 0, 1, 1, 2, 4)), "none": NONE}


@pytest.mark.parametrize("name", TREES)
def test_verdicts_are_those_of_the_coverage(name):
    shape, B = TREES[name], 20_000
    logits = torch.randn(1, shape.num_verified, 7).expand(B, -1, -1)
    verdict = accept_covered(logits, shape, COVERAGE)
    lengths = 1 + verdict.num_accepted.double()
    assert lengths.mean() == pytest.approx(Rates(COVERAGE).expect(shape), abs=0.03)
    ends = verdict.num_accepted if verdict.path is None else verdict.path[:, -1]
    assert torch.equal(verdict.next_token, logits[0].argmax(-1)[ends])
    depths = torch.tensor(find_depths(shape.parents))
    assert torch.equal(verdict.num_accepted, depths[ends])
    if name == "tree":  # a node is reached as often as its rates say
        shares = torch.bincount(ends, minlength=8) / B
        wanted = [0.1, 0.6 * 0.3, 0.2 * 0.5, 0.1, 0.6 * 0.5 * 0.6, 0.6 * 0.2, 0.2 * 0.5, 0.6 * 0.5 * 0.4]
        assert shares.tolist() == pytest.approx(wanted, abs=0.015)


@pytest.mark.parametrize(
    "values", [[], [[]], [[0.5, 0.6]], [[-0.1]], [[1.5]], [[0.5], []]], ids=lambda values: str(values)
)
def test_what_is_no_coverage_is_refused(values):
    with pytest.raises(ValueError, match="A coverage has for each depth"):
        read_coverage(values)


def test_a_coverage_is_what_generation_configs_keep():
    assert read_coverage([[0.5, 0.25], [0.5]]) == ((0.5, 0.25), (0.5,))
