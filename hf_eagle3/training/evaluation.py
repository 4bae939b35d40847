"""What an evaluation measures: sums over teaching, rounds walked along the answers, and rounds really decoded."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..decoding.arena import release_graphs
from ..modeling import Eagle3DrafterModel
from .data.token_rows import trains_something
from .distributed import sum_over_processes
from .states.stored import NO_DOCUMENT
from .step.acceptance import Walk, walk
from .step.batch import Batch, Collator
from .step.head_loss import StepSums


class ProcessRows(Dataset):
    """The rows of one process of several: each row is some process's, and all have as many.

    Where rows run out, a row of one token fills up, which trains nothing, counts nowhere and is not stored.
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
        """What was cut."""
        return RowsBeyond(self._rows, self._length)


class RowsBeyond(Dataset):
    """Rows that are taught from token `length` on alone; those that have nothing to teach there are left out."""

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


def add_sums(parts: Iterable[StepSums], steps: int, accelerator: Accelerator) -> StepSums:
    """`parts` summed over batches and processes, without `hits`. All processes must call, with any number of parts."""
    device = accelerator.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(5 * steps + 1, dtype=wide, device=device)
    for part in parts:
        total += torch.cat(
            [x.to(wide).reshape(-1) for x in (part.loss, part.correct, part.alpha, part.num_live, part.path)]
            + [part.num_whole.to(wide).reshape(1)]
        )
    loss, correct, alpha, num_live, path = (total := sum_over_processes(accelerator, total))[:-1].view(5, steps)
    whole = total[-1]
    return StepSums(loss, correct, alpha, num_live, path, whole, torch.empty(steps, 0, dtype=torch.bool))


def add_walks(walked: Walk, accelerator: Accelerator) -> Walk:
    """`walked` summed over processes."""
    counts = torch.tensor([walked.rounds, *walked.accepted.tolist()], device=accelerator.device)
    rounds, *accepted = sum_over_processes(accelerator, counts).tolist()
    return Walk(rounds, np.array(accepted, dtype=np.int64))


def walk_batch(hits: Tensor, batch: Batch, *, is_cut: bool = False) -> Walk:
    """`walk` over each document of a batch; `hits` [K, L] as in `StepSums`."""
    rows, trained = batch["rows"].cpu(), batch["trained"]
    mask = batch["loss_mask"].cpu().numpy()
    whole = np.zeros((len(hits), len(mask)), dtype=bool)
    whole[:, (rows if trained is None else rows[trained.cpu()]).numpy()] = hits.cpu().numpy()
    total, start = Walk(0, np.zeros(len(hits), dtype=np.int64)), 0
    for length in batch["lengths"]:
        total += walk(whole[:, start : start + length], mask[start : start + length], is_cut=is_cut)
        start += length
    return total


def by_step(prefix: str, sums: StepSums) -> dict[str, float]:
    """Mean loss and accuracy of each step."""
    count = sums.num_live.clamp_min(1)
    means = {"loss": (sums.loss / count).tolist(), "accuracy": (sums.correct / count).tolist()}
    return {f"{prefix}{name}_{t}": value for name, values in means.items() for t, value in enumerate(values)}


def simulated_acceptance_length(sums: StepSums, depth: int) -> float:
    """1 + the sum over t of the mean over the data of the products of min(1, q/p) up to step t.

    What speculative sampling gains a round, without bias if the data were sampled from the target at the temperature
    they will be decoded with. NaN if no slot has as many steps.
    """
    return float(1 + (sums.path[:depth] / sums.num_whole).sum())


def prompts_of(rows: Any, count: int) -> Iterator[Tensor]:  # Any: rows by index, of whatever class
    """[T] int64 of the first `count` rows: what stands before the first token that the target generated."""
    for i in range(min(count, len(rows))):
        ids, mask = np.asarray(rows[i]["input_ids"]), np.asarray(rows[i]["loss_mask"], dtype=bool)
        if (length := int(mask.argmax())) > 0:
            yield torch.from_numpy(ids[:length].astype(np.int64))


@torch.no_grad()
def generate_and_count(
    target: PreTrainedModel, drafter: Eagle3DrafterModel, prompts: Iterable[Tensor], depth: int, max_new_tokens: int
) -> Walk:
    """Decode greedily from each of `prompts` [T] with the real loop, and count its rounds."""
    total = Walk(0, np.zeros(depth, dtype=np.int64))
    for prompt in prompts:
        ids = prompt[None].to(target.device)
        out = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            assistant_model=drafter,
            num_assistant_tokens=depth,
            return_dict_in_generate=True,
        )
        accepted = np.zeros(depth, dtype=np.int64)
        counts = out.speculation.rounds_accepting[:depth]
        accepted[: len(counts)] = counts
        total += Walk(out.speculation.rounds, accepted)
    if target.device.type == "cuda":
        release_graphs()  # training needs the memory
        torch.cuda.empty_cache()
    return total


@torch.no_grad()
def generate_and_walk(
    target: PreTrainedModel,
    prompts: Iterable[Tensor],
    max_new_tokens: int,
    collate: Collator,
    find_hits: Callable[[Batch], Tensor],
) -> Walk:
    """What `generate_and_count` counts, for a target that no drafter can assist.

    The target answers each of `prompts` [T] greedily by itself, and rounds are walked along its answers.

    Args:
        target: Answers.
        prompts: What it answers.
        max_new_tokens: Of an answer.
        collate: Makes a batch of one row.
        find_hits: [K, L] as in `StepSums`, of a batch.
    """
    total = Walk(0, np.zeros(collate.ttt_steps, dtype=np.int64))
    for prompt in prompts:
        ids = prompt[None].to(target.device)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        text = target.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].cpu().numpy()
        batch = collate([{"input_ids": text, "loss_mask": np.arange(len(text)) >= len(prompt)}])
        total += walk_batch(find_hits(batch), batch, is_cut=len(text) == len(prompt) + max_new_tokens)
    return total
