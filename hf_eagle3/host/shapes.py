"""What the rounds of a call propose, as its settings say: chosen by itself, nothing, a chain or a tree."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from ..decoding.choosing import read_rates
from ..rows.forwards import why_no_trees
from ..speculation.rates import MAX_RANKS, Rates
from ..speculation.shape import NONE, DraftShape, Shapes, chain

DEFAULT_DEPTH = 3
MAX_DEPTH = 64  # no drafter is right that often, and a round's kernels and caches are made for few tokens
CHAINS = (1, 2, 3, 5)
# Tokens verified, the root's too, and most levels, of which each is a forward of the drafter. Powers of two fill the tiles
# of a matrix product: at eight rows, 8 more of them cost a seventh of a round (docs/log.md).
TREES = {8: 4, 16: 4, 32: 5}
TRIPLE = ("steps", "topk", "draft_tokens")  # as SGLang's speculative settings are called
SETTINGS = ("draft_shape", "num_assistant_tokens")


def resolve_shapes(
    target: PreTrainedModel, drafter: PreTrainedModel, given: GenerationConfig | None, call: dict[str, Any]
) -> Shapes:
    """What rounds may propose: by the call, its config, the target's own, or the drafter's; else to be chosen.

    Raises:
        ValueError: What was asked for is no shape.
    """
    if all(call.get(name) is not None for name in SETTINGS):
        raise ValueError("draft_shape and num_assistant_tokens both say what to draft each round: give one of them.")
    theirs = drafter.generation_config
    places: list[Mapping[str, Any]] = [call, *(vars(c) for c in (given, target.generation_config, theirs) if c)]
    if "num_assistant_tokens" in call or "draft_shape" in call:  # None there undoes what configs of the host say
        places = [call, vars(theirs)]
    asked = next(((name, p[name]) for p in places for name in SETTINGS if p.get(name) is not None), ("", "auto"))
    shape = read_depth(asked[1]) if asked[0] == "num_assistant_tokens" else read_shape(asked[1])
    if shape is None:
        return Shapes(list_candidates(drafter))
    if (deepest := drafter.config.max_draft_depth) is not None and shape.depth > deepest:
        raise ValueError(
            f"{asked[0]} asks for {shape.depth} draft tokens one after the other, and this drafter's blocks of "
            f"{drafter.config.block_size} have {deepest}."
        )
    widest = max((shape.parents.count(node) for node in range(shape.num_nodes)), default=0)
    if widest > (most := drafter.config.draft_vocab_size or drafter.config.vocab_size):
        raise ValueError(f"draft_shape has {widest} tokens after one, of a draft vocabulary of {most}.")
    return Shapes((shape,))


def keep_taken(target: PreTrainedModel, shapes: Shapes) -> Shapes:
    """Those of `shapes` that rounds of `target` can verify: chains alone where its layers follow one line of tokens.

    Raises:
        ValueError: What was asked for is a tree.
    """
    if (why_chains := why_no_trees(target)) is None:
        return shapes
    chains = tuple(shape for shape in shapes.shapes if shape.is_chain)
    if not chains:
        raise ValueError(
            f"draft_shape is a {shapes.name}, and {type(target).__name__} {why_chains}: draft a chain "
            "(num_assistant_tokens), or leave out draft_shape."
        )
    return Shapes(chains)


def read_depth(value: Any) -> DraftShape:  # Any: whatever was given
    """A chain of so many tokens.

    Raises:
        ValueError: It is not a whole number from 0 to `MAX_DEPTH`.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or value not in range(MAX_DEPTH + 1):
        raise ValueError(
            f"num_assistant_tokens is the number of tokens to draft each round, up to {MAX_DEPTH}, 0 for none; got "
            f"{value!r}."
        )
    return chain(int(value))


def find_depth(asked: Any, drafter: PreTrainedModel) -> int:  # Any: whatever was given
    """K of the chain that was asked for, else the drafter's own, else a default.

    Raises:
        ValueError: It is not a whole number from 0 to `MAX_DEPTH`.
    """
    default = min(DEFAULT_DEPTH, drafter.config.max_draft_depth or DEFAULT_DEPTH)
    places = (asked, drafter.generation_config.num_assistant_tokens, default)
    return read_depth(next(k for k in places if k is not None)).depth


def read_shape(value: Any) -> DraftShape | None:  # Any: whatever was given
    """The shape that a setting names; None if it is to be chosen.

    Raises:
        ValueError: It names none.
    """
    if isinstance(value, DraftShape):
        return value
    if isinstance(value, str) and value in ("auto", "off"):
        return None if value == "auto" else NONE
    if isinstance(value, Mapping) and set(value) == set(TRIPLE):
        return read_triple(*(value[name] for name in TRIPLE))
    if isinstance(value, Sequence) and not isinstance(value, str) and all(type(node) is int for node in value):
        shape = DraftShape(tuple(value))
        if shape.depth <= MAX_DEPTH:
            return shape
    raise ValueError(
        f'draft_shape is {value!r}, expected "auto", "off", the parent of each draft token (0 is the token before the '
        f"draft, n the n-th draft token; at most {MAX_DEPTH} one after the other), or a mapping with "
        f"{', '.join(TRIPLE)}. A chain of K is num_assistant_tokens=K."
    )


def read_triple(steps: Any, topk: Any, draft_tokens: Any) -> DraftShape:  # Any: whatever was given
    """The tree that expects most with SGLang's settings, where `draft_tokens` counts the token before the draft, too.

    Raises:
        ValueError: They make no tree.
    """
    numbers_given = dict(zip(TRIPLE, (steps, topk, draft_tokens), strict=True))
    if not all(type(number) is int and number > 0 for number in numbers_given.values()):
        raise ValueError(f"draft_shape counts in whole numbers above 0, got {numbers_given}.")
    if (
        steps > MAX_DEPTH
        or topk > MAX_RANKS
        or not steps < draft_tokens <= 64
        or (topk == 1 and draft_tokens != steps + 1)
    ):
        raise ValueError(
            f"draft_shape needs steps up to {MAX_DEPTH}, topk up to {MAX_RANKS}, and more draft_tokens than steps, up to "
            f"64 (with topk 1 one more); got {numbers_given}."
        )
    return Rates().fit(draft_tokens - 1, max_depth=steps, max_rank=topk)


def list_candidates(drafter: PreTrainedModel) -> tuple[DraftShape, ...]:
    """What is chosen from where nothing was asked for, the default first. The drafter's own rates say which trees."""
    rates = Rates(read_rates(drafter))
    size = drafter.config.draft_vocab_size or drafter.config.vocab_size
    deepest = drafter.config.max_draft_depth
    depths = sorted({*CHAINS, *([] if deepest is None else [deepest])})  # a whole block costs one forward, too
    depths = [k for k in depths if deepest is None or k <= deepest]
    first = min(DEFAULT_DEPTH, depths[-1])
    trees = (
        rates.fit(most - 1, max_depth=min(depth, depths[-1]), max_rank=min(size, MAX_RANKS))
        for most, depth in TREES.items()
    )
    others = (shape for shape in trees if not shape.is_chain)
    return (chain(first), NONE, *(chain(k) for k in depths if k != first), *others)
