"""The host's server, with a drafter attached to the target that it loads.

Routes, streams, tool calls and errors are the host's. Its batches take the sampling settings of their first request for all
(Transformers 5.24 cli/serving/utils.py:CBGenerateManager); in ours each request has its own.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import AutoModel, GenerationConfig, PreTrainedModel

from .attaching import attach
from .manager import Manager
from .metrics import CONTENT_TYPE, make_page
from .refusals import refuse_other_models
from .request_rows import FIELDS, NOT_HERE

# What the host's server gives its manager by itself, or nobody gives a row.
GIVEN = {"max_new_tokens", "eos_token_id", *NOT_HERE}


@contextmanager
def drafting(source: str, **settings: Any) -> Iterator[None]:
    """Let what the host's server loads have the drafter `source` attached, with `settings` of `attach`."""
    from transformers.cli.serving import server
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseHandler, CBGenerateManager

    @functools.wraps(load := ModelManager._load_model)
    def load_with_drafter(self: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        target = load(self, *args, **kwargs)
        drafter = AutoModel.from_pretrained(source, dtype=target.dtype)
        refuse_other_models(drafter, source)
        attach(target, drafter.to(target.device), **settings)
        return target

    wraps: tuple[tuple[Any, str, Callable], ...] = (
        (server, "build_server", with_metrics(server.build_server)),
        (ModelManager, "_load_model", load_with_drafter),
        (BaseHandler, "_build_generation_config", keep_seed(BaseHandler._build_generation_config)),
        *(
            (CBGenerateManager, name, with_its_settings(getattr(CBGenerateManager, name)))
            for name in ("generate_streaming", "generate_non_streaming")
        ),
    )
    with ExitStack() as stack:
        for owner, name, function in wraps:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, function)
        yield


def with_metrics(original: Callable) -> Callable:
    """Let the host's app have a page of how requests in batches go."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build_server(*args: Any, **kwargs: Any) -> Any:
        from fastapi import Response

        state, app = signature.bind(*args, **kwargs).arguments["generation_state"], original(*args, **kwargs)

        @app.get("/metrics")
        def metrics() -> Response:
            manager = getattr(state._cb_manager, "_cb", None)
            stats = manager.stats if isinstance(manager, Manager) else None
            return Response(make_page(stats, state._cb_model_id or ""), media_type=CONTENT_TYPE)

        return app

    return build_server


def keep_seed(original: Callable) -> Callable:
    """Let a request's seed be that of its own draws, beside the process' that the host sets."""

    @functools.wraps(original)
    def build_generation_config(self: Any, body: dict, *args: Any, **kwargs: Any) -> GenerationConfig:
        config = original(self, body, *args, **kwargs)
        if body.get("seed") is not None:
            config.seed = body["seed"]
        return config

    return build_generation_config


def with_its_settings(original: Callable) -> Callable:
    """Let a request that joins our batch have its own settings."""

    @functools.wraps(original)
    def generate(
        self: Any, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        own = self
        if isinstance(self._cb, Manager):
            own = copy.copy(self)
            own._cb = ItsManager(self._cb, read_request(gen_config, processor))
        return original(own, model, processor, inputs, gen_config, *args, **kwargs)

    return generate


def read_request(config: GenerationConfig, processor: Any) -> dict[str, Any]:  # Any: a processor or a tokenizer
    """What a request of these settings is given by name."""
    settings = {name: value for name, value in vars(config).items() if name in FIELDS - GIVEN}
    if getattr(config, "seed", None) is not None:
        settings["seed"] = config.seed  # see `keep_seed`
    if config.stop_strings is not None:
        settings["tokenizer"] = getattr(processor, "tokenizer", processor)
    return settings


class ItsManager:
    """A manager for one request, whose settings it adds."""

    def __init__(self, manager: Manager, settings: dict[str, Any]):
        self._manager, self._settings = manager, settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def add_request(self, *args: Any, **kwargs: Any) -> str | None:
        """As the manager's."""
        return self._manager.add_request(*args, **{**self._settings, **kwargs})
