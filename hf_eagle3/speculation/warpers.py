"""Temperature, top-k, top-p and min-p of each row, as tensors: rows of one batch, and of one graph, may differ."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .numbers import send

# Settings that rows may differ in: the field, the host's warper and its attribute. In this order, which is the host's.
BY_ROW = (
    ("temperature", TemperatureLogitsWarper, "temperature"),
    ("top_k", TopKLogitsWarper, "top_k"),
    ("top_p", TopPLogitsWarper, "top_p"),
    ("min_p", MinPLogitsWarper, "min_p"),
)


class RowSettings(NamedTuple):
    """How the tokens of one row are sampled; None leaves a step out."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    is_greedy: bool = False  # takes the likeliest token, beside rows that draw theirs


def read_settings(warpers: Sequence[LogitsProcessor]) -> tuple[RowSettings, list[LogitsProcessor]]:
    """What the first of the call's warpers set for a row, and the others: from the first on that rows cannot differ in."""
    found: dict[str, Any] = {}
    fields = iter(BY_ROW)
    for index, warper in enumerate(warpers):
        field = next((row for row in fields if row[1] is type(warper)), None)
        if field is None or not is_plain(warper):
            return RowSettings(**found), list(warpers[index:])
        found[field[0]] = getattr(warper, field[2])
    return RowSettings(**found), []


def is_plain(warper: LogitsProcessor) -> bool:
    """Whether a warper removes tokens by -inf, and keeps one at least."""
    return (
        getattr(warper, "filter_value", -torch.inf) == -torch.inf
        and (getattr(warper, "min_tokens_to_keep", 1) == 1 or type(warper) is TopKLogitsWarper)  # which counts it in
    )


class RowWarper:
    """Warps the scores of each row by its settings, and then those of all rows alike.

    Which steps there are, and the largest top-k, are fixed, as a graph needs it; the values are in tensors.

    Args:
        rows: Of B rows.
        further: Stateless warpers for all of them.
        device: Of the scores.
    """

    def __init__(self, rows: Sequence[RowSettings], further: Sequence[LogitsProcessor], device: torch.device):
        self.further = list(further)
        self.divide = divide  # captured rounds have a kernel
        top_k = max((row.top_k or 0 for row in rows), default=0)
        self.max_top_k = 1 << (top_k - 1).bit_length() if top_k else 0
        columns: dict[str, list[float | None]] = {
            "temperature": [row.temperature for row in rows],
            "top_k": [row.top_k for row in rows],
            "rest": [None if row.top_p is None else 1 - row.top_p for row in rows],
            "min_p": [row.min_p for row in rows],
            "is_greedy": [1 if row.is_greedy else None for row in rows],
        }
        if all(row.is_greedy for row in rows):  # then their rounds are greedy
            del columns["is_greedy"]
        nothing = {"temperature": 1.0, "top_k": 0, "rest": -1.0, "min_p": -1.0, "is_greedy": 0}
        with torch.inference_mode(False):
            self.values = {
                name: send(
                    [nothing[name] if value is None else value for value in column],
                    device,
                    torch.long if name in WHOLE_NUMBERS else torch.float32,
                )
                for name, column in columns.items()
                if any(value is not None for value in column)
            }  # [B] each

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return bool(self.values or self.further)

    @property
    def key(self) -> tuple:
        """What graphs over it rest on."""
        return *self.values, self.max_top_k, *map(describe_warper, self.further)

    def __call__(self, logits: Tensor) -> Tensor:
        """Warped scores [B, n, V] float32 of `logits` [B, n, V]."""
        scores = logits
        if "temperature" in self.values:
            scores = self.divide(logits, self.values["temperature"])
        scores = scores.float()
        for name, step in STEPS.items():
            if name in self.values:
                scores = step(scores, self.values[name][:, None, None].to(scores.device), self.max_top_k)
        for warper in self.further:
            flat = scores.flatten(0, 1)  # [B*n, V]
            scores = warper(flat.new_empty(len(flat), 0, dtype=torch.long), flat).view_as(scores)
        return scores

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] int64 only."""
        self.values = {name: value[rows.to(value.device)] for name, value in self.values.items()}

    def copy_from(self, other: "RowWarper") -> None:
        """Take the values of a warper with the same key, in place."""
        for name, value in self.values.items():
            value.copy_(other.values[name])

    def clone(self) -> "RowWarper":
        """One with tensors of its own."""
        copied = RowWarper((), self.further, torch.device("cpu"))
        copied.max_top_k = self.max_top_k
        with torch.inference_mode(False):
            copied.values = {name: value.clone() for name, value in self.values.items()}
        return copied


def divide(logits: Tensor, temperature: Tensor) -> Tensor:
    """[B, n, V] float32, `logits` [B, n, V] over `temperature` [B].

    Rounded as PyTorch rounds a division by a number: on a GPU it multiplies by the reciprocal.
    """
    divisor = temperature[:, None, None].to(logits.device)
    return logits.float() * divisor.reciprocal() if logits.is_cuda else logits.float() / divisor


def keep_top_k(scores: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    """The largest `top_k` [B, 1, 1] of `scores` [B, n, V], all where it is 0; -inf for others."""
    V = scores.shape[-1]
    largest = scores.topk(min(max_top_k, V)).values  # [B, n, k]
    index = (top_k.clamp(1, largest.shape[-1]) - 1).expand(*scores.shape[:2], 1)
    return scores.masked_fill((scores < largest.gather(-1, index)) & (top_k > 0), -torch.inf)


def keep_top_p(scores: Tensor, rest: Tensor, _: int) -> Tensor:
    """The likeliest that make up all but the `rest` [B, 1, 1] of the probability; -inf for others."""
    ascending, order = scores.sort()
    is_removed = ascending.softmax(-1).cumsum(-1) <= rest
    is_removed[..., -1:] = False
    return scores.masked_fill(is_removed.scatter(-1, order, is_removed), -torch.inf)


def keep_min_p(scores: Tensor, min_p: Tensor, _: int) -> Tensor:
    """Those at least `min_p` [B, 1, 1] times as likely as the likeliest; -inf for others."""
    probs = scores.softmax(-1)
    return scores.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)


def keep_likeliest(scores: Tensor, is_greedy: Tensor, _: int) -> Tensor:
    """The first of the likeliest where `is_greedy` [B, 1, 1] is 1; -inf for others. Whatever is drawn there is that token."""
    best = scores.argmax(-1, keepdim=True)
    others = torch.ones_like(scores, dtype=torch.bool).scatter(-1, best, False)
    return scores.masked_fill(others & (is_greedy > 0), -torch.inf)


WHOLE_NUMBERS = ("top_k", "is_greedy")
# By the tensor that each reads, in the order in which the host warps; before all comes the temperature.
STEPS = {"top_k": keep_top_k, "rest": keep_top_p, "min_p": keep_min_p, "is_greedy": keep_likeliest}


def describe_warper(warper: Any) -> tuple:  # Any: one of the host's
    """What a warper does, as a key."""
    settings = {k: v.item() if isinstance(v, Tensor) else v for k, v in vars(warper).items()}
    return type(warper).__name__, *sorted(settings.items())
