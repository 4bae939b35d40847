"""Hidden states of a target that processes share by tensor parallelism.

Each process has rows of its own, and none can run the target without the others. So they run it together, over the rows
of one after the other: as many forwards as processes, each at its share of the cost, and the states of one process's rows
in memory at a time.
"""

from typing import Any

import torch
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from ..step.batch import Batch, States
from ..step.target_head import TargetHead
from .online import OnlineStates


class SharedStates:
    """The states of each process's own rows. All processes that share the target must call equally often.

    Args:
        source: Runs the target.
        peers: The processes that share it.
    """

    def __init__(self, source: OnlineStates, peers: ProcessGroup):
        self._source, self._peers = source, peers

    @property
    def head(self) -> TargetHead:
        """The target's head, whole."""
        return self._source.head

    @property
    def target(self) -> PreTrainedModel:
        """The target that runs."""
        return self._source.target

    def states(self, batch: Batch) -> States:
        """Run the target over the documents of `batch` and over those of the others."""
        everyones: list[Any] = [None] * self._peers.size()
        torch.distributed.all_gather_object(everyones, (batch.tokens, batch.lengths), group=self._peers)
        device = batch.input_ids.device
        kept: States | None = None
        for rank, (tokens, lengths) in enumerate(everyones):
            states = self._source.run(torch.from_numpy(tokens).split(lengths), device)
            if rank == self._peers.rank():
                kept = states
        assert kept is not None  # a process is among its peers
        return kept
