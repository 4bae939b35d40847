"""Training-time test: the drafter unrolled on its own features, against what the target says.

How it is unrolled is in `hf_eagle3/unroll.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..features import StateRecorder
from ..modeling import Eagle3DrafterModel
from ..unroll import attention_kernels, live_slots, shift, unroll
from .losses import soft_cross_entropy


class Lesson(NamedTuple):
    """What the target says about a batch. M counts the positions before a supervised token."""

    aux_hidden_states: Tensor  # [B, T, A*Ht]
    probs: Tensor  # [M, V_d] float32, softmax after restriction to the draft vocabulary
    row: Tensor  # [B, T] int64, each position's row of `probs`; 0 where there is none
    argmax: Tensor  # [B, T] int64, the target's next token; -1 where there is no row
    in_vocabulary: Tensor  # [B, T] bool, whether the drafter can propose it


class StepSums(NamedTuple):
    """Sums over the live slots of a batch, by step; to be added over batches, then divided."""

    loss: Tensor  # [k] float32
    correct: Tensor  # [k] int64, the drafter's argmax is the target's; a token it cannot propose is a miss
    num_live: Tensor  # [k] int64, live slots
    hits: Tensor  # [k, B, T] bool, the drafter's argmax is the token in the data


@torch.no_grad()
def teach(target: PreTrainedModel, drafter: Eagle3DrafterModel, batch: dict[str, Tensor]) -> Lesson:
    """Run the frozen target over `batch` (`input_ids`, `attention_mask`, `loss_mask`, each [B, T])."""
    device, boundaries = batch["input_ids"].device, drafter.bound_aux_layer_ids
    if boundaries is None:
        raise ValueError("The drafter is bound to no target: call drafter.bind(target) first.")
    with StateRecorder(target, boundaries) as recorder, attention_kernels():
        logits = target(
            input_ids=batch["input_ids"].to(target.device),
            attention_mask=batch["attention_mask"].to(target.device),
            use_cache=False,
        ).logits  # [B, T, V]
        aux_hidden_states = recorder.take(device)

    needed = shift(batch["loss_mask"], 1)  # [B, T], positions before a supervised token
    logits = logits[needed.to(logits.device)].to(device)  # [M, V]
    row = torch.zeros_like(batch["input_ids"])
    row[needed] = torch.arange(len(logits), device=device)
    argmax = torch.full_like(row, -1)
    argmax[needed] = logits.argmax(-1)
    ids = drafter.draft_to_target_ids
    proposable = torch.zeros(drafter.config.vocab_size, dtype=torch.bool, device=device)
    proposable[ids] = True
    return Lesson(
        aux_hidden_states=aux_hidden_states,
        probs=logits[:, ids].float().softmax(-1),
        row=row,
        argmax=argmax,
        in_vocabulary=proposable[argmax.clamp_min(0)] & needed,
    )


def ttt(drafter: Eagle3DrafterModel, batch: dict[str, Tensor], lesson: Lesson, ttt_steps: int) -> StepSums:
    """Unroll the drafter over a batch and compare each live slot with the target, step by step.

    A slot whose target token lies outside the draft vocabulary adds no loss: it can never be accepted, and the
    restricted teacher is noise there. It does count, as a miss.
    """
    input_ids = batch["input_ids"]
    live = live_slots(batch["loss_mask"], ttt_steps)  # [k, B, T]
    losses, correct, hits = [], [], torch.zeros_like(live)
    for t, normed in enumerate(unroll(drafter, input_ids, lesson.aux_hidden_states, ttt_steps)):
        at = live[t]
        logits = drafter.compute_logits(normed[at])  # [L, V_d]
        row, argmax = shift(lesson.row, 1 + t)[at], shift(lesson.argmax, 1 + t)[at]  # [L]
        weight = shift(lesson.in_vocabulary, 1 + t)[at]  # [L]
        losses.append((soft_cross_entropy(logits, lesson.probs[row]) * weight).sum())
        with torch.no_grad():
            proposed = drafter.to_target_ids(logits.argmax(-1))  # [L]
            correct.append((proposed == argmax).sum())
            hits[t][at] = proposed == shift(input_ids, 2 + t)[at]
    return StepSums(torch.stack(losses), torch.stack(correct), live.flatten(1).sum(1), hits)
