"""Our decode loop: what `generate()` gives without a drafter, row by row, for batches."""

import contextlib
import copy
import functools
import gc
import itertools

import pytest
import torch
from accelerate import dispatch_model
from helpers.arguments import Raise, RecordingStreamer, StopAt, StopOn
from helpers.batches import GREEDY, assert_same, assert_same_caches, make_oracle, pad, plain_of, prompts_of
from helpers.marks import slow_but
from helpers.models import FAMILIES, OLD, WINDOW, count_hooks, make_drafter, make_prompt, make_target
from helpers.tokenizers import word_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
    pipeline,
)

from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.host import generate
from hf_eagle3.host.loop_choice import has_holes
from hf_eagle3.modeling import Eagle3DrafterModel
from hf_eagle3.recorder import StateRecorder
from hf_eagle3.rows import block
from hf_eagle3.rows.block import Block
from hf_eagle3.rows.cache import to_bucket
from hf_eagle3.rows.masks import make_mask
from hf_eagle3.speculation.numbers import NotANumberError

# ---- greedy ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "lengths", slow_but([(30, 7, 1, 18)], [(5,), (1,), (30, 7, 1, 18)]), ids=["one_row", "one_token", "ragged"]
)
@pytest.mark.parametrize("depth", slow_but([3], [1, 3, 5]))
@pytest.mark.parametrize("family", [*OLD, *FAMILIES])
def test_greedy_rows_are_the_targets(family, depth, lengths):
    options = {"depth": depth, "max_new_tokens": 24, "plain": plain_of(family, lengths, 24)}
    _, out = assert_same(make_target(family), pad(prompts_of(*lengths)), **options)
    assert 1 < out.speculation.acceptance_length < depth + 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_masks_work(attention):
    target = make_target("mistral")
    before = target.config._attn_implementation
    target.set_attn_implementation(attention)
    try:
        assert_same(target, pad(prompts_of(20, 3)), max_new_tokens=20)
    finally:
        target.set_attn_implementation(before)


def test_each_number_of_accepted_tokens_occurs_in_each_row(target):
    _, out = assert_same(target, pad(prompts_of(4, 11, 7)), depth=3, max_new_tokens=150)
    for row in out.speculation.rows:
        kept = [row.rounds, *row.rounds_accepting, 0]
        assert all(a > b for a, b in itertools.pairwise(kept)), kept


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "further",
    [
        *({}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"forced_eos_token_id": 9}),
        *({"min_new_tokens": 9, "eos_token_id": [5, 17, 23, 40, 51]}, {"begin_suppress_tokens": [10, 12, 14, 43, 50]}),
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": [5, 17, 23, 40, 51]},
    ],
    ids=str,
)
def test_rows_padded_on_the_right_are_those_rows_alone(target, further):
    prompts, options = prompts_of(9, 4, 13), {"max_new_tokens": 15, **GREEDY, **further}
    alone = [target.generate(p, **options)[0, p.shape[1] :].tolist() for p in prompts]
    batch = pad(prompts, "right")
    out = target.generate(**batch, assistant_model=make_drafter(target), **options)
    rows = [row[: len(text)] for row, text in zip(out[:, 13:].tolist(), alone, strict=True)]
    assert rows == alone
    assert out.shape[1] - 13 == max(map(len, alone))
    assert out[:, :13].tolist() == batch["input_ids"].tolist()


def test_random_drafter_changes_nothing(target):
    batch = pad(prompts_of(9, 4, 13))
    plain = target.generate(**batch, max_new_tokens=15, **GREEDY)
    out = target.generate(**batch, assistant_model=make_drafter(target), max_new_tokens=15, **GREEDY)
    assert out.tolist() == plain.tolist()


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["tensors", "in_order"])
def test_depth_zero_decodes_without_drafting(target, options):
    batch = pad(prompts_of(9, 4, 13))
    options = {"max_new_tokens": 15, "return_dict_in_generate": True, **GREEDY, **options}
    plain = target.generate(**batch, **options)
    out = target.generate(**batch, assistant_model=make_drafter(target), num_assistant_tokens=0, **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.rounds == out.speculation.num_drafted == 0


@pytest.mark.parametrize("length", slow_but([2.41], [1.0, 2.41, 3.7, 4.0]))
def test_simulated_acceptance_is_as_long_as_asked(target, length):
    drafter = make_drafter(target)
    drafter.generation_config.simulated_acceptance_length = length
    batch = pad(prompts_of(9, 4, 13, 5))
    out = target.generate(**batch, assistant_model=drafter, max_new_tokens=200, return_dict_in_generate=True, **GREEDY)
    assert abs(out.speculation.acceptance_length - length) < 0.15
    assert all(abs(row.acceptance_length - length) < 0.4 for row in out.speculation.rows)


@pytest.mark.slow
def test_rows_that_are_done_run_on_inside_the_caches(target):
    """One row ends at once and stays, for the cache; its drafts are all kept, those of the other all refused."""
    batch = pad(prompts_of(40, 2))
    plain = target.generate(**batch, max_new_tokens=100, **GREEDY)
    eos = next(t for t in plain[0, 40:44].tolist() if t not in plain[1, 40:].tolist())
    plain, out = assert_same(target, batch, max_new_tokens=100, eos_token_id=[eos], wrong_share=1.0, depth=5)
    assert [row.num_tokens < 5 for row in out.speculation.rows] == [True, False]
    assert out[CACHE_NAME].get_seq_length() == plain[CACHE_NAME].get_seq_length()


def test_cache_grows_beyond_its_first_bucket(target):
    assert_same(target, pad(prompts_of(50, 60)), wrong_share=0.2, max_new_tokens=120)


# ---- between rounds ----


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_between_rounds_caches_hold_what_was_verified(family, monkeypatch):
    target = make_target(family)
    original, rounds, prompts = generate.show, [], prompts_of(3, 17, 9)

    def checked(transcript, engine):
        rounds.append(engine.rows)
        for b, row in enumerate(engine.rows):
            if row.is_live:
                number = transcript.rows.index(row)
                text = torch.tensor([*prompts[number][0].tolist(), *row.text])
                assert_in_step(target, engine.drafter, engine.phases, b, text)
        return original(transcript, engine)

    monkeypatch.setattr(generate, "show", checked)
    assert_same(target, pad(prompts), max_new_tokens=20)
    assert len(rounds) > 5


def assert_in_step(target, drafter, phases, b: int, text: Tensor):
    state, memory = phases.state, phases.memory
    length, pending = int(state.length[b]), int(memory.num_pending[b])
    start = length - 1 - pending
    assert length == len(text)
    assert state.root[b] == text[-1]
    assert memory.start[b] == start
    assert memory.tokens[b, :pending].tolist() == text[start + 1 :].tolist()
    cache = DynamicCache()
    with StateRecorder(target, drafter.bound_aux_layer_ids) as recorder:
        target(text[None, :-1], **{CACHE_NAME: cache})
        states = recorder.take("cpu")
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(memory.states[b, :pending], states[0, start:], **close)
    kinds = getattr(target.config, "layer_types", None) or ()
    windows = [WINDOW if kind.startswith("sliding") else length for kind in kinds]
    for i, (ours, fresh) in enumerate(zip(state.cache.layers, cache.layers, strict=True)):
        seen = slice(max(length - (windows[i] if windows else length), 0), length - 1)
        torch.testing.assert_close(ours.keys[b, seen].transpose(0, 1), fresh.keys[0][:, seen], **close)
        torch.testing.assert_close(ours.values[b, seen].transpose(0, 1), fresh.values[0][:, seen], **close)
    if start:
        fresh = Eagle3DrafterModel.forward(drafter, text[None, 1 : start + 1], states[:, :start], use_cache=True)
        ours = memory.cache.layers[0].keys[b, :start].transpose(0, 1)
        torch.testing.assert_close(ours, fresh.past_key_values.layers[0].keys[0], **close)


def test_a_wide_window_mask_by_hand():
    mask = make_mask(Block(torch.tensor([2]), 2), 5, window=2)[0, 0].long()
    assert mask.tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]


@given(st.integers(1, 200_000))
def test_buckets_waste_little(n):
    assert n <= to_bucket(n) < n + max(64, n / 8 + 1)
    assert to_bucket(to_bucket(n)) == to_bucket(n)


# ---- prompts of other things than text, and caches to go on from ----


def with_and_without(target, batch, **options):
    """What `generate` gives with an oracle and without, dict outputs."""
    options = {"return_dict_in_generate": True, "max_new_tokens": 12, **GREEDY, **options}
    plain = target.generate(**copied(batch), **options)
    mask = batch.get("attention_mask")
    if "input_ids" in batch:
        drafter = make_oracle(target, plain.sequences, {**batch, "attention_mask": mask})
    else:
        drafter = make_drafter(target)
        drafter.generation_config.decode_loop = "own"
    return plain, target.generate(**copied(batch), assistant_model=drafter, **options)


def copied(batch):
    """The inputs of a call, with a cache of its own: calls fill it."""
    return {name: copy.deepcopy(value) if name == CACHE_NAME else value for name, value in batch.items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", slow_but(["llama", "gemma3"], ["llama", "mistral", "gemma3", "gpt_neox"]))
@pytest.mark.parametrize("fed", ["whole_sequence", "new_tokens"])
@pytest.mark.parametrize("eos", [None, [11, 25, 37, 41, 52]])
def test_conversation_of_a_batch_goes_on_from_its_cache(family, fed, eos):
    target = make_target(family)
    first = pad(prompts_of(9, 2, 14))
    plain, out = with_and_without(target, first, eos_token_id=eos)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert_same_caches(target, plain, out)
    turns = []
    for turn in (plain, out):
        whole = torch.cat([turn.sequences, make_prompt(15).view(3, 5)], dim=1)
        mask = torch.nn.functional.pad(first["attention_mask"], (0, whole.shape[1] - 14), value=1)
        ids = whole if fed == "whole_sequence" else whole[:, turn[CACHE_NAME].get_seq_length() :]
        turns.append({"input_ids": ids, "attention_mask": mask, CACHE_NAME: turn[CACHE_NAME]})
    drafter = make_drafter(target)
    drafter.generation_config.decode_loop = "own"
    options = {"max_new_tokens": 10, "return_dict_in_generate": True, **GREEDY}
    second = [target.generate(**turn, **options) for turn in copied_all(turns)]
    assisted = [target.generate(**turn, assistant_model=drafter, **options) for turn in turns]
    assert second[0].sequences.tolist() == second[1].sequences.tolist()
    for other in assisted:
        assert other.sequences.tolist() == second[0].sequences.tolist()
        assert_same_caches(target, second[0], other)


def copied_all(turns):
    return [copied(turn) for turn in turns]


def test_cache_of_the_users_is_filled_as_without(target):
    """Chat code often makes a cache, and looks at it and not at the output."""
    drafter = make_drafter(target)
    texts = []
    for assistant in ({}, {"assistant_model": drafter}):
        cache, prompt = DynamicCache(), make_prompt(6)
        for turn in range(3):
            prompt = target.generate(prompt, **{CACHE_NAME: cache}, max_new_tokens=7, **GREEDY, **assistant)
            assert cache.get_seq_length() == prompt.shape[1] - 1
            prompt = torch.cat([prompt, make_prompt(3 + turn)], dim=1)
        texts.append(prompt.tolist())
    assert texts[0] == texts[1]


def test_drafting_goes_on_behind_a_cache(target):
    """The drafter has not seen what the cache holds; what comes after it is drafted as ever."""
    prompt = make_prompt(20)
    plain = target.generate(prompt, max_new_tokens=30, return_dict_in_generate=True, **GREEDY)
    cache = DynamicCache()
    target(prompt[:, :12], **{CACHE_NAME: cache})
    oracle = make_oracle(target, plain.sequences, pad([prompt]), wrong_share=0.0)
    options = {"max_new_tokens": 30, "return_dict_in_generate": True, **GREEDY}
    out = target.generate(prompt, **{CACHE_NAME: cache}, assistant_model=oracle, **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.acceptance_length > 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_embeddings(target, side):
    batch = pad(prompts_of(9, 4, 6), side)
    embeds = target.get_input_embeddings()(batch.pop("input_ids"))
    if side == "left":
        plain, out = with_and_without(target, {**batch, "inputs_embeds": embeds})
        assert out.sequences.tolist() == plain.sequences.tolist()
        assert out.speculation.loop == "own decode loop"
        return
    alone = [
        target.generate(inputs_embeds=embeds[i : i + 1, :n], max_new_tokens=8, **GREEDY)
        for i, n in ((0, 9), (1, 4), (2, 6))
    ]
    drafter = make_drafter(target)
    out = target.generate(**batch, inputs_embeds=embeds, assistant_model=drafter, max_new_tokens=8, **GREEDY)
    assert out.tolist() == torch.cat(alone).tolist()


def image_prompts(family, side):
    """Two prompts with an image each, of different lengths."""
    if family == "gemma3_vlm":
        target = make_target(family)
        image = [60] * 4
        images = {"pixel_values": torch.randn(2, 3, 8, 8)}
    else:
        target = make_target(family)
        image = [62, 60, 60, 60, 60, 63]
        images = {
            "pixel_values": torch.randn(2 * 16, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        }
    prompts = [torch.tensor([[5, *image, 9, 8, 7]]), torch.tensor([[4, 5, 6, 7, 8, *image, 9, 30]])]
    batch = pad(prompts, side)
    is_image = torch.isin(batch["input_ids"], torch.tensor(60))
    name = "mm_token_type_ids" if family == "qwen_vlm" else "token_type_ids"
    return target, {**batch, **images, name: is_image.long()}


@pytest.mark.parametrize("family", ["gemma3_vlm", "qwen_vlm"])
def test_image_prompts(family):
    target, batch = image_prompts(family, "left")
    plain, out = with_and_without(target, batch)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.loop == "own decode loop"
    assert out.speculation.num_accepted > 0
    blind = target.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12)
    assert blind.tolist() != plain.sequences.tolist()  # the images do matter


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_prompt_in_chunks(target, chunk):
    _, out = assert_same(target, pad(prompts_of(9, 4, 13)), prefill_chunk_size=chunk, max_new_tokens=15)
    assert out.speculation.acceptance_length > 1


@contextlib.contextmanager
def watched(target):
    """The shapes of what `target` is run over. Without a hook, for which batches would be kept whole."""
    shapes, original = [], target.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        shapes.append(kwargs["input_ids"].shape)
        return original(*args, **kwargs)

    target.forward = forward
    try:
        yield shapes
    finally:
        del target.forward


@pytest.mark.parametrize("family", slow_but(["llama", "gemma3"], ["llama", "gemma3", "gpt_oss", "mistral"]))
@pytest.mark.parametrize("side", ["left", "right"])
def test_long_prompts_run_one_by_one(family, side, monkeypatch):
    """Without a mask over pads; what is said, kept and returned is the same."""
    target, batch = make_target(family), pad(prompts_of(19, 4, 13, 1), side)
    left = pad(prompts_of(19, 4, 13, 1))
    options = {"max_new_tokens": 15, "return_dict_in_generate": True, **GREEDY}
    plain = target.generate(**left, **options)
    monkeypatch.setattr(block, "LONG_PROMPT", 3)
    oracle = make_oracle(target, plain.sequences, left)
    with watched(target) as shapes:
        out = target.generate(**batch, assistant_model=oracle, **options)
    assert out.sequences[:, 19:].tolist() == plain.sequences[:, 19:].tolist()
    assert shapes[:4] == [(1, 19), (1, 4), (1, 13), (1, 1)]
    assert out.speculation.acceptance_length > 1.5
    if side == "left":
        assert_same_caches(target, plain, out)
        mask = torch.nn.functional.pad(left["attention_mask"], (0, 16), value=1)
        ids = torch.cat([plain.sequences, torch.full((4, 1), 9)], dim=1)
        again = [
            target.generate(ids, attention_mask=mask, **{CACHE_NAME: o[CACHE_NAME]}, **options) for o in (plain, out)
        ]
        assert again[0].sequences.tolist() == again[1].sequences.tolist()


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [((70, 3, 4), [(1, 70), (1, 3), (1, 4)]), ((34, 3, 4), [(3, 34)]), ((120,), [(1, 120)])],
    ids=["many_pads", "few_pads", "one_row"],
)
def test_a_cpu_computes_few_pads(target, lengths, shapes):
    drafter = make_drafter(target)
    with watched(target) as seen:
        target.generate(**pad(prompts_of(*lengths)), assistant_model=drafter, max_new_tokens=5, **GREEDY)
    assert seen[: len(shapes)] == shapes
    assert all(shape[1] < 10 for shape in seen[len(shapes) :])
    assert_same(target, pad(prompts_of(*lengths)), max_new_tokens=15)


def test_position_ids_of_the_users_go_with_their_tokens_in_rows_padded_on_the_right(target):
    lengths, first = (30, 5, 12), 7
    batch = pad(prompts_of(*lengths), side="right")
    positions = torch.arange(max(lengths)).expand(len(lengths), -1) * 2 + first  # every second
    options = {"max_new_tokens": 12, **GREEDY}
    out = target.generate(**batch, position_ids=positions, assistant_model=make_drafter(target), **options)
    usual = target.generate(**batch, assistant_model=make_drafter(target), **options)
    for row, prompt in enumerate(prompts_of(*lengths)):
        alone = target.generate(prompt, position_ids=positions[:1, : prompt.shape[1]], **options)
        assert out[row, max(lengths) :].tolist() == alone[0, prompt.shape[1] :].tolist()
    assert out.tolist() != usual.tolist()


def test_position_ids_of_the_users_count_whatever_the_pads(target):
    batch = pad(prompts_of(90, 20))
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    positions[:, -10:] += 40
    plain, _ = assert_same(target, batch, position_ids=positions, max_new_tokens=12)
    usual = target.generate(**batch, max_new_tokens=12, **GREEDY)
    assert usual.tolist() != plain.sequences.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_a_cache_of_the_users_keeps_what_it_keeps_without(family):
    """One without windows forgets nothing, so it can be cut far back."""
    target, batch = make_target(family), pad(prompts_of(90, 20))
    texts = []
    for assistant in ({}, {"assistant_model": make_drafter(target)}):
        cache = DynamicCache()
        target.generate(**batch, **{CACHE_NAME: cache}, max_new_tokens=5, **GREEDY, **assistant)
        cache.crop(70 - cache.get_seq_length())
        cache.batch_select_indices(torch.tensor([0]))
        ids = torch.cat([batch["input_ids"][:1, :70], make_prompt(7)], dim=1)
        out = target.generate(
            ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}, max_new_tokens=12, **GREEDY
        )
        texts.append(out.tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "options",
    slow_but(
        [{"encoder_repetition_penalty": 1.4}],
        [{"repetition_penalty": 0.8}, {"encoder_repetition_penalty": 1.4}, {"encoder_no_repeat_ngram_size": 1}],
    ),
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("places", slow_but([(2, 3)], [(0, 0), (2, 3)]), ids=["right", "both_sides"])
def test_pads_are_no_prompt_to_processors(target, options, places):
    prompts = prompts_of(9, 4)
    ids = torch.zeros(2, 14, dtype=torch.long)
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        ids[row, place : place + prompt.shape[1]] = prompt[0]
    options = {**options, "max_new_tokens": 40, **GREEDY}
    drafter, has_effect = make_drafter(target), False
    both = target.generate(ids, attention_mask=(ids != 0).long(), assistant_model=drafter, **options)
    for row, prompt in enumerate(prompts):
        alone = target.generate(prompt, **options)[0, prompt.shape[1] :]
        assert both[row, 14 : 14 + len(alone)].tolist() == alone.tolist()
        without = target.generate(prompt, max_new_tokens=40, **GREEDY)[0, prompt.shape[1] :]
        has_effect |= without.tolist() != alone.tolist()
    assert has_effect


# ---- where rows end ----


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    depth=st.integers(1, 5),
    wrong_share=st.sampled_from([0.0, 0.3, 1.0]),
    max_new_tokens=st.integers(1, 14),
    eos=st.lists(st.integers(3, 60), max_size=12),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_ends_where_it_does_without(lengths, depth, wrong_share, max_new_tokens, eos):
    batch = pad(prompts_of(*lengths))
    options = {"depth": depth, "wrong_share": wrong_share, "max_new_tokens": max_new_tokens}
    assert_same(make_target("llama"), batch, eos_token_id=eos or None, **options)


@pytest.mark.parametrize("eos", [None, 2], ids=["no_eos", "eos"])
@pytest.mark.parametrize("seed", slow_but([0, 1], range(6)))
def test_custom_criterion_ends_each_row_inside_a_block(target, seed, eos):
    tokens = torch.randint(3, 60, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    criteria = StoppingCriteriaList([StopOn(tokens)])
    options = {"max_new_tokens": 25, "stopping_criteria": criteria, "eos_token_id": eos, "wrong_share": 0.1}
    assert_same(target, pad(prompts_of(6, 2, 9)), depth=5, **options)


def test_criterion_is_asked_once_a_token_as_without(target):
    criterion = StopAt(11)
    assert_same(target, pad(prompts_of(6)), max_new_tokens=30, stopping_criteria=StoppingCriteriaList([criterion]))
    half = len(criterion.lengths_seen) // 2
    assert criterion.lengths_seen[half:] == criterion.lengths_seen[:half]


def test_stop_strings_end_rows(target):
    batch = pad(prompts_of(6, 3))
    text = target.generate(**batch, max_new_tokens=20, **GREEDY)
    words = [f"w{text[0, 6 + 7]}", f"w{text[1, 6 + 4]}"]
    assert_same(target, batch, max_new_tokens=30, stop_strings=words, tokenizer=word_tokenizer(), eos_token_id=2)


def test_no_time_ends_after_one_token(target):
    batch = pad(prompts_of(6, 3))
    out = target.generate(**batch, assistant_model=make_drafter(target), max_new_tokens=20, max_time=1e-9, **GREEDY)
    assert out.shape == (2, 7)


# ---- processors ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", slow_but([(9, 4, 12)], [(9,), (9, 4, 12)]), ids=["one_row", "ragged"])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.4},
        {"encoder_no_repeat_ngram_size": 2},
        {"min_length": 22, "eos_token_id": [5, 17, 23, 40, 51]},
        {"min_new_tokens": 6, "eos_token_id": list(range(3, 30))},
        {"bad_words_ids": [[7], [11, 12]]},
        {"suppress_tokens": [4, 8, 15, 16, 23, 42]},
        {"forced_eos_token_id": 9, "eos_token_id": 9},
        {"sequence_bias": [[[5], 3.0]]},
        {
            "prefix_allowed_tokens_fn": lambda b, ids: [
                3 + (7 * b + len(ids) * 5 + int(ids[-1]) + i) % 57 for i in (0, 9)
            ]
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_give_what_they_give_without(target, options, lengths):
    assert_same(target, pad(prompts_of(*lengths)), max_new_tokens=18, **options)


class Prefixes(LogitsProcessor):
    """Notes each prefix it is shown, and bans a token that depends on it and on how often it was called."""

    def __init__(self):
        self.seen, self.calls = [], 0

    def __call__(self, input_ids, scores):
        self.seen += [tuple(ids) for ids in input_ids.tolist()]
        self.calls += 1
        banned = (input_ids.sum(-1) + self.calls) % scores.shape[1]
        return scores.scatter(1, banned[:, None], -torch.inf)


@pytest.mark.parametrize("lengths", [(9,), (9, 4)], ids=["one_row", "ragged"])
def test_stateful_processor_sees_the_prefixes_of_plain_decoding(target, lengths):
    batch, seen = pad(prompts_of(*lengths)), []
    for assistant in ({}, {"assistant_model": make_drafter(target)}):
        noted = Prefixes()
        options = {"max_new_tokens": 12, "logits_processor": LogitsProcessorList([noted]), **GREEDY}
        out = target.generate(**batch, **options, **assistant)
        seen.append((noted.seen if len(lengths) == 1 else sorted(noted.seen), out.tolist()))  # ours goes row by row
    assert seen[0] == seen[1]


# ---- what is returned ----


@pytest.mark.parametrize("lengths", [(9,), (9, 4, 12)], ids=["one_row", "ragged"])
def test_scores_and_logits_have_plain_shapes_and_values(target, lengths):
    options = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    plain, out = assert_same(target, pad(prompts_of(*lengths)), max_new_tokens=15, **options)
    for name in ("scores", "logits"):
        assert len(out[name]) == 15
        torch.testing.assert_close(torch.stack(out[name]), torch.stack(plain[name]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_returned_cache_goes_on_as_a_plain_one(family):
    target, batch = make_target(family), pad(prompts_of(12))
    plain, out = assert_same(target, batch, max_new_tokens=11)
    more = torch.cat([plain.sequences, make_prompt(4)], dim=1)
    ends = [target.generate(more, **{CACHE_NAME: o[CACHE_NAME]}, max_new_tokens=9, **GREEDY) for o in (plain, out)]
    assert ends[0].tolist() == ends[1].tolist()


@pytest.mark.parametrize("lengths", [(6,), (6, 2)], ids=["one_row", "batch"])
def test_streamer_gets_the_same_columns(target, lengths):
    batch, puts = pad(prompts_of(*lengths)), []

    class Columns:
        def put(self, value):
            puts[-1].append(value.tolist())

        def end(self):
            puts[-1].append("end")

    for assistant in ({}, {"assistant_model": make_drafter(target)}):
        puts.append([])
        options = {"max_new_tokens": 12, "eos_token_id": list(range(3, 9)), **GREEDY}
        target.generate(**batch, streamer=Columns(), **options, **assistant)
    assert puts[0] == puts[1]


def test_text_streamer_streams_token_by_token(target):
    streamers = [RecordingStreamer(word_tokenizer()) for _ in range(2)]
    target.generate(make_prompt(6), streamer=streamers[0], max_new_tokens=12, **GREEDY)
    options = {"assistant_model": make_drafter(target), "max_new_tokens": 12, **GREEDY}
    target.generate(make_prompt(6), streamer=streamers[1], **options)
    assert streamers[0].puts == streamers[1].puts
    assert streamers[0].text == streamers[1].text


def test_several_sequences_of_one_prompt(target):
    options = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 8}
    out = target.generate(pad(prompts_of(5, 3))["input_ids"], assistant_model=make_drafter(target), **options)
    assert out.shape == (6, 13)


def test_one_seed_gives_one_output(target):
    batch, runs, drafter = pad(prompts_of(5, 3)), [], make_drafter(target)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = target.generate(**batch, assistant_model=drafter, do_sample=True, max_new_tokens=20)
        runs.append(out.tolist())
    assert runs[0] == runs[1] != runs[2]


def test_counts_of_rows_add_up(target):
    _, out = assert_same(target, pad(prompts_of(5, 3, 9)), max_new_tokens=25)
    told = out.speculation
    for name in ("num_tokens", "num_drafted", "num_accepted", "rounds"):
        assert getattr(told, name) == sum(getattr(row, name) for row in told.rows)
    assert [row.num_tokens for row in told.rows] == [25] * 3
    assert told.seconds > told.draft_seconds > 0
    assert told.accept_seconds > 0
    assert told.host_seconds > 0
    assert told.verify_seconds > 0


# ---- which loop ----


class QuantizedLookalike(DynamicCache):
    """A cache that is not quite the host's own."""


def test_loop_is_chosen_and_can_be_asked_for(target):
    drafter = make_drafter(target)

    def loop(model=target, prompt=None, **options):
        options = {"max_new_tokens": 4, "return_dict_in_generate": True, "assistant_model": drafter, **options}
        told = model.generate(make_prompt(5) if prompt is None else prompt, **options).speculation
        return told.loop, told.why

    host, own = "host assisted decoding", "own decode loop"
    assert loop() == (own, "attention caches only")
    assert loop(num_return_sequences=3, do_sample=True) == (own, "attention caches only")
    assert loop(decode_loop="host") == (host, "asked for")
    assert loop(decode_loop="own") == (own, "asked for")
    assert loop(output_hidden_states=True) == (host, "output_hidden_states is set")
    assert loop(prefill_chunk_size=2) == (own, "attention caches only")
    offloaded = QuantizedLookalike(config=target.config)
    assert loop(**{CACHE_NAME: offloaded}) == (host, "the cache given is a QuantizedLookalike")
    assert loop(output_router_logits=None) == (own, "attention caches only")
    drafter.generation_config.decode_loop = "host"
    assert loop() == (host, "asked for")
    assert loop(decode_loop="own") == (own, "asked for")


@pytest.mark.parametrize(
    ("mask", "is_one"),
    [
        *(([1, 1, 1, 1], False), ([0, 0, 1, 1], False), ([1, 1, 0, 0], False), ([0, 1, 1, 0], False)),
        *(([1, 0, 1, 1], True), ([0, 1, 0, 1], True), ([1, 0, 1, 0], True)),
    ],
)
def test_a_hole_is_a_pad_between_tokens(mask, is_one):
    assert has_holes(torch.tensor([[1, 1, 1, 1], mask])) == is_one


@pytest.mark.parametrize(("family", "loop"), [("llama", "own decode loop"), ("mistral", "host assisted decoding")])
def test_masks_with_holes_come_out_the_same(family, loop):
    target = make_target(family)
    batch = {"input_ids": make_prompt(14), "attention_mask": torch.tensor([[0, 0, *[1] * 5, 0, 0, *[1] * 5]])}
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    plain = target.generate(**batch, **options)
    out = target.generate(**batch, assistant_model=make_drafter(target), **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.loop == loop


def test_asked_loop_is_saved_with_the_drafter(target, tmp_path):
    drafter = make_drafter(target)
    drafter.generation_config.decode_loop = "host"
    drafter.save_pretrained(tmp_path)
    assert Eagle3DrafterModel.from_pretrained(tmp_path).generation_config.decode_loop == "host"


# ---- trouble ----


def test_interrupted_call_leaves_both_models_usable(target):
    batch, drafter = pad(prompts_of(6, 3)), make_drafter(target)
    plain = target.generate(**batch, max_new_tokens=12, **GREEDY)
    options = {"max_new_tokens": 12, "assistant_model": drafter, **GREEDY}
    with pytest.raises(KeyboardInterrupt):
        target.generate(**batch, logits_processor=LogitsProcessorList([Raise(10)]), **options)
    assert count_hooks(target) == 0
    assert target.generate(**batch, **options).tolist() == plain.tolist()


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}], ids=["tensors", "in_order"])
def test_nan_logits_are_named(target, options):
    handle = target.lm_head.register_forward_hook(lambda _m, _a, out: out * torch.nan)
    try:
        with pytest.raises(NotANumberError, match="logits are NaN"):
            target.generate(make_prompt(5), assistant_model=make_drafter(target), max_new_tokens=4, **options)
    finally:
        handle.remove()


@pytest.mark.parametrize("drafter_dtype", [torch.bfloat16, torch.float32])
def test_half_precision_runs(drafter_dtype):
    target = FAMILIES["mistral"]().eval().to(torch.bfloat16)
    batch = pad(prompts_of(6, 3))
    drafter = make_drafter(target).to(drafter_dtype)
    out = target.generate(**batch, assistant_model=drafter, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert out.shape == (2, 18)


@pytest.mark.slow
def test_mixed_calls_with_failures_leave_nothing_behind(target):
    drafter = make_drafter(target)

    def call(seed):
        random = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 14, (1 + seed % 4,), generator=random).tolist()
        options = {"max_new_tokens": 1 + seed % 9, "assistant_model": drafter, "do_sample": seed % 2 == 1}
        options |= [{}, {"repetition_penalty": 1.2}, {"output_scores": True, "return_dict_in_generate": True}][
            seed % 3
        ]
        if seed % 5 == 0:
            options["logits_processor"] = LogitsProcessorList([Raise(max(lengths) + 2)])
        try:
            target.generate(**pad(prompts_of(*lengths)), **options)
        except KeyboardInterrupt:
            assert seed % 5 == 0

    def count_tensors():
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    for seed in range(30):
        call(seed)
    before = count_tensors()
    for seed in range(30, 120):
        call(seed)
    assert count_tensors() <= before
    assert count_hooks(target) == 0


def test_pipeline_takes_a_drafter(target):
    tokenizer = word_tokenizer()
    texts = ["w5 w9 w11", "w7 w8 w9"]
    outs = []
    same_ids = make_drafter(target, pad_token_id=0, bos_token_id=1)
    # The host compares special tokens, and wants a tokenizer of a drafter whose config does not state them.
    other_ids = {"assistant_model": make_drafter(target), "assistant_tokenizer": tokenizer}
    for assistant in ({}, {"assistant_model": same_ids}, other_ids):
        generate = pipeline("text-generation", model=target, tokenizer=tokenizer, **assistant)
        outs.append(generate(texts, max_new_tokens=8, do_sample=False, batch_size=2))
    assert outs[0] == outs[1] == outs[2]


# ---- where models are, and in what ----


@pytest.mark.parametrize("loop", ["own", "host"])
def test_target_partly_on_disk(target, loop, tmp_path):
    """As with any `device_map`, hooks of accelerate move what a layer needs."""
    target.save_pretrained(tmp_path)
    whole = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(whole, "cpu") | {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(8)}
    spread = type(target).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    batch = pad(prompts_of(9, 4)) if loop == "own" else {"input_ids": make_prompt(9)}
    options = {"max_new_tokens": 12, **GREEDY}
    out = spread.generate(**batch, assistant_model=make_drafter(spread), decode_loop=loop, **options)
    assert out.tolist() == target.generate(**batch, **options).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("family", [*OLD, *FAMILIES])
@pytest.mark.parametrize("lengths", [(5,), (30, 7, 1, 18)], ids=["one_row", "ragged"])
def test_greedy_rows_are_the_targets_on_a_gpu(family, lengths):
    target = copy.deepcopy(make_target(family)).cuda()
    batch = {name: value.cuda() for name, value in pad(prompts_of(*lengths)).items()}
    options = {"max_new_tokens": 24, "return_dict_in_generate": True, **GREEDY}
    plain = target.generate(**batch, **options)
    oracle = make_oracle(target, plain.sequences, batch).cuda()
    out = target.generate(**batch, assistant_model=oracle, **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.loop == "own decode loop"
    assert 1 < out.speculation.acceptance_length < 4


@pytest.mark.gpu
def test_target_on_two_devices():
    target = make_target("llama")
    places = {f"model.layers.{i}": ("cpu", "cuda:0")[i % 2] for i in range(8)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cuda:0")
    spread = dispatch_model(copy.deepcopy(target), places, main_device="cuda:0")
    batch = {name: value.cuda() for name, value in pad(prompts_of(9, 4)).items()}
    options = {"max_new_tokens": 12, **GREEDY}
    out = spread.generate(**batch, assistant_model=make_drafter(spread).cuda(), **options)
    assert out.tolist() == spread.generate(**batch, **options).tolist()


# ---- watermarks ----


MARKS = {
    "lefthash": WatermarkingConfig(bias=8.0, seeding_scheme="lefthash"),
    "selfhash": WatermarkingConfig(bias=8.0, seeding_scheme="selfhash"),
    "synth_id": SynthIDTextWatermarkingConfig(keys=[3, 5], ngram_len=2),  # keeps state for all rows
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
@pytest.mark.parametrize("lengths", [(9,), (12, 5, 7)], ids=["one_row", "ragged"])
def test_watermarks_are_plain_decodings(lengths, mark, target):
    batch = pad(prompts_of(*lengths))
    plain, _ = assert_same(target, batch, max_new_tokens=12, watermarking_config=mark)
    assert not torch.equal(plain.sequences, target.generate(**batch, max_new_tokens=12, **GREEDY))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"output_hidden_states": True, "num_return_sequences": 2, "do_sample": True}, "output_hidden_states"),
    ],
    ids=["hidden_states", "several"],
)
def test_batches_that_only_the_hosts_loop_could_take_say_what_to_leave_out(options, name, target):
    with pytest.raises(ValueError, match=f"one row at a time here .*: leave out {name}, "):
        target.generate(**pad(prompts_of(4, 5)), assistant_model=make_drafter(target), **{**GREEDY, **options})
