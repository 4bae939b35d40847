"""Attention of a TTT step: causal over the target's features, and each slot's own earlier steps, in one softmax.

`attend_eagerly` defines it. `attend` does the causal block by a kernel that also gives the log-sum-exp of its scores,
and merges the rest into it: the diagonals cost next to nothing, and no [R, M] matrix of scores is kept. Its backward
hands the kernel the *merged* output and log-sum-exp, from which the kernel's own gradients come out exact; merging by
autograd around a kernel whose log-sum-exp carries no gradient would lose the term through the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Spans

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
        spans: Which keys a query sees: those of its span, up to itself.
        scale: Of the scores.
        window: Sees keys at positions above its own by less than so many: query i of step t the block's keys
            j > i + t - window, of its own steps those less than `window` ago. None sees all.

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
) -> Tensor:
    """As `attend_eagerly`, by the fastest kernel that takes these tensors."""
    if window is not None:
        own = own[max(0, (step := len(own)) - window) :]
        window = window - step
    branches = [x for pair in own for x in pair]
    return _Merged.apply(pick_block(query), spans, scale, window, query, *block, *branches)


class _Merged(torch.autograd.Function):
    """out = w0 out0 + sum of ws Vs, with weights from the block's log-sum-exp and the diagonal scores."""

    @staticmethod
    def forward(ctx, kernel: "Block", spans, scale, window, query, key, value, *branches):  # type: ignore[no-untyped-def]
        out, lse = kernel.forward(query, key, value, spans, scale, window)  # [R, Hq, D], [Hq, R]
        lse = lse.T  # [R, Hq]
        ctx.plain = not branches
        keys, values = branches[0::2], branches[1::2]
        if branches:
            scores = torch.stack([_dot(query, k) for k in keys], dim=-1) * scale  # [R, Hq, t]
            merged = torch.logsumexp(torch.cat([lse[..., None], scores], dim=-1), dim=-1)  # [R, Hq]
            weights = (scores - merged[..., None]).exp()
            total = out * (lse - merged).exp()[..., None]
            for s, v in enumerate(values):
                total = total + weights[..., s, None] * _widen(v, query)
            out, lse = total.to(query.dtype), merged
            ctx.save_for_backward(query, key, value, out, lse, weights, *branches)
        else:
            ctx.save_for_backward(query, key, value, out, lse)
        ctx.kernel, ctx.spans, ctx.scale, ctx.window = kernel, spans, scale, window
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, out, lse, *rest = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = ctx.kernel.backward(
            grad, query, key, value, out, lse.T.contiguous(), ctx.spans, ctx.scale, ctx.window
        )
        if ctx.plain:
            return None, None, None, None, dq, dk, dv
        weights, *branches = rest
        delta = (grad * out).sum(-1, dtype=weights.dtype)  # [R, Hq]
        groups, grads = query.shape[1] // key.shape[1], []
        for s, (k, v) in enumerate(zip(branches[0::2], branches[1::2], strict=True)):
            w = weights[..., s]
            dscore = (w * (_dot(grad, v) - delta) * ctx.scale)[..., None]  # [R, Hq, 1]
            dq = dq + dscore * _widen(k, query)
            grads.append(_narrow(dscore * query, groups).to(k.dtype))
            grads.append(_narrow(w[..., None] * grad, groups).to(v.dtype))
        return None, None, None, None, dq.to(query.dtype), dk, dv, *grads


def _widen(x: Tensor, query: Tensor) -> Tensor:
    """[R, Hkv, D] as [R, Hq, D]."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _narrow(x: Tensor, groups: int) -> Tensor:
    """[R, Hq, D] summed over the query heads of each KV head: [R, Hkv, D]."""
    return x.unflatten(1, (-1, groups)).sum(2)


def _dot(query: Tensor, x: Tensor) -> Tensor:
    """[R, Hq], float32 or wider."""
    return (query * _widen(x, query)).sum(-1, dtype=torch.promote_types(query.dtype, torch.float32))


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
    nothing = torch.empty(0, dtype=torch.uint64, device=query.device)  # the state of a dropout that there is not
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, spans.query_ends, spans.key_ends, *spans.longest, 0.0, True, nothing, nothing,
        scale=scale, window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )  # fmt: skip


MATH = Block(_math_forward, _math_backward)  # any device and dtype; scores of one span at a time
FLASH = Block(_flash_forward, _flash_backward)  # PyTorch's own flash attention, no package needed


def pick_block(query: Tensor) -> Block:
    """FLASH for half precision on CUDA, MATH for the rest."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return FLASH if query.is_cuda and is_half and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0 else MATH
