"""Attentions of ours for stock layers of the host: by row lengths instead of masks, and over fewer copies.

Both are registered with the host's `AttentionInterface`. The first has no mask function, so that models which attend by
it build no mask. Where a row's tokens sit, the cache that the layer writes to says.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .kernels.attention import attend_rows, attend_rows_eager
from .kernels.language import is_available
from .rows import BY_ROWS, WRITING

FOLDED = "eagle3_folded"  # the attention of rounds on a CPU; takes masks as sdpa does


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
        if before != BY_ROWS:  # whoever entered first leaves last
            config._attn_implementation_internal = before


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


class FoldedAttention:
    """Lets text layers of `models` that attend by sdpa use `folded_attention`, to be entered around forwards on a CPU.

    Leaving sets the name that it can only have been, whoever else has entered: no thread leaves ours behind.
    """

    def __init__(self, *models: PreTrainedModel):
        configs = [model.config.get_text_config(decoder=True) for model in models if model.device.type == "cpu"]
        self._configs = [config for config in configs if config._attn_implementation in ("sdpa", FOLDED)]

    def __enter__(self) -> None:
        for config in self._configs:
            config._attn_implementation_internal = FOLDED

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for config in self._configs:
            config._attn_implementation_internal = "sdpa"
