"""Selective state spaces of the host (Mamba-2) over whole blocks, as `delta_nets.py` has gated delta nets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.delta_rule import DeltaMemory, convolve_rows, convolve_rows_eager
from ..kernels.state_space import Steps, scan_rows, scan_rows_eager
from .memory import BY_KERNELS


def norm_gated(module: Any, said: Tensor, gate: Tensor) -> Tensor:  # Any: the host's module
    """What the heads say, times what opens, normed."""
    return module.norm(said, gate)


def gate_alone(module: Any, said: Tensor, gate: Tensor) -> Tensor:
    """The same, normed only where the model is."""
    return module.norm(said, gate) if module.mamba_rms_norm else said * F.silu(gate)


@dataclass(frozen=True)
class StateSpace:
    """Where classes of the host differ; the rest is named alike in all of them."""

    scale_input: Callable[[Any, Tensor], Tensor] = lambda module, x: x  # noqa: ARG005  called as the others are
    scale_projected: Callable[[Any, Tensor], Tensor] = lambda module, x: x  # noqa: ARG005  called as the others are
    gate: Callable[[Any, Tensor, Tensor], Tensor] = norm_gated


USUAL = StateSpace()
# By class of the host.
STATE_SPACES = {
    **dict.fromkeys(
        ("BambaMixer", "GraniteMoeHybridMambaLayer", "Mamba2Mixer", "NemotronHMamba2Mixer", "Zamba2MambaMixer"), USUAL
    ),
    "FalconH1Mixer": StateSpace(
        lambda module, x: x * module.ssm_in_multiplier, lambda module, x: x * module.mup_vector, gate_alone
    ),
}


def run_block(module: Any, hidden_states: Tensor, memory: DeltaMemory, kept: Tensor) -> Tensor:
    """What the host's `module`, of a class in `STATE_SPACES`, makes of a block; arguments as of `delta_nets.run_block`."""
    space = STATE_SPACES[type(module).__name__]
    B, T, _ = hidden_states.shape
    projected = space.scale_projected(module, module.in_proj(space.scale_input(module, hidden_states)))
    gate, mixed, step = projected.split([module.intermediate_size, module.conv_dim, module.num_heads], dim=-1)
    convolve, scan = convolve_rows_eager, scan_rows_eager
    if BY_KERNELS.get() and not torch.is_autocast_enabled(hidden_states.device.type):
        convolve, scan = convolve_rows, scan_rows
    mixed = convolve(mixed, module.conv1d.weight.squeeze(1), module.conv1d.bias, memory.window, kept)
    steps = Steps(step, module.A_log, module.dt_bias, module.D)
    said = scan(mixed, steps, memory, kept, num_groups=module.n_groups)  # [B, T, H, K]
    return module.out_proj(space.gate(module, said.reshape(B, T, -1), gate).to(hidden_states.dtype))
