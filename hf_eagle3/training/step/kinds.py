"""How drafters of each kind are trained: what a batch is, and how its loss is computed. A new kind is a row here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from ...drafters.blocks import drafts_blocks
from .batch import AnchorCollator, Collator
from .blocks import train_blocks
from .head_loss import StepSums
from .ttt import ttt


class StepKind(NamedTuple):
    """A row of the table."""

    name: str
    fits: Callable[[PreTrainedConfig], bool]
    run: Callable[..., tuple[Tensor, StepSums]]  # drafter, batch, states, head, vocabulary, method -> loss and sums
    # Config, steps, and the slots of a batch that train (None: all) -> what makes batches.
    make_collator: Callable[[PreTrainedConfig, int, int | None], Collator]
    joins_steps: bool  # whether losses over several steps of a slot at once can be computed


def collate_slots(config: Any, steps: int, num_slots: int | None) -> Collator:  # noqa: ARG001  all that can train do
    """Batches for training-time test."""
    return Collator(steps, every_slot=config.num_hidden_layers > 1)


def collate_anchors(config: Any, steps: int, num_slots: int | None) -> Collator:  # noqa: ARG001  as above
    """Batches for blocks."""
    return AnchorCollator(steps, num_anchors=num_slots)


STEP_KINDS = (
    StepKind("blocks", drafts_blocks, train_blocks, collate_anchors, joins_steps=False),
    StepKind("training-time test", lambda config: True, ttt, collate_slots, joins_steps=True),  # noqa: ARG005
)


def find_step_kind(config: PreTrainedConfig) -> StepKind:
    """The first row that fits."""
    return next(kind for kind in STEP_KINDS if kind.fits(config))
