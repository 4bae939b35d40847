"""The host's continuous batching, which does not draft."""

import functools
from collections.abc import Callable
from typing import Any

from transformers import (
    PreTrainedModel,
)

from .refusals import refuse_continuous_batching


# Transformers 5.23 generation/continuous_batching/continuous_api.py:ContinuousMixin
def wrap_continuous_batching(original: Callable) -> Callable:
    """Refuse a drafter, which the host would leave out without a word, or as an argument that it does not know."""

    @functools.wraps(original)
    def continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        refuse_continuous_batching(kwargs.get("assistant_model"))
        return original(self, *args, **kwargs)

    return continuous_batching
