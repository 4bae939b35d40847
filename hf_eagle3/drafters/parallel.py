"""P-EAGLE: all draft tokens by one forward. Positions behind the last real one hold a mask token and a learned state."""

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..rows.block import Block
from ..rows.masks import make_masks
from ..speculation.shape import DraftShape
from .chain import begin, catch_up, read_pending
from .draft import Choose, Draft, DrafterKind, DrafterMemory


def propose(drafter: PreTrainedModel, memory: DrafterMemory, shape: DraftShape, choose: Choose) -> Draft:
    """As `draft.Propose`, for a chain: token k is chosen whatever the others are.

    The forward runs over 2K positions in every row: the pending states, and masks from there on, of which the first K-1
    count.
    """
    cache, K = memory.cache, shape.depth
    num_pending = memory.num_pending[:, None]  # [B, 1]
    block = Block(memory.start, memory.tokens.shape[1] + K - 1)
    ids = functional.pad(memory.tokens, (0, K - 1))  # [B, 2K]
    states = functional.pad(memory.states, (0, 0, 0, K - 1))  # [B, 2K, A*Ht]
    ids, states = drafter.with_masks(ids, states, num_pending)
    with cache.writing(block):
        out = drafter(
            input_ids=ids,
            aux_hidden_states=states,
            attention_mask=make_masks(drafter.config, block, cache.num_visible, drafter.dtype),
            position_ids=block.places + memory.first[:, None],
            past_key_values=cache,
            logits_to_keep=num_pending - 1 + torch.arange(K, device=num_pending.device),  # [B, K]
        )
    draft_ids, q = choose(out.logits, 0)  # [B, K], [B, K, V_d]
    return Draft(drafter.to_target_ids(draft_ids), q)


PARALLEL = DrafterKind(
    name="P-EAGLE",
    fits=lambda config: config is not None and config.mask_token_id is not None,
    begin=begin,
    catch_up=catch_up,
    read_pending=read_pending,
    propose=propose,
    count_forwards=lambda shape: min(shape.depth, 1),
    has_steps=False,
)
