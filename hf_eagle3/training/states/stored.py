"""Training from stored hidden states, without the target; `writer.py` stores them, `folder.py` is their layout."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...modeling import DrafterModel
from ..data.eval_rows import NO_DOCUMENT
from ..step.batch import Batch, States
from ..step.target_head import TargetHead
from .documents import Documents, StoredDataset
from .folder import (
    AGAIN,
    AUX,
    DOCUMENTS,
    HEAD,
    LAST,
    StoredStatesError,
    describe_weights,
    digest,
    file_names,
    fingerprint,
    fingerprint_weights,
    read_manifest,
    stored_positions,
)
from .stored_target import load_stored_target


class StoredStates:
    """Hidden states from a folder that `store_states` wrote: a `StateSource` that needs no target.

    Args:
        folder: Their folder.
        max_length: Longer documents are cut on the right.
        verify: Read every file and compare its digest; otherwise sizes and headers are checked.
        allow_incomplete: Take a folder whose writing was interrupted, with the documents that it has.

    Raises:
        StoredStatesError: A file is missing, damaged, or does not match the manifest.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        max_length: int | None = None,
        verify: bool = False,
        allow_incomplete: bool = False,
    ):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._check_files(verify, allow_incomplete)
        self._documents = Documents(self.folder, self.manifest)
        self.dtype = self._documents.dtype
        self.target: PreTrainedModel = load_stored_target(self.folder, self.manifest)
        self.dataset = StoredDataset(self._documents, self._documents.usable(), max_length)

    @property
    def head(self) -> TargetHead:
        """The target's head."""
        return TargetHead.of(self.target)

    @property
    def aux_layer_ids(self) -> tuple[int, ...]:
        """The boundaries whose states are stored, ascending."""
        return tuple(self.manifest["aux_layer_ids"])

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the stored states and their target, whatever the shards."""
        manifest, target = self.manifest, self.manifest["target"]
        facts = [manifest[name] for name in ("aux_layer_ids", "dtype", "data")]
        return fingerprint([target["weights"], target["dtype"], target["quantization"], *facts])[:16]

    def _check_files(self, verify: bool, allow_incomplete: bool) -> None:
        files, count = self.manifest["files"], self.manifest["num_shards"]
        missing = [name for name in file_names(count) if name not in files]
        written = count + 2 - len(missing)
        if missing and not (allow_incomplete and {DOCUMENTS, HEAD} <= files.keys() and written > 2):
            raise StoredStatesError(
                f"{self.folder} is incomplete: {written} of {count + 2} files were written, {missing[0]} was not. Run `hf-eagle3 states` again "
                "with the same options to go on, or pass allow_incomplete=True for the documents that are there."
            )
        for name, facts in tqdm(files.items(), desc="Verifying", leave=False, disable=None if verify else True):
            path = self.folder / name
            if not path.is_file():
                raise StoredStatesError(f"{path} is missing, and the manifest lists it. Copy it here, or {AGAIN}.")
            if (size := path.stat().st_size) != facts["bytes"]:
                raise StoredStatesError(
                    f"{path} is damaged: the manifest says {facts['bytes']} bytes, and it has {size}. Delete it and {AGAIN}."
                )
            if verify and (found := digest(path)) != facts["sha256"]:
                raise StoredStatesError(
                    f"{path} is damaged: the manifest says SHA-256 {facts['sha256']}, and it has {found}. Delete it and {AGAIN}."
                )

    def check(self, drafter: DrafterModel) -> None:
        """Bind `drafter` to the stand-in for the target, after checking that these are the states it reads.

        Raises:
            StoredStatesError: It reads the target at other boundaries, or was made for another target.
            ValueError: Its sizes or vocabulary are not the target's.
        """
        ours, theirs = self.manifest["target"]["name"], drafter.config.target_name_or_path
        if ours and theirs and ours != theirs and not Path(theirs).exists():
            raise StoredStatesError(
                f"{self.folder} has the states of {ours}, and this drafter was made for {theirs}. Store that one's states; "
                "if the two are the same model, set drafter.config.target_name_or_path."
            )
        reads = drafter.config.resolve_aux_layer_ids(self.target.config.num_hidden_layers)
        if reads != self.aux_layer_ids:
            raise StoredStatesError(
                f"{self.folder} has states at boundaries {list(self.aux_layer_ids)}, and this drafter reads {list(reads)}. "
                f"Store these (`hf-eagle3 states --aux_layer_ids {' '.join(map(str, reads))}`), or make the drafter with "
                f"aux_layer_ids={list(self.aux_layer_ids)}."
            )
        drafter.bind(self.target)

    def check_target(self, target: PreTrainedModel) -> None:
        """Compare `target`, loaded as it was for storing, with that of these states. Processes that share it must all call.

        Raises:
            StoredStatesError: It has other weights.
        """
        facts, weights = self.manifest["target"], fingerprint_weights(target)
        if weights == facts["weights"]:
            return
        ours = describe_weights(facts["config"]["model_type"], facts["dtype"], facts["weights"])
        model_type = target.config.get_text_config(decoder=True).model_type
        theirs = describe_weights(model_type, str(target.dtype).removeprefix("torch."), weights)
        raise StoredStatesError(
            f"{self.folder} has the states of {facts['name'] or 'a target without a name'} ({ours}), and target_model is "
            f"{target.config.name_or_path or 'one without a name'} ({theirs}). Give the target that the states were made by, "
            "in the same dtype, quantisation and offloading; or write states anew, with this one; or leave out target_model, "
            "and nothing is generated in evaluation."
        )

    @torch.no_grad()
    def states(self, batch: Batch) -> States:
        """Read the states of `batch`, whose rows come from `dataset`: whole, cut on the right, packed in any order.

        Beside these, a row may be one token 0 of `NO_DOCUMENT`, which trains nothing. Positions that no loss reads are zeros.
        The stand-in for the target moves to the device of the batch.

        Raises:
            StoredStatesError: The batch is not of these documents, trains where nothing is stored, or its states are
                damaged.
        """
        ids, lengths, documents = batch.input_ids, batch.lengths, batch.documents
        self._check_documents(lengths, documents)
        device = ids.device
        if self.target.device != device:
            self.target.to(device)
        stored_ids, aux, last, positions = self._read(lengths, documents, pinned=device.type == "cuda")
        stored_ids, aux, last, positions = (
            x.to(device, non_blocking=True) for x in (stored_ids, aux, last, positions)
        )
        whole = last.new_zeros(len(ids), last.shape[-1])
        whole[positions] = last
        rows, trained = batch.rows, batch.trained
        needed = (rows if trained is None else rows[trained]) + 1
        there = torch.zeros(len(ids), dtype=torch.bool, device=device)
        there[positions] = True
        # One wait for the device, for all three.
        same, stored, finite = torch.stack(
            [(stored_ids == ids).all(), there[needed].all(), aux.isfinite().all() & last.isfinite().all()]
        ).tolist()
        if not same:
            self._raise_other_tokens(ids, lengths, documents)
        if not stored:
            raise StoredStatesError(
                f"The batch trains where {self.folder} has no states: its loss_mask marks tokens that the stored one does "
                "not. Train on `dataset` as it is, or store the states of the rows you train on."
            )
        if not finite:
            self._raise_not_finite(aux, whole, lengths, documents)
        return States(aux, whole)

    def _check_documents(self, lengths: Sequence[int], documents: Sequence[int]) -> None:
        if len(documents) != len(lengths):
            raise StoredStatesError(
                f"The batch names {len(documents)} stored documents for {len(lengths)} rows. Train on the `dataset` of these "
                "stored states: each of its rows says which document it is."
            )
        for document, length in zip(documents, lengths, strict=True):
            if document != NO_DOCUMENT and not 0 <= document < len(self._documents):
                raise StoredStatesError(
                    f"The batch has document {document}, and {self.folder} has documents 0 to {len(self._documents) - 1}. Train "
                    "on the `dataset` of these stored states."
                )
            if length > (stored := len(self._documents.tokens(document)[0])):
                raise StoredStatesError(
                    f"Document {document} has {length} tokens in the batch, and {stored} in {self.folder}. Train on the "
                    "`dataset` of these stored states."
                )

    def _read(
        self, lengths: Sequence[int], documents: Sequence[int], pinned: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids [N], aux states [N, A*Ht], last states [M, Ht] and their positions [M] int64, on the host."""
        index = self._documents
        offsets = np.cumsum([0, *lengths])
        all_ids, all_positions, counts = [], [], []
        for document, length, start in zip(documents, lengths, offsets[:-1], strict=True):
            ids, mask = index.tokens(document)
            positions = stored_positions(mask)
            counts.append(int(np.searchsorted(positions, length)))
            all_ids.append(ids[:length])
            all_positions.append(positions[: counts[-1]] + start)
        aux, last = (
            torch.empty(rows, index.widths[name], dtype=self.dtype, pin_memory=pinned)
            for name, rows in ((AUX, int(offsets[-1])), (LAST, sum(counts)))
        )
        done = 0
        for document, length, start, count in zip(documents, lengths, offsets[:-1], counts, strict=True):
            stored = index.states(document)
            num_aux = min(length, len(stored.aux_hidden_states))
            aux[start : start + num_aux] = stored.aux_hidden_states[:num_aux]
            aux[start + num_aux : start + length] = 0
            last[done : done + count] = stored.last_hidden_states[:count]
            done += count
        return torch.from_numpy(np.concatenate(all_ids)), aux, last, torch.from_numpy(np.concatenate(all_positions))

    def _raise_other_tokens(self, ids: Tensor, lengths: Sequence[int], documents: Sequence[int]) -> None:
        for document, row in zip(documents, ids.cpu().split(list(lengths)), strict=True):
            stored = torch.from_numpy(self._documents.tokens(document)[0][: len(row)].astype(np.int64))
            if (at := (stored != row).nonzero()).numel():
                i = int(at[0])
                raise StoredStatesError(
                    f"Document {document} has token {int(stored[i])} at position {i} in {self.folder}, and {int(row[i])} in the "
                    "batch. Rows may be cut on the right or packed, not changed: store the states of the rows you train on."
                )

    def _raise_not_finite(self, aux: Tensor, last: Tensor, lengths: Sequence[int], documents: Sequence[int]) -> None:
        sizes = list(lengths)
        for document, *parts in zip(documents, aux.split(sizes), last.split(sizes), strict=True):
            for name, part in zip((AUX, LAST), parts, strict=True):
                if (at := (~part.isfinite()).nonzero()).numel():
                    raise StoredStatesError(
                        f"Document {document}: {name} are not finite at position {int(at[0, 0])}, in {self._documents.path(document)}. "
                        f"They were when they were written, so the file is damaged. Delete it and {AGAIN}."
                    )
