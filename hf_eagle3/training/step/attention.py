"""Attention of a TTT step: causal over the target's features, and each slot's own earlier steps, in one softmax.

`attend_eagerly` defines it. `attend` does the causal block by a kernel that also gives the log-sum-exp of its scores,
and merges the rest into it: the diagonals cost next to nothing, and no [R, M] matrix of scores is kept. Its backward
hands the kernel the *merged* output and log-sum-exp, from which the kernel's own gradients come out exact; merging by
autograd around a kernel whose log-sum-exp carries no gradient would lose the term through the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .batch import Spans, SquareRule, Squares
from .elementwise import fuse_on_gpu

logger = logging.get_logger(__name__)

# A block's keys and values: [M, Hkv, D] each. Out: [R, Hq, D] and float32 (or wider) log-sum-exp [Hq, R].
BlockForward = Callable[..., tuple[Tensor, Tensor]]
BlockBackward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def attend_eagerly(
    query: Tensor,
    block: tuple[Tensor, Tensor],
    own: Sequence[tuple[Tensor, Tensor]],
    spans: Spans,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """One softmax over the causal block and the diagonals, every score in memory.

    Args:
        query: [R, Hq, D], of step t.
        block: Keys and values [M, Hkv, D] of step 0, by `spans`.
        own: Keys and values [R, Hkv, D] of steps 1 .. t, this step's included.
        spans: A query sees the keys of its span, up to itself.
        scale: The factor on the scores.
        window: A query sees only keys less than this many positions before its own: query i of step t sees the block's
            keys j > i + t - window, and its own steps less than `window` ago. None: all keys.

    Returns:
        [R, Hq, D].
    """
    step, groups = len(own), query.shape[1] // block[0].shape[1]
    if window is not None:
        own = own[max(0, step - window) :]
    outs = []
    for first, end, key_first, key_end in spans.bounds:
        q = query[first:end]  # [Q, Hq, D]
        k, v = (x[key_first:key_end].repeat_interleave(groups, dim=1) for x in block)  # [J, Hq, D]
        scores = torch.einsum("qhd,jhd->hqj", q, k) * scale
        scores = scores.masked_fill(~_sees(end - first, key_end - key_first, step, window, q.device), -torch.inf)
        branches = [
            (a[first:end].repeat_interleave(groups, 1), b[first:end].repeat_interleave(groups, 1)) for a, b in own
        ]
        diagonals = [torch.einsum("qhd,qhd->hq", q, a)[..., None] * scale for a, _ in branches]
        weights = torch.cat([scores, *diagonals], dim=-1).softmax(-1)  # [Hq, Q, J + t]
        J = key_end - key_first
        out = torch.einsum("hqj,jhd->qhd", weights[..., :J], v)
        for s, (_, b) in enumerate(branches):
            out = out + weights[..., J + s].T[..., None] * b
        outs.append(out)
    return torch.cat(outs) if outs else torch.zeros_like(query)


def _sees(num_queries: int, num_keys: int, step: int, window: int | None, device: torch.device) -> Tensor:
    """[Q, J] bool: the last query stands at the last key."""
    at = torch.arange(num_queries, device=device)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys, device=device)
    sees = key <= at
    return sees if window is None else sees & (key > at + step - window)


def attend(
    query: Tensor,
    block: tuple[Tensor, Tensor],
    own: Sequence[tuple[Tensor, Tensor]],
    spans: Spans,
    scale: float,
    window: int | None = None,
    kernel: "Block | None" = None,
) -> Tensor:
    """As `attend_eagerly`, by `kernel`; by default the fastest one that takes these tensors."""
    if window is not None:
        own = own[max(0, (step := len(own)) - window) :]
        window = window - step
    branches = [x for pair in own for x in pair]
    kernel = kernel or pick_block(query, block[0], spans, window)
    return _Merged.apply(kernel, spans, scale, window, query, *block, *branches)


class _Merged(torch.autograd.Function):
    """The block's output and log-sum-exp, with one branch after another merged into them."""

    @staticmethod
    def forward(ctx, kernel: "Block", spans, scale, window, query, key, value, *branches):  # type: ignore[no-untyped-def]
        out, lse = kernel.forward(query, key, value, spans, scale, window)  # [R, Hq, D], [Hq, R]
        wide = torch.promote_types(query.dtype, torch.float32)
        out, lse = out.to(wide) if branches else out, lse.T.contiguous()  # [R, Hq]
        merge = fuse_on_gpu(merge_branch, query)
        for k, v in zip(branches[0::2], branches[1::2], strict=True):
            out, lse = merge(query, k, v, out, lse, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *branches)
        ctx.kernel, ctx.spans, ctx.scale, ctx.window = kernel, spans, scale, window
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, out, lse, *branches = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = ctx.kernel.backward(
            grad, query, key, value, out, lse.T.contiguous(), ctx.spans, ctx.scale, ctx.window
        )
        grads: list[Tensor] = []
        if branches:
            dq = dq.to(lse.dtype)
            delta = (grad * out).sum(-1, dtype=lse.dtype)  # [R, Hq]
            differentiate = fuse_on_gpu(branch_gradients, query)
            for k, v in zip(branches[0::2], branches[1::2], strict=True):
                dq, *of_branch = differentiate(query, k, v, grad, lse, delta, dq, ctx.scale)
                grads += of_branch
        return None, None, None, None, dq.to(query.dtype), dk, dv, *grads


def merge_branch(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`out` [R, Hq, D] and `lse` [R, Hq] of a softmax, with one more key and value [R, Hkv, D] a query in it."""
    score = _dot(query, key, lse.dtype) * scale  # [R, Hkv, G]
    both = torch.logaddexp(lse.view_as(score), score)
    old, new = (lse.view_as(score) - both).exp()[..., None], (score - both).exp()[..., None]
    out = out.view(*both.shape, -1) * old + new * value[:, :, None].to(lse.dtype)
    return out.flatten(1, 2), both.flatten(1)


def branch_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq` with this branch's share added, and the gradients of its key and value."""
    wide = lse.dtype
    score = _dot(query, key, wide) * scale  # [R, Hkv, G]
    weight = (score - lse.view_as(score)).exp()[..., None]
    dscore = weight * (_dot(grad, value, wide) - delta.view_as(score))[..., None] * scale  # [R, Hkv, G, 1]
    query, grad = (x.unflatten(1, score.shape[1:]).to(wide) for x in (query, grad))
    dq = dq + (dscore * key[:, :, None].to(wide)).flatten(1, 2)
    return dq, (dscore * query).sum(2).to(key.dtype), (weight * grad).sum(2).to(value.dtype)


def _dot(query: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """[R, Hkv, G]: products of `query` [R, Hq, D] with `x` [R, Hkv, D], each KV head with its G query heads."""
    return (query.unflatten(1, (x.shape[1], -1)).to(wide) * x[:, :, None].to(wide)).sum(-1)


def _narrow(x: Tensor, groups: int) -> Tensor:
    """[J, Hq, D] summed over the query heads of each KV head: [J, Hkv, D]."""
    return x.unflatten(1, (-1, groups)).sum(2)


# ---- the causal block ----


@dataclass(frozen=True)
class Block:
    """A way to compute causal attention with log-sum-exp, and its gradients from given output and log-sum-exp."""

    forward: BlockForward
    backward: BlockBackward


def _math_forward(query, key, value, spans, scale, window):  # type: ignore[no-untyped-def]
    groups, outs, sums = query.shape[1] // key.shape[1], [], []
    for first, end, key_first, key_end in spans.bounds:
        scores = _math_scores(query[first:end], key[key_first:key_end], scale, window, groups)
        lse = scores.logsumexp(-1)  # [Hq, Q]; no key in sight: -inf
        probs = (scores - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()
        v = value[key_first:key_end].repeat_interleave(groups, dim=1)
        outs.append(torch.einsum("hqj,jhd->qhd", probs.to(v.dtype), v))
        sums.append(lse)
    return torch.cat(outs) if outs else torch.zeros_like(query), torch.cat(sums, -1) if sums else query.new_zeros(
        query.shape[1], 0
    )


def _math_scores(q: Tensor, k: Tensor, scale: float, window: int | None, groups: int) -> Tensor:
    """[Hq, Q, J], float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,jhd->hqj", q.to(wide), k.repeat_interleave(groups, dim=1).to(wide)) * scale
    return scores.masked_fill(~_sees(len(q), len(k), 0, window, q.device), -torch.inf)


def _math_backward(grad, query, key, value, out, lse, spans, scale, window):  # type: ignore[no-untyped-def]
    groups = query.shape[1] // key.shape[1]
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for first, end, key_first, key_end in spans.bounds:
        q, g = query[first:end], grad[first:end]
        k, v = (x[key_first:key_end] for x in (key, value))
        probs = (_math_scores(q, k, scale, window, groups) - lse[:, first:end, None]).exp()  # [Hq, Q, J]
        wide = probs.dtype
        delta = (g * out[first:end]).sum(-1, dtype=wide).T[..., None]  # [Hq, Q, 1]
        dprobs = torch.einsum("qhd,jhd->hqj", g.to(wide), v.repeat_interleave(groups, dim=1).to(wide))
        dscores = probs * (dprobs - delta) * scale
        dq[first:end] = torch.einsum("hqj,jhd->qhd", dscores, k.repeat_interleave(groups, dim=1).to(wide)).to(q.dtype)
        dk[key_first:key_end] = _narrow(torch.einsum("hqj,qhd->jhd", dscores, q.to(wide)), groups).to(k.dtype)
        dv[key_first:key_end] = _narrow(torch.einsum("hqj,qhd->jhd", probs, g.to(wide)), groups).to(v.dtype)
    return dq, dk, dv


def _flash_forward(query, key, value, spans, scale, window):  # type: ignore[no-untyped-def]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, spans.query_ends, spans.key_ends, *spans.longest, 0.0, True, False,
        scale=scale, window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )  # fmt: skip
    return out, lse


def _flash_backward(grad, query, key, value, out, lse, spans, scale, window):  # type: ignore[no-untyped-def]
    nothing = torch.empty(0, dtype=torch.uint64, device=query.device)  # the state of an unused dropout
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, spans.query_ends, spans.key_ends, *spans.longest, 0.0, True, nothing, nothing,
        scale=scale, window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )  # fmt: skip


def attend_in_squares(dense_forward: Callable[..., Any], dense_backward: Callable[..., Any]) -> Block:
    """A block over spans as squares, by causal attention of [S, heads, T, D] without a window."""

    def forward(query, key, value, spans, scale, window):  # type: ignore[no-untyped-def]
        assert window is None
        shape, at = spans.squares.shape, spans.squares.queries
        tensors = _to_squares(query, shape, at), *(_to_squares(x, shape, spans.squares.keys) for x in (key, value))
        out, lse = dense_forward(*tensors, scale)  # [S, Hq, T, D], [S, Hq, T, 1]
        return _from_squares(out, at), lse[..., 0].transpose(0, 1).flatten(1).index_select(1, at)

    def backward(grad, query, key, value, out, lse, spans, scale, window):  # type: ignore[no-untyped-def]
        assert window is None
        # At places without a query, query, gradient, output and log-sum-exp are zero, and so are the results.
        (S, T), at, keys = spans.squares.shape, spans.squares.queries, spans.squares.keys
        grad, query, out = (_to_squares(x, (S, T), at) for x in (grad, query, out))
        sums = lse.new_zeros(S * T, len(lse)).index_copy_(0, at, lse.T).view(S, T, -1).transpose(1, 2)
        key, value = (_to_squares(x, (S, T), keys) for x in (key, value))
        grads = dense_backward(grad, query, key, value, out, sums.contiguous()[..., None], scale)
        return tuple(_from_squares(x, places) for x, places in zip(grads, (at, keys, keys), strict=True))

    return Block(forward, backward)


def _to_squares(x: Tensor, shape: tuple[int, int], places: Tensor) -> Tensor:
    """[n, heads, D] at their places among zeros, as [S, heads, T, D]."""
    S, T = shape
    if len(x) < S * T:
        x = x.new_zeros(S * T, *x.shape[1:]).index_copy_(0, places, x)
    return x.view(S, T, *x.shape[1:]).transpose(1, 2)


def _from_squares(x: Tensor, places: Tensor) -> Tensor:
    """[n, heads, D], the values at `places` of [S, heads, T, D]."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if len(places) == len(flat) else flat.index_select(0, places)


def _dense_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of [S, heads, T, D] by cuDNN: its output, and the log-sum-exp [S, Hq, T, 1]."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, True, False, scale=scale
    )
    return out, lse.view(*query.shape[:3], 1)


def _dense_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    T, nothing = (
        query.shape[2],
        torch.empty(0, dtype=torch.int64, device=query.device),
    )  # the state of an unused dropout
    grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, lse, nothing, nothing, None, None, None, T, T, 0.0, True, scale=scale
    )
    return grads


MATH = Block(_math_forward, _math_backward)  # any device and dtype; scores of one span at a time
FLASH = Block(_flash_forward, _flash_backward)  # PyTorch's own flash attention, no package needed
SQUARES = attend_in_squares(_dense_forward, _dense_backward)  # cuDNN's: twice as fast, but it plans for each shape

MAX_ERROR = 0.02  # of the trial, relative: above the rounding of bfloat16, far below a wrong formula


def pick_block(query: Tensor, key: Tensor, spans: Spans, window: int | None) -> Block:
    """For half precision on CUDA: SQUARES where spans fill them and cuDNN supports the shape, else FLASH; otherwise MATH."""
    is_half, D = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    if not (query.is_cuda and is_half and D <= 256 and D % 8 == 0):
        return MATH
    fits = spans.squares is not None and window is None
    return SQUARES if fits and _can_square(query.device, query.dtype, query.shape[1], key.shape[1], D) else FLASH


@cache
def _can_square(device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether cuDNN's attention is there and right, by a trial; and whether it is the faster one: from Hopper on."""
    if torch.cuda.get_device_capability(device) < (9, 0) or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    n = 200
    ends = torch.tensor([0, n], dtype=torch.int32)
    at = torch.arange(n)
    spans = Spans(None, ends, ends, (n, n), ((0, n, 0, n),), Squares((1, SquareRule().step), at, at)).to(device)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(n, heads, head_dim, generator=generator).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    scale = head_dim**-0.5

    def run(block: Block, *tensors: Tensor) -> list[Tensor]:
        *inputs, grad = tensors
        out, lse = block.forward(*inputs, spans, scale, None)
        return [out, lse, *block.backward(grad, *inputs, out, lse, spans, scale, None)]

    exact = run(MATH, *(x.double() for x in (query, key, value, grad)))
    try:
        found = run(SQUARES, query, key, value, grad)
    except (RuntimeError, TypeError) as error:  # no cuDNN, no plan, or another signature
        logger.info(f"Attention goes by flash attention, not by cuDNN: {error}")
        return False
    difference = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    if not difference < MAX_ERROR:
        logger.info(f"Attention goes by flash attention, not by cuDNN, which differs by {difference:.3f}.")
    return difference < MAX_ERROR
