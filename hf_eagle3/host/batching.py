"""The host's entry points for batches that requests join and leave, with our engine behind them where there is a drafter."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from ..decoding.engine import Engine
from ..decoding.in_flight import InFlight, Limits
from ..decoding.preparation import find_switch
from ..decoding.room import Room
from ..decoding.state import RoundConfig
from ..rows.rotation import find_switch as find_rotation_switch
from ..speculation.accept import SHARED
from ..speculation.coverage import read_coverage
from ..speculation.shape import NONE, Shapes
from ..tensor_parallel import find_peers, is_spread
from . import generate
from .attaching import SETTINGS, find_attached, say_plain
from .desk import Desk
from .loop_choice import refuse_unknown_loop, why_not_target
from .manager import Manager
from .refusals import is_drafter, refuse_mistaken_llama, refuse_names, refuse_target, why_not_drafted
from .request import has_hooks_of_others
from .request_rows import Asking, RowMaker, count_positions
from .seeds import Seeds, resolve_seeds, seeds_of_rows
from .shapes import keep_taken, resolve_shapes

logger = logging.getLogger(__name__)

OURS = ("assistant_model", *SETTINGS)
PLACES = {"cpu": 8}  # rows that run at once, by device
PLACES_ELSEWHERE = 64
PROMPT_TOKENS = {"cpu": 128}  # of prompts between two rounds: a few rounds' time
# Elsewhere: tokens times weights that take about as long on a GPU, since a small target's forward is launches alone.
PROMPT_WORK, LEAST_PROMPT_TOKENS, MOST_PROMPT_TOKENS = 2e12, 256, 4096
SHARE = 0.8  # of the free memory of a device
# Set while the host's own functions run that call one another.
_is_hosts: ContextVar[bool] = ContextVar("is_hosts", default=False)


class Opened(NamedTuple):
    """What takes requests."""

    desk: Desk
    asking: Asking
    seeds: Seeds


# ---- whose it is ----


def find_drafter(target: PreTrainedModel, ours: dict[str, Any]) -> tuple[PreTrainedModel | None, dict[str, Any], bool]:
    """The drafter of a call, its settings, and whether it was asked for; the host's own is meant where it was not.

    Args:
        target: What the call was made on.
        ours: What it says about drafts.
    """
    given = ours.get("assistant_model")
    refuse_names(given)
    refuse_mistaken_llama(given)
    settings = {name: value for name, value in ours.items() if name != "assistant_model"}
    if given is not None:
        return given, settings, True
    attached = None if "assistant_model" in ours or _is_hosts.get() else find_attached(target, settings)
    if attached is not None:
        return attached.drafter, {**attached.settings, **settings}, bool(settings)
    return None, settings, generate.is_asked_for(settings)


def open_or_not(
    target: PreTrainedModel,
    ours: dict[str, Any],
    given: GenerationConfig | None,
    config: Any,
    num_requests: int | None,
) -> Opened | None:
    """Our engine for a call; None if the host's is meant.

    Raises:
        ValueError: Drafts were asked for, and a drafter cannot help.
    """
    drafter, settings, is_asked = find_drafter(target, ours)
    if drafter is None and not is_asked:
        return None
    try:
        return open_desk(target, drafter, settings, given, config, num_requests)
    except ValueError as error:
        if is_asked:
            raise
        say_plain(target, str(error))
        return None


def why_not_open(target: PreTrainedModel) -> str | None:
    """What about `target` keeps requests from joining rounds of ours, in words; None if nothing does."""
    name = type(target).__name__
    if target.config.is_encoder_decoder:
        return f"{name} has an encoder"
    if is_spread(target) or find_peers(target) is not None:
        return f"several processes share {name}"
    if has_hooks_of_others(target):
        return f"{name} has hooks of others, which may count on its rows"
    return why_not_target(target)


def open_desk(
    target: PreTrainedModel,
    drafter: PreTrainedModel | None,
    settings: dict[str, Any],
    given: GenerationConfig | None,
    config: Any,  # the host's `ContinuousBatchingConfig`, whose fields differ between its versions
    num_requests: int | None,
) -> Opened:
    """What takes requests of a call.

    Args:
        target: What it was made on.
        drafter: Not yet bound to it; None for our engine without drafts.
        settings: What the call says about drafts.
        given: What texts are decoded by; the target's own by default.
        config: What requests may take.
        num_requests: How many there will be, if that is known.

    Raises:
        ValueError: A drafter cannot help.
    """
    shapes = Shapes((NONE,)) if drafter is None else resolve_shapes(target, drafter, given, settings)
    asked = generate.find_saved_setting("decode_loop", target, drafter, given, settings)
    refuse_unknown_loop(asked)
    seed = generate.find_saved_setting("seed", target, drafter, given, settings)
    seeds = resolve_seeds(getattr(config, "seed", None) if seed is None else seed)
    if drafter is not None:
        drafter.bind(target)
        refuse_target(target)
        shapes = keep_taken(target, shapes)
    if asked == "host":
        raise ValueError(
            'decode_loop is "host", which does not draft for batches that requests join: leave out decode_loop, or '
            "assistant_model."
        )
    why = why_not_open(target)
    if why is None and drafter is None and why_not_drafted(target) is not None:
        why = f"{type(target).__name__} does not run there"
    if why is not None:
        out = "assistant_model" if drafter is not None else "decode_loop"
        raise ValueError(f"Batches that requests join need our own decode loop, and {why}: leave out {out}.")
    own = given if given is not None else target.generation_config
    maker = RowMaker(target, own, keeps_logprobs=bool(getattr(config, "return_logprobs", False)))
    maker.ask({}, max_new_tokens=None, eos_token_id=None)  # what all requests have must mean something
    rounds = make_open_config(target, drafter, shapes, maker)

    def make_engine(room: Room) -> Engine:
        options = {"capturer": generate.CAPTURER, "chooser": generate.CHOOSER}
        return Engine(target, drafter, rounds, room, is_eager=asked == "eager", **options)  # type: ignore[arg-type]

    in_flight = InFlight(target, find_limits(target, config, num_requests), GenerationConfig(), make_engine)
    desk = Desk(in_flight, depth=shapes.depth, rule=f"greedy, or {SHARED} where rows draw")
    first = seeds if isinstance(seeds, int) else None
    return Opened(desk, Asking(maker, num_return_sequences=own.num_return_sequences or 1, seed=first), seeds)


def make_open_config(
    target: PreTrainedModel, drafter: PreTrainedModel | None, shapes: Shapes, maker: RowMaker
) -> RoundConfig:
    """What rounds do that requests join. What rows draw depends on their seeds alone, whoever runs beside them."""
    simulated = coverage = None
    if drafter is not None:
        simulated = getattr(drafter.generation_config, "simulated_acceptance_length", None)
        coverage = getattr(drafter.generation_config, "simulated_coverage", None)
    switch = find_switch(target)
    starts_anew = switch is not None and switch.computes_anew and find_rotation_switch(target) is not None
    shape, *others = shapes.shapes
    return RoundConfig(
        shape=shape,
        others=tuple(others) if simulated is None and not starts_anew else (),
        is_reproducible=True,
        simulated_length=simulated,
        coverage=None if coverage is None else read_coverage(coverage),
        keeps_scores=maker.keeps_logprobs,
        starts_anew=switch.after if switch is not None and starts_anew else None,
        max_length=count_positions(target),
    )


def find_limits(target: PreTrainedModel, config: Any, num_requests: int | None) -> Limits:  # Any: the host's
    """What requests may take together, by the host's settings or by what there is.

    Raises:
        ValueError: A setting leaves nothing.
    """
    for name in ("max_requests_per_batch", "max_batch_tokens", "num_blocks", "max_memory_percent"):
        if (value := getattr(config, name, None)) is not None and not value > 0:
            raise ValueError(f"{name} of the continuous batching config is above 0, or None; got {value!r}.")
    device = target.device
    places = getattr(config, "max_requests_per_batch", None) or PLACES.get(device.type, PLACES_ELSEWHERE)
    tokens = getattr(config, "max_batch_tokens", None) or choose_prompt_tokens(target)
    if num_requests is not None:
        places = min(places, max(num_requests, 1))
    blocks, num_slots = getattr(config, "num_blocks", None), None
    if blocks is not None:
        num_slots = blocks * (getattr(config, "page_size", None) or getattr(config, "block_size", None) or 1)
    elif device.type == "cuda":
        share = getattr(config, "max_memory_percent", None) or SHARE
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        num_slots = int(free * share / count_slot_bytes(target))
    return Limits(int(places), int(tokens), num_slots)


def choose_prompt_tokens(target: PreTrainedModel) -> int:
    """Tokens of prompts between two rounds that those who run hardly notice."""
    if (tokens := PROMPT_TOKENS.get(target.device.type)) is not None:
        return tokens
    return min(max(int(PROMPT_WORK / target.num_parameters()), LEAST_PROMPT_TOKENS), MOST_PROMPT_TOKENS)


def count_slot_bytes(target: PreTrainedModel) -> int:
    """Bytes that the target's cache takes for one token, at most."""
    config = target.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * target.dtype.itemsize


# ---- the wraps ----


def take_ours(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call says about drafts, and the rest of its keywords."""
    ours = {name: value for name, value in kwargs.items() if name in OURS}
    return ours, {name: value for name, value in kwargs.items() if name not in OURS}


def is_foreign(ours: Mapping[str, Any]) -> bool:
    """Whether a call is given an assistant of another kind, which is the host's affair."""
    assistant = ours.get("assistant_model")
    refuse_names(assistant)
    refuse_mistaken_llama(assistant)
    return assistant is not None and not is_drafter(assistant)


@contextmanager
def as_the_hosts() -> Iterator[None]:
    """Let functions of the host call one another without a drafter."""
    token = _is_hosts.set(True)
    try:
        yield
    finally:
        _is_hosts.reset(token)


def find_config(given: GenerationConfig | None, config: Any) -> Any:  # Any: the host's
    """What requests may take: as the call says, or as its generation config does, which the host has deprecated."""
    return config or getattr(given, "continuous_batching_config", None) or ContinuousBatchingConfig()


# Transformers 5.24 generation/continuous_batching/continuous_api.py:ContinuousMixin.generate_batch
def wrap_generate_batch(original: Callable) -> Callable:
    """Decode with our engine where there is a drafter, or `decode_loop` asks for it."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate_batch(self: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, GenerationOutput]:
        ours, others = take_ours(kwargs)
        if is_foreign(ours):
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **others)
        given, inputs = call.arguments.get("generation_config"), call.arguments["inputs"]
        config = find_config(given, call.arguments.get("continuous_batching_config"))
        num_texts = (given or self.generation_config).num_return_sequences or 1
        num_requests = len(inputs) * num_texts if hasattr(inputs, "__len__") else None
        opened = open_or_not(self, ours, given, config, num_requests)
        if opened is None:
            with as_the_hosts():
                return original(self, *args, **others)
        further = dict(call.arguments.get("kwargs", {}))
        own = further.pop("request_kwargs", None)
        return answer(
            opened,
            inputs,
            further,
            [{}] * len(inputs) if own is None else own,
            records_times=call.arguments.get("record_timestamps", False),
            shows_progress=call.arguments.get("progress_bar", False),
        )

    return generate_batch


def answer(
    opened: Opened,
    inputs: Sequence[Any],  # whatever was given
    settings: dict[str, Any],
    own: Sequence[Mapping[str, Any] | None],
    *,
    records_times: bool,
    shows_progress: bool,
) -> dict[str, GenerationOutput]:
    """The outputs of all requests, by their ids and in their order.

    Args:
        opened: What takes them.
        inputs: Their prompts.
        settings: Of all of them.
        own: Of each.
        records_times: Tell when each token came.
        shows_progress: Show a bar.

    Raises:
        ValueError: Settings mean nothing, or are not as many as prompts.
    """
    desk, asking, seeds = opened
    if len(own) != len(inputs):
        raise ValueError(
            f"request_kwargs has {len(own)} mappings for {len(inputs)} prompts: give one for each, or None."
        )
    of_rows = seeds_of_rows(seeds, len(inputs)) if isinstance(seeds, list) else [None] * len(inputs)
    requests = []
    for input_ids, further, seed in zip(inputs, own, of_rows, strict=True):
        its = {**({} if seed is None else {"seed": seed}), **settings, **(further or {})}
        limits = {name: its.pop(name, None) for name in ("max_new_tokens", "eos_token_id")}
        times = {"is_streaming": False, "records_times": records_times}
        requests += asking.ask(input_ids, None, settings=its, **limits, **times)
    outputs: dict[str, GenerationOutput] = {}
    bar = tqdm(
        total=len(requests), disable=not shows_progress, desc=f"Solving {len(requests)} requests", unit="request"
    )
    with torch.no_grad(), desk.in_flight, bar:
        told = [output for request in requests for output in desk.add(request)]
        while told or not desk.is_idle:
            outputs |= {output.request_id: output for output in told}
            bar.update(len(told))
            told = [] if desk.is_idle else desk.step()
    if failed := [request.id for request in requests if outputs[request.id].error is not None]:
        logger.error("Requests %s failed during generation.", failed)
    return {request.id: outputs[request.id] for request in requests}


def make_manager(target: PreTrainedModel, opened: Opened, config: Any) -> Manager:  # Any: the host's
    """A manager over what takes requests."""
    if isinstance(opened.seeds, list):
        raise ValueError("A manager takes one seed, which the texts of later requests count on from; got a list.")
    return Manager(target, opened.desk, opened.asking, max_queue_size=getattr(config, "max_queue_size", 0) or 0)


def manage_or_not(target: PreTrainedModel, call: Mapping[str, Any], ours: dict[str, Any]) -> Manager | None:
    """Our manager for a call with these arguments; None if the host's is meant."""
    given = call.get("generation_config")
    config = find_config(given, call.get("continuous_batching_config"))
    opened = open_or_not(target, ours, given, config, None)
    return None if opened is None else make_manager(target, opened, config)


# Transformers 5.24 generation/continuous_batching/continuous_api.py:ContinuousMixin.init_continuous_batching
def wrap_init_continuous_batching(original: Callable) -> Callable:
    """Give our manager where there is a drafter, or `decode_loop` asks for it."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        ours, others = take_ours(kwargs)
        if is_foreign(ours):
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **others).arguments
        manager = manage_or_not(self, call, ours)
        return original(self, *args, **others) if manager is None else manager

    return init_continuous_batching


# Transformers 5.24 generation/continuous_batching/continuous_api.py:ContinuousMixin.continuous_batching_context_manager
def wrap_context_manager(original: Callable) -> Callable:
    """The same as a context, which starts and stops it."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def continuous_batching_context_manager(
        self: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> AbstractContextManager[Any]:
        ours, others = take_ours(kwargs)
        if is_foreign(ours):
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **others).arguments
        manager = manage_or_not(self, call, ours)
        if manager is None:
            return entered_as_the_hosts(original(self, *args, **others))
        return started(manager, call.get("block", True), call.get("timeout"))

    return continuous_batching_context_manager


@contextmanager
def entered_as_the_hosts(context: AbstractContextManager[Any]) -> Iterator[Any]:
    """A context of the host, whose beginning calls other functions of the host."""
    with ExitStack() as stack:
        with as_the_hosts():
            manager = stack.enter_context(context)
        yield manager


@contextmanager
def started(manager: Manager, block: bool, timeout: float | None) -> Iterator[Manager]:
    """A manager that runs; it ends once all requests have ended, or at once after an exception."""
    manager.start()
    try:
        yield manager
    except BaseException:
        manager.stop(block=block, timeout=timeout, hard_stop=True)
        raise
    if manager.is_running():
        manager.stop(block=block, timeout=timeout)
