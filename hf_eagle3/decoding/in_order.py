"""Accepting token by token in Python, for processors that look at the text."""

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..speculation.accept import Verdict, accept_next
from ..tensor_parallel import Agree
from .transcript import Transcript


def accept_in_order(
    draft_tokens: Tensor,  # [B, K]
    q: Tensor | None,  # [B, K, V], None for a greedy draft
    logits: Tensor,  # [B, K+1, V]
    *,
    rows: list[int],
    transcript: Transcript,
    processors: list[LogitsProcessorList],
    do_sample: bool,
    agree: Agree,
    limits: list[int],  # draft tokens that may be kept, for each of the rows
) -> Verdict:
    """Accept token by token in Python, for processors that look at the text.

    Each token is chosen, appended and only then followed by the next position, so that processors are called with
    exactly the prefixes that become text, once each and in order, as in plain decoding.
    """
    K = draft_tokens.shape[1]
    counts, last = [], []
    for b, row in enumerate(rows):
        k, token = 0, 0
        for k in range(min(K, limits[b]) + 1 if transcript.is_live(row) else 0):
            # [1, V]. Processors that write in place change what is returned as logits, too, as in plain decoding.
            chosen_from = logits[b, k][None].to(torch.float32, copy=True)
            scores = processors[row](transcript.prefix(row), chosen_from)  # [1, V]
            proposed = draft_tokens[b : b + 1, k : k + 1]  # [1, 1], or [1, 0] past the last draft token
            q_here = None if q is None else q[b : b + 1, k : k + 1]  # [1, 0 or 1, V]
            verdict = accept_next(proposed, q_here, scores, do_sample=do_sample)
            verdict = Verdict(*map(agree, verdict))
            is_accepted = bool(verdict.num_accepted)  # a wait for each token: the next prefix depends on it
            token = int(proposed) if is_accepted else int(verdict.next_token)
            is_done = transcript.append(row, token, scores[0], chosen_from[0])
            if is_done or not is_accepted:
                break
        # A row that ends on a draft token is dropped, so its next token does not matter.
        counts.append(k)
        last.append(token)
    device = draft_tokens.device
    return Verdict(torch.tensor(counts, device=device), torch.tensor(last, device=device))


def accept_in_step(
    draft_tokens: Tensor,  # [B, K]
    q: Tensor | None,  # [B, K, V], None for a greedy draft
    logits: Tensor,  # [B, K+1, V]
    *,
    rows: list[int],  # all of them: none leaves
    transcript: Transcript,
    processors: list[LogitsProcessorList],  # one, for all rows
    do_sample: bool,
    agree: Agree,
    limits: list[int],  # draft tokens that may be kept, for each of the rows
) -> Verdict:
    """Accept column by column over all rows, for processors that may look at the whole batch.

    They are called with exactly the batches of plain decoding, once each and in order. Since the next batch depends on
    all rows, the round ends for all where one refuses its draft token. Rows that have ended are in the batches with the
    pads that were put in the place of their drafts; a row that ends here has a draft of its own, so the round ends, too.
    """
    B, K = draft_tokens.shape
    assert len(rows) == B == len(transcript.texts)
    drafts = draft_tokens.tolist()
    last = min([K, *(limits[b] for b in range(B) if not transcript.is_padded(b))])
    for k in range(last + 1):
        chosen_from = logits[:, k].to(torch.float32, copy=True)  # [B, V]
        scores = processors[0](transcript.shown, chosen_from)  # [B, V]
        proposed = draft_tokens[:, k : k + 1]  # [B, 1], or [B, 0] past the last draft token
        q_here = None if q is None else q[:, k : k + 1]  # [B, 0 or 1, V]
        verdict = accept_next(proposed, q_here, scores, do_sample=do_sample)
        is_kept, tokens = (agree(x).tolist() for x in verdict)  # a wait for each column, as in plain decoding
        goes_on = k < last
        for b in range(B):
            if transcript.is_padded(b):
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
    if padded := [b for b in range(len(draft_tokens)) if transcript.is_padded(b)]:
        draft_tokens[padded] = transcript.pad
