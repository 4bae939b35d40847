"""A call of the host, as rows and the rounds they need."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from ..compat import CACHE_NAME, count_cached
from ..decoding.columns import counts_from_zero, is_text_only, pads_to_the_left, read_mask, reorder
from ..decoding.preparation import Switch, find_switch
from ..decoding.row import Row
from ..decoding.state import RoundConfig
from ..decoding.transcript import Transcript
from ..rows.layers import has_states
from ..rows.rotation import find_switch as find_rotation_switch
from ..speculation.coverage import read_coverage
from ..speculation.sampling import stateless_warpers
from ..speculation.warpers import read_settings
from ..tensor_parallel import find_peers, is_spread, make_agree
from .loop_choice import LoopChoice
from .processors import looks_at_batch, processors_for_rows
from .refusals import refuse_foreign_tokens

# Criteria that decide each row by its own tokens, so that they may be asked row by row.
BY_ROW_CRITERIA = (MaxTimeCriteria, StopStringCriteria)


class Prompts(NamedTuple):
    """The prompts of a call, pads on the left."""

    given: Tensor  # [B, T], as the host passes them
    ids: Tensor  # [B, T], as they are fed
    mask: Tensor  # [B, S] bool, of cached and new columns
    order: Tensor | None  # [B, S] int64, that in which the columns were put, if they were
    num_hidden: list[int]  # [B] pads of each row that nobody is shown

    @property
    def lengths(self) -> list[int]:
        """[B] tokens of each row, cached ones too."""
        return self.mask.sum(-1).tolist()


def read_prompts(target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Prompts:
    """The prompts of a call. Plain decoding goes wrong on pads to the right, so those are put to the left.

    Raises:
        ValueError: The mask is not theirs, or a row is empty.
    """
    refuse_foreign_tokens(target, input_ids)
    given = input_ids if input_ids.device.type == target.device.type else input_ids.to(target.device)
    B, T = given.shape
    mask = read_mask(given, model_kwargs)
    S = mask.shape[1]
    if S < T or len(mask) != B:
        raise ValueError(
            f"attention_mask must be [{B}, {T}] like input_ids, or wider by what a cache holds; got {list(mask.shape)}."
        )
    if S == 0 or not bool(mask.any(-1).all()):
        raise ValueError(
            "The prompt is empty in some row (input_ids of length 0): give at least one token, such as BOS."
        )
    if bool(mask[:, -1].all()):
        return Prompts(given, given, mask, None, [0] * B)
    order = pads_to_the_left(mask, past=count_cached(model_kwargs[CACHE_NAME]))
    ids, mask = reorder(given, mask, model_kwargs, order)
    return Prompts(given, ids, mask, order, (~mask[:, S - T :]).sum(-1).tolist())


def make_transcript(
    target: PreTrainedModel,
    prompts: Prompts,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    settings: GenerationConfig,
    streamer: BaseStreamer | None,
    *,
    seeds: Sequence[int | None],
    keeps_cache: bool,
) -> Transcript:
    """The rows of a call, without new tokens. `seeds` are those of each row; `keeps_cache`: its cache is returned."""
    B, T = prompts.ids.shape
    lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    eos = [token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist()]
    others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    agree, is_dict = make_agree(target), settings.return_dict_in_generate
    # A row that got ahead could not come back to where a criterion ends it.
    in_step = any(map(looks_at_batch, processors)) or (B > 1 and keeps_cache and bool(others) and has_states(target))
    of_rows = [processors] * B
    if not in_step or B == 1:
        of_rows = processors_for_rows(processors, prompts.num_hidden, prompts.ids)
    rows = [
        Row(
            prompts.ids[b : b + 1, num_hidden:],
            max_new=min(lengths) - T if lengths else None,
            eos=eos,
            criteria=[c for c in others if type(c) in BY_ROW_CRITERIA],
            processors=of_rows[b],
            settings=read_settings(stateless_warpers(processors))[0],
            seed=seeds[b],
            keep_scores=bool(is_dict and settings.output_scores),
            keep_logits=bool(is_dict and settings.output_logits),
            agree=agree,
        )
        for b, num_hidden in enumerate(prompts.num_hidden)
    ]
    pad = settings._pad_token_tensor
    return Transcript(
        rows,
        prompts.ids,
        criteria=StoppingCriteriaList([c for c in others if type(c) not in BY_ROW_CRITERIA]),
        # The host pads finished rows only where some criterion has an end-of-sequence token.
        pads=any(hasattr(c, "eos_token_id") for c in criteria),
        pad_token_id=None if pad is None else int(pad),
        streamer=streamer,
        processors=processors if B > 1 else of_rows[0],
        in_step=in_step,
        agree=agree,
    )


def make_round_config(
    target: PreTrainedModel,
    choice: LoopChoice,
    prompts: Prompts,
    transcript: Transcript,
    processors: LogitsProcessorList,
    settings: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    keeps_rows: bool,
    keeps_cache: bool,
) -> RoundConfig:
    """What the rounds of a call do. `keeps_rows`: rows that are done stay; `keeps_cache`: the target's cache is returned.

    Raises:
        ValueError: The target computes its cache anew on the way, where no drafter can follow.
    """
    row = transcript.rows[0]
    switch = find_crossed_switch(target, prompts.lengths, row.max_new)
    if switch is not None and not (is_text_only(model_kwargs) and counts_from_zero(model_kwargs, prompts.mask)):
        raise ValueError(
            f"{type(target).__name__} computes its cache anew where a text passes {switch.after} tokens, which a drafter "
            "can follow in text from its beginning alone; this prompt has more. Leave that out, lower max_new_tokens, or "
            "call generate() without assistant_model."
        )
    simulated, coverage = None, None
    if choice.drafter is not None:
        simulated = getattr(choice.drafter.generation_config, "simulated_acceptance_length", None)
        coverage = getattr(choice.drafter.generation_config, "simulated_coverage", None)
    stateless = stateless_warpers(processors)
    in_order = transcript.in_step or len(stateless) < len(processors)
    is_plain = simulated is None and not transcript.in_step and switch is None and find_peers(target) is None
    shape, *others = choice.shapes.shapes
    return RoundConfig(
        shape=shape,
        others=tuple(others) if is_plain and not is_spread(target) else (),
        do_sample=bool(settings.do_sample),
        is_reproducible=choice.seeds is not None,
        in_order=in_order,
        simulated_length=simulated,
        coverage=None if coverage is None or in_order else read_coverage(coverage),
        keeps_rows=(keeps_rows or transcript.in_step) and len(transcript.rows) > 1,
        keeps_cache=keeps_cache,
        keeps_scores=row.scores is not None or row.logits is not None,
        starts_anew=None if switch is None else switch.after,
        max_length=None if row.max_new is None else prompts.mask.shape[1] + row.max_new,
        further_warpers=tuple(read_settings(stateless)[1]),
    )


def find_crossed_switch(target: PreTrainedModel, lengths: list[int], max_new: int | None) -> Switch | None:
    """Where texts of this call pass the point at which `target` drops its cache, and that matters; None if they do not.

    Args:
        target: The model to generate with.
        lengths: Of the prompts.
        max_new: Tokens that each may get.

    Raises:
        ValueError: Plain decoding forgets the text there.
    """
    switch = find_switch(target)
    if switch is None or not any(
        n <= switch.after and (max_new is None or n + max_new > switch.after) for n in lengths
    ):
        return None
    if not switch.computes_anew:
        raise ValueError(
            f"Where a text passes {switch.after} tokens, {type(target).__name__} forgets it all in this version of "
            f"Transformers, which a drafter cannot follow: end before that ({max(lengths)} tokens of prompt, "
            f"max_new_tokens={max_new}), pip install -U transformers, or call generate() without assistant_model."
        )
    return switch if find_rotation_switch(target) is not None else None  # else what is computed is what was there


def has_hooks_of_others(target: PreTrainedModel) -> bool:
    """Whether modules of `target` have hooks of others than the host, PyTorch, accelerate and us.

    Such hooks may depend on the rows that the call was given, as PEFT's do where each row has an adapter.
    """
    hooks = (h for m in target.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    packages = (str(getattr(hook, "__module__", None)).partition(".")[0] for hook in hooks)
    return any(package not in ("transformers", "torch", "accelerate", "hf_eagle3") for package in packages)


def explain(choice: LoopChoice, config: RoundConfig, transcript: Transcript, processors: LogitsProcessorList) -> str:
    """Why the call is decoded as it is."""
    is_simulated = config.simulated_length is not None or config.coverage is not None
    why = f"{choice.why}; acceptance is simulated" if is_simulated else choice.why
    if transcript.in_step and len(transcript.rows) > 1:
        names = [type(thing).__name__ for thing in (*filter(looks_at_batch, processors), *transcript.criteria)]
        because = f"{' and '.join(names)} may look at all of them" if names else "recurrent states cannot be cut back"
        why += f"; rows in step, as {because}"
    return why
