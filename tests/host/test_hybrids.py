"""Targets with recurrent layers: each row is what plain decoding of that row alone says, whatever is drafted."""

import copy
import itertools
import threading
from collections import Counter

import pytest
import torch
from helpers.capture import GraphsOnCpus
from helpers.families import VOCAB, Family, build, make_batch, make_oracle, prompts_of, randomize, tiny_config
from helpers.hybrids import (
    ALONE,
    EVERYDAY,
    FAMILIES,
    GREEDY,
    OWN,
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
from helpers.tokenizers import tokenizer
from transformers import BambaForCausalLM, DynamicCache, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.decoding.engine import Engine, Room
from hf_eagle3.decoding.state import RoundConfig
from hf_eagle3.rows.recurrent import MIXERS, continues, find_mixers


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", [(11,), RAGGED], ids=["one_row", "ragged"])
@pytest.mark.parametrize(
    ("name", "depth"),
    slow_rows_but(
        [*itertools.product(["qwen3_5_text"], (0, 1, 3)), *itertools.product(EVERYDAY[1:], (3,))],
        itertools.product(FAMILIES, (0, 1, 3)),
    ),
)
def test_each_row_is_that_row_alone(name, lengths, depth):
    assert_says_what_rows_say_alone(name, lengths, num_assistant_tokens=depth)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loop", ["own", "eager"])
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text", "falcon_h1"], FAMILIES))
def test_projections_run_over_whole_blocks_but_in_stock_layers(name, loop):
    module = next(iter(find_mixers(make_target(name)).values()))
    mixer, widths, expected = MIXERS[type(module).__name__], [], say_alone(name, (11,), 16).tolist()
    parts = [getattr(module, part) for part in (*mixer.entries, mixer.exit) if part is not None]
    handles = [part.register_forward_hook(lambda _m, args, _out: widths.append(args[0].shape[1])) for part in parts]
    try:
        out = decode(name, (11,), decode_loop=loop, num_assistant_tokens=3)
    finally:
        for handle in handles:
            handle.remove()
    assert out.sequences[:, 11:].tolist() == expected
    assert Counter(widths).keys() == {11, 4 if loop == "own" else 1}


def test_rows_do_not_see_pads_that_plain_decoding_sees():
    """With a bias on the projection, plain decoding's convolutions see it at the pads before a row's first tokens."""
    config = tiny_config(Family("bamba", "causal"))
    config.mamba_proj_bias = True
    torch.manual_seed(3)
    target = BambaForCausalLM(config).eval()
    randomize(target, 0.5)
    for part in (module.in_proj for module in find_mixers(target).values()):
        torch.nn.init.normal_(part.bias, std=3.0)
    batch, options = (
        make_batch(RAGGED, "cpu"),
        {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, **GREEDY},
    )
    plain = target.generate(**batch, **options)
    alone = [target.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts_of(batch)]
    out = target.generate(**batch, assistant_model=make_oracle(target, plain, batch), **options)
    assert out[:, max(RAGGED) :].tolist() == alone
    assert plain[:, max(RAGGED) :].tolist() != alone


# ---- caches ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("max_new", [1, 9])
@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text"], FAMILIES))
def test_the_cache_is_plain_decodings(name, depth, max_new):
    out = decode(name, (11,), num_assistant_tokens=depth, max_new=max_new)
    plain = make_target(name).generate(
        **make_batch((11,), "cpu"), max_new_tokens=max_new, return_dict_in_generate=True, **GREEDY
    )
    assert_same_cache(out[CACHE_NAME], plain[CACHE_NAME])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text"], FAMILIES))
def test_states_of_rows_that_end_early_go_on_over_their_pads(name, depth):
    batch = make_even_batch()
    eos = find_early_end(name, batch, 20)
    plain, _ = compare(name, batch, depth=depth, max_new_tokens=20, eos_token_id=eos, pad_token_id=0)
    assert (plain.sequences[:, -1] == 0).any()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("has_eos", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text"], FAMILIES))
def test_a_criterion_over_the_batch_cuts_states_back(name, has_eos, num_rows):
    batch = make_even_batch(num_rows)
    options = {"eos_token_id": find_early_end(name, batch, 20), "pad_token_id": 0} if has_eos else {}
    for length in (11, 12, 13):
        compare(name, batch, max_new_tokens=20, stopping_criteria=[Ends(length)], wrong_share=0.2, **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text"], FAMILIES))
def test_a_second_turn_goes_on_from_either_cache(name, num_rows):
    """Over several tokens behind states, which is the host's affair: some families forget the first turn there."""
    batch = make_even_batch(num_rows)
    plain, out = compare(name, batch, max_new_tokens=9)
    more = torch.randint(3, 100, (num_rows, 5), generator=torch.Generator().manual_seed(6))
    ids = torch.cat([plain.sequences, more], dim=1)
    if all(plain[CACHE_NAME].is_linear):  # the host then takes new tokens alone
        ids = ids[:, plain.sequences.shape[1] - 1 :]
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 9, "return_dict_in_generate": True, **GREEDY}
    target = make_target(name)
    second = target.generate(**turn, **{CACHE_NAME: copy.deepcopy(plain[CACHE_NAME])}, **options)
    oracle = make_oracle(target, second.sequences, turn)
    for cache in (out[CACHE_NAME], copy.deepcopy(plain[CACHE_NAME])):
        ours = target.generate(**turn, **{CACHE_NAME: cache}, assistant_model=oracle, **options)
        assert ours.sequences.tolist() == second.sequences.tolist()
        assert ours.speculation.loop == OWN
        assert ours[CACHE_NAME] is cache
        assert_same_cache(cache, second[CACHE_NAME])


@pytest.mark.sampled(2)
@torch.no_grad()
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text", "jamba"], FAMILIES))
def test_which_families_go_on_from_states_with_several_tokens(name):
    """Where the host's forward forgets them, a chat runs the whole conversation instead."""
    target, ids, cache = make_target(name), make_batch((24,), "cpu")["input_ids"], None
    for first in (0, 14):
        part = ids[:, first : first + 14]
        places = {} if name in ALONE else {"position_ids": torch.arange(first, first + part.shape[1])[None]}
        cache = DynamicCache(config=target.config) if cache is None else cache
        logits = target(part, **places, **{CACHE_NAME: cache}, use_cache=True).logits[0, -1]
    is_same = torch.allclose(logits, target(ids).logits[0, -1], rtol=1e-3, atol=1e-3)
    assert continues(target) == is_same


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text"], sorted(set(FAMILIES) - ALONE)))
def test_a_prompt_in_chunks(name):
    batch = make_even_batch(1, 21)
    compare(name, batch, max_new_tokens=9, prefill_chunk_size=8)


# ---- what else a call may ask for ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("kind", slow_but([LooksAtBatch], [LooksAtText, LooksAtBatch]))
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text"], EVERYDAY))
def test_processors_see_what_plain_decoding_shows(name, kind, num_rows):
    """Rows that are in step go on over their pads, states and all."""
    batch = make_even_batch(num_rows)
    options = {"max_new_tokens": 14, "eos_token_id": find_early_end(name, batch, 20), "pad_token_id": 0}
    plain, out = compare(name, batch, logits_processor=[kind()], output_scores=True, **options)
    for ours, theirs in zip(out.scores, plain.scores, strict=True):
        is_shown = ours.abs().sum(-1) > 0
        torch.testing.assert_close(ours[is_shown], theirs[is_shown], rtol=1e-3, atol=1e-3)


class Collects(BaseStreamer):
    """Keeps the tokens of one row."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text"], EVERYDAY))
def test_stop_strings_and_streamers(name):
    batch, words = make_even_batch(3), tokenizer(VOCAB)
    new = make_target(name).generate(**batch, max_new_tokens=16, **GREEDY)[:, 7:]
    stop = words.decode(new[1, 4:6])
    compare(name, batch, max_new_tokens=16, stop_strings=[stop], tokenizer=words, eos_token_id=2, pad_token_id=0)
    streamer = Collects()
    drafter = make_drafter(name, (11,))
    out = make_target(name).generate(
        **make_batch((11,), "cpu"), assistant_model=drafter, max_new_tokens=16, streamer=streamer, **GREEDY
    )
    assert streamer.tokens == out[0].tolist()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", slow_but(["lfm2_moe"], FAMILIES))
def test_a_seed_gives_one_text_with_and_without_a_draft(name):
    target, batch, drafter = make_target(name), make_batch(RAGGED, "cpu"), make_drafter(name, RAGGED)
    options = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 16, "seed": 5}
    plain = target.generate(**batch, decode_loop="own", **options)
    for depth in (0, 1, 3):
        out = target.generate(**batch, assistant_model=drafter, num_assistant_tokens=depth, **options)
        assert out.tolist() == plain.tolist()
    assert target.generate(**batch, decode_loop="own", **{**options, "seed": 6}).tolist() != plain.tolist()


@pytest.mark.sampled(2)
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", EVERYDAY)
def test_sampled_texts_are_distributed_as_plain_decodings(name):
    """The second and the third token of many rows, by the ratio test."""
    target, ids = make_target(name), make_batch((5,), "cpu")["input_ids"]
    options = {"do_sample": True, "temperature": 2.0, "top_k": 3, "max_new_tokens": 3}
    drafter = make_drafter(name, (5,))
    torch.manual_seed(0)
    rows = torch.cat(
        [
            target.generate(ids.expand(400, -1), assistant_model=drafter, num_assistant_tokens=2, **options)[:, 5:]
            for _ in range(5)
        ]
    )
    counts = Counter(map(tuple, rows.tolist()))
    assert len(counts) > 5
    for text, count in counts.most_common(8):
        p = 1.0
        for k, token in enumerate(text):
            whole = torch.cat([ids, torch.tensor([text[:k]], dtype=torch.long)], dim=1)
            logits = target(whole).logits[0, -1].float() / 2.0
            kept = logits.topk(3)
            p *= float(kept.values.softmax(-1)[kept.indices == token].sum())
        assert abs(count / len(rows) - p) < 5 * (p * (1 - p) / len(rows)) ** 0.5


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", slow_but(["lfm2_moe"], EVERYDAY))
def test_pads_on_the_right(name):
    drafter, prompts = make_drafter(name, RAGGED), prompts_of(make_batch(RAGGED, "cpu"))
    ids = torch.stack([torch.tensor([*prompt, *[0] * (max(RAGGED) - len(prompt))]) for prompt in prompts])
    out = make_target(name).generate(
        ids, attention_mask=(ids != 0).long(), assistant_model=drafter, max_new_tokens=16, **GREEDY
    )
    assert out[:, max(RAGGED) :].tolist() == say_alone(name, RAGGED, 16).tolist()


def test_embeddings_as_a_prompt():
    target, drafter = make_target("qwen3_5_text"), make_drafter("qwen3_5_text", (11,))
    embeds = target.get_input_embeddings()(make_batch((11,), "cpu")["input_ids"]).detach()
    out = target.generate(inputs_embeds=embeds, assistant_model=drafter, max_new_tokens=16, **GREEDY)
    assert out.tolist() == say_alone("qwen3_5_text", (11,), 16).tolist()


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_images_before_a_hybrids_text(name, num_rows):
    target = build(Family(name, "image-text"))
    config, vision = target.config, target.config.vision_config
    side = 2 * vision.spatial_merge_size
    image = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    ids = torch.tensor([[5, 6, *image, 9, 10, 11], [0] * 6 + [5, 6, 7, 8, 9]][:num_rows])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "pixel_values": torch.randn(
            side * side, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        ),
    }
    options = {"max_new_tokens": 14, "return_dict_in_generate": True, **GREEDY}
    plain = target.generate(**batch, **options)
    oracle = make_oracle(target, plain.sequences, batch)
    out = target.generate(**batch, assistant_model=oracle, num_assistant_tokens=3, **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.loop == OWN
    assert_same_cache(out[CACHE_NAME], plain[CACHE_NAME])


# ---- failures and refusals ----


class FailsError(Exception):
    pass


class FailsAt(LogitsProcessor):
    """FailsError at a length, and looks at the text."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise FailsError
        return scores


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", slow_but(["qwen3_5_text"], EVERYDAY))
def test_what_callbacks_raise_leaves_nothing_behind(name):
    target, batch, drafter = make_target(name), make_batch(RAGGED, "cpu"), make_drafter(name, RAGGED)

    class Breaks(Ends):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] >= self.length:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    for options, error in (
        ({"logits_processor": [FailsAt(18)]}, FailsError),
        ({"stopping_criteria": [Breaks(17)]}, KeyboardInterrupt),
    ):
        with pytest.raises(error):
            target.generate(**batch, assistant_model=drafter, max_new_tokens=16, **options, **GREEDY)
        assert_nothing_left(name)
    assert_says_what_rows_say_alone(name, RAGGED)


def test_a_forward_that_fails_gives_mixers_their_forward_back():
    name = "qwen3_5_text"
    target, drafter = make_target(name), make_drafter(name, (11,))
    calls = []

    def fail(_module, args):
        calls.append(args[0].shape[1])
        if len(calls) == 5:  # in the second round
            raise FailsError

    handle = target.lm_head.register_forward_pre_hook(fail)
    try:
        with pytest.raises(FailsError):
            target.generate(**make_batch((11,), "cpu"), assistant_model=drafter, max_new_tokens=16, **GREEDY)
    finally:
        handle.remove()
    assert_nothing_left(name)


def test_two_threads_decode_with_one_target():
    name = "qwen3_5_text"
    expected = {lengths: say_alone(name, lengths, 16).tolist() for lengths in ((11,), RAGGED)}
    found = {}

    def decode_often(lengths):
        found[lengths] = [decode(name, lengths).sequences[:, max(lengths) :].tolist() for _ in range(3)]

    threads = [threading.Thread(target=decode_often, args=(lengths,)) for lengths in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {lengths: [text] * 3 for lengths, text in expected.items()}
    assert_nothing_left(name)


def refuse(target, match: str, **options) -> None:
    with pytest.raises(ValueError, match=match):
        target.generate(**make_batch((11,), "cpu"), max_new_tokens=4, **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("shape", [(0, 0, 1), {"steps": 2, "topk": 2, "draft_tokens": 4}], ids=["parents", "triple"])
def test_trees_are_refused(shape):
    drafter = make_drafter("qwen3_5_text", (11,))
    refuse(
        make_target("qwen3_5_text"),
        "draft_shape is a tree.*keeps recurrent states",
        assistant_model=drafter,
        draft_shape=shape,
    )


def test_trees_are_not_chosen():
    drafter = make_drafter("qwen3_5_text", (11,))
    drafter.generation_config.num_assistant_tokens = None
    out = make_target("qwen3_5_text").generate(
        **make_batch((11,), "cpu"), assistant_model=drafter, max_new_tokens=40, return_dict_in_generate=True, **GREEDY
    )
    assert all(shape == "none" or shape.startswith("chain") for shape in out.speculation.shapes)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"decode_loop": "host"}, "decode_loop is host"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is set"),
        ({CACHE_NAME: DynamicCache()}, "the cache given has no place for recurrent states"),
    ],
    ids=["host", "hidden_states", "cache"],
)
def test_the_hosts_loop_is_refused(options, why):
    drafter = make_drafter("qwen3_5_text", (11,))
    refuse(make_target("qwen3_5_text"), rf"our own is ruled out \({why}\)", assistant_model=drafter, **options)


def test_a_recurrence_that_is_not_known_is_refused_by_name():
    target = copy.deepcopy(make_target("qwen3_5_text"))
    mixer = target.model.layers[1].linear_attn
    mixer.__class__ = type("MyNet", (type(mixer),), {})
    why = r"Qwen3_5ForCausalLM keeps states in a way that our loop does not know \(linear_attention in Qwen3_5DecoderLayer\)"
    drafter = make_drafter("qwen3_5_text", (11,))
    refuse(target, why, assistant_model=drafter)
    refuse(target, "does not run in our decode loop", decode_loop="own")


def test_a_compiled_recurrence_is_refused_with_the_line_that_undoes_it():
    target, drafter = copy.deepcopy(make_target("qwen3_5_text")), make_drafter("qwen3_5_text", (11,))
    target.model.layers[1].linear_attn.compile(backend="eager")
    refuse(
        target,
        r"compiled at target.model.layers\[1\].linear_attn.*_compiled_call_impl = None",
        assistant_model=drafter,
    )


def test_the_host_still_assists_where_nothing_but_convolutions_is_kept():
    name, lengths = "lfm2_moe", (11,)
    out = decode(name, lengths, decode_loop="host", num_assistant_tokens=3)
    assert out.sequences[:, 11:].tolist() == say_alone(name, lengths, 16).tolist()
    assert out.speculation.loop == "host assisted decoding"


def test_what_is_not_captured_yet_says_so():
    config, room = RoundConfig(), Room(1, 11, 4)
    with Engine(make_target("lfm2_moe"), None, config, room, capturer=GraphsOnCpus()) as engine:
        why = "Lfm2MoeForCausalLM has recurrent layers of a kind that is not captured yet (short convolution)"
        assert engine.why_eager == why
