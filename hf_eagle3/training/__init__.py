"""Training a drafter by training-time test (TTT) against a frozen target."""

from .arguments import Eagle3TrainingArguments
from .data import TokenDataset
from .new import new_drafter
from .rendering import ChatRenderer, tokenize_conversation
from .state_writer import StateWriter, store_states
from .stored_states import StoredStates, StoredStatesError
from .trainer import Eagle3Trainer
from .vocabulary import (
    choose_draft_vocabulary,
    count_supervised_tokens,
    find_special_tokens,
    measure_coverage,
    vocabulary_fingerprint,
)

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
    "new_drafter",
    "store_states",
    "tokenize_conversation",
    "vocabulary_fingerprint",
]
