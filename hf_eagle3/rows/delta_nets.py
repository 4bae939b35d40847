"""Gated delta nets of the host over whole blocks, where what was rejected of the last block is known on the device alone.

Beside `recurrent.py`, which steps through a block by the host's own path for one token: here each part of a layer runs once,
over memory that the next block goes on from (`kernels.delta_rule`). Captured rounds do this.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.delta_rule import (
    DeltaMemory,
    Gates,
    convolve_rows,
    convolve_rows_eager,
    delta_rule_rows,
    delta_rule_rows_eager,
)
from .memory import BY_KERNELS


class Projected(NamedTuple):
    """What a gated delta net makes of its input, token by token."""

    mixed: Tensor  # [B, T, 2*H_k*K + H*V], queries, keys and values before the convolution
    gate: Tensor  # [B, T, H*V], of the norm behind the recurrence
    a: Tensor  # [B, T, H], as of `Gates`
    b: Tensor
    strength: float = 1.0


@dataclass(frozen=True)
class DeltaNet:
    """Where a class of the host has what a gated delta net needs; the rest is named alike in all of them."""

    project: Callable[[Any, Tensor], Projected]  # Any: the host's module
    norm: str = "norm"
    exit: str = "out_proj"


def project_apart(module: Any, x: Tensor) -> Projected:
    """By one projection for each part."""
    parts = (module.in_proj_qkv(x), module.in_proj_z(x), module.in_proj_b(x), module.in_proj_a(x))
    mixed, gate, b, a = parts  # in the host's order, which kernels that take several at once go by
    return Projected(mixed, gate, a, b)


def project_by_key_heads(module: Any, x: Tensor) -> Projected:
    """By two projections, whose outputs are in groups of the heads that share a key."""
    query, key, value, z, b, a = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
    return Projected(torch.cat([part.flatten(2) for part in (query, key, value)], dim=-1), z.flatten(2), a, b)


def project_as_attention(module: Any, x: Tensor) -> Projected:
    """By projections named as an attention's."""
    mixed = torch.cat([module.q_proj(x), module.k_proj(x), module.v_proj(x)], dim=-1)
    strength = 2.0 if module.allow_neg_eigval else 1.0
    return Projected(mixed, module.g_proj(x), module.a_proj(x), module.b_proj(x), strength)


APART = DeltaNet(project_apart)
# By class of the host.
DELTA_NETS = {
    **dict.fromkeys(("LaraMiniGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"), APART),
    "Qwen3NextGatedDeltaNet": DeltaNet(project_by_key_heads),
    "OlmoHybridGatedDeltaNet": DeltaNet(project_as_attention, "o_norm", "o_proj"),
}


def run_block(module: Any, hidden_states: Tensor, memory: DeltaMemory, kept: Tensor) -> Tensor:
    """What the host's `module` makes of a block.

    Args:
        module: Of a class in `DELTA_NETS`.
        hidden_states: [B, T, H], its input.
        memory: Its own, of these rows.
        kept: [B] int64, tokens of the last block that count.

    Returns:
        [B, T, H].
    """
    net = DELTA_NETS[type(module).__name__]
    B, T, _ = hidden_states.shape
    given = net.project(module, hidden_states)
    convolve, follow_rule = convolve_rows_eager, delta_rule_rows_eager
    if BY_KERNELS.get() and not torch.is_autocast_enabled(hidden_states.device.type):
        convolve, follow_rule = convolve_rows, delta_rule_rows
    mixed = convolve(given.mixed, module.conv1d.weight.squeeze(1), module.conv1d.bias, memory.window, kept)
    gates = Gates(given.a, given.b, module.A_log, module.dt_bias, given.strength)
    said = follow_rule(mixed, gates, memory, kept, num_key_heads=module.num_k_heads)  # [B, T, H, V]
    said = getattr(module, net.norm)(said.flatten(0, 2), given.gate.reshape(-1, said.shape[-1]))
    return getattr(module, net.exit)(said.reshape(B, T, -1))
