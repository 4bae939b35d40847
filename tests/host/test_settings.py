"""Settings count where the host lets them count: the call's, even None, then the config given, then the target's own."""

import copy

import numpy as np
import pytest
import torch
import transformers
from helpers.arguments import StopAt
from helpers.models import make_drafter, make_oracle, make_prompt, make_target
from packaging.version import Version
from transformers import GenerationConfig, StaticCache

from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.host.shapes import list_candidates
from hf_eagle3.speculation.shape import Shapes

GREEDY = {"do_sample": False, "max_new_tokens": 8}
TAKES_STATIC = Version(transformers.__version__).release >= (5, 24)


@pytest.fixture
def own_settings(target):
    """The tiny Llama, whose generation config a test may change."""
    before = target.generation_config
    target.generation_config = copy.deepcopy(before)
    yield target
    target.generation_config = before


def speculation_of(target, **options):
    """What a call with a drafter tells, after its text was compared with the same call's without."""
    options = {**GREEDY, "return_dict_in_generate": True, **options}
    ours = ("decode_loop", "num_assistant_tokens")
    plain = target.generate(make_prompt(6), **{k: v for k, v in options.items() if k not in ours})
    out = target.generate(make_prompt(6), assistant_model=make_drafter(target), **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    return out.speculation


def refused_by(target, match, **options):
    """One line, before any forward of the target."""
    forwards = []
    handle = target.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        with pytest.raises(ValueError, match=match) as caught:
            target.generate(**{"inputs": make_prompt(6), "assistant_model": make_drafter(target), **GREEDY, **options})
    finally:
        handle.remove()
    assert not forwards
    assert "\n" not in str(caught.value)


# ---- which value counts ----

# The name, a value that rules drafting or our loop out, and what is said of it.
RULING_OUT = [
    ("prompt_lookup_num_tokens", 3, "prompt_lookup_num_tokens=3"),
    ("prompt_lookup_num_tokens", 0, "prompt_lookup_num_tokens=0"),
    ("assistant_early_exit", 2, "assistant_early_exit=2"),
    ("guidance_scale", 1.5, "guidance_scale=1.5"),
    ("guidance_scale", 0.0, "guidance_scale=0.0"),
    ("dola_layers", "low", "dola_layers='low'"),
    ("penalty_alpha", 0.6, "penalty_alpha=0.6"),
    ("num_beams", 3, "num_beams=3"),
    ("use_cache", False, "use_cache=False"),
    ("use_cache", 0, "use_cache=0"),
    ("cache_implementation", "paged", "cache_implementation='paged'"),
]


@pytest.mark.parametrize(("name", "value", "says"), RULING_OUT, ids=str)
@pytest.mark.parametrize("place", ["call", "given", "target"])
def test_what_rules_drafting_out_is_refused_wherever_it_stands(own_settings, name, value, says, place):
    options = {name: value}
    if place == "given":
        options = {"generation_config": GenerationConfig(**{name: value})}
    elif place == "target":
        options = {}
        setattr(own_settings.generation_config, name, value)
    refused_by(own_settings, says, **options)


# Of no beams at all the host complains itself, and without a say on its cache it says nonsense.
@pytest.mark.parametrize(
    ("name", "value"), [s[:2] for s in RULING_OUT if s[0] not in ("num_beams", "use_cache")], ids=str
)
def test_an_explicit_none_undoes_what_the_target_or_the_config_says(own_settings, name, value):
    setattr(own_settings.generation_config, name, value)
    given = GenerationConfig(**{name: value}) if len(name) % 2 else None
    assert speculation_of(own_settings, generation_config=given, **{name: None}).loop == "own decode loop"


def test_a_none_for_the_cache_is_refused(target):
    refused_by(target, "use_cache=None", use_cache=None)


@pytest.mark.parametrize(
    ("name", "value"), [("output_hidden_states", True), ("decode_loop", "host"), ("prefill_chunk_size", 2)]
)
def test_a_none_in_the_config_given_undoes_nothing(own_settings, name, value):
    """The host fills it with what the target says."""
    setattr(own_settings.generation_config, name, value)
    loops = [
        speculation_of(own_settings, **options).loop
        for options in ({}, {"generation_config": GenerationConfig(**{name: None})}, {name: None})
    ]
    assert loops == [
        *["own decode loop" if name == "prefill_chunk_size" else "host assisted decoding"] * 2,
        "own decode loop",
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("place", ["call", "given", "target"])
def test_hybrid_is_dynamic_as_in_the_host(family, place):
    """As generation configs on the Hub say, Gemma 2's and 3's among them."""
    target = make_target(family)
    before, options = target.generation_config, {}
    target.generation_config = copy.deepcopy(before)
    try:
        if place == "target":
            target.generation_config.cache_implementation = "hybrid"
        else:
            named = {"cache_implementation": "hybrid"}
            options = named if place == "call" else {"generation_config": GenerationConfig(**named)}
        assert speculation_of(target, **options).why == "attention caches only"
    finally:
        target.generation_config = before


def test_drafters_loop_is_undone_by_none(target):
    drafter = make_drafter(target)
    drafter.generation_config.decode_loop = "host"
    options = {"assistant_model": drafter, "return_dict_in_generate": True, **GREEDY}
    loops = [target.generate(make_prompt(6), **options, **o).speculation.loop for o in ({}, {"decode_loop": None})]
    assert loops == ["host assisted decoding", "own decode loop"]


@pytest.mark.parametrize(
    ("call", "given", "targets", "drafters", "depth"),
    [
        *((None, None, None, None, "auto"), (2, 4, 5, 6, 2), (None, 4, 5, 6, 4), (None, None, 5, 6, 5)),
        *(
            (None, None, None, 6, 6),
            ("None", 4, 5, 6, 6),
            ("None", None, 5, None, "auto"),
            (0, 4, 5, 6, 0),
            (None, 0, 5, 6, 0),
        ),
    ],
    ids=str,
)
def test_depth_is_the_calls_then_the_configs_then_the_targets_then_the_drafters(
    own_settings, call, given, targets, drafters, depth
):
    drafter = make_drafter(own_settings)
    own_settings.generation_config.num_assistant_tokens = targets
    drafter.generation_config.num_assistant_tokens = drafters
    options = {} if call is None else {"num_assistant_tokens": None if call == "None" else call}
    if given is not None:
        options["generation_config"] = GenerationConfig(num_assistant_tokens=given)
    out = own_settings.generate(
        make_prompt(6), assistant_model=drafter, return_dict_in_generate=True, **GREEDY, **options
    )
    assert out.speculation.depth == (Shapes(list_candidates(drafter)).depth if depth == "auto" else depth)


# ---- static caches ----


@pytest.mark.parametrize("stop", [None, 12], ids=["whole", "stopped_inside_a_block"])
@pytest.mark.parametrize("given", ["static", "sliding_window", "object"])
def test_a_static_cache_passes_where_the_host_takes_it(target, given, stop):
    """Up to 5.23 with no assistant; from 5.24 on with any, one row at a time."""
    options = {"cache_implementation": given}
    if given == "object":
        options = {CACHE_NAME: StaticCache(config=target.config, max_cache_len=64)}
    if not TAKES_STATIC:
        return refused_by(target, "cut back, not this StaticCache", **options)
    prompt, outs = make_prompt(6), []
    text = target.generate(prompt, **GREEDY)
    oracle = make_oracle(target, text[0], wrong_share=0.0)
    del oracle.generation_config.decode_loop
    for assistant in ({}, {"assistant_model": oracle}):
        if given == "object":
            options = {CACHE_NAME: StaticCache(config=target.config, max_cache_len=64)}
        criteria = [] if stop is None else [StopAt(stop)]
        outs.append(
            target.generate(
                prompt, return_dict_in_generate=True, stopping_criteria=criteria, **GREEDY, **options, **assistant
            )
        )
    plain, out = outs
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.loop == "host assisted decoding"
    assert out.speculation.acceptance_length > 1.5
    assert type(out[CACHE_NAME]) is type(plain[CACHE_NAME]) is StaticCache
    assert out[CACHE_NAME].get_seq_length() == plain[CACHE_NAME].get_seq_length()
    if given != "object":  # no room for more
        return None
    more = torch.cat([plain.sequences, make_prompt(4)], dim=1)
    ends = [target.generate(more, **{CACHE_NAME: o[CACHE_NAME]}, **GREEDY | {"max_new_tokens": 6}) for o in outs]
    assert ends[0].tolist() == ends[1].tolist()
    return None


def test_a_static_cache_that_forgets_is_refused_before_any_work():
    refused_by(make_target("gemma3"), "cut back, not this StaticCache", cache_implementation="static")


def test_a_batch_beside_a_static_cache_is_refused_before_any_work(target):
    prompts = make_prompt(6).repeat(2, 1)
    refused_by(target, "cache_implementation is static.*batch of 2", inputs=prompts, cache_implementation="static")


# ---- values that are none ----


@pytest.mark.parametrize(
    "value", [500, 65, float("nan"), float("inf"), [2], "3", True, -1, 1e9, 1.5, 10**30, {}, 2j], ids=repr
)
@pytest.mark.parametrize("place", ["call", "given", "target", "drafter"])
def test_a_depth_that_is_none_is_refused_in_words(own_settings, value, place):
    drafter, options = make_drafter(own_settings), {}
    if place == "call":
        options = {"num_assistant_tokens": value}
    elif place == "given":
        config = GenerationConfig()
        config.num_assistant_tokens = value
        options = {"generation_config": config}
    else:
        model = drafter if place == "drafter" else own_settings
        model.generation_config.num_assistant_tokens = value
    refused_by(own_settings, r"num_assistant_tokens.*0 for none; got .", assistant_model=drafter, **options)


@pytest.mark.parametrize("value", [64, 4.0, np.int64(4), np.float32(2.0)], ids=repr)
def test_whole_numbers_of_any_kind_are_depths(target, value):
    assert speculation_of(target, num_assistant_tokens=value).depth == int(value)


@pytest.mark.parametrize("value", ["fast", 3, True, ["own"], {"own": 1}, "", "OWN"], ids=repr)
@pytest.mark.parametrize("place", ["call", "target", "drafter"])
def test_a_loop_that_is_none_is_refused_in_words(own_settings, value, place):
    drafter, options = make_drafter(own_settings), {}
    if place == "call":
        options = {"decode_loop": value}
    else:
        model = drafter if place == "drafter" else own_settings
        model.generation_config.decode_loop = value
    refused_by(own_settings, 'decode_loop is .*expected "own"', assistant_model=drafter, **options)


@pytest.mark.parametrize("make", [str, lambda path: path], ids=["str", "path"])
def test_a_name_in_the_place_of_a_drafter_is_told_how_to_load_it(target, tmp_path, make):
    make_drafter(target).save_pretrained(tmp_path)
    refused_by(target, rf'AutoModel\.from_pretrained\("{tmp_path}"\)', assistant_model=make(tmp_path))


# ---- continuous batching ----


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_refuses_the_name_of_a_drafter(target, name):
    inputs = {"inputs": [[5, 6, 7]]} if name == "generate_batch" else {}
    with pytest.raises(ValueError, match=r'AutoModel\.from_pretrained\("someone/eagle3"\)') as caught:
        getattr(target, name)(**inputs, assistant_model="someone/eagle3")
    assert "\n" not in str(caught.value)
    assert target.config._attn_implementation == "sdpa"
