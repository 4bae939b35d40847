"""What a call has said so far, row by row, and every promise about it: where rows end, what is streamed and returned.

All in host terms. The decode loop appends verified tokens, one at a time and in order.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EosTokenCriteria,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from .peers import Agree, keep


class Transcript:
    """The new tokens of B rows.

    Args:
        prompt: [B, T] as plain decoding would show it, pads on the left.
        num_hidden: [B] pads of each row that nobody is shown.
        criteria: The call's.
        pad_token_id: For rows that end before others.
        streamer: The call's; gets a column [B] once all rows have it.
        agree: Makes one of what several processes of a target would say of an end.
    """

    def __init__(
        self,
        prompt: Tensor,
        criteria: StoppingCriteriaList,
        *,
        num_hidden: list[int],
        pad_token_id: int | None,
        streamer: BaseStreamer | None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        agree: Agree = keep,
    ):
        B, T = prompt.shape
        self.prompt, self.streamer, self.pad_token_id = prompt, streamer, pad_token_id
        self.num_hidden, self.agree = num_hidden, agree
        self.texts: list[list[int]] = [[] for _ in range(B)]
        self.finish: list[int | None] = [None] * B  # new tokens at which a row's criteria first agreed
        self.num_streamed = 0
        self.scores: list[list[Tensor]] | None = [[] for _ in range(B)] if keep_scores else None  # [V] each
        self.logits: list[list[Tensor]] | None = [[] for _ in range(B)] if keep_logits else None

        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self.max_new = min(lengths) - T if lengths else None
        eos = [c.eos_token_id.tolist() for c in criteria if type(c) is EosTokenCriteria]
        self.eos = {token for ids in eos for token in ids}
        # The host pads finished rows only where some criterion has an end-of-sequence token.
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self.criteria = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]

    def prefix(self, row: int) -> Tensor:
        """[1, T + n] the row as plain decoding would show it."""
        new = torch.tensor([self.texts[row]], dtype=self.prompt.dtype, device=self.prompt.device)
        return torch.cat([self.prompt[row : row + 1, self.num_hidden[row] :], new], dim=-1)

    def append(self, row: int, token: int, scores: Tensor | None, logits: Tensor | None) -> bool:
        """Add a verified token of a row and what it was chosen by, [V] each; whether the row says no more."""
        text = self.texts[row]
        text.append(token)
        if self.scores is not None:
            assert scores is not None
            self.scores[row].append(scores.to(torch.float32, copy=True))
        if self.logits is not None:
            assert logits is not None
            self.logits[row].append(logits.to(torch.float32, copy=True))
        is_done = token in self.eos or (self.max_new is not None and len(text) >= self.max_new)
        if self.criteria and self.finish[row] is None:
            prefix = self.prefix(row)
            known = tuple(s[None] for s in self.scores[row]) if self.scores is not None else None
            # Each is asked, as by the host: some count their calls.
            answers = [bool(torch.as_tensor(criterion(prefix, known)).all()) for criterion in self.criteria]
            is_done = is_done or bool(self.agree(torch.tensor(answers, device=prefix.device).long()).any())
        if is_done and self.finish[row] is None:
            self.finish[row] = len(text)
        return not self.is_live(row)

    @property
    def num_tokens(self) -> list[int]:
        """New tokens of each row so far."""
        return [len(text) for text in self.texts]

    def is_live(self, row: int) -> bool:
        """Whether a row has more to say. Where the host does not pad, it goes on until the last row is finished."""
        if self.finish[row] is None:
            return True
        num = len(self.texts[row])
        if self.pads or (self.max_new is not None and num >= self.max_new):
            return False
        return self.length is None or num < self.length

    @property
    def length(self) -> int | None:
        """New tokens in each row of the output, once known."""
        if any(finish is None for finish in self.finish):
            return None
        return max(finish for finish in self.finish if finish is not None)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return not any(self.is_live(row) for row in range(len(self.texts)))

    def _token(self, row: int, step: int) -> int | None:
        """What the output has there; None if not known yet."""
        finish, text = self.finish[row], self.texts[row]
        if self.pads and finish is not None and step >= finish:
            return self.pad_token_id
        return text[step] if step < len(text) else None

    def stream(self) -> None:
        """Pass on each column that all rows have."""
        while self.streamer is not None and (self.length is None or self.num_streamed < self.length):
            column = [self._token(row, self.num_streamed) for row in range(len(self.texts))]
            if any(token is None for token in column):
                return
            self.streamer.put(torch.tensor(column, dtype=torch.long))
            self.num_streamed += 1

    def sequences(self, prompt: Tensor) -> Tensor:
        """[B, T + n]: `prompt` [B, T] as it was given, the new tokens, pads."""
        assert self.length is not None
        new = [[self._token(row, step) for step in range(self.length)] for row in range(len(self.texts))]
        return torch.cat([prompt, torch.tensor(new, dtype=prompt.dtype, device=prompt.device)], dim=-1)

    def columns(self, kept: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
        """Scores or logits as the host returns them, [B, V] for each new token; zeros behind a row's end."""
        if kept is None or self.length is None:
            return None
        nothing = torch.zeros_like(kept[0][0])
        return tuple(
            torch.stack([rows[step] if step < len(rows) else nothing for rows in kept]) for step in range(self.length)
        )


# What processors keep for each prompt: the pads that a repetition penalty skips; prompts, and their n-grams; xgrammar's
# grammars.
HOLDS_ROWS = ("prompt_ignore_length", "encoder_input_ids", "generated_ngrams", "compiled_grammars")


# What they count from the beginning of a prompt with its pads.
COUNTS_FROM_PROMPT = ("prompt_length_to_skip", "regulation_start", "begin_index", "max_length", "prompt_ignore_length")


def is_sized(value: Any) -> bool:  # Any: whatever a processor keeps by that name
    """Whether `value` has one entry for each prompt; a number counts for all of them."""
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)


def processors_for_rows(
    processors: LogitsProcessorList, num_hidden: list[int], prompt: Tensor
) -> list[LogitsProcessorList]:
    """For each row the processors that see it alone, in calls of one row and without the `num_hidden` pads of `prompt`.

    In a batch, a processor of somebody's own gets a shallow copy for each row, so that what it keeps between calls
    belongs to one text. A host processor that asks for the row's number is told it.
    """
    num_rows = len(num_hidden)
    if num_rows == 1 and not num_hidden[0]:
        return [processors]

    # The host makes a minimum length, pads included, of `min_new_tokens`; one that the user gave counts a row's own.
    has_min_new = any(type(p) is MinNewTokensLengthLogitsProcessor for p in processors)
    counted = (*COUNTS_FROM_PROMPT, *(["min_length"] if has_min_new else []))

    def for_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
        if type(processor) is PrefixConstrainedLogitsProcessor:
            ask: Any = processor._prefix_allowed_tokens_fn  # Any: the user's function
            return PrefixConstrainedLogitsProcessor(lambda _, prefix: ask(row, prefix), num_beams=1)
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
            processor = copy.copy(processor)
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
        return processor if is_hosts else copy.copy(processor)

    return [LogitsProcessorList([for_row(p, row) for p in processors]) for row in range(num_rows)]
