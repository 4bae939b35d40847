"""D-Flash (arXiv:2602.06036) and DSpark (arXiv:2607.05147): all draft tokens by one forward over a block.

A block is the root and mask tokens behind it, which see one another and, as further keys and values of every layer, the
target's states of the text before. A round's block is as long as the shape is deep.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..rows.block import Block
from ..rows.layers import make_masks
from ..speculation.shape import DraftShape
from ..speculation.tree import make_block_ancestry
from .chain import begin, catch_up, read_pending, take
from .draft import Choose, Draft, DrafterKind, DrafterMemory


def propose(drafter: PreTrainedModel, memory: DrafterMemory, shape: DraftShape, choose: Choose) -> Draft:
    """As `draft.Propose`: write what is pending to the cache, then the block behind it, whose slots are junk afterwards."""
    config, D = drafter.config, shape.depth
    write_pending(drafter, memory)
    root = memory.tokens.gather(1, memory.num_pending[:, None] - 1)[:, 0]  # [B]
    ids = drafter.make_block(root, D if config.drafts_from_root else D + 1)
    ancestry = None if config.is_causal else make_block_ancestry(ids.shape[1], ids.device)
    block = Block(memory.start + memory.num_pending, ids.shape[1], ancestry)
    with memory.cache.writing(block):
        out = drafter(
            input_ids=ids,
            attention_mask=make_masks(config, block, memory.cache.num_visible, drafter.dtype),
            position_ids=block.places + memory.first[:, None],
            past_key_values=memory.cache,
        )
    logits, hidden_states = out.logits[:, -D:], out.hidden_states[:, -D:]  # [B, D, V_d], [B, D, H]
    if config.markov_rank:
        return choose_in_turn(drafter, logits, hidden_states, root, shape, choose)
    draft_ids, q = choose(logits, range(D), shape.width)  # [B, D, width], [B, D, V_d]
    return Draft(drafter.to_target_ids(take(draft_ids.flatten(1), shape.ranks(draft_ids.device))), q)


def write_pending(drafter: PreTrainedModel, memory: DrafterMemory) -> None:
    """Write the pending states to the cache. What lies behind a row's last one is junk, and the block covers it, or hides it."""
    block = Block(memory.start, memory.tokens.shape[1])
    with memory.cache.writing(block):
        drafter(
            aux_hidden_states=memory.states,
            position_ids=block.places + memory.first[:, None],
            past_key_values=memory.cache,
            writes_only=True,
        )


def choose_in_turn(
    drafter: PreTrainedModel, logits: Tensor, hidden_states: Tensor, root: Tensor, shape: DraftShape, choose: Choose
) -> Draft:
    """A draft whose tokens depend on those before them, by the drafter's Markov head: one step for each depth.

    Args:
        drafter: With such a head.
        logits: [B, D, V_d] of the block, by depth.
        hidden_states: [B, D, H], likewise.
        root: [B] int64, the newest token of the text.
        shape: What to draft.
        choose: How.
    """
    before, state = root[:, None], None  # [B, m] int64, the nodes that are followed; [B, m, r]
    tokens: list[Tensor] = []
    probs: list[Tensor] = []
    levels = shape.levels(root.device)
    for depth, (level, following) in enumerate(zip(levels, [*levels[1:], None], strict=True)):
        m = before.shape[1]
        at = hidden_states[:, depth : depth + 1].expand(-1, m, -1)
        scores, state = drafter.add_markov(logits[:, depth : depth + 1], before, at, state)  # [B, m, V_d]
        draft_ids, q = choose(scores, range(depth, depth + 1), level.width)  # [B, m, width]
        tokens.append(drafter.to_target_ids(take(draft_ids.flatten(1), level.children)))  # [B, n]
        if q is not None:
            probs.append(q)
        if following is not None:
            before = take(tokens[-1], following.fed)
            state = None if state is None else take(state, following.parents)
    drafted = take(torch.cat(tokens, dim=1), shape.node_order(root.device))
    return Draft(drafted, torch.cat(probs, dim=1) if probs else None)


def drafts_blocks(config: PreTrainedConfig | None) -> bool:
    """Whether a drafter with this config drafts in blocks."""
    return getattr(config, "block_size", None) is not None


BLOCKS = DrafterKind(
    name="D-Flash",
    fits=drafts_blocks,
    begin=begin,
    catch_up=catch_up,
    read_pending=read_pending,
    propose=propose,
    count_forwards=lambda shape: min(shape.depth, 1),
    has_steps=False,
)
