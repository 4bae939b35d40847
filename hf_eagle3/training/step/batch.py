"""From rows of tokens to one flat batch, and to the slots of it that train.

Documents lie one behind the other, without padding. Slot i trains at step t when tokens i+1 .. i+2+t were all generated
by the target: exactly the drafts that serving makes. A slot that trains at step t trains at every earlier one, so one
number a slot (`depth`) is enough. Slots that never train need no queries, only keys and values of the first step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class SquareRule:
    """When spans are also laid out as squares, which faster kernels take."""

    step: int = 256  # sides are multiples of it, so that kernels that plan for each shape see few shapes
    min_side: int = 4096  # from this side on, the faster scores save more than the copies cost
    max_cost: float = 1.5  # the most scores of all squares for each score that is needed


@dataclass(frozen=True)
class Squares:
    """Spans side by side, one a row: key j of a span at place j, its last query at the place of its last key."""

    shape: tuple[int, int]  # spans, and places of each
    queries: Tensor  # [R] int64, the place of each query in the flattened shape
    keys: Tensor  # [M] int64


@dataclass(frozen=True)
class Spans:
    """Queries in spans, each over the keys of its document up to the query itself.

    R queries and M keys lie flat, span behind span. The last query of a span stands at its last key.
    """

    keys: Tensor | None  # [M] int64, the slot of each key; None: every slot once, in order
    query_ends: Tensor  # [S+1] int32, span s has queries query_ends[s] .. query_ends[s+1]-1
    key_ends: Tensor  # [S+1] int32
    longest: tuple[int, int]  # queries and keys of the longest span
    bounds: tuple[tuple[int, int, int, int], ...]  # by span: first and end of queries, first and end of keys
    squares: Squares | None  # None where they would be small or mostly empty

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Spans":
        """The same, with its tensors on `device`."""
        return map_tensors(self, lambda x: x.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Batch:
    """N tokens of D documents, one behind the other without padding, and the R slots among them that run.

    The host's loader moves it by `pin_memory` and `to`, as it does tensors.
    """

    input_ids: Tensor  # [N] int64
    loss_mask: Tensor  # [N] bool, true on tokens that the target generated
    position_ids: Tensor  # [N] int64, from 0 in each document
    tokens: np.ndarray  # [N] int64, `input_ids` once more, always on the host
    lengths: list[int]  # [D], of each document
    documents: list[int]  # [D], where the states of each document are stored; empty if rows do not name them
    rows: Tensor  # [R] int64, the slots that run, ascending
    slots: np.ndarray  # [R] int64, `rows` once more, always on the host
    depth: Tensor  # [R] int64, at how many steps each of them trains
    trained: Tensor | None  # [L] int64, the indices of `rows` with a depth above 0; None: all
    spans: Spans  # the attention of these rows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same, with its tensors on `device`."""
        return map_tensors(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same, with its tensors in pinned memory."""
        return map_tensors(self, Tensor.pin_memory)

    def with_slots(self, index: np.ndarray | slice) -> "Batch":
        """The same with some of its rows [R] alone, ascending; `spans` and `trained` are left as they are."""
        here = index if isinstance(index, slice) else torch.from_numpy(index).to(self.rows.device)
        return replace(self, rows=self.rows[here], depth=self.depth[here], slots=self.slots[index])

    def split_documents(self) -> list[Tensor]:
        """[T] int64 on the host, the tokens of each document."""
        return list(torch.from_numpy(self.tokens).split(self.lengths))


class States(NamedTuple):
    """The target's hidden states of the N tokens of a batch."""

    aux_hidden_states: Tensor  # [N, A*Ht], at the drafter's boundaries, ascending
    last_hidden_states: (
        Tensor  # [N, Ht], after the final norm, as the head reads them; [N, V] if the head takes logits
    )


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """A dataclass with `function` applied to each of its tensors, those of inner dataclasses included."""
    changes: dict[str, Any] = {}
    for field in fields(value):  # type: ignore[arg-type]  # a dataclass
        inner = getattr(value, field.name)
        if isinstance(inner, Tensor):
            changes[field.name] = function(inner)
        elif is_dataclass(inner):
            changes[field.name] = map_tensors(inner, function)
    return replace(value, **changes)  # type: ignore[type-var]  # a dataclass


@dataclass(frozen=True)
class Collator:
    """Packs rows into a flat batch; picklable, so that workers can have it.

    Args:
        ttt_steps: Most steps that will be unrolled.
        every_slot: Run all slots, not only those that train. A drafter of several layers needs them, since the keys of
            its second layer are computed from the output of the first.
        squares: When spans are laid out as squares.
    """

    ttt_steps: int
    every_slot: bool = False
    squares: SquareRule = SquareRule()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """One batch of `rows`, each with `input_ids` and `loss_mask`, and `lengths` where it packs several documents."""
        ids = np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
        mask = np.concatenate([np.asarray(row["loss_mask"], dtype=bool) for row in rows])
        lengths = [int(n) for row in rows for n in row.get("lengths", [len(row["input_ids"])])]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        depth = live_steps(mask, lengths, self.ttt_steps)  # [N]
        runs = np.ones_like(mask) if self.every_slot else depth > 0
        slots = np.flatnonzero(runs)
        spans = _find_spans(slots, np.repeat(np.arange(len(lengths)), lengths), starts, self.squares)
        trained = np.flatnonzero(depth[slots])
        return Batch(
            input_ids=torch.from_numpy(ids),
            loss_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(starts, lengths)),
            tokens=ids,
            lengths=lengths,
            documents=[document for row in rows for document in row.get("documents", [])],
            rows=torch.from_numpy(slots),
            slots=slots,
            depth=torch.from_numpy(depth[slots]),
            trained=None if len(trained) == len(slots) else torch.from_numpy(trained),
            spans=spans,
        )


def live_steps(loss_mask: np.ndarray, lengths: Sequence[int], ttt_steps: int) -> np.ndarray:
    """[N] int64: at how many steps each slot trains, 0 .. ttt_steps.

    One less than the generated tokens in a row that begin right after it, within its document.
    """
    follow = np.zeros(len(loss_mask), dtype=np.int64)
    start = 0
    for length in lengths:
        mask = loss_mask[start : start + length]
        zeros = np.append(np.flatnonzero(~mask), length)
        run = zeros[np.searchsorted(zeros, np.arange(length))] - np.arange(length)  # ones in a row from here on
        follow[start : start + length - 1] = run[1:]
        start += length
    return (follow - 1).clip(0, ttt_steps)


def _find_spans(slots: np.ndarray, document: np.ndarray, starts: np.ndarray, squares: SquareRule) -> Spans:
    """Consecutive `slots` [R] of one document as spans; `document` [N] is the document of each token, `starts` [D] the first token of each."""
    breaks = (np.diff(slots) != 1) | (np.diff(document[slots]) != 0)
    first = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(slots)]]) if len(slots) else np.zeros(1, np.int64)
    begins, lasts = slots[first[:-1]], slots[first[1:] - 1]  # [S]
    key_begins = starts[document[begins]]
    counts = lasts - key_begins + 1
    ends = np.concatenate([[0], np.cumsum(counts)])
    keys = (
        np.concatenate([np.arange(b, b + n) for b, n in zip(key_begins, counts, strict=True)])
        if len(begins)
        else np.zeros(0, np.int64)
    )
    is_everything = len(keys) == len(document) and bool((keys == np.arange(len(keys))).all())
    return Spans(
        keys=None if is_everything else torch.from_numpy(keys),
        query_ends=torch.from_numpy(first.astype(np.int32)),
        key_ends=torch.from_numpy(ends.astype(np.int32)),
        longest=(int(np.diff(first).max(initial=0)), int(counts.max(initial=0))),
        bounds=tuple(
            (int(a), int(b), int(c), int(d))
            for a, b, c, d in zip(first[:-1], first[1:], ends[:-1], ends[1:], strict=True)
        ),
        squares=_find_squares(np.diff(first), counts, squares),
    )


def _find_squares(num_queries: np.ndarray, num_keys: np.ndarray, rule: SquareRule) -> Squares | None:
    """Squares for spans of so many queries and keys [S]; None where they do not pay by `rule`."""
    if not len(num_keys):
        return None
    side = -(-int(num_keys.max()) // rule.step) * rule.step
    needed = (
        num_queries * (2 * num_keys - num_queries)
    ).sum()  # twice the scores; a causal square has half of its own
    if side < rule.min_side or len(num_keys) * side**2 > rule.max_cost * needed:
        return None
    starts = np.arange(len(num_keys)) * side
    queries = [np.arange(s + k - q, s + k) for s, q, k in zip(starts, num_queries, num_keys, strict=True)]
    keys = [np.arange(s, s + k) for s, k in zip(starts, num_keys, strict=True)]
    return Squares(
        (len(num_keys), side), torch.from_numpy(np.concatenate(queries)), torch.from_numpy(np.concatenate(keys))
    )
