"""Query, key and value projections with adjacent weights, so that one product computes all three.

Over many rows a key projection alone is too small a product for a large GPU: over 256 rows of Llama-3.1-8B the three
take 37 us on an H200, and 22 as one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def join_projections(*models: nn.Module) -> int:
    """Move the weights of query, key and value projections together; the number of layers that now have them so.

    For speed in large batches: rounds of more than 64 tokens (17 rows at K = 3) then run the three as one product, which
    rounds as cuBLAS chooses to for its size. Weights, names and forwards stay what they were, and so does memory: the
    parameters become views of one tensor. Call it before anything keeps addresses of the weights (CUDA graphs of your
    own, `torch.compile` with `mode="reduce-overhead"`). Layers whose projections are more than `nn.Linear` with plain
    weights of one dtype on one device (quantised, sharded, with adapters) are left alone.

    Args:
        models: Targets and drafters.
    """
    num_joined = 0
    for model in models:
        for module in model.modules():
            parts: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
            if not all(type(part) is nn.Linear for part in parts):
                continue
            weights, biases = [part.weight for part in parts], [part.bias for part in parts]
            has_biases = all(bias is not None for bias in biases)
            if (
                not _is_plain(weights)
                or (has_biases and not _is_plain(biases))
                or len({w.shape[1] for w in weights}) > 1
            ):
                continue
            for tensors in (weights, biases) if has_biases else (weights,):
                if view_as_one(tensors) is None:
                    _move_together(tensors)
            num_joined += 1
    return num_joined


def view_as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """`tensors` [N_i, ...] as one view [sum of N_i, ...], if they are adjacent in memory; else None."""
    first = tensors[0]
    storage, at = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        is_next = tensor.untyped_storage().data_ptr() == storage and tensor.storage_offset() == at
        if not is_next or not tensor.is_contiguous() or tensor.dtype != first.dtype:
            return None
        at += tensor.numel()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


@torch.no_grad()
def _move_together(tensors: Sequence[nn.Parameter]) -> None:
    joined = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, piece in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = piece


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether they are parameters with memory of their own, on one device, of one dtype."""
    first = tensors[0]
    return first.device.type != "meta" and all(
        type(x) is nn.Parameter and not x.is_inference() and x.device == first.device and x.dtype == first.dtype
        for x in tensors
    )
