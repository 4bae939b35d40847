"""A look at a target and its drafter that takes seconds: equal texts, speed, and one sentence of advice."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..host.loop_choice import OWN_LOOP
from ..host.shapes import read_depth
from ..speculation.shape import chain
from .equality import HALVES, Text, first_difference, measure_gap
from .results import rates_by_depth
from .side_by_side import Comparison, answer, compare, encode

WARM_UP_TOKENS = 8
PASSES, AT_MOST = 3, 11.0  # over all prompts, and the seconds after which none begins
POOR = 1.2  # acceptance length under which drafts are hardly ever right
LEAST_GAIN = 1.05  # of rounds that choose what they draft, to be worth advice


@dataclass(frozen=True)
class Difference:
    """Where an answer with the drafter first differs from the one without."""

    prompt: str
    position: int  # of the new token, counted from 0
    tokens: tuple[str, str]  # without the drafter, and with it; empty where a text ended
    gap: float  # how far the worse of both is below the top
    budget: float  # how much of that rounding explains

    @property
    def is_tie(self) -> bool:
        """Whether both tokens are the target's own."""
        return self.gap <= self.budget

    def __str__(self) -> str:
        plain, drafted = map(repr, self.tokens)
        where = f"{self.prompt!r} differs at new token {self.position}, {plain} without and {drafted} with the drafter"
        if self.is_tie:
            return f"{where}: a tie, {self.gap:.3g} apart, where rounding explains {self.budget:.3g}"
        return f"{where}: no tie"


@dataclass(frozen=True)
class Check:
    """What was found."""

    found: Comparison
    differences: list[Difference]
    chosen: float | None  # how many times as fast rounds are that choose what they draft; None where they did
    is_half: bool  # dtypes of 16 bits, in which ties are possible
    on_gpu: bool

    @property
    def is_equal(self) -> bool:
        """Whether texts differ at ties alone."""
        return all(difference.is_tie for difference in self.differences)

    @property
    def loop(self) -> tuple[str, str]:
        """Which loop decoded with the drafter, and why."""
        counted = self.found.drafted[0][0].speculation
        return (counted.loop, counted.why) if counted is not None else ("", "no drafter took part")

    @property
    def depth(self) -> int:
        """K, draft tokens a round at most."""
        return max((runs[0].speculation.depth for runs in self.found.drafted if runs[0].speculation), default=0)

    @property
    def drafted(self) -> str:
        """The drafts of the rounds, in words."""
        shapes = Counter[str]()
        for runs in self.found.drafted:
            shapes.update({} if runs[0].speculation is None else runs[0].speculation.shapes)
        if not shapes.keys() - {chain(self.depth).name}:
            return f"{self.depth} draft tokens a round"
        return f"rounds that choose what they draft, most often {shapes.most_common(1)[0][0]}"

    @property
    def rates(self) -> list[float | None]:
        """[K] the acceptance rate of each draft token."""
        runs = [runs[0].speculation for runs in self.found.drafted]
        return rates_by_depth([(s.rounds_reaching, s.rounds_accepting) for s in runs if s is not None])

    @property
    def round_cost(self) -> float:
        """The time of a round, in plain steps."""
        return self.found.acceptance_length / self.found.speed_up

    @property
    def advice(self) -> str:
        """The one thing to do, or that there is nothing to do."""
        return next(sentence(self) for holds, sentence in ADVICE if holds(self))

    def __str__(self) -> str:
        plain, drafted = self.found.seconds
        count, num_prompts = self.found.num_tokens, len(self.found.prompts)
        rates = " ".join("-" if rate is None else f"{rate:.2f}" for rate in self.rates) or "-"
        lines = [
            f"Texts   {num_prompts - len(self.differences)} of {num_prompts} are the same, token for token",
            *(f"        {difference}" for difference in self.differences),
            f"Speed   {count / plain:.1f} tok/s without the drafter, {count / drafted:.1f} with it: "
            f"{self.found.speed_up:.2f} times as fast",
            f"Drafts  {self.found.acceptance_length:.2f} tokens a round of at most {self.depth + 1}; accepted by depth: {rates}",
            f"Rounds  each takes as long as {self.round_cost:.2f} plain steps",
            f"Advice  {self.advice}",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as data."""
        plain, drafted = self.found.seconds
        return {
            "num_prompts": len(self.found.prompts),
            "is_equal": self.is_equal,
            "differences": [{**vars(difference), "is_tie": difference.is_tie} for difference in self.differences],
            "tokens_per_second": {"without": self.found.num_tokens / plain, "with": self.found.num_tokens / drafted},
            "speed_up": self.found.speed_up,
            "depth": self.depth,
            "acceptance_length": self.found.acceptance_length,
            "acceptance_rate_by_depth": self.rates,
            "round_cost": self.round_cost,
            "chosen_times_as_fast": self.chosen,
            "loop": self.loop[0],
            "why": self.loop[1],
            "disturbance": self.found.disturbance,
            "advice": self.advice,
        }


# Whether a sentence holds, and the sentence: the first that does is given.
ADVICE: tuple[tuple[Callable[[Check], bool], Callable[[Check], str]], ...] = (
    (
        lambda c: not c.is_equal,
        lambda _: "Texts differ where they must not: please report it, with the output of `hf-eagle3 env`.",
    ),
    (
        lambda c: not c.found.num_rounds,
        lambda c: f"No draft was verified ({c.loop[1]}): ask for longer answers, or give --num-draft-tokens.",
    ),
    (
        lambda c: bool(c.found.disturbance),
        lambda c: f"Check again when the machine is quiet: {c.found.disturbance}, so the speeds mean little.",
    ),
    (
        lambda c: c.found.acceptance_length < POOR,
        lambda _: (
            "Drafts are hardly ever right: `hf-eagle3 doctor` measures whether the drafter's config is misread, or the "
            "drafter was made for another target."
        ),
    ),
    (
        lambda c: (c.chosen or 0) >= LEAST_GAIN,
        lambda c: (
            f"Let rounds choose what they draft (num_assistant_tokens=None): {c.chosen:.2f} times as fast as "
            f"{c.depth} tokens each here."
        ),
    ),
    (
        lambda c: c.found.speed_up < 1,
        lambda c: (
            f"Leave the drafter out here: a round takes as long as {c.round_cost:.1f} plain steps and brings "
            f"{c.found.acceptance_length:.2f} tokens."
        ),
    ),
    (
        lambda c: c.loop[0] != OWN_LOOP,
        lambda c: f"Our own loop would be faster than the host's, which decoded here: {c.loop[1]}.",
    ),
    (lambda c: c.on_gpu and not c.is_half, lambda _: "Load both in bfloat16: a GPU reads half as much then."),
    (
        lambda _: True,
        lambda c: f"Keep it as it is: {c.found.speed_up:.2f} times as fast, with {c.drafted}.",
    ),
)


def check(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    load: float,
    least: int | None = None,
    max_new_tokens: int = 32,
    depth: int | None = None,
    on_step: Callable[..., object] = lambda *_: None,
) -> Check:
    """Compare the texts and the speed of `target` without and with `drafter`.

    Args:
        target: The model that answers.
        drafter: Made for it.
        tokenizer: The target's.
        prompts: Turns of a user.
        load: As `read_load` gave it before anything ran.
        least: Of the prompts that are answered on a slow machine; by default all.
        max_new_tokens: Longest answer, in tokens.
        depth: K; by default the drafter's own, or as rounds choose.
        on_step: Called with what comes next, and where it is counted, how many are done and of how many.
    """
    if depth is not None:
        drafter.generation_config.num_assistant_tokens = read_depth(depth).depth
    on_step("Warming up")
    for assistant in (None, drafter):
        answer(target, encode(tokenizer, prompts[0], target), assistant, WARM_UP_TOKENS)
    found = compare(
        *(target, drafter, tokenizer, prompts),
        max_new_tokens=max_new_tokens,
        passes=PASSES,
        at_most=AT_MOST,
        least=least,
        load=load,
        on_run=lambda done, total: on_step("Answering without and with the drafter, by turns", done, total),
    )
    on_step("Comparing the texts")
    differences = find_differences(target, tokenizer, found)
    checked = Check(found, differences, None, target.dtype in HALVES, target.device.type == "cuda")
    if drafter.generation_config.num_assistant_tokens is None or checked.loop[0] != OWN_LOOP:
        return checked
    on_step("Letting rounds choose what they draft")
    seconds = 0.0
    for prompt in found.prompts:
        inputs = encode(tokenizer, prompt, target)
        seconds += answer(target, inputs, drafter, max_new_tokens, draft_shape="auto").seconds
    return replace(checked, chosen=found.seconds[1] / seconds)


def find_differences(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, found: Comparison
) -> list[Difference]:
    """Where answers differ, at a tie or not."""
    differences = []
    for prompt, plain, drafted in zip(found.prompts, found.plain, found.drafted, strict=True):
        ids = encode(tokenizer, prompt, target)["input_ids"][0]
        text = Text(prompt, ids, list(plain[0].tokens), list(drafted[0].tokens))
        t = first_difference(text.plain, text.ours)
        if t is None:
            continue
        one, other = (tokenizer.decode(tokens[t : t + 1]) for tokens in (text.plain, text.ours))
        may_tie = target.dtype in HALVES and t < min(len(text.plain), len(text.ours))
        gap, budget = measure_gap(target, text, t) if may_tie else (float("inf"), 0.0)
        differences.append(Difference(prompt, t, (one, other), gap, budget))
    return differences
