"""What the host does without a drafter, to the last bit, whether hf_eagle3 is imported or not.

Each scenario below states something that users count on. All run twice: here, and in a process that never imports
hf_eagle3. Results, errors, the state of the random generator and the models' settings must be the same. So this module
imports nothing of ours.
"""

import hashlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.paths import TESTS
from helpers.tokenizers import V, tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)
from transformers.cache_utils import Cache

SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
# Its name changed in 5.24.
CACHE_NAME = next(
    n for n in ("cache", "past_key_values") if n in inspect.signature(LlamaForCausalLM.forward).parameters
)
GREEDY = {"do_sample": False, "max_new_tokens": 12}
SAMPLED = {"do_sample": True, "max_new_tokens": 12}
EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}


class Models:
    """Made anew for each scenario, so that none sees what another left behind."""

    @staticmethod
    def make(model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """`model` with random weights that depend on `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
        return model.eval()

    @property
    def llama(self) -> LlamaForCausalLM:
        """Four layers, eager attention, so that it can return weights."""
        config = LlamaConfig(**SIZES, num_hidden_layers=4, attn_implementation="eager")
        return self.make(LlamaForCausalLM(config), 1)

    @property
    def small(self) -> LlamaForCausalLM:
        """An ordinary assistant: the first layers of the Llama."""
        small = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3, attn_implementation="eager"))
        small.load_state_dict(self.llama.state_dict(), strict=False)
        return small.eval()

    @property
    def mistral(self) -> MistralForCausalLM:
        """With a window of eight."""
        return self.make(MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=8)), 2)

    @property
    def t5(self) -> T5ForConditionalGeneration:
        """An encoder and a decoder."""
        config = T5Config(
            vocab_size=V, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=1
        )  # fmt: skip
        return self.make(T5ForConditionalGeneration(config), 3)


models = Models()
SCENARIOS: dict[str, Callable[[], Any]] = {}


def scenario(function: Callable[[], Any]) -> Callable[[], Any]:
    SCENARIOS[function.__name__] = function
    return function


def prompt(length: int = 9, rows: int = 1) -> Tensor:
    """[rows, length] tokens that repeat, for the sake of prompt lookup."""
    return (torch.arange(rows * length).view(rows, length) % 4) * 7 + 3 + torch.arange(rows)[:, None]


def left_padded() -> dict[str, Tensor]:
    ids = torch.tensor([[0, 0, 0, 9, 8, 7], [5, 6, 7, 8, 9, 10]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def message_of(kind: type[BaseException], call: Callable[[], Any]) -> str:
    """What `call` complains about."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


class StopAtLength(StoppingCriteria):
    def __init__(self, length: int):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append((input_ids.shape[1], None if scores is None else len(scores)))
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Notes(LogitsProcessor):
    """Notes what it is shown and favours a token by how often it was called."""

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores):
        self.shown.append(input_ids.clone())
        scores = scores.clone()
        scores[:, len(self.shown) % V] += 3
        return scores


class Puts:
    """A streamer of one's own."""

    def __init__(self):
        self.puts = []

    def put(self, value):
        self.puts.append(value.clone())

    def end(self):
        self.puts.append("end")


# ---- greedy, sampling, beams ----


@scenario
def greedy_repeats_the_likeliest_token():
    model, ids = models.llama, prompt()
    out = model.generate(ids, **GREEDY)
    with torch.no_grad():
        assert model(out[:, :-1]).logits[0, 8:].argmax(-1).tolist() == out[0, 9:].tolist()
    return out


@scenario
def dict_outputs_have_an_entry_for_each_token():
    out = models.llama.generate(prompt(rows=2), **GREEDY, **EVERYTHING)
    assert {len(out[name]) for name in ("scores", "logits", "hidden_states", "attentions")} == {12}
    assert out.hidden_states[0][0].shape == (2, 9, 32)
    assert out.hidden_states[1][-1].shape == (2, 1, 32)
    assert out.attentions[3][0].shape == (2, 4, 1, 12)
    return out


@scenario
def one_seed_samples_one_text():
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(models.llama.generate(prompt(), **SAMPLED, temperature=0.9))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    return runs


@scenario
def every_warper_leaves_its_mark():
    laws = {"top_k": 4, "top_p": 0.6, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01}
    outs = {}
    for name, value in laws.items():
        out = models.llama.generate(prompt(), **SAMPLED, **EVERYTHING, **{"top_k": 0, name: value})
        assert any(score.isinf().any() for score in out.scores), name
        outs[name] = out
    return outs


@scenario
def several_sequences_of_a_prompt_stand_together():
    out = models.llama.generate(prompt(rows=2), **SAMPLED, num_return_sequences=3)
    assert out.shape == (6, 21)
    assert out[:, :9].tolist() == prompt(rows=2).repeat_interleave(3, 0).tolist()
    return out


@scenario
def beams_find_what_is_at_least_as_likely():
    model, outs = models.llama, []
    for num_beams in (1, 4):
        outs.append(model.generate(prompt(rows=2), **GREEDY, num_beams=num_beams, **EVERYTHING))
    assert outs[1].beam_indices.shape == (2, 12)
    assert len(outs[1].sequences_scores) == 2
    return outs


@scenario
def beams_give_several_sequences_best_first():
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True}
    out = models.llama.generate(prompt(), **GREEDY, **options, **EVERYTHING, eos_token_id=[5, 17, 33])
    assert out.sequences_scores.tolist() == sorted(out.sequences_scores.tolist(), reverse=True)
    return out


@scenario
def sampled_beams_work():
    return models.llama.generate(prompt(rows=2), **SAMPLED, num_beams=3, temperature=1.3, **EVERYTHING)


@scenario
def an_encoder_decoder_decodes():
    model = models.t5
    outs = [model.generate(prompt(rows=2), **o) for o in (GREEDY, SAMPLED, {**GREEDY, "num_beams": 3})]
    return [*outs, model.generate(prompt(), **GREEDY, **EVERYTHING)]


# ---- assistants ----


@scenario
def an_assistant_keeps_the_greedy_text():
    model, outs = models.llama, []
    plain = model.generate(prompt(), **GREEDY, **EVERYTHING)
    for assistant in (models.small, models.llama):
        for schedule in ("constant", "heuristic", "heuristic_transient"):
            assistant.generation_config.num_assistant_tokens_schedule = schedule
            out = model.generate(prompt(), **GREEDY, **EVERYTHING, assistant_model=assistant)
            assert torch.equal(out.sequences, plain.sequences)
            assert not hasattr(out, "speculation")
            for name in ("scores", "logits", "hidden_states", "attentions"):
                assert len(out[name]) == len(plain[name]), name
            outs.append((out, assistant.generation_config.num_assistant_tokens))
    return outs


@scenario
def an_assistant_samples():
    model, small = models.llama, models.small
    small.generation_config.assistant_confidence_threshold = 0.3
    options = {"temperature": 0.8, "top_k": 20, "assistant_model": small, "num_assistant_tokens": 4}
    return [model.generate(prompt(), **SAMPLED, **EVERYTHING, **options) for _ in range(3)]


@scenario
def an_assistant_stops_at_end_of_sequence_and_length():
    model, small = models.llama, models.small
    text = model.generate(prompt(), **GREEDY)[0, 9:].tolist()
    outs = []
    for options in (*({"eos_token_id": text[i]} for i in range(1, 7)), *({"max_new_tokens": n} for n in range(1, 6))):
        options = {**GREEDY, **options}
        plain = model.generate(prompt(), **options)
        out = model.generate(prompt(), **options, assistant_model=small)
        assert out.tolist() == plain.tolist()
        outs.append(out)
    return outs


@scenario
def an_assistant_may_have_a_window_or_face_one():
    model = models.mistral
    plain = model.generate(prompt(20), **GREEDY)
    outs = [model.generate(prompt(20), **GREEDY, assistant_model=a) for a in (models.mistral, models.small)]
    assert all(torch.equal(out, plain) for out in outs)
    return outs


@scenario
def the_first_layers_assist_the_whole():
    plain = models.llama.generate(prompt(), **GREEDY)
    out = models.llama.generate(prompt(), **GREEDY, assistant_early_exit=2)
    assert torch.equal(out, plain)
    return out


@scenario
def an_assistant_sees_a_streamer_processors_and_criteria():
    notes, stop, puts = Notes(), StopAtLength(17), Puts()
    out = models.llama.generate(
        prompt(),
        **GREEDY,
        assistant_model=models.small,
        streamer=puts,
        logits_processor=LogitsProcessorList([notes]),
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    return out, notes.shown, stop.asked, puts.puts


@scenario
def an_assistant_helps_an_encoder_decoder():
    plain = models.t5.generate(prompt(), **GREEDY)
    out = models.t5.generate(prompt(), **GREEDY, assistant_model=models.t5)
    assert torch.equal(out, plain)
    return out


@scenario
def an_assistant_of_other_words_needs_both_tokenizers():
    model, plain = models.llama, models.llama.generate(prompt(), **GREEDY)
    strange = Models.make(LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 70}, num_hidden_layers=1)), 5)
    options = {**GREEDY, "assistant_model": strange}
    both = {"tokenizer": tokenizer(), "assistant_tokenizer": tokenizer(70)}
    out = model.generate(prompt(), **options, **both)
    assert torch.equal(out, plain)
    # Sampled, the host gives another text each time, whatever the seed: nothing to compare.
    return out, message_of(ValueError, lambda: model.generate(prompt(), **options))


@scenario
def prompt_lookup_keeps_the_greedy_text():
    model, outs = models.llama, []
    plain = model.generate(prompt(16), **GREEDY, **EVERYTHING)
    for size in (1, 2, 4):
        options = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": size}
        out = model.generate(prompt(16), **GREEDY, **EVERYTHING, **options)
        assert torch.equal(out.sequences, plain.sequences)
        assert len(out.scores) == len(plain.scores)
        outs.append(out)
    return outs, models.mistral.generate(prompt(20), **GREEDY, prompt_lookup_num_tokens=3)


@scenario
def prompt_lookup_samples_and_stops():
    model = models.llama
    sampled = [model.generate(prompt(16), **SAMPLED, prompt_lookup_num_tokens=3) for _ in range(3)]
    text = model.generate(prompt(16), **GREEDY)[0, 16:].tolist()
    ended = model.generate(prompt(16), **GREEDY, prompt_lookup_num_tokens=3, eos_token_id=text[5])
    return sampled, ended


@scenario
def what_assistants_cannot_do_is_refused():
    model, small = models.llama, models.small
    calls = {
        "batch": {"inputs": prompt(rows=2), "assistant_model": small},
        "static": {"inputs": prompt(), "assistant_model": small, "cache_implementation": "static"},
        "no_cache": {"inputs": prompt(), "assistant_model": small, "use_cache": False},
        "sequences": {"inputs": prompt(), "assistant_model": small, "num_return_sequences": 2, "do_sample": True},
        "lookup_batch": {"inputs": prompt(rows=2), "prompt_lookup_num_tokens": 2},
    }
    outcomes = {}
    for name, call in calls.items():
        try:
            outcomes[name] = model.generate(**call, max_new_tokens=4)
        except (ValueError, RuntimeError) as error:
            outcomes[name] = str(error)
    assert "batch_size" in outcomes["batch"]  # what else is refused depends on the host's version
    return outcomes


# ---- caches ----


@scenario
def a_static_cache_gives_the_same_text():
    model = models.llama
    plain = model.generate(prompt(rows=2), **GREEDY)
    out = model.generate(
        prompt(rows=2), **GREEDY, cache_implementation="static", disable_compile=True, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, plain)
    assert isinstance(out[CACHE_NAME], StaticCache)
    own = StaticCache(config=model.config, max_cache_len=40)
    given = model.generate(prompt(rows=2), **GREEDY, **{CACHE_NAME: own}, disable_compile=True)
    assert torch.equal(given, plain)
    return out, given


@scenario
def a_cache_goes_on_where_it_was():
    model = models.llama
    first = model.generate(prompt(), **GREEDY, return_dict_in_generate=True)
    assert first[CACHE_NAME].get_seq_length() == 20
    longer = torch.cat([first.sequences, prompt(4)], dim=1)
    out = model.generate(longer, **{CACHE_NAME: first[CACHE_NAME]}, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(longer, **GREEDY))
    return out


@scenario
def no_cache_and_chunks_give_the_same_text():
    model = models.llama
    plain = model.generate(prompt(13), **GREEDY)
    outs = [model.generate(prompt(13), **GREEDY, **o) for o in ({"use_cache": False}, {"prefill_chunk_size": 4})]
    assert all(torch.equal(out, plain) for out in outs)
    return outs


@scenario
def a_given_dynamic_cache_is_filled():
    cache = DynamicCache()
    models.llama.generate(prompt(), **GREEDY, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 20
    return cache


# ---- prompts ----


@scenario
def left_padding_changes_no_row():
    model, batch = models.llama, left_padded()
    out = model.generate(**batch, **GREEDY)
    alone = model.generate(batch["input_ids"][:1, 3:], **GREEDY)
    assert out[0, 6:].tolist() == alone[0, 3:].tolist()
    return out, model.generate(batch["input_ids"], **GREEDY)


@scenario
def embeddings_are_a_prompt():
    model = models.llama
    embeds = model.get_input_embeddings()(prompt()).detach()
    plain = model.generate(prompt(), **GREEDY)
    only = model.generate(inputs_embeds=embeds, **GREEDY)
    both = model.generate(prompt(), inputs_embeds=embeds, **GREEDY)
    assert torch.equal(only, plain[:, 9:])
    assert torch.equal(both, plain)
    return only, both


@scenario
def no_prompt_begins_with_the_first_token():
    out = models.llama.generate(**GREEDY)
    assert out[0, 0] == 1
    return out


# ---- processors, criteria, streamers ----


@scenario
def processors_do_what_they_say():
    options = {
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[7], [11, 12]],
        "suppress_tokens": [4, 8, 15],
        "sequence_bias": [[[5], 3.0]],
        "forced_eos_token_id": 9,
        "min_new_tokens": 6,
        "encoder_repetition_penalty": 1.3,
        "guidance_scale": 1.5,
        "watermarking_config": WatermarkingConfig(bias=2.0),
        "prefix_allowed_tokens_fn": lambda row, ids: [3 + (row + len(ids) + i) % 60 for i in (0, 9, 20)],
    }
    return {
        name: models.llama.generate(prompt(rows=2), **GREEDY, **EVERYTHING, **{name: value, "eos_token_id": [5, 9]})
        for name, value in options.items()
    }


@scenario
def a_processor_of_ones_own_sees_every_prefix_once():
    notes = Notes()
    out = models.llama.generate(prompt(rows=2), **GREEDY, logits_processor=LogitsProcessorList([notes]))
    assert [tuple(ids.shape) for ids in notes.shown] == [(2, 9 + i) for i in range(12)]
    return out, notes.shown


@scenario
def rows_end_by_themselves_and_are_padded():
    text = models.llama.generate(prompt(rows=2), **GREEDY)
    eos = [int(text[0, 12]), int(text[1, 17])]
    out = models.llama.generate(prompt(rows=2), **GREEDY, eos_token_id=eos)
    assert (out[0, 13:] == 0).all()
    return out


@scenario
def criteria_are_asked_after_each_token():
    stop = StopAtLength(14)
    out = models.llama.generate(prompt(rows=2), **GREEDY, **EVERYTHING, stopping_criteria=StoppingCriteriaList([stop]))
    assert [length for length, _ in stop.asked] == list(range(10, 15))
    return out, stop.asked


@scenario
def stop_strings_stop():
    text = models.llama.generate(prompt(), **GREEDY)[0].tolist()
    out = models.llama.generate(prompt(), **GREEDY, stop_strings=[f"w{text[14]}"], tokenizer=tokenizer())
    assert out[0].tolist() == text[: text.index(text[14], 9) + 1]
    missing = message_of(ValueError, lambda: models.llama.generate(prompt(), **GREEDY, stop_strings=["w5"]))
    return out, missing


@scenario
def no_time_is_one_token():
    out = models.llama.generate(prompt(), **GREEDY, max_time=1e-9)
    assert out.shape == (1, 10)
    return out


@scenario
def streamers_get_each_token():
    class Said(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    puts, said = Puts(), Said(tokenizer(), skip_prompt=True)
    iterator = TextIteratorStreamer(tokenizer())
    outs = [models.llama.generate(prompt(), **GREEDY, streamer=streamer) for streamer in (puts, said, iterator)]
    assert len(puts.puts) == 14  # the prompt, twelve tokens, the end
    assert said.text.split() == [f"w{token}" for token in outs[0][0, 9:].tolist()]
    beams = message_of(ValueError, lambda: models.llama.generate(prompt(), **GREEDY, num_beams=2, streamer=puts))
    return outs, puts.puts, said.text, list(iterator), beams


# ---- settings ----


@scenario
def settings_come_from_the_call_then_the_config_then_the_model():
    model = models.llama
    model.generation_config.max_new_tokens = 3
    given = GenerationConfig(max_new_tokens=5, do_sample=False)
    before = given.to_dict()
    lengths = [
        model.generate(prompt(), **options).shape[1] - 9
        for options in ({}, {"generation_config": given}, {"generation_config": given, "max_new_tokens": 7})
    ]
    assert lengths == [3, 5, 7]
    assert given.to_dict() == before
    return lengths


@scenario
def unknown_settings_are_refused():
    model = models.llama
    calls = ({"no_such_setting": 1}, {"max_new_tokens": 0}, {"temperature": -1.0, "do_sample": True})
    return [message_of(ValueError, lambda call=call: model.generate(prompt(), **call)) for call in calls]


@scenario
def a_decode_loop_of_ones_own_runs():
    def twice(_model, input_ids, **kwargs):
        return torch.cat([input_ids, input_ids], dim=1), sorted(kwargs)

    out, given = models.llama.generate(prompt(), **GREEDY, custom_generate=twice)
    assert out.shape == (1, 18)
    return out, given


@scenario
def compute_transition_scores_adds_up():
    model = models.llama
    out = model.generate(prompt(rows=2), **GREEDY, num_beams=3, **EVERYTHING, length_penalty=0.0)
    scores = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
    torch.testing.assert_close(scores.sum(1), out.sequences_scores)
    return scores


@scenario
def a_pipeline_generates():
    generate = pipeline("text-generation", model=models.llama, tokenizer=tokenizer())
    outs = generate(["w5 w9 w11", "w7 w8"], max_new_tokens=6, do_sample=False, batch_size=2)
    assert [out[0]["generated_text"][:5] for out in outs] == ["w5 w9", "w7 w8"]
    return outs


@scenario
def models_are_saved_and_loaded(tmp_path=None):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        models.llama.save_pretrained(folder)
        config, unused = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, rms_norm_eps=0.5, foo=1)
        assert (config.rms_norm_eps, unused) == (0.5, {"foo": 1})
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        config = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        missing = message_of(OSError, lambda: AutoConfig.from_pretrained("/no/such/folder"))
        return loaded.generate(prompt(), **GREEDY), config, missing


# ---- to the last bit ----


def freeze(value: Any) -> Any:
    """A picture of `value` in JSON's types, exact to the last bit."""
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().view(torch.uint8) if value.dim() else value.detach()[None].view(torch.uint8)
        return [str(value.dtype), list(value.shape), hashlib.sha256(raw.numpy().tobytes()).hexdigest()]
    if isinstance(value, EncoderDecoderCache):
        return [freeze(value.self_attention_cache), freeze(value.cross_attention_cache)]
    if isinstance(value, Cache):
        return [type(value).__name__, *([type(x).__name__, freeze(x.keys), freeze(x.values)] for x in value.layers)]
    if isinstance(value, dict):
        return {"type": type(value).__name__} | {str(name): freeze(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [freeze(v) for v in value]
    return value if isinstance(value, (str, int, bool, type(None))) else repr(value)


def picture(name: str) -> Any:
    """What a scenario results in, and the random state it leaves behind."""
    torch.manual_seed(0)
    return json.loads(json.dumps([freeze(SCENARIOS[name]()), freeze(torch.get_rng_state())]))


def paint_all() -> None:
    """In a process of its own: all pictures, to standard output."""
    torch.set_num_threads(1)
    pictures = {}
    for name in SCENARIOS:
        try:
            pictures[name] = picture(name)
        except Exception as error:  # noqa: BLE001  told to the test that asks for this picture
            pictures[name] = repr(error)
    assert "hf_eagle3" not in sys.modules
    sys.stdout.write(json.dumps(pictures))


@pytest.fixture(scope="module")
def plain_pictures() -> dict[str, Any]:
    paths = [str(Path(__file__).parent), str(TESTS)]
    code = f"import sys; sys.path[:0] = {paths}; import test_host_behaviour as t; t.paint_all()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_host_does_the_same_to_the_last_bit(name, plain_pictures):
    assert "hf_eagle3" in sys.modules
    assert picture(name) == plain_pictures[name]


def test_pictures_show_a_last_bit():
    a = torch.ones(3)
    b = torch.nextafter(a, torch.tensor(2.0))
    assert freeze({"x": [a]}) != freeze({"x": [b]})
    assert freeze(a) != freeze(a.double())
    assert freeze(a) == freeze(a.clone())
