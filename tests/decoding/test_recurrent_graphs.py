"""Captured rounds of targets with gated delta nets or state spaces: what plain decoding says and leaves, whatever is drafted.

On a CPU by the stand-in for CUDA graphs of `test_graphs.py`, with eager twins; on a GPU by graphs and kernels.
"""

import copy

import pytest
import torch
from helpers.batches import assert_same_up_to_ties
from helpers.capture import PhasesOnGpus, capture_on_cpus
from helpers.families import cast, make_batch, make_oracle
from helpers.hybrids import (
    GREEDY,
    RAGGED,
    Ends,
    LooksAtBatch,
    LooksAtText,
    assert_nothing_left,
    assert_same_cache,
    assert_says_what_rows_say_alone,
    compare,
    decode,
    find_early_end,
    make_drafter,
    make_even_batch,
    make_target,
    say_alone,
)
from helpers.marks import slow_but, slow_rows_but

from hf_eagle3 import release_graphs
from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.decoding import arena
from hf_eagle3.host import generate

NETS = ("lara_mini", "olmo_hybrid", "qwen3_5_moe", "qwen3_5_text", "qwen3_next")
SPACES = ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2")
NAME = "qwen3_5_text"


@pytest.fixture
def counts(monkeypatch):
    yield capture_on_cpus(monkeypatch)
    release_graphs()


@pytest.mark.parametrize("lengths", [(11,), RAGGED], ids=["one_row", "ragged"])
@pytest.mark.parametrize(
    ("name", "depth"),
    slow_rows_but(
        [(NAME, 0), (NAME, 3), ("qwen3_next", 1), ("olmo_hybrid", 2), ("bamba", 3), ("falcon_h1", 1), ("mamba2", 2)],
        [(name, depth) for name in (*NETS, *SPACES) for depth in range(6)],
    ),
)
def test_each_row_is_that_row_alone(name, depth, lengths, counts):
    out = assert_says_what_rows_say_alone(name, lengths, num_assistant_tokens=depth)
    assert out.speculation.graphs.startswith("captured in")
    assert counts.replayed > 4


@pytest.mark.parametrize("wrong_share", slow_but([0.7], [0.0, 0.2, 0.7, 1.0]))
@pytest.mark.parametrize("depth", slow_but([5], [1, 2, 3, 4, 5, 9]))
def test_whatever_is_accepted(depth, wrong_share, counts):
    assert_says_what_rows_say_alone(NAME, RAGGED, max_new=40, num_assistant_tokens=depth, wrong_share=wrong_share)


@pytest.mark.parametrize(
    ("depth", "num_rows", "num_new"),
    slow_rows_but([(3, 3, 20), (0, 5, 40)], [(0, 3, 20), (3, 3, 20), (0, 5, 40), (1, 5, 50)]),
)
def test_rows_that_end_early_and_their_cache(depth, num_rows, num_new, counts):
    """Also where pads behind them are more than there is room for behind the longest."""
    batch = make_even_batch(num_rows)
    eos = find_early_end(NAME, batch, num_new)
    plain, out = compare(NAME, batch, depth=depth, max_new_tokens=num_new, eos_token_id=eos, pad_token_id=0)
    assert (plain.sequences[:, -1] == 0).any()
    assert out.speculation.graphs.startswith("captured in")


def test_batches_shrink_and_memory_grows(monkeypatch):
    """States move to the front with their rows, and stay where they are while keys and values get room."""
    counts = capture_on_cpus(monkeypatch, worth_capture=4, first_room=16)
    target, batch = make_target(NAME), make_even_batch(5)
    eos = find_early_end(NAME, batch, 60)
    options = {"max_new_tokens": 120, "eos_token_id": eos, "pad_token_id": 0, **GREEDY}
    plain = target.generate(**batch, **options)
    oracle = make_oracle(target, plain, batch)
    out = target.generate(**batch, assistant_model=oracle, num_assistant_tokens=3, **options)
    assert out.tolist() == plain.tolist()
    assert counts.captured > 6
    release_graphs()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_second_turn_goes_on_from_the_cache(num_rows, counts):
    batch = make_even_batch(num_rows)
    plain, out = compare(NAME, batch, max_new_tokens=9)
    more = torch.randint(3, 100, (num_rows, 5), generator=torch.Generator().manual_seed(6))
    ids = torch.cat([plain.sequences, more], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 9, "return_dict_in_generate": True, **GREEDY}
    target = make_target(NAME)
    second = target.generate(**turn, **{CACHE_NAME: copy.deepcopy(plain[CACHE_NAME])}, **options)
    oracle = make_oracle(target, second.sequences, turn)
    ours = target.generate(**turn, **{CACHE_NAME: out[CACHE_NAME]}, assistant_model=oracle, **options)
    assert ours.sequences.tolist() == second.sequences.tolist()
    assert_same_cache(out[CACHE_NAME], second[CACHE_NAME])
    assert counts.replayed > 4


@pytest.mark.parametrize("kind", [LooksAtText, LooksAtBatch])
def test_processors_that_look_at_text(kind, counts):
    batch = make_even_batch()
    options = {"max_new_tokens": 14, "eos_token_id": find_early_end(NAME, batch, 20), "pad_token_id": 0}
    _, out = compare(NAME, batch, logits_processor=[kind()], **options)
    assert out.speculation.graphs.startswith("captured in")


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_criterion_cuts_states_back(num_rows, counts):
    for length in (11, 12, 13):
        compare(NAME, make_even_batch(num_rows), max_new_tokens=20, stopping_criteria=[Ends(length)], wrong_share=0.2)


def test_calls_share_memory_until_one_drafts_deeper(counts):
    release_graphs()
    target, arenas = make_target(NAME), []
    drafter = make_drafter(NAME, RAGGED)
    for lengths, depth in ((RAGGED, 3), (RAGGED[:1], 1), (RAGGED, 3), (RAGGED[:1], 5), (RAGGED, 2)):
        batch, options = make_batch(lengths, "cpu"), {"max_new_tokens": 16, **GREEDY}
        out = target.generate(**batch, assistant_model=drafter, num_assistant_tokens=depth, **options)
        assert out[:, max(lengths) :].tolist() == say_alone(NAME, lengths, 16).tolist()
        arenas.append(arena._arenas[target])
    # The fourth call makes one for a row, which is too small for the fifth.
    assert [one is arenas[0] for one in arenas] == [True, True, True, False, False]


def test_what_a_call_needs_is_told_by_the_layers_that_attend():
    """One of four does."""
    target = make_target(NAME)
    config = target.config.get_text_config(decoder=True)
    num_slots = 2**30 // (2 * 4 * config.num_key_value_heads * config.head_dim)
    told = arena.describe_need(target, 1, num_slots)
    assert told == "whose keys and values take 1.00 GiB, beside the states of 3 recurrent layers"


def test_kept_states_are_counted(counts):
    release_graphs()
    target = make_target(NAME)
    decode(NAME, RAGGED, num_assistant_tokens=3)
    config, B, K = target.config, len(RAGGED), 3
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    assert arena.count_cache_bytes(target) > 4 * B * state * config.layer_types.count("linear_attention")
    layer = arena._arenas[target].caches[0].layers[config.layer_types.index("linear_attention")]
    assert layer.replay.num_tokens == K + 1
    assert layer.replay.state.data_ptr() == layer.rings["recurrent_states", 0].data_ptr()


def test_shapes_are_chosen_between_rounds(counts):
    drafter = make_drafter(NAME, (11,), max_new=60, wrong_share=0.3)
    drafter.generation_config.num_assistant_tokens = None
    plain = say_alone(NAME, (11,), 60)
    batch = make_batch((11,), "cpu")
    out = make_target(NAME).generate(
        **batch, assistant_model=drafter, max_new_tokens=60, return_dict_in_generate=True, **GREEDY
    )
    assert out.sequences[:, 11:].tolist() == plain.tolist()


@pytest.mark.parametrize("fails_at", slow_but([4], [1, 2, 4, 5, 6]))
def test_a_capture_that_fails_leaves_states_as_they_were(fails_at, monkeypatch):
    """The first set of graphs, or that of a smaller batch, or of a larger memory: rounds go on eagerly."""
    captured = []

    def fail(capture_here, *args, pool):
        captured.append(args)
        if len(captured) == fails_at:
            capture_here(*args, pool=pool)
            raise RuntimeError("no graph")
        return capture_here(*args, pool=pool)

    capture_on_cpus(monkeypatch, around=fail, first_room=16)
    out = assert_says_what_rows_say_alone(NAME, RAGGED, max_new=120, num_assistant_tokens=3)
    assert "RuntimeError: no graph" in out.speculation.graphs
    release_graphs()


def test_a_seed_gives_one_text_with_and_without_a_draft(counts):
    target, drafter = make_target(NAME), make_drafter(NAME, (11,))
    batch = make_batch((11,), "cpu")
    options = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 16, "seed": 5}
    plain = target.generate(**batch, decode_loop="own", **options)
    for depth in (0, 1, 3):
        out = target.generate(**batch, assistant_model=drafter, num_assistant_tokens=depth, **options)
        assert out.tolist() == plain.tolist()


def test_a_forward_of_its_own_is_not_captured(counts):
    target = copy.deepcopy(make_target(NAME))
    mixer = target.model.layers[1].linear_attn
    forward = mixer.forward
    mixer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    _, out = compare_texts(target, make_even_batch())
    assert "UnfitError: Qwen3_5GatedDeltaNet has a forward of its own" in out.speculation.graphs


def compare_texts(target, batch, **options):
    options = {"max_new_tokens": 16, "return_dict_in_generate": True, **GREEDY, **options}
    plain = target.generate(**batch, **options)
    oracle = make_oracle(target, plain.sequences, batch)
    out = target.generate(**batch, assistant_model=oracle, num_assistant_tokens=3, **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    return plain, out


# ---- on a GPU ----


def on_gpu(batch):
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("name", NETS)
def test_captured_rounds_on_a_gpu(name, num_rows):
    target, batch = copy.deepcopy(make_target(name)).cuda(), on_gpu(make_even_batch(num_rows))
    for depth in (0, 1, 3, 5):
        for wrong_share in (0.0, 0.4, 1.0)[: 1 + 2 * bool(depth)]:
            _, out = compare(target, batch, depth=depth, wrong_share=wrong_share, max_new_tokens=30)
            if num_rows * (depth + 1) <= 4 or name not in ("lara_mini", "qwen3_5_moe", "qwen3_next"):
                # Torch's grouped product of float32, which takes more tokens, counts each expert's on the host.
                assert out.speculation.graphs.startswith(("captured", "replayed")), out.speculation.graphs
    assert_nothing_left(target)
    release_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [0, 3])
def test_rows_that_end_early_on_a_gpu(depth):
    target, batch = copy.deepcopy(make_target(NAME)).cuda(), on_gpu(make_even_batch(5))
    eos = find_early_end(NAME, make_even_batch(5), 40)
    options = {"max_new_tokens": 40, "eos_token_id": eos, "pad_token_id": 0}
    _, out = compare(target, batch, depth=depth, **options)
    assert out.speculation.graphs.startswith("captured")
    plain = target.generate(**batch, **options, **GREEDY)
    oracle = make_oracle(target, plain, batch)
    out = target.generate(**batch, **options, assistant_model=oracle, num_assistant_tokens=depth, **GREEDY)
    assert out.tolist() == plain.tolist()  # without a cache to hand back, rounds are in flight
    release_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("depth", [0, 3])
def test_sixteen_bits_on_a_gpu(name, depth):
    target = cast(copy.deepcopy(make_target(name)), "cuda", torch.bfloat16)
    batch = on_gpu(make_even_batch(5))
    options = {"max_new_tokens": 30, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    plain = target.generate(**batch, **options)
    oracle = make_oracle(target, plain.sequences, batch, wrong_share=0.3)
    out = target.generate(**batch, assistant_model=oracle, num_assistant_tokens=depth, **options)
    assert out.speculation.graphs.startswith("captured"), out.speculation.graphs
    assert_same_up_to_ties(out, plain)
    release_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}], ids=["greedy", "sampled"])
def test_captured_rounds_equal_the_same_phases_run_eagerly(dtype, options, monkeypatch):
    target = cast(copy.deepcopy(make_target(NAME)), "cuda", dtype)
    batch = on_gpu(make_even_batch(5))
    plain = target.generate(**batch, max_new_tokens=60, **GREEDY)
    oracle = make_oracle(target, plain, batch, wrong_share=0.3)
    options = {"max_new_tokens": 60, "assistant_model": oracle, "num_assistant_tokens": 3, **GREEDY, **options}
    torch.manual_seed(5)
    captured = target.generate(**batch, **options).tolist()
    release_graphs()

    monkeypatch.setattr(generate, "CAPTURER", PhasesOnGpus())
    torch.manual_seed(5)
    assert target.generate(**batch, **options).tolist() == captured
    release_graphs()
