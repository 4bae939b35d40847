"""Whether an attention that the host does not bring is one that rounds can take the place of: found by a trial."""

import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..compat import CACHE_NAME
from .attention import StandIn, attend_as_loaded, make_own_mask, own_attention, weigh

TRIED = "eagle3_tried"  # the name in a config while its attention is tried
# Softmax attention with the scale, window, soft cap and sinks that a layer hands over, by its function or its name. Any
# flash attention is, and kernels of it: that is how the host tells them, too.
KNOWN_FUNCTIONS = (sdpa_attention_forward, flash_attention_forward, flex_attention_forward)
KNOWN_NAMES = ("eager", "sdpa", "flex_attention")
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # how far results may be apart, as a share of their size
COARSE = 3e-2  # likewise in 16 bits
PROMPT_TOKENS = 8

Trial = Callable[[nn.Module, Tensor, Tensor, Tensor, Any, dict[str, Any]], None]
_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)
_one_trial = threading.Lock()
# By target and function: why rounds cannot attend by ours, None if they can.
_found: "weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, str | None]]" = weakref.WeakKeyDictionary()


def attention_under_trial(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:  # Any: the host's
    """The model's own attention, looked at where a trial is under way."""
    if (trial := _trial.get()) is not None:
        trial(module, query, key, value, attention_mask, kwargs)
    return attend_as_loaded(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(TRIED, attention_under_trial)
AttentionMaskInterface.register(TRIED, make_own_mask)


def why_not_ours(target: PreTrainedModel) -> str | None:
    """Why rounds cannot attend for `target` by ours; None if they can.

    An attention that the host does not bring is tried: over a few tokens it must be softmax attention.
    """
    config = target.config.get_text_config(decoder=True)
    name = own_attention(config)
    functions = AttentionInterface()
    function = functions.get(name)
    if name in KNOWN_NAMES or "flash" in name or function in KNOWN_FUNCTIONS:
        return None
    with _one_trial:
        found = _found.setdefault(target, {})
        if function not in found:
            found[function] = _try_attention(target, config, name)
    return found[function]


def _try_attention(target: PreTrainedModel, config: PreTrainedConfig, name: str) -> str | None:
    agreements: list[bool] = []  # of each layer

    def compare(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        if query.shape[2] > 1:  # the prompt
            return
        generator = torch.Generator().manual_seed(len(agreements))
        query, key, value = (torch.randn(x.shape, generator=generator).to(x) for x in (query, key, value))
        theirs = attend_as_loaded(module, query, key, value, mask, **kwargs)[0]
        scaling, softcap, s_aux = (kwargs.get(option) for option in ("scaling", "softcap", "s_aux"))
        ours = weigh(query, key, value, None, scaling=scaling, softcap=softcap, s_aux=s_aux)
        error = (ours - theirs.reshape(ours.shape)).float().norm() / ours.float().norm()
        agreements.append(bool(error <= TOLERANCE.get(query.dtype, COARSE)))

    ids = torch.arange(PROMPT_TOKENS + 1, device=target.device)[None]
    cache = DynamicCache(config=config)
    token = _trial.set(compare)
    config._attn_implementation_internal = StandIn(TRIED, name)
    try:
        with torch.no_grad():
            for part in (ids[:, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]):
                target(input_ids=part, **{CACHE_NAME: cache}, use_cache=True)
    except Exception as error:  # noqa: BLE001  whatever it is, the attention could not be tried
        return f"the target's attention {name} could not be tried ({type(error).__name__}: {error})"
    finally:
        config._attn_implementation_internal = name
        _trial.reset(token)
    if not agreements:
        return f"the target's layers do not attend by {name} as the host's layers do"
    return None if all(agreements) else f"the target's attention {name} is not softmax attention over scaled products"
