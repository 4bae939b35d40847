"""What a call has said so far, row by row, and every promise about it: where rows end, what is streamed and returned.

All in host terms. The decode loop appends verified tokens, one at a time and in order.
"""

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from ..tensor_parallel import Agree, keep

# Criteria that decide each row by its own tokens, so that they may be asked row by row.
BY_ROW_CRITERIA = (MaxTimeCriteria, StopStringCriteria)


class Transcript:
    """The new tokens of B rows.

    Rows may be ahead of one another. Criteria that may look at the whole batch, and the streamer, get one column after
    the other, each once all rows have it and exactly as plain decoding shows it: rows that ended earlier are padded. A
    row that was ahead of the column where such a criterion ends it is cut back.

    Args:
        prompt: [B, T] as plain decoding would show it, pads on the left.
        num_hidden: [B] pads of each row that nobody is shown.
        criteria: The call's.
        pad_token_id: For rows that end before others.
        streamer: The call's; gets a column [B] once all rows have it.
        in_step: Whether all rows are as long as one another, since a processor looks at the whole batch.
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
        in_step: bool = False,
        keep_scores: bool = False,
        keep_logits: bool = False,
        agree: Agree = keep,
    ):
        B, T = prompt.shape
        self.prompt, self.streamer, self.pad_token_id = prompt, streamer, pad_token_id
        self.num_hidden, self.agree = num_hidden, agree
        self.texts: list[list[int]] = [[] for _ in range(B)]
        self.finish: list[int | None] = [None] * B  # new tokens at which a row's criteria first agreed
        # What plain decoding shows after `num_columns` of them, [B, T + n], and what each was chosen by, [B, V].
        self.shown = prompt if B > 1 else prompt[:, num_hidden[0] :]
        self.known: tuple[Tensor, ...] | None = () if keep_scores else None
        self.num_columns = 0
        self.scores: list[list[Tensor]] | None = [[] for _ in range(B)] if keep_scores else None  # [V] each
        self.logits: list[list[Tensor]] | None = [[] for _ in range(B)] if keep_logits else None

        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self.max_new = min(lengths) - T if lengths else None
        eos = [c.eos_token_id.tolist() for c in criteria if type(c) is EosTokenCriteria]
        self.eos = {token for ids in eos for token in ids}
        # The host pads finished rows only where some criterion has an end-of-sequence token.
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self.row_criteria = [c for c in others if type(c) in BY_ROW_CRITERIA]
        self.batch_criteria = StoppingCriteriaList([c for c in others if type(c) not in BY_ROW_CRITERIA])
        # Criteria that may read scores are shown those of rows that have ended, too, which only rows in step compute.
        self.in_step = in_step or (B > 1 and keep_scores and bool(self.batch_criteria))

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
        if self.row_criteria and self.finish[row] is None:
            prefix = self.prefix(row)
            answers = [bool(criterion(prefix, None).all()) for criterion in self.row_criteria]
            is_done = is_done or bool(self.agree(torch.tensor(answers, device=prefix.device).long()).any())
        if is_done and self.finish[row] is None:
            self.finish[row] = len(text)
        return not self.is_live(row)

    def append_column(self, tokens: list[int], scores: Tensor, logits: Tensor) -> None:
        """Add a token of each row and what they were chosen by, [B, V] each, where rows are as long as one another.

        A row that has ended gets no token, but the scores that plain decoding computes for it behind its end.
        """
        for row, token in enumerate(tokens):
            if not self.is_padded(row):
                self.append(row, token, scores[row], logits[row])
                continue
            for kept, given in ((self.scores, scores), (self.logits, logits)):
                if kept is not None:
                    kept[row].append(given[row].to(torch.float32, copy=True))
        self.show()

    @property
    def num_tokens(self) -> list[int]:
        """New tokens of each row so far."""
        return [len(text) for text in self.texts]

    def is_padded(self, row: int) -> bool:
        """Whether a row has ended and pads follow."""
        return self.pads and self.finish[row] is not None

    @property
    def pad(self) -> int:
        """What follows rows that end before others."""
        assert self.pad_token_id is not None  # the host takes an end-of-sequence token where it has no other
        return self.pad_token_id

    @property
    def num_padded(self) -> int:
        """How many rows have ended and are padded."""
        return sum(self.is_padded(row) for row in range(len(self.texts)))

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

    def show(self) -> None:
        """Ask criteria about each column that all rows have, and stream it."""
        is_shown = self.in_step or bool(self.batch_criteria)
        while (is_shown or self.streamer is not None) and (self.length is None or self.num_columns < self.length):
            column = [self._token(row, self.num_columns) for row in range(len(self.texts))]
            if any(token is None for token in column):
                return
            self.num_columns += 1
            if is_shown:
                new = torch.tensor(column, dtype=self.shown.dtype, device=self.shown.device)
                self.shown = torch.cat([self.shown, new[:, None]], dim=-1)
            if self.batch_criteria:
                self._ask()
            if self.streamer is not None:
                self.streamer.put(torch.tensor(column, dtype=torch.long))

    def _ask(self) -> None:
        """Ask the criteria that may look at the whole batch about what is shown, as the host's `_sample` does."""
        if self.scores is not None and self.known is not None:
            self.known = (*self.known, torch.stack([rows[self.num_columns - 1] for rows in self.scores]))
        answers = self.batch_criteria(self.shown, self.known)
        is_done = ((1 & ~answers) == 0).reshape(len(self.texts), -1).all(-1)  # [B]
        for row, is_over in enumerate(self.agree(is_done.long()).tolist()):
            if is_over:
                self._end(row, self.num_columns)

    def _end(self, row: int, length: int) -> None:
        """End a row after `length` new tokens, however far ahead it is."""
        finish = self.finish[row]
        self.finish[row] = length if finish is None else min(finish, length)
        if self.pads:
            for kept in (self.texts, self.scores, self.logits):
                if kept is not None:
                    del kept[row][length:]

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
