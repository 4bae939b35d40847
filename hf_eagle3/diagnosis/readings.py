"""Which reading of a drafter agrees best with its target, by measurement.

Published configs mean different things by the same key. Each plausible reading is a different drafter over the same
weights; all are unrolled over text that the target generated, and what each drafts is compared with that text.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..console.opening import rendering
from ..drafters.block_unroll import unroll_blocks
from ..drafters.blocks import drafts_blocks
from ..drafters.kinds import find_kind
from ..drafters.unroll import live_slots, unroll
from ..host.refusals import refuse_compiled
from ..modeling import DrafterModel
from ..recorder import StateRecorder
from .traits import Reading, list_readings

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
    drafter: DrafterModel  # the best reading, over the same tensors; bound to the target
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
    drafter: DrafterModel,
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
        depth: K, draft depths to compare; at most all of a block.
        on_step: Called before each prompt and each reading, with what it is, how many are done, and of how many.

    Raises:
        ValueError: The two do not fit, or nothing was generated that is long enough to tell.
    """
    refuse_unreadable(drafter)
    refuse_compiled(target)
    drafter.bind(target)
    depth = min(depth, drafter.config.max_draft_depth or depth)
    readings = list_readings(drafter, target)
    boundaries, texts = list_boundaries(target, drafter, readings), []
    for i, prompt in enumerate(list[Tensor | str](prompts)):
        on_step("The target answers", i, len(prompts))
        texts.append(record(target, tokenize(prompt, tokenizer), max_new_tokens, boundaries))

    def measure(chosen: Sequence[Reading]) -> tuple[DrafterModel, Score]:
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


def list_boundaries(target: PreTrainedModel, drafter: DrafterModel, readings: Sequence[Reading]) -> list[int]:
    """Those of the target's whose states some reading of the drafter takes."""
    n = target.config.get_text_config(decoder=True).num_hidden_layers
    configs = [drafter.config, *(change(drafter.config, reading.overrides) for reading in readings)]
    return sorted({i for config in configs for i in config.resolve_aux_layer_ids(n)})


def refuse_unreadable(drafter: DrafterModel) -> None:
    """Raise if a drafter cannot be read in other ways.

    Raises:
        ValueError: It is quantised, or drafts in one forward.
    """
    if getattr(drafter, "hf_quantizer", None) is not None:
        raise ValueError("This drafter is quantised: load it without quantization_config to examine it.")
    kind = find_kind(drafter.config)
    if not kind.has_steps and not drafts_blocks(drafter.config):
        raise ValueError(
            f"mask_token_id={drafter.config.mask_token_id}: a {kind.name} drafter cannot be examined, since it drafts in one "
            "forward and readings are compared step by step. `.speculation` of a call says how well it agrees."
        )


# ---- readings ----


def change(config: Any, overrides: dict[str, Any]) -> Any:  # Any: a drafter's config
    """The config with other fields, checked."""
    changed = type(config).from_dict({**config.to_dict(), **copy.deepcopy(overrides)})
    changed._attn_implementation = config._attn_implementation
    return changed


def reread(drafter: DrafterModel, readings: Sequence[Reading]) -> DrafterModel:
    """A drafter over the same tensors, with this reading."""
    config = change(drafter.config, {k: v for reading in readings for k, v in reading.overrides.items()})
    with torch.device("meta"):
        other = type(drafter)(config)
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
def score(drafter: DrafterModel, texts: Sequence[Text], depth: int) -> Score:
    """Draft by `drafter`, bound, from every position whose next `depth + 1` tokens the target generated."""
    device, accepted = drafter.norm.weight.device, []
    propose = propose_blocks if drafts_blocks(drafter.config) else propose_chains
    for ids, is_generated, states in texts:
        aux = torch.cat([states[i] for i in drafter.bound_aux_layer_ids or [0]], dim=-1).to(device)
        ids = ids.to(device)
        live = live_slots(is_generated.to(device), depth)[-1, 0].nonzero()[:, 0]  # [n], with room for all of the draft
        count, agrees = torch.zeros_like(live), torch.ones_like(live, dtype=torch.bool)
        for step, proposed in enumerate(propose(drafter, ids, aux, live, depth)):
            agrees = agrees & (proposed == ids[0, live + 2 + step])
            count += agrees
        accepted.append(count.cpu())
    return Score(torch.cat(accepted), depth)


def propose_chains(drafter: Any, ids: Tensor, aux: Tensor, slots: Tensor, depth: int) -> Iterator[Tensor]:
    """[n] int64 at each depth: what an EAGLE-3 drafter proposes at `slots` [n], by its own tokens while those are right."""
    for normed in unroll(drafter, ids, aux, depth):
        yield drafter.to_target_ids(drafter.compute_logits(normed)[0, slots].argmax(-1))


def propose_blocks(drafter: Any, ids: Tensor, aux: Tensor, slots: Tensor, depth: int) -> Iterator[Tensor]:
    """The same of a block drafter, of whole blocks; of a reading whose blocks are shorter than `depth`, that of fewer depths."""
    if not len(slots):
        return
    state = None
    for t, hidden in enumerate(unroll_blocks(drafter, ids, aux, slots)[:, :depth].unbind(1)):
        logits, state = drafter.add_markov(drafter.compute_logits(hidden), ids[0, slots + 1 + t], hidden, state)
        yield drafter.to_target_ids(logits.argmax(-1))


def list_notes(drafter: DrafterModel, target: PreTrainedModel) -> list[str]:
    """Other causes of poor drafts."""
    config, notes = drafter.config, []
    theirs = target.get_input_embeddings().weight
    if config.has_own_embeddings and theirs.shape[-1] == config.hidden_size:
        own = drafter.embed_tokens.weight.float()
        likeness = torch.cosine_similarity(own, theirs[: len(own)].to(own.device).float(), dim=-1).mean().item()
        notes.append(f"the drafter's own embeddings have a cosine of {likeness:.2f} with the target's, on average.")
    return notes
