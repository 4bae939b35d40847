"""The host functions that must know drafters, wrapped in this one place.

Each wrap looks at its arguments and, unless a drafter is among them, calls the original with exactly what it was given.
Written against Transformers 5.24.0.
"""

import copy
import functools
import inspect
import logging
import numbers
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation import ContinuousMixin, GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.pipelines import base as pipelines
from transformers.utils import ModelOutput

from .accept import accept_sampled
from .cache import CACHE_NAME
from .candidates import DraftLogProbs, Eagle3CandidateGenerator, Session
from .checkpoints import export, load_published_config, register_weight_names
from .choice import HOST_LOOP, OWN_LOOP, choose_loop, take_choice
from .features import StateRecorder
from .graphs import turns_of
from .modeling import Eagle3DrafterConfig, Eagle3DrafterModel
from .own_loop import run_own_loop
from .peers import find_peers, make_agree
from .refusals import (
    advise,
    is_drafter,
    is_drafter_config,
    refuse_cache,
    refuse_continuous_batching,
    refuse_host_loop,
    refuse_inputs,
    refuse_mistaken_llama,
    refuse_names,
    refuse_settings,
    refuse_target,
)
from .stats import Speculation, Stopwatch
from .stopping import InOrder, Muted, TokenwiseStop, cut_output, needs_tokenwise_stop

logger = logging.getLogger(__name__)

# Candidate generators are given the model's outputs from 5.8 on, but only from 5.17 on can the host take draft tokens
# back out of a sliding-window cache.
MINIMUM_TRANSFORMERS = "5.17.0"
DEFAULT_DEPTH = 3
MAX_DEPTH = 64  # no drafter is right that often, and a round's kernels and caches are made for few tokens

# What the host's `PreTrainedConfig.get_config_dict` takes for itself (5.23 configuration_utils.py).
HUB_KEYS = frozenset(
    {
        *("cache_dir", "code_revision", "force_download", "gguf_file", "local_files_only", "proxies", "revision"),
        *("subfolder", "token", "trust_remote_code", "_commit_hash", "_from_auto", "_from_pipeline"),
    }
)


def find_own_setting(name: str, target: PreTrainedModel, given: GenerationConfig | None, call: dict[str, Any]) -> Any:
    """A setting that the host gives a default, or does not know, from where the host takes those that it does know.

    What the call says goes first, even if it is None; then the config given to it, then the target's own.
    """
    if name in call:
        return call[name]
    places = (getattr(config, name, None) for config in (given, target.generation_config))
    return next((value for value in places if value is not None), None)


def resolve_depth(asked: Any, drafter: PreTrainedModel) -> int:  # Any: whatever was given
    """K: what the call says, else the drafter's generation config, else a default.

    Raises:
        ValueError: It is not a whole number from 0 to `MAX_DEPTH`.
    """
    depth = next(k for k in (asked, drafter.generation_config.num_assistant_tokens, DEFAULT_DEPTH) if k is not None)
    is_number = isinstance(depth, numbers.Real) and not isinstance(depth, bool)
    if not is_number or depth not in range(MAX_DEPTH + 1):
        raise ValueError(
            f"num_assistant_tokens is the number of tokens to draft each round, up to {MAX_DEPTH}, 0 for none; got "
            f"{depth!r}."
        )
    return int(depth)


# Transformers 5.23 generation/utils.py:GenerationMixin.generate
def wrap_generate(original: Callable) -> Callable:
    """Refuse early what cannot be done, bind the drafter, and settle the draft depth."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        drafter: Any = kwargs.get("assistant_model")  # Any: it may come from remote code
        if drafter is None and args:
            drafter = signature.bind(self, *args, **kwargs).arguments.get("assistant_model")
        refuse_names(drafter)
        refuse_mistaken_llama(drafter)
        if not is_drafter(drafter):
            return original(self, *args, **kwargs)

        call = signature.bind(self, *args, **kwargs)
        further = call.arguments.setdefault("kwargs", {})
        given = call.arguments.get("generation_config")
        if call.arguments.get("custom_generate") is not None:
            raise ValueError(
                "custom_generate brings its own decode loop, which an EAGLE-3 drafter cannot assist: leave out "
                "custom_generate or assistant_model."
            )
        depth = resolve_depth(find_own_setting("num_assistant_tokens", self, given, further), drafter)
        asked = find_own_setting("decode_loop", self, given, further)
        if asked is None and "decode_loop" not in further:
            asked = getattr(drafter.generation_config, "decode_loop", None)
        for name in ("num_assistant_tokens", "decode_loop"):
            further.pop(name, None)
        settings, inputs = self._prepare_generation_config(given, **further)  # copies
        drafter.bind(self)
        refuse_target(self)
        refuse_settings(settings)
        if settings.output_attentions and self.config.get_text_config()._attn_implementation != "eager":
            raise ValueError(
                "The target's attention gives no weights to return (output_attentions=True): call "
                "target.set_attn_implementation('eager') first, or leave out output_attentions."
            )
        # The host fills what is unset with a default of its own, 20, so the loop must find the depth settled.
        if given is None:
            further["num_assistant_tokens"] = depth
        else:
            call.arguments["generation_config"] = given = copy.deepcopy(given)
            given.num_assistant_tokens = depth
        with turns_of(self):  # while graphs are recorded, layers are not as they are
            choice = choose_loop(
                self,
                drafter,
                asked=asked,
                depth=depth,
                settings=settings,
                has_synced_gpus=bool(call.arguments.get("synced_gpus")),
                inputs=inputs,
            )
        logger.info(
            "%s (%s): depth %d, target states at boundaries %s.",
            *(choice.loop, choice.why, depth, drafter.bound_aux_layer_ids or "n, normed"),
        )
        # The host hands criteria through to the decode loop; this one is found, taken out and never asked.
        call.arguments["stopping_criteria"] = [*(call.arguments.get("stopping_criteria") or ()), choice]
        further.pop("assistant_tokenizer", None)  # draft tokens are the target's by their ids
        if choice.loop == OWN_LOOP:
            call.arguments["assistant_model"] = None  # to the host, a plain call
        elif settings.num_return_sequences > 1:
            raise ValueError(
                f"An EAGLE-3 drafter can assist only one row at a time here ({choice.why}): {advise(choice.why)}leave out "
                "num_return_sequences, or assistant_model."
            )
        return original(*call.args, **call.kwargs)

    return generate


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
        input_ids, criteria, streamer = (
            arguments["input_ids"],
            arguments["stopping_criteria"],
            arguments.get("streamer"),
        )
        choice = take_choice(criteria)
        why = choice.why if choice is not None else "called from outside generate()"
        refuse_host_loop(self, arguments["generation_config"].max_length, why)
        refuse_inputs(input_ids, arguments["model_kwargs"], why)
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

        start, stopwatch = time.perf_counter(), Stopwatch(drafter.device)
        with StateRecorder(self, boundaries) as recorder, continue_from_cache(self, input_ids, arguments):
            chooses = in_order.looks_at_text and getattr(settings, "assistant_ensemble_weight", None) is None
            session = Session(drafter, recorder, depth, stopwatch, stop, in_order if chooses else None)
            arguments["assistant_model"] = session
            output = original(*call.args, **call.kwargs)
        num_behind = stop.num_behind if stop is not None else 0
        output = cut_output(output, num_behind)
        if isinstance(output, ModelOutput):
            output.speculation = summarize(session, why, num_behind, time.perf_counter() - start)
        return output

    return _assisted_decoding


def summarize(session: Session, why: str, num_behind: int, seconds: float) -> Speculation:
    """The statistics of a finished call that took `seconds` and whose last `num_behind` tokens were cut off."""
    speculation = Speculation(HOST_LOOP, why, depth=session.depth, seconds=seconds)
    speculation.draft_seconds = session.stopwatch.read_seconds()
    *verdicts, (num_drafted, num_accepted) = session.verdicts
    for verdict in (*verdicts, (num_drafted, num_accepted - num_behind)):
        speculation.count(*verdict)
    return speculation


# Transformers 5.23 generation/utils.py:GenerationMixin._sample
def wrap_sample(original: Callable) -> Callable:
    """Our own loop, where the call was given to it."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _sample(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind_partial(self, *args, **kwargs).arguments
        choice = take_choice(arguments.get("stopping_criteria"))
        if choice is None:
            return original(self, *args, **kwargs)
        given = arguments.get("model_kwargs", {})
        return run_own_loop(
            self,
            choice,
            arguments["input_ids"],
            given,
            processors=arguments["logits_processor"],
            criteria=arguments["stopping_criteria"],
            generation_config=arguments["generation_config"],
            streamer=arguments.get("streamer"),
        )

    return _sample


# Transformers 5.23 generation/continuous_batching/continuous_api.py:ContinuousMixin
def wrap_continuous_batching(original: Callable) -> Callable:
    """Refuse a drafter, which the host would leave out without a word, or as an argument that it does not know."""

    @functools.wraps(original)
    def continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        refuse_continuous_batching(kwargs.get("assistant_model"))
        return original(self, *args, **kwargs)

    return continuous_batching


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
        if candidate_logits.in_order is not None:
            tokens, num_accepted = candidate_logits.in_order.take()
            return candidate_input_ids.new_tensor([tokens]), num_accepted
        draft_tokens = candidate_input_ids[:, -candidate_length:]  # [1, K]
        log_q = candidate_logits.as_subclass(Tensor)  # [1, K, V]
        verdict = accept_sampled(draft_tokens, log_q.exp(), new_logits.softmax(dim=-1))
        num_accepted = int(verdict.num_accepted)  # the round's wait
        return torch.cat([draft_tokens[:, :num_accepted], verdict.next_token[:, None]], dim=-1), num_accepted

    parameters = inspect.signature(original).parameters
    return _speculative_sampling


# Transformers 5.23 pipelines/base.py:load_assistant_model
def wrap_load_assistant_model(original: Callable) -> Callable:
    """A drafter for a pipeline, given as such or by its name.

    The host looks for its class among its own, and for a tokenizer, which nobody would ask: draft tokens are the target's
    by their ids.
    """

    @functools.wraps(original)
    def load_assistant_model(model: PreTrainedModel, assistant_model: Any, assistant_tokenizer: Any) -> Any:
        drafter = assistant_model
        if isinstance(drafter, (str, os.PathLike)) and is_drafter_config(AutoConfig.from_pretrained(drafter)):
            drafter = AutoModel.from_pretrained(drafter).to(device=model.device, dtype=model.dtype)
        if not is_drafter(drafter) or not model.can_generate():
            return original(model, assistant_model, assistant_tokenizer)
        return drafter, None

    return load_assistant_model


# Packages that serve drafters by classes of their own, and read configs by `AutoConfig` for them.
SERVERS = ("sglang", "vllm")


# Transformers 5.23 models/auto/configuration_auto.py:AutoConfig.from_pretrained
def wrap_from_pretrained(original: classmethod) -> classmethod:
    """Published drafters, none of which says `model_type: eagle3`."""

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        is_place = isinstance(pretrained_model_name_or_path, (str, os.PathLike))  # else the host complains
        asking = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        is_ours = is_place and asking not in SERVERS
        config = load_published_config(pretrained_model_name_or_path, **kwargs) if is_ours else None
        if config is None:
            return original.__get__(None, cls)(pretrained_model_name_or_path, **kwargs)
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        unused = {}
        for key, value in kwargs.items():
            if key in HUB_KEYS:
                continue
            if hasattr(config, key):
                setattr(config, key, value)
            else:
                unused[key] = value
        return (config, unused) if return_unused_kwargs else config

    return classmethod(from_pretrained)


WRAPS: tuple[tuple[Any, str, Callable], ...] = (  # Any: a class or a module
    (AutoConfig, "from_pretrained", wrap_from_pretrained),
    (GenerationMixin, "generate", wrap_generate),
    (GenerationMixin, "_get_candidate_generator", wrap_get_candidate_generator),
    (GenerationMixin, "_assisted_decoding", wrap_assisted_decoding),
    (GenerationMixin, "_sample", wrap_sample),
    (generation_utils, "_speculative_sampling", wrap_speculative_sampling),
    (pipelines, "load_assistant_model", wrap_load_assistant_model),
    (ContinuousMixin, "generate_batch", wrap_continuous_batching),
    (ContinuousMixin, "init_continuous_batching", wrap_continuous_batching),
    (ContinuousMixin, "continuous_batching_context_manager", wrap_continuous_batching),
)
_originals: dict[tuple[Any, str], Any] = {}  # as they stand in the namespace of the class or module


def check_host() -> None:
    """Raise unless this host can be worked with."""
    if Version(transformers.__version__).release < Version(MINIMUM_TRANSFORMERS).release:
        raise ImportError(
            f"hf-eagle3 needs transformers>={MINIMUM_TRANSFORMERS}, found {transformers.__version__}: "
            f'pip install -U "transformers>={MINIMUM_TRANSFORMERS}".'
        )
    if missing := [f"{owner.__name__}.{name}" for owner, name, _ in WRAPS if name not in vars(owner)]:
        raise ImportError(
            f"hf-eagle3 does not know transformers {transformers.__version__}, which has no {', '.join(missing)}: "
            "pip install -U hf-eagle3, or an older transformers (5.24.0 is known to work)."
        )


def install() -> None:
    """Make the host know drafters: `AutoModel` loads them, `generate(assistant_model=...)` uses them.

    Done by `import hf_eagle3`; a second call changes nothing.
    """
    check_host()
    AutoConfig.register(Eagle3DrafterConfig.model_type, Eagle3DrafterConfig, exist_ok=True)
    AutoModel.register(Eagle3DrafterConfig, Eagle3DrafterModel, exist_ok=True)
    AutoModelForCausalLM.register(Eagle3DrafterConfig, Eagle3DrafterModel, exist_ok=True)
    register_weight_names()
    Eagle3DrafterModel.exporter = export
    for owner, name, wrap in WRAPS:
        if (owner, name) not in _originals:
            _originals[owner, name] = vars(owner)[name]
            setattr(owner, name, wrap(vars(owner)[name]))


def uninstall() -> None:
    """Put the host's own functions back. What `AutoModel` has learnt stays; it concerns `model_type: eagle3` only."""
    while _originals:
        (owner, name), original = _originals.popitem()
        setattr(owner, name, original)
