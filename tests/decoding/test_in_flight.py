"""Rows that come and go: each says what it says alone, whoever joins or leaves, and when."""

import functools
import gc
from typing import NamedTuple

import pytest
import torch
from helpers import families
from helpers.batches import GREEDY, make_oracle, pad
from helpers.capture import GraphsOnCpus
from helpers.engine import run_rows
from helpers.marks import slow_but
from helpers.models import DRAFTERS, count_hooks, make_drafter, make_prompt, make_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_eagle3 import release_graphs
from hf_eagle3.decoding.engine import Engine
from hf_eagle3.decoding.in_flight import InFlight, Limits, NoRoomError
from hf_eagle3.decoding.row import Row
from hf_eagle3.decoding.state import RoundConfig
from hf_eagle3.speculation.shape import NONE, DraftShape, chain
from hf_eagle3.speculation.warpers import RowSettings

pytestmark = pytest.mark.any_release

LONGEST = 18  # new tokens
SHAPES = {
    "chain": (chain(3),),
    "tree": (DraftShape((0, 0, 1, 1, 2)),),
    "none": (NONE,),
    "by cost": (chain(3), NONE, chain(1), DraftShape((0, 0, 1))),
}


CHAIN_OF_3 = RoundConfig(shape=chain(3))


class Looks(LogitsProcessor):
    """Bans what was said three tokens before."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids[0, -3:-2], -torch.inf)


class Request(NamedTuple):
    """What somebody asks for, and when."""

    length: int  # of the prompt
    max_new: int
    gap: int = 0  # steps after the one before
    kind: str = "greedy"
    cancel: int | None = None  # steps after it came


KINDS = {
    "greedy": {"settings": RowSettings(is_greedy=True)},
    "sampled": {
        "settings": RowSettings(temperature=0.8, top_k=20),
        "processors": LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(20)]),
        "seed": 5,
    },
    "other": {
        "settings": RowSettings(top_p=0.9, min_p=0.01),
        "processors": LogitsProcessorList([TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)]),
        "seed": 5,
    },
    "looks": {
        "settings": RowSettings(is_greedy=True),
        "processors": LogitsProcessorList([Looks()]),
        "looks_at_text": True,
    },
    "draws and looks": {
        "settings": RowSettings(temperature=0.8),
        "processors": LogitsProcessorList([Looks(), TemperatureLogitsWarper(0.8)]),
        "looks_at_text": True,
        "seed": 5,
    },
}
# What `generate` is asked for the same.
CALLS = {
    "greedy": GREEDY,
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 5},
    "other": {"do_sample": True, "top_k": 0, "top_p": 0.9, "min_p": 0.01, "seed": 5},
    "looks": {**GREEDY, "logits_processor": LogitsProcessorList([Looks()])},
    "draws and looks": {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 0,
        "seed": 5,
        "logits_processor": LogitsProcessorList([Looks()]),
    },
}


@functools.cache
def say_alone(family, length, kind="greedy", max_new=LONGEST):
    """What a target says to one prompt by itself, without drafts: greedy stock `generate`, else our loop by the seed."""
    target, prompt = find_target(family), make_prompt(length)
    own = {"decode_loop": "own"} if "seed" in CALLS[kind] else {}
    out = target.generate(prompt, max_new_tokens=max_new, **CALLS[kind], **own)
    return out[0, length:].tolist()


HYBRIDS = ["qwen3_5_text", "falcon_h1", "lfm2_moe"]
LENGTHS = (1, 2, 4, 5, 7, 9, 13, 17, 22, 29, 30, 33, 40)  # of prompts here


@functools.cache
def find_target(family):
    if family not in HYBRIDS:
        return make_target(family)
    try:
        target = families.build(families.Family(family, "causal"))
    except KeyError:
        pytest.skip("This Transformers does not have the family.")
    return target


@functools.cache
def find_drafter(family, **options):
    """One that knows what greedy rows say, and errs at some positions."""
    target, batch = find_target(family), pad([make_prompt(n) for n in LENGTHS])
    new = torch.tensor([say_alone(family, n) for n in LENGTHS])
    oracle = families.make_oracle if family in HYBRIDS else make_oracle
    return oracle(target, torch.cat([batch["input_ids"], new], dim=1), batch, **options)


def open_in_flight(target, drafter, limits, *, shapes=SHAPES["chain"], **options):
    shape, *others = shapes
    config = RoundConfig(shape=shape, others=tuple(others), is_reproducible=True, max_length=options.pop("most", None))

    def make_engine(room):
        return Engine(target, drafter, config, room, **options)

    return InFlight(target, limits, GenerationConfig(), make_engine)


def make_row(request, **options):
    return Row(make_prompt(request.length), max_new=request.max_new, **{**KINDS[request.kind], **options})


def serve(in_flight, requests, rows=None):
    """Let requests come, and go where they are cancelled, until all have ended; their rows."""
    rows = rows or [make_row(request) for request in requests]
    with torch.no_grad(), in_flight:
        step, due = 0, 0
        comings = []
        for request in requests:
            due += request.gap
            comings.append(due)
        while step <= due or not in_flight.is_idle:
            for request, row, coming in zip(requests, rows, comings, strict=True):
                if coming == step:
                    in_flight.add(row)
                if request.cancel is not None and coming + request.cancel == step:
                    in_flight.cancel(row)
            in_flight.step()
            assert len(in_flight.running) <= in_flight.limits.num_places
            step += 1
    return rows


def assert_as_alone(family, requests, rows):
    for request, row in zip(requests, rows, strict=True):
        assert row.error is None
        alone = say_alone(family, request.length, request.kind)[: request.max_new]
        if request.cancel is None:
            assert row.text == alone
        else:
            assert row.text == alone[: len(row.text)]
    assert count_hooks(find_target(family)) == 0


FEW = [Request(9, 12), Request(30, 5), Request(1, 18, 1), Request(17, 1), Request(4, 9, 3), Request(22, 14)]
MIXED = [r._replace(kind=kind) for r, kind in zip(FEW, [*KINDS, "greedy"], strict=True)]


@pytest.mark.parametrize("shapes", slow_but(["chain", "by cost"], SHAPES))
@pytest.mark.parametrize(
    "family", slow_but(["llama", "gemma3"], ["llama", "gemma3", "gpt_oss", "deepseek_v3", "qwen_vlm"])
)
def test_rows_say_what_they_say_alone(family, shapes):
    in_flight = open_in_flight(make_target(family), find_drafter(family), Limits(3, 16), shapes=SHAPES[shapes])
    assert_as_alone(family, FEW, serve(in_flight, FEW))


@pytest.mark.parametrize("kind", slow_but(["peagle"], DRAFTERS))
def test_drafters_of_all_kinds_see_rows_come_and_go(target, kind):
    in_flight = open_in_flight(target, make_drafter(target, **DRAFTERS[kind]), Limits(2, 16))
    assert_as_alone("llama", MIXED, serve(in_flight, MIXED))


@pytest.mark.parametrize("family", slow_but(HYBRIDS[:1], HYBRIDS))
def test_recurrent_states_move_with_their_rows(family):
    assert_as_alone(family, FEW, serve(open_in_flight(find_target(family), find_drafter(family), Limits(3, 16)), FEW))


def test_rows_without_a_drafter(target):
    in_flight = open_in_flight(target, None, Limits(3, 16), shapes=(NONE,))
    assert_as_alone("llama", MIXED, serve(in_flight, MIXED))


requests_of_somebody = st.lists(
    st.builds(
        Request,
        length=st.sampled_from([1, 2, 7, 13, 29, 40]),
        max_new=st.integers(1, LONGEST),
        gap=st.integers(0, 4),
        kind=st.sampled_from(list(KINDS)),
        cancel=st.none() | st.integers(0, 6),
    ),
    min_size=1,
    max_size=7,
)
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def check_any(requests, num_places, num_prompt_tokens, shapes, graphs=None):
    target = make_target("llama")
    options = {"shapes": SHAPES[shapes], **({} if graphs is None else {"capturer": graphs})}
    in_flight = open_in_flight(target, find_drafter("llama"), Limits(num_places, num_prompt_tokens), **options)
    assert_as_alone("llama", requests, serve(in_flight, requests))


ANY = {
    "requests": requests_of_somebody,
    "num_places": st.integers(1, 4),
    "num_prompt_tokens": st.sampled_from([3, 10, 64]),
    "shapes": st.sampled_from(list(SHAPES)),
}


@given(**ANY)
@settings(max_examples=6, **QUIET)
def test_any_rows_at_any_time(requests, num_places, num_prompt_tokens, shapes):
    """Whatever they ask for, whenever they come, and whoever gives up."""
    check_any(requests, num_places, num_prompt_tokens, shapes)


@pytest.mark.slow
@given(**ANY)
@settings(max_examples=150, **QUIET)
def test_many_rows_at_any_time(requests, num_places, num_prompt_tokens, shapes):
    check_any(requests, num_places, num_prompt_tokens, shapes)


@pytest.mark.slow
@given(**ANY)
@settings(max_examples=30, **QUIET)
def test_any_rows_in_captured_rounds(requests, num_places, num_prompt_tokens, shapes):
    check_any(requests, num_places, num_prompt_tokens, shapes, GraphsOnCpus())


@pytest.mark.parametrize("in_flight_rounds", slow_but([1], [0, 1, 2]))
def test_rows_join_captured_rounds(target, in_flight_rounds):
    """In places of the arena; reports of rounds under way are the rows' that were there."""
    release_graphs()
    graphs = GraphsOnCpus(rounds_in_flight=in_flight_rounds, first_room=8)  # so that the arena grows, too
    limits = Limits(3, 16)
    in_flight = open_in_flight(target, find_drafter("llama"), limits, capturer=graphs)
    assert_as_alone("llama", MIXED, serve(in_flight, MIXED))
    assert graphs.counts.replayed > 10
    captured = graphs.counts.captured
    assert_as_alone("llama", MIXED, serve(in_flight, MIXED))
    assert graphs.counts.captured <= captured + 9  # sets of graphs are kept
    release_graphs()


def test_recurrent_states_move_into_captured_rounds():
    release_graphs()
    graphs, family = GraphsOnCpus(rounds_in_flight=1, first_room=8), HYBRIDS[0]
    for _ in range(2):
        in_flight = open_in_flight(find_target(family), find_drafter(family), Limits(3, 16), capturer=graphs)
        assert_as_alone(family, FEW, serve(in_flight, FEW))
    assert graphs.counts.replayed > 10
    release_graphs()


def test_a_smaller_batch_leaves_the_graphs_of_the_larger_one_whole(target):
    """What rows are sampled by is in tensors that a recording owns."""
    release_graphs()
    graphs, config = GraphsOnCpus(worth_capture=1), RoundConfig(shape=chain(2), do_sample=True, is_seeded=True)
    prompts, drafter = [make_prompt(n) for n in (5, 6)], make_drafter(target)
    for _ in range(2):
        rows = [
            Row(p, max_new=n, settings=RowSettings(temperature=0.7), seed=3)
            for p, n in zip(prompts, (2, 12), strict=True)
        ]
        how = run_rows(target, drafter, prompts, rows, config, capturer=graphs)
    assert how == "replayed"
    release_graphs()


def refuse(*_args, **_options):
    raise RuntimeError("this card captures nothing")


def test_rows_go_on_where_rounds_cannot_be_captured(target):
    """In memory of their own, which grows with their texts and with those who come."""
    release_graphs()
    graphs = GraphsOnCpus(first_room=8, around=refuse)
    in_flight = open_in_flight(target, find_drafter("llama"), Limits(3, 16), capturer=graphs)
    assert_as_alone("llama", MIXED, serve(in_flight, MIXED))
    release_graphs()
    row = Row(make_prompt(5), max_new=90)
    how = run_rows(target, find_drafter("llama"), [make_prompt(5)], [row], CHAIN_OF_3, capturer=graphs)
    assert "captures nothing" in how
    assert row.text == say_alone("llama", 5, max_new=90)
    release_graphs()


def test_long_prompts_run_in_pieces_between_rounds(target):
    """No row that runs waits for more prompt tokens than the limit, and pieces come to what the whole does."""
    limits = Limits(4, 8)
    in_flight = open_in_flight(target, find_drafter("llama"), limits)
    requests = [Request(5, 18), Request(40, 6, 2), Request(6, 6), Request(3, 6), Request(33, 6)]
    widths = []

    def note(_module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        widths.append(ids.shape[1])

    hook = target.register_forward_pre_hook(note, with_kwargs=True)
    try:
        rows = serve(in_flight, requests)
    finally:
        hook.remove()
    assert_as_alone("llama", requests, rows)
    assert max(widths) == 8
    assert widths.count(8) >= 9  # of 40 and 33 tokens


# ---- bounds and failures ----


class Fails(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        if input_ids.shape[1] > 12:
            raise LookupError("no more")
        return torch.zeros(1, dtype=torch.bool)


def test_what_a_row_brings_fails_for_it_alone(target):
    requests = [Request(9, 12), Request(9, 12, kind="looks"), Request(4, 18)]
    rows = [make_row(request) for request in requests]
    rows[0].criteria = [Fails()]
    serve(open_in_flight(target, find_drafter("llama"), Limits(3, 16)), requests, rows)
    assert isinstance(rows[0].error, LookupError)
    assert_as_alone("llama", requests[1:], rows[1:])


def fail_at(target, times):
    """A hook that fails at some forwards of `target`, counted from 1."""
    count = 0

    def fail(_module, _args):
        nonlocal count
        count += 1
        if count in times:
            raise RuntimeError("the device is on fire")

    return target.register_forward_pre_hook(fail)


@pytest.mark.parametrize(("at", "failed"), [(3, {0, 1}), (5, {2})], ids=["round", "prompt"])
def test_a_forward_fails_the_rows_in_it_and_others_go_on(target, at, failed):
    """Forwards are the prompts of the first two rows, a round a step, and before the third one the next row's prompt."""
    requests = [Request(9, 18), Request(9, 18), Request(4, 18, 3), Request(7, 6, 4)]
    if failed == {2}:
        requests[2] = Request(4, 18, 2)
    hook = fail_at(target, {at})
    try:
        rows = serve(open_in_flight(target, find_drafter("llama"), Limits(3, 64)), requests)
    finally:
        hook.remove()
    assert {b for b, row in enumerate(rows) if row.error is not None} == failed
    whole = [b for b in range(4) if b not in failed]
    assert_as_alone("llama", [requests[b] for b in whole], [rows[b] for b in whole])


def test_slots_bound_who_runs_together(target):
    limits = Limits(4, 64, num_slots=100)
    in_flight = open_in_flight(target, find_drafter("llama"), limits)
    with pytest.raises(NoRoomError, match="118 slots, and memory holds 100"):
        in_flight.add(make_row(Request(100, 18)))
    requests = [Request(30, 18), Request(29, 18), Request(7, 3), Request(1, 2)]
    rows = serve(in_flight, requests)
    assert_as_alone("llama", requests, rows)
    with torch.no_grad(), in_flight:
        for row in (make_row(request) for request in requests):
            in_flight.add(row)
        in_flight.step()
        assert len(in_flight.running) == 2  # three rows of 48 slots are too many


def test_a_row_that_is_cancelled_while_it_waits_never_runs(target):
    requests = [Request(9, 18), Request(40, 5, cancel=1), Request(7, 5, cancel=0), Request(7, 5)]
    rows = serve(open_in_flight(target, find_drafter("llama"), Limits(2, 8)), requests)
    assert rows[2].text == []
    assert_as_alone("llama", requests, rows)


def test_an_engine_with_nothing_to_do_leaves_the_target_alone(target):
    in_flight = open_in_flight(target, find_drafter("llama"), Limits(2, 8))
    with torch.no_grad(), in_flight:
        for _ in range(2):
            row = make_row(Request(5, 4))
            in_flight.add(row)
            while not in_flight.is_idle:
                in_flight.step()
            assert row.text == say_alone("llama", 5)[:4]
            assert count_hooks(target) == 0


@pytest.mark.slow
def test_ten_thousand_rows_leave_nothing_behind(target):
    """Nothing is lost, each says what it says alone, and memory is flat."""
    in_flight = open_in_flight(target, find_drafter("llama"), Limits(16, 64))
    live: list[int] = []
    with torch.no_grad(), in_flight:
        for part in range(20):
            requests = [Request(LENGTHS[n % len(LENGTHS)], 1 + (n + part) % 4) for n in range(500)]
            rows = [make_row(request) for request in requests]
            for row in rows:
                in_flight.add(row)
            while not in_flight.is_idle:
                in_flight.step()
            for request, row in zip(requests, rows, strict=True):
                assert row.error is None
                assert row.text == say_alone("llama", request.length)[: request.max_new]
            del rows, row
            gc.collect()
            live.append(len(gc.get_objects()))
    assert abs(live[-1] - live[2]) < 500
