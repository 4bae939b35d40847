"""What a round costs besides its forwards, accepting and keeping the cache: on a CPU, as ratios.

pytest benchmarks/test_round_overhead.py [-s] [--benchmark-json OUT.json]

Each benchmark times two things in one process, in turns; how much longer the first takes is printed, and noted as `ratio`
in its extra info. No limit is set: machines differ, and a benchmark that fails now and then is soon ignored.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_eagle3 import Eagle3DrafterConfig, Eagle3DrafterModel
from hf_eagle3.host.loop_choice import OWN_LOOP
from hf_eagle3.rows.block import Block
from hf_eagle3.rows.cache import RowCache
from hf_eagle3.speculation.accept import accept_greedy
from hf_eagle3.speculation.block_verification import accept_block

pytest.importorskip("pytest_benchmark")

V, K, NUM_NEW = 4096, 3, 64
LOGITS_V = 32000
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": V,
}
TURNS = 15


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, Eagle3DrafterModel]:
    """A small random target and a drafter that it hardly ever agrees with: all rounds are alike."""
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=8, pad_token_id=0, eos_token_id=None)).eval()
    target.generation_config.eos_token_id = None
    config = Eagle3DrafterConfig(**SIZES, num_hidden_layers=1, draft_vocab_size=2048, aux_layer_ids=[1, 4, 7])
    drafter = Eagle3DrafterModel(config)
    drafter.set_draft_to_target_ids(torch.arange(2048) + 64)
    return target, drafter.eval()


def median(call: Callable[[], Any], others: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of both, run in turns."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for function, seconds in zip((call, others), spent, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return statistics.median(spent[0]), statistics.median(spent[1])


def compare(benchmark: Any, ours: Callable[[], Any], other: Callable[[], Any], *, against: str) -> None:
    """Run `ours` as the benchmark, and note its ratio to `other`."""
    for warm_up in (ours, other):
        warm_up()
    mine, theirs = median(ours, other)
    report(benchmark, mine / theirs, against=against)
    benchmark.pedantic(ours, rounds=5)


def report(benchmark: Any, ratio: float, *, against: str) -> None:
    """Note a result."""
    benchmark.extra_info.update(against=against, ratio=round(ratio, 3))
    print(f"\n{benchmark.name}: {ratio:.3f} times {against}", end=" ")


@contextmanager
def timing_forwards(*models: nn.Module) -> Iterator[list[float]]:
    """How long each forward of `models` takes."""
    spent: list[float] = []

    def time_it(forward: Callable) -> Callable:
        @functools.wraps(forward)  # the signature too, which says what a target can do
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return timed

    with ExitStack() as stack:
        for model in models:
            model.forward = time_it(model.forward)  # type: ignore[method-assign]
            stack.callback(delattr, model, "forward")
        yield spent


def generate(models: tuple[LlamaForCausalLM, Eagle3DrafterModel], loop: str, num_rows: int, do_sample: bool) -> Any:
    """One call; the same number of rounds each time, give or take a draft token that is accepted."""
    target, drafter = models
    drafter.generation_config.num_assistant_tokens = K
    ids = torch.randint(64, V, (num_rows, 32), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    return target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_model=drafter,
        decode_loop=loop,
        max_new_tokens=NUM_NEW,
        do_sample=do_sample,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_rows", [1, 8])
def test_rounds_against_their_forwards(benchmark, models, num_rows, do_sample):
    """A whole call over the time spent inside the forwards of target and drafter."""
    generate(models, "own", num_rows, do_sample)
    ratios = []
    for _ in range(TURNS):
        with timing_forwards(*models) as spent:
            start = time.perf_counter()
            out = generate(models, "own", num_rows, do_sample)
            ratios.append((time.perf_counter() - start) / sum(spent))
    assert out.speculation.loop == OWN_LOOP
    report(benchmark, statistics.median(ratios), against="its forwards alone")
    benchmark.extra_info["rounds"] = out.speculation.rounds
    benchmark.pedantic(lambda: generate(models, "own", num_rows, do_sample), rounds=5)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_our_loop_against_the_hosts(benchmark, models, do_sample):
    """One row, the same drafts."""
    ours, theirs = ((lambda loop=loop: generate(models, loop, 1, do_sample)) for loop in ("own", "host"))
    if not do_sample:
        assert torch.equal(ours().sequences, theirs().sequences)
    compare(benchmark, ours, theirs, against="the host's assisted decoding")


@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_greedy_acceptance_against_argmax(benchmark, num_rows):
    """The least that any rule must do is to look at all logits."""
    logits = torch.randn(num_rows, K + 1, LOGITS_V)
    tokens = logits.argmax(-1)[:, :K].clone()
    tokens[:, 1:] += torch.arange(num_rows)[:, None] % 2  # half of the rows refuse the second
    compare(benchmark, lambda: accept_greedy(tokens, logits), lambda: logits.argmax(-1), against="argmax")


@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_sampled_acceptance_against_softmax(benchmark, num_rows):
    """The least is to know p."""
    logits = torch.randn(num_rows, K + 1, LOGITS_V)
    q = torch.randn(num_rows, K, LOGITS_V).softmax(-1)
    tokens = q.argmax(-1)
    compare(
        benchmark,
        lambda: accept_block(tokens, q, logits.softmax(-1)),
        lambda: logits.softmax(-1),
        against="softmax",
    )


@pytest.mark.parametrize("length", [512, 8192])
def test_keeping_the_cache_against_the_hosts(benchmark, length):
    """Write K+1 tokens into each of 8 layers and keep two: in place, against concatenation and crop."""
    old, new = (torch.randn(1, 8, T, 64) for T in (length, K + 1))  # [B, H_kv, T, D]
    ours, theirs = RowCache(8, length + 64), DynamicCache()
    with ours.writing(Block(torch.zeros(1, dtype=torch.long), length), is_first=True):
        for layer in range(8):
            ours.update(old, old, layer)
            theirs.update(old, old, layer)
    start = torch.tensor([length])  # [B]

    def write_rows() -> Tensor:
        with ours.writing(Block(start, K + 1)):
            for layer in range(8):
                ours.update(new, new, layer)
        return start + 2

    def concatenate() -> None:
        for layer in range(8):
            theirs.update(new, new, layer)
        theirs.crop(-(K + 1 - 2))
        theirs.crop(-2)  # back to where it began, which copies nothing

    compare(benchmark, write_rows, concatenate, against="the host's dynamic cache")
