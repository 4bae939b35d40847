"""The plan of a folder of states: which document goes into which shard, and the size of everything.

It needs lengths and masks alone, so the size is known before anything is written, and a run that goes on writes the very
files that the first one would have written.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.token_rows import TokenDataset
from .folder import stored_positions


@dataclass(frozen=True)
class StoredSize:
    """The size of a dataset's stored states."""

    num_documents: int
    num_tokens: int
    num_aux: int  # tokens whose aux states are stored
    num_last: int  # tokens whose last hidden state is stored
    aux_bytes: int  # of one token
    last_bytes: int  # of one token
    other_bytes: int  # ids, masks, index, head and embeddings

    @property
    def total_bytes(self) -> int:
        """The size of the whole folder."""
        return self.num_aux * self.aux_bytes + self.num_last * self.last_bytes + self.other_bytes

    def __str__(self) -> str:
        return (
            f"{self.num_documents} documents of {self.num_tokens} tokens take {format_bytes(self.total_bytes)}: aux states "
            f"of {self.num_aux} tokens at {self.aux_bytes} bytes, last states of {self.num_last} at {self.last_bytes}, and "
            f"{format_bytes(self.other_bytes)} of ids, head and embeddings"
        )


@dataclass(frozen=True)
class Plan:
    """The shard of each document."""

    lengths: np.ndarray  # [D]
    num_aux: np.ndarray  # [D]
    num_last: np.ndarray  # [D]
    shards: np.ndarray  # [D], ascending

    @property
    def num_shards(self) -> int:
        """The number of files of states."""
        return int(self.shards[-1]) + 1

    def members(self, shard: int) -> range:
        """The documents of a shard."""
        first, end = np.searchsorted(self.shards, [shard, shard + 1])
        return range(int(first), int(end))

    def starts(self, counts: np.ndarray) -> np.ndarray:
        """[D] the first row of each document in its shard, of `counts` [D] rows each."""
        before = np.cumsum(counts) - counts
        return before - before[np.searchsorted(self.shards, self.shards)]


def plan_shards(dataset: TokenDataset, aux_bytes: int, last_bytes: int, shard_size: int) -> Plan:
    """Documents in order, into shards of up to `shard_size` bytes; a larger document has a shard to itself."""
    counts = np.zeros((3, len(dataset)), dtype=np.int64)
    shards = np.zeros(len(dataset), dtype=np.int64)
    shard = used = 0
    for i in range(len(dataset)):
        row = dataset[i]
        positions = stored_positions(np.asarray(row["loss_mask"], dtype=bool))
        counts[:, i] = len(row["input_ids"]), positions[-1] if len(positions) else 0, len(positions)
        size = counts[1, i] * aux_bytes + counts[2, i] * last_bytes
        if used and used + size > shard_size:
            shard, used = shard + 1, 0
        shards[i] = shard
        used += size
    return Plan(lengths=counts[0], num_aux=counts[1], num_last=counts[2], shards=shards)


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, which need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def format_bytes(count: int) -> str:
    """A size in powers of a thousand, such as 32.8 GB."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
