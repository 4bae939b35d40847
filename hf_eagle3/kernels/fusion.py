"""Our kernels in place of stock layers, while a CUDA graph is captured.

No class of the host's is edited, and nothing is taken on faith: what looks like an RMSNorm, a rotary embedding, a gated
MLP or the experts of a mixture is first run on random numbers beside its kernel, and left alone unless the two agree. Whatever a kernel cannot
take at run time (other dtypes, many rows, a gradient to keep) goes to the host's own code.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import language
from .argmax import argmax_rows
from .deferred import LATE, Late, take
from .experts import MAX_CHOICES, expert_linear
from .linear import MAX_ROWS, is_worth_it, linear_gated, linear_group, linear_small
from .mlp import ACTIVATIONS
from .mlp import gate as gate_kernel
from .norms import VARIANTS, add_rms_norm, rms_norm
from .qkv import PROJECTIONS, view_as_one
from .rotary import ROTATION, Rotation, apply_rotary, rotary_angles

logger = logging.getLogger(__name__)

NORM_SUFFIX = "RMSNorm"
ROTARY_NAME = "apply_rotary_pos_emb"
ANGLES_SUFFIX = "RotaryEmbedding"
LONGEST = 2**17  # positions up to which angles are compared
EPS_NAMES = ("variance_epsilon", "eps")
DTYPES = (torch.bfloat16, torch.float16)
SUM = "sum"  # what is put off for a norm
HOST_HOOKS = "transformers.utils.output_capturing"
MANY_VALUES = 4096  # of a vocabulary, from which on programs share a row
# Of experts that are called otherwise, or a card that cannot run the kernel.
UNFIT: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, LookupError, *language.KERNEL_ERRORS)


# A namespace, a name in it, what is put there, and in place of what.
Swap = tuple[dict[str, Any], str, Callable, Callable]


@dataclass(slots=True)
class Swaps:
    """What `fused` put kernels into."""

    norms: dict[str, str] = field(default_factory=dict)  # class -> variant
    rotaries: list[str] = field(default_factory=list)  # modules of the host's
    angles: list[str] = field(default_factory=list)  # classes
    mlps: dict[str, str] = field(default_factory=dict)  # class -> activation
    experts: list[str] = field(default_factory=list)  # classes
    num_groups: int = 0  # query, key and value projections that became one launch


@contextmanager
def fused(*models: nn.Module) -> Iterator[Swaps]:
    """Run linear layers and experts of `models` over few rows, norms, rotary embeddings and gated MLPs as kernels.

    Sums that a norm comes right after are taken in that norm's kernel, and one finds the largest of a vocabulary. For
    capture and the warm-up before it; the graph keeps the kernels. Other threads notice nothing of it, whatever models
    they run; on leaving, everything is as it was.
    """
    swaps = Swaps()
    widths: set[int] = set()
    with ExitStack() as stack:
        for model in models:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            if not language.is_available(device):
                continue
            with torch.no_grad():
                widths |= _swap_norms(model, swaps, stack)
                _swap_rotaries(model, swaps, stack)
                _swap_angles(model, swaps, stack)
                _swap_mlps(model, swaps, stack)
                _swap_experts(model, swaps, stack)
                _group_projections(model, swaps, stack)
        logger.info("Fused %s: %s", ", ".join(type(model).__name__ for model in models), swaps)
        stack.enter_context(_StandIns(widths))
        yield swaps


class FusedElements:
    """`fused` for many rows: norms, rotary embeddings and gated MLPs, linear layers left to cuBLAS.

    A context manager to enter again and again: what agrees with a kernel is found the first time.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._swaps: list[Swap] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> None:
        if self._swaps is None:
            self._swaps = self._find()
        for swap in self._swaps:
            _set(self._stack, *swap)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _find(self) -> list[Swap]:
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        if not language.is_available(device):
            return []
        swaps: tuple[Callable[[nn.Module, Swaps, ExitStack], object], ...] = (_swap_norms, _swap_rotaries, _swap_mlps)
        with _NotedSwaps() as stack, torch.no_grad():
            for swap in swaps:
                swap(self._model, Swaps(), stack)
            return stack.swaps


class _NotedSwaps(ExitStack):
    """A stack that knows what was put where."""

    def __init__(self) -> None:
        super().__init__()
        self.swaps: list[Swap] = []


class _ByThread:
    """Stands in a namespace for a function. Threads that put one of their own there call that, all others the first."""

    def __init__(self, original: Callable, *, is_inherited: bool):
        functools.update_wrapper(self, original)
        self.original = original
        self.is_inherited = is_inherited  # the namespace had none of its own: an instance, which has its class's
        self.ours: dict[int, Callable] = {}  # by thread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: whatever the original takes and gives
        return self.ours.get(threading.get_ident(), self.original)(*args, **kwargs)


_namespaces = threading.Lock()  # of what `_ByThread` stands in


def _set(stack: ExitStack, namespace: dict[str, Any], name: str, value: Callable, original: Callable) -> None:
    """Let this thread call `value` by `name` in `namespace`, in place of `original`, until `stack` unwinds."""
    if isinstance(stack, _NotedSwaps):
        stack.swaps.append((namespace, name, value, original))
    with _namespaces:
        standing = namespace.get(name)
        if not isinstance(standing, _ByThread):
            standing = namespace[name] = _ByThread(original, is_inherited=name not in namespace)
        standing.ours[threading.get_ident()] = value
    stack.callback(_unset, namespace, name, standing)


def _unset(namespace: dict[str, Any], name: str, standing: _ByThread) -> None:
    """Undo `_set` in this thread. The last one puts the original back."""
    with _namespaces:
        standing.ours.pop(threading.get_ident(), None)
        if standing.ours or namespace.get(name) is not standing:
            return
        if standing.is_inherited:
            del namespace[name]
        else:
            namespace[name] = standing.original


def _can_run(*tensors: Tensor) -> bool:
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
    """Whether somebody is told when `module` runs.

    Not counting the hooks that the host puts on a model when it is first asked for hidden states, and leaves there:
    they do nothing where nobody asks.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != HOST_HOOKS for hook in hooks)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling `module` is calling its class's forward: nobody has hooked or replaced it."""
    is_hooked = has_forward_hooks(module) or module._backward_hooks or module._backward_pre_hooks
    return "forward" not in vars(module) and not is_hooked


def _takes_one(function: Callable) -> bool:
    """Whether `function`, unbound, needs exactly one argument besides self."""
    _, *parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1 and needed[0].kind is not inspect.Parameter.KEYWORD_ONLY


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results were rounded at the same points: nearly all equal, and the others neighbours."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    step = torch.finfo(ours.dtype).eps
    are_near = torch.isclose(ours, theirs, rtol=2 * step, atol=step / 16)
    return bool(are_near.all()) and bool((ours == theirs).float().mean() > 0.98)


def _random(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers in the dtype and on the device of `like`, which leave the caller's random state alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


# ---- norms ----


def _swap_norms(model: nn.Module, swaps: Swaps, stack: ExitStack) -> set[int]:
    """Replace norms; how wide they are."""
    known: dict[tuple, str | None] = {}
    widths = set()
    for module in model.modules():
        name = type(module).__name__
        weight = getattr(module, "weight", None)
        eps = next((getattr(module, key) for key in EPS_NAMES if hasattr(module, key)), None)
        if not name.endswith(NORM_SUFFIX) or not isinstance(weight, Tensor) or not isinstance(eps, float):
            continue
        if weight.dim() != 1 or not _is_plain(module) or not _takes_one(type(module).forward) or not _can_run(weight):
            continue
        key = (type(module), len(weight), eps, weight.dtype, weight.device)
        if key not in known:
            known[key] = _find_variant(module, weight, eps)
        if (variant := known[key]) is not None:
            swaps.norms[name] = variant
            widths.add(len(weight))
            _set(stack, vars(module), "forward", _make_norm(module, variant, eps), module.forward)
    return widths


def _find_variant(module: nn.Module, weight: Tensor, eps: float) -> str | None:
    """The variant of RMSNorm that `module` computes, tried with weights that tell them apart."""
    x, probe = _random(16, len(weight), like=weight), _random(len(weight), like=weight, seed=1)
    theirs = functional_call(module, {"weight": probe}, (x,))
    for variant in VARIANTS:
        if _agree(rms_norm(x, probe, eps=eps, variant=variant), theirs):
            return variant
    return None


def _make_norm(module: nn.Module, variant: str, eps: float) -> Callable[[Tensor], Tensor]:
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        parts = take(SUM, x)
        if _can_run(x, weight):
            if parts is None:
                return rms_norm(x, weight, eps=eps, variant=variant)
            first, second = parts
            return add_rms_norm(first, second, weight, eps=eps, variant=variant, total=x)[1]
        if parts is not None:
            torch.add(*parts, out=x)
        return original(x)

    return forward


# ---- rotary embeddings ----


def _swap_rotaries(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Replace the function by which the modules of the model's code rotate; each module's name for it is its own."""
    homes: dict[str, ModuleType] = {}
    for module in model.modules():
        home = sys.modules.get(type(module).__module__)
        if home is not None and callable(getattr(home, ROTARY_NAME, None)):
            homes[home.__name__] = home
    like = next(p for p in model.parameters() if p.is_floating_point())
    for name, home in homes.items():
        original = getattr(home, ROTARY_NAME)
        if isinstance(original, _ByThread):  # another thread records rounds of a model of that family
            original = original.original
        if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"] or like.dtype not in DTYPES:
            continue
        widths = tuple(width for width in (64, 32) if _turns_alike(original, width, like))
        if widths:
            swaps.rotaries.append(name)
            _set(stack, vars(home), ROTARY_NAME, _make_rotary(original, 64 in widths, 32 in widths), original)


def _turns_alike(original: Callable, width: int, like: Tensor) -> bool:
    """Whether `original` does what the kernel does, for heads of 64 and cosines of `width`."""
    q, k = (_random(2, 3, heads, 64, like=like, seed=heads).transpose(1, 2) for heads in (4, 2))
    cos, sin = _random(2, 3, width, like=like), _random(2, 3, width, like=like, seed=1)
    try:
        theirs = original(q, k, cos, sin)
    except RuntimeError:  # not a width that it takes
        return False
    return all(map(_agree, apply_rotary(q, k, cos, sin), theirs))


def _make_rotary(original: Callable, takes_full: bool, takes_half: bool) -> Callable:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        is_usual = not args and kwargs.get("unsqueeze_dim", 1) == 1 and kwargs.keys() <= {"unsqueeze_dim"}
        if not (is_usual and _can_run(q, k, cos, sin) and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3):
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
        if (late := LATE.get()) is None:
            return apply_rotary(q, k, cos, sin)
        outs = torch.empty_like(q), torch.empty_like(k)
        rotation = Rotation(q, k, cos, sin, *outs)
        late.put_off(ROTATION, outs[1], rotation, lambda: apply_rotary(q, k, cos, sin, outs=outs))
        return outs

    return rotate


def _swap_angles(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Let modules that make cosines and sines of positions do it in one kernel, where angles depend on nothing else."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    for module in model.modules() if _can_run(like) else ():
        inverse, scaling, kind = (
            getattr(module, name, None) for name in ("inv_freq", "attention_scaling", "rope_type")
        )
        if not type(module).__name__.endswith(ANGLES_SUFFIX) or not isinstance(kind, str):
            continue
        if "dynamic" in kind or kind == "longrope" or not isinstance(scaling, float | int):  # with the longest row
            continue
        if not isinstance(inverse, Tensor) or inverse.dim() != 1 or not inverse.is_floating_point():
            continue
        needed = list(inspect.signature(type(module).forward).parameters)
        if needed != ["self", "x", "position_ids"] or not _is_plain(module):
            continue
        width = _find_width(module, inverse, float(scaling), like)
        if width is not None:
            swaps.angles.append(type(module).__name__)
            forward = _make_angles(module, is_shared=width == len(inverse))
            _set(stack, vars(module), "forward", forward, module.forward)


def _find_width(module: nn.Module, inverse: Tensor, scaling: float, like: Tensor) -> int | None:
    """How many cosines `module` makes for a position, if they are the kernel's."""
    generator = torch.Generator().manual_seed(0)
    longest = min(LONGEST, getattr(module, "max_seq_len_cached", 2048))  # one that looks them up has no more
    positions = torch.randint(longest, (3, 5), generator=generator).to(like.device)
    try:
        theirs = module(_random(3, 5, 1, like=like), positions)
    except UNFIT:  # its forward counts on something else
        return None
    width = theirs[0].shape[-1]
    if width not in (len(inverse), 2 * len(inverse)):
        return None
    ours = rotary_angles(positions, inverse, scaling=scaling, dtype=like.dtype, is_shared=width == len(inverse))
    return width if all(map(_agree, ours, theirs)) else None


def _make_angles(module: Any, *, is_shared: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    original = module.forward

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inverse = module.inv_freq
        fits = _can_run(x) and position_ids.dim() == 2 and position_ids.dtype == torch.int64
        if not fits or position_ids.device != x.device or inverse.device != x.device:
            return original(x, position_ids)
        scaling = float(module.attention_scaling)
        return rotary_angles(position_ids, inverse, scaling=scaling, dtype=x.dtype, is_shared=is_shared)

    return forward


# ---- gated MLPs ----


def _swap_mlps(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    known: dict[type, str | None] = {}
    for module in model.modules():
        parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(type(part) is nn.Linear and _is_plain(part) for part in parts) or not hasattr(module, "act_fn"):
            continue
        if not _is_plain(module) or not _takes_one(type(module).forward) or not _can_run(parts[0].weight):
            continue
        kind = type(module)
        if kind not in known:
            known[kind] = _find_activation(module, parts[0].weight)
        if (activation := known[kind]) is not None:
            swaps.mlps[kind.__name__] = activation
            _set(stack, vars(module), "forward", _make_mlp(module, activation), module.forward)


def _find_activation(module: nn.Module, like: Tensor) -> str | None:
    """The activation of a gated MLP, if that is what `module` is: tried on a small copy of it."""
    x = _random(4, 64, like=like)
    names = [name for name, function in ACTIVATIONS.items() if _agree(function(x), module.act_fn(x))]  # type: ignore[operator]
    if not names:
        return None
    probe = copy.copy(module)
    probe._modules = dict(module._modules)
    gate, up, down = (_random(64, 64, like=like, seed=seed) / 8 for seed in (1, 2, 3))
    for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        linear = nn.Linear(64, 64, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        probe._modules[name] = linear
    try:
        theirs = probe(x)
    except RuntimeError:  # its forward counts on its sizes
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
        if not _can_run(x, gate.weight, up.weight):
            return original(x)
        num_rows = x.numel() // x.shape[-1]
        are_bare = gate.bias is None and up.bias is None
        if are_bare and 1 <= num_rows <= MAX_ROWS:
            return down(linear_gated(x, gate.weight, up.weight, activation=activation))
        return down(gate_kernel(gate(x), up(x), activation=activation))

    return forward


# ---- experts ----


def _swap_experts(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Let experts as the host's `use_experts_implementation` describes them run as two kernels a layer."""
    known: dict[type, bool] = {}
    for module in model.modules():
        weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
        if not all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in weights) or not _is_plain(module):
            continue
        is_known_kind = all(hasattr(module, name) for name in ("is_transposed", "has_bias", "_apply_gate"))
        if (
            not is_known_kind
            or not getattr(module, "has_gate", False)
            or getattr(module, "has_post_expert_norm", False)
        ):
            continue
        if not _can_run(*weights):  # type: ignore[arg-type]  # parameters, as asked above
            continue
        kind, forward = type(module), _make_experts(module)
        if kind not in known:
            known[kind] = _experts_agree(module, forward)
        if known[kind]:
            if kind.__name__ not in swaps.experts:
                swaps.experts.append(kind.__name__)
            _set(stack, vars(module), "forward", forward, module.forward)


def _experts_agree(module: Any, forward: Callable[..., Tensor]) -> bool:
    """Whether `forward` computes what `module` does: tried with its own weights.

    Two tokens beside the host's way, which may copy the weights of each choice; many beside two at a time.
    """
    E, K, _ = module.gate_up_proj.shape if module.is_transposed else module.gate_up_proj.transpose(1, 2).shape
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> tuple[Tensor, Tensor, Tensor]:
        x = _random(n, K, like=module.gate_up_proj, seed=n)
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
            _can_run(x, gate_up, down, *(b for b in biases if b is not None))
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


# ---- functions ----


class _StandIns(TorchFunctionMode):
    """Kernels in place of what the host asks torch for: linear layers over few rows, sums before norms, argmax.

    Args:
        widths: Of the norms that take sums.
    """

    def __init__(self, widths: set[int]) -> None:
        super().__init__()
        self._late, self._widths = Late(), widths

    def __enter__(self) -> _StandIns:
        self._token = LATE.set(self._late)
        return super().__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        LATE.reset(self._token)
        if kind is None:
            self._late.finish()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) != "__get__":  # what a property says needs no values
            self._late.finish()
        if func in _ADDITIONS and not kwargs and _can_add(self._widths, *args):
            total = torch.empty_like(args[0])
            self._late.put_off(SUM, total, args, lambda: torch.add(*args, out=total))
            return total
        if func is F.linear and len(args) >= 2 and args[1].dim() == 2 and _is_small(*args, **kwargs):
            return linear_small(*args, **kwargs)
        if func is Tensor.argmax and not kwargs and _is_vocabulary(*args):
            return argmax_rows(args[0])
        return func(*args, **kwargs)


_ADDITIONS = (Tensor.add, torch.add)


def _can_add(widths: set[int], x: Any, y: Any = None, *more: Any) -> bool:
    """Whether a norm's kernel can take the sum of `x` and `y`: of one shape and its width, each in one piece."""
    return (
        not more
        and isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.shape == y.shape
        and x.dim() > 1
        and x.shape[-1] in widths
        and x.numel() > 0
        and x.is_contiguous()
        and y.is_contiguous()
        and _can_run(x, y)
    )


def _is_vocabulary(x: Tensor, dim: Any = None, *more: Any) -> bool:
    """Whether `x.argmax(dim)` looks for the largest of many values in each row."""
    return (
        not more
        and dim == -1
        and type(x) is Tensor
        and x.dim() > 1
        and x.numel() > 0
        and x.shape[-1] >= MANY_VALUES
        and x.dtype in (*DTYPES, torch.float32)
        and language.is_available(x.device)
    )


# ---- linear layers ----


def _is_small(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether our kernel takes this linear layer, and is the faster one."""
    N, K = weight.shape
    return _is_ours(x, weight, bias) and is_worth_it(N, x.numel() // K)


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = [x, weight] if bias is None else [x, weight, bias]
    return _can_run(*given) and weight.is_contiguous() and x.numel() > 0 and x.shape[-1] == weight.shape[-1]


def _group_projections(model: nn.Module, swaps: Swaps, stack: ExitStack) -> None:
    """Let query, key and value projections of one input run as one kernel."""
    for module in model.modules():
        parts: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
        if not all(type(part) is nn.Linear and _is_plain(part) and _can_run(part.weight) for part in parts):
            continue
        group = _Group(parts)
        swaps.num_groups += 1
        for i, part in enumerate(parts):
            _set(stack, vars(part), "forward", group.make_forward(i), part.forward)


class _Group:
    """Projections that are called one after another with the same tensor: the first call computes all."""

    def __init__(self, parts: list[nn.Linear]):
        self.parts = parts
        self.originals = [part.forward for part in parts]
        self.x: Tensor | None = None
        self.version: int | None = None
        self.results: dict[int, Tensor] = {}

    def make_forward(self, i: int) -> Callable[[Tensor], Tensor]:
        """What stands in for the forward of part `i`."""

        def forward(x: Tensor) -> Tensor:
            # Inference tensors count no versions; that the host writes into its input between two projections is not
            # known of any model.
            version = None if x.is_inference() else x._version
            if i == 0 and (results := self._run(x)) is not None:
                first, *rest = results
                self.x, self.version, self.results = x, version, dict(enumerate(rest, 1))
                return first
            is_ready = i in self.results and x is self.x and version == self.version
            result = self.results.pop(i) if is_ready else self.originals[i](x)
            if not self.results:
                self.x = None
            return result

        return forward

    def _run(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """All of them, if there is one product for it: by our kernel over few rows, else over weights that were joined."""
        if not all(_is_ours(x, part.weight, part.bias) for part in self.parts):
            return None
        weights, biases = [part.weight for part in self.parts], [part.bias for part in self.parts]
        if x.numel() <= MAX_ROWS * x.shape[-1]:
            return linear_group(x, weights, biases)
        weight, bias = view_as_one(weights), None
        given = [bias for bias in biases if bias is not None]
        if given:
            bias = view_as_one(given) if len(given) == len(biases) else None
        if weight is None or (given and bias is None):
            return None
        return F.linear(x, weight, bias).split([len(w) for w in weights], dim=-1)
