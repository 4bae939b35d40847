"""Shared by all swaps: may a kernel run, does it agree with a layer, and how it takes the layer's place."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import language

DTYPES = (torch.bfloat16, torch.float16)
HOST_HOOKS = "transformers.utils.output_capturing"
# Experts with another signature, or a card that cannot run the kernel.
UNFIT: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, LookupError, *language.KERNEL_ERRORS)

# Namespace, name in it, the function put there, and the one it replaces.
Swap = tuple[dict[str, Any], str, Callable, Callable]


@dataclass(slots=True)
class Swaps:
    """Layers that `fused` runs as kernels."""

    norms: dict[str, str] = field(default_factory=dict)  # class -> variant
    rotaries: list[str] = field(default_factory=list)  # host modules, by their dotted names
    angles: list[str] = field(default_factory=list)  # classes
    mlps: dict[str, str] = field(default_factory=dict)  # class -> activation
    experts: list[str] = field(default_factory=list)  # classes
    num_groups: int = 0  # query, key and value projections that became one launch


def can_run(*tensors: Tensor) -> bool:
    """Whether a kernel may take these: plain tensors of one 16-bit dtype on a GPU, no gradient to keep, no autocast."""
    first = tensors[0]
    return (
        all(type(x) in (Tensor, nn.Parameter) and x.dtype == first.dtype for x in tensors)
        and first.dtype in DTYPES
        and language.is_available(first.device)
        and not torch.is_autocast_enabled(first.device.type)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` runs hooks.

    The host leaves hooks of its own on a model that has returned hidden states once. They do nothing unless hidden
    states are requested, so they do not count.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != HOST_HOOKS for hook in hooks)


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` just calls the forward of its class: it is neither hooked nor replaced."""
    is_hooked = has_forward_hooks(module) or module._backward_hooks or module._backward_pre_hooks
    return "forward" not in vars(module) and not is_hooked


def takes_one(function: Callable) -> bool:
    """Whether `function`, unbound, needs exactly one argument besides self."""
    _, *parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1 and needed[0].kind is not inspect.Parameter.KEYWORD_ONLY


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results were rounded at the same points: nearly all values equal, the rest adjacent."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    step = torch.finfo(ours.dtype).eps
    are_near = torch.isclose(ours, theirs, rtol=2 * step, atol=step / 16)
    return bool(are_near.all()) and bool((ours == theirs).float().mean() > 0.98)


def random_like(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers in the dtype and on the device of `like`, which leave the caller's random state alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


class ByThread:
    """Calls the function that the current thread has swapped in, or else the original."""

    def __init__(self, original: Callable, *, is_inherited: bool):
        functools.update_wrapper(self, original)
        self.original = original
        self.is_inherited = is_inherited  # the namespace is an instance's, and the original its class's
        self.ours: dict[int, Callable] = {}  # by thread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: whatever the original takes and gives
        return self.ours.get(threading.get_ident(), self.original)(*args, **kwargs)


_namespaces = threading.Lock()  # guards every namespace that holds a `ByThread`


def swap_in(stack: ExitStack, namespace: dict[str, Any], name: str, value: Callable, original: Callable) -> None:
    """Let this thread call `value` by `name` in `namespace`, in place of `original`, until `stack` unwinds."""
    if isinstance(stack, SwapLog):
        stack.swaps.append((namespace, name, value, original))
    with _namespaces:
        standing = namespace.get(name)
        if not isinstance(standing, ByThread):
            standing = namespace[name] = ByThread(original, is_inherited=name not in namespace)
        standing.ours[threading.get_ident()] = value
    stack.callback(_swap_out, namespace, name, standing)


def _swap_out(namespace: dict[str, Any], name: str, standing: ByThread) -> None:
    """Undo `swap_in` for this thread; the last thread to leave restores the original."""
    with _namespaces:
        standing.ours.pop(threading.get_ident(), None)
        if standing.ours or namespace.get(name) is not standing:
            return
        if standing.is_inherited:
            del namespace[name]
        else:
            namespace[name] = standing.original


class SwapLog(ExitStack):
    """A stack that also lists the swaps made on it."""

    def __init__(self) -> None:
        super().__init__()
        self.swaps: list[Swap] = []
