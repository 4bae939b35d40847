"""Several documents through a target in one forward, end to end, each attending to itself alone.

Registered with the host's `AttentionInterface` under a name that has no mask function, so no [N, N] mask is built. The ends
of the documents reach the attention function through a context, since the host's layers do not pass them on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from ...rows.attention import UnfitError
from ...rows.forwards import attends_itself
from ...rows.layers import name_layers

BY_DOCUMENTS = "eagle3_documents"


@dataclass(frozen=True)
class Documents:
    """Documents that lie one behind the other."""

    lengths: Sequence[int]
    ends: Tensor  # [D+1] int32 on the device, from 0


RUNNING: ContextVar[Documents | None] = ContextVar("RUNNING", default=None)


def attend_documents(
    module: nn.Module,
    query: Tensor,  # [1, Hq, N, D]
    key: Tensor,  # [1, Hkv, N, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,  # Any: other arguments that the host gives every attention function
) -> tuple[Tensor, None]:  # [1, N, Hq, D]
    """Causal attention within each document, and within the window."""
    documents, name, window = RUNNING.get(), type(module).__name__, kwargs.get("sliding_window")
    if documents is None or attention_mask is not None:
        raise UnfitError(f"{name} attends outside a packed forward, or brings a mask of its own")
    if s_aux is not None or hasattr(module, "sinks") or softcap is not None:
        raise UnfitError(f"{name} has sinks or a soft cap")
    if "sliding_window" not in kwargs and getattr(module.config, "sliding_window", None) is not None:
        raise UnfitError(f"{name} does not say its window")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not query.is_cuda:
        return _attend_one_by_one(query, key, value, documents.lengths, scale, window).transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    longest = max(documents.lengths)
    out, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, documents.ends, documents.ends, longest, longest, 0.0, True, False),
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return out[None], None


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float, window: int | None
) -> Tensor:
    """The eager twin: document by document, [1, Hq, N, D]."""
    groups = query.shape[1] // key.shape[1]
    outs = []
    for q, k, v in zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True):
        at = torch.arange(q.shape[2], device=q.device)
        sees = at <= at[:, None]
        if window is not None:
            sees &= at > at[:, None] - window
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale))
    return torch.cat(outs, dim=2)


AttentionInterface.register(BY_DOCUMENTS, attend_documents)


def attends_by_interface(target: PreTrainedModel) -> bool:
    """Whether all layers of `target` attend fully or within windows, by whatever the host's interface gives them.

    A trial over a few hundred tokens would not find out that a layer attends in longer chunks.
    """
    names = {name for name, _ in name_layers(target.config.get_text_config(decoder=True))}
    return names <= {"full_attention", "sliding_attention"} and not attends_itself(target)


@contextmanager
def attending_by_documents(model: PreTrainedModel, lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """Let `model`'s text layers take one row as documents of `lengths`."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation_internal
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    token = RUNNING.set(Documents(lengths, ends.to(device, non_blocking=True)))
    config._attn_implementation_internal = BY_DOCUMENTS
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        RUNNING.reset(token)
