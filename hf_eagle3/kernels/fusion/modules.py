"""Norms, rotary embeddings and gated MLPs as kernels, where a trial shows that the kernel computes the same."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..deferred import DEFERRED, take
from ..linear import MAX_ROWS, linear_gated
from ..mlp import ACTIVATIONS
from ..mlp import gate as gate_kernel
from ..norms import GATED_VARIANTS, SUM, VARIANTS, add_rms_norm, gated_rms_norm, rms_norm
from ..rotary import ROTATION, Rotation, apply_rotary, rotary_angles
from .trials import DTYPES, UNFIT, ByThread, Swaps, agree, can_run, is_plain, random_like, swap_in, takes_one

NORM_SUFFIX, GATED_SUFFIX = "RMSNorm", "RMSNormGated"
ROTARY_NAME = "apply_rotary_pos_emb"
ANGLES_SUFFIX = "RotaryEmbedding"
LONGEST = 2**17  # positions up to which angles are compared
EPS_NAMES = ("variance_epsilon", "eps")


# ---- norms ----


def swap_norms(model: nn.Module, swaps: Swaps, stack: ExitStack) -> set[int]:
    """Replace norms; their widths."""
    known: dict[tuple, str | None] = {}
    widths = set()
    for module in model.modules():
        name = type(module).__name__
        weight = getattr(module, "weight", None)
        eps = next((getattr(module, key) for key in EPS_NAMES if hasattr(module, key)), None)
        if not name.endswith(NORM_SUFFIX) or not isinstance(weight, Tensor) or not isinstance(eps, float):
            continue
        if weight.dim() != 1 or not is_plain(module) or not takes_one(type(module).forward) or not can_run(weight):
            continue
        key = (type(module), len(weight), eps, weight.dtype, weight.device)
        if key not in known:
            known[key] = _find_variant(module, weight, eps)
        if (variant := known[key]) is not None:
            swaps.norms[name] = variant
            widths.add(len(weight))
            swap_in(stack, vars(module), "forward", _make_norm(module, variant, eps), module.forward)
    return widths


def _find_variant(module: nn.Module, weight: Tensor, eps: float) -> str | None:
    """The variant of RMSNorm that `module` computes, found with weights for which the variants differ."""
    x, probe = random_like(16, len(weight), like=weight), random_like(len(weight), like=weight, seed=1)
    theirs = functional_call(module, {"weight": probe}, (x,))
    for variant in VARIANTS:
        if agree(rms_norm(x, probe, eps=eps, variant=variant), theirs):
            return variant
    return None


def _make_norm(module: nn.Module, variant: str, eps: float) -> Callable[[Tensor], Tensor]:
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        parts = take(SUM, x)
        if can_run(x, weight):
            if parts is None:
                return rms_norm(x, weight, eps=eps, variant=variant)
            first, second = parts
            return add_rms_norm(first, second, weight, eps=eps, variant=variant, total=x)[1]
        if parts is not None:
            torch.add(*parts, out=x)
        return original(x)

    return forward


def swap_gated_norms(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Replace norms behind which a gate is multiplied, as those of recurrent layers."""
    known: dict[tuple, str | None] = {}
    for module in model.modules():
        name, weight = type(module).__name__, getattr(module, "weight", None)
        eps = next((getattr(module, key) for key in EPS_NAMES if hasattr(module, key)), None)
        if not name.endswith(GATED_SUFFIX) or not isinstance(weight, Tensor) or not isinstance(eps, float):
            continue
        if weight.dim() != 1 or not is_plain(module) or not can_run(weight):
            continue
        key = (type(module), len(weight), eps, weight.dtype, weight.device)
        if key not in known:
            known[key] = _find_gated_variant(module, weight, eps)
        if (variant := known[key]) is not None:
            swaps.norms[name] = variant
            swap_in(stack, vars(module), "forward", _make_gated_norm(module, variant, eps), module.forward)


def _find_gated_variant(module: nn.Module, weight: Tensor, eps: float) -> str | None:
    """The variant of gated RMSNorm that `module` computes; None for another layer."""
    x, gate = (random_like(16, len(weight), like=weight, seed=seed) for seed in (0, 2))
    probe = random_like(len(weight), like=weight, seed=1)
    try:
        theirs = functional_call(module, {"weight": probe}, (x, gate))
    except UNFIT:  # its forward takes something else
        return None
    for variant in GATED_VARIANTS:
        if agree(gated_rms_norm(x, gate, probe, eps=eps, variant=variant), theirs):
            return variant
    return None


def _make_gated_norm(module: nn.Module, variant: str, eps: float) -> Callable[..., Tensor]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        weight: Any = module.weight
        fits = not kwargs and len(args) == 2 and all(isinstance(x, Tensor) for x in args)
        if not fits or args[0].shape != args[1].shape or not can_run(*args, weight):
            return original(*args, **kwargs)
        x, gate = args
        return gated_rms_norm(x, gate, weight, eps=eps, variant=variant)

    return forward


# ---- rotary embeddings ----


def swap_rotaries(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Replace the rotary function in every host module that has classes of `model`: each looks it up by its own name."""
    homes: dict[str, ModuleType] = {}
    for module in model.modules():
        home = sys.modules.get(type(module).__module__)
        if home is not None and callable(getattr(home, ROTARY_NAME, None)):
            homes[home.__name__] = home
    like = next(p for p in model.parameters() if p.is_floating_point())
    for name, home in homes.items():
        original = getattr(home, ROTARY_NAME)
        if isinstance(original, ByThread):  # another thread records rounds of a model of that family
            original = original.original
        if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"] or like.dtype not in DTYPES:
            continue
        widths = tuple(width for width in (64, 32) if _turns_alike(original, width, like))
        if widths:
            swaps.rotaries.append(name)
            swap_in(stack, vars(home), ROTARY_NAME, _make_rotary(original, 64 in widths, 32 in widths), original)


def _turns_alike(original: Callable, width: int, like: Tensor) -> bool:
    """Whether `original` equals the kernel, for heads of 64 and cosines of `width`."""
    q, k = (random_like(2, 3, heads, 64, like=like, seed=heads).transpose(1, 2) for heads in (4, 2))
    cos, sin = random_like(2, 3, width, like=like), random_like(2, 3, width, like=like, seed=1)
    try:
        theirs = original(q, k, cos, sin)
    except RuntimeError:  # a width that it does not take
        return False
    return all(map(agree, apply_rotary(q, k, cos, sin), theirs))


def _make_rotary(original: Callable, takes_full: bool, takes_half: bool) -> Callable:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        is_usual = not args and kwargs.get("unsqueeze_dim", 1) == 1 and kwargs.keys() <= {"unsqueeze_dim"}
        if not (is_usual and can_run(q, k, cos, sin) and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3):
            return original(q, k, cos, sin, *args, **kwargs)
        B, _, T, D = q.shape
        is_known = (cos.shape[-1] == D and takes_full) or (cos.shape[-1] * 2 == D and takes_half)
        fits = (
            cos.shape == sin.shape
            and cos.shape[0] in (1, B)
            and cos.shape[1] == T
            and k.shape[0] == B
            and k.shape[2:] == (T, D)
            and all(x.stride(-1) == 1 for x in (q, k, cos, sin))
        )
        if not (is_known and fits):
            return original(q, k, cos, sin, *args, **kwargs)
        if (deferred := DEFERRED.get()) is None:
            return apply_rotary(q, k, cos, sin)
        outs = torch.empty_like(q), torch.empty_like(k)
        rotation = Rotation(q, k, cos, sin, *outs)
        deferred.defer(ROTATION, outs[1], rotation, lambda: apply_rotary(q, k, cos, sin, outs=outs))
        return outs

    return rotate


def swap_angles(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Compute cosines and sines in one kernel, in modules whose angles depend on the position alone."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    for module in model.modules() if can_run(like) else ():
        inverse, scaling, kind = (
            getattr(module, name, None) for name in ("inv_freq", "attention_scaling", "rope_type")
        )
        if not type(module).__name__.endswith(ANGLES_SUFFIX) or not isinstance(kind, str):
            continue
        if (
            "dynamic" in kind or kind == "longrope" or not isinstance(scaling, float | int)
        ):  # angles that depend on the longest row
            continue
        if not isinstance(inverse, Tensor) or inverse.dim() != 1 or not inverse.is_floating_point():
            continue
        needed = list(inspect.signature(type(module).forward).parameters)
        if needed != ["self", "x", "position_ids"] or not is_plain(module):
            continue
        width = _find_width(module, inverse, float(scaling), like)
        if width is not None:
            swaps.angles.append(type(module).__name__)
            forward = _make_angles(module, is_shared=width == len(inverse))
            swap_in(stack, vars(module), "forward", forward, module.forward)


def _find_width(module: nn.Module, inverse: Tensor, scaling: float, like: Tensor) -> int | None:
    """Number of cosines that `module` gives for a position; None unless they are the kernel's."""
    generator = torch.Generator().manual_seed(0)
    longest = min(LONGEST, getattr(module, "max_seq_len_cached", 2048))  # a module with a table has no more
    positions = torch.randint(longest, (3, 5), generator=generator).to(like.device)
    try:
        theirs = module(random_like(3, 5, 1, like=like), positions)
    except UNFIT:  # its forward needs other arguments
        return None
    width = theirs[0].shape[-1]
    if width not in (len(inverse), 2 * len(inverse)):
        return None
    ours = rotary_angles(positions, inverse, scaling=scaling, dtype=like.dtype, is_shared=width == len(inverse))
    return width if all(map(agree, ours, theirs)) else None


def _make_angles(module: Any, *, is_shared: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    original = module.forward

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inverse = module.inv_freq
        fits = can_run(x) and position_ids.dim() == 2 and position_ids.dtype == torch.int64
        if not fits or position_ids.device != x.device or inverse.device != x.device:
            return original(x, position_ids)
        scaling = float(module.attention_scaling)
        return rotary_angles(position_ids, inverse, scaling=scaling, dtype=x.dtype, is_shared=is_shared)

    return forward


# ---- gated MLPs ----


def swap_mlps(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Replace gated MLPs."""
    known: dict[type, str | None] = {}
    for module in model.modules():
        parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(type(part) is nn.Linear and is_plain(part) for part in parts) or not hasattr(module, "act_fn"):
            continue
        if not is_plain(module) or not takes_one(type(module).forward) or not can_run(parts[0].weight):
            continue
        kind = type(module)
        if kind not in known:
            known[kind] = _find_activation(module, parts[0].weight)
        if (activation := known[kind]) is not None:
            swaps.mlps[kind.__name__] = activation
            swap_in(stack, vars(module), "forward", _make_mlp(module, activation), module.forward)


def _find_activation(module: nn.Module, like: Tensor) -> str | None:
    """The activation of `module` if a trial on a small copy shows that it is a gated MLP, else None."""
    x = random_like(4, 64, like=like)
    names = [name for name, function in ACTIVATIONS.items() if agree(function(x), module.act_fn(x))]  # type: ignore[operator]
    if not names:
        return None
    probe = copy.copy(module)
    probe._modules = dict(module._modules)
    gate, up, down = (random_like(64, 64, like=like, seed=seed) / 8 for seed in (1, 2, 3))
    for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        linear = nn.Linear(64, 64, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        probe._modules[name] = linear
    try:
        theirs = probe(x)
    except RuntimeError:  # its forward depends on its sizes
        return None
    ours = F.linear(gate_kernel(F.linear(x, gate), F.linear(x, up), activation=names[0]), down)
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return None
    is_same = bool((ours - theirs).float().norm() <= 0.01 * theirs.float().norm())
    return names[0] if is_same else None


def _make_mlp(module: nn.Module, activation: str) -> Callable[[Tensor], Tensor]:
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        gate, up, down = (getattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
        if not can_run(x, gate.weight, up.weight):
            return original(x)
        num_rows = x.numel() // x.shape[-1]
        are_bare = gate.bias is None and up.bias is None
        if are_bare and 1 <= num_rows <= MAX_ROWS:
            return down(linear_gated(x, gate.weight, up.weight, activation=activation))
        return down(gate_kernel(gate(x), up(x), activation=activation))

    return forward
