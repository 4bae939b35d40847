"""Linear layers over few tokens on a CPU, by oneDNN.

PyTorch hands float32 products to a BLAS made for many rows, and lets oneDNN lay out its weights anew in each call. oneDNN's
own product takes a weight as it is, or packed for it once. Packs live as long as one call of the loop, so that what
happens to a model between calls (other weights, adapters, another device) cannot make them stale. As in `fusion`,
nothing is taken on faith: the first product of each size is compared with PyTorch's.

Shapes: M tokens, a weight [N, K].
"""

import logging
import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

# How far two products may be apart, as a share of their size. Other dtypes stay PyTorch's.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
MAX_TOKENS = 256  # M up to which it was measured
MIN_WEIGHTS = 2**18  # N * K; oneDNN takes 20 us for whatever product, longer than all of a small one takes PyTorch
# Packing SmolLM2-135M takes about what 15 rounds gain by it.
PACK_AFTER = 8  # rounds of a call
MAX_PACKED_BYTES = 2 * 2**30

_agreed: dict[tuple, bool] = {}  # (M, N, K, dtype, has bias, is packed) -> whether oneDNN's product is PyTorch's


def is_available() -> bool:
    """Whether oneDNN is there and switched on, on a CPU that it is known to be fast on."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    )


def pack(weight: Tensor) -> Tensor:
    """A copy of `weight` [N, K] as oneDNN likes it for few tokens; opaque."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN: [..., N] of x [..., K] and a weight [N, K], packed or not."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class PackedLinears:
    """Runs the linear layers of `models` by oneDNN while it is entered: around the forwards of each round.

    Small layers, and those that are more than an `nn.Linear` with plain weights (quantised, sharded, hooked by accelerate),
    are left alone, and so are all of a compiled model. Weights are packed once the call has come to `PACK_AFTER` rounds. Modules carry
    another `forward` while it is entered; nobody takes away but his own, so two threads may enter at once.
    """

    def __init__(self, *models: nn.Module):
        modules = [module for model in models for module in model.modules()]
        self._layers: list[_Layer] = []
        if is_available() and not any(map(_is_compiled, modules)):
            self._layers = [_Layer(module) for module in modules if type(module) is nn.Linear and _is_plain(module)]
        self._num_rounds = 0

    def __enter__(self) -> None:
        if self._num_rounds == PACK_AFTER:
            self._pack()
        self._num_rounds += 1
        for layer in self._layers:
            vars(layer.module).setdefault("forward", layer)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for layer in self._layers:
            namespace = vars(layer.module)
            if namespace.get("forward") is layer:
                del namespace["forward"]

    def _pack(self) -> None:
        start = time.perf_counter()
        weights = {id(layer.weight): layer.weight for layer in self._layers}  # a tied one once
        size = sum(weight.nbytes for weight in weights.values())
        if size > MAX_PACKED_BYTES:
            logger.info("%d weights stay unpacked: %.1f GiB.", len(weights), size / 2**30)
            return
        try:
            packed = {key: pack(weight) for key, weight in weights.items()}
        except RuntimeError as error:  # no memory, or not a size that oneDNN packs
            logger.info("%d weights stay unpacked: %s", len(weights), error)
            return
        for layer in self._layers:
            layer.packed, layer.mark = packed[id(layer.weight)], _mark(layer.weight)
        seconds = time.perf_counter() - start
        logger.info("Packed %d weights: %.0f MiB in %.2f s.", len(weights), size / 2**20, seconds)


class _Layer:
    """Stands in for the forward of an `nn.Linear`."""

    def __init__(self, module: nn.Linear):
        self.module, self.weight = module, module.weight
        self.packed: Tensor | None = None
        self.mark: tuple | None = None  # of the weight when it was packed

    def __call__(self, input: Tensor) -> Tensor:
        parameters: dict[str, Any] = self.module._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if weight is not self.weight or not _fits(input, weight):
            return F.linear(input, weight, bias)
        packed = self.packed if self.packed is not None and self.mark == _mark(weight) else None
        # Of a weight that is not packed, PyTorch's own product in 16 bits is oneDNN's.
        if packed is None and weight.dtype != torch.float32:
            return F.linear(input, weight, bias)
        N, K = weight.shape
        key = (input.numel() // K, N, K, weight.dtype, bias is not None, packed is not None)
        agreed = _agreed.get(key)
        if agreed is None:
            return _compare(key, input, weight, bias, packed)
        return linear(input, weight if packed is None else packed, bias) if agreed else F.linear(input, weight, bias)


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may take the product: few tokens of the weight's dtype on a CPU, and no gradient to keep."""
    return (
        x.dtype == weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and x.dim() > 1
        and x.shape[-1] == weight.shape[-1]
        and 0 < x.numel() <= MAX_TOKENS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _compare(key: tuple, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None) -> Tensor:
    """The product, by oneDNN if that agrees with PyTorch, which is noted under `key`."""
    theirs = F.linear(x, weight, bias)
    if not bool(theirs.isfinite().all()):  # nothing to tell by
        return theirs
    try:
        ours = linear(x, weight if packed is None else packed, bias)
    except RuntimeError as error:  # not a size that oneDNN takes
        logger.warning("oneDNN does not run %s: %s", key, error)
        _agreed[key] = False
        return theirs
    distance = (ours.float() - theirs.float()).norm()
    is_same = ours.shape == theirs.shape and bool(distance <= TOLERANCE[x.dtype] * theirs.float().norm())
    if not is_same:
        logger.warning("oneDNN's product of %s is not PyTorch's: not used.", key)
    _agreed[key] = is_same
    return ours if is_same else theirs


def _mark(weight: Tensor) -> tuple:
    """What changes when somebody writes to a weight or moves it; not by `weight.data`."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def _is_plain(module: nn.Linear) -> bool:
    """Whether calling `module` is `F.linear` with plain weights on a CPU, and enough of them."""
    tensors: list[Any] = [x for x in (module.weight, module.bias) if x is not None]
    weight = tensors[0]
    return (
        "forward" not in vars(module)
        and all(type(x) is nn.Parameter and x.device.type == "cpu" and x.dtype == weight.dtype for x in tensors)
        and weight.is_contiguous()
        and weight.numel() >= MIN_WEIGHTS
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()))
    )


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` stands before `module`, which would compile anew for each other forward."""
    is_wrapped = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules or is_wrapped
