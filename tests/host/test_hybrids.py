"""Targets with recurrent layers: each row is what plain decoding of that row alone says, whatever is drafted."""

import functools

import pytest
import torch
from helpers.families import Family, build, make_batch, make_oracle, prompts_of
from helpers.marks import slow_but
from helpers.models import count_hooks
from torch import Tensor
from transformers import PreTrainedModel

GREEDY = {"do_sample": False}
OWN = "own decode loop"
# One family for each mixer of the host that our loop knows; some are in the newest releases alone.
FAMILIES = (
    *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lara_mini"),
    *("lfm2_moe", "lfm3", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_moe", "qwen3_5_text", "qwen3_next"),
    *("zamba", "zamba2"),
)
# A gated delta net, Mamba-2 beside attention in one layer, short convolutions.
EVERYDAY = ("qwen3_5_text", "falcon_h1", "lfm2_moe")
RAGGED = (9, 4, 13)


@functools.cache
def make_target(name: str) -> PreTrainedModel:
    """A tiny random target; the same object each time, which no call may change."""
    family = Family(name, "causal")
    try:
        return build(family)
    except KeyError:
        pytest.skip("This Transformers does not have the family.")


@functools.cache
def say_alone(name: str, lengths: tuple[int, ...], max_new: int) -> Tensor:
    """[B, n] what plain decoding says to each of the prompts by itself."""
    batch = make_batch(lengths, "cpu")
    options = {"max_new_tokens": max_new, **GREEDY}
    outs = [make_target(name).generate(torch.tensor([prompt]), **options) for prompt in prompts_of(batch)]
    return torch.cat([out[:, len(prompt) :] for out, prompt in zip(outs, prompts_of(batch), strict=True)])


def decode(name: str, lengths: tuple[int, ...], *, max_new: int = 16, wrong_share: float = 0.4, **options):
    """A greedy call with a drafter that knows the texts and errs at some positions."""
    target, batch = make_target(name), make_batch(lengths, "cpu")
    plain = torch.cat([batch["input_ids"], say_alone(name, lengths, max_new)], dim=1)
    oracle = make_oracle(target, plain, batch, wrong_share=wrong_share)
    options = {"max_new_tokens": max_new, "return_dict_in_generate": True, **GREEDY, **options}
    return target.generate(**batch, assistant_model=oracle, **options)


def assert_says_what_rows_say_alone(name: str, lengths: tuple[int, ...], *, max_new: int = 16, **options):
    out = decode(name, lengths, max_new=max_new, **options)
    T = max(lengths)
    assert out.sequences[:, T:].tolist() == say_alone(name, lengths, max_new).tolist()
    assert (out.speculation.loop, count_hooks(make_target(name))) == (OWN, 0)
    assert not any("forward" in vars(module) for module in make_target(name).modules())
    return out


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("lengths", [(11,), RAGGED], ids=["one_row", "ragged"])
@pytest.mark.parametrize("name", slow_but(EVERYDAY, FAMILIES))
def test_each_row_is_that_row_alone(name, lengths, depth):
    assert_says_what_rows_say_alone(name, lengths, num_assistant_tokens=depth)
