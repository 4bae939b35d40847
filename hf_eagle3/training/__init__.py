"""Training a drafter by training-time test (TTT), online, against a frozen target."""

from .data import TokenDataset, choose_draft_vocabulary, count_supervised_tokens, tokenize_conversation
from .new import new_drafter
from .state_writer import StateWriter, store_states
from .stored_states import StoredStates, StoredStatesError
from .trainer import Eagle3Trainer, Eagle3TrainingArguments

__all__ = [
    "Eagle3Trainer",
    "Eagle3TrainingArguments",
    "StateWriter",
    "StoredStates",
    "StoredStatesError",
    "TokenDataset",
    "choose_draft_vocabulary",
    "count_supervised_tokens",
    "new_drafter",
    "store_states",
    "tokenize_conversation",
]
