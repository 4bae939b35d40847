"""Targets that decide something outside of their forward, rotate by the length of the text, or run layers of their own.

Each row of a batch is what plain decoding of that row alone says, or the call is refused in words.
"""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from helpers.batches import make_oracle, pad, prompts_of
from helpers.distributions import TINY_V, assert_distributed_as
from helpers.marks import slow_but
from helpers.models import GEMMA, TARGETS, TEXT, WINDOW, V, count_hooks, make_drafter, make_prompt, make_target
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.decoding.preparation import HOST_DROPS_MASKS, SeenCache, UnfollowableError, find_switch
from hf_eagle3.host.refusals import why_not_drafted
from hf_eagle3.recorder import StateRecorder

GREEDY = {"do_sample": False}
SWITCH = 32  # the length behind which rotation depends on it
RAGGED = (20, 3, 9)
OWN = "own decode loop"


def say_alone(target: PreTrainedModel, lengths: tuple[int, ...], *, max_new: int) -> list[list[int]]:
    """What plain decoding says to each of `prompts_of(*lengths)` by itself, on a copy, since some targets remember."""
    options = {"max_new_tokens": max_new, **GREEDY}
    outs = [copy.deepcopy(target).generate(**inputs_of(target, p), **options) for p in prompts_of(*lengths)]
    return [out[0, n:].tolist() for out, n in zip(outs, lengths, strict=True)]


def inputs_of(target: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    """A prompt as its processor gives it: PaliGemma's says which tokens see each other in both directions."""
    types = {"token_type_ids": torch.zeros_like(input_ids)} if target.config.model_type == "paligemma" else {}
    return {"input_ids": input_ids, **types}


def assert_rows_alone(target, lengths, *, max_new=16, depth=3, model=None, alone=None, **options):
    """A batch with an oracle says what each row says alone; what is told of it. `model` is what to call, if another."""
    alone = say_alone(model or target, lengths, max_new=max_new) if alone is None else alone
    batch = pad(prompts_of(*lengths))
    batch |= inputs_of(target, batch["input_ids"])
    T = max(lengths)
    oracle = make_oracle(target, torch.cat([batch["input_ids"], torch.tensor(alone)], dim=1), batch)
    options = {"max_new_tokens": max_new, "return_dict_in_generate": True, **GREEDY, **options}
    out = (model or target).generate(**batch, assistant_model=oracle, num_assistant_tokens=depth, **options)
    assert out.sequences[:, T:].tolist() == alone
    assert out.speculation.loop == OWN
    assert count_hooks(target) == 0
    return out.speculation


# ---- what a target prepares itself ----


class Doubling(LlamaForCausalLM):
    """Doubles the positions."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {**inputs, "position_ids": inputs["position_ids"] * 2}


class Striding(LlamaForCausalLM):
    """Each new token is three positions behind the last."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        *first, last = model_kwargs["position_ids"].split([model_kwargs["position_ids"].shape[-1] - 1, 1], dim=-1)
        return {**model_kwargs, "position_ids": torch.cat([*first, last + 2], dim=-1)}


class Reading(LlamaForCausalLM):
    """Positions depend on the tokens before."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        jumps = (input_ids % 7 == 3).cumsum(-1)
        return {**inputs, "position_ids": inputs["position_ids"] + jumps[:, -inputs["position_ids"].shape[-1] :]}


class Counting(LlamaForCausalLM):
    """Leaves positions to its forward, which counts what the cache holds."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "position_ids": None}


class HostsCounting(Counting):
    """As EXAONE 4.5 and HyperCLOVA X Vision do, whose classes are the host's: then pads count, too."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs)

    prepare_inputs_for_generation.__module__ = "transformers.models.counting"


class Measuring(LlamaForCausalLM):
    """Asks how long the cache is."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, "position_ids": inputs["position_ids"] + kwargs[CACHE_NAME].get_seq_length() // 10}


def of_class(kind: type[LlamaForCausalLM]) -> PreTrainedModel:
    target = copy.deepcopy(make_target("llama"))
    target.__class__ = kind
    return target


def on_the_instance() -> PreTrainedModel:
    target = copy.deepcopy(make_target("llama"))
    target.prepare_inputs_for_generation = functools.partial(
        Doubling.prepare_inputs_for_generation, of_class(Doubling)
    )
    return target


FOLLOWED = {
    **{
        kind.__name__.lower(): functools.partial(of_class, kind)
        for kind in (Doubling, Striding, Reading, Counting, HostsCounting, Measuring)
    },
    "instance": on_the_instance,
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", slow_but([(12, 3)], [(9,), (12, 3)]), ids=["one_row", "ragged"])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_own_preparation_is_followed(kind, lengths):
    target = FOLLOWED[kind]()
    alone = say_alone(target, lengths, max_new=12)
    told = assert_rows_alone(target, lengths, max_new=12, depth=4, alone=alone)
    assert told.acceptance_length > 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["doubling", "striding", "reading", "measuring", "instance"])
def test_own_preparation_matters(kind):
    assert say_alone(FOLLOWED[kind](), (25,), max_new=12) != say_alone(make_target("llama"), (25,), max_new=12)


def test_own_preparation_is_followed_behind_a_cache_and_a_processor():
    target, prompt = of_class(Doubling), make_prompt(9)
    options = {"max_new_tokens": 12, "repetition_penalty": 1.3, "return_dict_in_generate": True, **GREEDY}
    texts = []
    for assistant in ({}, {"assistant_model": make_drafter(target)}):
        first = target.generate(prompt, **options, **assistant)
        more = torch.cat([first.sequences, make_prompt(4)], dim=1)
        second = target.generate(more, **{CACHE_NAME: first[CACHE_NAME]}, **options, **assistant)
        texts.append(second.sequences.tolist())
    assert texts[0] == texts[1]


class Peeking(LlamaForCausalLM):
    """Wants logits of the forward before, which a round has not run yet."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        return {**model_kwargs, "position_ids": model_kwargs["position_ids"] + int(outputs.logits[0, -1].argmax()) % 2}


class Embedding(LlamaForCausalLM):
    """Feeds embeddings of its own."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {**inputs, "inputs_embeds": 1.1 * self.model.embed_tokens(inputs["input_ids"]), "input_ids": None}


class Dropping(LlamaForCausalLM):
    """Forgets now and then."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, CACHE_NAME: None} if input_ids.shape[1] == 14 else inputs


class Hiding(LlamaForCausalLM):
    """Hides the first token from all that come later."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, "attention_mask": (torch.arange(input_ids.shape[1]) > 0).long().expand_as(input_ids)}


class Tuning(LlamaForCausalLM):
    """Gives its forward something that others have not."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "sharpness": 2.0}

    def forward(self, input_ids=None, position_ids=None, sharpness=1.0, **kwargs):
        out = super().forward(input_ids, position_ids=position_ids, **kwargs)
        out.logits = out.logits * sharpness
        return out


REFUSED = {
    Peeking: "reads 'logits'",
    Embedding: "more than the newest token",
    Dropping: "changes the cache",
    Hiding: "attention_mask hides something",
    Tuning: "also take sharpness",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__.lower())
def test_preparation_that_cannot_be_followed_is_refused(kind):
    target = of_class(kind)
    words = f"{kind.__name__} prepares .*{kind.__name__}.*{REFUSED[kind]}.*Call generate\\(\\) without assistant_model"
    with pytest.raises(UnfollowableError, match=words):
        target.generate(make_prompt(9), assistant_model=make_drafter(target), max_new_tokens=12, **GREEDY)
    assert count_hooks(target) == 0


def test_the_hosts_loop_is_refused_where_each_token_is_prepared():
    target = of_class(Doubling)
    for further in ({"decode_loop": "host"}, {"output_hidden_states": True}):
        with pytest.raises(UnfollowableError, match="several tokens at once"):
            target.generate(make_prompt(5), assistant_model=make_drafter(target), max_new_tokens=4, **further)


class Soft(LlamaForCausalLM):
    """Puts three positions of its own before each prompt."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        cache = kwargs[CACHE_NAME]
        if type(cache).__name__ == "DynamicCache" and cache.get_seq_length() == 0:
            text = self.model.embed_tokens(input_ids)
            soft = self.model.embed_tokens.weight[5:8].expand(len(text), -1, -1)
            return super().forward(inputs_embeds=torch.cat([soft, text], dim=1), **kwargs)
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


@pytest.mark.parametrize("lengths", [(9,), (7, 7)], ids=["one_row", "even"])
def test_a_cache_longer_than_its_mask_is_right_or_refused(lengths):
    target, batch = of_class(Soft), pad(prompts_of(*lengths))
    options = {"max_new_tokens": 14, "return_dict_in_generate": True, **GREEDY}
    drafter = make_drafter(target)
    if not HOST_DROPS_MASKS:  # plain decoding then hides the newest tokens
        with pytest.raises(ValueError, match="positions: a drafter can help if"):
            target.generate(**batch, assistant_model=drafter, **options)
        return
    plain = target.generate(**batch, **options)
    out = target.generate(**batch, assistant_model=drafter, **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    for ours, theirs in zip(out[CACHE_NAME].layers, plain[CACHE_NAME].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)


def test_a_padded_cache_longer_than_its_mask_is_refused():
    target = of_class(Soft)
    with pytest.raises(ValueError, match="holds 23 positions: a drafter can help if"):
        target.generate(**pad(prompts_of(*RAGGED)), assistant_model=make_drafter(target), max_new_tokens=4, **GREEDY)


# ---- PEFT ----


# Of PEFT 0.21 on Transformers 5.24, and what it says of positions.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (".is_gradient_checkpointing. is deprecated", ".past_key_values", "Position ids are not supported")
]


def peft_config(kind: str):
    peft = pytest.importorskip("peft")
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    lora = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
    return {
        "prompt": lambda: peft.PromptTuningConfig(**virtual),
        "p_tuning": lambda: peft.PromptEncoderConfig(**virtual),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual),
        "lora": lambda: peft.LoraConfig(**lora),
    }[kind]()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", [(9,), RAGGED], ids=["one_row", "ragged"])
@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix"])
def test_virtual_tokens_are_followed_or_refused(kind, lengths):
    """PEFT 0.21 puts them before each new token on Transformers 5.24, which no draft can follow."""
    config = peft_config(kind)
    target = copy.deepcopy(make_target("llama"))
    model = pytest.importorskip("peft").get_peft_model(target, config).eval()
    alone = [
        model.generate(input_ids=p, max_new_tokens=10, **GREEDY)[0, p.shape[1] :].tolist()
        for p in prompts_of(*lengths)
    ]
    if kind != "prefix":  # whose virtual keys begin near zero
        assert alone != say_alone(make_target("llama"), lengths, max_new=10)
    if CACHE_NAME == "past_key_values":
        assert_rows_alone(target, lengths, max_new=10, model=model, alone=alone)
        return
    with pytest.raises(UnfollowableError, match=r"PeftModelForCausalLM\.prepare_inputs_for_generation"):
        assert_rows_alone(target, lengths, max_new=10, model=model, alone=alone)


@functools.cache
def with_adapters():
    """A model with two adapters of random weights, and the Llama inside."""
    peft = pytest.importorskip("peft")
    target = copy.deepcopy(make_target("llama"))
    torch.manual_seed(4)
    model = peft.get_peft_model(target, peft_config("lora"), adapter_name="first")
    model.add_adapter("second", peft_config("lora"))
    return model.eval(), target


@pytest.mark.parametrize("lengths", [RAGGED, (70, 3, 4)], ids=["ragged", "many_pads"])
def test_each_row_keeps_its_adapter(lengths):
    """Though rows end before others, and would on a CPU rather run one by one."""
    model, target = with_adapters()
    batch, names = pad(prompts_of(*lengths)), ["first", "__base__", "second"]
    eos = [5, 17, 23, 40, 51, 12, 33]
    options = {"max_new_tokens": 14, "adapter_names": names, "eos_token_id": eos, **GREEDY}
    plain = model.generate(**batch, **options)
    same = model.generate(**batch, **{**options, "adapter_names": ["first"] * 3})
    assert same.tolist() != plain.tolist()
    out = model.generate(**batch, **options, assistant_model=make_oracle(target, plain, batch))
    assert out.tolist() == plain.tolist()


def test_an_adapter_that_counts_from_the_end_of_a_forward_is_refused():
    peft = pytest.importorskip("peft")
    target = copy.deepcopy(make_target("llama"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], alora_invocation_tokens=[7])
    model = peft.get_peft_model(target, config).eval()
    drafter = make_drafter(target)
    ids = torch.tensor([[5, 6, 8, 9]])  # without the tokens that activate it
    plain = model.generate(input_ids=ids, max_new_tokens=8, **GREEDY)
    assert (
        model.generate(input_ids=ids, assistant_model=drafter, max_new_tokens=8, **GREEDY).tolist() == plain.tolist()
    )
    with pytest.raises(
        ValueError, match=r"activated LoRA.*without assistant_model"
    ):  # PEFT then leaves its hooks behind
        model.generate(input_ids=torch.tensor([[5, 6, 7, 9]]), assistant_model=drafter, max_new_tokens=4, **GREEDY)


def test_one_adapter_for_all_stays_in_our_loop():
    model, target = with_adapters()
    model.set_adapter("second")
    assert_rows_alone(target, RAGGED, model=model, alone=[
        model.generate(input_ids=p, max_new_tokens=16, **GREEDY)[0, p.shape[1] :].tolist() for p in prompts_of(*RAGGED)
    ])  # fmt: skip


def test_hooks_see_the_rows_that_they_were_given(target):
    """Somebody's own steering, by row: rows neither leave nor run one by one."""
    batch = pad(prompts_of(70, 3, 4))
    shifts = torch.tensor([0.0, 3.0, -3.0])[:, None, None]
    handle = target.model.layers[2].register_forward_hook(lambda _m, _a, out: out + shifts)
    try:
        options = {"max_new_tokens": 14, "eos_token_id": [5, 17, 23, 40, 51, 12, 33], **GREEDY}
        plain = target.generate(**batch, **options)
        assert target.generate(**batch, **options, assistant_model=make_drafter(target)).tolist() == plain.tolist()
    finally:
        handle.remove()


# ---- rotation by the length of the text ----

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 3.5],
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
NO_HEAD_DIM = {name: value for name, value in TEXT.items() if name != "head_dim"}


def llama(rope: dict, longest: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "max_position_embeddings": longest, "rope_parameters": rope}))


ROPES: dict[str, Callable[[], PreTrainedModel]] = {
    "longrope": lambda: llama({**LONGROPE, "factor": 4.0}, 4 * SWITCH),
    "dynamic": lambda: llama(DYNAMIC, SWITCH),
    "by_layer_type": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **{**GEMMA, "max_position_embeddings": SWITCH},
            rope_parameters={"full_attention": DYNAMIC, "sliding_attention": PLAIN},
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(**NO_HEAD_DIM, original_max_position_embeddings=SWITCH, rope_parameters=LONGROPE)
    ),
    "phimoe": lambda: PhimoeForCausalLM(
        PhimoeConfig(
            **NO_HEAD_DIM,
            num_local_experts=2,
            num_experts_per_tok=2,
            rope_parameters={**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
        )
    ),
}


@pytest.fixture
def rotated(request, monkeypatch) -> PreTrainedModel:
    """A target of `ROPES`, as it is before its first forward."""
    monkeypatch.setitem(TARGETS, f"rope_{request.param}", ROPES[request.param])
    return copy.deepcopy(make_target(f"rope_{request.param}"))


LENGTHS = {"starts_short": (26,), "at_the_switch": (32,), "behind_it": (40,), "ragged": (30, 27, 38)}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", slow_but([LENGTHS["ragged"]], LENGTHS.values()), ids=LENGTHS)
@pytest.mark.parametrize("rotated", ROPES, indirect=True)
def test_each_position_is_rotated_by_its_own_length(rotated, lengths):
    switch = find_switch(rotated)
    max_new = 13
    if switch is not None and not switch.computes_anew and min(lengths) <= SWITCH:
        with pytest.raises(ValueError, match="forgets it all in this version of Transformers"):
            assert_rows_alone(rotated, lengths, max_new=max_new)
        return
    alone = say_alone(rotated, lengths, max_new=max_new)
    before = {name: value.clone() for name, value in rotated.named_buffers()}
    assert_rows_alone(rotated, lengths, max_new=max_new, depth=4, alone=alone)
    # What comes after is as if nothing had been.
    assert all(torch.equal(value, before[name]) for name, value in rotated.named_buffers())


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.3}, {"prefill_chunk_size": 5}], ids=["in_order", "chunks"]
)
@pytest.mark.parametrize("rotated", ["longrope", "dynamic", "phi3"], indirect=True)
def test_lengths_count_token_by_token_and_in_chunks(rotated, options):
    switch = find_switch(rotated)
    lengths = (30, 25) if switch is None or switch.computes_anew else (40, 36)
    alone = [
        copy.deepcopy(rotated).generate(p, max_new_tokens=12, **options, **GREEDY)[0, p.shape[1] :].tolist()
        for p in prompts_of(*lengths)
    ]
    if "repetition_penalty" in options:  # pads count for it
        for prompt, row in zip(prompts_of(*lengths), alone, strict=True):
            out = rotated.generate(
                prompt, assistant_model=make_drafter(rotated), max_new_tokens=12, **options, **GREEDY
            )
            assert out[0, prompt.shape[1] :].tolist() == row
    else:
        assert_rows_alone(rotated, lengths, max_new=12, alone=alone, **options)


@pytest.mark.parametrize("rotated", ["phi3"], indirect=True)
def test_a_cache_that_is_computed_anew_is_returned(rotated):
    switch = find_switch(rotated)
    if switch is None or not switch.computes_anew:
        pytest.skip("this host forgets the text there")
    prompt, texts = make_prompt(25), []
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    for assistant in ({}, {"assistant_model": make_drafter(rotated)}):
        first = rotated.generate(prompt, **options, **assistant)
        assert first[CACHE_NAME].get_seq_length() == 36
        more = torch.cat([first.sequences, make_prompt(4)], dim=1)
        texts.append(rotated.generate(more, **{CACHE_NAME: first[CACHE_NAME]}, max_new_tokens=9, **GREEDY).tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("rotated", ["longrope", "dynamic", "phi3"], indirect=True)
def test_the_hosts_loop_is_refused_for_texts_that_pass_the_switch(rotated):
    drafter = make_drafter(rotated)
    short = rotated.generate(make_prompt(9), max_new_tokens=10, **GREEDY)
    out = rotated.generate(make_prompt(9), max_new_tokens=10, assistant_model=drafter, decode_loop="host", **GREEDY)
    assert out.tolist() == short.tolist()
    with pytest.raises(ValueError, match=f"Behind {SWITCH} tokens.*asked for.*lower max_new_tokens"):
        rotated.generate(make_prompt(9), max_new_tokens=40, assistant_model=drafter, decode_loop="host", **GREEDY)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotated", ROPES, indirect=True)
def test_rotation_is_known_in_half_precision(rotated, dtype):
    drafter = make_drafter(rotated)
    out = rotated.to(dtype).generate(
        make_prompt(40), assistant_model=drafter, max_new_tokens=4, return_dict_in_generate=True, **GREEDY
    )
    assert out.speculation.loop == OWN


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(26,), (40, 5)], ids=["one_row", "ragged"])
@pytest.mark.parametrize("rotated", ["longrope", "dynamic", "by_layer_type", "phi3"], indirect=True)
def test_rotation_by_length_is_captured(rotated, lengths):
    rotated.cuda()
    prompts = [p.cuda() for p in prompts_of(*lengths)]
    alone = [
        copy.deepcopy(rotated).generate(p, max_new_tokens=20, **GREEDY)[0, p.shape[1] :].tolist() for p in prompts
    ]
    batch = {name: value.cuda() for name, value in pad(prompts_of(*lengths)).items()}
    drafter = make_drafter(rotated).cuda()
    options = {"assistant_model": drafter, "max_new_tokens": 20, "return_dict_in_generate": True, **GREEDY}
    if lengths == (26,) and (switch := find_switch(rotated)) is not None and not switch.computes_anew:
        pytest.skip("this host forgets the text there, which is refused")
    for told in ("captured in", "replayed"):
        out = rotated.generate(**batch, **options)
        assert out.sequences[:, max(lengths) :].tolist() == alone
        if rotated.config.model_type == "phi3" and lengths == (26,):
            assert "computes its cache anew where a text passes 32 tokens" in out.speculation.graphs
        else:
            assert out.speculation.graphs.startswith(told)


@pytest.mark.slow
@pytest.mark.parametrize("is_in_order", [False, True], ids=["at_once", "in_order"])
def test_sampling_across_the_switch_has_the_targets_law(is_in_order):
    """Tokens of one round on both sides of it: the first two are of a short text, the third of a long one."""
    torch.manual_seed(5)
    sizes = {**NO_HEAD_DIM, "vocab_size": TINY_V, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 16}
    rope = {**LONGROPE, "original_max_position_embeddings": 4}
    target = Phi3ForCausalLM(Phi3Config(**sizes, original_max_position_embeddings=4, rope_parameters=rope)).eval()
    switch = find_switch(target)
    if switch is None or not switch.computes_anew:
        pytest.skip("this host forgets the text there")
    drafter = make_drafter(
        target, vocab_size=TINY_V, draft_vocab_size=5, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
        num_aux_hidden_states=2, aux_layer_ids=[0, 1],
    )  # fmt: skip
    prompt = torch.tensor([[3, 1, 6]])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "num_assistant_tokens": 3, "pad_token_id": 0}
    if is_in_order:
        options["logits_processor"] = LogitsProcessorList([lambda _ids, scores: scores])
    out = target.generate(prompt, assistant_model=drafter, num_return_sequences=350, **options)[:, 3:]
    prefixes, law = torch.zeros(1, 0, dtype=torch.long), torch.ones(1)
    for _ in range(3):
        with torch.no_grad():
            logits = torch.cat([target(torch.cat([prompt[0], prefix])[None]).logits[:, -1] for prefix in prefixes])
        law = (law[:, None] * logits.softmax(-1)).flatten()
        prefixes = torch.cat(
            [prefixes.repeat_interleave(TINY_V, 0), torch.arange(TINY_V).repeat(len(prefixes))[:, None]], 1
        )
    law = law.view(TINY_V, TINY_V, TINY_V)
    assert_distributed_as(out[:, 1:3], law.sum(0))
    assert_distributed_as(out[:, 2:3], law.sum((0, 1)))


# ---- layers ----

KINDS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2


def mllama() -> PreTrainedModel:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"intermediate_size": 16, "vision_output_dim": 32, "image_size": 8, "patch_size": 4, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = {**TEXT, "cross_attention_layers": [1, 2, 4], "rope_parameters": PLAIN}
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision, image_token_id=60))


def paligemma(kind: str) -> PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 32}
    text = {**(GEMMA if kind == "gemma2" else TEXT), "model_type": kind}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=32, image_token_id=60, tie_word_embeddings=False
    )
    return PaliGemmaForConditionalGeneration(config)


SHARED = {"num_kv_shared_layers": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": V}
UNUSUAL: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma4_shared": lambda: Gemma4ForCausalLM(
        Gemma4TextConfig(
            **{**TEXT, "tie_word_embeddings": False},
            **SHARED,
            layer_types=KINDS,
            sliding_window=WINDOW,
            global_head_dim=8,
        )
    ),
    "gemma3n": lambda: Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **{**TEXT, "tie_word_embeddings": False, "intermediate_size": [48] * 8},
            **SHARED,
            layer_types=KINDS,
            sliding_window=WINDOW,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 8,
        )
    ),
    "mllama": mllama,
    "paligemma": lambda: paligemma("gemma"),
    "paligemma2": lambda: paligemma("gemma2"),
}


@pytest.fixture
def unusual(request, monkeypatch) -> PreTrainedModel:
    monkeypatch.setitem(TARGETS, request.param, UNUSUAL[request.param])
    return make_target(request.param)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", [(9,), (20, 3)], ids=["one_row", "ragged"])
@pytest.mark.parametrize("unusual", UNUSUAL, indirect=True)
def test_unusual_layers_give_the_targets_text(unusual, lengths):
    told = assert_rows_alone(unusual, lengths, max_new=12)
    assert told.acceptance_length > 1


@pytest.mark.parametrize("unusual", ["gemma4_shared", "gemma3n", "paligemma", "paligemma2"], indirect=True)
def test_unusual_layers_in_the_hosts_loop(unusual):
    options = {"max_new_tokens": 14, **GREEDY}
    plain = unusual.generate(make_prompt(9), **options)
    out = unusual.generate(make_prompt(9), assistant_model=make_drafter(unusual), decode_loop="host", **options)
    assert out.tolist() == plain.tolist()


@pytest.mark.parametrize("boundaries", [[1, 2, 4], [0, 3, 8]], ids=["skipped", "run"])
@pytest.mark.parametrize("unusual", ["mllama"], indirect=True)
def test_the_input_of_a_skipped_layer_is_that_of_the_next(unusual, boundaries):
    with torch.no_grad(), StateRecorder(unusual, tuple(boundaries)) as recorder:
        for length in (5, 7):
            unusual(input_ids=make_prompt(length))
            states = recorder.take("cpu").chunk(3, dim=-1)
    with torch.no_grad(), StateRecorder(unusual, (3, 5)) as recorder:
        unusual(input_ids=make_prompt(7))
        three, five = recorder.take("cpu").chunk(2, dim=-1)
    expected = [three, three, five] if boundaries[0] else [states[0], three, states[2]]
    assert all(map(torch.equal, states, expected))


@pytest.mark.parametrize("unusual", ["mllama"], indirect=True)
def test_images_among_the_cached_positions_are_refused(unusual):
    images = {"pixel_values": torch.randn(1, 1, 1, 3, 8, 8), "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long)}
    images |= {"aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long)}
    images |= {"cross_attention_mask": torch.ones(1, 6, 1, 1, dtype=torch.long)}
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, **GREEDY}
    ids = torch.tensor([[60, 5, 6, 7, 8, 9]])
    cache = unusual.generate(ids, **images, **options)[CACHE_NAME]
    drafter = make_drafter(unusual)
    for further in (images, {CACHE_NAME: cache, "attention_mask": torch.ones(1, 17, dtype=torch.long)}):
        with pytest.raises(ValueError, match=r"Mllama.* keeps what it sees in images in the same cache"):
            unusual.generate(ids, **further, assistant_model=drafter, **options)


@pytest.mark.parametrize("unusual", ["paligemma", "paligemma2"], indirect=True)
def test_images_before_a_prefix(unusual):
    """Attended to in both directions, before text that is not."""
    prompts = [torch.tensor([[60, 60, 60, 60, 5, 6, 7]]), torch.tensor([[60, 60, 60, 60, 9, 8, 30, 31, 4]])]
    batch = pad(prompts)
    batch |= {"pixel_values": torch.randn(2, 3, 8, 8), "token_type_ids": torch.zeros_like(batch["input_ids"])}
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    plain = unusual.generate(**batch, **options)
    out = unusual.generate(**batch, assistant_model=make_oracle(unusual, plain.sequences, batch), **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.loop == OWN


# ---- compiled targets ----


def compile_forward(target):
    target.forward = torch.compile(target.forward, backend="eager")


def compile_decoder(target):
    target.model = torch.compile(target.model, backend="eager")


def compile_layers(target):
    for layer in target.model.layers:
        layer.compile(backend="eager")


COMPILED = {
    "forward": (compile_forward, "del target.forward"),
    "in_place": (lambda target: target.compile(backend="eager"), "target._compiled_call_impl = None"),
    "decoder": (compile_decoder, "target.model = target.model._orig_mod"),
    "layers": (compile_layers, "target.model.layers[0]._compiled_call_impl = None"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loop", ["own", "host"])
@pytest.mark.parametrize("kind", COMPILED)
def test_a_compiled_target_is_refused_with_the_line_that_undoes_it(kind, loop):
    target = copy.deepcopy(make_target("llama"))
    do, undo = COMPILED[kind]
    do(target)
    drafter = make_drafter(make_target("llama"))
    options = {"assistant_model": drafter, "decode_loop": loop, "max_new_tokens": 6, **GREEDY}
    with pytest.raises(ValueError, match="LlamaForCausalLM is compiled at target") as caught:
        target.generate(make_prompt(5), **options)
    assert f"({undo})" in str(caught.value)
    if kind != "layers":
        exec(undo, {"target": target})
        assert target.generate(make_prompt(5), **options).tolist() == make_target("llama").generate(
            make_prompt(5), max_new_tokens=6, **GREEDY
        ).tolist()  # fmt: skip


def test_compiled_parts_of_layers_are_no_obstacle():
    target = copy.deepcopy(make_target("llama"))
    for layer in target.model.layers:
        layer.mlp.compile(backend="eager")
    assert why_not_drafted(target) is None


def test_a_seen_cache_is_as_long_as_it_says(target):
    cache = SeenCache(target, 7)
    assert cache.get_seq_length() == 7
    assert cache
    assert isinstance(cache.get_seq_length(3), int)
