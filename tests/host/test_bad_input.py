"""What goes wrong on purpose: one line with the cause and what to do, in both loops, and a next call that is right."""

import contextlib
import itertools

import pytest
import torch
from helpers.batches import pad, prompts_of
from helpers.marks import slow_but
from helpers.models import V, count_hooks, drafter_config, make_drafter, make_prompt, make_target, randomize
from helpers.tokenizers import word_tokenizer
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.host.loop_choice import ASKED
from hf_eagle3.modeling import Eagle3DrafterModel

GREEDY = {"do_sample": False}


@contextlib.contextmanager
def hooked(module: torch.nn.Module, hook):
    """With a forward hook, for as long as it takes."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def refused(target, drafter, loop: str, kind: type[BaseException] = ValueError, match: str | None = None):
    """One line of `kind`; then both models are as before, and their next call is right."""
    plain = target.generate(make_prompt(6), max_new_tokens=8, **GREEDY)
    with pytest.raises(kind, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert count_hooks(target) == count_hooks(drafter) == 0
    out = target.generate(make_prompt(6), assistant_model=drafter, decode_loop=loop, max_new_tokens=8, **GREEDY)
    assert out.tolist() == plain.tolist()


@pytest.fixture(params=ASKED)
def loop(request) -> str:
    """Each decode loop."""
    return request.param


# ---- prompts ----


def test_empty_prompt_is_refused(target, loop):
    drafter = make_drafter(target)
    with refused(target, drafter, loop, match="prompt is empty.*BOS"):
        target.generate(make_prompt(4)[:, :0], assistant_model=drafter, decode_loop=loop, max_new_tokens=4)


def test_no_prompt_at_all_begins_as_without(target, loop):
    plain = target.generate(max_new_tokens=6, **GREEDY)
    out = target.generate(max_new_tokens=6, assistant_model=make_drafter(target), decode_loop=loop, **GREEDY)
    assert out.tolist() == plain.tolist()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("token", [V, V + 1000, -1])
def test_token_out_of_the_vocabulary_fails_as_without(target, loop, token):
    prompt = make_prompt(4).index_fill(1, torch.tensor([2]), token)
    with pytest.raises(Exception) as plain:  # noqa: PT011  whatever torch raises
        target.generate(prompt, max_new_tokens=4, **GREEDY)
    drafter = make_drafter(target)
    with refused(target, drafter, loop, kind=type(plain.value)):
        target.generate(prompt, assistant_model=drafter, decode_loop=loop, max_new_tokens=4, **GREEDY)


def test_prompt_longer_than_its_limit_is_treated_as_without(target, loop):
    drafter, prompt = make_drafter(target), make_prompt(9)
    with pytest.raises(ValueError) as plain:  # noqa: PT011  the host's own
        target.generate(prompt, max_length=5, **GREEDY)
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        target.generate(prompt, max_length=5, assistant_model=drafter, decode_loop=loop, **GREEDY)
    assert str(ours.value) == str(plain.value)


def test_mask_of_another_width_fails_and_is_forgotten(target, loop):
    drafter = make_drafter(target)
    with refused(target, drafter, loop, kind=Exception):
        target.generate(
            make_prompt(6),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
            assistant_model=drafter,
            decode_loop=loop,
            max_new_tokens=4,
            **GREEDY,
        )


# ---- caches ----


@pytest.mark.parametrize(("cached", "given"), [(4, 9), (1, 9), (8, 9), (9, 4)], ids=str)
def test_cache_beside_any_prompt_does_what_it_does_without(target, cached, given):
    """A prompt that the cache covers in part; or new tokens only, which the mask tells."""
    outs = []
    for assistant in ({}, {"assistant_model": make_drafter(target)}):
        cache = DynamicCache(config=target.config)
        with torch.no_grad():
            target(make_prompt(12)[:, :cached], **{CACHE_NAME: cache})
        options = {CACHE_NAME: cache, "max_new_tokens": 5, **GREEDY, **assistant}
        if given < cached:
            options["attention_mask"] = torch.ones(1, cached + given, dtype=torch.long)
        outs.append(target.generate(make_prompt(12)[:, :given], **options).tolist())
    assert outs[0] == outs[1]
    assert count_hooks(target) == 0


def test_cache_filled_by_another_model_is_an_error_and_forgotten(target):
    other = LlamaForCausalLM(LlamaConfig(**{**target.config.to_dict(), "num_key_value_heads": 1})).eval()
    cache = DynamicCache(config=other.config)
    with torch.no_grad():
        other(make_prompt(6), **{CACHE_NAME: cache})
    drafter = make_drafter(target)
    with refused(target, drafter, "host", kind=RuntimeError):
        target.generate(make_prompt(9), **{CACHE_NAME: cache}, assistant_model=drafter, max_new_tokens=4, **GREEDY)


# ---- drafters that do not fit ----


def test_drafter_of_other_words_is_refused(target, loop):
    stranger = randomize(Eagle3DrafterModel(drafter_config(vocab_size=V + 8)))
    fitting = make_drafter(target)
    with refused(target, fitting, loop, match=rf"{V + 8}.*{V}|{V}.*{V + 8}"):
        target.generate(make_prompt(4), assistant_model=stranger, decode_loop=loop, max_new_tokens=4)


def test_target_too_shallow_for_the_usual_boundaries_is_named(target, loop):
    """Of four layers, 2, n/2 and n-3 are two boundaries, where the drafter wants three states."""
    shallow = LlamaForCausalLM(type(target.config)(**target.config.to_dict() | {"num_hidden_layers": 4})).eval()
    forwards = []
    with pytest.raises(ValueError, match="layers"), hooked(shallow, lambda *_: forwards.append(1)):
        shallow.generate(make_prompt(4), assistant_model=make_drafter(shallow), decode_loop=loop, max_new_tokens=4)
    assert not forwards


def test_drafter_follows_the_target_it_is_given(loop):
    """One drafter, two targets in turn: each call drafts for its own, and both say what they say without."""
    targets = [make_target("llama"), make_target("qwen3")]
    drafter = make_drafter(targets[0])
    for target in (*targets, *targets):
        plain = target.generate(make_prompt(6), max_new_tokens=8, **GREEDY)
        out = target.generate(make_prompt(6), assistant_model=drafter, decode_loop=loop, max_new_tokens=8, **GREEDY)
        assert out.tolist() == plain.tolist()


def test_assistant_that_is_no_model_fails_as_without(target):
    for nothing in ("someone/eagle3", 3, object()):
        with pytest.raises(Exception):  # noqa: B017, PT011  the host's own
            target.generate(make_prompt(4), assistant_model=nothing, max_new_tokens=4)
    assert target.generate(make_prompt(4), assistant_model=make_drafter(target), max_new_tokens=4).shape == (1, 8)


def test_tokenizer_of_another_model_changes_nothing(target, loop):
    """Draft tokens are the target's by their ids, so no tokenizer is ever asked."""
    plain = target.generate(make_prompt(6), max_new_tokens=8, **GREEDY)
    both = {"tokenizer": word_tokenizer(), "assistant_tokenizer": word_tokenizer()}
    out = target.generate(
        make_prompt(6), assistant_model=make_drafter(target), decode_loop=loop, max_new_tokens=8, **both, **GREEDY
    )
    assert out.tolist() == plain.tolist()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "drafter_dtype",
    slow_but([torch.float32, torch.bfloat16], [torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
@pytest.mark.parametrize("target_dtype", slow_but([torch.bfloat16], [torch.float32, torch.bfloat16]))
def test_drafter_in_another_dtype_works(loop, target_dtype, drafter_dtype):
    target = LlamaForCausalLM(make_target("llama").config).eval()
    target.load_state_dict(make_target("llama").state_dict())
    target.generation_config = make_target("llama").generation_config
    target.to(target_dtype)
    drafter = make_drafter(target).to(drafter_dtype)
    options = {"assistant_model": drafter, "decode_loop": loop, "max_new_tokens": 12}
    out = target.generate(make_prompt(6), **options, **GREEDY)
    if target_dtype == torch.float32:
        assert out.tolist() == target.generate(make_prompt(6), max_new_tokens=12, **GREEDY).tolist()
    assert out.shape == target.generate(make_prompt(6), do_sample=True, **options).shape == (1, 18)
    assert {p.dtype for p in drafter.parameters()} - {target_dtype} <= {drafter_dtype}


def test_drafter_in_training_mode_changes_nothing(target, loop):
    drafter = make_drafter(target).train()
    plain = target.generate(make_prompt(6), max_new_tokens=8, **GREEDY)
    out = target.generate(make_prompt(6), assistant_model=drafter, decode_loop=loop, max_new_tokens=8, **GREEDY)
    assert out.tolist() == plain.tolist()
    assert drafter.training
    assert not out.requires_grad


def test_target_with_absolute_positions_works_or_is_refused(loop):
    """GPT-2 has no rotary embedding, and no place behind its last position."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=V, n_embd=32, n_layer=8, n_head=4, n_positions=24, bos_token_id=1, eos_token_id=None, pad_token_id=0
    )
    target = GPT2LMHeadModel(config).eval()
    plain = target.generate(make_prompt(6), max_new_tokens=18, **GREEDY)
    options = {"assistant_model": make_drafter(target), "num_assistant_tokens": 5, "decode_loop": loop}
    out = target.generate(make_prompt(6), max_new_tokens=18, **options, **GREEDY)
    assert out.tolist() == plain.tolist()


# ---- logits ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("after", slow_but([1], [0, 1, 3]), ids=["at_once", "first_round", "later"])
@pytest.mark.parametrize("further", [GREEDY, {"do_sample": True}, {"repetition_penalty": 1.2}], ids=str)
def test_logits_that_are_not_numbers_are_named(target, loop, after, further):
    drafter, uses = make_drafter(target), itertools.count()
    with refused(target, drafter, loop, match="logits are NaN"):
        poison = lambda _m, _a, logits: logits * torch.nan if next(uses) >= after else None  # noqa: E731
        with hooked(target.lm_head, poison):
            target.generate(make_prompt(6), assistant_model=drafter, decode_loop=loop, max_new_tokens=12, **further)


def test_nan_in_one_row_of_a_batch_is_named(target):
    drafter = make_drafter(target)
    with refused(target, drafter, "own", match="logits are NaN"):
        poison = lambda _m, _a, logits: logits.index_fill(0, torch.tensor([1]), torch.nan)  # noqa: E731
        with hooked(target.lm_head, poison):
            target.generate(**pad(prompts_of(5, 3, 4)), assistant_model=drafter, max_new_tokens=4, **GREEDY)


# ---- broken off ----


class Breaks(LogitsProcessor):
    """As a processor, streamer or hook: raises on its fourth use."""

    def __init__(self, error: type[BaseException]):
        self.error, self.uses = error, 0

    def use(self, *_args):
        self.uses += 1
        if self.uses > 3:
            raise self.error

    put = end = use

    def __call__(self, input_ids, scores):
        self.use()
        return scores


class BreaksAsked(Breaks, StoppingCriteria):
    """As a criterion."""

    def __call__(self, input_ids, scores, **kwargs):
        self.use()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("error", slow_but([KeyboardInterrupt], [KeyboardInterrupt, torch.OutOfMemoryError]))
@pytest.mark.parametrize("where", ["processor", "criterion", "streamer", "target", "drafter"])
def test_call_broken_off_leaves_both_models_as_they_were(target, loop, where, error):
    drafter, breaks = make_drafter(target), Breaks(error)
    options = {
        "processor": {"logits_processor": LogitsProcessorList([breaks])},
        "criterion": {"stopping_criteria": StoppingCriteriaList([BreaksAsked(error)])},
        "streamer": {"streamer": breaks},
    }.get(where, {})
    module = {"target": target.model.layers[3], "drafter": drafter.lm_head}.get(where, torch.nn.Identity())
    with refused(target, drafter, loop, kind=error), hooked(module, breaks.use):
        target.generate(
            make_prompt(6), assistant_model=drafter, decode_loop=loop, max_new_tokens=12, **options, **GREEDY
        )
