"""`generate(assistant_model=drafter)` gives what `generate()` gives."""

import copy
import functools
import itertools

import pytest
import torch
from helpers.arguments import Raise, RecordingStreamer, StopAt
from helpers.marks import slow_but
from helpers.models import (
    DRAFTERS,
    NUM_LAYERS,
    TARGETS,
    V,
    count_hooks,
    make_drafter,
    make_oracle,
    make_prompt,
    make_target,
)
from helpers.tokenizers import word_tokenizer
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_eagle3.compat import CACHE_NAME

GREEDY = {"do_sample": False}
FEEDS = ["whole_sequence", "new_tokens_only"]


@functools.cache
def plain_of(family, length, max_new_tokens):
    """What a target says without a drafter."""
    options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True, **GREEDY}
    return make_target(family).generate(make_prompt(length), **options)


def assert_same_with_oracle(target, prompt, *, depth=3, drafter_options=None, plain=None, **settings):
    """Greedy text with an oracle equals greedy text without; returns both outputs and the oracle."""
    plain = plain or target.generate(prompt, return_dict_in_generate=True, **GREEDY, **settings)
    mask = settings.get("attention_mask")
    text = plain.sequences[0] if mask is None else plain.sequences[0, (mask == 0).sum() :]
    oracle = make_oracle(target, text, **(drafter_options or {}))
    assisted = target.generate(
        prompt,
        return_dict_in_generate=True,
        assistant_model=oracle,
        num_assistant_tokens=depth,
        **GREEDY,
        **settings,
    )
    assert assisted.sequences.tolist() == plain.sequences.tolist()
    assert assisted.speculation.num_tokens == plain.sequences.shape[1] - prompt.shape[1]
    assert count_hooks(target) == 0
    return plain, assisted, oracle


@pytest.mark.sampled(2)
@pytest.mark.parametrize("length", slow_but([30], [1, 5, 30]), ids=["one_token", "short", "beyond_windows"])
@pytest.mark.parametrize("depth", slow_but([3], [1, 2, 3, 5]))
@pytest.mark.parametrize("family", TARGETS)
def test_greedy_text_is_the_targets(family, depth, length):
    options = {"depth": depth, "max_new_tokens": 24, "plain": plain_of(family, length, 24)}
    _, out, _ = assert_same_with_oracle(make_target(family), make_prompt(length), **options)
    assert 1 < out.speculation.acceptance_length < depth + 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("variant", DRAFTERS)
@pytest.mark.parametrize("family", slow_but(["llama", "gemma3_vlm"], TARGETS))
def test_every_drafter_keeps_its_cache_in_step(family, variant):
    options = {"drafter_options": DRAFTERS[variant], "max_new_tokens": 16, "plain": plain_of(family, 20, 16)}
    assert_same_with_oracle(make_target(family), make_prompt(20), **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", slow_but(list(DRAFTERS)[::2], DRAFTERS))
@pytest.mark.parametrize("family", slow_but(["gpt_oss"], TARGETS))
def test_random_drafter_changes_nothing(family, variant):
    target, prompt = make_target(family), make_prompt(9)
    drafter = make_drafter(target, **DRAFTERS[variant])
    plain = plain_of(family, 9, 12).sequences
    assert target.generate(prompt, max_new_tokens=12, assistant_model=drafter, **GREEDY).tolist() == plain.tolist()


def test_every_number_of_accepted_tokens_occurs(target):
    reached = torch.zeros(6)
    for length in (4, 7, 11):
        _, out, _ = assert_same_with_oracle(target, make_prompt(length), depth=5, max_new_tokens=80)
        kept = [out.speculation.rounds, *out.speculation.rounds_accepting, 0]
        reached += torch.tensor([a - b for a, b in itertools.pairwise(kept)])  # rounds that kept exactly k
    assert (reached > 0).all(), reached


def test_perfect_drafter_has_every_token_accepted(target):
    prompt = make_prompt(5)
    text = target.generate(prompt, max_new_tokens=41, **GREEDY)
    oracle = make_oracle(target, text[0], wrong_share=0.0)
    settings = {"max_new_tokens": 41, "num_assistant_tokens": 4, "return_dict_in_generate": True}
    speculation = target.generate(prompt, assistant_model=oracle, **settings, **GREEDY).speculation
    assert (speculation.rounds, speculation.acceptance_length) == (8, 5.0)
    assert speculation.acceptance_rate_by_depth == [1.0] * 4


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5])
def test_length_limit_is_kept(target, max_new_tokens):
    assert_same_with_oracle(
        target,
        make_prompt(4),
        depth=5,
        max_new_tokens=max_new_tokens,
        drafter_options={"wrong_share": 0.0},
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("offset", range(7))
def test_end_of_sequence_inside_a_block_ends_there(target, offset):
    prompt = make_prompt(6)
    text = target.generate(prompt, max_new_tokens=20, **GREEDY)[0, 6:].tolist()
    eos = text[4 + offset]
    plain, out, _ = assert_same_with_oracle(
        target, prompt, depth=4, max_new_tokens=20, eos_token_id=[eos, 2], drafter_options={"wrong_share": 0.0}
    )
    assert plain.sequences[0, -1] == eos
    assert out.speculation.num_tokens == text.index(eos) + 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_length": 12, "eos_token_id": [5, 17, 23, 40, 51]},
        {"min_new_tokens": 6, "eos_token_id": list(range(30))},
        {"bad_words_ids": [[7], [11, 12]]},
        {"suppress_tokens": [4, 8, 15, 16, 23, 42]},
        {"forced_eos_token_id": 9},
        {"sequence_bias": [[[5], 3.0]]},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_processors_see_what_they_see_without_a_drafter(target, settings):
    assert_same_with_oracle(target, make_prompt(9), max_new_tokens=24, **settings)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("pads", slow_but([6], [1, 6, 19]))
def test_left_padding_of_one_row_changes_nothing(family, pads):
    target, prompt = make_target(family), make_prompt(11)
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), prompt], dim=1)
    mask = (padded != 0).long()
    # The oracle checks that the drafter sees the unpadded text at the positions counted without padding.
    assert_same_with_oracle(target, padded, attention_mask=mask, max_new_tokens=16)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_outputs_have_the_lengths_and_values_of_plain_ones(family):
    target, prompt = make_target(family), make_prompt(7)
    asked = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    plain, out, _ = assert_same_with_oracle(target, prompt, max_new_tokens=13, **asked)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(out[name]), torch.cat(plain[name]), rtol=1e-4, atol=1e-4)
    assert len(out.hidden_states) == len(plain.hidden_states) == 13
    for ours, theirs in zip(out.hidden_states, plain.hidden_states, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert out.keys() == plain.keys()
    assert out[CACHE_NAME].get_seq_length() == plain[CACHE_NAME].get_seq_length()


@pytest.mark.parametrize("family", slow_but(["llama", "gpt_oss"], ["llama", "qwen3", "gpt_oss", "qwen_vlm"]))
@pytest.mark.parametrize("feed", FEEDS)
def test_conversation_goes_on_from_the_cache(family, feed):
    target, prompt = make_target(family), make_prompt(6)
    settings = {"max_new_tokens": 14, **GREEDY}

    def first_turn(**assistant):
        return target.generate(prompt, return_dict_in_generate=True, **assistant, **settings)

    plain = first_turn()
    # A drafter in the first turn already: its call leaves the cache as a plain one does.
    turn = first_turn(assistant_model=make_oracle(target, plain.sequences[0]))
    whole = torch.cat([turn.sequences, make_prompt(5)], dim=1)
    cached = int(turn[CACHE_NAME].get_seq_length())
    fed = {
        "inputs": whole if feed == "whole_sequence" else whole[:, cached:],
        "attention_mask": torch.ones_like(whole),
    }
    expected = target.generate(**fed, **{CACHE_NAME: plain[CACHE_NAME]}, **settings)
    num_new = expected.shape[1] - fed["inputs"].shape[1]
    oracle = make_oracle(target, torch.cat([whole[0], expected[0, -num_new:]]))
    out = target.generate(
        **fed,
        **{CACHE_NAME: turn[CACHE_NAME]},
        assistant_model=oracle,
        return_dict_in_generate=True,
        **settings,
    )
    assert out.sequences.tolist() == expected.tolist()
    assert out.speculation.acceptance_length > 1
    positions = torch.cat([seen_positions[0] for _, _, seen_positions in oracle.seen])
    assert positions[: whole.shape[1] - cached].tolist() == list(range(cached, whole.shape[1]))  # the new ones only


@pytest.mark.parametrize("fed", FEEDS)
def test_conversation_with_a_padded_start_goes_on_from_the_cache(target, fed):
    prompt = torch.cat([torch.zeros(1, 3, dtype=torch.long), make_prompt(6)], dim=1)
    settings = {"max_new_tokens": 10, **GREEDY}
    outs = []
    for assistant in ({}, {"assistant_model": make_drafter(target)}):
        mask = (prompt != 0).long()
        turn = target.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **settings, **assistant)
        whole = torch.cat([turn.sequences, make_prompt(5)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, whole.shape[1] - mask.shape[1]), value=1)
        past = turn[CACHE_NAME]
        ids = whole if fed == "whole_sequence" else whole[:, int(past.get_seq_length()) :]
        outs.append(target.generate(ids, attention_mask=mask, **{CACHE_NAME: past}, **settings, **assistant))
    assert outs[1].tolist() == outs[0].tolist()


def test_prompt_of_padded_embeddings_works(target):
    embeds = target.get_input_embeddings()(make_prompt(9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    fed = {"inputs_embeds": embeds, "attention_mask": mask, "max_new_tokens": 14, **GREEDY}
    assert target.generate(**fed, assistant_model=make_drafter(target)).tolist() == target.generate(**fed).tolist()


def test_prompt_of_embeddings_works(target):
    embeds = target.get_input_embeddings()(make_prompt(9))
    plain = target.generate(inputs_embeds=embeds, max_new_tokens=14, **GREEDY)
    drafter = make_drafter(target)
    out = target.generate(inputs_embeds=embeds, max_new_tokens=14, assistant_model=drafter, **GREEDY)
    assert out.tolist() == plain.tolist()


@pytest.mark.parametrize("length", range(8, 15))
def test_custom_criterion_stops_inside_a_block(target, length):
    prompt, criterion = make_prompt(6), StopAt(length)
    settings = {"max_new_tokens": 30, "output_scores": True, "stopping_criteria": StoppingCriteriaList([criterion])}
    plain, out, _ = assert_same_with_oracle(target, prompt, depth=5, drafter_options={"wrong_share": 0.1}, **settings)
    assert out.sequences.shape[1] == length
    assert len(out.scores) == length - 6
    assert out[CACHE_NAME].get_seq_length() == plain[CACHE_NAME].get_seq_length() == length - 1
    half = len(criterion.lengths_seen) // 2
    assert criterion.lengths_seen[half:] == criterion.lengths_seen[:half]  # once a token, as without a drafter


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_cache_that_cannot_be_cut_back_is_not_returned(family, caplog):
    target, prompt = make_target(family), make_prompt(12)
    text = target.generate(prompt, max_new_tokens=20, **GREEDY)
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True, **GREEDY}
    oracle = make_oracle(target, text[0], wrong_share=0.0)
    for length, is_inside in ((12 + 4, True), (12 + 5, False)):  # blocks of 1, 4, 4, ...
        criteria = StoppingCriteriaList([StopAt(length)])
        out = target.generate(
            prompt, assistant_model=oracle.tell(text[0], wrong_share=0.0), stopping_criteria=criteria, **settings
        )
        assert out.sequences.tolist() == text[:, :length].tolist()
        assert (out.get(CACHE_NAME) is None) == (getattr(out, CACHE_NAME) is None) == is_inside
        assert ("cannot be cut back" in caplog.text) == is_inside
        caplog.clear()


def test_stop_strings_stop_where_they_do_without(target):
    prompt = make_prompt(6)
    word = f"w{target.generate(prompt, max_new_tokens=20, **GREEDY)[0, 6 + 8]}"
    assert_same_with_oracle(
        target,
        prompt,
        depth=5,
        max_new_tokens=30,
        stop_strings=[word],
        tokenizer=word_tokenizer(),
        drafter_options={"wrong_share": 0.1},
    )


def test_streamer_gets_the_same_tokens_one_by_one(target):
    prompt = make_prompt(6)
    text = target.generate(prompt, max_new_tokens=20, **GREEDY)
    streamers = [RecordingStreamer(word_tokenizer()) for _ in range(2)]
    eos = text[0, 6 + 9].item()
    settings = {"max_new_tokens": 20, "eos_token_id": eos, **GREEDY}
    target.generate(prompt, streamer=streamers[0], **settings)
    target.generate(prompt, streamer=streamers[1], assistant_model=make_oracle(target, text[0]), **settings)
    assert streamers[1].puts == streamers[0].puts
    assert streamers[1].text == streamers[0].text != ""


def test_interrupted_call_leaves_both_models_usable(target):
    prompt = make_prompt(6)
    plain = target.generate(prompt, max_new_tokens=20, **GREEDY)
    oracle = make_oracle(target, plain[0])
    settings = {"max_new_tokens": 20, "assistant_model": oracle, **GREEDY}
    with pytest.raises(KeyboardInterrupt):
        target.generate(prompt, logits_processor=LogitsProcessorList([Raise(14)]), **settings)
    assert count_hooks(target) == 0
    oracle.tell(plain[0])
    assert target.generate(prompt, **settings).tolist() == plain.tolist()
    assert target.generate(prompt, max_new_tokens=20, **GREEDY).tolist() == plain.tolist()


def test_a_call_does_not_see_the_one_before(target):
    drafter = make_drafter(target)
    settings = {"max_new_tokens": 16, "assistant_model": drafter, "return_dict_in_generate": True, **GREEDY}
    runs = [target.generate(make_prompt(n), **settings) for n in (9, 4, 9)]
    assert runs[0].sequences.tolist() == runs[2].sequences.tolist()
    assert runs[0].speculation.rounds_accepting == runs[2].speculation.rounds_accepting


def test_drafter_in_another_dtype_works(target):
    drafter = make_drafter(target).to(torch.bfloat16)
    plain = target.generate(make_prompt(7), max_new_tokens=12, **GREEDY)
    out = target.generate(make_prompt(7), max_new_tokens=12, assistant_model=drafter, **GREEDY)
    assert out.tolist() == plain.tolist()
    assert target.generate(make_prompt(7), max_new_tokens=12, assistant_model=drafter, do_sample=True).shape[1] == 19


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_overflowing_drafter_changes_speed_only(target, poison, do_sample):
    drafter = make_drafter(target)
    with torch.no_grad():
        drafter.lm_head.weight[3:6] = poison
    out = target.generate(make_prompt(7), max_new_tokens=12, assistant_model=drafter, do_sample=do_sample)
    assert out.shape[1] == 19
    if not do_sample:
        assert out.tolist() == target.generate(make_prompt(7), max_new_tokens=12, **GREEDY).tolist()


# ---- depth ----


def test_depth_comes_from_the_call_then_the_drafter_then_the_default(target):
    drafter, prompt = make_drafter(target), make_prompt(5)

    def depth(**settings):
        out = target.generate(prompt, assistant_model=drafter, return_dict_in_generate=True, **settings)
        return out.speculation.depth

    assert depth(max_new_tokens=8) == 3
    drafter.generation_config.num_assistant_tokens = 4
    assert depth(max_new_tokens=8) == 4
    assert depth(max_new_tokens=8, num_assistant_tokens=2) == 2
    given = GenerationConfig(max_new_tokens=8, num_assistant_tokens=6, return_dict_in_generate=True)
    before = copy.deepcopy(given).to_dict()
    assert target.generate(prompt, generation_config=given, assistant_model=drafter).speculation.depth == 6
    assert given.to_dict() == before
    assert drafter.generation_config.num_assistant_tokens == 4
    given = GenerationConfig(max_new_tokens=8, return_dict_in_generate=True)
    assert target.generate(prompt, generation_config=given, assistant_model=drafter).speculation.depth == 4


def test_speculation_tells_the_story(target):
    _, out, _ = assert_same_with_oracle(target, make_prompt(5), max_new_tokens=40)
    told = out.speculation
    assert told.num_tokens == 40
    assert told.num_accepted == sum(told.rounds_accepting)
    assert told.num_accepted + told.rounds <= told.num_tokens <= told.num_accepted + told.rounds + 2
    assert told.acceptance_length == pytest.approx(1 + told.num_accepted / told.rounds)
    assert 0 < told.draft_seconds < told.seconds
    assert told.verify_seconds == pytest.approx(told.seconds - told.draft_seconds)
    assert "acceptance length" in str(told)
    assert told.loop == "host assisted decoding"


# ---- refusals ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beam_groups"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"force_words_ids": [[5]]}, "force_words_ids"),
        ({"num_return_sequences": 2, "do_sample": True, "decode_loop": "host"}, "num_return_sequences"),
        ({"decode_loop": "fast"}, "decode_loop is 'fast'"),
        ({"decode_loop": "own", "output_hidden_states": True}, "output_hidden_states is set"),
        ({"assistant_early_exit": 2}, "assistant_early_exit"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"use_cache": False}, "use_cache"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attn_implementation"),
        ({"num_assistant_tokens": 0, "decode_loop": "host"}, "num_assistant_tokens=0"),
        ({"num_assistant_tokens": -3}, "0 for none; got -3"),
        ({"num_assistant_tokens": 1.5}, "0 for none; got 1.5"),
        ({"custom_generate": "someone/loop"}, "custom_generate"),
        ({"custom_generate": lambda **_: None}, "custom_generate"),
        ({"inputs": make_prompt(4).repeat(2, 1), "output_hidden_states": True}, "hidden_states is set.*batch of 2"),
        ({"inputs": make_prompt(4).repeat(2, 1), "attention_mask": torch.tensor([[1] * 4, [0] * 4])}, "empty in some"),
        ({"inputs": make_prompt(4)[:, :0]}, "prompt is empty"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refused_before_any_work_and_usable_afterwards(target, settings, says):
    drafter, prompt = make_drafter(target), make_prompt(4)
    forwards = []
    handle = target.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        with pytest.raises(ValueError, match=says) as caught:
            target.generate(**{"inputs": prompt, "max_new_tokens": 4, "assistant_model": drafter, **settings})
    finally:
        handle.remove()
    assert not forwards
    assert "\n" not in str(caught.value)
    assert target.generate(prompt, max_new_tokens=4, assistant_model=drafter, **GREEDY).shape == (1, 8)


def test_drafter_of_another_target_is_refused(target):
    other = make_target("llama").config.to_dict() | {"hidden_size": 48}
    stranger = LlamaForCausalLM(type(target.config)(**other))
    with pytest.raises(ValueError, match=r"hidden size 32, .* has 48"):
        stranger.generate(make_prompt(4), assistant_model=make_drafter(target), max_new_tokens=4)
    deep = make_drafter(target, aux_layer_ids=[1, 2, NUM_LAYERS])
    shallow = LlamaForCausalLM(type(target.config)(**target.config.to_dict() | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="made for another target"):
        shallow.generate(make_prompt(4), assistant_model=deep, max_new_tokens=4)


def test_encoder_decoder_is_refused(target):
    config = T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="encoder-decoder"):
        T5ForConditionalGeneration(config).generate(
            make_prompt(4), assistant_model=make_drafter(target), max_new_tokens=4
        )


@pytest.mark.parametrize("marker", [{"draft_vocab_size": V}, {"eagle_config": {"use_aux_hidden_state": True}}])
def test_published_drafter_loaded_as_llama_is_found_out(target, marker):
    config = type(target.config)(**target.config.to_dict() | {"num_hidden_layers": 1} | marker)
    config._name_or_path = "someone/eagle3"
    mistaken = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r'AutoModel\.from_pretrained\("someone/eagle3"\)'):
        target.generate(make_prompt(4), assistant_model=mistaken, max_new_tokens=4)


# ---- devices ----


@pytest.mark.gpu
@pytest.mark.parametrize("drafter_on", ["cpu", "cuda"])
@pytest.mark.parametrize("target_on", ["cpu", "cuda"])
def test_models_may_be_on_different_devices(target_on, drafter_on):
    target = copy.deepcopy(make_target("llama")).to(target_on)
    drafter = make_drafter(target).to(drafter_on)
    prompt = make_prompt(7).to(target_on)
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True}
    plain = target.generate(prompt, **settings, **GREEDY)
    out = target.generate(prompt, assistant_model=drafter, **settings, **GREEDY)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert 0 < out.speculation.draft_seconds < out.speculation.seconds
    sampled = target.generate(prompt, assistant_model=drafter, do_sample=True, top_p=0.9, **settings)
    assert sampled.sequences.shape == (1, 27)
    assert sampled.sequences.device.type == target_on
