"""Attentions of ours for stock layers of the host: by row lengths instead of masks, and over masks.

The attention that a model was loaded with serves its prompts, these serve its rounds. All are registered with the host's
`AttentionInterface`, and a config names them while rounds run; forwards of other threads then get the model's own
attention. The cache that a layer writes to says at which slots the new tokens are.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..kernels.attention import attend_rows, attend_rows_eager
from ..kernels.language import is_available
from .cache import WRITING
from .masks import BY_ROWS
from .memory import BY_KERNELS

FOLDED = "eagle3_folded"  # rounds on a CPU of models that attend by sdpa
OVER_MASKS = "eagle3_over_masks"  # eager rounds of models that attend by what takes no ready-made mask


_lock = threading.Lock()  # of the next
# By the id of a config: the names that it was given by each `Attending` that is inside, by its id; the newest last.
_given: dict[int, dict[int, "StandIn"]] = {}


class UnfitError(RuntimeError):
    """A layer attends in a way that an attention of ours does not know."""


class StandIn(str):
    """The name of an attention of ours in a config; `own` is the name that it takes the place of."""

    own: str

    def __new__(cls, name: str, own: str = "") -> "StandIn":
        self = super().__new__(cls, name)
        self.own = own
        return self


def own_attention(config: PreTrainedConfig) -> str:
    """The name of the attention that a model was loaded with, also while rounds attend by ours."""
    name = config._attn_implementation or "eager"  # as layers take what nobody has set
    return getattr(name, "own", name)


class _AsLoaded:
    """A layer's module as it is when no round runs: its config names the model's own attention."""

    def __init__(self, module: Any):  # Any: an attention layer of the host
        self._module = module
        self.config = copy.copy(module.config)
        self.config._attn_implementation_internal = own_attention(module.config)

    def __getattr__(self, name: str) -> Any:  # Any: whatever the module has
        return getattr(self._module, name)


def find_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """What `module` calls where its config names the attention `name`."""
    home = sys.modules[type(module).__module__]
    if name == "eager":
        return home.eager_attention_forward
    return getattr(home, "ALL_ATTENTION_FUNCTIONS", AttentionInterface())[name]


def attend_as_loaded(module: Any, *args: Any, **kwargs: Any) -> Any:  # Any: the host's
    """Attend by the model's own attention."""
    name = own_attention(module.config)
    return find_function(module, name)(_AsLoaded(module), *args, **kwargs)


def make_own_mask(*args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:  # Any: the host's
    """The mask that the model's own attention takes; None for one that takes none."""
    masks = AttentionMaskInterface()
    name = own_attention(config)
    return masks[name](*args, config=config, **kwargs) if name in masks else None


class Attending:
    """Lets text layers of `models` attend by an attention of ours. A context for the forwards of rounds.

    Whoever entered last decides. Once nobody is inside, the name of the model's own attention is back, so overlapping
    threads cannot leave ours installed. A second exit, as after an interrupt, does nothing.

    Args:
        choose: Names the attention for a model.
    """

    def __init__(self, *models: PreTrainedModel, choose: Callable[[PreTrainedModel], str]):
        self._names: list[tuple[PreTrainedConfig, StandIn]] = []
        for model in models:
            config = model.config.get_text_config(decoder=True)
            own, name = own_attention(config), choose(model)
            if name != own:
                self._names.append((config, StandIn(name, own)))

    def __enter__(self) -> None:
        with _lock:
            for config, name in self._names:
                _given.setdefault(id(config), {})[id(self)] = name
                config._attn_implementation_internal = name

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _lock:
            for config, name in self._names:
                given = _given.get(id(config), {})
                given.pop(id(self), None)
                config._attn_implementation_internal = next(reversed(given.values()), name.own)
                if not given:
                    _given.pop(id(config), None)


# ---- by rows ----


def row_attention(
    module: Any,  # Any: an attention layer of the host
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, L, D], a view of a row cache
    value: Tensor,  # [B, H_kv, L, D_v]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,  # Any: what else the host hands to every attention function
) -> tuple[Tensor, None]:  # [B, T, H, D_v]
    """Attend as the host's functions do: each new token sees what its row holds up to itself, within the window."""
    cache, name = WRITING.get(), type(module).__name__
    if cache is None or cache.block is None:
        options = {"scaling": scaling, "s_aux": s_aux, "softcap": softcap}
        given = {name: value for name, value in options.items() if value is not None}
        return attend_as_loaded(module, query, key, value, attention_mask, **given, **kwargs)
    if attention_mask is not None:
        raise UnfitError(f"{name} brings a mask of its own")
    if kwargs.get("position_bias") is not None:
        raise UnfitError(f"{name} adds a bias of its own to scores")
    if "sliding_window" not in kwargs and getattr(module.config, "sliding_window", None) is not None:
        raise UnfitError(f"{name} does not say its window")
    if s_aux is None and hasattr(module, "sinks"):
        raise UnfitError(f"{name} does not hand over its sinks")
    if own_attention(module.config) == "sdpa":
        s_aux = softcap = None  # it leaves them out: Gemma 2's, as Transformers 5.17 loads it
    attend = attend_rows if is_available(query.device) else attend_rows_eager
    out = attend(
        query,
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache.block.start.to(query.device),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        sinks=s_aux,
        softcap=softcap,
        ancestry=cache.block.ancestry,
    )
    return out, None


def make_no_mask(*args: Any, **kwargs: Any) -> Any:  # Any: the host's
    """None for forwards of ours, which attend by rows; else the mask of the model's own attention."""
    return None if WRITING.get() is not None else make_own_mask(*args, **kwargs)


AttentionInterface.register(BY_ROWS, row_attention)
AttentionMaskInterface.register(BY_ROWS, make_no_mask)


@contextmanager
def attending_by_rows(*models: PreTrainedModel) -> Iterator[None]:
    """Let text layers of `models` attend by rows, and their cache be written by kernels where there are any."""
    token = BY_KERNELS.set(is_available(models[0].device))
    try:
        with Attending(*models, choose=lambda model: BY_ROWS):  # noqa: ARG005  whichever it is
            yield
    finally:
        BY_KERNELS.reset(token)


# ---- over masks ----


def folded_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, S, D]
    value: Tensor,
    attention_mask: Tensor | None,  # [B, 1, T, S]
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,  # Any: what else the host hands to every attention function
) -> tuple[Tensor, None]:  # [B, T, H, D]
    """Attend as the host's sdpa, which behind a mask copies keys and values for each query head that shares them.

    Here such heads are further queries of one head.
    """
    B, H, T, D = query.shape
    H_kv = key.shape[1]
    is_usual = query.is_cpu and attention_mask is not None and attention_mask.shape[:3] == (B, 1, T)
    if not is_usual or H_kv == H or any(kwargs.get(name) is not None for name in ("softcap", "position_bias")):
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None
    mask = attention_mask[:, :, None].expand(B, 1, H // H_kv, T, -1)  # [B, 1, G, T, S]
    out = scaled_dot_product_attention(
        query.reshape(B, H_kv, -1, D),  # [B, H_kv, G*T, D]
        key,
        value,
        attn_mask=mask.reshape(B, 1, -1, mask.shape[-1]),
        dropout_p=dropout,
        scale=scaling,
    )
    return out.reshape(B, H, T, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(FOLDED, folded_attention)
AttentionMaskInterface.register(FOLDED, sdpa_mask)


def weigh(
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, S, D]
    value: Tensor,  # [B, H_kv, S, D_v]
    mask: Tensor | None,  # [B, 1, T, S] bool
    *,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:  # [B, T, H, D_v]
    """Softmax attention with a soft cap and sinks [H], in float32 at least, every score in memory."""
    B, H, T, D = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.reshape(B, key.shape[1], -1, T, D).to(wide)  # [B, H_kv, G, T, D]
    scores = q @ key[:, :, None].to(wide).mT * (D**-0.5 if scaling is None else scaling)  # [B, H_kv, G, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    if s_aux is not None:
        sink = s_aux.to(wide).view(1, key.shape[1], -1, 1, 1).expand(B, -1, -1, T, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    out = weights @ value[:, :, None].to(wide)  # [B, H_kv, G, T, D_v]
    return out.reshape(B, H, T, -1).transpose(1, 2).contiguous().to(query.dtype)


def attention_over_masks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:  # Any: the host's
    """Attend as the kernels of flash attention and flex attention do, over masks as sdpa takes them."""
    if WRITING.get() is None:
        return attend_as_loaded(module, query, key, value, attention_mask, **kwargs)
    options = {name: kwargs.pop(name, None) for name in ("softcap", "s_aux")}
    if attention_mask is None or all(value is None for value in options.values()):
        return folded_attention(module, query, key, value, attention_mask, **kwargs)
    return weigh(query, key, value, attention_mask, scaling=kwargs.get("scaling"), **options), None


def make_round_mask(*args: Any, **kwargs: Any) -> Any:  # Any: the host's
    """A mask as sdpa takes it for forwards of ours, else that of the model's own attention."""
    return sdpa_mask(*args, **kwargs) if WRITING.get() is not None else make_own_mask(*args, **kwargs)


AttentionInterface.register(OVER_MASKS, attention_over_masks)
AttentionMaskInterface.register(OVER_MASKS, make_round_mask)


def over_masks(*models: PreTrainedModel, folds: bool = True) -> Attending:
    """Lets text layers of `models` attend over masks, as eager rounds do that come with them.

    Args:
        folds: Let what attends by sdpa on a CPU do so over fewer copies.
    """

    def choose(model: PreTrainedModel) -> str:
        own = own_attention(model.config.get_text_config(decoder=True))
        return {"eager": own, "sdpa": FOLDED if folds and model.device.type == "cpu" else own}.get(own, OVER_MASKS)

    return Attending(*models, choose=choose)
