"""Training of block drafters: D-Flash (arXiv:2602.06036) and DSpark (arXiv:2607.05147).

A block at slot i has its root at position i + 1 and sees the target's states of positions 0 .. i, as in serving. At depth
t it proposes token i + 2 + t, and is compared with the target's distribution there. A slot trains at the depths at which
an EAGLE-3 drafter trains (`batch.live_steps`), so batches, sums and metrics are the same. One forward runs all blocks of
a batch: each sees its own context and itself, and no other block.

Shapes: N tokens of the batch, L blocks, n tokens of a block, k depths, M context positions, H drafter width, r rank of
the Markov head.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...drafters.block_unroll import mask_blocks
from ...modeling import DFlashDrafterModel
from ...modeling.drafter_eagle3 import attend
from .batch import Batch, States
from .elementwise import working_dtype
from .head_loss import FusedHeadLoss, LossInputs, Method, StepSums, head_weight
from .target_head import DraftVocabulary, TargetHead

MOST_TOKENS = 1024  # tokens of blocks whose attention is computed at once
MOST_WITHOUT_GRADIENT = 16384  # tokens of blocks that run at once in evaluation, which takes every slot


class Group(NamedTuple):
    """Consecutive blocks whose attention is computed at once, and the context that they see."""

    blocks: slice  # of the batch's rows
    tokens: slice  # of the tokens of all blocks
    context: slice  # of the batch's tokens


def choose_blocks(batch: Batch, count: int, generator: np.random.Generator) -> Batch:
    """`batch` with at most `count` of its slots, drawn without replacement; the attention of rows is left out of account.

    Args:
        batch: Made without `every_slot`.
        count: Blocks to keep.
        generator: Draws them.
    """
    if count >= len(batch.slots):
        return batch
    return batch.with_slots(np.sort(generator.choice(len(batch.slots), count, replace=False)))


def make_groups(slots: np.ndarray, lengths: Sequence[int], block_size: int) -> Iterator[Group]:
    """Groups of the blocks at `slots` [L] of documents of these `lengths`, of at most `MOST_TOKENS` tokens each."""
    ends = np.cumsum(lengths)
    size = max(1, MOST_TOKENS // block_size)
    for first in range(0, len(slots), size):
        here = slots[first : first + size]
        document = int(np.searchsorted(ends, here[0], side="right"))
        begin = int(ends[document] - lengths[document])
        last = first + len(here)
        tokens = slice(first * block_size, last * block_size)
        yield Group(slice(first, last), tokens, slice(begin, int(here[-1]) + 1))


def run_blocks(drafter: DFlashDrafterModel, batch: Batch, aux_hidden_states: Tensor) -> Tensor:
    """[k, L, H] the drafter's normed outputs at the depths of the blocks of `batch`.

    Layers run as functions of their weights, which several processes may share.

    Args:
        drafter: Bound to its target.
        batch: N tokens, and the slots of L blocks.
        aux_hidden_states: [N, A*Ht], at the drafter's boundaries.
    """
    device, L = batch.rows.device, len(batch.slots)
    context = drafter.hidden_norm(drafter.fc(aux_hidden_states.to(working_dtype(device, drafter.dtype))))[None]
    size = L if torch.is_grad_enabled() else max(1, MOST_WITHOUT_GRADIENT // drafter.config.block_size)
    parts = [slice(first, min(first + size, L)) for first in range(0, L, size)]
    return torch.cat([_run_part(drafter, batch.with_slots(part), context) for part in parts], dim=1)


def _run_part(drafter: DFlashDrafterModel, batch: Batch, context: Tensor) -> Tensor:
    """The same of blocks that run together, with the context's features [1, N, H]."""
    n, rows, N = drafter.config.block_size, batch.rows, len(batch.input_ids)
    ids = drafter.make_block(batch.input_ids[rows + 1], n)  # [L, n]
    places = batch.position_ids[rows, None] + 1 + torch.arange(n, device=rows.device)  # [L, n]
    cos, sin = drafter.rotary_emb(drafter.norm.weight, torch.cat([batch.position_ids, places.flatten()])[None])
    at_context, at_block = (cos[:, :N], sin[:, :N]), (cos[:, N:], sin[:, N:])
    groups = list(make_groups(batch.slots, batch.lengths, n))
    masks: dict[int | None, list[Tensor]] = {}
    hidden = drafter.embed(ids.flatten()[None])  # [1, L*n, H]
    for i, layer in enumerate(drafter.layers):
        module: Any = layer
        window = drafter.config.window_of(i)
        if window not in masks:
            masks[window] = [mask_group(drafter, batch, group, window) for group in groups]
        given = (module, hidden, context, at_block, at_context, groups, masks[window])
        recomputes = module.gradient_checkpointing and module.training
        hidden = checkpoint(run_layer, *given, use_reentrant=False) if recomputes else run_layer(*given)
    out = drafter.norm(hidden)[0].unflatten(0, (-1, n))[:, -drafter.config.max_draft_depth :]  # [L, k, H]
    return out.transpose(0, 1)


def run_layer(
    layer: Any,  # a DFlashLayer
    hidden: Tensor,  # [1, L*n, H], of all blocks
    context: Tensor,  # [1, N, H]
    at_block: tuple[Tensor, Tensor],
    at_context: tuple[Tensor, Tensor],
    groups: Sequence[Group],
    masks: Sequence[Tensor],  # of each group
) -> Tensor:
    """A decoder layer [1, L*n, H], its attention computed group by group, so that few keys are looked at in vain."""
    attention = layer.self_attn
    query, key, value = attention.project(layer.input_layernorm(hidden), at_block)
    seen_key, seen_value = attention.read_context(context, at_context)  # [1, kv_heads, N, head_dim]
    outs = []
    for (_, tokens, seen), mask in zip(groups, masks, strict=True):
        keys, values = (
            torch.cat([of_context[:, :, seen], own[:, :, tokens]], dim=2)
            for of_context, own in ((seen_key, key), (seen_value, value))
        )
        outs.append(attend(attention, query[:, :, tokens], keys, values, mask))  # [1, l*n, heads, head_dim]
    hidden = hidden + attention.o_proj(torch.cat(outs, dim=1).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def mask_group(drafter: DFlashDrafterModel, batch: Batch, group: Group, window: int | None) -> Tensor:
    """`mask_blocks` of a group."""
    slots = batch.rows[group.blocks] - group.context.start
    starts = slots - batch.position_ids[batch.rows[group.blocks]]
    return mask_blocks(drafter, slots, starts, group.context.stop - group.context.start, window)


def read_markov(drafter: DFlashDrafterModel, before: Tensor, hidden_states: Tensor) -> Tensor:
    """[k, L, r] the input of the Markov head's last product, the text's own tokens drafted before.

    Args:
        drafter: With such a head.
        before: [k, L] int64, the token before each depth's.
        hidden_states: [k, L, H].
    """
    reads, state = [], None
    for t in range(len(before)):
        x, state = drafter.markov_head.read(before[t], hidden_states[t], state)
        reads.append(x)
    return torch.stack(reads)


def block_step(
    drafter: DFlashDrafterModel,
    batch: Batch,
    states: States,
    head: TargetHead,
    vocabulary: DraftVocabulary,
    method: Method,
) -> tuple[Tensor, StepSums]:
    """The loss of the blocks of `batch`, at all depths.

    The confidence head, where there is one, learns the chance of acceptance by binary cross entropy, at the scale of each
    depth; that is part of the loss, and not of its sums.

    Args:
        drafter: Bound to the target.
        batch: Made without `every_slot`; each of its rows is a block.
        states: The target's.
        head: The target's.
        vocabulary: The drafter's.
        method: `scale` is [k] for the k depths of a block.

    Returns:
        The loss [], which is the sum over depths of scale times loss, and its sums.
    """
    rows, depth, k = batch.rows, batch.depth, len(method.scale)
    if len(rows):
        hidden = run_blocks(drafter, batch, states.aux_hidden_states)  # [k, L, H]
    else:
        hidden = states.aux_hidden_states.new_zeros(k, 0, drafter.config.hidden_size)
    steps = torch.arange(k, device=rows.device)[:, None]
    at = (rows + 1 + steps).clamp_max(len(batch.input_ids) - 1)  # [k, L]
    before = batch.input_ids[at]
    token = vocabulary.to_draft[batch.input_ids[(at + 1).clamp_max(len(batch.input_ids) - 1)]]
    tensors = [hidden, head_weight(drafter)]
    if drafter.config.markov_rank and len(rows):
        tensors += [read_markov(drafter, before, hidden), drafter.markov_head.markov_w2.weight]
    inputs = LossInputs(head, vocabulary, method, states.last_hidden_states, depth, token, at)
    loss, *parts = FusedHeadLoss.apply(inputs, torch.is_grad_enabled(), *tensors)
    sums = StepSums(*parts)
    if not len(rows):  # every weight takes part in every step, or other processes would wait for its gradient
        return loss + sum(p.flatten()[:1].sum() * 0 for p in drafter.parameters() if p.requires_grad), sums
    if drafter.config.has_confidence_head:
        scores = drafter.find_confidence(before, hidden)  # [k, L]
        wide = sums.alphas.dtype
        errors = F.binary_cross_entropy_with_logits(scores.to(wide), sums.alphas.clamp(0, 1), reduction="none")
        loss = loss + (errors.where(steps < depth, 0).sum(1) * method.scale).sum()
    return loss, sums
