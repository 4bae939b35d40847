"""Rounds over scripted laws, many rows at once: the real draft, accept and commit between a target and a drafter of tables."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.distributions import TINY_V
from hf_eagle3.decoding.state import RoundState
from hf_eagle3.drafters.chain import CHAIN
from hf_eagle3.drafters.draft import (
    DrafterKind,
    DrafterMemory,
    choose_greedy,
    make_choose_sampled,
    make_choose_shared,
)
from hf_eagle3.rows.masks import BY_ROWS
from hf_eagle3.speculation.accept import BLOCK, RULES, SHARED, Judging
from hf_eagle3.speculation.noise import GlobalNoise
from hf_eagle3.speculation.shape import DraftShape
from hf_eagle3.speculation.shared_noise import SharedNoise
from hf_eagle3.speculation.verdict import Proposal
from hf_eagle3.speculation.warpers import RowSettings, RowWarper

CPU = torch.device("cpu")
ROOT = 2  # the last token of each prompt


class Tables(NamedTuple):
    """What follows each token. The last row of `q` is what a parallel drafter says behind a mask."""

    p: Tensor  # [V, V] logits
    q: Tensor  # [V+1, V_d] logits
    ids: Tensor  # [V_d] the target ids of draft ids


def make_tables(seed: int, V_d: int, *, spread: float = 1.5) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    p = spread * torch.randn(TINY_V, TINY_V, generator=generator)
    q = spread * torch.randn(TINY_V + 1, V_d, generator=generator)
    return Tables(p, q, torch.randperm(TINY_V, generator=generator)[:V_d].sort().values)


class NoCache:
    """Stands for the caches of either model."""

    capacity = num_visible = 10**6

    def writing(self, block):
        self.block = block
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def keep(self, start, path):
        self.kept = path


class ScriptedDrafter:
    """Says what its table has for each token; what precedes it does not matter."""

    config = SimpleNamespace(_attn_implementation=BY_ROWS)
    dtype = torch.float32

    def __init__(self, tables: Tables):
        self.tables = tables
        self.num_fed: list[int] = []  # tokens of each forward

    def __call__(self, input_ids, *, logits_to_keep=None, **_):
        self.num_fed.append(input_ids.shape[1])
        kept = input_ids if logits_to_keep is None else input_ids.gather(1, logits_to_keep)
        return SimpleNamespace(logits=self.tables.q[kept], feedback=torch.zeros(*input_ids.shape, 1))

    def to_target_ids(self, draft_ids):
        return self.tables.ids[draft_ids]

    def with_masks(self, ids, states, num_real):
        is_mask = torch.arange(ids.shape[1]) >= num_real
        return ids.masked_fill(is_mask, TINY_V), states


def draft(tables: Tables, kind: DrafterKind, shape: DraftShape, roots: Tensor, choose) -> tuple[Tensor, Tensor | None]:
    """Draft tokens [B, N], and the q [B, N, V] they were drawn from."""
    B, zeros = len(roots), torch.zeros_like(roots)
    tokens = torch.zeros(B, shape.max_new, dtype=torch.long)
    tokens[:, 0] = roots
    memory = DrafterMemory(tokens, torch.zeros(B, shape.max_new, 1), zeros + 1, zeros, zeros, 0, NoCache())
    drafted = kind.propose(ScriptedDrafter(tables), memory, shape, choose)
    q = drafted.probs
    if q is not None:
        q = torch.zeros(*q.shape[:2], TINY_V).index_copy_(2, tables.ids, q)
    return drafted.tokens, q


def run_rounds(
    tables: Tables,
    shape: DraftShape,
    rule: str,
    settings: list[RowSettings],
    *,
    kind: DrafterKind = CHAIN,
    num_tokens: int = 3,
    make_noise=lambda seeds, length: GlobalNoise(),
    judge=None,
    further=(),
    others: Sequence[tuple[DraftShape, str]] = (),
) -> tuple[Tensor, float]:
    """[B, num_tokens] tokens that rounds emit behind `ROOT`, a row for each of the `settings`; draft tokens kept a round.

    Args:
        make_noise: That of ratio tests.
        judge: Takes the place of the rule's own.
        further: Warpers for all rows.
        others: Shapes and rules of later rounds, by turns with the first.
    """
    turns, B = [(shape, rule), *others], len(settings)
    warper = RowWarper(settings, further, CPU)
    length = torch.full((B,), 7)
    seeds = torch.arange(B) + 1000
    state = RoundState(length, torch.full((B,), ROOT), length[:, None], length[0], seeds, NoCache())
    widest = max(shape.max_new for shape, _ in turns)
    text, num_accepted = torch.zeros(B, num_tokens + widest, dtype=torch.long), 0.0
    for number in range(num_tokens):  # a round gives one at least
        shape, rule = turns[number % len(turns)]
        noise = make_noise(seeds, state.length)
        judging = Judging(shape, noise, SharedNoise(seeds, state.length))
        choose = choose_greedy
        if rule == BLOCK:
            choose = make_choose_sampled(warper, noise)
        elif rule == SHARED:
            choose = make_choose_shared(warper, judging.shared, tables.ids)
        tokens, q = draft(tables, kind, shape, state.root, choose) if shape.num_nodes else (text[:, :0], None)
        scores = warper(tables.p[torch.cat([state.root[:, None], tokens], dim=1)])
        verdict = (judge or RULES[rule].judge)(Proposal(tokens, q), scores, judging)
        start = state.length - 7
        committed = state.commit(Proposal(tokens, q), verdict, None, shape.num_verified)
        at = (start[:, None] + torch.arange(shape.max_new)).clamp(max=text.shape[1] - 1)
        is_new = torch.arange(shape.max_new) < committed.num_new[:, None]
        text.scatter_(1, at, torch.where(is_new, committed.tokens, text.gather(1, at)))
        num_accepted += float(verdict.num_accepted.float().mean()) / num_tokens
    return text[:, :num_tokens], num_accepted


def expected_law(tables: Tables, settings: RowSettings, *, num_tokens: int = 3, further=()) -> Tensor:
    """[V] * num_tokens, the law of what follows `ROOT`."""
    step = RowWarper([settings], further, CPU)(tables.p[None])[0].softmax(-1)  # [V, V]
    probs = step[ROOT]
    for _ in range(num_tokens - 1):
        probs = probs[..., None] * step
    return probs
