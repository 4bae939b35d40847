"""A block drafter at many slots of a text at once, as `unroll.py` has drafters that go step by step.

A block at slot i has its root at position i + 1 and sees the target's states of positions 0 .. i, as in serving.
"""

import torch
from torch import Tensor

from ..modeling import DFlashDrafterModel

MOST_TOKENS = 1024  # of blocks that run at once


def mask_blocks(
    drafter: DFlashDrafterModel, slots: Tensor, starts: Tensor, num_context: int, window: int | None
) -> Tensor:
    """[1, 1, L*n, M + L*n], as the drafter's attention takes it: the keys each token of a block sees, among the context and
    all blocks.

    Args:
        drafter: Its config says how long a block is, and whether it is causal.
        slots: [L] int64, the last context position of each block.
        starts: [L] int64, the first one, where its document begins.
        num_context: M.
        window: A token at position p sees keys j > p - window; None: all.
    """
    L, n, device = len(slots), drafter.config.block_size, slots.device
    keys, offset = torch.arange(num_context, device=device), torch.arange(n, device=device)
    context = ((keys >= starts[:, None]) & (keys <= slots[:, None]))[:, None].expand(L, n, -1)  # [L, n, M]
    own = torch.ones(n, n, dtype=torch.bool, device=device)  # of one block
    if drafter.config.is_causal:
        own = own.tril()
    if window is not None:
        places = slots[:, None] + 1 + offset  # [L, n], of the queries, counted as the context is
        context = context & (keys > places[..., None] - window)
        own = own & (offset > offset[:, None] - window)
    same = torch.eye(L, dtype=torch.bool, device=device)
    blocks = same[:, None, :, None] & own[None, :, None]  # [L, n, L, n]
    mask = torch.cat([context.flatten(0, 1), blocks.reshape(L * n, L * n)], dim=1)[None, None]
    if drafter.config._attn_implementation != "eager":
        return mask
    return torch.zeros_like(mask, dtype=drafter.dtype).masked_fill(~mask, torch.finfo(drafter.dtype).min)


def unroll_blocks(drafter: DFlashDrafterModel, ids: Tensor, aux_hidden_states: Tensor, slots: Tensor) -> Tensor:
    """[L, k, H] the drafter's normed outputs at all depths of a whole block at each slot.

    Args:
        drafter: Bound to its target.
        ids: [1, S] int64, a text.
        aux_hidden_states: [1, S, A*Ht], at the drafter's boundaries.
        slots: [L] int64, each below S - 1.
    """
    n = drafter.config.block_size
    parts = slots.split(max(1, MOST_TOKENS // n))
    return torch.cat([_unroll_part(drafter, ids, aux_hidden_states, part) for part in parts])


def _unroll_part(drafter: DFlashDrafterModel, ids: Tensor, aux_hidden_states: Tensor, slots: Tensor) -> Tensor:
    """The same of blocks that run together."""
    config, n, device = drafter.config, drafter.config.block_size, ids.device
    M = int(slots.max()) + 1
    blocks = drafter.make_block(ids[0, slots + 1], n)  # [L, n]
    places = slots[:, None] + 1 + torch.arange(n, device=device)  # [L, n]
    starts = torch.zeros_like(slots)
    out = drafter(
        input_ids=blocks.reshape(1, -1),
        aux_hidden_states=aux_hidden_states[:, :M],
        attention_mask={
            name: mask_blocks(drafter, slots, starts, M, config.window_of(layer))
            for layer, name in enumerate(config.layer_types or ["full_attention"])
        },
        position_ids=torch.cat([torch.arange(M, device=device), places.flatten()])[None],
        has_logits=False,
    )
    return out.hidden_states[0].unflatten(0, (-1, n))[:, -config.max_draft_depth :]
