"""Shared noise: target and drafter choose by the same random numbers, so that they choose alike.

The target's token at a position is the largest of log p + G, and draft tokens there are the largest of log q + G, one of
them for a chain and several for the children of a node. G is Gumbel noise, so the first is drawn from p, whatever was
drafted, and the others are drawn from q without replacement. A draft token is right if it is the target's: nothing is
accepted by chance. So any shape is lossless, and a seed gives the same text with and without a draft.

G is a function of a row's seed, of the position in the row's text and of the token. Its bits are those of SplitMix64
(Steele, Lea and Flood 2014), which a seed and a position start anew: integers, and therefore the same on every device.

Never give a ratio test numbers that its drafts were drawn by: a draft token is then the likelier refused the better its
noise is, and what replaces it is drawn by that noise, too.
"""

from typing import Protocol

import torch
from torch import Tensor

from .noise import GOLDEN, mix

# From 31 bits to (0, 1): the largest of them rounds to the largest float32 below 1.
SCALE = (1 - 2**-24) / 2**31
MAX_SEED = 2**62 - 1
NUM_AT_ONCE = 1 << 18  # numbers, of eight bytes each on the way
FEW = 4  # a part of all from which on to find the possible ones is no gain


def draw_seed() -> int:
    """A seed from PyTorch's generator of the CPU, as `torch.manual_seed` sets it."""
    return int(torch.randint(MAX_SEED + 1, ()))


class AddNoise(Protocol):
    """`add_noise`, or a kernel that does the same."""

    def __call__(self, scores: Tensor, keys: Tensor, places: Tensor | None, ids: Tensor | None) -> Tensor:
        """As `add_noise`."""


def make_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """[B, n] int64: what starts the numbers of each of the `positions` [B, n] of rows with these `seeds` [B]."""
    return mix(mix(seeds[:, None] + GOLDEN) + (positions + 1) * GOLDEN)


def make_bits(keys: Tensor, tokens: Tensor) -> Tensor:
    """[...] int64 in 0..2**31-1: the number of each of the `tokens` for each of the `keys`, which are broadcast."""
    return (mix(keys + (tokens + 1) * GOLDEN) >> 33).bitwise_and_((1 << 31) - 1)


def to_gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise, float32, of numbers in 0..2**31-1. The smallest give the largest noise, and are not rounded."""
    u = bits.float().add_(0.5).mul_(SCALE)
    rest = 1 - u
    # -log(1 - u), an exponential: the error of `rest` cancels in the quotient (Kahan). Devices round `log1p` differently.
    exponential = rest.log().div_(rest - 1).mul_(u)
    return torch.where(rest == 1, u, exponential).log_().neg_()


def make_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """[B, m, V] float32: Gumbel noise of the tokens `ids` [V] for each of the `keys` [B, m]."""
    parts = keys.flatten()[:, None].split(max(1, NUM_AT_ONCE // len(ids)))
    return torch.cat([to_gumbel(make_bits(part, ids)) for part in parts]).view(*keys.shape, len(ids))


def add_noise(scores: Tensor, keys: Tensor, places: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """[B, n, V] float32: `scores` with the noise of each token.

    Args:
        scores: [B, n, V].
        keys: [B, m] int64; as many as scores, or one for all of a row's, or `places` says which.
        places: [n] int64 in 0..m-1, which of the keys each score takes.
        ids: [V] int64, the tokens that scores are of; by default 0..V-1.
    """
    B, n, V = scores.shape
    if ids is None:
        ids = torch.arange(V, device=scores.device)
    if scores.is_cpu and (at := find_few(scores)) is not None:
        of_each = (keys if places is None else keys[:, places]).expand(B, n).flatten()
        noise = to_gumbel(make_bits(of_each[at // V], ids[at % V]))
        out = torch.full((scores.numel(),), -torch.inf)
        out[at] = scores.flatten()[at] + noise
        return out.view(B, n, V)
    noise = make_noise(keys, ids)  # [B, m, V]
    return scores + (noise if places is None else noise[:, places])


def find_few(scores: Tensor) -> Tensor | None:
    """Where `scores` of a CPU are possible at all, if few are: warpers leave few of a vocabulary, and noise is dear there."""
    is_possible = scores.flatten() > -torch.inf
    if int(is_possible.sum()) * FEW > scores.numel():
        return None
    return is_possible.nonzero()[:, 0]


class SharedNoise:
    """The noise of a round.

    Args:
        seeds: [B] int64.
        length: [B] int64, verified tokens of each row: read when noise is asked for.
        add: What adds noise to scores; captured rounds have a kernel.
    """

    def __init__(self, seeds: Tensor, length: Tensor, add: AddNoise = add_noise):
        self.seeds, self.length, self.add = seeds, length, add

    def perturb(
        self, scores: Tensor, depths: range, *, places: Tensor | None = None, ids: Tensor | None = None
    ) -> Tensor:
        """[B, n, V] float32: `scores` and the noise of the tokens that they are of.

        Args:
            scores: [B, n, V], of the token behind each of n nodes.
            depths: Of the nodes, one after the other, or one for all.
            places: [n] int64, which of `depths` each node has, if they are neither.
            ids: [V] int64, the tokens that scores are of; by default 0..V-1.
        """
        ahead = torch.arange(depths.start, depths.stop, device=self.length.device)
        keys = make_keys(self.seeds, self.length[:, None] + ahead)  # [B, m]
        return self.add(scores, keys.to(scores.device), places, ids)

    def of_row(self, row: int) -> "SharedNoise":
        """That of a single row of the batch."""
        rows = slice(row, row + 1)
        return SharedNoise(self.seeds[rows], self.length[rows], self.add)
