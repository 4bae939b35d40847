"""The host's own assisted decoding, with our candidates and our accept rule."""

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import (
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from ..compat import CACHE_NAME
from ..decoding.columns import read_mask
from ..decoding.state import RoundConfig
from ..recorder import StateRecorder
from ..speculation.accept import Judging, describe_rules
from ..speculation.noise import GlobalNoise
from ..speculation.shape import NONE
from ..speculation.shared_noise import SharedNoise
from ..speculation.stats import Speculation, Stopwatch
from ..speculation.verdict import Proposal
from ..tensor_parallel import find_peers, make_agree
from .candidates import DraftLogProbs, Eagle3CandidateGenerator, Session
from .loop_choice import HOST_LOOP, LoopChoice
from .refusals import (
    is_drafter,
    refuse_cache,
    refuse_foreign_tokens,
    refuse_host_loop,
    refuse_inputs,
)
from .seeds import Seeds, seeds_of_rows
from .stopping import InOrder, Muted, TokenwiseStop, cut_output, needs_tokenwise_stop

# The loop choice of the call under way, on its way through the host to the loop.
_choice: ContextVar[LoopChoice | None] = ContextVar("loop_choice", default=None)


@contextmanager
def choosing(choice: LoopChoice) -> Iterator[None]:
    """Let the host's assisted decoding know why it was chosen."""
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


# Transformers 5.23 generation/utils.py:GenerationMixin._get_candidate_generator
def wrap_get_candidate_generator(original: Callable) -> Callable:
    """Our generator for our session."""

    @functools.wraps(original)
    def _get_candidate_generator(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        session = kwargs.get("assistant_model")
        if isinstance(session, Session):
            return Eagle3CandidateGenerator(session, kwargs["generation_config"], kwargs["logits_processor"])
        return original(self, *args, **kwargs)

    return _get_candidate_generator


@contextmanager
def continue_from_cache(target: PreTrainedModel, input_ids: Tensor, call: dict[str, Any]) -> Iterator[None]:
    """Feed the target as plain decoding does where a call goes on from `past_key_values` or from embeddings.

    The host's assisted decoding (up to 5.23) does not: given the whole sequence, it feeds again what the cache holds;
    given the new tokens only, it cuts the attention mask to their length. Either way the text goes wrong.
    """
    model_kwargs = call["model_kwargs"]
    cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
    embeds = model_kwargs.get("inputs_embeds")
    past = int(cache.get_seq_length()) if cache is not None else 0  # in 5.17 a tensor at times, changed in place
    given = input_ids.shape[1] if embeds is None else embeds.shape[1]
    # From 5.23 on the host drops a mask of ones and notes its length.
    full = mask.shape[1] if mask is not None else getattr(call["generation_config"], "_mask_length", past)
    handles: list[RemovableHandle] = []

    def cut(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        handles[0].remove()  # the first forward only
        for name in ("input_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][:, past:]
        for name in ("position_ids", "cache_position", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
            if kwargs.get(name) is not None and kwargs[name].shape[-1] == given:
                kwargs[name] = kwargs[name][..., past:]
        return args, kwargs

    def restore_mask(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        fed = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        length = int(kwargs[CACHE_NAME].get_seq_length()) + fed.shape[1]
        kwargs["attention_mask"] = functional.pad(mask, (0, length - full), value=1)  # [1, length]
        return args, kwargs

    if past and given > past and (embeds is not None or given == full):
        handles.append(target.register_forward_pre_hook(cut, with_kwargs=True))
    if mask is not None and full != input_ids.shape[1]:
        handles.append(target.register_forward_pre_hook(restore_mask, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Transformers 5.23 generation/utils.py:GenerationMixin._assisted_decoding
def wrap_assisted_decoding(original: Callable) -> Callable:
    """Record the target's states while the host's loop runs with our candidates."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _assisted_decoding(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        drafter: Any = kwargs.get("assistant_model")  # Any: it may come from remote code
        if not is_drafter(drafter):
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        arguments = call.arguments
        input_ids, criteria = arguments["input_ids"], arguments["stopping_criteria"]
        streamer = arguments.get("streamer")
        choice = _choice.get()
        is_own = choice is not None and choice.drafter is drafter  # else a call inside of another, from a criterion
        why = choice.why if choice is not None and is_own else "called from outside generate()"
        refuse_host_loop(self, arguments["generation_config"].max_length, why)
        refuse_inputs(input_ids, arguments["model_kwargs"], why)
        refuse_foreign_tokens(self, input_ids)
        refuse_cache(arguments["model_kwargs"].get(CACHE_NAME))

        stop = None
        agree = make_agree(self)
        if needs_tokenwise_stop(criteria, streamer) or find_peers(self) is not None:
            stop = TokenwiseStop(criteria, input_ids.shape[1], streamer, agree)
            arguments["stopping_criteria"] = stop
            arguments["streamer"] = None if streamer is None else Muted(streamer)
        arguments["generation_config"] = settings = copy.copy(arguments["generation_config"])
        # The host compiles a target with a static cache on a GPU, and compiled code does not call our hooks.
        settings.disable_compile = True
        eos = getattr(settings, "_eos_token_tensor", None)
        in_order = InOrder(
            arguments["logits_processor"],
            is_greedy=not settings.do_sample,
            eos_token_ids=[] if eos is None else eos.tolist(),
        )
        arguments["logits_processor"] = in_order
        depth = arguments["generation_config"].num_assistant_tokens
        boundaries = drafter.bound_aux_layer_ids
        seed = choice.seeds if choice is not None and is_own else None
        rule = RoundConfig(do_sample=bool(settings.do_sample), is_reproducible=seed is not None).find_rule(NONE)
        judging = make_judging(seed, input_ids)
        num_real = int(read_mask(input_ids, arguments["model_kwargs"]).sum())

        start, stopwatch = time.perf_counter(), Stopwatch(drafter.device)
        with StateRecorder(self, boundaries) as recorder, continue_from_cache(self, input_ids, arguments):
            chooses = in_order.looks_at_text and getattr(settings, "assistant_ensemble_weight", None) is None
            session = Session(
                *(drafter, recorder, depth, rule, judging, input_ids.shape[1] - num_real, stopwatch, stop),
                in_order if chooses else None,
            )
            arguments["assistant_model"] = session
            output = original(*call.args, **call.kwargs)
        num_behind = stop.num_behind if stop is not None else 0
        output = cut_output(output, num_behind)
        if isinstance(output, ModelOutput):
            output.speculation = summarize(session, why, num_behind, time.perf_counter() - start)
        return output

    return _assisted_decoding


def make_judging(seed: Seeds, like: Tensor) -> Judging:
    """What the accept rule needs at the start of a row, on the device of `like`."""
    (of_row,) = seeds_of_rows(seed, 1)
    shared = SharedNoise(like.new_tensor([0 if of_row is None else of_row]), like.new_zeros(1))
    return Judging(NONE, GlobalNoise(), shared)


def summarize(session: Session, why: str, num_behind: int, seconds: float) -> Speculation:
    """The statistics of a finished call that took `seconds` and whose last `num_behind` tokens were cut off."""
    speculation = Speculation(HOST_LOOP, why, depth=session.depth, seconds=seconds)
    speculation.rule = describe_rules([session.rule], in_order=session.in_order is not None)
    speculation.draft_seconds = session.stopwatch.read_seconds()
    *verdicts, (num_drafted, num_accepted) = session.verdicts
    for verdict in (*verdicts, (num_drafted, num_accepted - num_behind)):
        speculation.count(*verdict)
    return speculation


# Transformers 5.23 generation/utils.py:_speculative_sampling
def wrap_speculative_sampling(original: Callable) -> Callable:
    """Our accept rule for our drafts.

    The host's divides by zero where p and q agree to the last bit, and can keep a token whose p is zero.
    """

    @functools.wraps(original)
    def _speculative_sampling(
        candidate_input_ids: Tensor,
        candidate_logits: Tensor,
        candidate_length: int,
        new_logits: Tensor,
        is_done_candidate: Any = False,  # up to 5.17; our criteria never say so of candidates
        assistant_ensemble_weight: float | None = None,
    ) -> tuple[Tensor, Any]:
        if not isinstance(candidate_logits, DraftLogProbs) or assistant_ensemble_weight is not None:  # a lossy rule
            further = {"assistant_ensemble_weight": assistant_ensemble_weight, "is_done_candidate": is_done_candidate}
            further = {name: value for name, value in further.items() if name in parameters}
            return original(candidate_input_ids, candidate_logits, candidate_length, new_logits, **further)
        session = candidate_logits.session
        assert session is not None
        if session.in_order is not None:
            tokens, num_accepted = session.in_order.take()
            return candidate_input_ids.new_tensor([tokens]), num_accepted
        draft_tokens = candidate_input_ids[:, candidate_input_ids.shape[1] - candidate_length :]  # [1, K]
        log_q = candidate_logits.as_subclass(Tensor)  # [1, K, V]
        verdict = session.judge(Proposal(draft_tokens, log_q.exp()), new_logits)
        num_accepted = int(verdict.num_accepted)  # the round's wait
        return torch.cat([draft_tokens[:, :num_accepted], verdict.next_token[:, None]], dim=-1), num_accepted

    parameters = inspect.signature(original).parameters
    return _speculative_sampling
