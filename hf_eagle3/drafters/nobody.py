"""Nobody proposes: rounds of our loop without a drafter."""

import torch
from transformers import PreTrainedModel

from ..rows.cache import RowCache
from ..speculation.shape import DraftShape, Shapes
from .draft import Choose, Committed, Draft, DrafterKind, DrafterMemory, Prompted


def begin(
    drafter: PreTrainedModel | None,  # noqa: ARG001  as the protocol has it
    prompted: Prompted,
    shapes: Shapes,  # noqa: ARG001  as the protocol has it
    *,
    cache: RowCache | None = None,
) -> DrafterMemory:
    """As `draft.Begin`: memory of nothing."""
    nothing = torch.zeros_like(prompted.num_states)
    tokens, states = prompted.tokens[:, :0], prompted.states[:, :0]
    return DrafterMemory(tokens, states, nothing, nothing.clone(), nothing.clone(), 0, cache or RowCache(0, 0))


def catch_up(memory: DrafterMemory, committed: Committed, shape: DraftShape) -> None:
    """As `draft.CatchUp`."""


def read_pending(drafter: PreTrainedModel | None, memory: DrafterMemory) -> None:
    """As `draft.ReadPending`."""


def propose(
    drafter: PreTrainedModel | None,  # noqa: ARG001  as the protocol has it
    memory: DrafterMemory,  # noqa: ARG001  as the protocol has it
    shape: DraftShape,
    choose: Choose,  # noqa: ARG001  as the protocol has it
) -> Draft:
    """As `draft.Propose`.

    Raises:
        ValueError: Tokens are to be drafted.
    """
    raise ValueError(f"Without a drafter rounds have the shape NONE, got {shape.name}.")


NOBODY = DrafterKind(
    name="none",
    fits=lambda config: config is None,
    begin=begin,
    catch_up=catch_up,
    read_pending=read_pending,
    propose=propose,
    count_forwards=lambda shape: 0,  # noqa: ARG005  as of every kind
    has_steps=False,
)
