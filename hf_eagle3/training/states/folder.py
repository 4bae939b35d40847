"""The layout of a folder of stored hidden states: names of its files, manifest, digests and fingerprints.

The folder has `manifest.json` (its contents, its target, and a digest of every file), `documents.safetensors` (ids, loss
masks, and the place of each document), `head.safetensors` (the target's head and embeddings) and shards of states. The
positions whose states no loss reads are left out:

* the last hidden state is stored at position p if the target generated tokens p and p+1: slot p-1 trains then, against
  the target's logits at p;
* aux hidden states are stored up to the last slot that trains.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...modeling.text_eagle3 import one_line, parse_json, show
from ...modeling.weights_eagle3 import refuse_outside
from ...tensor_parallel import whole
from ..data.token_rows import TokenDataset

SCHEMA = 1
MANIFEST, DOCUMENTS, HEAD = "manifest.json", "documents.safetensors", "head.safetensors"
AUX, LAST = "aux_hidden_states", "last_hidden_states"
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = ("float32", "bfloat16", "float16")
# Tensor of documents.safetensors -> its dtype, and whether it has a number for each token or for each document.
COLUMNS = {
    "input_ids": (np.dtype(np.int32), "token"),
    "loss_mask": (np.dtype(bool), "token"),
    **{
        name: (np.dtype(np.int64), "document")
        for name in ("ends", "shard", "aux_start", "last_start", "num_aux", "num_last")
    },
}
WRITE = "write the states with `hf-eagle3 states`"
AGAIN = "run `hf-eagle3 states` again with the same options, which writes what is missing"


class StoredStatesError(ValueError):
    """Stored hidden states that are not there, damaged, or of something else. Its message is one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def shard_name(index: int, count: int) -> str:
    """The file of shard `index`, from 0, of `count`."""
    return f"states-{index + 1:05d}-of-{count:05d}.safetensors"


def file_names(num_shards: int) -> list[str]:
    """All files of a folder but its manifest."""
    return [DOCUMENTS, HEAD, *(shard_name(i, num_shards) for i in range(num_shards))]


def stored_positions(loss_mask: np.ndarray) -> np.ndarray:
    """[M] int64: where the last hidden state of a document is stored. Its aux states end before the last of these."""
    return np.flatnonzero(loss_mask[1:-1] & loss_mask[2:]) + 1


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            total.update(block)
    return total.hexdigest()


def fingerprint(value: Any) -> str:  # anything JSON knows
    """SHA-256 of a value."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()


def fingerprint_weights(target: PreTrainedModel) -> str:
    """SHA-256 of a few numbers of every weight: another target, or the same after training, has another one.

    Quantised and offloaded weights count by their names alone. Processes that share the target must all call.
    """
    total = hashlib.sha256()
    for name, weight in target.named_parameters():
        total.update(name.encode())
        has_numbers = type(weight) is nn.Parameter or hasattr(weight, "full_tensor")  # not a quantised weight
        if has_numbers and not weight.is_meta:
            total.update(whole(weight.detach()).flatten()[:16].float().cpu().numpy().tobytes())
    return total.hexdigest()


def describe_weights(model_type: str, dtype: str, weights: str) -> str:
    """A target without a name, for messages."""
    return f"{model_type}, {dtype}, weights {weights[:8]}"


def fingerprint_data(dataset: TokenDataset) -> str:
    """SHA-256 of ids and masks."""
    total = hashlib.sha256()
    for i in range(len(dataset)):
        row = dataset[i]
        total.update(len(row["input_ids"]).to_bytes(8, "little"))
        total.update(np.asarray(row["input_ids"], dtype="<i4").tobytes())
        total.update(np.asarray(row["loss_mask"], dtype=bool).tobytes())
    return total.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`.

    Raises:
        StoredStatesError: None is there, or it is not one this version reads.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoredStatesError(
            f"There are no stored hidden states in {folder}: it has no {MANIFEST}. Name another folder, or {WRITE}."
        )
    try:
        refuse_outside(path)
        manifest = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError(f"expected a table, got {show(manifest)}")
    except (OSError, ValueError) as error:
        raise StoredStatesError(f"{path} is damaged ({error}). Delete the folder and {WRITE}.") from error
    if (found := manifest.get("schema")) != SCHEMA:
        raise StoredStatesError(
            f"{path} is of schema {show(found)}, and this version of hf-eagle3 reads {SCHEMA}. Use the version that wrote it "
            f"({show(manifest.get('versions'))}), or {WRITE} of this one."
        )
    check_manifest(path, manifest)
    return manifest


def is_count(value: Any) -> bool:  # Any: whatever JSON can hold
    """Whether `value` is a number of things."""
    return type(value) is int and 0 <= value < 2**48


def are_counts(value: Any) -> bool:  # Any: whatever JSON can hold
    """Whether `value` is a list of numbers of things."""
    return isinstance(value, list) and all(map(is_count, value))


def is_text_or_null(value: Any) -> bool:  # Any: whatever JSON can hold
    """Whether `value` is a text, or not there."""
    return value is None or isinstance(value, str)


# Keys of an entry of `files`.
FILE_KEYS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "bytes": ("a number of bytes", is_count),
    "sha256": ("a digest", lambda x: isinstance(x, str)),
    "left_out": ("a list of documents", lambda x: x is None or are_counts(x)),
}
# Key of the manifest, with dots -> the expected value in words, and its check.
MANIFEST_KEYS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "files": ("a table of files", lambda x: isinstance(x, dict)),
    "num_shards": ("a number from 1 to a million", lambda x: is_count(x) and 1 <= x <= 10**6),
    "dtype": ("float32, bfloat16 or float16", lambda x: isinstance(x, str) and x in DTYPES),
    "hidden_size": ("a number of at least 1", lambda x: is_count(x) and 1 <= x < 2**31),
    "last_size": ("a number of at least 1, or not there", lambda x: x is None or (is_count(x) and 1 <= x < 2**31)),
    "aux_layer_ids": ("a list of boundaries", are_counts),
    "data": ("what is known of the rows", lambda x: x is not None),
    "target": ("a table", lambda x: isinstance(x, dict)),
    "target.name": ("a text or null", is_text_or_null),
    "target.weights": ("a digest", lambda x: isinstance(x, str)),
    "target.dtype": ("a text", lambda x: isinstance(x, str)),
    "target.quantization": ("a text, a table or null", lambda x: x is None or isinstance(x, (str, dict))),
    "target.eos_token_id": (
        "a token id, a list of them, or null",
        lambda x: x is None or type(x) is int or are_counts(x),
    ),
    "target.config": ("a table", lambda x: isinstance(x, dict)),
    "target.config.model_type": ("a text", lambda x: isinstance(x, str)),
    # Configs make a list of this length.
    "target.config.num_hidden_layers": (
        "a number from 1 to 10000",
        lambda x: x is None or (is_count(x) and 1 <= x <= 10**4),
    ),
}


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise unless the manifest has every key that is read, each of its kind.

    Raises:
        StoredStatesError: It lacks one, or lists a file that no such folder has; the message names the key.
    """
    for key, (wanted, fits) in MANIFEST_KEYS.items():
        value: Any = manifest
        for part in key.split("."):
            value = value.get(part)
        if not fits(value):
            got = "is missing" if value is None else f"is {show(value)}"
            raise StoredStatesError(
                f"{path} is damaged: {key} {got}, expected {wanted}. Delete the folder and {WRITE}."
            )
    known = file_names(manifest["num_shards"])
    for name, facts in manifest["files"].items():
        if name not in known:
            raise StoredStatesError(
                f"{path} is damaged: files has {show(name)}, which is no file of {manifest['num_shards']} shards of stored "
                f"states. Delete the folder and {WRITE}."
            )
        for key, (wanted, fits) in FILE_KEYS.items():
            if not isinstance(facts, dict) or not fits(facts.get(key)):
                got = show(facts.get(key) if isinstance(facts, dict) else facts)
                raise StoredStatesError(
                    f"{path} is damaged: files.{name}.{key} must be {wanted}, got {got}. Delete the folder and {WRITE}."
                )
