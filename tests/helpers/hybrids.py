"""Targets with recurrent layers, and calls of them that are compared with plain decoding."""

import functools
import inspect

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from helpers.families import Family, build, make_batch, make_oracle, prompts_of
from helpers.models import count_hooks
from hf_eagle3.compat import CACHE_NAME

GREEDY = {"do_sample": False}
OWN = "own decode loop"
# One family for each mixer of the host that our loop knows; some are in the newest releases alone.
FAMILIES = (
    *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lara_mini"),
    *("lfm2_moe", "lfm3", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_moe", "qwen3_5_text", "qwen3_next"),
    *("zamba", "zamba2", "zaya"),
)
ALONE = {"falcon_mamba", "mamba", "mamba2"}  # no layer attends
# A gated delta net, Mamba-2 beside attention in one layer, short convolutions.
EVERYDAY = ("qwen3_5_text", "falcon_h1", "lfm2_moe")
RAGGED = (9, 4, 13)


@functools.cache
def make_target(name: str) -> PreTrainedModel:
    """A tiny random target; the same object each time, which no call may change."""
    family = Family(name, "causal")
    try:
        target = build(family)
    except KeyError:
        pytest.skip("This Transformers does not have the family.")
    if CACHE_NAME not in inspect.signature(target.forward).parameters:
        pytest.skip("This Transformers has another name for the family's cache.")
    return target


@functools.cache
def say_alone(name: str, lengths: tuple[int, ...], max_new: int) -> Tensor:
    """[B, n] what plain decoding says to each of the prompts by itself."""
    batch = make_batch(lengths, "cpu")
    options = {"max_new_tokens": max_new, **GREEDY}
    outs = [make_target(name).generate(torch.tensor([prompt]), **options) for prompt in prompts_of(batch)]
    return torch.cat([out[:, len(prompt) :] for out, prompt in zip(outs, prompts_of(batch), strict=True)])


def make_drafter(name: str, lengths: tuple[int, ...], *, max_new: int = 16, wrong_share: float = 0.4):
    """A drafter that knows what rows say, and errs at some positions."""
    batch = make_batch(lengths, "cpu")
    plain = torch.cat([batch["input_ids"], say_alone(name, lengths, max_new)], dim=1)
    return make_oracle(make_target(name), plain, batch, wrong_share=wrong_share)


def decode(name: str, lengths: tuple[int, ...], *, max_new: int = 16, wrong_share: float = 0.4, **options):
    """A greedy call with such a drafter."""
    drafter = make_drafter(name, lengths, max_new=max_new, wrong_share=wrong_share)
    options = {"max_new_tokens": max_new, "return_dict_in_generate": True, **GREEDY, **options}
    return make_target(name).generate(**make_batch(lengths, "cpu"), assistant_model=drafter, **options)


def assert_nothing_left(target: str | PreTrainedModel) -> None:
    target = make_target(target) if isinstance(target, str) else target
    assert count_hooks(target) == 0
    assert not any("forward" in vars(module) for module in target.modules())


def assert_says_what_rows_say_alone(name: str, lengths: tuple[int, ...], *, max_new: int = 16, **options):
    out = decode(name, lengths, max_new=max_new, **options)
    assert out.sequences[:, max(lengths) :].tolist() == say_alone(name, lengths, max_new).tolist()
    assert out.speculation.loop == OWN
    assert_nothing_left(name)
    return out


def read_cache(cache) -> list[dict[str, Tensor]]:
    """What each layer of a cache of the host holds."""
    layers = []
    for layer in cache.layers:
        found = {n: getattr(layer, n) for n in ("keys", "values") if getattr(layer, n, None) is not None}
        for kind in ("conv_states", "recurrent_states"):
            states = getattr(layer, kind, {}).items()
            found |= {f"{kind} {number}": state for number, state in states if state is not None}
        layers.append(found)
    return layers


def assert_same_cache(ours, theirs) -> None:
    """Equal up to rounding, layer by layer; what a prompt's pads left in keys and values no mask shows."""
    assert [type(layer) for layer in ours.layers] == [type(layer) for layer in theirs.layers]
    for mine, plain in zip(read_cache(ours), read_cache(theirs), strict=True):
        assert mine.keys() == plain.keys()
        for part in mine:
            is_pad = (
                (mine[part] == 0).all(dim=(1, 3), keepdim=True) if part in ("keys", "values") else mine[part].isnan()
            )
            near = 1e-2 if mine[part].is_cuda else 1e-3  # cuDNN's convolutions round float32 to 10 bits
            torch.testing.assert_close(mine[part], plain[part].masked_fill(is_pad, 0), rtol=near, atol=near)


def make_even_batch(num_rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Different prompts of one length, without pads."""
    ids = torch.randint(3, 100, (num_rows, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compare(
    target: str | PreTrainedModel, batch: dict[str, Tensor], *, depth: int = 3, wrong_share: float = 0.4, **options
):
    """A call without a drafter and one with; both outputs, whose texts and caches are the same."""
    target = make_target(target) if isinstance(target, str) else target
    options = {"return_dict_in_generate": True, **GREEDY, **options}
    plain = target.generate(**batch, **options)
    oracle = make_oracle(target, plain.sequences, batch, wrong_share=wrong_share)
    out = target.generate(**batch, assistant_model=oracle, num_assistant_tokens=depth, **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.loop == OWN
    assert_same_cache(out[CACHE_NAME], plain[CACHE_NAME])
    assert_nothing_left(target)
    return plain, out


def find_early_end(name: str, batch: dict[str, Tensor], max_new: int) -> int:
    """A token that ends some row well before the others."""
    new = make_target(name).generate(**batch, max_new_tokens=max_new, **GREEDY)[:, batch["input_ids"].shape[1] :]
    firsts = {t: [r.index(t) if t in r else max_new for r in new.tolist()] for t in set(new.flatten().tolist()) - {0}}
    return max(firsts, key=lambda token: max(firsts[token]) - min(firsts[token]) - (min(firsts[token]) < 2) * max_new)


class Ends:
    """Ends all rows of a batch after so many tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class LooksAtText(LogitsProcessor):
    """Bans the last token but one."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -2:-1], -torch.inf)


class LooksAtBatch(LogitsProcessor):
    """Bans what the first row said last, and keeps count of calls."""

    def __init__(self):
        self.widths = []

    def __call__(self, input_ids, scores):
        self.widths.append(list(input_ids.shape))
        return scores.index_fill(1, input_ids[:1, -1], -torch.inf)
