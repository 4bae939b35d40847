"""The texts of a batch so far, column by column, as the host shows them."""

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..tensor_parallel import Agree, keep
from .row import Row


class Transcript:
    """The new tokens of B rows, in host terms.

    Rows may be ahead of one another. Criteria that may look at the whole batch, and the streamer, get one column after
    the other, each once all rows have it and exactly as plain decoding shows it: rows that ended earlier are padded. A
    row that was ahead of the column where such a criterion ends it is cut back.

    Args:
        rows: Of the batch.
        prompt: [B, T] as plain decoding would show it, pads on the left.
        criteria: Those of the call that may look at the whole batch.
        pads: Whether the host pads rows that have ended.
        pad_token_id: For rows that end before others.
        streamer: The call's; gets a column [B] once all rows have it.
        processors: The call's, as they see all rows, where these are in step.
        in_step: Whether all rows are as long as one another, since a processor looks at the whole batch.
        agree: Makes one of what several processes of a target would say of an end.
    """

    def __init__(
        self,
        rows: list[Row],
        prompt: Tensor,
        *,
        criteria: StoppingCriteriaList,
        pads: bool,
        pad_token_id: int | None,
        streamer: BaseStreamer | None,
        processors: LogitsProcessorList | None = None,
        in_step: bool = False,
        agree: Agree = keep,
    ):
        self.rows, self.streamer, self.agree = rows, streamer, agree
        self.criteria, self.pads, self.pad_token_id = criteria, pads, pad_token_id
        self.processors = LogitsProcessorList() if processors is None else processors
        for row in rows:
            row.batch = self
        # What plain decoding shows after `num_columns` of them, [B, T + n], and what each was chosen by, [B, V].
        self.shown = prompt if len(rows) > 1 else rows[0].prompt
        self.known: tuple[Tensor, ...] | None = None if rows[0].scores is None else ()
        self.num_columns = 0
        # Criteria that may read scores are shown those of rows that have ended, too, which only rows in step compute.
        self.in_step = in_step or (len(rows) > 1 and self.known is not None and bool(criteria))

    def append_column(self, tokens: list[int], scores: Tensor, logits: Tensor) -> None:
        """Add a token of each row and what they were chosen by, [B, V] each, where rows are as long as one another.

        A row that has ended gets no token, but the scores that plain decoding computes for it behind its end.
        """
        for b, row in enumerate(self.rows):
            if not self.is_padded(row):
                row.append(tokens[b], scores[b], logits[b])
                continue
            for kept, given in ((row.scores, scores), (row.logits, logits)):
                if kept is not None:
                    kept.append(given[b].to(torch.float32, copy=True))
        self.show()

    def is_padded(self, row: Row) -> bool:
        """Whether a row has ended and pads follow."""
        return self.pads and row.finish is not None

    @property
    def pad(self) -> int:
        """What follows rows that end before others."""
        assert self.pad_token_id is not None  # the host takes an end-of-sequence token where it has no other
        return self.pad_token_id

    @property
    def num_padded(self) -> int:
        """How many rows have ended and are padded."""
        return sum(map(self.is_padded, self.rows))

    @property
    def length(self) -> int | None:
        """New tokens in each row of the output, once known."""
        finishes = [row.finish for row in self.rows if row.finish is not None]
        return max(finishes) if len(finishes) == len(self.rows) else None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return not any(row.is_live for row in self.rows)

    def _token(self, row: Row, step: int) -> int | None:
        """What the output has there; None if not known yet."""
        if self.pads and row.finish is not None and step >= row.finish:
            return self.pad_token_id
        return row.text[step] if step < len(row.text) else None

    def show(self) -> None:
        """Ask criteria about each column that all rows have, and stream it."""
        is_shown = self.in_step or bool(self.criteria)
        while (is_shown or self.streamer is not None) and (self.length is None or self.num_columns < self.length):
            column = [self._token(row, self.num_columns) for row in self.rows]
            if any(token is None for token in column):
                return
            self.num_columns += 1
            if is_shown:
                new = torch.tensor(column, dtype=self.shown.dtype, device=self.shown.device)
                self.shown = torch.cat([self.shown, new[:, None]], dim=-1)
            if self.criteria:
                self._ask()
            if self.streamer is not None:
                self.streamer.put(torch.tensor(column, dtype=torch.long))

    def _ask(self) -> None:
        """Ask the criteria that may look at the whole batch about what is shown, as the host's `_sample` does."""
        if self.known is not None:
            scores = [row.scores[self.num_columns - 1] for row in self.rows if row.scores is not None]
            self.known = (*self.known, torch.stack(scores))
        answers = self.criteria(self.shown, self.known)
        is_done = ((1 & ~answers) == 0).reshape(len(self.rows), -1).all(-1)  # [B]
        for row, is_over in zip(self.rows, self.agree(is_done.long()).tolist(), strict=True):
            if is_over:
                row.end(self.num_columns, cuts=self.pads)

    def sequences(self, prompt: Tensor) -> Tensor:
        """[B, T + n]: `prompt` [B, T] as it was given, the new tokens, pads."""
        assert self.length is not None
        new = [[self._token(row, step) for step in range(self.length)] for row in self.rows]
        return torch.cat([prompt, torch.tensor(new, dtype=prompt.dtype, device=prompt.device)], dim=-1)

    @property
    def scores(self) -> tuple[Tensor, ...] | None:
        """What tokens were chosen by, as the host returns it: [B, V] for each new token; zeros behind a row's end."""
        return self._columns([row.scores for row in self.rows])

    @property
    def logits(self) -> tuple[Tensor, ...] | None:
        """Likewise the target's logits."""
        return self._columns([row.logits for row in self.rows])

    def _columns(self, kept: list[list[Tensor] | None]) -> tuple[Tensor, ...] | None:
        rows = [row for row in kept if row is not None]
        if not rows or self.length is None:
            return None
        nothing = torch.zeros_like(rows[0][0])
        return tuple(
            torch.stack([row[step] if step < len(row) else nothing for row in rows]) for step in range(self.length)
        )
