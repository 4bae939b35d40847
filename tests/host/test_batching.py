"""`generate_batch` and the host's manager with a drafter: requests of their own that come and go, and harm nobody."""

import asyncio
import functools
import gc
import logging
import queue
import threading
import time

import pytest
import torch
from helpers import families
from helpers.batches import GREEDY, make_oracle, pad
from helpers.marks import slow_but
from helpers.models import count_hooks, make_drafter, make_prompt, make_target
from helpers.tokenizers import word_tokenizer
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)
from transformers.cli.serving.utils import CBGenerateManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from hf_eagle3 import attach, detach
from hf_eagle3.host import manager as managers

pytestmark = pytest.mark.any_release

LENGTHS, NEW = (5, 9, 30, 2, 17), 12
CONFIG = GenerationConfig(max_new_tokens=NEW, **GREEDY)
PROMPTS = [make_prompt(n)[0].tolist() for n in LENGTHS]


def limit(**limits):
    """What requests may take; older releases of the host have fewer fields, and attributes do as well."""
    config = ContinuousBatchingConfig()
    for name, value in limits.items():
        setattr(config, name, value)
    return config


FEW = limit(max_requests_per_batch=2, max_batch_tokens=16)
# For the host's own engine, which else takes all the memory there is.
HOSTS = {
    "continuous_batching_config": limit(num_blocks=16, page_size=16, max_batch_tokens=64),
    "warmup": False,
}


@functools.cache
def say_alone(length, family="llama", **options):
    options = {"max_new_tokens": NEW, **GREEDY, **options}
    return make_target(family).generate(make_prompt(length), **options)[0, length:].tolist()


@functools.cache
def find_drafter(family="llama"):
    batch = pad([make_prompt(n) for n in LENGTHS])
    new = torch.tensor([say_alone(n, family) for n in LENGTHS])
    return make_oracle(make_target(family), torch.cat([batch["input_ids"], new], dim=1), batch)


ALONE = [say_alone(n) for n in LENGTHS]


def decode(target, prompts=PROMPTS, **options):
    options = {"generation_config": CONFIG, "continuous_batching_config": FEW, **options}
    if "decode_loop" not in options:
        options["assistant_model"] = options.get("assistant_model", find_drafter())
    return target.generate_batch(prompts, **options)


def texts_of(outputs):
    return [output.generated_tokens for output in outputs.values()]


@pytest.fixture
def open_manager(target):
    """Managers that are stopped at the end."""
    made = []

    def make(**options):
        options = {"generation_config": CONFIG, "continuous_batching_config": FEW, **options}
        made.append(target.init_continuous_batching(assistant_model=find_drafter(), **options))
        return made[-1]

    yield make
    for manager in made:
        if manager.is_running():
            manager.stop(hard_stop=True)


# ---- generate_batch ----


def test_each_request_says_what_it_says_alone(target):
    outputs = decode(target, record_timestamps=True)
    assert list(outputs) == [f"req_{n}" for n in range(len(LENGTHS))]
    assert texts_of(outputs) == ALONE
    for output, prompt in zip(outputs.values(), PROMPTS, strict=True):
        assert isinstance(output, GenerationOutput)
        assert (output.prompt_ids, output.status, output.error) == (prompt, RequestStatus.FINISHED, None)
        assert output.timestamps == sorted(output.timestamps)
        assert len(output.timestamps) == NEW
        assert output.created_time < output.lifespan[0] < output.timestamps[0] <= output.lifespan[1]
        assert output.speculation.num_accepted > 0
    assert count_hooks(target) == 0
    assert target.config._attn_implementation == "sdpa"
    assert decode(target, []) == {}


def test_our_engine_decodes_without_a_drafter_if_asked(target):
    outputs = decode(target, decode_loop="own")
    assert texts_of(outputs) == ALONE
    assert all(output.speculation.num_drafted == 0 for output in outputs.values())


def test_without_a_drafter_it_is_the_hosts(target, plain_host):
    """Called as it would be without us."""
    own = target.generate_batch
    assert own.__module__.startswith("transformers.")


@pytest.mark.parametrize("options", [{}, {"assistant_model": None}], ids=["nothing", "none"])
def test_the_hosts_engine_still_answers(target, options):
    outputs = target.generate_batch(PROMPTS[:2], generation_config=CONFIG, **HOSTS, **options)
    assert texts_of(outputs) == ALONE[:2]
    assert not any(hasattr(output, "speculation") for output in outputs.values())


def test_one_bar_counts_requests(target, capsys):
    decode(target, progress_bar=True)
    shown = capsys.readouterr().err
    assert "Solving 5 requests: 100%" in shown
    assert shown.count("\n") == 1
    decode(target)
    assert capsys.readouterr().err == ""


class Bans(LogitsProcessor):
    """Counts its calls, which is its own affair."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        assert len(input_ids) == 1
        self.seen.append(input_ids.shape[1])
        return scores.index_fill(1, input_ids[0, -2:-1], -torch.inf)


class StopsAt(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.tensor([input_ids.shape[1] >= 14])


# What a request brings, and what `generate` is given for the same.
BROUGHT = {
    "nothing": ({}, {}),
    "length": ({"max_new_tokens": 5}, {"max_new_tokens": 5}),
    "end": ({"eos_token_id": [43, 61]}, {"eos_token_id": [43, 61], "pad_token_id": 0}),
    "strings": ({"stop_strings": ["w43"], "tokenizer": word_tokenizer()},) * 2,
    "penalty": ({"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},) * 2,
    "longer": (
        {"min_new_tokens": 8, "eos_token_id": 43},
        {"min_new_tokens": 8, "eos_token_id": 43, "pad_token_id": 0},
    ),
    "processor": ({"logits_processor": [Bans()]}, {"logits_processor": LogitsProcessorList([Bans()])}),
    "criterion": ({"stopping_criteria": [StopsAt()]},) * 2,
    "sampled": (
        {"do_sample": True, "temperature": 0.7, "seed": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 0, "seed": 3},
    ),
    "top": ({"do_sample": True, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "seed": 11},) * 2,
    "typical": (
        {"do_sample": True, "typical_p": 0.8, "seed": 4},
        {"do_sample": True, "typical_p": 0.8, "top_k": 0, "seed": 4},
    ),
}


def test_each_request_has_settings_of_its_own(target):
    """In one batch: greedy and sampled, with processors that look at the text and without, to any length."""
    own, calls = zip(*BROUGHT.values(), strict=True)
    lengths = (LENGTHS * 3)[: len(own)]
    outputs = decode(target, [make_prompt(n)[0].tolist() for n in lengths], request_kwargs=own)
    for name, length, call, text in zip(BROUGHT, lengths, calls, texts_of(outputs), strict=True):
        loop = {"decode_loop": "own"} if "seed" in call else {}
        options = {"max_new_tokens": NEW, **GREEDY, **call, **loop}
        assert text == target.generate(make_prompt(length), **options)[0, length:].tolist(), name


def test_a_processor_keeps_each_requests_text_apart(target):
    shared = Bans()
    outputs = decode(target, PROMPTS[:3], logits_processor=[shared])
    expected = [say_alone.__wrapped__(n, logits_processor=LogitsProcessorList([Bans()])) for n in LENGTHS[:3]]
    assert texts_of(outputs) == expected
    assert shared.seen == []


def test_seeds_count_on_from_the_first(target):
    settings = {"do_sample": True, "top_k": 20}
    outputs = decode(target, seed=7, **settings)
    options = {**settings, "decode_loop": "own", "max_new_tokens": NEW}
    alone = [target.generate(make_prompt(n), seed=7 + b, **options)[0, n:].tolist() for b, n in enumerate(LENGTHS)]
    assert texts_of(outputs) == alone
    assert texts_of(decode(target, seed=[7, 8, 9, 10, 11], **settings)) == alone
    config = limit(seed=7)
    assert texts_of(decode(target, continuous_batching_config=config, **settings)) == alone
    assert texts_of(decode(target, **settings)) != texts_of(decode(target, **settings))


def test_several_texts_of_a_prompt(target):
    config = GenerationConfig(max_new_tokens=6, do_sample=True, num_return_sequences=3)
    outputs = decode(target, PROMPTS[:2], generation_config=config, seed=5)
    assert list(outputs) == ["req_0__child#0", "req_0__child#1", "req_0", "req_1__child#0", "req_1__child#1", "req_1"]
    assert len({tuple(text) for text in texts_of(outputs)}) > 3


def test_likelihoods_are_those_of_what_was_chosen_from(target):
    config = limit(return_logprobs=True, max_requests_per_batch=3)
    own = [{}, {"do_sample": True, "temperature": 0.5, "top_k": 9, "seed": 2}, {"repetition_penalty": 1.3}]
    outputs = decode(target, PROMPTS[:3], continuous_batching_config=config, request_kwargs=own)
    for output, length, call in zip(outputs.values(), LENGTHS, own, strict=False):
        options = {**GREEDY, **call, "decode_loop": "own", "max_new_tokens": NEW}
        plain = target.generate(make_prompt(length), return_dict_in_generate=True, output_scores=True, **options)
        chosen = [float(s[0].log_softmax(-1)[t]) for s, t in zip(plain.scores, output.generated_tokens, strict=True)]
        assert output.logprobs == pytest.approx(chosen, abs=1e-4)


# ---- bad input ----


def test_a_request_that_cannot_run_harms_nobody(target, caplog):
    bad = {
        "empty": [],
        "too many positions": [5] * 250,
        "foreign": [5, 99],
        "negative": [-1, 4],
        "words": ["the", "cat"],
        "nothing": None,
    }
    prompts = [PROMPTS[0], *bad.values(), PROMPTS[1]]
    with caplog.at_level(logging.ERROR):
        outputs = decode(target, prompts)
    first, *failed, last = outputs.values()
    assert [first.generated_tokens, last.generated_tokens] == ALONE[:2]
    words = ["is empty", "256 positions", "the token 99", "token -1", "list of token ids", "list of token ids"]
    for output, said in zip(failed, words, strict=True):
        assert said in output.error
        assert output.status == RequestStatus.FAILED
        assert output.generated_tokens == []
    assert "failed during generation" in caplog.text


def test_a_text_ends_with_the_targets_positions(target):
    (output,) = decode(target, [[7] * 250], generation_config=GenerationConfig(**GREEDY)).values()
    assert len(output.generated_tokens) == 6


def test_a_request_longer_than_memory_fails_alone(target):
    config = limit(num_blocks=8, page_size=4)
    outputs = decode(target, PROMPTS, continuous_batching_config=config)
    assert [output.error is None for output in outputs.values()] == [True, True, False, True, True]
    assert "need 42 slots, and memory holds 32" in outputs["req_2"].error
    assert [t for t in texts_of(outputs) if t] == [*ALONE[:2], *ALONE[3:]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tempreture": 0.7}, "given tempreture; expected fields of a GenerationConfig"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
        ({"stop_strings": ["x"]}, "tokenizer"),
        ({"seed": [1, 2]}, "2 numbers for 5 rows"),
        ({"seed": "x"}, "whole number"),
        ({"decode_loop": "host"}, "does not draft for batches"),
        ({"decode_loop": "mine"}, "decode_loop is 'mine'"),
        ({"num_assistant_tokens": 99}, "num_assistant_tokens"),
        ({"request_kwargs": [{}]}, "1 mappings for 5 prompts"),
        ({"request_kwargs": [{"who": 1}, {}, {}, {}, {}]}, "given who"),
        ({"continuous_batching_config": limit(max_requests_per_batch=-1)}, "max_requests_per_batch"),
        ({"continuous_batching_config": limit(max_batch_tokens=0)}, "max_batch_tokens"),
        ({"assistant_model": "someone/eagle3"}, r'AutoModel\.from_pretrained\("someone/eagle3"\)'),
    ],
)
def test_what_means_nothing_is_refused_before_any_work(target, options, says):
    options = {"assistant_model": find_drafter(), **options}
    with pytest.raises(ValueError, match=says) as caught:
        target.generate_batch(PROMPTS, generation_config=CONFIG, **options)
    assert "\n" not in str(caught.value)
    assert count_hooks(target) == 0


def test_a_target_that_our_loop_does_not_take_is_refused(target):
    hook = target.lm_head.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="has hooks of others"):
            decode(target)
    finally:
        hook.remove()


# ---- attached ----


def test_attached_drafters_draft_for_batches_too(target):
    attach(target, find_drafter(), num_assistant_tokens=2)
    try:
        outputs = target.generate_batch(PROMPTS, generation_config=CONFIG)
        assert texts_of(outputs) == ALONE
        assert {output.speculation.depth for output in outputs.values()} == {2}
        outputs = target.generate_batch(PROMPTS[:1], generation_config=CONFIG, assistant_model=None, **HOSTS)
        assert not hasattr(outputs["req_0"], "speculation")
        with target.continuous_batching_context_manager(generation_config=CONFIG) as manager:
            request = manager.add_request(PROMPTS[0])
            assert manager.get_result(request).speculation.rounds > 0
    finally:
        detach(target)


def test_an_attached_drafter_that_cannot_help_leaves_the_batch_to_the_host(target, caplog):
    attach(target, find_drafter())
    hook = target.lm_head.register_forward_hook(lambda *_: None)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                outputs = target.generate_batch(PROMPTS[:1], generation_config=CONFIG, **HOSTS)
        assert texts_of(outputs) == ALONE[:1]
        assert caplog.text.count("cannot help with this call") == 1
    finally:
        hook.remove()
        detach(target)


# ---- the manager ----


def collect(manager, num_requests):
    """The last outputs of so many requests, by id."""
    last = {}
    while len(last) < num_requests:
        output = manager.get_result(timeout=10)
        assert output is not None, "nothing came"
        if output.is_finished():
            last[output.request_id] = output
    return last


def test_requests_come_and_go(open_manager):
    with open_manager() as manager:
        ids = manager.add_requests(PROMPTS[:3])
        own = manager.add_request(PROMPTS[3], request_id="mine", max_new_tokens=4)
        assert own == "mine"
        outputs = collect(manager, 4)
        assert [outputs[i].generated_tokens for i in ids] == ALONE[:3]
        assert outputs["mine"].generated_tokens == ALONE[3][:4]
        late = manager.add_request(PROMPTS[4])
        assert [output.generated_tokens for output in manager.request_id_iter(late)] == [ALONE[4]]
        assert manager.get_result(timeout=0.01) is None
        stats = manager.stats
        assert (stats.finished, stats.failed, stats.running, stats.waiting) == (5, 0, 0, 0)
        assert stats.tokens == 4 * NEW + 4
        assert 0 < stats.time_to_first_token <= stats.time_to_first_token_p95
        assert stats.tokens_per_second > 0
        assert stats.acceptance_length > 1
        assert stats.graphs == "none (the models are on cpu)"
    assert not manager.is_running()
    assert manager.background_thread_status.fatal_error is None


def test_streaming_tells_of_each_round_what_there_is_so_far(open_manager):
    with open_manager() as manager:
        manager.add_request(PROMPTS[1], streaming=True)
        outputs = list(manager.request_id_iter("req_0"))
    assert len(outputs) > 2
    for output in outputs:
        assert output.generated_tokens == ALONE[1][: len(output.generated_tokens)]
    assert [output.is_finished() for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_an_id_is_given_once_at_a_time(open_manager):
    with open_manager() as manager:
        with manager.pause():
            manager.add_request(PROMPTS[0], request_id="a")
            manager.add_request(PROMPTS[0], request_id="req_0")
            with pytest.raises(ValueError, match="request_id 'a' is that of another request under way"):
                manager.add_request(PROMPTS[1], request_id="a")
            assert manager.add_request(PROMPTS[1]) == "req_1"
        assert len(collect(manager, 3)) == 3
        assert manager.add_request(PROMPTS[1], request_id="a") == "a"
        assert manager.get_result("a").generated_tokens == ALONE[1]


def test_a_cancelled_request_ends_and_says_so(open_manager):
    long = GenerationConfig(max_new_tokens=200, **GREEDY)
    with open_manager(generation_config=long) as manager:
        ids = [manager.add_request(prompt) for prompt in PROMPTS[:3]]  # of which two run at once
        manager.cancel_request(ids[0])
        manager.cancel_request(ids[2])
        manager.cancel_request("nobody")
        outputs = collect(manager, 3)
        assert len(outputs[ids[1]].generated_tokens) == 200
        for cancelled in (ids[0], ids[2]):
            assert outputs[cancelled].error == f"Request {cancelled} was cancelled."
            assert len(outputs[cancelled].generated_tokens) < 200


class GoneError(Exception):
    pass


class FailingStreamer(TextStreamer):
    def __init__(self):
        self.tokens = 0

    def put(self, value):
        self.tokens += value.numel()
        if self.tokens > 9 + 4:
            raise GoneError("the client has gone")

    def end(self):
        pass


class FailingProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 12:
            raise GoneError("no grammar for that")
        return scores


@pytest.mark.parametrize(
    "brought",
    [{"streamer": FailingStreamer()}, {"logits_processor": [FailingProcessor()]}],
    ids=["streamer", "processor"],
)
def test_what_a_request_brings_fails_for_it_alone(open_manager, brought):
    with open_manager() as manager:
        failing = manager.add_request(PROMPTS[1], **brought)
        others = [manager.add_request(PROMPTS[b]) for b in (0, 2)]
        outputs = collect(manager, 3)
    assert "the client has gone" in outputs[failing].error or "no grammar" in outputs[failing].error
    assert outputs[failing].status == RequestStatus.FAILED
    assert [outputs[other].generated_tokens for other in others] == [ALONE[0], ALONE[2]]


def test_a_streamer_gets_the_prompt_and_each_token(target):
    class Keeps(TextStreamer):
        def __init__(self):
            self.seen, self.is_over = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.is_over = True

    streamer = Keeps()
    decode(target, PROMPTS[:2], request_kwargs=[{"streamer": streamer}, None])
    assert streamer.seen == PROMPTS[0] + ALONE[0]
    assert streamer.is_over


def test_a_forward_that_fails_takes_its_rows_and_no_others(target, open_manager):
    fails = threading.Event()

    def fail(_module, _args):
        if fails.is_set():
            raise RuntimeError("the device is on fire")

    hook = target.lm_head.register_forward_pre_hook(fail)
    hook_id = hook.id
    fail.__module__ = "torch.tests"  # a hook of others would keep requests out
    try:
        with open_manager() as manager:
            with manager.pause():
                doomed = manager.add_requests(PROMPTS[:2])
                fails.set()
            outputs = collect(manager, 2)
            assert {outputs[i].error for i in doomed} == {"the device is on fire"}
            fails.clear()
            later = manager.add_request(PROMPTS[2])
            assert manager.get_result(later).generated_tokens == ALONE[2]
            assert manager.background_thread_status.fatal_error is None
    finally:
        hook.remove()
    assert hook_id not in target.lm_head._forward_pre_hooks


@pytest.mark.parametrize("is_hard", [False, True], ids=["drains", "at_once"])
def test_stopping(open_manager, is_hard):
    long = GenerationConfig(max_new_tokens=60, **GREEDY)
    manager = open_manager(generation_config=long)
    manager.start()
    ids = manager.add_requests(PROMPTS)
    manager.stop(hard_stop=is_hard)
    assert not manager.is_running()
    assert manager.add_request(PROMPTS[0]) is None
    outputs = {output.request_id: output for output in manager}
    assert set(outputs) == set(ids)
    if is_hard:
        assert any("under way when generation stopped" in (o.error or "") for o in outputs.values())
    else:
        assert all(len(output.generated_tokens) == 60 for output in outputs.values())
    assert manager.get_result() is None
    manager.start()  # and again
    again = manager.add_request(PROMPTS[0], max_new_tokens=NEW)
    assert manager.get_result(again).generated_tokens == ALONE[0]


def test_an_exception_in_its_context_stops_it_at_once(target):
    def use(kept):
        config = GenerationConfig(max_new_tokens=200, **GREEDY)
        with target.continuous_batching_context_manager(config, assistant_model=find_drafter()) as manager:
            kept.append(manager)
            manager.add_requests(PROMPTS)
            raise GoneError

    kept = []
    with pytest.raises(GoneError):
        use(kept)
    assert not kept[0].is_running()


def test_the_target_may_be_changed_while_requests_wait(target, open_manager):
    with open_manager() as manager:
        with manager.pause():
            waiting = manager.add_request(PROMPTS[0])
            time.sleep(0.02)
            assert manager.get_result(timeout=0) is None
            with pytest.raises(RuntimeError, match="inside a pause"):
                manager.stop()
            with torch.no_grad():
                target.lm_head.weight.neg_()
        changed = manager.get_result(waiting).generated_tokens
        with manager.pause(), torch.no_grad():
            target.lm_head.weight.neg_()
        again = manager.add_request(PROMPTS[0])
        assert manager.get_result(again).generated_tokens == ALONE[0] != changed
    with pytest.raises(RuntimeError, match="none is running"), manager.pause():
        pass


def test_a_full_queue_makes_callers_wait(open_manager, monkeypatch):
    monkeypatch.setattr(managers, "PATIENCE", 0.05)
    config = limit(max_queue_size=2, max_requests_per_batch=1)
    with open_manager(continuous_batching_config=config) as manager:
        with manager.pause():
            taken = [manager.add_request(PROMPTS[b]) for b in range(2)]
            with pytest.raises(queue.Full, match="max_queue_size"):
                manager.add_request(PROMPTS[2], request_id="x")
        outputs = collect(manager, 2)
        assert [outputs[i].generated_tokens for i in taken] == ALONE[:2]
        assert manager.add_request(PROMPTS[2], request_id="x") == "x"


def test_handlers_hear_what_came_before_them_too(open_manager):
    async def ask(manager):
        heard, is_over = [], asyncio.Event()

        def hear(output):
            heard.append(output)
            if output.is_finished():
                is_over.set()

        request = manager.add_request(PROMPTS[1], streaming=True)
        await asyncio.sleep(0.1)
        manager.register_result_handler(request, hear)
        await asyncio.wait_for(is_over.wait(), 10)
        return heard

    with open_manager() as manager:
        heard = asyncio.run(ask(manager))
        assert heard[-1].generated_tokens == ALONE[1]
        assert len(heard) > 2
        assert manager.get_result(timeout=0) is None


def test_a_client_whose_loop_has_closed_frees_its_place(open_manager):
    async def leave(manager):
        request = manager.add_request(PROMPTS[1], streaming=True, max_new_tokens=200)
        manager.register_result_handler(request, lambda _: None)

    with open_manager() as manager:
        asyncio.run(leave(manager))
        other = manager.add_request(PROMPTS[0])
        assert manager.get_result(other).generated_tokens == ALONE[0]
        while manager.stats.running:
            time.sleep(0.01)
        assert manager.stats.failed == 1


def test_plain_calls_go_on_beside_it(target, open_manager):
    with open_manager() as manager:
        ids = manager.add_requests(PROMPTS)
        for length, alone in zip(LENGTHS, ALONE, strict=True):
            assert say_alone.__wrapped__(length) == alone
            drafted = target.generate(
                make_prompt(length), assistant_model=find_drafter(), max_new_tokens=NEW, **GREEDY
            )
            assert drafted[0, length:].tolist() == alone
        outputs = collect(manager, len(ids))
        assert [outputs[i].generated_tokens for i in ids] == ALONE


def test_the_hosts_server_finds_what_it_asks_for(target):
    """Its generation manager for continuous batching, over an attached drafter: streaming, not streaming, cancelled."""

    class Words:
        _tokenizer = word_tokenizer()._tokenizer

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    async def serve(server):
        inputs = [{"input_ids": prompt} for prompt in PROMPTS]
        options = {"gen_config": CONFIG}
        whole = server.generate_non_streaming(target, Words(), inputs[0], request_id="a", **options)
        stream, streamer = server.generate_streaming(target, Words(), inputs[1], request_id="b", **options)
        _, cancelled = server.generate_streaming(target, Words(), inputs[2], request_id="c", **options)
        cancelled.cancel()
        _, length, ids = await asyncio.wait_for(whole, 10)
        parts = []
        while (part := await asyncio.wait_for(stream.get(), 10)) is not None:
            parts.append(part)
        return ids, length, parts, streamer.total_tokens

    attach(target, find_drafter())
    server = CBGenerateManager(FEW)
    try:
        server.init_cb(target, CONFIG)
        assert server.is_alive()
        ids, length, parts, total = asyncio.run(serve(server))
    finally:
        server.stop()
        detach(target)
    assert (ids, length) == (ALONE[0], LENGTHS[0])
    assert len(parts) > 1
    assert total == NEW


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind(target):
    """Nothing is lost, the order of results is that of requests, and nothing lives on."""
    short = GenerationConfig(max_new_tokens=2, **GREEDY)
    config = limit(max_requests_per_batch=16)
    gc.collect()
    for _ in range(10):
        outputs = decode(
            target, PROMPTS * 200, generation_config=short, continuous_batching_config=config, request_kwargs=None
        )
        assert texts_of(outputs) == [alone[:2] for alone in ALONE] * 200
        gc.collect()
        tensors = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
        del outputs
    assert tensors < 5000


@pytest.mark.parametrize("family", slow_but(["gemma3"], ["gemma3", "gpt_oss", "qwen_vlm", "deepseek_v3"]))
def test_targets_of_other_families(family):
    target = make_target(family)
    outputs = decode(target, assistant_model=make_drafter(target))
    assert texts_of(outputs) == [say_alone(n, family) for n in LENGTHS]


def test_pads_of_prompts_that_come_together_are_nobodys():
    """TrOCR counts them as positions, and prompts alone have none."""
    target = families.build(families.Family("trocr", "causal"))
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=-1, **GREEDY)
    outputs = target.generate_batch(PROMPTS, generation_config=config, decode_loop="own")
    options = {"max_new_tokens": NEW, "eos_token_id": None, **GREEDY}
    alone = [target.generate(make_prompt(n), **options)[0, n:].tolist() for n in LENGTHS]
    assert texts_of(outputs) == alone


def test_encoders_are_the_hosts():
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    target = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        target.generate_batch(PROMPTS, decode_loop="own")
