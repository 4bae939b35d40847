"""One call of our decode loop: the host's arguments in, the host's results out."""

import logging
import time
import weakref
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ..compat import CACHE_NAME
from ..decoding.arena import FIRST_ROOM, KnownUnfitError, open_arena
from ..decoding.captured import CapturedPhases, why_not_captured
from ..decoding.lock import BUSY, Turns, give_arena_back, take_arena, turns_of
from ..decoding.loop import Clocks, decode
from ..decoding.phases import Phases
from ..decoding.prefill import counts_from_zero, is_text_only, pads_to_the_left, prefill, read_mask, reorder
from ..decoding.preparation import Switch, find_asked, find_switch, name_of
from ..decoding.state import DecodeConfig, prepare
from ..decoding.transcript import Transcript
from ..kernels.onednn import PackedLinears
from ..recorder import StateRecorder
from ..rows.attention import FoldedAttention
from ..rows.cache import RowCache, count_cached_layers, to_bucket
from ..rows.rotation import find_switch as find_rotation_switch
from ..rows.rotation import own_lengths
from ..speculation.stats import Speculation, Stopwatch
from ..tensor_parallel import is_true_for_any, make_agree
from .loop_choice import Choice
from .output import fill_pads, slots_of_output
from .processors import looks_at_batch, processors_for_rows

logger = logging.getLogger(__name__)

# Experts that copy the weights they choose: at 8 tokens GptOss-20b's take 34 ms a forward, grouped ones 18 at 32 tokens.
FEW_TOKENS = 4
# A model that attends otherwise or waits for the device, a shape that a kernel refuses, a card that cannot run one:
# eager rounds need none of it, and raise again what is the caller's own.
CAPTURE_ERRORS: tuple[type[Exception], ...] = (Exception,)
# By target: reasons for eager rounds that were said.
_told: "weakref.WeakKeyDictionary[PreTrainedModel, set[str]]" = weakref.WeakKeyDictionary()


def run_own_loop(
    target: PreTrainedModel,
    choice: Choice,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    *,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> ModelOutput | Tensor:
    """Decode as the host's `_sample` does, with our loop: same arguments, same results."""
    start = time.perf_counter()
    drafter = choice.drafter
    given = input_ids if input_ids.device.type == target.device.type else input_ids.to(target.device)  # [B, T]
    T = given.shape[1]
    mask = read_mask(given, model_kwargs)  # [B, S]
    S = mask.shape[1]
    if S < T or len(mask) != len(given):
        raise ValueError(
            f"attention_mask must be [{len(given)}, {T}] like input_ids, or wider by what a cache holds; got "
            f"{list(mask.shape)}."
        )
    if S == 0 or not bool(mask.any(-1).all()):
        raise ValueError(
            "The prompt is empty in some row (input_ids of length 0): give at least one token, such as BOS."
        )
    host_cache = model_kwargs[CACHE_NAME]
    past = int(host_cache.get_seq_length())
    prompt_ids, order, num_hidden = given, None, [0] * len(given)
    if not bool(mask[:, -1].all()):  # plain decoding goes wrong on pads to the right: each row as if it were alone
        order = pads_to_the_left(mask, past)
        prompt_ids, mask = reorder(given, mask, model_kwargs, order)
        num_hidden = (~mask[:, S - T :]).sum(-1).tolist()

    is_dict = generation_config.return_dict_in_generate
    pad = generation_config._pad_token_tensor
    whole_batch = [processor for processor in processors if looks_at_batch(processor)]
    transcript = Transcript(
        prompt_ids,
        criteria,
        num_hidden=num_hidden,
        pad_token_id=None if pad is None else int(pad),
        streamer=streamer,
        in_step=bool(whole_batch),
        keep_scores=bool(is_dict and generation_config.output_scores),
        keep_logits=bool(is_dict and generation_config.output_logits),
        agree=make_agree(target),
    )
    keeps_cache = bool(is_dict or choice.has_cache)
    # Hooks of others may count on the rows that they were given, as PEFT's do where each row has an adapter.
    is_whole = has_hooks_of_others(target)
    switch = find_crossed_switch(target, mask.sum(-1).tolist(), transcript.max_new)
    if switch is not None and not (is_text_only(model_kwargs) and counts_from_zero(model_kwargs, mask)):
        raise ValueError(
            f"{type(target).__name__} computes its cache anew where a text passes {switch.after} tokens, which a drafter "
            "can follow in text from its beginning alone; this prompt has more. Leave that out, lower max_new_tokens, or "
            "call generate() without assistant_model."
        )
    config = DecodeConfig(
        depth=choice.depth,
        do_sample=bool(generation_config.do_sample),
        processors=processors,
        max_length=None if transcript.max_new is None else S + transcript.max_new,
        simulated_length=getattr(drafter.generation_config, "simulated_acceptance_length", None),
        keeps_rows=(keeps_cache or is_whole or transcript.in_step) and len(given) > 1,
        in_step=transcript.in_step,
        starts_anew=None if switch is None else switch.after,
    )
    why = choice.why if config.simulated_length is None else f"{choice.why}; acceptance is simulated"
    if transcript.in_step and len(given) > 1:
        names = [type(thing).__name__ for thing in (*whole_batch, *transcript.batch_criteria)]
        why += f"; rows in step, as {' and '.join(names)} may look at all of them"
    told = Speculation(choice.loop, why, choice.depth)
    clocks = Clocks(Stopwatch(drafter.device), Stopwatch(target.device), Stopwatch(torch.device("cpu")))
    with ExitStack() as stack:
        arena = None
        stack.enter_context(own_lengths(target))
        why_eager = "asked for" if choice.is_eager else why_not_captured(target, drafter)
        if why_eager is None and switch is not None:
            why_eager = f"{type(target).__name__} computes its cache anew where a text passes {switch.after} tokens"
        if why_eager is None and (asked := find_asked(target)) is not None:
            why_eager = f"{type(target).__name__} is asked for the position of each token by {name_of(asked)}"
        if why_eager is not None and not choice.is_eager:
            say_once(target, why_eager)
        longest = int(mask.sum(-1).max())
        if why_eager is None and not take_arena(target):
            why_eager = BUSY
        elif why_eager is None:
            stack.callback(give_arena_back, target)
        if why_eager is None:
            max_new = FIRST_ROOM if transcript.max_new is None else transcript.max_new
            sizes = {"num_rows": len(given), "prompt_length": longest, "max_new": max_new, "depth": choice.depth}
            # Graphs are recorded on the current device.
            stack.enter_context(torch.cuda.device_of(torch.empty(0, device=target.device)))
            arena = stack.enter_context(open_arena(target, drafter, **sizes))
            target_cache, drafter_cache = arena.first_rows(len(given))
        else:
            capacity = to_bucket(longest + 2 * choice.depth + 3)
            target_cache, drafter_cache = RowCache(count_cached_layers(target), capacity), None
        recorder = stack.enter_context(StateRecorder(target, drafter.bound_aux_layer_ids))
        turns = turns_of(target)
        with turns:
            prompt = prefill(
                *(target, recorder, prompt_ids, mask, model_kwargs, generation_config),
                device=drafter.device,
                cache=target_cache,
                move=not choice.has_cache,
                is_whole=is_whole,
            )
        if len(given) * (choice.depth + 1) <= FEW_TOKENS:
            # As the host does after the prompt: experts that copy the weights they choose, good for few tokens.
            stack.enter_context(target._optimize_model_for_decode())
        with turns, clocks.draft:
            state = prepare(drafter, prompt, depth=config.depth, max_length=config.max_length, cache=drafter_cache)
        models = (target, drafter, recorder, state, config)
        over_masks = FoldedAttention(target, drafter, folds=not choice.is_eager)
        around: list[AbstractContextManager] = [over_masks]
        if why_eager is not None and not choice.is_eager:  # layers on a CPU, if there are any
            around.append(PackedLinears(target, drafter))
        for context in around:
            stack.callback(leave, context, turns)
        phases = Phases(*models, [turns, *around])
        if arena is not None:
            keeps_scores = transcript.scores is not None or transcript.logits is not None
            captured = CapturedPhases(*models, [turns, *around], arena, keeps_scores=keeps_scores)
            try:
                captured.begin()
                phases = captured
            except CAPTURE_ERRORS as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                why_eager = str(error)
                if not isinstance(error, KnownUnfitError):
                    why_eager = f"{type(error).__name__}: {error}"
                    logger.warning("Rounds cannot be captured in CUDA graphs, so they run eagerly: %s", why_eager)
            if is_true_for_any(target, why_eager is not None) and why_eager is None:
                why_eager, phases = "another process could not capture them", Phases(*models, [turns, *around])
            if why_eager is not None:
                captured.give_up(why_eager)
        if why_eager is not None:
            told.graphs = f"none ({why_eager})"
        of_rows = [processors]
        if not config.in_step or len(given) == 1:
            of_rows = processors_for_rows(processors, transcript.num_hidden, transcript.prompt)
        for _ in decode(phases, prompt, transcript=transcript, processors=of_rows, told=told, clocks=clocks):
            pass
        if isinstance(phases, CapturedPhases):
            told.graphs = phases.told
        if keeps_cache:
            with turns, over_masks:
                fill_pads(target, prompt, phases.state, transcript)
            assert transcript.length is not None
            slots = slots_of_output(prompt, transcript.length, S, order)
            host_cache = prompt.host_cache
            phases.state.target_cache.to_host(host_cache, slots)
    if streamer is not None:
        streamer.end()
    sequences = transcript.sequences(given)
    if not is_dict:
        return sequences
    told.seconds = time.perf_counter() - start
    told.draft_seconds, told.accept_seconds, told.host_seconds = (clock.read_seconds() for clock in clocks)
    output = GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=transcript.columns(transcript.scores),
        logits=transcript.columns(transcript.logits),
        **{CACHE_NAME: host_cache},
    )
    output.speculation = told
    return output


def say_once(target: PreTrainedModel, why_eager: str) -> None:
    """Warn of what keeps rounds on a GPU from being captured, once for a target and a reason."""
    told = _told.setdefault(target, set())
    if target.device.type == "cuda" and why_eager not in (*told, BUSY):
        told.add(why_eager)
        logger.warning("Rounds run eagerly, several times as slow as CUDA graphs: %s.", why_eager)


def find_crossed_switch(target: PreTrainedModel, lengths: list[int], max_new: int | None) -> Switch | None:
    """Where texts of this call pass the point at which `target` drops its cache, and that matters; None if they do not.

    Args:
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
    """Whether somebody else than the host, PyTorch, accelerate and us is told when a module of `target` runs."""
    hooks = (h for m in target.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    packages = (str(getattr(hook, "__module__", None)).partition(".")[0] for hook in hooks)
    return any(package not in ("transformers", "torch", "accelerate", "hf_eagle3") for package in packages)


def leave(context: AbstractContextManager, turns: Turns) -> None:
    """Let a call leave nothing of `context` behind, even if it is interrupted while that is entered."""
    with turns:
        context.__exit__(None, None, None)
