"""How drafters of each kind are trained. A new kind is a file in `step/`, and a plan here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..drafters.blocks import drafts_blocks
from .arguments import Eagle3TrainingArguments
from .step.batch import Collator
from .step.blocks import block_step
from .step.head_loss import StepSums
from .step.ttt import ttt

EVAL_DEPTH = 3  # of an EAGLE-3 drafter, where nothing else is said

# The loss [] of a drafter over a batch, and its sums: of drafter, batch, states, target head, draft vocabulary, method.
Step = Callable[..., tuple[Tensor, StepSums]]


class Plan(NamedTuple):
    """How one drafter is trained."""

    step: Step
    num_steps: int  # k, draft steps or depths that have a loss
    eval_depth: int  # K of the acceptance lengths
    every_slot: bool  # whether slots run that do not train
    num_blocks: int | None = None  # of a micro-batch, at most; None where there are none

    def collator(self, depth: int | None = None) -> Collator:
        """Makes batches for at most `depth` steps; by default for training and evaluation."""
        return Collator(max(self.num_steps, self.eval_depth) if depth is None else depth, every_slot=self.every_slot)


def make_plan(config: Any, args: Eagle3TrainingArguments) -> Plan:  # Any: a drafter's config
    """The way to train a drafter with this config.

    Raises:
        ValueError: Arguments are not for drafters of its kind.
    """
    return (plan_blocks if drafts_blocks(config) else plan_unrolling)(config, args)


def plan_unrolling(config: Any, args: Eagle3TrainingArguments) -> Plan:  # Any: an Eagle3DrafterConfig
    """EAGLE-3's training-time test."""
    return Plan(
        step=ttt,
        num_steps=args.ttt_steps,
        eval_depth=args.eval_depth or EVAL_DEPTH,
        every_slot=config.num_hidden_layers > 1,
    )


def plan_blocks(config: Any, args: Eagle3TrainingArguments) -> Plan:  # Any: a DFlashDrafterConfig
    """Blocks at slots that are drawn anew each update."""
    deepest = config.max_draft_depth
    if (args.eval_depth or 0) > deepest:
        raise ValueError(f"eval_depth is {args.eval_depth}, and blocks of {config.block_size} draft {deepest} tokens.")
    return Plan(
        step=block_step,
        num_steps=deepest,
        eval_depth=args.eval_depth or deepest,
        every_slot=False,
        num_blocks=args.num_anchors,
    )
