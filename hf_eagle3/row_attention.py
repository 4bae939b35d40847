"""Attention by row lengths instead of masks, for stock layers of the host.

Registered with the host's `AttentionInterface` under a name that has no mask function, so that models which attend by it
build no mask. Where a row's tokens sit, the cache that the layer writes to says.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from .kernels.attention import attend_rows, attend_rows_eager
from .kernels.language import is_available
from .rows import BY_ROWS, WRITING


class UnfitError(RuntimeError):
    """A layer attends in a way that an attention of ours does not know."""


def row_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, L, D], a view of a row cache
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,  # Any: what else the host hands to every attention function
) -> tuple[Tensor, None]:  # [B, T, H, D]
    """Attend as the host's functions do: each new token sees what its row holds up to itself, within the window."""
    cache, name = WRITING.get(), type(module).__name__
    if cache is None or cache.start is None:
        raise UnfitError(f"{name} attends by rows outside our decode loop")
    if attention_mask is not None:
        raise UnfitError(f"{name} brings a mask of its own")
    if "sliding_window" not in kwargs and getattr(module.config, "sliding_window", None) is not None:
        raise UnfitError(f"{name} does not say its window")
    if s_aux is None and hasattr(module, "sinks"):
        raise UnfitError(f"{name} does not hand over its sinks")
    attend = attend_rows if is_available(query.device) else attend_rows_eager
    out = attend(
        query,
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache.start.to(query.device),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        sinks=s_aux,
        softcap=softcap,
    )
    return out, None


AttentionInterface.register(BY_ROWS, row_attention)


@contextmanager
def attending_by_rows(model: PreTrainedModel) -> Iterator[None]:
    """Let `model`'s text layers attend by rows."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation_internal
    config._attn_implementation_internal = BY_ROWS
    try:
        yield
    finally:
        config._attn_implementation_internal = before
