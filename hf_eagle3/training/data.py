"""From conversations to token rows with a loss mask, and from token rows to the draft vocabulary.

The best rows are token-native: the prompt's ids and the very ids the target sampled. Conversations in text are rendered
by the target's own chat template, and their assistant turns found by comparing renderings.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)


class TokenRow(NamedTuple):
    """One sequence; `loss_mask` is 1 on tokens the target generated, end of turn included."""

    input_ids: list[int]
    loss_mask: list[int]


def tokenize_conversation(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """Render `messages` (`role`, `content`) by the chat template and mark each assistant turn with its terminator.

    A turn's tokens are those that follow the rendering of all before it with a generation prompt: exactly what the
    target would have generated.

    Raises:
        ValueError: No assistant turn, or a template whose rendering of a prefix is not a prefix of the rendering.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            "A training conversation needs an assistant turn, got roles "
            f"{[message['role'] for message in messages]}. Let the target answer first (examples/regenerate.py)."
        )
    ids = _render(messages, tokenizer)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:i], tokenizer, add_generation_prompt=True)
        through = _render(messages[: i + 1], tokenizer)
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise ValueError(
                f"The chat template renders the conversation up to turn {i} differently once more turns follow, so "
                "its tokens cannot be found. Give one row for each assistant turn, or rows of input_ids and loss_mask."
            )
        turn = through[len(before) :]
        if tokenizer.eos_token_id in turn:  # what the template writes after the terminator is not generated
            turn = turn[: len(turn) - turn[::-1].index(tokenizer.eos_token_id)]
        mask[len(before) : len(before) + len(turn)] = [1] * len(turn)
    return TokenRow(ids, mask)


def _render(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )["input_ids"]
    )


class TokenDataset(Dataset):
    """Rows for the trainer, tokenised once.

    Args:
        rows: Each with `input_ids` and `loss_mask`, or with `messages`.
        tokenizer: Needed for `messages`.
        max_length: Longer rows are cut on the right.

    Rows too short to draft in (answers of one token, or cut before their second) are left out, with a warning.

    Raises:
        ValueError: A row has neither form, or no generated token at all: the message names the row.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ):
        self._ids: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        left_out = 0
        for number, row in enumerate(rows):
            if "input_ids" in row and "loss_mask" in row:
                ids, mask = row["input_ids"], row["loss_mask"]
                if len(ids) != len(mask):
                    raise ValueError(f"Row {number}: {len(ids)} input_ids but {len(mask)} loss_mask entries.")
            elif "messages" in row:
                if tokenizer is None:
                    raise ValueError(f"Row {number} has messages; give processing_class, the target's tokenizer.")
                try:
                    ids, mask = tokenize_conversation(row["messages"], tokenizer)
                except ValueError as error:
                    raise ValueError(f"Row {number}: {error}") from error
            else:
                raise ValueError(f"Row {number} must have messages, or input_ids and loss_mask; it has {sorted(row)}.")
            ids, mask = np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool)
            if not mask.any():
                raise ValueError(
                    f"Row {number} has nothing to learn from: loss_mask marks none of its {len(mask)} tokens as generated."
                )
            ids, mask = ids[:max_length], mask[:max_length]
            if not trains_something(mask):
                left_out += 1
                continue
            self._ids.append(ids)
            self._masks.append(mask)
        if left_out:
            logger.warning(
                f"{left_out} of {number + 1} rows are left out: a draft needs two generated tokens in a row, after the "
                f"first token and within max_length ({max_length})."
            )
        if not self._ids:
            raise ValueError("The training data is empty: no row is left to train on.")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"input_ids": self._ids[index], "loss_mask": self._masks[index]}


def check_token_ids(dataset: TokenDataset, vocab_size: int) -> None:
    """Raise ValueError if a token is none of the target's: on a GPU, looking it up would end the process."""
    for i in range(len(dataset)):
        ids = dataset[i]["input_ids"]
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"The data has token ids {ids.min()} to {ids.max()} in one row, and the target's vocabulary is 0 to "
                f"{vocab_size - 1}. Make the rows with the target's own tokenizer."
            )


def trains_something(loss_mask: np.ndarray) -> bool:
    """Whether any draft step is supervised: two generated tokens in a row, after at least one other."""
    return bool((loss_mask[1:-1] & loss_mask[2:]).any())


def collate(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Pad `rows` on the right: `input_ids` [B, T] int64, `attention_mask` [B, T] int64, `loss_mask` [B, T] bool."""
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.int64),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
        "loss_mask": torch.zeros(len(rows), length, dtype=torch.bool),
    }
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        batch["input_ids"][i, :n] = torch.from_numpy(np.asarray(row["input_ids"], dtype=np.int64))
        batch["attention_mask"][i, :n] = 1
        batch["loss_mask"][i, :n] = torch.from_numpy(np.asarray(row["loss_mask"], dtype=bool))
    return batch


def count_supervised_tokens(dataset: TokenDataset, vocab_size: int) -> Tensor:
    """[V] int64: how often each token stands where the target generated it."""
    supervised = [dataset[i]["input_ids"][dataset[i]["loss_mask"]] for i in range(len(dataset))]
    return torch.from_numpy(np.bincount(np.concatenate(supervised), minlength=vocab_size))


def choose_draft_vocabulary(counts: Tensor, size: int, always: Iterable[int] = ()) -> Tensor:
    """The `size` most frequent target ids, ascending, [V_d] int64; `always` (end-of-turn tokens) are among them.

    Ties, and places left over when fewer distinct tokens were seen, go to the lowest ids (SafeAILab/EAGLE).

    Raises:
        ValueError: `size` exceeds the vocabulary or does not hold `always`.
    """
    always = sorted(set(always))
    if not len(always) <= size <= len(counts):
        raise ValueError(f"draft_vocab_size must lie in {len(always)}..{len(counts)}, got {size}.")
    priority = counts.to(torch.float64)
    priority[always] = torch.inf
    ids = priority.sort(descending=True, stable=True).indices[:size].sort().values
    covered = counts[ids].sum().item() / max(counts.sum().item(), 1)
    logger.info(f"Draft vocabulary: {size} of {len(counts)} tokens cover {covered:.2%} of the supervised tokens.")
    if covered < 0.98:
        logger.warning(
            f"The draft vocabulary of {size} tokens covers only {covered:.1%} of the supervised tokens; what it lacks "
            "can never be accepted. Raise draft_vocab_size."
        )
    return ids
