"""Training-time test: the drafter unrolled on its own features, and its loss against the target's logits."""

import torch
from torch import Tensor

from ...modeling import Eagle3DrafterModel
from .batch import Batch, States
from .head_loss import FusedHeadLoss, LossInputs, Method, StepSums, head_weight
from .target_head import DraftVocabulary, TargetHead
from .unroll_rows import unroll_rows


def ttt(
    drafter: Eagle3DrafterModel,
    batch: Batch,
    states: States,
    head: TargetHead,
    vocabulary: DraftVocabulary,
    method: Method,
) -> tuple[Tensor, StepSums]:
    """Unroll `drafter` over `batch` for as many steps as `method.scale` has, and compute its loss.

    Returns:
        The loss [], which is the sum over steps of scale times loss, and its sums.
    """
    steps = len(method.scale)
    if len(batch.rows):
        normed = unroll_rows(drafter, batch, states.aux_hidden_states, steps)  # [k, R, H]
    else:
        normed = states.aux_hidden_states.new_zeros(steps, 0, drafter.config.hidden_size)
    rows, depth, trained = batch.rows, batch.depth, batch.trained
    if trained is not None:
        normed, rows, depth = normed[:, trained], rows[trained], depth[trained]
    last = states.last_hidden_states[rows + 1]  # [L, Ht]
    ahead = torch.arange(2, steps + 2, device=rows.device)[:, None]
    token = batch.input_ids[(rows + ahead).clamp_max(len(batch.input_ids) - 1)]  # [k, L]
    inputs = LossInputs(head, vocabulary, method, last, depth, vocabulary.to_draft[token])
    loss, *sums, _, _ = FusedHeadLoss.apply(inputs, torch.is_grad_enabled(), normed, head_weight(drafter))
    if not len(rows):  # every weight takes part in every step, or other processes would wait for its gradient
        loss = loss + sum(p.flatten()[:1].sum() * 0 for p in drafter.parameters() if p.requires_grad)
    return loss, StepSums(*sums)
