"""Shared noise: what the numbers are, and that they are independent and Gumbel distributed."""

import math

import pytest
import torch
from helpers.distributions import ALPHA
from scipy.stats import chisquare, kstest

from hf_eagle3.speculation.noise import GOLDEN, SeededNoise
from hf_eagle3.speculation.shared_noise import (
    NUM_AT_ONCE,
    SharedNoise,
    add_noise,
    draw_seed,
    make_bits,
    make_keys,
    make_noise,
    to_gumbel,
)

pytestmark = pytest.mark.any_release

SEEDS, POSITIONS = torch.arange(40), torch.arange(1, 31)


def splitmix(state: int, count: int) -> list[int]:
    """The generator as it was published."""
    mask, out = (1 << 64) - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        out.append(z ^ (z >> 31))
    return out


@pytest.mark.parametrize("seed", [0, 1, 7, 2**62 - 1])
def test_bits_are_those_of_splitmix(seed):
    """A generator seeded by the row gives a key for each position, and one seeded by that a number for each token."""
    (start,) = splitmix(seed, 1)
    keys = splitmix(start, 9)
    expected = [[number >> 33 for number in splitmix(key, 20)] for key in keys]
    ours = make_keys(torch.tensor([seed]), torch.arange(9)[None])
    assert [key % (1 << 64) for key in ours[0].tolist()] == keys
    assert make_bits(ours[0, :, None], torch.arange(20)).tolist() == expected


def test_numbers_are_what_they_were():
    """A seed gives the same text in later versions."""
    keys = make_keys(torch.tensor([7]), torch.tensor([[5]]))
    assert make_bits(keys, torch.tensor([0, 1, 49_151])).flatten().tolist() == [82423912, 32167962, 314232373]


def test_noise_is_gumbel_distributed():
    noise = make_noise(make_keys(SEEDS, POSITIONS.expand(40, 30)), torch.arange(50)).flatten()
    assert kstest(noise.double().numpy(), "gumbel_r").pvalue > ALPHA
    assert abs(float(noise.mean()) - 0.5772) < 0.02


def test_the_ends_of_the_noise_are_finite():
    ends = to_gumbel(torch.tensor([0, 1, 2**31 - 2, 2**31 - 1]))
    torch.testing.assert_close(ends[:2], torch.tensor([32 * math.log(2), 31 * math.log(2) - math.log(1.5)]))
    assert ends[0] > ends[1] > 0 > ends[2] >= ends[3]
    assert ends[3] > -3


def test_noise_is_as_exact_as_its_digits():
    bits = torch.cat([torch.arange(3000), 2**31 - 1 - torch.arange(3000), torch.randint(2**31, (20_000,))])
    exact = -(-torch.log1p(-(bits.float() + 0.5).double() * ((1 - 2**-24) / 2**31))).log()
    assert (to_gumbel(bits) - exact).abs().max() < 3e-6


@pytest.mark.parametrize("along", ["seeds", "positions", "tokens"])
def test_neighbours_are_independent(along):
    """Pairs of numbers of neighbouring seeds, positions and tokens fill the square evenly."""
    dim = ["seeds", "positions", "tokens"].index(along)
    numbers = make_bits(make_keys(SEEDS, POSITIONS.expand(40, 30))[..., None], torch.arange(50)) >> 27  # 0..15
    one, other = numbers.narrow(dim, 0, numbers.shape[dim] - 1), numbers.narrow(dim, 1, numbers.shape[dim] - 1)
    counts = torch.bincount((one * 16 + other).flatten(), minlength=256)
    assert chisquare(counts.numpy()).pvalue > ALPHA


def test_one_bit_of_a_seed_turns_half_of_the_bits():
    seeds = torch.cat([torch.tensor([12345]), 12345 ^ (1 << torch.arange(62))])
    bits = make_bits(make_keys(seeds, torch.full((63, 1), 9)), torch.arange(64))  # [63, 64]
    turned = sum((bits[1:] ^ bits[:1]) >> k & 1 for k in range(31)).double() / 31
    assert abs(float(turned.mean()) - 0.5) < 0.01
    assert ((turned.mean(-1) - 0.5).abs() < 0.06).all()


def test_it_is_not_the_noise_of_ratio_tests():
    seeds, length = torch.arange(2000), torch.full((2000,), 9)
    theirs = SeededNoise(seeds, length).uniform(torch.zeros(2000, 1), 0)[:, 0]
    ours = make_bits(make_keys(seeds, length[:, None]), torch.arange(1))[:, 0] / 2**31
    assert abs(float(torch.corrcoef(torch.stack([theirs, ours]))[0, 1])) < 0.1


def test_noise_of_many_is_that_of_each():
    keys = make_keys(torch.arange(3), torch.arange(4).expand(3, 4))
    ids = torch.arange(NUM_AT_ONCE // 5)  # so that they are made part by part
    whole = make_noise(keys, ids)
    for b in range(3):
        for i in range(4):
            assert torch.equal(whole[b, i], to_gumbel(make_bits(keys[b, i], ids)))


def test_noise_goes_by_position_and_token_alone():
    shared = SharedNoise(torch.tensor([5, 6]), torch.tensor([10, 20]))
    scores, ids = torch.randn(2, 4, 9), torch.tensor([2, 3, 5, 7])
    chain = shared.perturb(scores, range(4)) - scores
    key = make_keys(torch.tensor([5]), torch.tensor([[11]]))
    torch.testing.assert_close(chain[0, 1], make_noise(key, torch.arange(9))[0, 0])
    tree = shared.perturb(scores, range(3), places=torch.tensor([0, 1, 1, 2])) - scores
    torch.testing.assert_close(tree, chain[:, [0, 1, 1, 2]])
    level = shared.perturb(scores[..., :4], range(2, 3), ids=ids) - scores[..., :4]
    torch.testing.assert_close(level, chain[:, 2:3, ids].expand(2, 4, 4))
    alone = shared.of_row(1).perturb(scores[1:], range(4)) - scores[1:]
    torch.testing.assert_close(alone, chain[1:])
    shared.length += 1
    torch.testing.assert_close(shared.perturb(scores[:, 1:], range(3)) - scores[:, 1:], chain[:, 1:])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_noise_of_few_tokens_is_theirs_among_all(share):
    """Where most tokens are impossible, their noise is not made."""
    scores, keys = torch.randn(3, 5, 300), make_keys(torch.arange(3), torch.arange(4).expand(3, 4))
    places, ids = torch.tensor([0, 1, 1, 3, 2]), torch.randperm(900)[:300]
    is_out = torch.rand(scores.shape) < share
    for given in [(keys[:, [0, 1, 2, 3, 3]], None, None), (keys, places, ids), (keys[:, 1:2], None, ids)]:
        whole = add_noise(scores, *given)
        assert torch.equal(
            add_noise(scores.masked_fill(is_out, -torch.inf), *given), whole.masked_fill(is_out, -torch.inf)
        )


def test_what_is_impossible_stays_so():
    scores = torch.full((50, 2, 6), -torch.inf)
    scores[:, :, 4] = -1e30
    noisy = add_noise(scores, make_keys(torch.arange(50), torch.arange(2).expand(50, 2)))
    assert (noisy.argmax(-1) == 4).all()
    assert noisy.isneginf().sum() == 50 * 2 * 5


def test_a_seed_is_drawn_by_pytorchs_generator():
    torch.manual_seed(3)
    drawn = [draw_seed() for _ in range(3)]
    torch.manual_seed(3)
    assert [draw_seed() for _ in range(3)] == drawn
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**62 for seed in drawn)


def test_the_golden_ratio_is_odd():
    """So that no two tokens have the same number."""
    assert GOLDEN % 2 == 1
