"""Targets and drafters loaded with any attention: it serves prompts, ours serves rounds, and texts are plain decoding's.

Stand-ins take the names of attentions that need a GPU: they take masks as flash attention does (None or two dimensions)
and refuse any other, so that a round which reaches them fails.
"""

import copy
import itertools
import threading

import pytest
import torch
from helpers.batches import GREEDY, assert_same, assert_same_up_to_ties, pad, prompts_of
from helpers.marks import slow_but
from helpers.models import FAMILIES, GEMMA, TARGETS, TEXT, make_drafter, make_prompt, make_target
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from hf_eagle3 import release_graphs
from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.rows.attention import attending_by_rows, own_attention, weigh
from hf_eagle3.rows.attention_trial import why_not_ours

HUB = "kernels-community/vllm-flash-attn3"
GEMMA2 = {**GEMMA, "query_pre_attn_scalar": 8}
GEMMA2.pop("sliding_window_pattern")


def flash(
    module, query, key, value, attention_mask, *, scaling, sliding_window=None, softcap=None, s_aux=None, **kwargs
):
    """What a kernel of flash attention computes: causal from the end, a window, a soft cap, sinks, pads by a 2D mask."""
    assert attention_mask is None or attention_mask.dim() == 2, "rounds attend by ours"
    T, S = query.shape[2], key.shape[2]
    at = torch.arange(S - T, S, device=query.device)[:, None]
    slots = torch.arange(S, device=query.device)
    mask = slots <= at
    if sliding_window is not None:
        mask = mask & (slots > at - sliding_window)
    mask = mask[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask.bool()[:, None, None]
        mask = mask | (slots == at)  # a pad sees itself, and is seen by none
    return weigh(query, key, value, mask, scaling=scaling, softcap=softcap, s_aux=s_aux), None


def masked(module, query, key, value, attention_mask, *, scaling, softcap=None, s_aux=None, **kwargs):
    """An attention of somebody's own over masks as sdpa takes them."""
    T, S = query.shape[2], key.shape[2]
    causal = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)[None, None]
    mask = causal if attention_mask is None else attention_mask
    mask = mask | ~mask.any(-1, keepdim=True)  # a pad that sees nothing
    return weigh(query, key, value, mask, scaling=scaling, softcap=softcap, s_aux=s_aux), None


# Name -> function, what makes its masks.
KINDS = {
    "flash_attention_2": (flash, flash_attention_mask),
    "flash_attention_3": (flash, flash_attention_mask),
    HUB: (flash, flash_attention_mask),
    "my_attention": (masked, sdpa_mask),
    "without_masks": (flash, None),
}


def register(monkeypatch, name, function, make_mask):
    monkeypatch.setitem(AttentionInterface._global_mapping, name, function)
    if make_mask is None:
        monkeypatch.delitem(AttentionMaskInterface._global_mapping, name, raising=False)
    else:
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, make_mask)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    for name, kind in KINDS.items():
        register(monkeypatch, name, *kind)
    monkeypatch.setitem(TARGETS, "mistral", FAMILIES["mistral"])
    monkeypatch.setitem(TARGETS, "gemma2", lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA2)))


def load(family, attention):
    """A target as it is when loaded with `attention`."""
    target = copy.deepcopy(make_target(family))
    target.config.get_text_config(decoder=True)._attn_implementation = attention
    return target


# The families differ in windows, sinks and soft caps.
@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", slow_but(["llama", "gpt_oss"], ["llama", "gemma3", "gpt_oss", "gemma2"]))
@pytest.mark.parametrize("name", ["flash_attention_2", HUB, "my_attention"])
def test_texts_are_plain_decodings_in_padded_batches(name, family):
    target = load(family, name)
    _, out = assert_same(target, pad(prompts_of(30, 7, 12)), max_new_tokens=20)
    assert 1 < out.speculation.acceptance_length < 4
    assert own_attention(target.config) == target.config._attn_implementation == name


@pytest.mark.parametrize("name", ["flash_attention_3", "without_masks"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_texts_are_plain_decodings_of_one_row(name, family):
    assert_same(load(family, name), pad(prompts_of(13)), max_new_tokens=20)


def test_the_targets_attention_serves_prompts_alone(monkeypatch):
    lengths = []

    def counted(module, query, *args, **kwargs):
        lengths.append(query.shape[2])
        return flash(module, query, *args, **kwargs)

    register(monkeypatch, "flash_attention_2", counted, flash_attention_mask)
    target = load("llama", "flash_attention_2")
    target.generate(make_prompt(13), assistant_model=make_drafter(target), max_new_tokens=12, **GREEDY)
    assert lengths == [13] * len(target.model.layers)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "gemma2"])
def test_captured_rounds_attend_by_ours(family, counts):
    target = load(family, "flash_attention_2")
    _, out = assert_same(target, pad(prompts_of(30, 7)), max_new_tokens=20)
    assert out.speculation.graphs.startswith("captured in")
    assert counts.replayed > 15
    assert target.config._attn_implementation == "flash_attention_2"
    target.config._attn_implementation = "my_attention"  # other prompts: graphs are recorded anew
    _, out = assert_same(target, pad(prompts_of(30, 7)), max_new_tokens=20)
    assert out.speculation.graphs.startswith("captured in")


@pytest.mark.skipif(not Gemma2ForCausalLM._supports_sdpa, reason="this host refuses sdpa for Gemma 2")
def test_a_soft_cap_that_sdpa_leaves_out_is_left_out_in_captured_rounds(counts):
    assert_same(load("gemma2", "sdpa"), pad(prompts_of(30, 7)), max_new_tokens=20)
    assert counts.replayed > 15


@pytest.mark.parametrize("further", slow_but([{}], [{}, {"decode_loop": "eager"}]), ids=["own", "eager"])
@pytest.mark.parametrize(
    "overrides", [{}, {"sliding_window": 6, "num_hidden_layers": 2}, {"mask_token_id": 61}], ids=str
)
def test_drafters_loaded_the_same_way_draft_what_they_do_otherwise(overrides, further):
    target = load("llama", "flash_attention_2")
    drafter = make_drafter(target, **overrides)
    batch, lengths = pad(prompts_of(9, 20)), []
    plain = target.generate(**batch, max_new_tokens=16, **GREEDY)
    for name in ("sdpa", "flash_attention_2", "my_attention"):
        drafter.config._attn_implementation = name
        out = target.generate(
            **batch, assistant_model=drafter, max_new_tokens=16, return_dict_in_generate=True, **GREEDY, **further
        )
        assert torch.equal(out.sequences, plain)
        assert out.speculation.loop == "own decode loop"
        lengths.append(out.speculation.acceptance_length)
        assert drafter.config._attn_implementation == name
    assert len(set(lengths)) == 1


# The host's flash attention takes no prompt in chunks before Transformers 5.24.
@pytest.mark.parametrize(("name", "further"), [("flash_attention_2", {}), ("my_attention", {"prefill_chunk_size": 4})])
def test_chunked_prompts_and_caches_of_earlier_turns(name, further):
    target = load("gpt_oss", name)
    drafter = make_drafter(target)
    first, more = make_prompt(11), make_prompt(6)
    answers = []
    for options in ({}, {"assistant_model": drafter}):
        cache = DynamicCache(config=target.config)
        options = {**options, CACHE_NAME: cache, "max_new_tokens": 9, **GREEDY}
        one = target.generate(first, **options, **further)
        two = target.generate(torch.cat([one, more], dim=1), **options)
        answers.append((two.tolist(), cache.get_seq_length()))
    assert answers[0] == answers[1]


def test_kept_caches_are_as_plain_decoding_leaves_them():
    target = load("llama", HUB)
    batch, options = pad(prompts_of(9, 4)), {"max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    options["eos_token_id"] = [11, 25, 37, 41, 52, 7, 13]
    plain = target.generate(**batch, **options)
    out = target.generate(**batch, assistant_model=make_drafter(target), **options)
    assert torch.equal(out.sequences, plain.sequences)
    for ours, theirs in zip(out[CACHE_NAME].layers, plain[CACHE_NAME].layers, strict=True):
        real = batch["attention_mask"].bool()[:, None, :, None]
        width = real.shape[2]
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a[:, :, :width] * real, b[:, :, :width] * real, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.parametrize("family", ["gemma3", "gemma2"])
def test_flex_attention_itself(family):
    target = load(family, "flex_attention")
    drafter = make_drafter(target)
    drafter.config._attn_implementation = "flex_attention"
    options = {"max_new_tokens": 8, **GREEDY}
    with torch.compiler.set_stance("force_eager"):
        for batch in (pad(prompts_of(12, 9)), pad(prompts_of(7))):
            plain = target.generate(**batch, **options)
            out = target.generate(**batch, assistant_model=drafter, return_dict_in_generate=True, **options)
            assert torch.equal(out.sequences, plain)
            assert out.speculation.loop == "own decode loop"


# ---- what is not softmax attention ----


def sigmoid(module, query, key, value, attention_mask, *, scaling, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    return (scores.sigmoid() * causal @ value).transpose(1, 2), None


def sharper(*args, scaling, **kwargs):
    return sdpa_attention_forward(*args, scaling=1.1 * scaling, **kwargs)


def failing(*args, **kwargs):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("function", [sigmoid, sharper], ids=lambda f: f.__name__)
def test_another_attention_goes_to_the_hosts_loop(function, monkeypatch):
    register(monkeypatch, "other", function, sdpa_mask)
    target = load("llama", "other")
    drafter, prompt = make_drafter(target), make_prompt(9)
    plain = target.generate(prompt, max_new_tokens=12, **GREEDY)
    options = {"assistant_model": drafter, "max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    out = target.generate(prompt, **options)
    assert torch.equal(out.sequences, plain)
    assert out.speculation.loop == "host assisted decoding"
    assert out.speculation.why == "the target's attention other is not softmax attention over scaled products"
    with pytest.raises(ValueError, match=r"one row at a time here .*other is not softmax"):
        target.generate(**pad(prompts_of(4, 5)), **options)


def test_an_attention_is_tried_once_and_one_that_fails_is_named(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return masked(*args, **kwargs)

    register(monkeypatch, "other", counted, sdpa_mask)
    target = load("llama", "other")
    assert why_not_ours(target) is None
    tried = len(calls)
    assert tried > 0
    assert why_not_ours(target) is None
    assert len(calls) == tried
    register(monkeypatch, "other", failing, sdpa_mask)  # another one by that name
    assert "could not be tried (RuntimeError: no kernel image is available)" in why_not_ours(target)
    assert target.config._attn_implementation == "other"


# ---- other threads ----


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "my_attention"])
def test_forwards_of_others_attend_as_loaded_while_rounds_attend_by_ours(name):
    target = load("gpt_oss" if name == "eager" else "gemma3", name)
    batch = pad(prompts_of(12, 5))
    with torch.no_grad():
        expected = target(**batch).logits
        with attending_by_rows(target):
            found = target(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(found[real], expected[real])


def test_plain_decoding_in_another_thread_is_left_alone():
    target = load("gemma3", "flash_attention_2")
    drafter, batch = make_drafter(target), pad(prompts_of(12, 5))
    options = {"max_new_tokens": 12, **GREEDY}
    plain = target.generate(**batch, **options).tolist()
    found, failed = [], []

    def decode(**further):
        try:
            found.extend(target.generate(**batch, **options, **further).tolist() for _ in range(2))
        except Exception as error:  # noqa: BLE001  shown below
            failed.append(error)

    threads = [threading.Thread(target=decode, kwargs=kw) for kw in ({}, {"assistant_model": drafter}) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert found == [plain] * len(found)
    assert len(found) == 8
    assert target.config._attn_implementation == "flash_attention_2"


# ---- on a GPU ----


def check_on_gpu(target, drafter, *, can_wait=False):
    """One row and a padded batch, captured and eager, beside plain decoding by the same attention."""
    options = {"max_new_tokens": 16, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    for lengths in ((13,), (30, 7, 12)):
        batch = {key: value.cuda() for key, value in pad(prompts_of(*lengths)).items()}
        plain = target.generate(**batch, **options)
        for loop in ("own", "eager"):
            out = target.generate(**batch, assistant_model=drafter, decode_loop=loop, **options)
            assert_same_up_to_ties(out, plain)
            assert target.dtype != torch.float32 or torch.equal(out.sequences, plain.sequences)
            if loop == "own" and not (can_wait and len(lengths) > 1):
                assert out.speculation.graphs.startswith(("captured", "replayed")), out.speculation.graphs
    release_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *itertools.product(["llama", "gemma3", "gemma2", "deepseek_v3"], [torch.float32, torch.bfloat16]),
        ("gpt_oss", torch.float32),  # in 16 bits random routers are near ties, and other experts give other logits
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["flash_attention_2", HUB, "my_attention"])
def test_rounds_are_captured_whatever_serves_prompts(name, family, dtype):
    target = load(family, name).to("cuda", dtype)
    drafter = make_drafter(target).to("cuda", dtype)
    drafter.config._attn_implementation = name
    # Torch's grouped product of float32 experts counts their tokens on the host.
    check_on_gpu(target, drafter, can_wait=family == "gpt_oss" and dtype == torch.float32)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # those of a compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_are_captured_where_flex_attention_serves_prompts(dtype):
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**{**TEXT, "head_dim": 64, "num_hidden_layers": 4})).eval()
    target.generation_config.pad_token_id = 0
    target = target.to("cuda", dtype)
    target.set_attn_implementation("flex_attention")
    check_on_gpu(target, make_drafter(target, aux_layer_ids=[0, 2, 3]).to("cuda", dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "family"),
    [
        *itertools.product(["flash_attention_2"], ["llama", "mistral", "gemma2"]),
        ("flash_attention_3", "llama"),  # its builds may leave out windows
    ],
)
def test_rounds_are_captured_where_flash_attention_serves_prompts(name, family, monkeypatch):
    is_installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if not is_installed[name]():
        pytest.skip(f"no package for {name} is installed")
    register(monkeypatch, name, flash_attention_forward, flash_attention_mask)
    target = copy.deepcopy(make_target(family)).to("cuda", torch.bfloat16)
    drafter = make_drafter(target).to("cuda", torch.bfloat16)
    for model in (target, drafter):
        model.set_attn_implementation(name)
    check_on_gpu(target, drafter)
