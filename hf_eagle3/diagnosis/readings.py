"""Which reading of a drafter agrees best with its target, by measurement.

Published configs mean different things by the same key. Each plausible reading is a different drafter over the same
weights; all are unrolled over text that the target generated, and what each drafts is compared with that text.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..console.opening import rendering
from ..drafters.kinds import find_kind
from ..drafters.unroll import live_slots, shift, unroll
from ..host.refusals import refuse_compiled
from ..modeling import Eagle3DrafterConfig, Eagle3DrafterModel
from ..modeling.fields_eagle3 import default_boundaries
from ..recorder import StateRecorder

PROMPTS = (
    "Explain in a few sentences how a rainbow forms.",
    "Write a Python function that checks whether a string is a palindrome, and explain it.",
    "What are the health benefits of regular exercise?",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Think step by step.",
    "Translate into French: The library opens at nine and closes at six.",
    "List five differences between a frog and a toad.",
)
# A reading is better if it accepts this many more tokens a round, and that by so many standard errors.
LEAST_GAIN, STANDARD_ERRORS = 0.02, 4.0
POOR = 1.2  # acceptance length under which a drafter does not know its target


class Reading(NamedTuple):
    """One way to read a checkpoint."""

    trait: str  # the question it answers; readings of one trait exclude each other
    name: str
    overrides: dict[str, Any]  # fields of `Eagle3DrafterConfig`
    target_ids: Tensor | None = None  # [V_d] int64, another draft vocabulary


class Score(NamedTuple):
    """How often a reading agrees with the target."""

    accepted: Tensor  # [n] int64, draft tokens in 0..K that each of n slots would have had accepted
    depth: int  # K

    @property
    def acceptance_length(self) -> float:
        """Tokens gained a round if rounds started at every slot: mean of `num_accepted + 1`."""
        return 1 + self.accepted.double().mean().item()

    @property
    def rates(self) -> list[float]:
        """At index k: agreement with the target at draft depth k+1, where all before agreed. NaN if none did."""
        reached = [(self.accepted >= k).sum().item() for k in range(self.depth + 1)]
        return [after / before if before else math.nan for before, after in pairwise(reached)]

    def to_dict(self) -> dict[str, Any]:
        """The same as data."""
        return {"acceptance_length": self.acceptance_length, "rates_by_depth": self.rates}

    def beats(self, other: "Score") -> bool:
        """Whether it accepts more than `other` on the same slots, by more than chance."""
        gain = (self.accepted - other.accepted).double()
        error = gain.std(correction=0) / math.sqrt(len(gain))
        return gain.mean().item() > max(LEAST_GAIN, STANDARD_ERRORS * error.item())


@dataclass(frozen=True)
class Diagnosis:
    """The result of `doctor`."""

    declared: Score  # the checkpoint as it was loaded
    readings: tuple[tuple[Reading, Score], ...]  # each instead of the declared one, alone
    faults: tuple[Reading, ...]  # readings better than the declared ones; together they are the best
    best: Score
    drafter: Eagle3DrafterModel  # the best reading, over the same tensors; bound to the target
    notes: tuple[str, ...]

    @property
    def is_declared_best(self) -> bool:
        """Whether the declared reading is the best."""
        return not self.faults

    @property
    def overrides(self) -> dict[str, Any]:
        """Config fields that make the best reading, for `AutoModel.from_pretrained(drafter, **overrides)`."""
        return {key: value for fault in self.faults for key, value in fault.overrides.items()}

    def to_dict(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "is_declared_best": self.is_declared_best,
            "num_positions": len(self.declared.accepted),
            "declared": self.declared.to_dict(),
            "best": self.best.to_dict(),
            "overrides": self.overrides,
            "faults": [{"trait": fault.trait, "name": fault.name} for fault in self.faults],
            "readings": [{"trait": r.trait, "name": r.name, **score.to_dict()} for r, score in self.readings],
            "notes": list(self.notes),
        }

    @property
    def head(self) -> list[str]:
        """The names of the columns of `rows`."""
        return ["reading", "acceptance length", *(f"agrees at {k + 1}" for k in range(self.declared.depth))]

    @property
    def rows(self) -> list[list[str]]:
        """What each reading brings, in words and numbers."""
        found = [("as declared", self.declared), *((f"{r.trait}: {r.name}", score) for r, score in self.readings)]
        if len(self.faults) > 1:
            found.append(("all of the best together", self.best))
        return [
            [name, f"{score.acceptance_length:.2f}", *(f"{rate:.2f}" for rate in score.rates)] for name, score in found
        ]

    @property
    def verdict(self) -> str:
        """What follows from it, in lines."""
        lines = [f"{len(self.declared.accepted)} positions of text that the target generated."]
        lines += [f"Note: {note}" for note in self.notes]
        if self.is_declared_best:
            lines.append("The declared reading is the best.")
        else:
            lines.append(
                f"WARNING: the declared reading is NOT the best. Acceptance length {self.declared.acceptance_length:.2f} "
                f"as declared, {self.best.acceptance_length:.2f} with:"
            )
            lines += [f"  {fault.trait}: {fault.name}" for fault in self.faults]
            if self.overrides:
                given = ", ".join(f"{key}={value!r}" for key, value in self.overrides.items())
                lines.append(f"  AutoModel.from_pretrained(..., {given})")
        if self.best.acceptance_length < POOR:
            lines.append(
                "WARNING: no reading agrees with the target. The drafter was made for another target or another chat "
                "template, or its weights are not what they should be."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        rows = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
            )
            for name, *cells in rows
        ]
        return "\n".join([*lines, "", self.verdict])


def doctor(
    target: PreTrainedModel,
    drafter: Eagle3DrafterModel,
    prompts: Sequence[Tensor] | Sequence[str] = PROMPTS,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 64,
    depth: int = 4,
    on_step: Callable[[str, int, int], object] = lambda *_: None,
) -> Diagnosis:
    """Measure how well each plausible reading of `drafter` agrees with `target`.

    Args:
        target: What the drafter was made for.
        drafter: As loaded. Left as it is, but for being bound to `target`.
        prompts: Texts, for which the tokenizer is needed, or token ids [T] int64 each.
        tokenizer: The target's. Its chat template is used if it has one.
        max_new_tokens: Tokens to generate for each prompt; a few hundred in all are enough.
        depth: K, draft depths to compare.
        on_step: Called before each prompt and each reading, with what it is, how many are done, and of how many.

    Raises:
        ValueError: The two do not fit, or nothing was generated that is long enough to tell.
    """
    refuse_unreadable(drafter)
    refuse_compiled(target)
    drafter.bind(target)
    readings = list_readings(drafter, target)
    boundaries, texts = list_boundaries(target, drafter, readings), []
    for i, prompt in enumerate(list[Tensor | str](prompts)):
        on_step("The target answers", i, len(prompts))
        texts.append(record(target, tokenize(prompt, tokenizer), max_new_tokens, boundaries))

    def measure(chosen: Sequence[Reading]) -> tuple[Eagle3DrafterModel, Score]:
        read = reread(drafter, chosen).bind(target)
        return read, score(read, texts, depth)

    best_drafter, declared = measure(())
    if not len(declared.accepted):
        raise ValueError(
            f"The target generated no text of more than {depth + 1} tokens. Give other prompts, or more max_new_tokens."
        )
    alone = []
    for i, reading in enumerate(readings):
        on_step("Reading the drafter in other ways", i, len(readings))
        alone.append((reading, measure([reading])[1]))
    best, faults = declared, list[Reading]()
    candidates = [(reading, found) for reading, found in alone if found.beats(declared)]
    while candidates:
        reading, _ = max(candidates, key=lambda pair: pair[1].acceptance_length)
        faults = [fault for fault in faults if fault.trait != reading.trait] + [reading]
        best_drafter, best = measure(faults)
        candidates = []
        on_step("Reading it in several other ways at once", len(faults), len(readings))
        for other in readings:
            if other.trait not in {fault.trait for fault in faults}:
                found = measure([*faults, other])[1]
                if found.beats(best):
                    candidates.append((other, found))
    return Diagnosis(declared, tuple(alone), tuple(faults), best, best_drafter, tuple(list_notes(drafter, target)))


def list_boundaries(target: PreTrainedModel, drafter: Eagle3DrafterModel, readings: Sequence[Reading]) -> list[int]:
    """Those of the target's whose states some reading of the drafter takes."""
    n = target.config.get_text_config(decoder=True).num_hidden_layers
    configs = [drafter.config, *(change(drafter.config, reading.overrides) for reading in readings)]
    return sorted({i for config in configs for i in config.resolve_aux_layer_ids(n)})


def refuse_unreadable(drafter: Eagle3DrafterModel) -> None:
    """Raise if a drafter cannot be read in other ways.

    Raises:
        ValueError: It is quantised, or drafts in one forward.
    """
    if getattr(drafter, "hf_quantizer", None) is not None:
        raise ValueError("This drafter is quantised: load it without quantization_config to examine it.")
    kind = find_kind(drafter.config)
    if not kind.has_steps:
        raise ValueError(
            f"mask_token_id={drafter.config.mask_token_id}: a {kind.name} drafter cannot be examined, since it drafts in one "
            "forward and readings are compared step by step. `.speculation` of a call says how well it agrees."
        )


# ---- readings ----


def list_readings(drafter: Eagle3DrafterModel, target: PreTrainedModel) -> list[Reading]:
    """Every plausible reading that differs from the declared one in one trait."""
    config = drafter.config
    n = target.config.get_text_config(decoder=True).num_hidden_layers
    readings = [
        Reading(
            "recurrence",
            f"the {'un-normed' if config.norm_output else 'normed'} output is fed back",
            {"norm_output": not config.norm_output},
        ),
        Reading(
            "residual",
            f"starts from the {'un-normed' if config.norm_before_residual else 'normed'} state",
            {"norm_before_residual": not config.norm_before_residual},
        ),
    ]
    if config.use_aux_hidden_state:
        readings += list_layer_readings(config, n)
    readings += list_rope_readings(config, target)
    width = target.get_input_embeddings().weight.shape[-1]
    if config.has_own_embeddings and width == config.hidden_size:
        readings.append(Reading("embeddings", "the target's", {"has_own_embeddings": False}))
    d2t = drafter.d2t
    if len(d2t) < config.vocab_size and d2t[0] >= 0 and d2t[-1] < config.vocab_size and (d2t.diff() > 0).all():
        readings.append(Reading("d2t", "target ids, not offsets", {}, d2t.clone()))
    return [reading._replace(overrides=differences(reading.overrides, config)) for reading in readings]


def differences(overrides: dict[str, Any], config: Eagle3DrafterConfig) -> dict[str, Any]:
    """Those of `overrides` that the config does not have already."""
    return {key: value for key, value in overrides.items() if getattr(config, key) != value}


def list_layer_readings(config: Eagle3DrafterConfig, n: int) -> list[Reading]:
    """Other boundaries: one up, one down, the default, and the last one normed or not."""
    normed = config.norm_last_state
    plain = copy.copy(config)
    plain.norm_last_state = False
    declared = list(plain.resolve_aux_layer_ids(n))
    ways = {
        "one up": [i + 1 for i in declared],
        "one down": [i - 1 for i in declared],
    }
    if config.num_aux_hidden_states == 3:
        ways["the default"] = default_boundaries(n)
    readings, seen = [], [declared]
    for name, ids in ways.items():
        if ids not in seen and ids[0] >= 0 and ids[-1] <= n and len(set(ids)) == len(ids):
            seen.append(ids)
            overrides = {"aux_layer_ids": ids, "aux_layer_ids_from_outputs": False, "norm_last_state": False}
            readings.append(Reading("layers", f"boundaries {ids}, {name}", overrides))
            if ids[-1] == n:
                overrides = {**overrides, "norm_last_state": True}
                readings.append(Reading("layers", f"boundaries {ids}, {name}, the last one normed", overrides))
    if declared[-1] == n:
        name = f"the last boundary {'before' if normed else 'after'} the final norm"
        overrides = {"norm_last_state": not normed, "aux_layer_ids": declared, "aux_layer_ids_from_outputs": False}
        readings.append(Reading("layers", name, overrides))
    return readings


def list_rope_readings(config: Eagle3DrafterConfig, target: PreTrainedModel) -> list[Reading]:
    """Other rotary parameters: the target's, and those that follow if keys are missing or ignored."""
    declared = config.rope_parameters or {}
    theirs = getattr(target.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    theirs = theirs.get("full_attention", theirs)
    theta = declared.get("rope_theta", 10000.0)
    ways = {
        "the target's": {k: v for k, v in theirs.items() if k not in ("mrope_section", "mrope_interleaved")},
        "no scaling": {"rope_type": "default", "rope_theta": theta},
        "theta 10000": {**declared, "rope_theta": 10000.0},
        "no scaling and theta 10000": {"rope_type": "default", "rope_theta": 10000.0},
    }
    readings, seen = [], [declared]
    for name, rope in ways.items():
        if rope.get("rope_type") and rope.get("partial_rotary_factor", 1) == 1 and rope not in seen:
            seen.append(rope)
            readings.append(
                Reading("rope", f"{name} ({rope['rope_type']}, {rope['rope_theta']:g})", {"rope_parameters": rope})
            )
    return readings


def change(config: Eagle3DrafterConfig, overrides: dict[str, Any]) -> Eagle3DrafterConfig:
    """The config with other fields, checked."""
    changed = Eagle3DrafterConfig.from_dict({**config.to_dict(), **copy.deepcopy(overrides)})
    changed._attn_implementation = config._attn_implementation
    return changed


def reread(drafter: Eagle3DrafterModel, readings: Sequence[Reading]) -> Eagle3DrafterModel:
    """A drafter over the same tensors, with this reading."""
    config = change(drafter.config, {k: v for reading in readings for k, v in reading.overrides.items()})
    with torch.device("meta"):
        other = Eagle3DrafterModel(config)
    tensors = drafter.state_dict()
    tensors["d2t"] = tensors["d2t"].clone()
    if not config.has_own_embeddings:
        tensors.pop("embed_tokens.weight", None)
    other.load_state_dict(tensors, assign=True)
    other.rotary_emb = LlamaRotaryEmbedding(config).to(drafter.norm.weight.device)  # not among the tensors
    other.generation_config = copy.deepcopy(drafter.generation_config)
    for reading in readings:
        if reading.target_ids is not None:
            other.set_draft_to_target_ids(reading.target_ids)
    return other.eval()


# ---- measuring ----


class Text(NamedTuple):
    """A text of the target for one prompt, with its states."""

    ids: Tensor  # [1, S] int64, the prompt included
    is_generated: Tensor  # [1, S] bool
    states: dict[int, Tensor]  # boundary -> [1, S, Ht]


def tokenize(prompt: Tensor | str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Token ids [1, T]."""
    if isinstance(prompt, Tensor):
        return prompt.reshape(1, -1)
    if tokenizer is None:
        raise ValueError("Prompts are text, so the target's tokenizer is needed: give tokenizer=...")
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    chat = [{"role": "user", "content": prompt}]
    with rendering(tokenizer):
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]


@torch.no_grad()
def record(target: PreTrainedModel, prompt: Tensor, max_new_tokens: int, boundaries: list[int]) -> Text:
    """Let the target write greedily, and keep its states at `boundaries`; none means the final, normed state."""
    prompt = prompt.to(target.device)
    ids = target.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False
    )
    with StateRecorder(target, tuple(boundaries)) as recorder:
        target(ids, use_cache=False)
        states = recorder.take(target.device)  # [1, S, A*Ht]
    width = states.shape[-1] // max(len(boundaries), 1)
    is_generated = (torch.arange(ids.shape[1], device=ids.device) >= prompt.shape[1])[None]
    return Text(ids, is_generated, dict(zip(boundaries or [0], states.split(width, -1), strict=True)))


@torch.no_grad()
def score(drafter: Eagle3DrafterModel, texts: Sequence[Text], depth: int) -> Score:
    """Unroll `drafter`, bound, from every position whose next `depth + 1` tokens the target generated."""
    accepted = []
    device = drafter.norm.weight.device
    for ids, is_generated, states in texts:
        aux = torch.cat([states[i] for i in drafter.bound_aux_layer_ids or [0]], dim=-1).to(device)
        ids = ids.to(device)
        live = live_slots(is_generated.to(device), depth)[-1, 0]  # [S], with room for all of the draft
        agrees = torch.ones_like(live)
        count = torch.zeros_like(live, dtype=torch.int64)
        for step, normed in enumerate(unroll(drafter, ids, aux, depth)):
            proposed = drafter.to_target_ids(drafter.compute_logits(normed)[0].argmax(-1))  # [S]
            agrees = agrees & (proposed == shift(ids, 2 + step)[0])
            count += agrees
        accepted.append(count[live].cpu())
    return Score(torch.cat(accepted), depth)


def list_notes(drafter: Eagle3DrafterModel, target: PreTrainedModel) -> list[str]:
    """Other causes of poor drafts."""
    config, notes = drafter.config, []
    theirs = target.get_input_embeddings().weight
    if config.has_own_embeddings and theirs.shape[-1] == config.hidden_size:
        own = drafter.embed_tokens.weight.float()
        likeness = torch.cosine_similarity(own, theirs[: len(own)].to(own.device).float(), dim=-1).mean().item()
        notes.append(f"the drafter's own embeddings have a cosine of {likeness:.2f} with the target's, on average.")
    return notes
