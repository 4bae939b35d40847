"""From rows of any accepted format to token rows with a loss mask.

The best rows are token-native: the prompt's ids and the very ids the target sampled. Conversations in text are rendered
by the target's own chat template, and their assistant turns found by comparing renderings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...modeling.text_eagle3 import show
from .checking import check_row
from .conversations import find_conversation
from .files import DataError, FileRow
from .rendering import ChatRenderer, TokenRow, find_turns, merge_turns

logger = logging.get_logger(__name__)

MAX_ID = np.iinfo(np.int32).max


@dataclass
class DataCounts:
    """Counts of the rows that a `TokenDataset` was given."""

    num_read: int = 0  # rows as given
    num_made: int = 0  # token rows made of them: a conversation whose history is rewritten gives one a turn
    num_left_out: int = 0  # those without two generated tokens in a row within max_length
    num_cut: int = 0  # those longer than max_length
    num_cut_tokens: int = 0
    num_turns: int = 0  # assistant turns in text
    num_unterminated: int = 0  # those without a token that ends the target's turns


class TokenDataset(Dataset):
    """Rows for the trainer, tokenised once.

    Args:
        rows: Each with `input_ids` and `loss_mask`; or with `messages`, `conversations`, or `prompt` and `completion`.
            Beside these, `tools` and `chat_template_kwargs` go to the chat template, and `source` names where it is from.
        tokenizer: The target's; needed for text.
        max_length: Longer rows are cut on the right.
        eos_token_ids: What ends the target's turns, beside the tokenizer's own: `generation_config.eos_token_id`.
        chat_template_kwargs: For the chat template of every row, such as `{"enable_thinking": False}`.

    Rows too short to draft in (answers of one token, or cut before their second) are left out, with a warning.

    Raises:
        DataError: A row has none of the forms, no generated token at all, or nothing else: the message names the row, and
            the file where that is known.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self._ids: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self.sources: list[str | None] = []  # of each row that is kept
        self.counts = DataCounts()
        self._renderer = (
            None
            if tokenizer is None
            else ChatRenderer(tokenizer, tuple(eos_token_ids), dict(chat_template_kwargs or {}))
        )
        for number, row in enumerate(rows):
            self.counts.num_read += 1
            place = f"{row.place}: " if isinstance(row, FileRow) else ""
            try:
                for token_row in self._tokenize(row):
                    self._add(token_row, max_length, row.get("source"))
            except (ValueError, OverflowError, RecursionError) as error:
                raise DataError(f"{place}Row {number}: {error}") from error
        self._warn(max_length)
        if not self._ids:
            raise ValueError("The training data is empty: no row is left to train on.")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"input_ids": self._ids[index], "loss_mask": self._masks[index]}

    def _tokenize(self, row: Mapping[str, Any]) -> list[TokenRow]:
        check_row(row)
        if row.get("input_ids") is not None and row.get("loss_mask") is not None:
            return [TokenRow(row["input_ids"], row["loss_mask"])]
        conversation = find_conversation(row)
        if conversation is None:
            raise ValueError(
                "it must have messages, or conversations, or prompt and completion, or input_ids and loss_mask; it has "
                f"{sorted(key for key in row if row[key] is not None)}."
            )
        if self._renderer is None:
            raise ValueError("it is text; give processing_class, the target's tokenizer.")
        tokenizer = self._renderer.tokenizer
        if (
            isinstance(row.get("completion"), str)
            and isinstance(row.get("prompt"), str)
            and not tokenizer.chat_template
        ):
            return [_continue_text(row["prompt"], row["completion"], tokenizer)]
        if not tokenizer.chat_template:
            raise ValueError(
                "it is a dialogue, and the tokenizer has no chat template to write it with. Set tokenizer.chat_template to "
                "the target's, or give prompt and completion as texts, or input_ids and loss_mask."
            )
        turns = find_turns(conversation, self._renderer)
        self.counts.num_turns += len(turns)
        self.counts.num_unterminated += sum(not self._renderer.is_terminated(turn) for turn in turns)
        return merge_turns(turns)

    def _add(self, row: TokenRow, max_length: int | None, source: str | None) -> None:
        self.counts.num_made += 1
        ids, mask = read_row(row)
        if max_length is not None and len(ids) > max_length:
            self.counts.num_cut += 1
            self.counts.num_cut_tokens += len(ids) - max_length
            ids, mask = ids[:max_length], mask[:max_length]
        if not trains_something(mask):
            self.counts.num_left_out += 1
            return
        self._ids.append(ids)
        self._masks.append(mask)
        self.sources.append(source)

    def _warn(self, max_length: int | None) -> None:
        counts = self.counts
        if counts.num_left_out:
            logger.warning(
                f"{counts.num_left_out} of {counts.num_made} rows are left out: a draft needs two generated tokens in a "
                f"row, after the first token and within max_length ({max_length})."
            )
        if counts.num_cut:
            logger.info(f"{counts.num_cut} of {counts.num_made} rows are cut to {max_length} tokens.")
        if counts.num_unterminated:
            logger.warning(
                f"{counts.num_unterminated} of {counts.num_turns} assistant turns end without a token that is known to end "
                "the target's turns; a special token at the very end is taken for one. Give eos_token_ids, the target's "
                "generation_config.eos_token_id."
            )


def _continue_text(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """A row of plain text for a target without a chat template, ended by its end-of-sequence token."""
    prompt_ids = list(tokenizer(prompt)["input_ids"])
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids.pop()
    ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return TokenRow(prompt_ids + ids, [0] * len(prompt_ids) + [1] * len(ids))


def read_row(row: TokenRow) -> tuple[np.ndarray, np.ndarray]:
    """The ids [T] int32 and the mask [T] bool of `row`.

    Raises:
        ValueError: They are not lists of numbers, or the mask cannot be one.
    """
    ids, mask = _read_numbers("input_ids", row.input_ids, Integral), _read_numbers("loss_mask", row.loss_mask, Real)
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids)} input_ids but {len(mask)} loss_mask entries.")
    if len(strange := np.unique(mask[(mask != 0) & (mask != 1)])):
        raise ValueError(f"loss_mask must be 1 on generated tokens and 0 elsewhere, got {strange[:4].tolist()} too.")
    if not mask.any():
        raise ValueError(f"it has nothing to learn from: loss_mask marks none of its {len(mask)} tokens as generated.")
    if mask.all():
        raise ValueError(
            f"it has no prompt: loss_mask marks all of its {len(mask)} tokens as generated. The target generates after a "
            "prompt, if only a beginning-of-sequence token; mark with 0 what it was given."
        )
    if ids.min() < 0 or ids.max() > MAX_ID:
        raise ValueError(
            f"input_ids must be the target's token ids, 0 or more, got {ids.min()} to {ids.max()}. Make the rows with the "
            "target's own tokenizer."
        )
    return ids.astype(np.int32), mask.astype(bool)


def _read_numbers(name: str, values: Any, kind: type) -> np.ndarray:  # Any: whatever stands in the row
    """`values` as an array [T] of numbers of `kind`."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):  # lists of several lengths, or a tensor on a GPU
        array = np.empty((), dtype=object)
    if array.dtype == object and array.ndim == 1 and all(isinstance(x, kind) for x in array):
        array = np.asarray(array.tolist())  # as pandas keeps them; objects still where one is huge
    if array.ndim == 1 and (array.dtype.kind in ("iu" if kind is Integral else "iubf") or not len(array)):
        return array
    got = show(values)
    if array.ndim == 1:
        items = list(values) if isinstance(values, (list, tuple)) else array.tolist()
        wrong = next((i for i, x in enumerate(items) if not isinstance(x, kind)), 0)
        got = f"{show(items[wrong])} at place {wrong}"
    what = "one whole number" if kind is Integral else "0 or 1"
    raise ValueError(f"{name} must be a flat list with {what} for each token, got {got}. Write it as such a list.")


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
