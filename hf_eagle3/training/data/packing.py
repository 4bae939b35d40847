"""Several documents in one row, so that rows of a batch have similar lengths."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset


class Rows(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class PackedDataset(Dataset):
    """Rows of at most `max_length` tokens, each of one or more rows of `rows`; whole documents, in their own order.

    Documents do not see one another: `lengths` has the length of each.
    """

    def __init__(self, rows: Rows, max_length: int):
        self._rows = rows
        self.bins = pack([len(rows[i]["input_ids"]) for i in range(len(rows))], max_length)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = [self._rows[i] for i in self.bins[index]]
        packed = {name: np.concatenate([row[name] for row in rows]) for name in ("input_ids", "loss_mask")}
        lengths = [int(n) for row in rows for n in row.get("lengths", [len(row["input_ids"])])]
        documents = [document for row in rows for document in row.get("documents", [])]
        return {**packed, "lengths": lengths, **({"documents": documents} if documents else {})}


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: the longest first, each into the fullest bin that takes it.

    A longer one than `capacity` is alone in its bin. Bins come in the order of their first index.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # the room left in a bin, and its index, ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            bins.append([i])
            left, number = capacity - lengths[i], len(bins) - 1
        else:
            left, number = room.pop(at)
            bins[number].append(i)
            left -= lengths[i]
        if left > 0:
            insort(room, (left, number))
    return sorted(sorted(b) for b in bins)
