"""The draft depth that is fastest here: what a forward over K+1 tokens costs differs from machine to machine."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..decoding.cuda_graphs import synchronize

WARM_UP_TOKENS = 8


def measure_depths(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompts: Sequence[Mapping[str, Tensor]],
    *,
    depths: Iterable[int] = (1, 2, 3, 4, 5),
    max_new_tokens: int = 32,
    repeats: int = 2,
    **options: Any,
) -> dict[int, float]:
    """How fast `target.generate` is with each draft depth, by turns.

        speeds = measure_depths(target, drafter, [inputs])
        drafter.generation_config.num_assistant_tokens = max(speeds, key=speeds.get)

    Args:
        target: The model to generate with.
        drafter: Made for it; its own depth stays as it is.
        prompts: What a tokenizer gives, `input_ids` [B, T] and what belongs to it, of each call.
        depths: To measure; 0 is decoding without drafting.
        max_new_tokens: Of each row.
        repeats: Runs over all prompts at each depth; the fastest counts.
        options: Further ones of `generate`; greedy if they do not say otherwise.

    Returns:
        Columns of new tokens a second, prompts included, by depth.
    """
    depths = list(depths)
    options = {"do_sample": False, **options}

    def run(depth: int, limit: int) -> float:
        tokens, seconds = 0, 0.0
        for inputs in prompts:
            synchronize(target.device)
            start = time.perf_counter()
            out = target.generate(
                **inputs, assistant_model=drafter, num_assistant_tokens=depth, max_new_tokens=limit, **options
            )
            synchronize(target.device)
            seconds += time.perf_counter() - start
            tokens += getattr(out, "sequences", out).shape[-1] - inputs["input_ids"].shape[-1]
        return tokens / seconds

    for depth in depths:
        run(depth, WARM_UP_TOKENS)
    speeds = dict.fromkeys(depths, 0.0)
    for _ in range(repeats):
        for depth in depths:
            speeds[depth] = max(speeds[depth], run(depth, max_new_tokens))
    return speeds
