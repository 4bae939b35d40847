"""One target in several processes, by tensor parallelism: each runs every forward, so all must say the same tokens.

What is chosen by chance or by the clock would differ, and processes that part wait for one another forever. So the first
one's choices are everybody's.
"""

import functools
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # some builds of PyTorch are for one process only

Agree = Callable[[Tensor], Tensor]  # of a tensor that each process has: the first one's


def is_spread(model: PreTrainedModel) -> bool:
    """Whether processes have shards of the weights of `model`."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())  # a DTensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may have a shard. All processes must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing memory with it; the tensor itself if it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def find_peers(target: PreTrainedModel) -> "ProcessGroup | None":
    """The processes that run `target` together; None if this one has it for itself."""
    if (getattr(target, "tp_size", None) or 1) == 1:
        return None
    for mesh in (p.device_mesh for p in target.parameters() if hasattr(p, "full_tensor")):
        if mesh.ndim == 1:
            return mesh.get_group()
        if "tp" in (mesh.mesh_dim_names or ()):
            return mesh.get_group("tp")
    return None


def is_spread_further(model: PreTrainedModel, peers: "ProcessGroup") -> bool:
    """Whether others than `peers` have shards of the weights of `model`, too."""
    ours = set(torch.distributed.get_process_group_ranks(peers))
    return any(
        not placement.is_replicate()
        and not ours.issuperset(torch.distributed.get_process_group_ranks(p.device_mesh.get_group(axis)))
        for p in model.parameters()
        if hasattr(p, "full_tensor")
        for axis, placement in enumerate(p.placements)
    )


def make_agree(target: PreTrainedModel) -> Agree:
    """How the processes that run `target` agree; all must call with the same shape."""
    peers = find_peers(target)
    if peers is None:
        return keep
    first = torch.distributed.get_global_rank(peers, 0)

    def agree(values: Tensor) -> Tensor:
        values = values.contiguous()
        torch.distributed.broadcast(values, src=first, group=peers)
        return values

    return agree


def is_true_for_any(target: PreTrainedModel, is_true: bool) -> bool:
    """Whether it is true for any of the processes that run `target`; all must call."""
    peers = find_peers(target)
    if peers is None:
        return is_true
    answers: list[Any] = [None] * peers.size()
    torch.distributed.all_gather_object(answers, is_true, group=peers)
    return any(answers)


_called_before_groups_end: list[Callable[[], None]] = []


def call_before_groups_end(function: Callable[[], None]) -> None:
    """Let `function` be called whenever process groups are about to be destroyed, which waits for graphs with messages."""
    if not _called_before_groups_end:
        _wrap_destroy()
    if function not in _called_before_groups_end:
        _called_before_groups_end.append(function)


# PyTorch 2.13 distributed/distributed_c10d.py:destroy_process_group
def _wrap_destroy() -> None:
    original = torch.distributed.destroy_process_group

    @functools.wraps(original)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        for function in _called_before_groups_end:
            function()
        gc.collect()  # what a traceback still holds, too
        original(*args, **kwargs)

    torch.distributed.destroy_process_group = destroy_process_group
    torch.distributed.distributed_c10d.destroy_process_group = destroy_process_group


def keep(values: Tensor) -> Tensor:
    """`values`, where nobody else has any."""
    return values
