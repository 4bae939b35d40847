"""Whether two kinds of decoding give the same text: token by token in float32, up to ties in half precision.

A forward over K+1 tokens rounds differently from one over a single token, so in half precision two tokens whose logits
are nearly equal may change places, and every token after them may differ. Where two texts first differ, both tokens must
be within rounding of the top. The rounding is measured: it is the difference between a forward of the target over that
text and the same forward in float32.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..compat import CACHE_NAME

HALVES = (torch.bfloat16, torch.float16)


class OutputDiffersError(RuntimeError):
    """A text differs from that of plain decoding."""


class Text(NamedTuple):
    """A prompt and two texts that follow it."""

    name: str  # of the prompt, for the error
    prompt: Tensor  # [T] int64, without pads
    plain: list[int]  # by plain decoding
    ours: list[int]


@dataclass(frozen=True)
class Agreement:
    """How texts compare that are allowed to differ as they do."""

    num_rows: int = 0
    num_identical: int = 0
    largest_gap: float = 0.0  # largest distance of a logit from the top where texts first differ

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(
            self.num_rows + other.num_rows,
            self.num_identical + other.num_identical,
            max(self.largest_gap, other.largest_gap),
        )

    def __str__(self) -> str:
        if self.num_identical == self.num_rows:
            return f"{self.num_rows} of {self.num_rows} rows identical"
        return (
            f"{self.num_identical} of {self.num_rows} rows identical; the others differ first at a tie (largest gap "
            f"{self.largest_gap:.3g})"
        )


def compare(target: PreTrainedModel, texts: Sequence[Text], *, kind: str) -> Agreement:
    """How the texts compare.

    Args:
        target: What both were decoded with.
        texts: Of one kind of decoding.
        kind: Its name, for the error.

    Raises:
        OutputDiffersError: Texts differ, and not at a tie in half precision. Names the prompt and the position.
    """
    total = Agreement()
    for text in texts:
        t = first_difference(text.plain, text.ours)
        if t is None:
            total += Agreement(1, 1)
            continue
        where = f"{kind}: {text.name} differs from generate() at new token {t}"
        if t == min(len(text.plain), len(text.ours)):
            raise OutputDiffersError(f"{where}, where one ends: {len(text.ours)} tokens against {len(text.plain)}.")
        tokens = f"{text.ours[t]} instead of {text.plain[t]}"
        if target.dtype not in HALVES:
            raise OutputDiffersError(f"{where}: {tokens}. In {str(target.dtype)[6:]} no difference is allowed.")
        gap, budget = measure_gap(target, text, t)
        if gap > budget:
            raise OutputDiffersError(
                f"{where}: {tokens}. That is no tie: one of the two is {gap:.3g} below the top, and rounding explains "
                f"{budget:.3g}."
            )
        total += Agreement(1, 0, gap)
    return total


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Where two texts first differ, or one ends; None if nowhere."""
    if a == b:
        return None
    return next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def measure_gap(target: PreTrainedModel, text: Text, t: int) -> tuple[float, float]:
    """How far the worse of both tokens at `t` is below the top, and how much of that rounding explains.

    The error of a logit may be twice the largest error along the common text in one forward, so a gap between two logits
    may be four times that. Where there is no float32 (quantised weights, flash attention), a forward is compared with one token after the
    other. A router that chooses between near-equal experts has ties of its own, which are not allowed for.
    """
    common = torch.tensor(text.plain[:t], dtype=text.prompt.dtype, device=text.prompt.device)
    ids = torch.cat([text.prompt, common])[None]  # [1, T + t]
    rounded = forward(target, ids, keep=t + 1)
    attention = target.config.get_text_config(decoder=True)._attn_implementation
    if getattr(target, "hf_quantizer", None) is None and attention in ("sdpa", "eager"):
        with in_float32(target):
            exact = forward(target, ids, keep=t + 1)
    else:
        exact = forward_singly(target, ids, keep=t + 1)
    error = float((rounded - exact).abs().nan_to_num().max())
    gap = max(float(exact[-1].max() - exact[-1, token]) for token in (text.plain[t], text.ours[t]))
    return gap, 4 * error


def forward(target: PreTrainedModel, ids: Tensor, *, keep: int) -> Tensor:
    """[keep, V] float32: logits of one forward over `ids` [1, S], at the last positions."""
    takes = "logits_to_keep" in inspect.signature(target.forward).parameters
    options = {"logits_to_keep": keep} if takes else {}
    return target(ids, use_cache=False, **options).logits[0, -keep:].float()


def forward_singly(target: PreTrainedModel, ids: Tensor, *, keep: int) -> Tensor:
    """[keep, V] float32: the same, as plain decoding computes them."""
    cache = DynamicCache(config=target.config)
    first = ids.shape[1] - keep + 1
    parts = [ids[:, :first], *(ids[:, s : s + 1] for s in range(first, ids.shape[1]))]
    logits = [target(part, **{CACHE_NAME: cache}, use_cache=True).logits[0, -1:] for part in parts]
    return torch.cat(logits).float()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Forwards of `model` in float32, with one module's weights widened at a time: no room for a second model needed."""
    kept: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, _args: tuple) -> None:
        halves = [p for p in module.parameters(recurse=False) if p.dtype in HALVES]
        kept[module] = [(p, p.data) for p in halves]
        for parameter in halves:
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, _args: tuple, _out: object) -> None:
        for parameter, data in kept.pop(module, []):
            parameter.data = data

    handles = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(kept):
            restore(module, (), None)
