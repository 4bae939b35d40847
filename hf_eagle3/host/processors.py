"""The call's processors, made to see each row alone."""

import copy
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
)

# Packages whose processors treat each row by itself: the host's, and those that were tried in batches, row by row.
BY_ROW_PACKAGES = ("transformers", "xgrammar", "outlines", "lmformatenforcer")


# The host's that do not: one asks a function of the user's, one keeps state for all rows.
WHOLE_BATCH_PROCESSORS = (PrefixConstrainedLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


# What processors keep for each prompt: the pads that a repetition penalty skips; prompts, and their n-grams; xgrammar's
# grammars.
HOLDS_ROWS = ("prompt_ignore_length", "encoder_input_ids", "generated_ngrams", "compiled_grammars")


# What they count from the beginning of a prompt with its pads.
COUNTS_FROM_PROMPT = ("prompt_length_to_skip", "regulation_start", "begin_index", "max_length", "prompt_ignore_length")


def looks_at_batch(processor: Any) -> bool:  # Any: whatever may be called
    """Whether a processor may look at the whole batch, or keep what it has seen of all rows in one place."""
    is_foreign = type(processor).__module__.partition(".")[0] not in BY_ROW_PACKAGES
    return is_foreign or type(processor) in WHOLE_BATCH_PROCESSORS


def copy_for_row(processor: LogitsProcessor) -> LogitsProcessor:
    """A copy with containers of its own; what they hold, such as grammars and tokenizers, is shared."""
    copied = copy.copy(processor)
    vars(copied).update({name: copy_containers(value) for name, value in vars(processor).items()})
    return copied


def copy_containers(value: Any) -> Any:  # Any: whatever a processor keeps
    """`value`, with each plain dict and list in it copied."""
    if type(value) is dict:
        return {key: copy_containers(held) for key, held in value.items()}
    return [copy_containers(held) for held in value] if type(value) is list else value


def is_sized(value: Any) -> bool:  # Any: whatever a processor keeps by that name
    """Whether `value` has one entry for each prompt; a number counts for all of them."""
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)


def processors_for_rows(
    processors: LogitsProcessorList, num_hidden: list[int], prompt: Tensor
) -> list[LogitsProcessorList]:
    """For each row the processors that see it alone, in calls of one row and without the `num_hidden` pads of `prompt`.

    For processors that do not look at the whole batch, or for one row. In a batch, one that keeps something between calls
    gets a copy for each row, so that it belongs to one text.
    """
    num_rows = len(num_hidden)
    if num_rows == 1 and not num_hidden[0]:
        return [processors]

    # The host makes a minimum length, pads included, of `min_new_tokens`; one that the user gave counts a row's own.
    has_min_new = any(type(p) is MinNewTokensLengthLogitsProcessor for p in processors)
    counted = (*COUNTS_FROM_PROMPT, *(["min_length"] if has_min_new else []))

    def for_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
        is_hosts = type(processor).__module__.startswith("transformers.")
        counts = {
            name: value - num_hidden[row]
            for name, value in vars(processor).items()
            if name in counted and is_hosts and num_hidden[row] and type(value) is int
        }
        if counts:
            processor = copy.copy(processor)
            vars(processor).update(counts)
        text = prompt[row : row + 1, num_hidden[row] :]
        if num_hidden[row] and type(processor) is EncoderNoRepeatNGramLogitsProcessor:
            return EncoderNoRepeatNGramLogitsProcessor(processor.ngram_size, text)
        by_row = {name: value for name, value in vars(processor).items() if name in HOLDS_ROWS and is_sized(value)}
        if by_row:
            processor = copy_for_row(processor)
            for name, value in by_row.items():
                number = row * len(value) // num_rows  # several rows may answer one prompt
                own = value[number : number + 1]
                if num_hidden[row] and is_hosts and name == "prompt_ignore_length":
                    own = (own - num_hidden[row]).clamp(min=0)
                if num_hidden[row] and is_hosts and name == "encoder_input_ids":
                    own = text
                setattr(processor, name, own)
            if hasattr(processor, "batch_size"):
                processor.batch_size = 1
            return processor
        return processor if is_hosts or num_rows == 1 else copy_for_row(processor)

    return [LogitsProcessorList([for_row(p, row) for p in processors]) for row in range(num_rows)]
