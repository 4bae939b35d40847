"""Experts of a mixture as two kernels a layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import MAX_CHOICES, expert_linear
from .trials import UNFIT, Swaps, can_run, is_plain, random_like, swap_in


def swap_experts(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Replace experts that follow the host's `use_experts_implementation`: two kernels a layer."""
    known: dict[type, bool] = {}
    for module in model.modules():
        weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
        if not all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in weights) or not is_plain(module):
            continue
        is_known_kind = all(hasattr(module, name) for name in ("is_transposed", "has_bias", "_apply_gate"))
        if (
            not is_known_kind
            or not getattr(module, "has_gate", False)
            or getattr(module, "has_post_expert_norm", False)
        ):
            continue
        if not can_run(*weights):  # type: ignore[arg-type]  # parameters, as checked above
            continue
        kind, forward = type(module), _make_experts(module)
        if kind not in known:
            known[kind] = _expertsagree(module, forward)
        if known[kind]:
            if kind.__name__ not in swaps.experts:
                swaps.experts.append(kind.__name__)
            swap_in(stack, vars(module), "forward", forward, module.forward)


def _expertsagree(module: Any, forward: Callable[..., Tensor]) -> bool:
    """Whether `forward` equals `module`, tried with its own weights.

    Two tokens are compared with the host's forward, which may copy the weights of each choice, and so is given no more.
    Many tokens are compared with two at a time.
    """
    E, K, _ = module.gate_up_proj.shape if module.is_transposed else module.gate_up_proj.transpose(1, 2).shape
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> tuple[Tensor, Tensor, Tensor]:
        x = random_like(n, K, like=module.gate_up_proj, seed=n)
        chosen = torch.randint(E, (n, 2), generator=generator).to(x.device)
        return x, chosen, torch.rand(n, 2, generator=generator).to(x.device, x.dtype)

    def are_near(ours: Tensor, theirs: Tensor) -> bool:
        return ours.shape == theirs.shape and bool((ours - theirs).float().norm() <= 0.01 * theirs.float().norm())

    try:
        few = some(2)
        if not are_near(forward(*few), module(*few)):
            return False
        for n in (min(9 * E, MAX_CHOICES // 2), MAX_CHOICES // 2):
            many = some(n)
            pairs = [forward(*(value[i : i + 2] for value in many)) for i in range(0, 8, 2)]
            if not are_near(forward(*many)[:8], torch.cat(pairs)):
                return False
    except UNFIT:
        return False
    return True


def _make_experts(module: Any) -> Callable[..., Tensor]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != 3:
            return original(*args, **kwargs)
        x, chosen, weights = args
        gate_up, down = module.gate_up_proj, module.down_proj
        biases = [module.gate_up_proj_bias, module.down_proj_bias] if module.has_bias else [None, None]
        fits = (
            can_run(x, gate_up, down, *(b for b in biases if b is not None))
            and x.dim() == chosen.dim() == 2
            and chosen.shape == weights.shape
            and 0 < chosen.numel() <= MAX_CHOICES
            and not getattr(module, "_is_expert_parallel", False)
        )
        if not fits:
            return original(x, chosen, weights)
        flat = chosen.reshape(-1)
        y = expert_linear(x, gate_up, biases[0], flat, is_transposed=module.is_transposed)
        y = expert_linear(module._apply_gate(y), down, biases[1], flat, is_transposed=module.is_transposed)
        y = y * weights.reshape(-1, 1)
        return y.view(*chosen.shape, -1).sum(dim=1).to(x.dtype)

    return forward
