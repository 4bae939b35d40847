"""How a drafter's chain drifts: what it attends to and how large what it feeds back is, depth by depth.

Attention drift (arXiv:2605.09992): with each draft step the drafter's attention moves from the prompt to its own recent
tokens, and acceptance falls. A chain is drafted behind every position of text that the target wrote, all at once, by its
own tokens; the measures are means over these chains. The same is done with noise on what is fed back, with windows, with
further text before the prompt, and with the prompt rendered in other ways.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..drafters.kinds import find_kind
from ..drafters.unroll import shift
from ..host.refusals import refuse_compiled
from ..modeling import DrafterModel
from .chains import SETS, draft_everywhere, find_live
from .readings import PROMPTS, Text, record, tokenize

NOISE, WINDOWS = (0.25, 0.5, 1.0), (64, 256, 1024)


class Depth(NamedTuple):
    """Means over all chains at one depth."""

    acceptance: float  # of those whose draft tokens before were all right; NaN if none were
    error: float  # of it, one standard error
    rms: float  # of the state that was fed in: the target's feature at depth 1, later the drafter's own
    mass: dict[str, float]  # attention to each of `SETS`; they sum to 1
    uniform: float  # the chain's share of the positions: its mass if attention were uniform
    entropy: float  # nats
    own_accepted: float  # mass on the chain where the token was right, and all before; NaN if none was
    own_refused: float  # where it was not


@dataclass
class Curve:
    """Acceptance by depth under one condition."""

    name: str
    accepted: Tensor  # [n] int64, draft tokens in 0..K that each of n chains has right
    depth: int  # K

    @property
    def acceptance_length(self) -> float:
        """Tokens a round brings if rounds began at every slot."""
        return 1 + self.accepted.double().mean().item() if len(self.accepted) else math.nan

    @property
    def rates(self) -> list[float]:
        """By depth: how many of the chains that were right until there are right there. NaN if none were."""
        reached = self.reached
        return [after / before if before else math.nan for before, after in pairwise(reached)]

    @property
    def reached(self) -> list[int]:
        """[K+1] chains that were right in their first k tokens."""
        return [int((self.accepted >= k).sum()) for k in range(self.depth + 1)]

    def to_dict(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "name": self.name,
            "num_chains": len(self.accepted),
            "acceptance_length": self.acceptance_length,
            "rates_by_depth": self.rates,
        }


@dataclass
class Drift:
    """The result of `drift`."""

    depths: list[Depth]
    base: Curve
    streams: dict[str, float]  # RMS of each captured state, and of the feature made of them
    curves: dict[str, list[Curve]] = field(default_factory=dict)  # by what was varied

    def to_dict(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "num_chains": len(self.base.accepted),
            "acceptance_length": self.base.acceptance_length,
            "depths": [{"depth": k, **row._asdict()} for k, row in enumerate(self.depths, start=1)],
            "rms_of_states": self.streams,
            **{kind: [curve.to_dict() for curve in curves] for kind, curves in self.curves.items()},
        }

    @property
    def head(self) -> list[str]:
        """The names of the columns of `rows`."""
        return ["depth", "accepted", "RMS fed in", *(f"to {name}" for name in SETS), "uniform own", "entropy"]

    @property
    def rows(self) -> list[list[str]]:
        """The measures by depth, as text."""
        return [
            [
                str(k),
                f"{row.acceptance:.3f} ± {row.error:.3f}",
                f"{row.rms:.3g}",
                *(f"{row.mass[name]:.3f}" for name in SETS),
                f"{row.uniform:.3f}",
                f"{row.entropy:.2f}",
            ]
            for k, row in enumerate(self.depths, start=1)
        ]

    @property
    def curve_head(self) -> list[str]:
        """The names of the columns of `curve_rows`."""
        return ["condition", "chains", "acceptance length", *(f"at {k + 1}" for k in range(self.base.depth))]

    @property
    def curve_rows(self) -> list[list[str]]:
        """Acceptance under each condition, as text."""
        named = [("as it is", self.base)]
        named += [(f"{kind}: {curve.name}", curve) for kind, curves in self.curves.items() for curve in curves]
        return [
            [name, str(len(c.accepted)), f"{c.acceptance_length:.3f}", *(f"{rate:.3f}" for rate in c.rates)]
            for name, c in named
        ]


def count_accepted(drafter: DrafterModel, texts: Sequence[Text], depth: int, name: str, **options: Any) -> Curve:
    """Acceptance under one condition; `options` are those of `draft_everywhere`."""
    counts = []
    for text in texts:
        live = find_live(text, depth)
        right = [
            step.tokens.cpu() == shift(text.ids.cpu(), 2 + t)[0]
            for t, step in enumerate(draft_everywhere(drafter, text, depth, **options))
        ]
        counts.append(torch.stack(right).long().cumprod(0).sum(0)[live])
    return Curve(name, torch.cat(counts), depth)


class Sums(NamedTuple):
    """Sums over chains at one depth."""

    num_chains: int
    mass: Tensor  # [4]
    entropy: float
    rms: float
    uniform: float
    own_right: tuple[float, int]  # mass on the chain, and chains, of those that were right until and with this token
    own_wrong: tuple[float, int]  # until it, and not with it


def measure_text(drafter: DrafterModel, text: Text, depth: int, window: int | None) -> tuple[list[Sums], Tensor]:
    """Sums over the chains of a text by depth, and how many tokens [n] each has right."""
    live, before = find_live(text, depth), torch.ones(text.ids.shape[1], dtype=torch.bool)
    rows, count = [], torch.zeros(text.ids.shape[1], dtype=torch.long)
    for t, step in enumerate(draft_everywhere(drafter, text, depth, window=window)):
        assert step.watch.mass is not None
        assert step.watch.entropy is not None
        mass = (step.watch.mass / step.watch.num_layers).double().cpu()[live]  # [n, 4]
        entropy = (step.watch.entropy / step.watch.num_layers).double().cpu()[live]
        rms = step.fed.square().mean(-1).sqrt().double().cpu()[live]
        verified = torch.arange(1, len(live) + 1).clamp(max=window or len(live))[live]
        right = before & (step.tokens.cpu() == shift(text.ids.cpu(), 2 + t)[0])
        own = [(float(mass[chosen[live], 3].sum()), int(chosen[live].sum())) for chosen in (right, before & ~right)]
        uniform = float((t / (verified + t)).sum())
        rows.append(Sums(len(mass), mass.sum(0), float(entropy.sum()), float(rms.sum()), uniform, own[0], own[1]))
        count, before = count + right.long(), right
    return rows, count[live]


def gather(sums: Sequence[Sequence[Sums]], curve: Curve) -> list[Depth]:
    """Means by depth over texts; `sums` by text and depth."""
    rows = []
    for k, of_texts in enumerate(zip(*sums, strict=True)):
        n = sum(s.num_chains for s in of_texts)
        mass = sum((s.mass for s in of_texts), torch.zeros(len(SETS), dtype=torch.float64)) / n
        owns = [[getattr(s, name) for s in of_texts] for name in ("own_right", "own_wrong")]
        accepted, refused = (
            sum(m for m, _ in parts) / c if (c := sum(c for _, c in parts)) else math.nan for parts in owns
        )
        rate, reached = curve.rates[k], curve.reached[k]
        error = math.sqrt(rate * (1 - rate) / reached) if reached else math.nan
        rows.append(
            Depth(
                acceptance=rate,
                error=error,
                rms=sum(s.rms for s in of_texts) / n,
                mass=dict(zip(SETS, mass.tolist(), strict=True)),
                uniform=sum(s.uniform for s in of_texts) / n,
                entropy=sum(s.entropy for s in of_texts) / n,
                own_accepted=accepted,
                own_refused=refused,
            )
        )
    return rows


def measure_streams(drafter: DrafterModel, texts: Sequence[Text]) -> dict[str, float]:
    """RMS of the target's captured states and of the feature that the drafter makes of them, over all positions."""
    squares: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for text in texts:
            ids = drafter.bound_aux_layer_ids or (0,)
            states = [text.states[i] for i in ids]
            named = dict(zip((f"boundary {i}" for i in ids), states, strict=True))
            named["feature"] = drafter.fuse(torch.cat(states, dim=-1).to(drafter.norm.weight.device))
            for name, x in named.items():
                squares.setdefault(name, []).append(x.float().square().mean(-1).flatten().cpu())
    return {name: float(torch.cat(parts).mean().sqrt()) for name, parts in squares.items()}


# ---- prompts ----


def render_otherwise(prompt: str, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The prompt's ids [1, T] as the drafter may meet them: with the template and without, with BOS and without."""
    bos = tokenizer.bos_token_id
    as_usual = tokenize(prompt, tokenizer)
    raw = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    found = {"template": as_usual, "raw text": raw}
    if bos is not None:
        for name, ids in list(found.items()):
            has_bos = bool(ids.shape[1]) and int(ids[0, 0]) == bos
            other = ids[:, 1:] if has_bos else torch.cat([torch.tensor([[bos]]), ids], dim=1)
            found[f"{name}, {'no BOS' if has_bos else 'and BOS'}"] = other
    return {name: ids for name, ids in found.items() if name != "template" and ids.shape[1]}


def lengthen(prompts: Sequence[Tensor], texts: Sequence[Text], length: int) -> list[Tensor]:
    """Each prompt [1, P] behind the other texts, one after the other, so that it is about `length` tokens long."""
    made = []
    for i, prompt in enumerate(prompts):
        others = [text.ids[0].cpu() for j, text in enumerate(texts) if j != i] or [texts[i].ids[0].cpu()]
        before: list[Tensor] = []
        n = length - prompt.shape[1]
        while n > 0:
            piece = others[len(before) % len(others)][:n]
            before.append(piece)
            n -= len(piece)
        made.append(torch.cat([*before, prompt[0].cpu()])[None])
    return made


# ---- the whole ----


@dataclass(frozen=True)
class Conditions:
    """What is varied, one thing at a time.

    Args:
        noise: Standard deviations of noise on the state fed back, as shares of its RMS.
        windows: Of positions that the drafter attends to.
        contexts: Lengths in tokens that prompts are brought to, by further text before them.
        templates: Render prompts otherwise: without the chat template, with and without BOS. Needs texts as prompts.
    """

    noise: tuple[float, ...] = NOISE
    windows: tuple[int, ...] = WINDOWS
    contexts: tuple[int, ...] = ()
    templates: bool = True


def refuse_unmeasurable(target: PreTrainedModel, drafter: PreTrainedModel, depth: int, conditions: Conditions) -> None:
    """Raise if there is no chain to measure, or a condition is none.

    Raises:
        ValueError: Names what, what was expected, and what came.
    """
    if not find_kind(drafter.config).has_steps:
        raise ValueError(
            f"{type(drafter).__name__} drafts in one forward ({find_kind(drafter.config).name}): there is no chain whose "
            "attention could drift. Give an EAGLE-3 drafter."
        )
    if depth < 2:
        raise ValueError(f"Drift is seen over depths: num_draft_tokens must be at least 2, got {depth}.")
    if wrong := [x for x in conditions.noise if not 0 < x < math.inf]:
        raise ValueError(f"noise is a share of the state's RMS, above 0; got {wrong[0]}.")
    if wrong := [x for x in (*conditions.windows, *conditions.contexts) if x < 1]:
        raise ValueError(f"windows and contexts are numbers of tokens, at least 1; got {wrong[0]}.")
    most = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and (wrong := [x for x in conditions.contexts if x > most]):
        raise ValueError(f"contexts has {wrong[0]} tokens, and {type(target).__name__} knows {most} positions.")


def drift(
    target: PreTrainedModel,
    drafter: DrafterModel,
    prompts: Sequence[Tensor] | Sequence[str] = PROMPTS,
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 64,
    depth: int = 8,
    conditions: Conditions | None = None,
    on_step: Callable[[str, int, int], object] = lambda *_: None,
) -> Drift:
    """Measure attention drift: what `drafter` attends to, what it feeds back, and what is accepted, depth by depth.

    Args:
        target: What the drafter was made for; it answers each prompt greedily.
        drafter: As loaded; left as it is, but for being bound to `target`.
        prompts: Texts, for which the tokenizer is needed, or token ids [T] int64 each.
        tokenizer: The target's. Its chat template is used if it has one.
        max_new_tokens: Tokens to generate for each prompt; chains begin at each of them that has `depth` more behind it.
        depth: K; beyond the steps that the drafter was trained for is where drift shows.
        conditions: What is varied besides.
        on_step: Called before each piece of work, with what it is, how many are done, and of how many.

    Raises:
        ValueError: The two do not fit, the drafter has no chain, a condition is none, or too little was generated.
    """
    conditions = conditions or Conditions()
    refuse_unmeasurable(target, drafter, depth, conditions)
    refuse_compiled(target)
    drafter.bind(target)
    own = drafter.config.sliding_window
    ids = [tokenize(prompt, tokenizer) for prompt in list[Tensor | str](prompts)]

    def answer(what: str, given: Sequence[Tensor]) -> list[Text]:
        texts = []
        for i, prompt in enumerate(given):
            on_step(what, i, len(given))
            texts.append(record(target, prompt, max_new_tokens, list(drafter.bound_aux_layer_ids or ())))
        return texts

    texts = answer("The target answers", ids)
    if not any(bool(find_live(text, depth).any()) for text in texts):
        raise ValueError(
            f"The target generated no text of more than {depth} tokens: give other prompts, or more tokens."
        )
    measured = []
    for i, text in enumerate(texts):
        on_step("Drafting behind every position", i, len(texts))
        measured.append(measure_text(drafter, text, depth, own))
    base = Curve("as it is", torch.cat([count for _, count in measured]), depth)
    found = Drift(gather([sums for sums, _ in measured], base), base, measure_streams(drafter, texts))

    for kind, name, texts_of, options in list_plans(conditions, prompts, ids, texts, tokenizer, answer, own):
        on_step(f"With another {kind}: {name}", 0, 1)
        curve = count_accepted(drafter, texts_of(), depth, name, **options)
        found.curves.setdefault(kind, []).append(curve)
    return found


Plan = tuple[str, str, Callable[[], Sequence[Text]], dict[str, Any]]  # kind, name, texts, options of the chains


def list_plans(
    conditions: Conditions,
    prompts: Sequence[Tensor] | Sequence[str],
    ids: Sequence[Tensor],
    texts: Sequence[Text],
    tokenizer: Tokenizer | None,
    answer: Callable[[str, Sequence[Tensor]], list[Text]],
    window: int | None,
) -> list[Plan]:
    """What else is to be measured.

    Args:
        conditions: What is varied.
        prompts: As they were given.
        ids: The same as tokens [1, P].
        texts: The target's answers to them.
        tokenizer: The target's, if there is one.
        answer: Lets the target answer others.
        window: The drafter's own.
    """
    plans: list[Plan] = []
    for x in conditions.noise:
        plans.append(("noise", f"{x:g} of the RMS", lambda: texts, {"window": window, "noise": x}))
    for w in conditions.windows:
        plans.append(("window", f"{w} positions", lambda: texts, {"window": w}))
    for n in conditions.contexts:
        longer = partial(answer, f"Answers behind {n} tokens", lengthen(ids, texts, n))
        plans.append(("context", f"{n} tokens", longer, {"window": window}))
    if conditions.templates and tokenizer is not None and all(isinstance(prompt, str) for prompt in prompts):
        renderings = [render_otherwise(str(prompt), tokenizer) for prompt in prompts]
        for name in renderings[0]:
            other = partial(answer, f"Answers to {name}", [rendered[name] for rendered in renderings])
            plans.append(("rendering", name, other, {"window": window}))
    return plans
