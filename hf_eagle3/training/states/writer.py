"""Running a target over a dataset and writing its hidden states to a folder; `stored.py` reads it."""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...console.installed import installed_version
from ...host.refusals import refuse_compiled
from ...modeling import DrafterModel
from ...modeling.fields_eagle3 import default_boundaries
from ..data.token_rows import TokenDataset, check_token_ids
from ..data.vocabulary import end_tokens
from ..locks import only_writer
from .folder import (
    AUX,
    DOCUMENTS,
    HEAD,
    LAST,
    MANIFEST,
    SAFETENSORS_NAMES,
    SCHEMA,
    StoredStatesError,
    digest,
    file_names,
    fingerprint,
    fingerprint_data,
    fingerprint_weights,
    read_manifest,
    shard_name,
    stored_positions,
)
from .head_check import check_head_on_sample, refuse_head_without_weight
from .online import OnlineStates
from .plan import StoredSize, format_bytes, free_bytes, plan_shards
from .stored_target import head_tensors

logger = logging.get_logger(__name__)

BOUNDARIES = (
    "i: the input of layer i, which is the host's hidden_states[i]; the number of layers: the output of the last one, "
    "before the final norm; one more: after it; none at all: after the final norm"
)
MAX_LEFT_OUT = 0.01  # the largest share of documents whose states are not finite
TMP = ".tmp"
PACKAGES = ("hf-eagle3", "torch", "transformers", "safetensors")


def default_aux_layer_ids(target: PreTrainedModel) -> tuple[int, ...]:
    """The boundaries a new drafter reads `target` at (`aux_layer_ids` null): 2, the middle, and three before the last.

    Raises:
        ValueError: The target has too few layers for three of them.
    """
    n = target.config.get_text_config(decoder=True).num_hidden_layers
    ids = tuple(sorted(set(default_boundaries(n))))
    if len(ids) < 3 or n < 3:
        raise ValueError(
            f"In a target of {n} layers the usual boundaries 2, n/2 and n-3 are {list(ids)}, not three. Give aux_layer_ids."
        )
    return ids


class StateWriter:
    """Stores the hidden states of a target over a dataset. Nothing is written before `run`.

    Args:
        target: Any decoder of the host whose head is a linear layer.
        dataset: Rows with `input_ids` and `loss_mask`, or with `messages`; as the trainer takes them.
        folder: A new or empty folder, or that of an interrupted run with the same arguments, which then goes on.
        drafter_or_aux_layer_ids: A drafter that fits the target, or ascending boundaries, as
            `Eagle3DrafterConfig.aux_layer_ids` has them. None: those of a new drafter.
        tokenizer: The target's; needed for `messages`. Its fingerprint is stored.
        max_length: Longer rows are cut on the right, unless `dataset` is a `TokenDataset`.
        chat_template_kwargs: For the chat template of every row, such as `{"enable_thinking": False}`.
        dtype: The dtype of the stored states; the target's own if None.
        shard_size: The most bytes of a file.
        batch_tokens: Tokens of one forward of the target, padding included.

    Raises:
        ValueError: The target's head or embeddings cannot be stored, boundaries that it does not have, tokens that it
            does not have, a dtype that cannot be stored, or `chat_template_kwargs` where nothing is rendered.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        dataset: Iterable[Mapping[str, Any]],
        folder: str | os.PathLike,
        drafter_or_aux_layer_ids: DrafterModel | Sequence[int] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        shard_size: int = 10**9,
        batch_tokens: int = 16384,
    ):
        refuse_compiled(target)
        self._target, self._folder, self._tokenizer = target.eval(), Path(folder), tokenizer
        self._text = target.config.get_text_config(decoder=True)
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._dataset = self._tokenize(dataset, max_length)
        check_token_ids(self._dataset, self._text.vocab_size)
        self._dtype = target.dtype if dtype is None else dtype
        if self._dtype not in SAFETENSORS_NAMES:
            raise ValueError(f"States are stored as float32, bfloat16 or float16, got dtype {self._dtype}.")
        if min(shard_size, batch_tokens) < 1:
            raise ValueError(f"shard_size and batch_tokens must be at least 1, got {shard_size} and {batch_tokens}.")
        self._shard_size, self._batch_tokens = shard_size, batch_tokens
        self._boundaries = self._resolve(drafter_or_aux_layer_ids)
        self._head = head_tensors(target)
        self._source = OnlineStates(target, self._boundaries, batch_tokens)
        refuse_head_without_weight(self._source)
        self._aux_bytes = max(1, len(self._boundaries)) * self._text.hidden_size * self._dtype.itemsize
        self._plan = plan_shards(self._dataset, self._aux_bytes, self._last_bytes, shard_size)

    def _tokenize(self, dataset: Iterable[Mapping[str, Any]], max_length: int | None) -> TokenDataset:
        """As the trainer does."""
        if not isinstance(dataset, TokenDataset):
            return TokenDataset(
                dataset,
                self._tokenizer,
                max_length,
                eos_token_ids=end_tokens(self._target),
                chat_template_kwargs=self._template_kwargs,
            )
        if self._template_kwargs:
            raise ValueError(
                f"chat_template_kwargs {self._template_kwargs} are given with a TokenDataset, whose rows are tokens already. "
                "Give them to the TokenDataset."
            )
        return dataset

    @property
    def _last_size(self) -> int:
        """The width of the head's input, which may be narrower than the layers (OPT 350M)."""
        head = self._source.head.weight
        return self._text.hidden_size if head is None else head.shape[-1]

    @property
    def _last_bytes(self) -> int:
        return self._last_size * self._dtype.itemsize

    def _resolve(self, given: DrafterModel | Sequence[int] | None) -> tuple[int, ...]:
        if isinstance(given, DrafterModel):
            return given.bind(self._target).bound_aux_layer_ids or ()
        if given is None:
            return default_aux_layer_ids(self._target)
        ids, n = tuple(given), self._text.num_hidden_layers
        if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > n + 1:
            raise ValueError(
                f"aux_layer_ids must be ascending boundaries from 0 to {n} ({n + 1}: after the final norm) of this target, "
                f"got {list(ids)}."
            )
        return ids

    @property
    def size(self) -> StoredSize:
        """The size of everything on disk."""
        plan = self._plan
        head = sum(tensor.numel() * tensor.element_size() for tensor in self._head.values())
        return StoredSize(
            num_documents=len(plan.lengths),
            num_tokens=int(plan.lengths.sum()),
            num_aux=int(plan.num_aux.sum()),
            num_last=int(plan.num_last.sum()),
            aux_bytes=self._aux_bytes,
            last_bytes=self._last_bytes,
            other_bytes=int(plan.lengths.sum()) * 5 + len(plan.lengths) * 48 + head,
        )

    def run(self) -> Path:
        """Write the files that are missing. Returns the folder.

        Raises:
            StoredStatesError: The folder has states of something else.
            FileExistsError: The folder has other things in it.
            FolderInUseError: Another run writes to it.
            OSError: The disk is too small, or became full; what is written is kept, and can be gone on from.
            ValueError: States that are not finite, or on which the head does not give the target's argmax.
        """
        with ExitStack() as stack:
            if self._folder.is_dir():
                stack.enter_context(only_writer(self._folder))
            manifest = self._begin()
            names = file_names(self._plan.num_shards)
            todo = {name for name in names if not self._is_there(name, manifest["files"].get(name))}
            if not todo:
                logger.info(f"{self._folder} is complete.")
                return self._folder
            self._check_space(todo)
            check_head_on_sample(self._source, self._dataset, self._plan.lengths, self._dtype)
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_writer(self._folder))
            self._write_all(manifest, todo)
        return self._folder

    def _write_all(self, manifest: dict[str, Any], todo: Collection[str]) -> None:
        for leftover in self._folder.glob(f"*{TMP}"):
            leftover.unlink()
        for name in todo:
            manifest["files"].pop(name, None)
        self._write_manifest(manifest, todo)
        if DOCUMENTS in todo:
            self._write_tensors(DOCUMENTS, self._documents(), manifest, todo)
        if HEAD in todo:
            head = {name: tensor.contiguous().cpu() for name, tensor in self._head.items()}
            self._write_tensors(HEAD, head, manifest, todo)
        self._write_shards(manifest, todo)

    # ---- before writing ----

    def _begin(self) -> dict[str, Any]:
        """The manifest to go on with: the folder's if it has one, which must describe the same states."""
        ours = self._manifest()
        if not self._folder.exists() or not any(self._folder.iterdir()):
            return ours
        if not (self._folder / MANIFEST).exists():
            if all(path.suffix == TMP for path in self._folder.iterdir()):
                return ours
            raise FileExistsError(
                f"{self._folder} has something in it, and no {MANIFEST}. Give an empty or new folder."
            )
        theirs = read_manifest(self._folder)
        facts = ("name", "revision", "dtype", "quantization", "weights")
        pairs = {f"target {name}": (theirs["target"].get(name), ours["target"][name]) for name in facts}
        names = ("aux_layer_ids", "dtype", "data", "shard_size", "tokenizer", "chat_template", "chat_template_kwargs")
        pairs |= {name: (theirs.get(name), ours[name]) for name in names}
        if different := [f"{name} {a} there, {b} now" for name, (a, b) in pairs.items() if a != b]:
            raise StoredStatesError(
                f"{self._folder} has states of something else: {'; '.join(different)}. Give another folder, or the arguments "
                "that it was begun with."
            )
        return theirs

    def _manifest(self) -> dict[str, Any]:
        config = json.loads(self._text.to_json_string(use_diff=False))
        quantization = config.pop("quantization_config", None)
        config.pop("_name_or_path", None)
        whole = getattr(self._target.config, "quantization_config", None)
        if quantization is None and whole is not None:
            quantization = whole if isinstance(whole, dict) else whole.to_dict()
        name = self._target.config.name_or_path
        tokenizer = self._tokenizer
        return {
            "schema": SCHEMA,
            "target": {
                "name": name if name and not Path(name).exists() else None,
                "revision": getattr(self._target.config, "_commit_hash", None),
                "dtype": str(self._target.dtype).removeprefix("torch."),
                "quantization": json.loads(json.dumps(quantization, default=str)),
                "weights": fingerprint_weights(self._target),
                "eos_token_id": self._target.generation_config.eos_token_id,
                "config": config,
            },
            "tokenizer": None if tokenizer is None else fingerprint(sorted(tokenizer.get_vocab().items())),
            "chat_template": None if tokenizer is None else fingerprint(tokenizer.chat_template),
            "chat_template_kwargs": json.loads(json.dumps(self._template_kwargs)) or None,
            "aux_layer_ids": list(self._boundaries),
            "boundaries": BOUNDARIES,
            "last_hidden_states": "after the final norm",
            "dtype": str(self._dtype).removeprefix("torch."),
            "hidden_size": self._text.hidden_size,
            "last_size": self._last_size,
            "vocab_size": self._text.vocab_size,
            "num_documents": len(self._plan.lengths),
            "num_tokens": int(self._plan.lengths.sum()),
            "num_shards": self._plan.num_shards,
            "shard_size": self._shard_size,
            "data": fingerprint_data(self._dataset),
            "versions": {name: installed_version(name) for name in PACKAGES},
            "files": {},
        }

    def _is_there(self, name: str, facts: Mapping[str, Any] | None) -> bool:
        path = self._folder / name
        return facts is not None and path.is_file() and path.stat().st_size == facts["bytes"]

    def _check_space(self, todo: Collection[str]) -> None:
        size, plan = self.size, self._plan
        there = [i for i in range(plan.num_shards) if shard_name(i, plan.num_shards) not in todo]
        kept = sum(
            int(counts[plan.members(i)].sum()) * width
            for i in there
            for counts, width in ((plan.num_aux, self._aux_bytes), (plan.num_last, self._last_bytes))
        )
        needed = size.total_bytes - kept
        free = free_bytes(self._folder)
        logger.info(f"{size}; {format_bytes(needed)} are still to be written, {format_bytes(free)} are free.")
        if needed > free:
            raise OSError(
                f"{size}; {format_bytes(needed)} are still to be written to {self._folder}, and {format_bytes(free)} are free "
                "there. Store fewer or shorter rows, in bfloat16, or give a folder on a larger disk."
            )

    # ---- writing ----

    def _write(self, name: str, write: Callable[[Path], Any], todo: Collection[str]) -> None:
        """Write a file so that it is there whole or not at all."""
        path = self._folder / name
        temporary = path.with_name(name + TMP)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            left = sum(not (self._folder / other).exists() for other in todo)
            raise OSError(
                f"{path} could not be written ({error}); {format_bytes(free_bytes(self._folder))} are free there. {left} "
                "files are still to come; those before are whole. Make room, and run the same again to go on."
            ) from error

    def _write_manifest(self, manifest: Mapping[str, Any], todo: Collection[str]) -> None:
        text = json.dumps(manifest, indent=1)
        self._write(MANIFEST, lambda path: path.write_text(text, encoding="utf-8"), todo)

    def _write_tensors(
        self,
        name: str,
        tensors: dict[str, Tensor],
        manifest: dict[str, Any],
        todo: Collection[str],
        left_out: Sequence[int] = (),
    ) -> None:
        """Write a file, then its entry in the manifest, so that every listed file is whole."""
        self._write(name, lambda path: save_file(tensors, path), todo)
        path = self._folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
        if left_out:
            manifest["files"][name]["left_out"] = list(left_out)
        self._write_manifest(manifest, todo)

    def _write_shards(self, manifest: dict[str, Any], todo: Collection[str]) -> None:
        """One shard is written while the target runs over the next."""
        plan, count = self._plan, self._plan.num_shards
        shards = [i for i in range(count) if shard_name(i, count) in todo]
        remaining = sum(int(plan.lengths[plan.members(i)].sum()) for i in shards)
        total = int(plan.lengths.sum())
        num_left_out = sum(len(facts.get("left_out", ())) for facts in manifest["files"].values())
        pending: Future[None] | None = None
        with (
            tqdm(
                total=total,
                initial=total - remaining,
                unit="tok",
                unit_scale=True,
                desc="Storing states",
                disable=None,
            ) as bar,
            ThreadPoolExecutor(1) as disk,
        ):
            for shard in shards:
                tensors, left_out = self._shard(plan.members(shard), bar)
                num_left_out += len(left_out)
                if left_out and num_left_out > MAX_LEFT_OUT * len(plan.lengths):
                    document, where = list(left_out.items())[-1]
                    raise ValueError(
                        f"{num_left_out} of {len(plan.lengths)} documents have hidden states that are not finite in "
                        f"{self._dtype}, document {document} {where}; up to {MAX_LEFT_OUT:.0%} would be left out. Store bfloat16 "
                        f"or float32, or load the target in a wider dtype than {self._target.dtype}."
                    )
                if pending is not None:
                    pending.result()
                pending = disk.submit(
                    self._write_tensors, shard_name(shard, count), tensors, manifest, todo, tuple(left_out)
                )
            if pending is not None:
                pending.result()

    def _documents(self) -> dict[str, Tensor]:
        plan = self._plan
        rows = [self._dataset[i] for i in range(len(self._dataset))]
        columns = {
            "input_ids": np.concatenate([np.asarray(row["input_ids"], dtype=np.int32) for row in rows]),
            "loss_mask": np.concatenate([np.asarray(row["loss_mask"], dtype=bool) for row in rows]),
            "ends": np.cumsum(plan.lengths),
            "shard": plan.shards,
            "aux_start": plan.starts(plan.num_aux),
            "num_aux": plan.num_aux,
            "last_start": plan.starts(plan.num_last),
            "num_last": plan.num_last,
        }
        return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}

    def _shard(self, members: range, bar: tqdm) -> tuple[dict[str, Tensor], dict[int, str]]:
        """The states of consecutive documents, one behind the other, and the place in each document that is not finite."""
        plan, width = self._plan, self._last_size
        aux = torch.empty(int(plan.num_aux[members].sum()), self._aux_bytes // self._dtype.itemsize, dtype=self._dtype)
        last = torch.empty(int(plan.num_last[members].sum()), width, dtype=self._dtype)
        aux_done = last_done = 0
        left_out = {}
        for window in self._windows(members):
            rows = [self._dataset[i] for i in window]
            lengths = [len(row["input_ids"]) for row in rows]
            ids = [torch.from_numpy(np.asarray(row["input_ids"], dtype=np.int64)) for row in rows]
            states = self._source.run(ids, self._target.device)
            parts = zip(states.aux_hidden_states.split(lengths), states.last_hidden_states.split(lengths), strict=True)
            for i, row, (aux_part, last_part) in zip(window, rows, parts, strict=True):
                positions = torch.from_numpy(stored_positions(np.asarray(row["loss_mask"], dtype=bool)))
                kept_aux = aux_part[: int(plan.num_aux[i])].to(self._dtype)
                kept_last = last_part[positions.to(last_part.device)].to(self._dtype)
                if not bool(kept_aux.isfinite().all() & kept_last.isfinite().all()):
                    left_out[i] = self._where_not_finite(kept_aux)
                    logger.warning(f"Document {i} is left out: its hidden states are not finite {left_out[i]}.")
                aux[aux_done : aux_done + len(kept_aux)] = kept_aux
                last[last_done : last_done + len(kept_last)] = kept_last
                aux_done, last_done = aux_done + len(kept_aux), last_done + len(kept_last)
            bar.update(sum(lengths))
        return {AUX: aux, LAST: last}, left_out

    def _windows(self, members: range) -> Iterator[range]:
        """Consecutive documents of about four forwards, so that similar lengths can run side by side."""
        first, used = members.start, 0
        for i in members:
            length = int(self._plan.lengths[i])
            if used and used + length > 4 * self._batch_tokens:
                yield range(first, i)
                first, used = i, 0
            used += length
        yield range(first, members.stop)

    def _where_not_finite(self, aux: Tensor) -> str:
        chunks = aux.split(self._text.hidden_size, dim=-1)
        bad = [b for b, c in zip(self._boundaries or ("final",), chunks, strict=True) if not bool(c.isfinite().all())]
        return f"at boundaries {bad}" if bad else "after the final norm"


def store_states(
    target: PreTrainedModel,
    dataset: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike,
    drafter_or_aux_layer_ids: DrafterModel | Sequence[int] | None = None,
    **options: Any,  # StateWriter's
) -> Path:
    """Write the states of `target` over `dataset` to `folder`, or go on; arguments as for `StateWriter`."""
    return StateWriter(target, dataset, folder, drafter_or_aux_layer_ids, **options).run()
