"""A batch on its way through the host's loader: whole, whichever of its parts hold tensors."""

import pickle
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from helpers.unrolling import batch_of, several_rows

from hf_eagle3.training.step.batch import Batch, SquareRule

pytestmark = pytest.mark.any_release

SQUARES = SquareRule(step=4, min_side=4, max_cost=99)


def tensors_of(value):
    """The tensors of a dataclass, inner ones included, by path."""
    found = {}
    for field in fields(value):
        inner = getattr(value, field.name)
        if isinstance(inner, torch.Tensor):
            found[field.name] = inner
        elif is_dataclass(inner):
            found |= {f"{field.name}.{name}": x for name, x in tensors_of(inner).items()}
    return found


@pytest.fixture
def batch():
    rows = batch_of(*several_rows(), squares=SQUARES)
    assert {"rows", "spans.keys", "spans.squares.queries"} <= tensors_of(rows).keys()
    return rows


@pytest.mark.parametrize(
    "move",
    [lambda batch: batch.to("meta"), lambda batch: send_to_device(batch, torch.device("meta"), non_blocking=True)],
    ids=["by itself", "by accelerate"],
)
def test_a_batch_moves_with_all_its_tensors(batch, move):
    there = move(batch)
    assert isinstance(there, Batch)
    assert tensors_of(there).keys() == tensors_of(batch).keys()
    assert {x.device.type for x in tensors_of(there).values()} == {"meta"}
    assert {x.device.type for x in tensors_of(batch).values()} == {"cpu"}
    assert there.tokens is batch.tokens
    assert (there.lengths, there.spans.bounds) == (batch.lengths, batch.spans.bounds)


def test_workers_may_send_a_batch(batch):
    again = pickle.loads(pickle.dumps(batch))
    for name, x in tensors_of(again).items():
        assert torch.equal(x, tensors_of(batch)[name]), name
    np.testing.assert_array_equal(again.tokens, batch.tokens)


@pytest.mark.gpu
def test_all_tensors_of_a_batch_are_pinned(batch):
    assert all(x.is_pinned() for x in tensors_of(batch.pin_memory()).values())


def test_documents_of_a_batch_are_its_rows(batch):
    assert [x.tolist() for x in batch.split_documents()] == [list(ids) for ids, _ in several_rows()]
