"""Training a drafter by training-time test (TTT) against a frozen target."""

from .arguments import Eagle3TrainingArguments
from .data.rendering import ChatRenderer, tokenize_conversation
from .data.token_rows import TokenDataset
from .data.vocabulary import (
    choose_draft_vocabulary,
    count_supervised_tokens,
    find_special_tokens,
    measure_coverage,
    vocabulary_fingerprint,
)
from .new_drafter import new_block_drafter, new_drafter
from .states.folder import StoredStatesError
from .states.stored import StoredStates
from .states.writer import StateWriter, store_states
from .trainer import Eagle3Trainer

__all__ = [
    "ChatRenderer",
    "Eagle3Trainer",
    "Eagle3TrainingArguments",
    "StateWriter",
    "StoredStates",
    "StoredStatesError",
    "TokenDataset",
    "choose_draft_vocabulary",
    "count_supervised_tokens",
    "find_special_tokens",
    "measure_coverage",
    "new_block_drafter",
    "new_drafter",
    "store_states",
    "tokenize_conversation",
    "vocabulary_fingerprint",
]
