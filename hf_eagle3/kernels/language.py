"""Triton where it is installed. Without it the kernels' modules still import, for their eager twins."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["is_available", "jit", "require", "round_up_to_power", "shared_memory", "tl"]


# Errors of a kernel that does not compile for a card, or needs more memory than the card has.
KERNEL_ERRORS: tuple[type[Exception], ...] = ()
if triton is not None:
    from triton.errors import TritonError

    KERNEL_ERRORS = (TritonError,)


def jit(*unspecialized: str) -> Callable[[Callable], Any]:
    """`triton.jit`, or nothing where there is no Triton.

    Args:
        unspecialized: Integers for whose values no kernel of their own is compiled.
    """
    if triton is None:
        return lambda kernel: kernel
    return triton.jit(do_not_specialize=list(unspecialized))


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _let_the_interpreter_count() -> None:
    """NumPy 2.4 refuses int() of an array with one element, which Triton 3.6's interpreter uses for scalars."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


if triton is not None and is_interpreted():
    _let_the_interpreter_count()


def is_available(device: torch.device) -> bool:
    """Whether kernels can run on tensors of `device`."""
    return triton is not None and (device.type == "cuda" or is_interpreted())


def require(device: torch.device) -> None:
    """Raise unless kernels can run on `device`."""
    if triton is None:
        raise ImportError("This needs Triton, which comes with PyTorch for CUDA: pip install triton")
    if device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"Kernels run on CUDA tensors, got one on {device}. Call the eager twin, or set TRITON_INTERPRET=1 before "
            "importing to run in Triton's interpreter."
        )


def round_up_to_power(n: int) -> int:
    """The smallest power of two that is at least `n` >= 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor: 228 KiB on an H100, 100 KiB on a card for games."""
    if device.type != "cuda":
        return 228 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
