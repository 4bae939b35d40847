"""Answers of a target without and with its drafter, by turns: for a look, where `bench` would take minutes.

What is said of all prompts is a ratio of sums over them, so that a short answer does not swing it.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..console.opening import rendering
from ..decoding.cuda_graphs import synchronize
from ..speculation.stats import Speculation

STEADY = 1.5  # passes of one kind whose times differ by more than this factor were disturbed
WITHOUT, WITH = "without the drafter", "with the drafter"


class Run(NamedTuple):
    """One timed `generate` call."""

    tokens: tuple[int, ...]  # the new ones
    seconds: float
    speculation: Speculation | None  # None without a drafter


@dataclass
class Comparison:
    """What was measured: runs by prompt, and of each prompt by pass."""

    prompts: Sequence[str]
    plain: list[list[Run]] = field(default_factory=list)
    drafted: list[list[Run]] = field(default_factory=list)
    load: float = 0.0  # processes that wanted a core before anything was measured, for each core

    @property
    def is_identical(self) -> bool:
        """Whether all runs of each prompt gave the same tokens."""
        return all(is_same(*pair) for pair in zip(self.plain, self.drafted, strict=True))

    @property
    def num_tokens(self) -> int:
        """New tokens of all answers."""
        return sum(len(runs[0].tokens) for runs in self.plain)

    @property
    def seconds(self) -> tuple[float, float]:
        """Without and with the drafter: the median of each prompt's runs, summed over the prompts."""
        plain, drafted = (sum(map(median_seconds, runs)) for runs in (self.plain, self.drafted))
        return plain, drafted

    @property
    def speed_up(self) -> float:
        """How many times as fast the drafter makes it."""
        plain, drafted = self.seconds
        return plain / drafted

    @property
    def num_rounds(self) -> int:
        """Rounds that verified a draft, in one run of each prompt."""
        return sum(runs[0].speculation.rounds for runs in self.drafted if runs[0].speculation is not None)

    @property
    def acceptance_length(self) -> float:
        """Tokens gained a round; NaN without one."""
        return acceptance_length([runs[0] for runs in self.drafted])

    @property
    def spread(self) -> float:
        """The slowest pass over the fastest, of the kind where that is larger."""
        ratios = []
        for kind in (self.plain, self.drafted):
            passes = [sum(run.seconds for run in runs) for runs in zip(*kind, strict=True)]
            ratios.append(max(passes) / min(passes))
        return max(ratios)

    @property
    def disturbance(self) -> str:
        """Why the speeds mean little; nothing if they mean something."""
        if self.spread > STEADY:
            return f"equal passes took up to {self.spread:.1f} times as long as one another"
        return f"{self.load:.1f} processes wanted each core before it began" if self.load > 1 else ""


def is_same(plain: Sequence[Run], drafted: Sequence[Run]) -> bool:
    """Whether runs of one prompt gave the same tokens."""
    return len({run.tokens for run in (*plain, *drafted)}) == 1


def median_seconds(runs: Sequence[Run]) -> float:
    """Of one prompt."""
    return statistics.median(run.seconds for run in runs)


def acceptance_length(runs: Sequence[Run]) -> float:
    """Tokens gained a round, over all `runs`; NaN without a round."""
    counted = [run.speculation for run in runs if run.speculation is not None]
    rounds = sum(one.rounds for one in counted)
    return 1 + sum(one.num_accepted for one in counted) / rounds if rounds else float("nan")


def read_load() -> float:
    """Processes that wanted a core during the last minute, for each core; 0 where the system does not say."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, target: PreTrainedModel) -> dict[str, Tensor]:
    """The user's turn, rendered by the target's chat template where it has one."""
    if not tokenizer.chat_template:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        with rendering(tokenizer):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
    return {name: inputs[name].to(target.device) for name in ("input_ids", "attention_mask")}


def answer(
    target: PreTrainedModel,
    inputs: dict[str, Tensor],
    drafter: PreTrainedModel | None,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    **options: Any,  # further ones of `generate`
) -> Run:
    """One timed greedy `generate` call."""
    synchronize(target.device)
    start = time.perf_counter()
    out = target.generate(
        **inputs,
        assistant_model=drafter,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        streamer=streamer,
        **options,
    )
    tokens = tuple(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())  # waits for the device
    return Run(tokens, time.perf_counter() - start, getattr(out, "speculation", None))


def compare(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    passes: int,
    at_most: float = float("inf"),
    least: int | None = None,
    load: float = 0.0,
    on_run: Callable[[int, int], object] = lambda *_: None,
) -> Comparison:
    """Answer `prompts` without and with `drafter`, by turns.

    Args:
        target: The model that answers.
        drafter: Made for it.
        tokenizer: The target's.
        prompts: Turns of a user.
        max_new_tokens: Longest answer, in tokens.
        passes: Over all prompts.
        at_most: Seconds; a pass that would end later does not begin, nor in the first pass a prompt after the `least`.
        least: Prompts that are answered however long that takes; by default all.
        load: As `read_load` gave it before anything ran.
        on_run: Called before each run, with how many are done, and of how many.
    """
    inputs = [encode(tokenizer, prompt, target) for prompt in prompts]
    load = load if target.device.type == "cpu" else 0.0  # a GPU waits for no core
    found = Comparison(prompts, [[] for _ in prompts], [[] for _ in prompts], load)
    start, done = time.monotonic(), 0
    for number in range(passes):
        elapsed = time.monotonic() - start
        if number and elapsed * (number + 1) / number > at_most:
            break
        for i, given in enumerate(inputs):
            elapsed = time.monotonic() - start
            if not number and i >= (len(inputs) if least is None else least) and elapsed * (i + 1) / i > at_most:
                found, inputs = Comparison(prompts[:i], found.plain[:i], found.drafted[:i], load), inputs[:i]
                break
            for runs, assistant in ((found.plain[i], None), (found.drafted[i], drafter)):
                on_run(done, 2 * passes * len(inputs))
                runs.append(answer(target, given, assistant, max_new_tokens))
                done += 1
    return found
