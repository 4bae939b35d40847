"""Kinds of decoding, each a function of prompts."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ..decoding.cuda_graphs import synchronize
from ..host.refusals import is_drafter
from ..speculation.stats import Speculation
from . import dflash
from .names import DFLASH, DRAFTED, LOOKUP, PLAIN, STATIC, STOCK
from .prompts import Prompts

OF_OTHERS = {LOOKUP, DFLASH}  # drafting by other code; not available in every release, target or batch size
ONE_ROW = (dflash.ONE_ROW, "the host's assisted decoding takes one row at a time")


class Call(NamedTuple):
    """One `generate` call."""

    seconds: float
    rows: list[list[int]]  # new tokens, without pads
    speculation: Speculation | None  # of our loop
    num_forwards: int | None  # of the target, counted for other loops


Way = Callable[[Prompts, int], Call]  # decodes prompts, up to a number of new tokens


def list_eos(target: PreTrainedModel) -> list[int]:
    """The tokens that end a row."""
    eos = target.generation_config.eos_token_id
    return [token for token in (eos if isinstance(eos, list) else [eos]) if token is not None]


def timed(decode: Callable[[], Any], prompts: Prompts, eos: list[int]) -> tuple[float, list[list[int]], Any]:
    """Seconds, new tokens without pads, and the result of `decode`; waits for the device."""
    synchronize(prompts.inputs["input_ids"].device)
    start = time.perf_counter()
    out = decode()
    sequences = out if isinstance(out, Tensor) else out.sequences
    new = sequences[:, prompts.inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - start
    rows = [row[: next((i + 1 for i, token in enumerate(row) if token in eos), len(row))] for row in new]
    return seconds, rows, out


def by_single_rows(way: Way) -> Way:
    """`way`, which the host runs for one row only.

    Raises:
        ValueError: In the call: there is more than one row.
    """

    def decode(prompts: Prompts, limit: int) -> Call:
        if len(prompts.inputs["input_ids"]) > 1:
            raise ValueError(ONE_ROW[1])
        return way(prompts, limit)

    return decode


def make_ways(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    *,
    temperature: float,
    dflash_drafter: PreTrainedModel | None = None,
    swept: Mapping[str, Any] | None = None,  # Any: whatever `draft_shape` takes
) -> dict[str, Way]:
    """Each kind of decoding as a function; `swept` has further ones of ours, and the shape that each drafts."""
    depth = drafter.generation_config.num_assistant_tokens
    # A model may have a penalty, which D-Flash's code does not know and the judgement of ties does not allow for.
    options: dict[str, Any] = {"do_sample": temperature > 0, "repetition_penalty": 1.0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0}
    generate = partial(by_generate, target, **options)
    ways = {
        STOCK: generate(),
        STATIC: generate(cache_implementation="static"),
        LOOKUP: by_single_rows(generate(prompt_lookup_num_tokens=depth, cache_implementation="static")),
        PLAIN: generate(assistant_model=drafter, num_assistant_tokens=0),
        DRAFTED: generate(assistant_model=drafter),
        **{kind: generate(assistant_model=drafter, draft_shape=shape) for kind, shape in (swept or {}).items()},
    }
    if dflash_drafter is not None:
        ways[DFLASH] = by_dflash(target, dflash_drafter, temperature)
        if is_drafter(dflash_drafter):
            depth = dflash_drafter.config.max_draft_depth  # a whole block
            ways[DFLASH] = generate(assistant_model=dflash_drafter, num_assistant_tokens=depth)
    return ways


def by_generate(target: PreTrainedModel, **options: Any) -> Way:  # Any: whatever the host's `generate` takes
    """`target.generate` with `options`."""
    eos = list_eos(target)

    def decode(prompts: Prompts, limit: int) -> Call:
        def call() -> Any:
            return target.generate(**prompts.inputs, max_new_tokens=limit, return_dict_in_generate=True, **options)

        seconds, rows, out = timed(call, prompts, eos)
        return Call(seconds, rows, getattr(out, "speculation", None), None)

    return decode


def by_dflash(target: PreTrainedModel, drafter: PreTrainedModel, temperature: float) -> Way:
    """A D-Flash drafter, with a count of the target's forwards."""
    eos = list_eos(target)

    def decode(prompts: Prompts, limit: int) -> Call:
        num_forwards = 0

        def count(*_: object) -> None:
            nonlocal num_forwards
            num_forwards += 1

        request = dflash.Request(prompts.inputs, limit, temperature, eos)
        hook = target.register_forward_pre_hook(count)
        try:
            seconds, rows, _ = timed(lambda: dflash.decode(target, drafter, request), prompts, eos)
        finally:
            hook.remove()
        return Call(seconds, [row[:limit] for row in rows], None, num_forwards)

    return decode
