"""One target in several processes, by tensor parallelism: each runs every forward, so all must say the same tokens.

What is chosen by chance or by the clock would differ, and processes that part wait for one another forever. So the first
one's choices are everybody's.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

Agree = Callable[[Tensor], Tensor]  # of a tensor that each process has: the first one's


def is_spread(model: PreTrainedModel) -> bool:
    """Whether processes have shards of the weights of `model`."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())  # a DTensor


def find_peers(target: PreTrainedModel) -> ProcessGroup | None:
    """The processes that run `target` together; None if this one has it for itself."""
    if (getattr(target, "tp_size", None) or 1) == 1:
        return None
    meshes = (p.device_mesh for p in target.parameters() if hasattr(p, "full_tensor"))
    mesh = next(meshes, None)
    if mesh is None:
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


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


def keep(values: Tensor) -> Tensor:
    """`values`, where nobody else has any."""
    return values
