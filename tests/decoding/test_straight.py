"""Prompts that run straight into their rows' caches, padded behind; and when rows that wait are let in."""

from contextlib import nullcontext

import pytest
import torch
from helpers.marks import slow_but
from helpers.models import FAMILIES, count_hooks, make_prompt, make_target

from hf_eagle3.decoding.company import Company
from hf_eagle3.decoding.straight import prefill_straight, runs_straight, split
from hf_eagle3.recorder import StateRecorder
from hf_eagle3.rows.cache import RowCache, to_bucket
from hf_eagle3.rows.layers import find_kinds
from hf_eagle3.rows.rotation import own_lengths

LENGTHS = (9, 30, 1, 17)


def run(target, prompts, *, most):
    """The prompts, and the keys of each layer."""
    cache = RowCache(find_kinds(target), to_bucket(max(map(len, prompts))))
    with torch.no_grad(), own_lengths(target), StateRecorder(target, (1, 2)) as recorder:
        prompt = prefill_straight(target, recorder, prompts, target.device, cache, [nullcontext()], most=most)
    return prompt, [layer.keys for layer in cache.layers]


@pytest.mark.any_release
@pytest.mark.parametrize("family", slow_but(["llama", "gemma3"], FAMILIES))
def test_rows_that_share_a_forward_hold_what_they_hold_alone(family):
    target = make_target(family)
    if not runs_straight(target):
        pytest.skip("It prepares its inputs in a way of its own.")
    prompts = [make_prompt(n)[0] for n in LENGTHS]
    alone, their_keys = run(target, prompts, most=0)
    for most in (64, 1000):  # two rows a forward, and all
        shared, keys = run(target, prompts, most=most)
        torch.testing.assert_close(shared.logits, alone.logits, rtol=1e-4, atol=1e-5)
        for b, length in enumerate(LENGTHS):
            torch.testing.assert_close(shared.states[b, :length], alone.states[b, :length], rtol=1e-4, atol=1e-5)
            for mine, theirs in zip(keys, their_keys, strict=True):
                torch.testing.assert_close(mine[b, :length], theirs[b, :length], rtol=1e-4, atol=1e-5)
    for b, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = target(prompt[None]).logits[:, -1:]
        torch.testing.assert_close(alone.logits[b : b + 1], logits, rtol=1e-4, atol=1e-5)
    assert count_hooks(target) == 0


def test_rows_are_split_where_they_would_be_too_many():
    assert list(split([9, 30, 1, 17], 64)) == [slice(0, 2), slice(2, 4)]
    assert list(split([9, 30, 1, 17], 0)) == [slice(b, b + 1) for b in range(4)]
    assert list(split([100, 5, 5], 20)) == [slice(0, 1), slice(1, 3)]


def wait_for_company(company, *, pause, num_running, num_idle, num_waiting, round_seconds=1.0):
    """Rounds until rows are let in."""
    company.note_pause(pause)
    company.note_round(round_seconds)
    numbers = {"num_running": num_running, "num_idle": num_idle, "num_waiting": num_waiting}
    return next(n for n in range(1000) if not company.is_awaited(**numbers))


def test_idle_places_wait_until_they_cost_a_pause():
    assert wait_for_company(Company(), pause=3.0, num_running=60, num_idle=4, num_waiting=100) == 44  # 4 * 45 = 3 * 60
    assert wait_for_company(Company(), pause=0.1, num_running=60, num_idle=8, num_waiting=100) == 0


def test_rows_that_all_have_a_place_are_let_in_at_once():
    company = Company()
    assert not company.is_awaited(num_running=3, num_idle=1, num_waiting=9)  # nothing is known yet
    assert wait_for_company(company, pause=100.0, num_running=60, num_idle=4, num_waiting=4) == 0
