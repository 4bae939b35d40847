"""Accepting token by token in Python, for processors that look at the text."""

import torch
from torch import Tensor

from ..speculation.accept import GREEDY, RULES, AcceptRule, Judging
from ..speculation.tree import ROOT, find_children, find_heights
from ..speculation.verdict import Proposal, Verdict
from ..tensor_parallel import Agree
from .row import Row
from .transcript import Transcript


class Walk:
    """A way through a row's draft, from the root on: each token that is chosen leads to the child that has it.

    Args:
        tokens: [N], the row's draft.
        children: [N+1][...] the children of the root and of each node.
        limit: Draft tokens that may be kept.
    """

    def __init__(self, tokens: list[int], children: list[list[int]], limit: int):
        self._tokens, self._children, self._limit = tokens, children, limit
        self.node, self.depth = ROOT, 0

    @property
    def offered(self) -> list[int]:
        """The nodes that may follow."""
        return self._children[self.node] if self.depth < self._limit else []

    def find(self, token: int) -> int | None:
        """The child with that token, if there is one."""
        return next((child for child in self.offered if self._tokens[child - 1] == token), None)

    def follow(self, token: int) -> bool:
        """Go on to the child with that token; whether there is one."""
        if (child := self.find(token)) is not None:
            self.node, self.depth = child, self.depth + 1
        return child is not None


def begin_walks(proposal: Proposal, judging: Judging, limits: list[int]) -> list[Walk]:
    """One for each row of a proposal; a walk ends at the root where nothing was proposed."""
    parents = judging.shape.parents if proposal.tokens.shape[1] else ()
    heights = find_heights(parents)
    # Children have different tokens, but for the pads of rows that have ended: those are to go on for as long as they can.
    children = [sorted(nodes, key=lambda node: -heights[node]) for nodes in find_children(parents)]
    return [Walk(tokens, children, limit) for tokens, limit in zip(proposal.tokens.tolist(), limits, strict=True)]


def find_verdict(walks: list[Walk], next_tokens: list[int], proposal: Proposal, judging: Judging) -> Verdict:
    """What came of the walks, each with the token behind it."""
    device = proposal.tokens.device
    num_accepted, next_token = (torch.tensor(x, device=device) for x in ([w.depth for w in walks], next_tokens))
    if judging.shape.is_chain or not proposal.tokens.shape[1]:
        return Verdict(num_accepted, next_token)
    nodes = torch.tensor([walk.node for walk in walks], device=device)
    return Verdict(num_accepted, next_token, judging.shape.paths(device)[nodes])


def offer(proposal: Proposal, walk: Walk) -> Proposal:
    """What the ratio test is given of a `proposal` that is a chain: the next token of each row, if there is one."""
    if proposal.q is None:
        return Proposal(proposal.tokens[:, :0], None)
    at = slice(walk.node, walk.node + len(walk.offered))
    return Proposal(proposal.tokens[:, at], proposal.q[:, at])


def accept_in_order(
    proposal: Proposal,
    logits: Tensor,  # [B, N+1, V]
    *,
    rows: list[Row],
    rule: AcceptRule,
    judging: Judging,
    agree: Agree,
    limits: list[int],  # draft tokens that may be kept, for each of the rows
) -> Verdict:
    """Accept token by token.

    Each token is chosen, appended and only then followed by the next position, so that processors are called with
    exactly the prefixes that become text, once each and in order, as in plain decoding. A row whose processors or
    criteria fail ends there, with their error.
    """
    walks, last = begin_walks(proposal, judging, limits), []
    for b, (row, walk) in enumerate(zip(rows, walks, strict=True)):
        own = Proposal(proposal.tokens[b : b + 1], None if proposal.q is None else proposal.q[b : b + 1])
        try:
            its = RULES[GREEDY] if row.settings.is_greedy else rule  # beside rows that draw
            last.append(accept_row(own, logits[b], row, walk, rule=its, judging=judging.of_row(b), agree=agree))
        except Exception as error:  # noqa: BLE001  the row's own, raised where it is asked for
            row.fail(error)
            last.append(0)
    return find_verdict(walks, last, proposal, judging)


def accept_row(
    proposal: Proposal,  # of one row
    logits: Tensor,  # [N+1, V]
    row: Row,
    walk: Walk,
    *,
    rule: AcceptRule,
    judging: Judging,
    agree: Agree,
) -> int:
    """Walk as far as the tokens that are chosen lead; the token behind. Both are of no account where the row ends."""
    token, goes_on = 0, row.is_live
    while goes_on:
        # [1, V]. Processors that write in place change what is returned as logits, too, as in plain decoding.
        chosen_from = logits[walk.node][None].to(torch.float32, copy=True)
        scores = row.processors(row.prefix(), chosen_from)  # [1, V]
        chosen = rule.choose_next(offer(proposal, walk), scores, walk.depth, judging)
        token = int(agree(chosen))  # a wait for each token: the next prefix depends on it
        goes_on = not row.append(token, scores[0], chosen_from[0]) and walk.follow(token)
    return token


def accept_in_step(
    proposal: Proposal,
    logits: Tensor,  # [B, N+1, V]
    *,
    transcript: Transcript,
    rule: AcceptRule,
    judging: Judging,
    agree: Agree,
    limits: list[int],  # draft tokens that may be kept, for each of the rows
) -> Verdict:
    """Accept column by column over all rows, for processors that may look at the whole batch.

    They are called with exactly the batches of plain decoding, once each and in order. Since the next batch depends on
    all rows, the round ends for all where one refuses its draft token. Rows that have ended are in the batches with the
    pads that were put in the place of their drafts; a row that ends here has a draft of its own, so the round ends, too.
    """
    rows = transcript.rows
    limits = [judging.shape.depth if transcript.is_padded(r) else n for r, n in zip(rows, limits, strict=True)]
    walks = begin_walks(proposal, judging, limits)
    while True:
        nodes = torch.tensor([walk.node for walk in walks], device=logits.device)
        chosen_from = logits[torch.arange(len(rows), device=logits.device), nodes].to(
            torch.float32, copy=True
        )  # [B, V]
        scores = transcript.processors(transcript.shown, chosen_from)  # [B, V]
        chosen = rule.choose_next(offer(proposal, walks[0]), scores, walks[0].depth, judging)
        tokens = agree(chosen).tolist()  # a wait for each column, as in plain decoding
        tokens = [transcript.pad if transcript.is_padded(row) else t for row, t in zip(rows, tokens, strict=True)]
        num_padded = transcript.num_padded
        transcript.append_column(tokens, scores, chosen_from)
        has_ended = transcript.is_over or transcript.num_padded > num_padded
        if has_ended or any(walk.find(token) is None for walk, token in zip(walks, tokens, strict=True)):
            return find_verdict(walks, tokens, proposal, judging)
        for walk, token in zip(walks, tokens, strict=True):
            walk.follow(token)


def put_pads(draft_tokens: Tensor, transcript: Transcript) -> None:
    """Let rows that have ended draft their pads, [B, N] in place, as plain decoding goes on with those."""
    if padded := [b for b, row in enumerate(transcript.rows) if transcript.is_padded(row)]:
        draft_tokens[padded] = transcript.pad
