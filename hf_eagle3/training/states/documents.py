"""The documents of a folder of stored states: ids, masks and states, mapped from its files, and rows of them."""

import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import get_worker_info

from ...modeling.weights_eagle3 import refuse_outside
from ..data.eval_rows import NO_DOCUMENT
from ..data.token_rows import TokenDataset, trains_something
from ..step.batch import States
from .folder import (
    AGAIN,
    AUX,
    COLUMNS,
    DOCUMENTS,
    LAST,
    SAFETENSORS_NAMES,
    StoredStatesError,
    shard_name,
)

OPEN_SHARDS = 256  # mapped at a time


def check_columns(path: Path, columns: Mapping[str, np.ndarray], num_shards: int) -> None:
    """Raise unless the tensors of all documents have the expected types, and fit together.

    Raises:
        StoredStatesError: They are not; the message names the tensor.
    """

    def require(is_right: Any, name: str, wanted: str) -> None:  # Any: numpy's booleans too
        if not is_right:
            raise StoredStatesError(f"{path} is damaged: {name} {wanted}. Delete it and {AGAIN}.")

    for name, (dtype, _) in COLUMNS.items():
        require(name in columns, name, "is missing")
        found = columns[name]
        require(
            (found.ndim, found.dtype) == (1, dtype),
            name,
            f"is {found.dtype} {list(found.shape)}, expected {dtype} [n]",
        )
    lengths = {
        unit: {len(columns[n]) for n, (_, of) in COLUMNS.items() if of == unit} for unit in ("token", "document")
    }
    require(len(lengths["token"]) == 1, "loss_mask", f"and input_ids differ in length: {sorted(lengths['token'])}")
    require(len(lengths["document"]) == 1, "ends", f"and others differ in length: {sorted(lengths['document'])}")
    ends, shards, mask = columns["ends"], columns["shard"], columns["loss_mask"]
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    require(
        len(ends) and (starts < ends).all() and ends[-1] == len(mask), "ends", "must ascend to the number of tokens"
    )
    is_ascending = (shards[1:] >= shards[:-1]).all()
    require(
        is_ascending and shards[0] >= 0 and shards[-1] < num_shards, "shard", f"must ascend in 0..{num_shards - 1}"
    )
    # `stored_positions`, of all documents at once.
    is_stored = np.append(mask[:-1] & mask[1:], False)
    is_stored[starts] = is_stored[ends - 1] = False
    before = np.concatenate([[0], np.cumsum(is_stored)])
    counts = before[ends] - before[starts]
    require((columns["num_last"] == counts).all(), "num_last", "is not what loss_mask says")
    aux = columns["num_aux"]
    is_inside = ((aux >= 0) & (aux < ends - starts)).all()
    require(is_inside, "num_aux", "is not what loss_mask says")
    is_last = is_stored[starts + aux] & (before[starts + aux + 1] - before[starts] == counts)
    require(np.where(counts > 0, is_last, aux == 0).all(), "num_aux", "is not what loss_mask says")
    first = np.searchsorted(shards, shards)
    for name, of in (("aux_start", aux), ("last_start", counts)):
        rows = np.cumsum(of) - of
        require((columns[name] == rows - rows[first]).all(), name, "does not follow from the documents before")


class Documents:
    """All documents of a folder: ids, masks and states, mapped from its files. Processes share them; none pickles them.

    Args:
        folder: Where they are.
        manifest: The folder's.
        most_open: Shards that are mapped at a time.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], most_open: int = OPEN_SHARDS):
        self.folder, self._manifest, self._most_open = folder, manifest, most_open
        path = folder / DOCUMENTS
        try:
            refuse_outside(path)
            with safe_open(path, framework="pt") as file:  # torch's tensors are mapped, numpy's are copies
                columns = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118  no mapping
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise StoredStatesError(f"{path} cannot be read ({error}). Delete it and {AGAIN}.") from error
        check_columns(path, columns, manifest["num_shards"])
        self._ids, self._masks = columns["input_ids"], columns["loss_mask"]  # [N]
        self._ends = columns["ends"]  # [D]
        self._shards = columns["shard"]  # [D]
        self._starts = {AUX: columns["aux_start"], LAST: columns["last_start"]}  # [D], rows in the shard
        self._counts = {AUX: columns["num_aux"], LAST: columns["num_last"]}  # [D]
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])
        width = manifest["hidden_size"]
        # Folders of earlier versions do not have last_size.
        self.widths = {AUX: width * max(1, len(manifest["aux_layer_ids"])), LAST: manifest.get("last_size", width)}
        self._open: dict[int, dict[str, Any]] = {}  # safetensors' slices, by shard

    def __reduce__(self) -> tuple[Any, ...]:
        return Documents, (self.folder, self._manifest, self._most_open)

    def __len__(self) -> int:
        return len(self._ends)

    def tokens(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [T] int32 and mask [T] bool."""
        if document == NO_DOCUMENT:
            return np.zeros(1, dtype=np.int32), np.zeros(1, dtype=bool)
        where = slice(self._ends[document - 1] if document else 0, self._ends[document])
        return self._ids[where], self._masks[where]

    def states(self, document: int) -> States:
        """Aux states [<= T, A*Ht], and last hidden states [M, Ht] at `stored_positions`; mapped, not copied."""
        if document == NO_DOCUMENT:
            return States(*(torch.empty(0, self.widths[name], dtype=self.dtype) for name in (AUX, LAST)))
        slices, parts = self._slices(int(self._shards[document])), []
        for name in (AUX, LAST):
            start = int(self._starts[name][document])
            parts.append(slices[name][start : start + int(self._counts[name][document])])
        return States(*parts)

    def read_ahead(self, document: int) -> None:
        """Bring the states into memory before `states` reads them, by reading a byte of each page."""
        for part in self.states(document):
            part.view(torch.uint8).flatten()[:: mmap.PAGESIZE].sum()

    def path(self, document: int) -> Path:
        """The file its states are in."""
        return self.folder / shard_name(int(self._shards[document]), self._manifest["num_shards"])

    def usable(self) -> np.ndarray:
        """The documents whose states are there and finite."""
        files, count = self._manifest["files"], self._manifest["num_shards"]
        is_there = np.array([shard_name(i, count) in files for i in range(count)], dtype=bool)
        left_out = [document for facts in files.values() for document in facts.get("left_out", ())]
        return np.setdiff1d(np.flatnonzero(is_there[self._shards]), left_out)

    def _slices(self, shard: int) -> dict[str, Any]:
        """The tensors of a shard, by name. Its header is checked when it is opened."""
        if shard in self._open:
            return self._open[shard]
        path, members = self.folder / shard_name(shard, self._manifest["num_shards"]), self._shards == shard
        try:
            refuse_outside(path)
            file = safe_open(path, framework="pt")
            slices = {name: file.get_slice(name) for name in (AUX, LAST)}
        except (OSError, ValueError, SafetensorError) as error:
            raise StoredStatesError(f"{path} cannot be read ({error}). Delete it and {AGAIN}.") from error
        kind = SAFETENSORS_NAMES[self.dtype]
        for name, found in slices.items():
            shape = [int(self._counts[name][members].sum()), self.widths[name]]
            if (found.get_shape(), found.get_dtype()) != (shape, kind):
                raise StoredStatesError(
                    f"{path}: the manifest says {name} {shape} of {kind}, and it has {found.get_shape()} of "
                    f"{found.get_dtype()}, by aux_layer_ids, hidden_size and dtype. Delete it and {AGAIN}."
                )
        if len(self._open) >= self._most_open:
            del self._open[next(iter(self._open))]
        self._open[shard] = slices
        return slices


class StoredDataset(TokenDataset):
    """The documents of stored states as rows for the trainer. Each row names its document, and so do its batches.

    Args:
        documents: All of them.
        indices: The documents that are rows, in this order.
        max_length: Longer documents are cut on the right; those that then train nothing are left out.
    """

    def __init__(self, documents: Documents, indices: Iterable[int], max_length: int | None = None):
        self._documents, self._max_length = documents, max_length
        self._indices = np.fromiter(indices, dtype=np.int64)
        if max_length is not None:
            keep = [trains_something(documents.tokens(i)[1][:max_length]) for i in self._indices]
            self._indices = self._indices[np.array(keep, dtype=bool)]
        if not len(self._indices):
            raise StoredStatesError(
                f"The training data is empty: no stored document is left to train on (max_length {max_length})."
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:  # arrays, and the document
        document = int(self._indices[index])
        ids, mask = self._documents.tokens(document)
        if get_worker_info() is not None:  # the batch is needed soon
            self._documents.read_ahead(document)
        return {
            "input_ids": ids[: self._max_length],
            "loss_mask": mask[: self._max_length],
            "documents": [document],
        }

    def select(self, indices: Iterable[int]) -> "StoredDataset":
        """The rows at `indices`, for instance to keep some for evaluation."""
        return StoredDataset(self._documents, self._indices[np.fromiter(indices, dtype=np.int64)], self._max_length)
