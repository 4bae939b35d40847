"""Accepting token by token in Python, for processors that look at the text. Chains only."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..speculation.accept import Proposal, Verdict, accept_next
from ..speculation.noise import Noise
from ..tensor_parallel import Agree
from .row import Row
from .transcript import Transcript


def accept_in_order(
    proposal: Proposal,
    logits: Tensor,  # [B, K+1, V]
    *,
    rows: list[Row],
    do_sample: bool,
    noise: Noise,
    agree: Agree,
    limits: list[int],  # draft tokens that may be kept, for each of the rows
) -> Verdict:
    """Accept token by token.

    Each token is chosen, appended and only then followed by the next position, so that processors are called with
    exactly the prefixes that become text, once each and in order, as in plain decoding. A row whose processors or
    criteria fail ends there, with their error.
    """
    counts, last = [], []
    for b, row in enumerate(rows):
        own = Proposal(proposal.tokens[b : b + 1], None if proposal.q is None else proposal.q[b : b + 1])
        try:
            count, token = accept_row(
                own,
                logits[b],
                row,
                limit=limits[b],
                do_sample=do_sample,
                noise_at=partial(noise.further, row=b),
                agree=agree,
            )
        except Exception as error:  # noqa: BLE001  the row's own, raised where it is asked for
            row.fail(error)
            count, token = 0, 0
        counts.append(count)
        last.append(token)
    device = proposal.tokens.device
    return Verdict(torch.tensor(counts, device=device), torch.tensor(last, device=device))


def accept_row(
    proposal: Proposal,  # of one row
    logits: Tensor,  # [K+1, V]
    row: Row,
    *,
    limit: int,
    do_sample: bool,
    noise_at: Callable[[int], Noise],  # so many tokens further on
    agree: Agree,
) -> tuple[int, int]:
    """How many draft tokens are kept, and the token behind them; both for a row that has ended are of no account."""
    draft_tokens, q = proposal
    k, token = 0, 0
    for k in range(min(draft_tokens.shape[1], limit) + 1 if row.is_live else 0):
        # [1, V]. Processors that write in place change what is returned as logits, too, as in plain decoding.
        chosen_from = logits[k][None].to(torch.float32, copy=True)
        scores = row.processors(row.prefix(), chosen_from)  # [1, V]
        proposed = draft_tokens[:, k : k + 1]  # [1, 1], or [1, 0] past the last draft token
        q_here = None if q is None else q[:, k : k + 1]  # [1, 0 or 1, V]
        verdict = accept_next(proposed, q_here, scores, do_sample=do_sample, noise=noise_at(k))
        is_kept, next_token = agree(verdict.num_accepted), agree(verdict.next_token)
        is_accepted = bool(is_kept)  # a wait for each token: the next prefix depends on it
        token = int(proposed) if is_accepted else int(next_token)
        is_done = row.append(token, scores[0], chosen_from[0])
        if is_done or not is_accepted:
            break
    # A row that ends on a draft token is dropped, so its next token does not matter.
    return k, token


def accept_in_step(
    proposal: Proposal,
    logits: Tensor,  # [B, K+1, V]
    *,
    transcript: Transcript,
    do_sample: bool,
    noise: Noise,
    agree: Agree,
    limits: list[int],  # draft tokens that may be kept, for each of the rows
) -> Verdict:
    """Accept column by column over all rows, for processors that may look at the whole batch.

    They are called with exactly the batches of plain decoding, once each and in order. Since the next batch depends on
    all rows, the round ends for all where one refuses its draft token. Rows that have ended are in the batches with the
    pads that were put in the place of their drafts; a row that ends here has a draft of its own, so the round ends, too.
    """
    draft_tokens, q = proposal
    B, K = draft_tokens.shape
    rows = transcript.rows
    assert len(rows) == B
    drafts = draft_tokens.tolist()
    last = min([K, *(limit for row, limit in zip(rows, limits, strict=True) if not transcript.is_padded(row))])
    for k in range(last + 1):
        chosen_from = logits[:, k].to(torch.float32, copy=True)  # [B, V]
        scores = transcript.processors(transcript.shown, chosen_from)  # [B, V]
        proposed = draft_tokens[:, k : k + 1]  # [B, 1], or [B, 0] past the last draft token
        q_here = None if q is None else q[:, k : k + 1]  # [B, 0 or 1, V]
        verdict = accept_next(proposed, q_here, scores, do_sample=do_sample, noise=noise.further(k))
        is_kept = agree(verdict.num_accepted).tolist()  # a wait for each column, as in plain decoding
        tokens = agree(verdict.next_token).tolist()
        goes_on = k < last
        for b, row in enumerate(rows):
            if transcript.is_padded(row):
                tokens[b] = transcript.pad
            elif is_kept[b]:
                tokens[b] = drafts[b][k]
            else:
                goes_on = False
        num_padded = transcript.num_padded
        transcript.append_column(tokens, scores, chosen_from)
        if not goes_on or transcript.is_over or transcript.num_padded > num_padded:
            break
    device = draft_tokens.device
    return Verdict(torch.full((B,), k, device=device), torch.tensor(tokens, device=device))


def put_pads(draft_tokens: Tensor, transcript: Transcript) -> None:
    """Let rows that have ended draft their pads, [B, K] in place, as plain decoding goes on with those."""
    if padded := [b for b, row in enumerate(transcript.rows) if transcript.is_padded(row)]:
        draft_tokens[padded] = transcript.pad
