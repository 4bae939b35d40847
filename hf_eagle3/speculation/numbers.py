"""Numbers on their way to a device, and NaN among logits: found, and named."""

from collections.abc import Sequence

import torch
from torch import Tensor


class NotANumberError(ValueError):
    """The target's logits are NaN."""


def send(values: Sequence | int, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """The `values` on `device`, without a wait for what runs there."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def has_nan(logits: Tensor) -> Tensor:
    """[] bool, whether any row of `logits` [B, V] holds a NaN, the largest of all to PyTorch.

    By the way that finds the largest fastest: argmax among our kernels on a GPU, amax on a CPU.
    """
    largest = logits.gather(-1, logits.argmax(-1)[:, None]) if logits.is_cuda else logits.amax(-1)
    return largest.isnan().any()


def raise_if_nan(is_nan: bool) -> None:
    """Name what would otherwise end in token 0, or in a complaint of the sampler."""
    if is_nan:
        raise NotANumberError(
            "The target's logits are NaN. Its weights are broken, or it overflows in this dtype: load it in bfloat16 "
            "or float32."
        )
