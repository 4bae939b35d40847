"""Several processes: forwards through a drafter's wrappers, sums over processes, whole weights out of sharded ones."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..drafters.blocks import drafts_blocks
from ..modeling import DrafterModel
from ..tensor_parallel import find_peers, local, whole
from .loading import load_in_every_process
from .step.head_loss import merged_weight


def call_as_forward(model: nn.Module, drafter: nn.Module, function: Callable[[], Any]) -> Any:
    """Run `function` as the forward of `drafter`, through its wrappers, which synchronise gradients.

    Sharded weights are whole within it. Submodules are not called as modules there, so nothing else would gather them;
    their gradients are scattered when the backward pass of the whole ends.
    """

    def forward(_nothing: None) -> Any:
        for unit in sharded_units(drafter):
            unit.unshard()
        return function()

    drafter.forward = forward
    try:
        return model(None)  # DDP on a GPU needs an input to move
    finally:
        del drafter.forward
        if not torch.is_grad_enabled():  # else the backward pass does it
            for unit in sharded_units(drafter):
                unit.reshard()


def configure_fsdp(plugin: Any, drafter: DrafterModel, *, has_adapters: bool) -> None:  # Any: accelerate's plugin
    """Configure how FSDP2 shards `drafter`.

    Raises:
        ValueError: FSDP of version 1, or adapters.
    """
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError("Eagle3Trainer needs version 2 of FSDP: set fsdp_version: 2 (accelerate) or drop --fsdp.")
    # Else accelerate would broadcast the first process's drafter, which all processes have, and stop at its buffers
    # (accelerate 1.15: they are no DTensors).
    plugin.cpu_ram_efficient_loading = False
    load_in_every_process()  # the plugin has set the opposite
    if drafts_blocks(drafter.config):
        raise ValueError("Block drafters train with DDP, and not with FSDP: leave out --fsdp.")
    if has_adapters:
        raise ValueError("Adapters are too few weights to shard: train them with DDP, without FSDP.")
    if plugin.mixed_precision_policy is not None:  # else gradients and sums of losses would be kept in bfloat16
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    if not plugin.transformer_cls_names_to_wrap:  # else those that the class names, which a drafter may lack
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in drafter.layers})


def sharded_units(module: nn.Module) -> Iterator[FSDPModule]:
    """The modules that FSDP2 gathers and scatters as one."""
    return (unit for unit in module.modules() if isinstance(unit, FSDPModule))


def base_drafter(model: nn.Module) -> DrafterModel:
    """The drafter in an unwrapped `model`: the model itself, or the base of its adapters."""
    get_base: Any = getattr(model, "get_base_model", None)  # PEFT's
    return model if get_base is None else get_base()  # type: ignore[return-value]  # a drafter then


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """`values` summed over all processes; each must call with the same shape."""
    return accelerator.reduce(values, reduction="sum")


def number_targets(target: PreTrainedModel, accelerator: Accelerator) -> tuple[int, int]:
    """The number of this process's target among all, and how many there are. All processes must call."""
    peers = find_peers(target)
    first = accelerator.process_index if peers is None else torch.distributed.get_global_rank(peers, 0)
    firsts = accelerator.gather(torch.tensor([first], device=accelerator.device)).unique().tolist()
    return firsts.index(first), len(firsts)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which all processes have, sharded and placed as `like` is."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors on the CPU: as an optimizer of one process has it."""
    state = optimizer.state_dict()
    entries = {
        index: {name: whole(x).cpu() if isinstance(x, Tensor) else x for name, x in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give `optimizer` the state of `whole_optimizer_state`, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {
            name: shard_like(x, parameters[index]) if isinstance(x, Tensor) and x.dim() else x
            for name, x in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def load_whole_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights that all processes have whole into a model that may be sharded."""
    with torch.no_grad():
        own = model.state_dict()
        if own.keys() != weights.keys():
            raise ValueError(
                f"The checkpoint has other weights than this drafter: {sorted(own.keys() ^ weights.keys())}. Resume with "
                "the drafter that was trained."
            )
        for name, value in own.items():
            local(value).copy_(local(shard_like(weights[name], value)))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model`, whole. All processes must call."""
    return {name: whole(value).detach() for name, value in model.state_dict().items()}


def served_copy(model: nn.Module, dtype: torch.dtype, device: torch.device) -> DrafterModel:
    """A drafter of its own as it will be served: whole, adapters merged, in eval mode. All processes must call.

    It shares nothing with the one in training. The random state stays as it is.
    """
    drafter = base_drafter(model)
    with no_init_weights():
        served = type(drafter)(copy.deepcopy(drafter.config))
    with torch.no_grad():
        for name, value in served.state_dict().items():
            path, _, kind = name.rpartition(".")
            value.copy_(whole(_served_tensor(drafter.get_submodule(path), kind)))
    served.generation_config = copy.deepcopy(drafter.generation_config)
    return served.to(device=device, dtype=dtype).eval()


def _served_tensor(module: nn.Module, kind: str) -> Tensor:
    if (
        trained := getattr(module, "modules_to_save", None)
    ) is not None:  # PEFT's copy of a module, trained as a whole
        return getattr(trained[module.active_adapters[0]], kind)  # type: ignore[index]
    if hasattr(module, "get_delta_weight") and kind == "weight":
        return merged_weight(module)
    return getattr(getattr(module, "base_layer", module), kind)
