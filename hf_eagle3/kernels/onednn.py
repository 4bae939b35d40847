"""Linear layers over few tokens on a CPU, by oneDNN.

PyTorch hands float32 products to a BLAS made for many rows, and lets oneDNN lay out its weights anew in each call. oneDNN's
own product takes a weight as it is, or packed for it once. Packs live as long as one call of the loop, so that changes to
a model between calls (other weights, adapters, another device) cannot make them stale. As in `fusion`, nothing is taken on
trust: the first product of each size is compared with PyTorch's.

Shapes: M tokens, a weight [N, K].
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

# Largest distance between two products, relative to their norm. Other dtypes stay PyTorch's.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LEAST_TOKENS = {torch.float32: 2, torch.bfloat16: 1}  # of a product; PyTorch's own of one float32 row reads as fast


def is_available() -> bool:
    """Whether oneDNN is there and switched on, on a CPU that it is known to be fast on."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    )


def pack(weight: Tensor) -> Tensor:
    """A copy of `weight` [N, K] in oneDNN's own layout for few tokens; opaque."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN: [..., N] of x [..., K] and a weight [N, K], packed or not."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@dataclass
class OneDnn:
    """oneDNN's two functions, when they are used, and how they compared with PyTorch."""

    max_tokens: int = 256  # M up to which it was measured
    min_weights: int = 2**18  # N * K; oneDNN takes 20 us for any product, longer than PyTorch takes for a small one
    # Packing SmolLM2-135M costs about what it gains in 15 rounds.
    pack_after: int = 8  # rounds of a call
    max_packed_bytes: int = 2 * 2**30
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear
    pack: Callable[[Tensor], Tensor] = pack
    agreed: dict[tuple, bool] = field(
        default_factory=dict
    )  # (M, N, K, dtype, has bias, is packed) -> equals PyTorch's


ONEDNN = OneDnn()  # of the process: each size is compared once


class PackedLinears:
    """Runs the linear layers of `models` by oneDNN while it is entered: around the forwards of each round.

    Small layers, and those that are more than an `nn.Linear` with plain weights (quantised, sharded, hooked by
    accelerate), are left alone, and so are all of a compiled model. Weights are packed once `pack_after` rounds of a call
    had products for oneDNN.
    Modules carry another `forward` while it is entered; on leaving, each call removes its own alone, so that two threads
    may enter at once.
    """

    def __init__(self, *models: nn.Module, onednn: OneDnn | None = None):
        modules = [module for model in models for module in model.modules()]
        self._onednn = ONEDNN if onednn is None else onednn
        self._layers: list[_Layer] = []
        if is_available() and not any(map(_is_compiled, modules)):
            self._layers = [
                _Layer(module, self._onednn)
                for module in modules
                if type(module) is nn.Linear and _is_plain(module, self._onednn.min_weights)
            ]
        self._num_rounds = 0

    def __enter__(self) -> None:
        took = [layer.took for layer in self._layers]
        self._num_rounds += any(took)
        if any(took) and self._num_rounds == self._onednn.pack_after:
            self._pack()
        for layer in self._layers:
            layer.took = False
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
        if size > self._onednn.max_packed_bytes:
            logger.info("%d weights stay unpacked: %.1f GiB.", len(weights), size / 2**30)
            return
        try:
            packed = {key: self._onednn.pack(weight) for key, weight in weights.items()}
        except RuntimeError as error:  # no memory, or a size that oneDNN does not pack
            logger.info("%d weights stay unpacked: %s", len(weights), error)
            return
        for layer in self._layers:
            layer.packed, layer.mark = packed[id(layer.weight)], _mark(layer.weight)
        seconds = time.perf_counter() - start
        logger.info("Packed %d weights: %.0f MiB in %.2f s.", len(weights), size / 2**20, seconds)


class _Layer:
    """Stands in for the forward of an `nn.Linear`."""

    def __init__(self, module: nn.Linear, onednn: OneDnn):
        self.module, self.weight, self.onednn = module, module.weight, onednn
        self.packed: Tensor | None = None
        self.mark: tuple | None = None  # of the weight when it was packed
        self.took = False  # whether it had a product for oneDNN in this round

    def __call__(self, input: Tensor) -> Tensor:
        parameters: dict[str, Any] = self.module._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if weight is not self.weight or not _fits(input, weight, self.onednn.max_tokens):
            return F.linear(input, weight, bias)
        self.took = True
        packed = self.packed if self.packed is not None and self.mark == _mark(weight) else None
        # With an unpacked weight, PyTorch's own product in 16 bits is oneDNN's already.
        if packed is None and weight.dtype != torch.float32:
            return F.linear(input, weight, bias)
        N, K = weight.shape
        key = (input.numel() // K, N, K, weight.dtype, bias is not None, packed is not None)
        given = weight if packed is None else packed
        agreed = self.onednn.agreed.get(key)
        if agreed is None:
            return _compare(self.onednn, key, input, weight, bias, given)
        return self.onednn.linear(input, given, bias) if agreed else F.linear(input, weight, bias)


def _fits(x: Tensor, weight: Tensor, max_tokens: int) -> bool:
    """Whether oneDNN may take the product: few tokens of the weight's dtype on a CPU, and no gradient to keep."""
    return (
        x.dtype == weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and x.dim() > 1
        and x.shape[-1] == weight.shape[-1]
        and LEAST_TOKENS[x.dtype] * x.shape[-1] <= x.numel() <= max_tokens * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _compare(onednn: OneDnn, key: tuple, x: Tensor, weight: Tensor, bias: Tensor | None, given: Tensor) -> Tensor:
    """The product, by oneDNN (with the weight as `given`) if that agrees with PyTorch; noted under `key`."""
    theirs = F.linear(x, weight, bias)
    if not bool(theirs.isfinite().all()):  # NaN equals nothing, so it would prove nothing
        return theirs
    try:
        ours = onednn.linear(x, given, bias)
    except RuntimeError as error:  # a size that oneDNN does not take
        logger.warning("oneDNN does not run %s: %s", key, error)
        onednn.agreed[key] = False
        return theirs
    distance = (ours.float() - theirs.float()).norm()
    is_same = ours.shape == theirs.shape and bool(distance <= TOLERANCE[x.dtype] * theirs.float().norm())
    if not is_same:
        logger.warning("oneDNN's product of %s is not PyTorch's: not used.", key)
    onednn.agreed[key] = is_same
    return ours if is_same else theirs


def _mark(weight: Tensor) -> tuple:
    """Changes when a weight is written to or moved, except through `weight.data`."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def _is_plain(module: nn.Linear, min_weights: int) -> bool:
    """Whether calling `module` is `F.linear` with plain weights on a CPU, and enough of them."""
    tensors: list[Any] = [x for x in (module.weight, module.bias) if x is not None]
    weight = tensors[0]
    return (
        "forward" not in vars(module)
        and all(type(x) is nn.Parameter and x.device.type == "cpu" and x.dtype == weight.dtype for x in tensors)
        and weight.is_contiguous()
        and weight.numel() >= max(1, min_weights)
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()))
    )


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_compiled(module: nn.Module) -> bool:
    """Whether `module` runs through `torch.compile`, which would compile again for each new forward."""
    is_wrapped = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules or is_wrapped
