"""P-EAGLE: all draft tokens by one forward. Positions behind the last real one hold a mask token and a learned state."""

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..rows.block import Block
from ..rows.layers import make_masks
from ..speculation.shape import DraftShape
from .chain import begin, catch_up, read_pending, take
from .draft import Choose, Draft, DrafterKind, DrafterMemory


def propose(drafter: PreTrainedModel, memory: DrafterMemory, shape: DraftShape, choose: Choose) -> Draft:
    """As `draft.Propose`: the tokens of a depth are chosen whatever those of others are.

    So all nodes of one depth have the same children. The forward runs over 2D positions in every row: the pending states,
    and masks from there on, of which the first D-1 count.
    """
    cache, D = memory.cache, shape.depth
    num_pending = memory.num_pending[:, None]  # [B, 1]
    block = Block(memory.start, memory.tokens.shape[1] + D - 1)
    ids = functional.pad(memory.tokens, (0, D - 1))  # [B, 2D]
    states = functional.pad(memory.states, (0, 0, 0, D - 1))  # [B, 2D, A*Ht]
    ids, states = drafter.with_masks(ids, states, num_pending)
    with cache.writing(block):
        out = drafter(
            input_ids=ids,
            aux_hidden_states=states,
            attention_mask=make_masks(drafter.config, block, cache.num_visible, drafter.dtype),
            position_ids=block.places + memory.first[:, None],
            past_key_values=cache,
            logits_to_keep=num_pending - 1 + torch.arange(D, device=num_pending.device),  # [B, D]
        )
    draft_ids, q = choose(out.logits, range(D), shape.width)  # [B, D, width], [B, D, V_d]
    return Draft(drafter.to_target_ids(take(draft_ids.flatten(1), shape.ranks(draft_ids.device))), q)


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
