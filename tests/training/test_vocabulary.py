"""Which tokens a drafter can propose."""

import pytest
import torch
from helpers.chat import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import logging

from hf_eagle3.training import (
    TokenDataset,
    choose_draft_vocabulary,
    count_supervised_tokens,
    find_special_tokens,
    measure_coverage,
    vocabulary_fingerprint,
)
from hf_eagle3.training.data.vocabulary import count_by_source

pytestmark = pytest.mark.any_release

ROWS = [
    {"input_ids": [9, 9, 5, 5, 5, 7], "loss_mask": [0, 0, 1, 1, 1, 1], "source": "web"},
    {"input_ids": [9, 8, 8, 7], "loss_mask": [0, 1, 1, 1], "source": "books"},
    {"input_ids": [9, 5, 5], "loss_mask": [0, 1, 1]},
]


@pytest.fixture
def said(caplog):
    """What the vocabulary module says, through the host's logger, which is quiet in tests."""
    logger = logging.get_logger("hf_eagle3.training.data.vocabulary")
    level = logger.level
    logger.setLevel("WARNING")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def test_only_supervised_tokens_count():
    dataset = TokenDataset(ROWS)
    assert count_supervised_tokens(dataset, 12).tolist() == [0, 0, 0, 0, 0, 5, 0, 2, 2, 0, 0, 0]
    by_source = count_by_source(dataset, 12)
    assert list(by_source) == ["books", "web"]
    assert by_source["web"].tolist() == [0, 0, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0]


def test_draft_vocabulary_holds_the_frequent_and_the_forced():
    counts = torch.tensor([0, 0, 0, 0, 0, 3, 0, 2, 2, 0, 0, 0])

    def choose(size, always=()):
        return choose_draft_vocabulary(counts, size, always, min_coverage=0).tolist()

    assert choose(3) == [5, 7, 8]
    assert choose(2) == [5, 7]  # ties go to the lower id
    assert choose(2, always=[11, 11]) == [5, 11]
    assert choose(5) == [0, 1, 5, 7, 8]  # filled with the lowest
    assert choose(12) == list(range(12))
    for size, always in ((13, []), (1, [2, 3]), (0, [2])):
        with pytest.raises(ValueError, match="draft_vocab_size must lie in"):
            choose(size, always)
    for token in (12, -1):
        with pytest.raises(ValueError, match=rf"always must hold ids in 0\.\.11, got {token}"):
            choose(2, [token])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.data())
def test_a_draft_vocabulary_is_ascending_and_none_left_out_is_more_frequent(counts, data):
    size = data.draw(st.integers(1, len(counts)))
    ids = choose_draft_vocabulary(torch.tensor(counts), size, min_coverage=0).tolist()
    assert ids == sorted(set(ids))
    assert len(ids) == size
    left_out = set(range(len(counts))) - set(ids)
    assert min(counts[i] for i in ids) >= max((counts[i] for i in left_out), default=0)


def test_little_coverage_is_warned_about_and_less_refused(said):
    counts = torch.tensor([90, 5, 5, 0])
    choose_draft_vocabulary(counts, 3)
    assert "covers only" not in said.text
    choose_draft_vocabulary(counts, 1)
    assert "of 1 tokens covers only 90.0%" in said.text
    counts = torch.tensor([89, 6, 5, 0])
    with pytest.raises(
        ValueError, match=r"covers only 89\.0%.*Raise draft_vocab_size, or lower min_coverage \(0\.9\)"
    ):
        choose_draft_vocabulary(counts, 1)
    assert choose_draft_vocabulary(counts, 1, min_coverage=0.8).tolist() == [0]


def test_coverage_at_several_sizes():
    counts = torch.tensor([1, 50, 0, 30, 19])
    coverage = measure_coverage(counts, sizes=(1, 2, 3, 8))
    assert coverage.shares == {1: 0.5, 2: 0.8, 3: 0.99, 5: 1.0}
    assert (coverage.num_tokens, coverage.num_distinct) == (100, 4)
    # One source under a ranking of all: what is frequent elsewhere helps it little.
    assert measure_coverage(torch.tensor([10, 0, 0, 0, 0]), (1, 4), ranking=counts).shares == {1: 0.0, 4: 1.0, 5: 1.0}


def test_special_tokens_that_the_target_wrote_are_found():
    tokenizer = make_tokenizer()
    think, channel, letter = tokenizer.convert_tokens_to_ids(["<think>", "<channel>", "a"])
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    counts[[think, channel, letter]] = torch.tensor([1, 2, 500])
    assert find_special_tokens(counts, tokenizer) == sorted([think, channel])
    chosen = choose_draft_vocabulary(counts, 3, always=find_special_tokens(counts, tokenizer))
    assert chosen.tolist() == sorted([letter, think, channel])


def test_a_fingerprint_tells_vocabularies_apart():
    ids = torch.tensor([1, 5, 9])
    fingerprint = vocabulary_fingerprint(ids, 12)
    assert fingerprint == "842eebaaabd3faff15a9252ee03cd01f67762aee90742872b074e97e55d2a259"
    assert fingerprint == vocabulary_fingerprint(ids.to(torch.int32), 12)
    others = [(torch.tensor([1, 5, 10]), 12), (ids, 13), (ids[:2], 12), (torch.tensor([1, 5, 9, 10]), 12)]
    assert len({fingerprint, *(vocabulary_fingerprint(*other) for other in others)}) == 5
