"""One request: its text so far, and every promise about it alone."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria

from ..speculation.stats import Speculation
from ..speculation.warpers import RowSettings
from ..tensor_parallel import Agree, keep


class Batch(Protocol):
    """The batch that a row belongs to."""

    pads: bool  # whether pads follow rows that have ended

    @property
    def length(self) -> int | None:
        """New tokens in each row of the output, once known."""


class Taken(NamedTuple):
    """What a round gave a row, before anything was cut off."""

    room: int  # draft tokens that could have been kept
    start: int  # new tokens before the round
    end: int  # and after it


class Row:
    """The new tokens of one request. The engine appends verified tokens, one at a time and in order.

    Whatever its processors and criteria raise ends this row alone: it is kept in `error`.

    Args:
        prompt: [1, T] as plain decoding would show it to a row by itself, without pads.
        max_new: Tokens that it may get, if there is a limit.
        eos: Tokens that end it.
        criteria: Those that decide by the row's own tokens.
        processors: The call's, as they see this row alone; they are asked if some of them look at the text, its own or
            another row's.
        settings: What tokens are sampled by, if none does.
        looks_at_text: Whether some of its own do, beside rows whose processors do not.
        seed: What they are drawn by; None: PyTorch's generator, which all rows of a batch share.
        keep_scores: Keep what each token was chosen by.
        keep_logits: Keep the target's logits for each token.
        agree: Makes one of what several processes of a target would say of an end.
    """

    def __init__(
        self,
        prompt: Tensor,
        *,
        max_new: int | None = None,
        eos: Sequence[int] = (),
        criteria: Sequence[StoppingCriteria] = (),
        processors: LogitsProcessorList | None = None,
        settings: RowSettings | None = None,
        looks_at_text: bool = False,
        seed: int | None = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        agree: Agree = keep,
    ):
        self.prompt, self.max_new, self.eos, self.criteria = prompt, max_new, frozenset(eos), criteria
        self.processors = LogitsProcessorList() if processors is None else processors
        self.settings, self.seed, self.agree = settings or RowSettings(), seed, agree
        self.looks_at_text = looks_at_text
        self.start = 0  # slots up to which its text begins, at most; the engine says so
        self.text: list[int] = []
        self.finish: int | None = None  # new tokens at which the criteria first agreed
        self.scores: list[Tensor] | None = [] if keep_scores else None  # [V] each
        self.logits: list[Tensor] | None = [] if keep_logits else None
        self.error: Exception | None = None
        self.batch: Batch | None = None  # if it is one of several
        self._taken: list[Taken] = []

    @classmethod
    def make_ended(cls, prompt: Tensor) -> "Row":
        """A row that has ended before its first token, for a place in a batch that nobody has."""
        row = cls(prompt)
        row.end(0, cuts=False)
        return row

    @property
    def is_live(self) -> bool:
        """Whether the row has more to say. Where the host does not pad, it goes on until the last row is finished."""
        if self.finish is None:
            return True
        if self.batch is None or self.batch.pads or self.error is not None:
            return False
        if self.max_new is not None and len(self.text) >= self.max_new:
            return False
        return self.batch.length is None or len(self.text) < self.batch.length

    @property
    def num_left(self) -> float:
        """Most tokens that it may still get."""
        return float("inf") if self.max_new is None else self.max_new - len(self.text)

    def prefix(self) -> Tensor:
        """[1, T + n] the row as plain decoding would show it."""
        new = torch.tensor([self.text], dtype=self.prompt.dtype, device=self.prompt.device)
        return torch.cat([self.prompt, new], dim=-1)

    def append(self, token: int, scores: Tensor | None, logits: Tensor | None) -> bool:
        """Add a verified token and what it was chosen by, [V] each; whether the row says no more."""
        self.text.append(token)
        for kept, given in ((self.scores, scores), (self.logits, logits)):
            if kept is not None:
                assert given is not None
                kept.append(given.to(torch.float32, copy=True))
        is_done = token in self.eos or (self.max_new is not None and len(self.text) >= self.max_new)
        if self.criteria and self.finish is None:
            prefix = self.prefix()
            answers = [bool(criterion(prefix, None).all()) for criterion in self.criteria]
            is_done = is_done or bool(self.agree(torch.tensor(answers, device=prefix.device).long()).any())
        if is_done and self.finish is None:
            self.finish = len(self.text)
        return not self.is_live

    def end(self, length: int, *, cuts: bool) -> None:
        """End the row after `length` new tokens, however far ahead it is; `cuts` takes off what lies behind."""
        self.finish = length if self.finish is None else min(self.finish, length)
        for kept in (self.text, self.scores, self.logits) if cuts else ():
            if kept is not None:
                del kept[length:]

    def fail(self, error: Exception) -> None:
        """End the row here, with an error that is its own."""
        self.error = error
        self.end(len(self.text), cuts=False)

    def took_part(self, num_drafted: int, start: int) -> None:
        """Note a round over `num_drafted` draft tokens, before which the row had `start` new ones."""
        # Near the length limit the last draft tokens never had a chance.
        room = num_drafted if self.max_new is None else min(num_drafted, self.max_new - start - 1)
        self._taken.append(Taken(room, start, len(self.text)))

    def count(self, *speculations: Speculation, length: int | None = None) -> None:
        """Count its rounds, up to where the text ends, at the latest after `length` new tokens."""
        end = len(self.text) if length is None else min(len(self.text), length)
        for room, start, end_of_round in self._taken:
            if (new := min(end_of_round, end) - start) > 0:
                for speculation in speculations:
                    speculation.count(room, new - 1)
