"""EAGLE-3: a chain of draft tokens, or a tree, one draft step for each depth (arXiv:2503.01840, section 3)."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..rows.block import Block, is_by_rows, whole_rows
from ..rows.cache import RowCache, to_bucket
from ..rows.layers import make_masks
from ..speculation.shape import DraftShape, Shapes
from .draft import Choose, Committed, Draft, DrafterKind, DrafterMemory, Prompted


def begin(
    drafter: PreTrainedModel, prompted: Prompted, shapes: Shapes, *, cache: RowCache | None = None
) -> DrafterMemory:
    """As `draft.Begin`. `cache` has room for the prompts; by default one is made."""
    B, M, width = prompted.states.shape
    device = drafter.device
    num_states, first = prompted.num_states.to(device), prompted.first.to(device)
    if cache is None:
        cache = RowCache(drafter.config.num_hidden_layers, to_bucket(M + shapes.num_drafter_slots))
    if is_by_rows(prompted.num_states, M):
        parts = [(slice(b, b + 1), n - 1) for b, n in enumerate(prompted.num_states.tolist())]
    else:
        parts = [(slice(0, B), M - 1)]  # padding after each row's real states is overwritten by later writes
    for part, num_slots in parts:
        if not num_slots:
            continue
        block = whole_rows(part.stop - part.start, num_slots, device)
        view = cache if len(parts) == 1 else cache.view(part.start, 1, of=B)
        with view.writing(block, is_first=True):
            drafter(
                input_ids=prompted.tokens[part, 1 : num_slots + 1].to(device),
                aux_hidden_states=prompted.states[part, :num_slots],
                position_ids=block.places + first[part, None],
                past_key_values=view,
                writes_only=True,
            )
    states = prompted.states.new_zeros(B, shapes.num_pending, width)
    rows = torch.arange(B, device=states.device)
    states[:, 0] = prompted.states[rows, (num_states - 1).to(states.device)]
    return DrafterMemory(
        tokens=torch.zeros(B, shapes.num_pending, dtype=torch.long, device=device),
        states=states,
        num_pending=torch.ones_like(num_states),
        start=num_states - 1,
        first=first.clone(),
        room=shapes.num_drafter_slots,
        cache=cache,
    )


def catch_up(memory: DrafterMemory, committed: Committed, shape: DraftShape) -> None:
    """As `draft.CatchUp`: the draft has read what was pending."""
    device, n = memory.tokens.device, committed.tokens.shape[1]
    if committed.states is not None and not shape.num_nodes:
        wait_longer(memory, committed)
        return
    memory.tokens[:, :n].copy_(committed.tokens)
    if committed.states is not None:
        move_on(memory, memory.num_pending)
        memory.states[:, :n].copy_(committed.states)
    memory.num_pending.copy_(committed.num_new.to(device))


def wait_longer(memory: DrafterMemory, committed: Committed) -> None:
    """Let a state more be pending, after a round without a draft."""
    last = memory.tokens.shape[1] - 1  # a row that is done and stays goes on over junk
    place = memory.num_pending.clamp(max=last)[:, None]  # [B, 1]
    assert committed.states is not None
    memory.tokens.scatter_(1, place, committed.tokens.to(place.device))
    states = committed.states.to(memory.states.device)
    memory.states.scatter_(1, place[..., None].expand_as(states), states)
    memory.num_pending.copy_((memory.num_pending + 1).clamp(max=last + 1))


def move_on(memory: DrafterMemory, num_read: Tensor) -> None:
    """Begin `num_read` [B] slots further on. A row that is done and stays must not leave the cache."""
    memory.start.copy_((memory.start + num_read).clamp(max=memory.cache.capacity - memory.room))


def read_pending(drafter: PreTrainedModel, memory: DrafterMemory) -> None:
    """As `draft.ReadPending`: what is written behind a row's last pending state is junk, and written again later."""
    cache, block = memory.cache, Block(memory.start, memory.tokens.shape[1])
    with cache.writing(block):
        drafter(
            input_ids=memory.tokens,
            aux_hidden_states=memory.states,
            attention_mask=make_masks(drafter.config, block, cache.num_visible, drafter.dtype),
            position_ids=block.places + memory.first[:, None],
            past_key_values=cache,
            writes_only=True,
        )
    last = memory.num_pending[:, None] - 1  # [B, 1]
    memory.tokens[:, :1].copy_(memory.tokens.gather(1, last))
    memory.states[:, :1].copy_(memory.states.gather(1, last[..., None].expand(-1, -1, memory.states.shape[-1])))
    move_on(memory, memory.num_pending - 1)
    memory.num_pending.fill_(1)


def propose(drafter: PreTrainedModel, memory: DrafterMemory, shape: DraftShape, choose: Choose) -> Draft:
    """As `draft.Propose`: one draft step for each level of the shape.

    The first draft step runs over D+1 positions in every row. What it writes behind a row's last pending state is junk,
    as is all that the later steps write: the next round writes there again, from the target's own states.
    """
    cache, first = memory.cache, memory.first[:, None]  # [B, 1]
    last = (memory.num_pending - 1)[:, None]  # [B, 1]
    behind = memory.start + memory.num_pending  # [B], the first slot behind the pending states
    block = Block(memory.start, memory.tokens.shape[1])
    fed = {"input_ids": memory.tokens, "aux_hidden_states": memory.states, "logits_to_keep": last}
    tokens: list[Tensor] = []
    probs: list[Tensor] = []
    levels = shape.levels(memory.tokens.device)
    for depth, (level, following) in enumerate(zip(levels, [*levels[1:], None], strict=True)):
        with cache.writing(block):
            out = drafter(
                **fed,
                attention_mask=make_masks(drafter.config, block, cache.num_visible, drafter.dtype),
                position_ids=block.places + first,
                past_key_values=cache,
            )
        draft_ids, q = choose(out.logits, range(depth, depth + 1), level.width)  # [B, m, width], [B, m, V_d]
        tokens.append(drafter.to_target_ids(take(draft_ids.flatten(1), level.children)))  # [B, n]
        if q is not None:
            probs.append(q)
        if following is not None:
            feedback = out.feedback  # [B, m, H]
            if not depth:
                feedback = feedback.gather(1, last[..., None].expand(-1, -1, feedback.shape[-1]))  # [B, 1, H]
            block = Block(behind + following.num_before, following.num_fed, following.ancestry)
            fed = {"input_ids": take(tokens[-1], following.fed), "hidden_states": take(feedback, following.parents)}
    drafted = take(torch.cat(tokens, dim=1), shape.node_order(memory.tokens.device))
    return Draft(drafted, torch.cat(probs, dim=1) if probs else None)


def take(x: Tensor, index: Tensor | None) -> Tensor:
    """Those of `x` [B, n, ...] at `index` [n'] int64; all where there is none."""
    return x if index is None else x.index_select(1, index)


CHAIN = DrafterKind(
    name="EAGLE-3",
    fits=lambda config: True,  # noqa: ARG005  what no other kind knows
    begin=begin,
    catch_up=catch_up,
    read_pending=read_pending,
    propose=propose,
    count_forwards=lambda shape: shape.depth,
)
