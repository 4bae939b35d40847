"""Block verification, by enumeration: every draft, every number of tokens kept, every token behind them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_eagle3.speculation.block_verification import accept_block, weigh_prefixes, weigh_remainders
from hf_eagle3.speculation.noise import GlobalNoise
from hf_eagle3.speculation.sampling import draw

pytestmark = pytest.mark.any_release


class Laws:
    """Random laws of the next token after each prefix, and all drafts there are.

    Args:
        V: Tokens.
        K: Draft tokens.
        V_d: Of them the drafter proposes only the first so many.
        zeros: Share of tokens that the target never says.
        temperature: Of both.
    """

    def __init__(self, seed: int, V: int, K: int, *, V_d: int | None = None, zeros=0.0, temperature=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.V, self.K = V, K

        def make(k: int, share: float) -> Tensor:
            logits = 2 * torch.randn(V**k, V, generator=generator, dtype=torch.float64) / temperature
            is_out = torch.rand(V**k, V, generator=generator) < share
            is_out[:, int(torch.randint(V, (), generator=generator))] = False
            return logits.masked_fill(is_out, -torch.inf).softmax(-1)  # [V^k, V]

        self.p = [make(k, zeros) for k in range(K + 1)]  # by prefix
        self.q = [make(k, 0.0) for k in range(K)]
        if V_d is not None:
            for q in self.q:
                q[:, V_d:] = 0
                q /= q.sum(-1, keepdim=True)
        self.drafts = torch.tensor(list(itertools.product(range(V), repeat=K))).view(-1, K)  # [V^K, K]
        prefixes = [self.prefix(k) for k in range(K + 1)]
        self.draft_probs = torch.stack([q[at] for q, at in zip(self.q, prefixes[:-1], strict=True)], dim=1)
        self.target_probs = torch.stack([p[at] for p, at in zip(self.p, prefixes, strict=True)], dim=1)
        at = self.draft_probs.gather(2, self.drafts[..., None])[..., 0]
        self.chance = at.prod(-1)  # [V^K], of each draft

    def prefix(self, k: int) -> Tensor:
        """[V^K] the number of each draft's first k tokens."""
        return self.drafts[:, :k] @ torch.tensor([self.V ** (k - 1 - i) for i in range(k)], dtype=torch.long)

    @property
    def wanted(self) -> Tensor:
        """[V] * (K+1), flat."""
        law = torch.ones(1, dtype=torch.float64)
        for p in self.p:
            law = (law[:, None] * p).flatten()
        return law


class Keeps(GlobalNoise):
    """Lets exactly `num` draft tokens be kept, and notes what the next token is drawn from."""

    def __init__(self, num: int):
        self.num = num

    def uniform(self, like, purpose):
        return torch.where(torch.arange(1, like.shape[1] + 1) == self.num, 0.0, 1.0).to(like).expand_as(like)

    def draw(self, weights, purpose):
        self.weights = weights[:, 0]
        return super().draw(weights, purpose)


def chances(laws: Laws) -> Tensor:
    """[V^K, K+1]: how likely each number of draft tokens is kept, given the draft."""
    weights = weigh_prefixes(laws.drafts, laws.draft_probs, laws.target_probs)
    remainders = weigh_remainders(weights, laws.draft_probs, laws.target_probs)
    total = remainders + 1 - weights[:, 1:]
    keeps = torch.where(total > 0, remainders / total.clamp_min(1e-300), 0.0)  # [V^K, K]
    fails_behind = torch.cat([(1 - keeps).flip(1).cumprod(1).flip(1), torch.ones(len(keeps), 1)], dim=1)
    return torch.cat([fails_behind[:, :1], keeps * fails_behind[:, 1:]], dim=1)


def emitted(laws: Laws) -> Tensor:
    """[V] * (K+1), flat: the law of what comes of all drafts; what lies behind the next token is the target's own."""
    law, by_number = torch.zeros_like(laws.wanted), chances(laws)
    for num in range(laws.K + 1):
        noise = Keeps(num)
        verdict = accept_block(laws.drafts, laws.draft_probs, laws.target_probs, noise)
        can_be = by_number[:, num] > 0
        assert (verdict.num_accepted[can_be] == num).all()
        behind = noise.weights / noise.weights.sum(-1, keepdim=True)  # [V^K, V]
        mass = (laws.chance * by_number[:, num])[:, None] * torch.where(can_be[:, None], behind, 0.0)
        part = torch.zeros(laws.V**num, laws.V, dtype=torch.float64).index_add_(0, laws.prefix(num), mass).flatten()
        for p in laws.p[num + 1 :]:
            part = (part[:, None] * p).flatten()
        law += part
    return law


VARIANTS = {
    "plain": {},
    "one_token": {"K": 1},
    "four_tokens": {"V": 3, "K": 4},
    "reduced": {"V_d": 2},
    "zeros": {"zeros": 0.4},
    "reduced_and_zeros": {"V_d": 3, "zeros": 0.3},
    "cold": {"temperature": 0.2},
    "hot": {"temperature": 5.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_emitted_is_distributed_as_the_targets_own(variant):
    """To the last digit."""
    for seed in range(8):
        laws = Laws(seed, **{"V": 4, "K": 3, **VARIANTS[variant]})
        torch.testing.assert_close(emitted(laws), laws.wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_fewer_tokens_are_kept_than_token_by_token(variant):
    """Behind any prefix of a draft, on average over what is drafted behind it: the same draws, decided otherwise."""
    gains = []
    for seed in range(8):
        laws = Laws(seed, **{"V": 4, "K": 3, **VARIANTS[variant]})
        q, p = (x.gather(2, laws.drafts[..., None])[..., 0] for x in (laws.draft_probs, laws.target_probs[:, :-1]))
        one_by_one = (p / q.clamp_min(1e-300)).clamp(max=1).cumprod(1)  # [V^K, K]
        at_least = chances(laws).flip(1).cumsum(1).flip(1)[:, 1:]
        weights = weigh_prefixes(laws.drafts, laws.draft_probs, laws.target_probs)[:, 1:]
        for k in range(laws.K):
            mass = torch.zeros(laws.V ** (k + 1), dtype=torch.float64).index_add_(0, laws.prefix(k + 1), laws.chance)
            kept = torch.zeros_like(mass).index_add_(0, laws.prefix(k + 1), laws.chance * at_least[:, k])
            others = torch.zeros_like(mass).index_add_(0, laws.prefix(k + 1), laws.chance * one_by_one[:, k])
            assert (kept >= others - 1e-12).all()
            # And it is what the weight of the prefix says.
            weighed = torch.zeros_like(mass).index_add_(0, laws.prefix(k + 1), laws.chance * weights[:, k])
            torch.testing.assert_close(kept, weighed, rtol=1e-10, atol=1e-13)
        gains.append(float((laws.chance[:, None] * (at_least - one_by_one)).sum()))
    assert min(gains) > -1e-12
    assert laws.K == 1 or max(gains) > 0.005


def test_one_draft_token_is_the_plain_ratio_test():
    """Given the same numbers, a single draft token is kept if u q < p, and else the residual is drawn from."""
    laws = Laws(3, V=6, K=1)
    torch.manual_seed(1)
    verdict = accept_block(laws.drafts, laws.draft_probs, laws.target_probs)
    torch.manual_seed(1)
    q, p = laws.draft_probs[:, 0], laws.target_probs[:, 0]
    q_at, p_at = (x.gather(1, laws.drafts)[:, 0] for x in (q, p))
    is_kept = torch.rand_like(q_at[:, None])[:, 0] * q_at < p_at
    assert verdict.num_accepted.tolist() == is_kept.long().tolist()
    residual = torch.where(is_kept[:, None], laws.target_probs[:, 1], (p - q).clamp(min=0))
    assert verdict.next_token.tolist() == draw(residual).tolist()


@given(data=st.data(), K=st.integers(0, 4), B=st.integers(1, 3), V=st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_what_is_kept_is_what_p_and_q_allow(data, K, B, V):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    q = (4 * torch.rand(B, K, V, generator=generator)).softmax(-1)
    p = (4 * torch.rand(B, K + 1, V, generator=generator)).softmax(-1)
    is_out = torch.rand(p.shape, generator=generator) < 0.3
    is_out[..., 0] = False
    p = p.masked_fill(is_out, 0)
    p = p / p.sum(-1, keepdim=True)
    tokens = draw(q.view(-1, V)).view(B, K)
    num_accepted, next_token, _ = accept_block(tokens, q, p)
    for b in range(B):
        n = int(num_accepted[b])
        assert 0 <= n <= K
        assert all(p[b, k, tokens[b, k]] > 0 for k in range(n))
        assert p[b, n, next_token[b]] > 0


@pytest.mark.parametrize("K", [1, 2, 5])
def test_equal_laws_are_always_accepted_and_never_nan(K):
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).expand(5_000, K + 1, 4)
    tokens = draw(p[:, :K].flatten(0, 1)).view(-1, K)
    verdict = accept_block(tokens, p[:, :K], p)
    assert verdict.num_accepted.float().mean() > 0.999 * K
    assert verdict.next_token.max() <= 2


def test_refusal_with_nothing_left_falls_back_to_p():
    """P and q differ by rounding, p <= q everywhere, and the draft is refused."""
    p = torch.tensor([[[0.0, 1.0 - 2**-24], [0.5, 0.5]]])
    q = torch.tensor([[[0.0, 1.0]]])
    num_accepted, next_token, _ = accept_block(torch.tensor([[1]]), q, p, Keeps(0))
    assert (num_accepted.tolist(), next_token.tolist()) == ([0], [1])


def test_a_token_that_was_next_to_impossible_spoils_nothing():
    """Q underflows where the token was drawn all the same: a quotient without bounds would be infinite, and then NaN."""
    q = torch.tensor([[[1.0, 1e-45], [0.5, 0.5], [0.5, 0.5]]])
    p = torch.tensor([[[0.5, 0.5], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]])
    weights = weigh_prefixes(torch.tensor([[1, 0, 1]]), q, p)
    assert weights.tolist() == [[1, 1, 0, 0]]
    assert accept_block(torch.tensor([[1, 0, 1]]), q, p, Keeps(3)).num_accepted.tolist() == [0]
