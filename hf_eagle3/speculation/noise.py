"""Where the chance of a round comes from: PyTorch's generator, or a seed for each row."""

from typing import Protocol

import torch
from torch import Tensor

from .sampling import draw

# What a number is for; draft step k is for k.
ACCEPT, RESIDUAL = 1 << 20, (1 << 20) + 1
# Multipliers and shifts of SplitMix64 (Steele, Lea and Flood 2014, figure 16), as int64.
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


class Noise(Protocol):
    """Random numbers of a round. Calls come in the same order in each round."""

    def uniform(self, like: Tensor, purpose: int) -> Tensor:
        """Numbers in [0, 1), of the shape and dtype of `like` [B, n]."""

    def draw(self, weights: Tensor, purpose: int) -> Tensor:
        """[B, n] int64, an index for each of the unnormalised `weights` [B, n, V]."""

    def further(self, offset: int, row: int | None = None) -> "Noise":
        """That of `offset` tokens further on in each text; of a single row of the batch, if one is named."""


class GlobalNoise:
    """PyTorch's generator of the device, as `torch.manual_seed` sets it: rows share one sequence of numbers."""

    def uniform(self, like: Tensor, purpose: int) -> Tensor:  # noqa: ARG002
        """As `Noise`."""
        return torch.rand_like(like)

    def draw(self, weights: Tensor, purpose: int) -> Tensor:  # noqa: ARG002
        """As `Noise`."""
        return draw(weights.flatten(0, 1)).view(weights.shape[:2])

    def further(self, offset: int, row: int | None = None) -> "GlobalNoise":  # noqa: ARG002
        """As `Noise`."""
        return self


class SeededNoise:
    """Numbers that depend on a row's seed, the length of its text and the purpose alone: not on the rest of the batch.

    Args:
        seeds: [B] int64.
        length: [B] int64, verified tokens of each row: read when a number is asked for.
    """

    def __init__(self, seeds: Tensor, length: Tensor):
        self.seeds, self.length = seeds, length

    def uniform(self, like: Tensor, purpose: int) -> Tensor:
        """As `Noise`."""
        n = like.shape[1]
        counter = (self.length[:, None] << 32) + (purpose * 64 + torch.arange(n, device=self.length.device))  # [B, n]
        bits = mix(mix(self.seeds[:, None] + counter * GOLDEN) ^ self.seeds[:, None])
        return ((bits & ((1 << 24) - 1)).double() / (1 << 24)).to(like.device, like.dtype)

    def draw(self, weights: Tensor, purpose: int) -> Tensor:
        """As `Noise`: the index at which the sum of weights passes a number drawn below their total."""
        total = weights.double().cumsum(-1)  # [B, n, V]
        point = self.uniform(total[..., -1], purpose) * total[..., -1]  # [B, n]
        index = torch.searchsorted(total, point[..., None], right=True)[..., 0]
        # Past the last weight above zero there is nothing to draw.
        last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).float().argmax(-1)
        return torch.minimum(index, last)

    def further(self, offset: int, row: int | None = None) -> "SeededNoise":
        """As `Noise`."""
        rows = slice(None) if row is None else slice(row, row + 1)
        return SeededNoise(self.seeds[rows], self.length[rows] + offset)


def mix(x: Tensor) -> Tensor:
    """Scatter the bits of int64 numbers (SplitMix64)."""
    for shift, factor in MIX:
        x = (x >> shift).bitwise_and_((1 << 64 - shift) - 1).bitwise_xor_(x).mul_(factor)
    return (x >> 31).bitwise_and_((1 << 33) - 1).bitwise_xor_(x)
