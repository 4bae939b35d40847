"""Training a drafter by training-time test (TTT) against a frozen target."""

from .arguments import Eagle3TrainingArguments
from .data import TokenDataset, choose_draft_vocabulary, count_supervised_tokens, tokenize_conversation
from .new import new_drafter
from .trainer import Eagle3Trainer

__all__ = [
    "Eagle3Trainer",
    "Eagle3TrainingArguments",
    "TokenDataset",
    "choose_draft_vocabulary",
    "count_supervised_tokens",
    "new_drafter",
    "tokenize_conversation",
]
