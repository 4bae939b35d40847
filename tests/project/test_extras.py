"""Beside packages that are extras: grammars of xgrammar, targets quantised by torchao."""

import functools
import importlib.util
import json

import pytest
import torch
from helpers.batches import assert_same, make_oracle, pad, prompts_of
from helpers.models import TEXT, V, make_drafter, make_prompt, make_target
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    TorchAoConfig,
)

from hf_eagle3.host.loop_choice import ASKED

needs_xgrammar = pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="needs xgrammar")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")

EOS = 2
CHARACTERS = ["<pad>", "<s>", "</s>", *'{}[]":,. -', *"0123456789", *"abcdefghijklmnopqrstuvwxyz"]
WORDS = ["true", "false", "null", "ab", "10"]
TOKENS = [*CHARACTERS, *WORDS, *(f"<unused{i}>" for i in range(V - len(CHARACTERS) - len(WORDS)))]
SCHEMAS = {
    "numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 2},
    "object": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["abc", "abd", "x"]}, "c": {"type": "string"}},
        "required": ["a", "b", "c"],
    },
}


@functools.cache
def compiled(schema: str):
    xgrammar = pytest.importorskip("xgrammar")
    info = xgrammar.TokenizerInfo(
        TOKENS, vocab_type=xgrammar.VocabType.RAW, vocab_size=V, stop_token_ids=[EOS], add_prefix_space=False
    )
    return xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMAS[schema]), any_whitespace=False)


def constrained(target: PreTrainedModel, batch: dict, grammars, **options) -> list[str]:
    """What is said to each row under xgrammar's own processor for Transformers, made anew as it asks to be."""
    processor = pytest.importorskip("xgrammar.contrib.hf").LogitsProcessor(grammars)
    out = target.generate(
        **batch,
        **{"max_new_tokens": 40, "eos_token_id": EOS, "do_sample": False, **options},
        logits_processor=LogitsProcessorList([processor]),
    )
    return ["".join(TOKENS[token] for token in row) for row in out[:, batch["input_ids"].shape[1] :].tolist()]


@needs_xgrammar
@pytest.mark.parametrize("lengths", [(7,), (9, 4, 12)], ids=["one_row", "ragged"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_grammar_is_kept_as_without_a_drafter(target, schema, lengths):
    batch = pad(prompts_of(*lengths))
    plain = constrained(target, batch, compiled(schema))
    assert constrained(target, batch, compiled(schema), assistant_model=make_drafter(target)) == plain
    for text in plain:
        assert text.startswith("[" if schema == "numbers" else '{"a": ')


@needs_xgrammar
def test_each_row_may_have_a_grammar_of_its_own(target):
    batch = pad(prompts_of(9, 4))
    grammars = [compiled("numbers"), compiled("object")]
    plain = constrained(target, batch, grammars)
    assert [text[0] for text in plain] == ["[", "{"]
    assert constrained(target, batch, grammars, assistant_model=make_drafter(target)) == plain


@needs_xgrammar
def test_grammar_is_kept_when_sampled(target):
    torch.manual_seed(2)
    options = {"do_sample": True, "temperature": 0.5, "assistant_model": make_drafter(target), "max_new_tokens": 80}
    texts = constrained(target, pad(prompts_of(9, 4, 7, 6)), compiled("object"), **options)
    ended = [text.split("</s>")[0] for text in texts if "</s>" in text]
    assert ended
    for text in ended:
        assert sorted(json.loads(text)) == ["a", "b", "c"]


@needs_xgrammar
def test_grammar_is_kept_by_the_hosts_loop(target):
    batch = pad(prompts_of(7))
    plain = constrained(target, batch, compiled("object"))
    drafter = make_drafter(target)
    assert constrained(target, batch, compiled("object"), assistant_model=drafter, decode_loop="host") == plain


# ---- quantised targets ----


@functools.cache
def quantised(folder: str) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig

    make_target("llama").save_pretrained(folder)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    target = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    target.generation_config = make_target("llama").generation_config
    return target


@needs_torchao
@pytest.mark.parametrize("lengths", [(9,), (9, 4, 12)], ids=["one_row", "ragged"])
def test_quantised_target_keeps_its_text(tmp_path_factory, lengths):
    target = quantised(str(tmp_path_factory.getbasetemp() / "quantised"))
    assert type(target.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")
    plain, out = assert_same(target, pad(prompts_of(*lengths)), max_new_tokens=24)
    assert out.speculation.acceptance_length > 1
    whole = make_target("llama").generate(**pad(prompts_of(*lengths)), max_new_tokens=24, do_sample=False)
    assert whole.tolist() != plain.sequences.tolist()  # so the weights are others indeed


@needs_torchao
@pytest.mark.parametrize("loop", ASKED)
def test_quantised_target_in_either_loop(tmp_path_factory, loop):
    target = quantised(str(tmp_path_factory.getbasetemp() / "quantised"))
    plain = target.generate(make_prompt(9), max_new_tokens=20, do_sample=False)
    options = {"max_new_tokens": 20, "do_sample": False, "decode_loop": loop}
    assert target.generate(make_prompt(9), assistant_model=make_drafter(target), **options).tolist() == plain.tolist()


WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "head_dim": 32,
    "initializer_range": 0.15,
}  # blocks of 64 weights share a scale
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
EIGHT_BITS = {"load_in_8bit": True, "llm_int8_threshold": 0.0}  # with outliers, a token would depend on the others


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(9,), (9, 4, 12)], ids=["one_row", "ragged"])
@pytest.mark.parametrize("bits", [FOUR_BITS, EIGHT_BITS], ids=["4", "8"])
def test_bitsandbytes_target_keeps_its_text(tmp_path, bits, lengths):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**{**TEXT, **WIDE})).eval()
    whole.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**bits)
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cuda"
    )
    assert "bitsandbytes" in type(target.model.layers[0].mlp.up_proj).__module__
    batch = {name: x.to(target.device) for name, x in pad(prompts_of(*lengths)).items()}
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**batch, **options)
    drafters = [make_drafter(target, **WIDE), make_oracle(target, plain, batch, **WIDE)]
    for drafter in drafters:
        drafter.to(target.device)
        out = target.generate(**batch, assistant_model=drafter, return_dict_in_generate=True, **options)
        assert out.sequences.tolist() == plain.tolist()
        assert out.speculation.loop == "own decode loop"
    assert out.speculation.acceptance_length > 1
    exact = whole.generate(**pad(prompts_of(*lengths)), **options)
    assert exact.tolist() != plain.tolist()  # so the weights are others indeed


# ---- quantised drafters ----


@needs_torchao
@pytest.mark.parametrize("overrides", [{}, {"has_own_embeddings": True}], ids=["borrowing", "own"])
def test_drafter_takes_a_quantization_config(target, overrides, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    drafter = make_drafter(target, **overrides)
    drafter.save_pretrained(tmp_path)
    small = AutoModel.from_pretrained(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    weight = small.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ != "Parameter"
    assert_near = torch.testing.assert_close
    assert_near(weight.dequantize(), drafter.layers[0].mlp.up_proj.weight.detach(), rtol=0.02, atol=0.02)
    options = {"max_new_tokens": 12, "do_sample": False}
    for batch in (pad(prompts_of(7)), pad(prompts_of(9, 4))):
        plain = target.generate(**batch, **options)
        assert target.generate(**batch, assistant_model=small, **options).tolist() == plain.tolist()
