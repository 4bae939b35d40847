"""Prompts that run straight into their rows' caches, padded behind; and when rows that wait are let in."""

from contextlib import nullcontext

import pytest
import torch
from helpers.batches import GREEDY, pad
from helpers.capture import capture_on_cpus
from helpers.marks import slow_but
from helpers.models import FAMILIES, count_hooks, make_drafter, make_prompt, make_target
from transformers import GenerationConfig

from hf_eagle3 import release_graphs
from hf_eagle3.decoding import engine
from hf_eagle3.decoding.chunks import Beginning, ChunkedPrompt
from hf_eagle3.decoding.company import Company
from hf_eagle3.decoding.straight import (
    make_drafter_cache,
    prefill_straight,
    runs_straight,
    split,
)
from hf_eagle3.drafters.kinds import find_kind
from hf_eagle3.recorder import StateRecorder
from hf_eagle3.rows.cache import RowCache, to_bucket
from hf_eagle3.rows.layers import find_kinds
from hf_eagle3.rows.rotation import own_lengths
from hf_eagle3.speculation.shape import Shapes, chain

LENGTHS = (9, 30, 1, 17)


def run(target, drafter, prompts, *, most):
    """The prompts, and the keys of each layer."""
    longest = max(map(len, prompts))
    cache = RowCache(find_kinds(target), to_bucket(longest))
    shapes = Shapes((chain(3),))
    its = make_drafter_cache(drafter, longest, shapes)
    beginning = Beginning(find_kind(drafter.config), drafter, shapes, its, nullcontext())
    with torch.no_grad(), own_lengths(target), StateRecorder(target, drafter.bound_aux_layer_ids) as recorder:
        prompt = prefill_straight(target, recorder, prompts, cache, beginning, most=most)
    return prompt, [layer.keys for layer in (*cache.layers, *its.layers)]


@pytest.mark.any_release
@pytest.mark.parametrize("family", slow_but(["llama", "gemma3"], FAMILIES))
def test_rows_that_share_a_forward_hold_what_they_hold_alone(family):
    target = make_target(family)
    if not runs_straight(target):
        pytest.skip("It prepares its inputs in a way of its own.")
    drafter, prompts = make_drafter(target).bind(target), [make_prompt(n)[0] for n in LENGTHS]
    alone, their_keys = run(target, drafter, prompts, most=0)
    for most in (64, 1000):  # two rows a forward, and all
        shared, keys = run(target, drafter, prompts, most=most)
        torch.testing.assert_close(shared.logits, alone.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shared.memory.states, alone.memory.states, rtol=1e-4, atol=1e-5)
        assert shared.memory.start.tolist() == [n - 1 for n in LENGTHS]
        for b, length in enumerate(LENGTHS):
            for mine, theirs in zip(keys, their_keys, strict=True):  # of the drafter, the last is pending
                torch.testing.assert_close(mine[b, : length - 1], theirs[b, : length - 1], rtol=1e-4, atol=1e-5)
    for b, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = target(prompt[None]).logits[:, -1:]
        torch.testing.assert_close(alone.logits[b : b + 1], logits, rtol=1e-4, atol=1e-5)
    assert count_hooks(target) == 0


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_large_batch_of_a_call_runs_in_parts(target, monkeypatch, captured):
    """Its texts, and the cache that it returns, are those of one forward."""
    batch = pad([make_prompt(n) for n in LENGTHS])
    drafter, options = make_drafter(target), {**GREEDY, "max_new_tokens": 12}
    whole = target.generate(**batch, assistant_model=drafter, return_dict_in_generate=True, **options)
    if captured:
        capture_on_cpus(monkeypatch)
    monkeypatch.setattr(engine, "count_at_once", lambda _target: 64)
    parts = target.generate(**batch, assistant_model=drafter, return_dict_in_generate=True, **options)
    release_graphs()
    assert parts.sequences.tolist() == whole.sequences.tolist()
    for mine, theirs in zip(parts.past_key_values.layers, whole.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)


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


def test_an_arena_of_rounds_without_a_drafter_is_none_for_one(target, monkeypatch):
    """Nor is that of a drafter with other heads."""
    counts = capture_on_cpus(monkeypatch)
    prompts = [make_prompt(n)[0].tolist() for n in LENGTHS]
    config = GenerationConfig(max_new_tokens=8, **GREEDY)
    said = []
    wider = make_drafter(target, num_attention_heads=4, num_key_value_heads=4)
    for helped in ({"decode_loop": "own"}, {"assistant_model": make_drafter(target)}, {"assistant_model": wider}):
        outputs = target.generate_batch(prompts, generation_config=config, **helped)
        assert not any(output.error for output in outputs.values())
        said.append([output.generated_tokens for output in outputs.values()])
        batch = pad([make_prompt(n) for n in LENGTHS])
        target.generate(**batch, max_new_tokens=8, **GREEDY, **helped)
    release_graphs()
    assert counts.replayed > 10
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("piece", [1, 7, 30])
def test_a_drafter_reads_pieces_as_it_reads_the_whole(target, piece):
    drafter, prompt = make_drafter(target).bind(target), make_prompt(30)
    whole, (*_, its_keys) = run(target, drafter, [prompt[0]], most=0)
    shapes = Shapes((chain(3),))
    cache, its = RowCache(find_kinds(target), to_bucket(30)), make_drafter_cache(drafter, 30, shapes)
    beginning = Beginning(find_kind(drafter.config), drafter, shapes, its, nullcontext())
    with torch.no_grad(), StateRecorder(target, drafter.bound_aux_layer_ids) as recorder:
        chunked = ChunkedPrompt(target, recorder, prompt, cache, beginning, [])
        while chunked.num_left:
            chunked.advance(piece)
    found = chunked.finish()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.logits, whole.logits, **close)
    torch.testing.assert_close(found.memory.states, whole.memory.states, **close)
    torch.testing.assert_close(its.layers[0].keys[:, :29], its_keys[:, :29], **close)
    for name in ("num_pending", "start", "first", "tokens"):
        assert getattr(found.memory, name).tolist() == getattr(whole.memory, name).tolist()
    assert found.memory.room == whole.memory.room
