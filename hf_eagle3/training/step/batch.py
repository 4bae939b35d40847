"""From rows of tokens to one flat batch, and to the slots of it that train.

Documents lie one behind the other, without padding. Slot i trains at step t when tokens i+1 .. i+2+t were all generated
by the target: exactly the drafts that serving makes. So a slot that trains at step t trains at every earlier one, one
number a slot says all (`depth`), and slots that never train need no queries, only keys and values of the first step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Any]

SQUARE_STEP = 256  # sides of squares are multiples of it, so that few of them are new to a kernel that plans for each
MIN_SQUARE = 4096  # places of the smallest side: from there on, what faster scores save pays for the copies
MAX_SQUARES = 1.5  # the scores of all squares, to those that are asked for


@dataclass(frozen=True)
class Squares:
    """Spans side by side, each from the left of a row of its own: key j of a span at place j, its last query at its last."""

    shape: tuple[int, int]  # spans, and places of each
    queries: Tensor  # [R] int64, where each query lies in the flattened shape
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

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        squares = self.squares
        return replace(
            self,
            keys=None if self.keys is None else move(self.keys),
            query_ends=move(self.query_ends),
            key_ends=move(self.key_ends),
            squares=squares and replace(squares, queries=move(squares.queries), keys=move(squares.keys)),
        )


@dataclass(frozen=True)
class Collator:
    """Packs rows into a flat batch; picklable, so that workers can have it.

    Args:
        ttt_steps: Most steps that will be unrolled.
        every_slot: Run all slots, not only those that train: a drafter of several layers needs them, since its second
            layer's keys come out of the first.
    """

    ttt_steps: int
    every_slot: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """One batch of `rows`, each with `input_ids` and `loss_mask`, and `lengths` where it packs several documents.

        Returns:
            `input_ids` [N] int64, `loss_mask` [N] bool, `position_ids` [N] int64; `lengths`, the documents' as a list, and
            `tokens`, the ids once more, which stay on the host;
            `rows` [R] int64, the slots that run, `depth` [R] int64, at how many steps each trains; `trained` [L] int64,
            the rows with a depth above 0, None if all; `spans`; `documents`, what the rows say of where theirs are
            stored, as a list.
        """
        ids = np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
        mask = np.concatenate([np.asarray(row["loss_mask"], dtype=bool) for row in rows])
        lengths = [int(n) for row in rows for n in row.get("lengths", [len(row["input_ids"])])]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        depth = live_steps(mask, lengths, self.ttt_steps)  # [N]
        runs = np.ones_like(mask) if self.every_slot else depth > 0
        slots = np.flatnonzero(runs)
        spans = _find_spans(slots, np.repeat(np.arange(len(lengths)), lengths), starts)
        trained = np.flatnonzero(depth[slots])
        return {
            "input_ids": torch.from_numpy(ids),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": torch.from_numpy(np.arange(len(ids)) - np.repeat(starts, lengths)),
            "lengths": lengths,
            "tokens": ids,
            "documents": [document for row in rows for document in row.get("documents", [])],
            "rows": torch.from_numpy(slots),
            "depth": torch.from_numpy(depth[slots]),
            "trained": None if len(trained) == len(slots) else torch.from_numpy(trained),
            "spans": spans,
        }


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


def _find_spans(slots: np.ndarray, document: np.ndarray, starts: np.ndarray) -> Spans:
    """Consecutive `slots` [R] of one document as spans; `document` [N] and `starts` [D] say where each lies."""
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
        squares=_find_squares(np.diff(first), counts),
    )


def _find_squares(num_queries: np.ndarray, num_keys: np.ndarray) -> Squares | None:
    """Places for spans of so many queries and keys [S], if most of what squares hold is asked for."""
    if not len(num_keys):
        return None
    side = -(-int(num_keys.max()) // SQUARE_STEP) * SQUARE_STEP
    asked = (num_queries * (2 * num_keys - num_queries)).sum()  # twice the scores; a causal square has half of its own
    if side < MIN_SQUARE or len(num_keys) * side**2 > MAX_SQUARES * asked:
        return None
    starts = np.arange(len(num_keys)) * side
    queries = [np.arange(s + k - q, s + k) for s, q, k in zip(starts, num_queries, num_keys, strict=True)]
    keys = [np.arange(s, s + k) for s, k in zip(starts, num_keys, strict=True)]
    return Squares(
        (len(num_keys), side), torch.from_numpy(np.concatenate(queries)), torch.from_numpy(np.concatenate(keys))
    )
