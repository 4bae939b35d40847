"""Rows of an evaluation: each process's share of them, and rows within and beyond a length."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .token_rows import trains_something

NO_DOCUMENT = -1  # the document of a filler row, which no folder of states has: one token 0, which trains nothing


class ProcessRows(Dataset):
    """The share of `rows` of one of several processes; all shares have the same length.

    A share that is too short ends with a filler row of one token, which trains nothing, is not counted and not stored.
    """

    FILLER: Mapping[str, Any] = {
        "input_ids": np.zeros(1, dtype=np.int64),
        "loss_mask": np.zeros(1, dtype=bool),
        "documents": [NO_DOCUMENT],
    }

    def __init__(self, rows: Any, index: int, count: int):  # Any: rows by index, of whatever class
        self.rows, self._index, self._count = rows, index, count

    def __len__(self) -> int:
        return -(-len(self.rows) // self._count)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        at = index * self._count + self._index
        return self.rows[at] if at < len(self.rows) else self.FILLER


class RowsWithin(Dataset):
    """Rows cut to `length` tokens."""

    def __init__(self, rows: Any, length: int):  # Any: rows by index, of whatever class
        self._rows, self._length = rows, length

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self._rows[index]
        return {**row, **{name: row[name][: self._length] for name in ("input_ids", "loss_mask")}}

    def beyond(self) -> "RowsBeyond":
        """The tokens that were cut."""
        return RowsBeyond(self._rows, self._length)


class RowsBeyond(Dataset):
    """Rows whose tokens count from `length` on; rows that train nothing there are left out."""

    def __init__(self, rows: Any, length: int):  # Any: rows by index, of whatever class
        self._rows, self._length = rows, length
        self._indices = [i for i in range(len(rows)) if trains_something(self._mask(rows[i]))]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self._rows[self._indices[index]]
        return {**row, "loss_mask": self._mask(row)}

    def _mask(self, row: Mapping[str, Any]) -> np.ndarray:
        mask = np.array(row["loss_mask"], dtype=bool)  # a copy
        mask[: self._length] = False
        return mask
