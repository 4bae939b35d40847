"""Captured rounds: the same text as eager ones, whatever happens between calls.

On a CPU, a stand-in for CUDA graphs runs the recorded phases again and moves their results to where the recording left
them. It shows that phases read and write static memory alone; row attention runs as its eager twin.
"""

import copy
import threading
import time
import types
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers.arguments import Raise
from helpers.batches import (
    GREEDY,
    assert_same,
    assert_same_caches,
    assert_same_up_to_ties,
    make_oracle,
    pad,
    plain_of,
    prompts_of,
)
from helpers.capture import PhasesOnGpus, capture_on_cpus
from helpers.marks import slow_but
from helpers.models import FAMILIES, OLD, count_hooks, make_drafter, make_prompt, make_target
from transformers import LogitsProcessorList
from transformers.models.llama import modeling_llama

import hf_eagle3.decoding.arena as arena
from hf_eagle3 import release_graphs
from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.decoding import cuda_graphs, lock
from hf_eagle3.decoding.engine import warn_once
from hf_eagle3.host import generate
from hf_eagle3.kernels import fusion
from hf_eagle3.rows import block
from hf_eagle3.rows.attention import UnfitError


@pytest.mark.parametrize(
    "lengths", slow_but([(30, 7, 1, 18)], [(5,), (1,), (30, 7, 1, 18)]), ids=["one_row", "one_token", "ragged"]
)
@pytest.mark.parametrize(
    "family", slow_but(["llama", "gemma3", "gpt_oss", "deepseek_v3"], [*OLD, "qwen_vlm", "deepseek_v3", *FAMILIES])
)
def test_greedy_rows_are_the_targets(family, lengths, counts):
    plain = plain_of(family, lengths, 24)
    _, out = assert_same(make_target(family), pad(prompts_of(*lengths)), max_new_tokens=24, plain=plain)
    assert 1 < out.speculation.acceptance_length < 4
    assert out.speculation.graphs.startswith("captured in")
    assert counts.captured == 3
    assert counts.replayed > 15


def test_graphs_are_kept_between_calls(target, counts):
    batch = pad(prompts_of(9, 4))
    plain = target.generate(**batch, max_new_tokens=20, **GREEDY)
    drafter = make_drafter(target)
    told = []
    for _ in range(3):
        options = {"assistant_model": drafter, "max_new_tokens": 20, "return_dict_in_generate": True, **GREEDY}
        out = target.generate(**batch, **options)
        assert out.sequences.tolist() == plain.tolist()
        told.append(out.speculation.graphs)
    assert counts.captured == 3
    assert told[1:] == ["replayed", "replayed"]


def test_smaller_batches_and_other_settings_share_the_memory(target, counts):
    drafter = make_drafter(target)
    calls = [((9, 4, 6), {}), ((3, 5), {}), ((9, 4, 6), {"repetition_penalty": 1.3}), ((7,), {}), ((2, 3, 4), {})]
    arenas = set()
    for lengths, options in calls:
        batch, options = pad(prompts_of(*lengths)), {"max_new_tokens": 15, **GREEDY, **options}
        plain = target.generate(**batch, **options)
        assert target.generate(**batch, assistant_model=drafter, **options).tolist() == plain.tolist()
        arenas.add(id(arena._arenas[target]))
    assert len(arenas) == 1
    assert counts.captured == 3 + 3 + 2 + 3  # processors that look at the text settle eagerly


def test_larger_calls_get_more_memory(target, counts):
    drafter = make_drafter(target)
    for lengths in ((3,), (4, 40), (100, 2, 3)):
        batch, options = pad(prompts_of(*lengths)), {"max_new_tokens": 8, **GREEDY}
        plain = target.generate(**batch, **options)
        assert target.generate(**batch, assistant_model=drafter, **options).tolist() == plain.tolist()
    assert arena._arenas[target].num_rows == 3


def test_kept_caches_are_counted(target, counts):
    release_graphs()
    assert arena.count_cache_bytes(target) == 0
    drafter = make_drafter(target)
    target.generate(**pad(prompts_of(9, 4)), assistant_model=drafter, max_new_tokens=8, **GREEDY)
    capacity, layers = (
        arena._arenas[target].capacity,
        target.config.num_hidden_layers + drafter.config.num_hidden_layers,
    )
    per_slot = (
        2 * target.config.num_key_value_heads * target.config.head_dim * 4
    )  # keys and values, float32; alike here
    assert arena.count_cache_bytes(target) == 2 * capacity * layers * per_slot


def test_long_prompts_fill_the_kept_memory(target, counts, monkeypatch):
    monkeypatch.setattr(block, "LONG_PROMPT", 3)
    drafter = make_drafter(target)
    for lengths in ((19, 4, 13), (5, 9), (7, 8, 30)):
        batch, options = pad(prompts_of(*lengths)), {"max_new_tokens": 8, **GREEDY}
        plain = target.generate(**batch, **options)
        assert target.generate(**batch, assistant_model=drafter, **options).tolist() == plain.tolist()
        cache, _ = arena._arenas[target].caches
        assert cache.layers[0].keys.shape[:2] == (3, arena._arenas[target].capacity)
    assert counts.captured == 6


@pytest.mark.parametrize("further", slow_but([{}], [{}, {"no_repeat_ngram_size": 3}]), ids=["tensors", "in_order"])
def test_memory_grows_within_a_call(target, monkeypatch, further):
    counts = capture_on_cpus(monkeypatch, first_room=16)
    _, out = assert_same(target, pad(prompts_of(50, 60)), max_new_tokens=150, **further)
    assert counts.captured >= 4
    assert "captured" in out.speculation.graphs


@pytest.mark.parametrize(
    "others", [None, {"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {"head_dim": 32}], ids=str
)
def test_memory_is_made_for_the_drafter_of_the_call(others, target, monkeypatch):
    """What an earlier call left has room for its own drafter; a batch that shrinks moves both caches."""
    counts = capture_on_cpus(monkeypatch, worth_capture=1)
    batch, options = (
        pad(prompts_of(9, 4, 6, 7)),
        {"max_new_tokens": 60, "eos_token_id": list(range(3, 60, 3)), **GREEDY},
    )
    drafter = make_drafter(target)
    options |= {"return_dict_in_generate": True}
    fresh = target.generate(**batch, assistant_model=drafter, num_assistant_tokens=3, **options)
    release_graphs()
    earlier = None if others is None else make_drafter(target, **others)
    target.generate(**batch, assistant_model=earlier, decode_loop="own", **options)
    out = target.generate(**batch, assistant_model=drafter, num_assistant_tokens=3, **options)
    assert out.sequences.tolist() == fresh.sequences.tolist()
    assert out.speculation.rounds_accepting == fresh.speculation.rounds_accepting
    assert out.speculation.graphs.startswith("captured")
    assert counts.replayed


@pytest.mark.parametrize("eos", [[11, 25, 37, 41, 52, 7, 13], list(range(3, 60, 3))])
def test_batches_shrink_as_rows_end(target, monkeypatch, eos):
    counts = capture_on_cpus(monkeypatch, worth_capture=20)
    batch = pad(prompts_of(9, 4, 6, 12, 3, 5, 8))
    plain, out = assert_same(target, batch, max_new_tokens=60, eos_token_id=eos)
    ends = [row.num_tokens for row in out.speculation.rows]
    assert min(ends) < max(ends)
    # Dict outputs keep their rows for the cache; a plain call drops them.
    before = counts.captured
    oracle = make_oracle(target, plain.sequences, batch)
    options = {"max_new_tokens": 60, "eos_token_id": eos, **GREEDY}
    assert target.generate(**batch, assistant_model=oracle, **options).tolist() == plain.sequences.tolist()
    assert counts.captured > before


@pytest.mark.slow
def test_calls_that_would_have_gained_by_a_smaller_batch_add_up(target, monkeypatch):
    counts = capture_on_cpus(monkeypatch, worth_capture=20)
    batch = pad(prompts_of(9, 4, 6, 12))
    eos = target.generate(**batch, max_new_tokens=19, **GREEDY)[:3, 30].unique().tolist()  # three rows end early
    options = {"max_new_tokens": 19, "eos_token_id": eos, **GREEDY}
    plain = target.generate(**batch, **options)
    drafter, captured = make_drafter(target), []
    for _ in range(6):
        before = counts.captured
        assert target.generate(**batch, assistant_model=drafter, **options).tolist() == plain.tolist()
        captured.append(counts.captured - before)
    assert captured[:2] == [3, 0]  # fewer tokens to come than a smaller batch is made for
    assert sum(captured[2:]) >= 3  # ... until enough rounds had too many rows, and then no more
    assert captured[-1] == 0


@pytest.mark.parametrize("lateness", slow_but([2], [0, 1, 2]))
def test_rounds_may_be_read_late(target, monkeypatch, lateness):
    capture_on_cpus(monkeypatch, rounds_in_flight=lateness)
    for eos in (None, [11, 25, 37]):
        assert_same(target, pad(prompts_of(9, 4, 6)), max_new_tokens=25, eos_token_id=eos)


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "temperature": 0.7}, {"top_p": 0.9, "min_p": 0.02}], ids=str)
def test_sampling_draws_the_same_numbers_as_eager_rounds(target, monkeypatch, options):
    batch, drafter, runs = pad(prompts_of(5, 3)), make_drafter(target), []
    counts = capture_on_cpus(monkeypatch, rounds_in_flight=0)
    # Eager rounds would drop a row at once, after which the others draw other numbers: dict outputs keep all.
    options = {**options, "return_dict_in_generate": True}
    for loop in ("own", "own", "eager"):
        torch.manual_seed(3)
        out = target.generate(
            **batch, assistant_model=drafter, do_sample=True, max_new_tokens=20, decode_loop=loop, **options
        )
        runs.append(out.sequences.tolist())
    assert runs[0] == runs[1] == runs[2]
    assert counts.captured == 3


def make_check(target, counts):
    """What compares a call with plain decoding, and how much was captured after each."""
    drafter, prompt, seen = make_drafter(target), make_prompt(7), []

    def check():
        plain = target.generate(prompt, max_new_tokens=15, **GREEDY)
        out = target.generate(prompt, assistant_model=drafter, max_new_tokens=15, **GREEDY)
        assert out.tolist() == plain.tolist()
        seen.append(counts.captured)

    return check, seen


def test_adapters_are_seen(counts):
    peft = pytest.importorskip("peft")
    target = copy.deepcopy(make_target("llama"))
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, target, adapter_name=name)  # the host's own way needs the newest PEFT
    layers = [module for module in target.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
    check, seen = make_check(target, counts)

    for name in "aab":
        for layer in layers:
            layer.set_adapter(name)
        check()
    for layer in layers:
        layer.enable_adapters(False)
    check()
    assert seen == [3, 3, 6, 9]


def test_changed_weights_are_seen(counts):
    target = copy.deepcopy(make_target("llama"))
    check, seen = make_check(target, counts)

    check()
    with torch.no_grad():  # in place: graphs stay
        target.lm_head.weight.mul_(-1)
    check()
    target.lm_head.weight = torch.nn.Parameter(-target.lm_head.weight.detach() + 0.1)  # elsewhere: graphs go
    check()
    assert seen == [3, 3, 6]


def test_scores_are_kept_though_graphs_overwrite_them(target, counts):
    options = {"max_new_tokens": 15, "output_scores": True, "output_logits": True}
    plain, out = assert_same(target, pad(prompts_of(9, 4)), **options)
    for ours, theirs in zip((*out.scores, *out.logits), (*plain.scores, *plain.logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_interrupted_call_leaves_graphs_usable(target, counts):
    batch, drafter = pad(prompts_of(6, 3)), make_drafter(target)
    options = {"max_new_tokens": 12, "assistant_model": drafter, **GREEDY}
    plain = target.generate(**batch, max_new_tokens=12, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        target.generate(**batch, logits_processor=LogitsProcessorList([Raise(10)]), **options)
    assert count_hooks(target) == 0
    assert target.generate(**batch, **options).tolist() == plain.tolist()
    assert lock.why_busy(target) is None


class GenerateInside(torch.nn.Module):
    """A processor that generates with the same models."""

    def __init__(self, target, drafter):
        super().__init__()
        self.models = [target, drafter]
        self.told = []

    def __call__(self, input_ids, scores):
        target, drafter = self.models
        out = target.generate(
            input_ids, assistant_model=drafter, max_new_tokens=3, return_dict_in_generate=True, **GREEDY
        )
        self.told.append(out.speculation.graphs)
        return scores


def test_calls_under_inference_mode_and_others_take_turns(target, counts):
    drafter, batch = make_drafter(target), pad(prompts_of(9, 4))
    plain = target.generate(**batch, max_new_tokens=12, **GREEDY).tolist()
    for mode in (torch.inference_mode(), torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            out = target.generate(**batch, assistant_model=drafter, max_new_tokens=12, **GREEDY)
        assert out.tolist() == plain
    assert counts.captured == 3


class OutOfResourcesError(Exception):
    """As Triton's, which is no RuntimeError."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfResourcesError("out of resource: shared memory"),
        ValueError("query must be [B, H, T, D]"),  # a kernel refuses shapes
        ImportError("This needs Triton"),
        UnfitError("Attention brings a mask of its own"),
        AssertionError("Not supported"),  # of a compiler
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_kernel_refuses_is_done_without(error, target, monkeypatch):
    def fail(*_, **__):
        raise error

    capture_on_cpus(monkeypatch, around=fail)
    _, out = assert_same(target, pad(prompts_of(9, 4)), max_new_tokens=12)
    assert out.speculation.graphs == f"none ({type(error).__name__}: {error})"


def test_call_within_a_call_leaves_the_memory_alone(target, counts):
    prompt, drafter = make_prompt(6), make_drafter(target)
    plain = target.generate(prompt, max_new_tokens=8, **GREEDY)
    inside = GenerateInside(target, drafter)
    options = {"max_new_tokens": 8, "assistant_model": drafter, **GREEDY}
    assert (
        target.generate(prompt, logits_processor=LogitsProcessorList([inside]), **options).tolist() == plain.tolist()
    )
    assert set(inside.told) == {"none (another call of this target is under way)"}


def test_target_that_cannot_be_captured_runs_eagerly(target, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    capture_on_cpus(monkeypatch, around=fail)
    drafter, prompt = make_drafter(target), make_prompt(9)
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    for _ in range(2):
        out = target.generate(prompt, assistant_model=drafter, **options)
        assert out.sequences.tolist() == target.generate(prompt, **options).sequences.tolist()
        assert out.speculation.graphs == "none (RuntimeError: operation not permitted when stream is capturing)"
    assert caplog.text.count("cannot be captured") == 1


def test_no_room_for_caches_is_an_error_that_says_how_much(target, counts, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    batch, drafter = pad(prompts_of(9, 4)), make_drafter(target)
    options = {"max_new_tokens": 12, "assistant_model": drafter, **GREEDY}
    with monkeypatch.context() as patch:
        patch.setattr(arena.RowCache, "from_host", fail)
        with pytest.raises(arena.CacheMemoryError, match=r"2 rows of 64 positions, .* 0\.00 GiB: use fewer rows"):
            target.generate(**batch, **options)
    plain = target.generate(**batch, max_new_tokens=12, **GREEDY)
    assert target.generate(**batch, **options).tolist() == plain.tolist()


def test_cpu_runs_eagerly_and_says_so(target):
    _, out = assert_same(target, pad(prompts_of(9, 4)), max_new_tokens=12)
    assert out.speculation.graphs == "none (the models are on cpu)"


@pytest.mark.slow
def test_threads_take_turns_with_what_records(target, monkeypatch):
    """One has the graphs, the others run eagerly; while layers are changed, nobody runs them."""

    def slow_capture(capture, function, *args, pool):
        model = function.__self__.models.target
        time.sleep(0.02)  # layers are changed all the while
        replay, results = capture(function, *args, pool=pool)

        def replay_alone():  # the stand-in runs layers as a recording does; graphs would not
            with lock.lock_of(model).alone():
                replay()

        return replay_alone, results

    capture_on_cpus(monkeypatch, around=slow_capture)
    drafter = make_drafter(target)
    prompts = [make_prompt(n) for n in (5, 7, 9)]
    plain = [target.generate(prompt, max_new_tokens=10, **GREEDY).tolist() for prompt in prompts]
    found = {}

    def decode(i):
        for turn in range(4):
            out = target.generate(
                *(prompts[i],), assistant_model=drafter, max_new_tokens=10, return_dict_in_generate=True, **GREEDY
            )
            found[i, turn] = out.sequences.tolist(), out.speculation.graphs

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i, turn][0] for i in range(3) for turn in range(4)] == [text for text in plain for _ in range(4)]
    told = {graphs_told.split(" in ")[0] for _, graphs_told in found.values()}
    assert f"none ({lock.BUSY})" in told
    assert told & {"captured", "replayed"}
    assert target.config._attn_implementation == drafter.config._attn_implementation == "sdpa"
    assert lock.why_busy(target) is None


def test_a_size_that_cannot_be_captured_leaves_the_others_alone(target, monkeypatch):
    def fail_for_two(capture, function, *args, pool):
        if len(function.__self__.state.length) == 2:
            raise RuntimeError("waits")
        return capture(function, *args, pool=pool)

    capture_on_cpus(monkeypatch, around=fail_for_two)
    told = []
    drafter = make_drafter(target)
    for lengths in ((3, 4, 5), (3, 4), (3, 4), (3, 4, 5)):
        out = target.generate(
            **pad(prompts_of(*lengths)),
            assistant_model=drafter,
            max_new_tokens=8,
            return_dict_in_generate=True,
            **GREEDY,
        )
        told.append(out.speculation.graphs.split(" in ")[0])
    assert told == ["captured", *["none (RuntimeError: waits)"] * 2, "replayed"]


def test_a_batch_that_cannot_shrink_goes_on_eagerly(target, monkeypatch, caplog):
    def fail_for_few(capture, function, *args, pool):
        if len(function.__self__.state.length) < 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return capture(function, *args, pool=pool)

    capture_on_cpus(monkeypatch, around=fail_for_few, worth_capture=20)
    batch, options = (
        pad(prompts_of(9, 4, 6, 12, 3, 5, 8)),
        {"max_new_tokens": 60, "eos_token_id": list(range(3, 60, 3))},
    )
    plain = target.generate(**batch, do_sample=False, **options)
    oracle = make_oracle(target, plain, batch)
    out = target.generate(**batch, assistant_model=oracle, do_sample=False, **options)
    assert out.tolist() == plain.tolist()
    assert "Rounds of 2 rows cannot be captured, so they run eagerly: CUDA out of memory." in caplog.text


def make_arithmetic_check(target, *, device="cpu"):
    """What compares a batch with plain decoding in whatever arithmetic is on, and how much was captured after each."""
    batch = {name: value.to(device) for name, value in pad(prompts_of(9, 4)).items()}
    options = {"max_new_tokens": 15, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    plain = target.generate(**batch, **options)
    oracle, seen = make_oracle(target, plain.sequences.cpu(), pad(prompts_of(9, 4))).to(device), []

    def check(context, *, is_exact=True):
        with context:
            plain = target.generate(**batch, **options)
            out = target.generate(**batch, assistant_model=oracle, **options)
        assert out.speculation.graphs.startswith(("captured", "replayed")), out.speculation.graphs
        assert not is_exact or torch.equal(out.sequences, plain.sequences)
        assert_same_up_to_ties(out, plain)
        seen.append(out.speculation.graphs.split(" in ")[0])

    return check, seen


@contextmanager
def tf32(is_on):
    """float32 products by TF32, or not."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, is_on
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def test_graphs_are_of_the_arithmetic_that_they_were_captured_under(target, counts):
    check, seen = make_arithmetic_check(target)
    for is_on in (False, True, False):
        check(tf32(is_on))
    assert seen == ["captured", "captured", "replayed"]


def test_graphs_and_caches_are_of_the_autocast_that_they_were_made_under(target, counts):
    check, seen = make_arithmetic_check(target)
    check(nullcontext())
    for _ in range(2):
        check(torch.autocast("cpu", dtype=torch.bfloat16), is_exact=False)
    check(nullcontext())
    assert seen == ["captured", "captured", "replayed", "captured"]


@pytest.mark.parametrize("loop", ["own", "eager"])
def test_autocast_on_a_cpu(loop, target):
    batch, options = pad(prompts_of(9, 4)), {"max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    drafter = make_drafter(target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = target.generate(**batch, output_logits=True, **options)
        out = target.generate(**batch, assistant_model=drafter, decode_loop=loop, **options)
    assert_same_up_to_ties(out, plain)


def replace_layers(target):
    """What `use_kernels=True` does: instances get forwards of somebody's own."""

    def norm(self, hidden_states):
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    for module in target.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(norm, module)
    return target


def test_layers_that_the_hosts_kernels_replaced_are_captured(counts):
    target = replace_layers(copy.deepcopy(make_target("llama")))
    _, out = assert_same(target, pad(prompts_of(9, 4)), max_new_tokens=12)
    assert out.speculation.graphs.startswith("captured")


def test_a_reason_for_eager_rounds_is_said_once(target, caplog, monkeypatch):
    monkeypatch.setattr(type(target), "device", torch.device("cuda"), raising=False)
    for reason in ("LlamaMLP has forward hooks", "LlamaMLP has forward hooks", lock.BUSY, "the models are on cpu"):
        warn_once(target, reason)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "LlamaMLP has forward hooks.",
        "the models are on cpu.",
    ]


# ---- on a GPU ----


@pytest.mark.gpu
def test_models_of_one_family_are_recorded_in_threads_and_others_are_left_alone(monkeypatch):
    """Two threads record rounds of two models at once, while a third model of their family decodes plainly."""
    rotate, rotating, apply_rotary = modeling_llama.apply_rotary_pos_emb, set(), fusion.modules.apply_rotary

    def record(*args, **kwargs):
        rotating.add(threading.get_ident())
        return apply_rotary(*args, **kwargs)

    monkeypatch.setattr(fusion.modules, "apply_rotary", record)
    targets = [copy.deepcopy(make_target("llama")).to("cuda", torch.bfloat16) for _ in range(3)]
    drafters = [make_drafter(target).to("cuda", torch.bfloat16) for target in targets[:2]]
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    batches = [
        {name: value.cuda() for name, value in pad(prompts_of(*range(3, 4 + n))).items()} for n in (0, 1, 2, 4, 6)
    ]
    plain = [targets[2].generate(**batch, **options) for batch in batches]
    failed, told = [], []

    def decode(target, drafter):
        try:
            for batch, expected in zip(batches, plain, strict=True):  # each size is recorded
                out = target.generate(**batch, assistant_model=drafter, **options)
                assert_same_up_to_ties(out, expected)
                told.append(out.speculation.graphs)
        except Exception as error:  # noqa: BLE001  shown below
            failed.append(error)

    threads = [threading.Thread(target=decode, args=pair) for pair in zip(targets, drafters, strict=False)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for batch, expected in zip(batches, plain, strict=True):
            out = targets[2].generate(**batch, **options)
            assert all(map(torch.equal, out.logits, expected.logits))  # to the last bit
    assert not failed
    assert any(text.startswith("captured") for text in told), told
    assert rotating
    assert threading.get_ident() not in rotating
    assert modeling_llama.apply_rotary_pos_emb is rotate
    assert not any("forward" in vars(module) for model in (*targets, *drafters) for module in model.modules())
    release_graphs()


@pytest.mark.gpu
def test_arithmetic_on_a_gpu():
    target = copy.deepcopy(make_target("llama")).cuda()
    check, seen = make_arithmetic_check(target, device="cuda")
    check(nullcontext())
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        check(torch.autocast("cuda", dtype=dtype), is_exact=False)
        check(torch.autocast("cuda", dtype=dtype), is_exact=False)
    check(nullcontext())
    check(tf32(True), is_exact=False)
    assert seen == ["captured", *["captured", "replayed"] * 3, "captured", "captured"]
    release_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_under_autocast_to_another_dtype(family):
    target = copy.deepcopy(make_target(family)).to("cuda", torch.bfloat16)
    check, _ = make_arithmetic_check(target, device="cuda")
    for context in (nullcontext(), torch.autocast("cuda", dtype=torch.float16), nullcontext()):
        check(context, is_exact=False)
    release_graphs()


@pytest.mark.gpu
def test_a_drafter_left_on_the_cpu_is_named_once(caplog):
    target = copy.deepcopy(make_target("llama")).cuda()
    drafter, prompt = make_drafter(make_target("llama")).cpu(), make_prompt(9).cuda()
    plain = target.generate(prompt, max_new_tokens=12, **GREEDY)
    for _ in range(2):
        out = target.generate(
            prompt, assistant_model=drafter, max_new_tokens=12, return_dict_in_generate=True, **GREEDY
        )
        assert torch.equal(out.sequences, plain)
        assert 'drafter.to("cuda:0")' in out.speculation.graphs
    assert caplog.text.count('drafter.to("cuda:0")') == 1


@pytest.mark.gpu
def test_replaced_layers_are_captured_on_a_gpu():
    target = replace_layers(copy.deepcopy(make_target("llama"))).cuda()
    check, _ = make_arithmetic_check(target, device="cuda")
    check(nullcontext())
    release_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("family", [*OLD, "qwen_vlm", "deepseek_v3", *FAMILIES])
@pytest.mark.parametrize("lengths", [(5,), (30, 7, 1, 18)], ids=["one_row", "ragged"])
def test_captured_rounds_on_a_gpu(family, lengths):
    target = copy.deepcopy(make_target(family)).cuda()
    batch = {name: value.cuda() for name, value in pad(prompts_of(*lengths)).items()}
    options = {"max_new_tokens": 24, "return_dict_in_generate": True, **GREEDY}
    plain = target.generate(**batch, **options)
    drafter = make_drafter(target).cuda()
    for loop in ("own", "own", "eager"):
        out = target.generate(**batch, assistant_model=drafter, decode_loop=loop, **options)
        assert out.sequences.tolist() == plain.sequences.tolist()
        # Torch's grouped product of float32 counts each expert's tokens on the host.
        waits = len(lengths) > 1 and family in ("gpt_oss", "mixtral")
        captured = "none (RuntimeError" if waits else ("captured", "replayed")
        assert out.speculation.graphs.startswith("none (asked" if loop == "eager" else captured)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}], ids=["greedy", "sampled"])
def test_captured_rounds_equal_the_same_phases_run_eagerly(dtype, options, monkeypatch):
    target = copy.deepcopy(make_target("llama")).to("cuda", dtype)
    drafter = make_drafter(target).to("cuda", dtype)
    batch = {name: value.cuda() for name, value in pad(prompts_of(9, 30, 4)).items()}
    options = {"max_new_tokens": 60, "assistant_model": drafter, **GREEDY, **options}
    torch.manual_seed(5)
    captured = target.generate(**batch, **options).tolist()
    release_graphs()

    monkeypatch.setattr(generate, "CAPTURER", PhasesOnGpus())
    torch.manual_seed(5)
    assert target.generate(**batch, **options).tolist() == captured
    release_graphs()


@pytest.mark.gpu
def test_rounds_are_captured_after_somebody_asked_for_hidden_states():
    target = copy.deepcopy(make_target("llama")).cuda()
    drafter, prompt = make_drafter(target).cuda(), make_prompt(9).cuda()
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "assistant_model": drafter, **GREEDY}
    expected = target.generate(prompt, **options)
    with torch.no_grad():
        target(prompt, output_hidden_states=True)
    release_graphs()
    out = target.generate(prompt, **options)
    assert out.speculation.graphs.startswith("captured")
    assert torch.equal(out.sequences, expected.sequences)
    handle = target.model.layers[0].register_forward_hook(lambda *_: None)
    assert "LlamaDecoderLayer has forward hooks" in target.generate(prompt, **options).speculation.graphs
    handle.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("breaks_capture", [True, False], ids=["cuda_error", "python_error"])
def test_a_failed_capture_leaves_pytorch_as_it_was(breaks_capture):
    x = torch.ones(8, device="cuda")

    def fail():
        y = torch.zeros(2**24, device="cuda")
        if breaks_capture:
            y.sum().item()  # waits
        raise RuntimeError("no graph")

    def draw():
        return x + torch.rand(8, device="cuda")

    before = torch.cuda.memory_reserved()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="captur" if breaks_capture else "no graph"):
            cuda_graphs.capture(fail, pool=cuda_graphs.new_pool())
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert torch.rand(3, device="cuda").max() < 1
    torch.cuda.empty_cache()  # fails while memory is set apart for a capture
    assert torch.cuda.memory_reserved() <= before + 2**21
    torch.manual_seed(5)
    drawn = torch.rand(8, device="cuda")
    replay, out = cuda_graphs.capture(draw, pool=cuda_graphs.new_pool())
    torch.manual_seed(5)
    replay()
    torch.testing.assert_close(out, 1 + drawn)


@pytest.mark.gpu
def test_graphs_do_without_workspaces_that_others_clear():
    """As `torch.compile` does where it makes graphs of its own."""
    x = torch.randn(32, 14336, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(14336, 4096, device="cuda", dtype=torch.bfloat16)
    expected = x @ weight

    def multiply():
        return x @ weight

    for _ in range(2):  # the second's memory is its own
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_allocated()
        replay, out = cuda_graphs.capture(multiply, pool=cuda_graphs.new_pool())
        assert torch.cuda.memory_allocated() - before < out.nbytes + 2**20  # a workspace takes 32 MiB
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    filler = torch.full((2**26,), float("nan"), device="cuda")
    for _ in range(3):
        out.zero_()
        replay()
        torch.testing.assert_close(out, expected)
    assert filler.isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_rounds_run_on_a_device_that_is_not_the_current_one():
    for place in ("cuda:1", "cuda:0"):
        target = copy.deepcopy(make_target("llama")).to(place)
        drafter = make_drafter(target).to(place)
        batch = {name: value.to(place) for name, value in pad(prompts_of(9, 30, 4)).items()}
        options = {"max_new_tokens": 60, "return_dict_in_generate": True, **GREEDY}
        plain = target.generate(**batch, **options)
        for loop, told in (("own", "captured"), ("own", "replayed"), ("eager", "none (asked")):
            out = target.generate(**batch, assistant_model=drafter, decode_loop=loop, **options)
            assert out.sequences.tolist() == plain.sequences.tolist()
            assert out.speculation.graphs.startswith(told)
            assert out.speculation.rounds > 0
        assert torch.cuda.current_device() == 0
        release_graphs()


def test_rows_that_end_early_are_padded_within_the_memory_of_graphs(target, monkeypatch):
    """The cache that is returned holds the pads of plain decoding where memory has no room for as many behind the longest."""
    batch, options = pad(prompts_of(30, 4, 9)), {"max_new_tokens": 100, "return_dict_in_generate": True, **GREEDY}
    found = target.generate(**batch, **options).sequences[:, 30:].tolist()
    options["eos_token_id"] = next(token for token in found[1] if token not in found[0])
    assert found[1].index(options["eos_token_id"]) < 20
    plain = target.generate(**batch, **options)
    capture_on_cpus(monkeypatch, first_room=1)
    out = target.generate(**batch, **options, assistant_model=make_drafter(target))
    assert out.speculation.graphs.startswith("captured")
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert_same_caches(target, plain, out)
    for ours, theirs in zip(out[CACHE_NAME].layers, plain[CACHE_NAME].layers, strict=True):
        for mine, its in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(mine[:, :, 30:], its[:, :, 30:], rtol=1e-4, atol=1e-4)  # behind the prompts
