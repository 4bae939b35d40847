"""The draft of a round: what a drafter proposes after the newest verified token (arXiv:2503.01840, section 3).

A P-EAGLE drafter proposes all of it at once: positions behind the last real one hold a mask token and a learned state.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..compat import rewind
from ..speculation.sampling import ToProbs, draw, likeliest


class Feature(NamedTuple):
    """Where a draft starts: the drafter's output at the newest position with real states."""

    logits: Tensor  # [B, V_d], of the first draft token
    feedback: Tensor  # [B, 1, H]
    position_ids: Tensor  # [B, 1] int64, of the state behind it


class Draft(NamedTuple):
    """Draft tokens, and the law they were drawn from."""

    tokens: Tensor  # [B, K] int64, target vocabulary
    probs: Tensor | None  # [B, K, V_d] float32 over the draft vocabulary; None for a greedy draft


# Draft ids [B] and, unless greedy, the probabilities [B, V_d] they were drawn from, of logits [B, V_d].
Choose = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def choose_greedy(logits: Tensor) -> tuple[Tensor, None]:
    """The likeliest draft ids [B] of `logits` [B, V_d]."""
    return likeliest(logits), None


def make_choose_sampled(to_probs: ToProbs) -> Choose:
    """A choice that draws draft ids from `to_probs(logits)`."""

    def choose_sampled(logits: Tensor) -> tuple[Tensor, Tensor]:
        probs = to_probs(logits)  # [B, V_d]
        return draw(probs), probs

    return choose_sampled


def extend(
    drafter: PreTrainedModel, input_ids: Tensor, aux_hidden_states: Tensor, cache: Cache, *, position_ids: Tensor
) -> Feature:
    """Run the first draft step: over the positions committed since the last one, with the target's own states.

    Args:
        drafter: An `Eagle3DrafterModel`, bound to its target.
        input_ids: [B, T], the token one after each position; the last is the root.
        aux_hidden_states: [B, T, A*Ht].
        cache: The drafter's, over all earlier positions; extended by T.
        position_ids: [B, T], of the states.
    """
    out = drafter(
        input_ids=input_ids,
        aux_hidden_states=aux_hidden_states,
        position_ids=position_ids,
        past_key_values=cache,
        logits_to_keep=1,
    )
    return Feature(out.logits[:, -1], out.feedback[:, -1:], position_ids[:, -1:])


def choose_at_once(drafter: PreTrainedModel, logits: Tensor, choose: Choose) -> Draft:
    """The draft of a P-EAGLE drafter: token k is chosen by `logits[:, k]` of [B, K, V_d], whatever the others are."""
    draft_ids, q = choose(logits.flatten(0, 1))  # [B*K], [B*K, V_d]
    tokens = drafter.to_target_ids(draft_ids).view(logits.shape[:2])
    return Draft(tokens, None if q is None else q.view(logits.shape))


def draft_parallel(drafter: PreTrainedModel, feature: Feature, cache: Cache, *, depth: int, choose: Choose) -> Draft:
    """Propose `depth` tokens after the root: the first from `feature`, all others by one forward over masks.

    Arguments as of `draft_chain`, for a P-EAGLE drafter.
    """
    logits, position_ids = feature.logits[:, None], feature.position_ids  # [B, 1, V_d], [B, 1]
    if depth > 1:
        offsets = torch.arange(1, depth, device=position_ids.device)  # [K-1]
        ids = offsets.new_zeros(len(logits), depth - 1)
        states = drafter.mask_hidden.new_zeros(*ids.shape, drafter.mask_hidden.shape[-1])
        ids, states = drafter.with_masks(ids, states, ids.new_zeros(len(ids), 1))
        out = drafter(
            input_ids=ids, aux_hidden_states=states, position_ids=position_ids + offsets, past_key_values=cache
        )
        logits = torch.cat([logits, out.logits], dim=1)  # [B, K, V_d]
    rewind(cache, depth - 1)
    return choose_at_once(drafter, logits, choose)


def draft_chain(drafter: PreTrainedModel, feature: Feature, cache: Cache, *, depth: int, choose: Choose) -> Draft:
    """Propose `depth` tokens after the root: the first from `feature`, each later one by a draft step of its own.

    Args:
        drafter: An `Eagle3DrafterModel`, bound to its target.
        feature: What `extend` returned.
        cache: The drafter's, over verified positions; left as it was found.
        depth: K, at least 1.
        choose: How draft ids come from logits.
    """
    if drafter.config.is_parallel:
        return draft_parallel(drafter, feature, cache, depth=depth, choose=choose)
    logits, feedback, position_ids = feature
    tokens: list[Tensor] = []
    probs: list[Tensor] = []
    for step in range(depth):
        if step:
            position_ids = position_ids + 1
            out = drafter(
                input_ids=tokens[-1][:, None], hidden_states=feedback, position_ids=position_ids, past_key_values=cache
            )
            logits, feedback = out.logits[:, -1], out.feedback
        draft_ids, q = choose(logits)  # [B], [B, V_d]
        tokens.append(drafter.to_target_ids(draft_ids))
        if q is not None:
            probs.append(q)
    # These entries rest on the drafter's own features; the next round feeds accepted tokens again, with real states.
    rewind(cache, depth - 1)
    return Draft(torch.stack(tokens, dim=1), torch.stack(probs, dim=1) if probs else None)
