"""Drafters given to the host's pipelines."""

import functools
import os
from collections.abc import Callable
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedModel,
)

from .refusals import is_drafter, is_drafter_config


# Transformers 5.23 pipelines/base.py:load_assistant_model
def wrap_load_assistant_model(original: Callable) -> Callable:
    """A drafter for a pipeline, given as such or by its name.

    The host looks for its class among its own, and for a tokenizer, which nobody would ask: draft tokens are the target's
    by their ids.
    """

    @functools.wraps(original)
    def load_assistant_model(model: PreTrainedModel, assistant_model: Any, assistant_tokenizer: Any) -> Any:
        drafter = assistant_model
        if isinstance(drafter, (str, os.PathLike)) and is_drafter_config(AutoConfig.from_pretrained(drafter)):
            drafter = AutoModel.from_pretrained(drafter).to(device=model.device, dtype=model.dtype)
        if not is_drafter(drafter) or not model.can_generate():
            return original(model, assistant_model, assistant_tokenizer)
        return drafter, None

    return load_assistant_model
