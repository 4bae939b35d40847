"""Rows as a trainer is given them, made into rows of tokens by index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .token_rows import TokenDataset, check_token_ids, trains_something


@dataclass(frozen=True)
class RowReader:
    """Tokenises and checks rows for one target.

    Args:
        tokenizer: The target's; needed for text.
        vocab_size: V.
        ends: The tokens that end the target's turns.
        chat_template_kwargs: For the chat template of every row.
        is_quiet: Show no progress.
    """

    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    ends: Sequence[int]
    chat_template_kwargs: Mapping[str, Any] | None
    is_quiet: bool

    def read(self, rows: Any, max_length: int) -> Any:  # rows by index, of any class; None of None
        """`rows`, those in text tokenised and cut to `max_length`."""
        if rows is None:
            return None
        if isinstance(rows, IterableDataset):
            raise ValueError(
                "Rows must have a number and come by index: give a list, or a Dataset that is not a stream."
            )
        dataset: Any = rows
        if not isinstance(rows, Dataset):
            rows = tqdm(rows, desc="Tokenizing", disable=self.is_quiet, leave=False)
            dataset = TokenDataset(
                rows,
                self.tokenizer,
                max_length,
                eos_token_ids=self.ends,
                chat_template_kwargs=self.chat_template_kwargs,
            )
        elif len(dataset) and not isinstance(dataset, TokenDataset):  # a TokenDataset has checked its rows
            _refuse_degenerate_masks(dataset)
        check_token_ids(dataset, self.vocab_size)
        return dataset

    def read_sets(self, rows: Any, max_length: int) -> Any:  # one set of rows, or several by name
        """The same, of one set of rows or of each in a table."""
        if isinstance(rows, dict):
            return {name: self.read(some, max_length) for name, some in rows.items()}
        return self.read(rows, max_length)


def _refuse_degenerate_masks(dataset: Any) -> None:  # rows by index, of any class
    masks = [np.asarray(dataset[i]["loss_mask"], dtype=bool) for i in range(len(dataset))]
    what = "none" if not any(map(trains_something, masks)) else "all" if all(mask.all() for mask in masks) else None
    if what is not None:
        raise ValueError(
            f"There is nothing to learn: of {len(masks)} rows, each marks {what} of its tokens as generated"
            f"{' (or only single ones)' if what == 'none' else ''}. loss_mask must be 1 on what the target generated, "
            "two tokens in a row or more, and 0 on what it was given."
        )
