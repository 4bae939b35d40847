"""The loss of all draft steps, from the drafter's normed outputs and the target's last hidden states.

Heads and loss go chunk by chunk over slots, gradients included, so that neither the target's nor the drafter's logits of
a whole step ever exist.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from packaging import version
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import head_loss, language
from ...modeling import DrafterModel
from .elementwise import fuse_on_gpu, working_dtype
from .losses import Loss, TargetStep
from .target_head import DraftVocabulary, TargetHead

# From torch 2.8 on, products of half precision can be summed into float32.
SUMS_WIDE = version.parse(torch.__version__) >= version.parse("2.8")
CHUNK_ELEMENTS = 2**27  # logits of one chunk: steps times slots times V_d


class StepSums(NamedTuple):
    """Sums over the live slots of a batch, by step; to be added over batches, then divided."""

    loss: Tensor  # [k] float32
    correct: Tensor  # [k] int64, the drafter's argmax is the target's; a token it cannot propose is a miss
    alpha: Tensor  # [k] float32, chance that speculative sampling accepts
    num_live: Tensor  # [k] int64, live slots
    path: Tensor  # [k] float32, over slots with all steps live: product of min(1, q/p) of the data's tokens so far
    num_whole: Tensor  # [] int64, slots with all steps live
    hits: Tensor  # [k, L] bool, the drafter's argmax is the token in the data; L the slots that train
    alphas: Tensor  # [k, L] float32, the chance that speculative sampling accepts; 0 where a slot is not live


@dataclass(frozen=True)
class Method:
    """How losses are computed and weighed.

    Args:
        loss: A row of `LOSSES`.
        scale: [k] float32, the factor on the loss sum of each step.
        mean_alpha: [k] float32, mean alpha by step in the last update.
        chunk_elements: Logits of one chunk: steps times slots times V_d.
    """

    loss: Loss
    scale: Tensor
    mean_alpha: Tensor
    chunk_elements: int = CHUNK_ELEMENTS


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a loss that have no gradient."""

    head: TargetHead
    vocabulary: DraftVocabulary
    method: Method
    last: Tensor  # [L, Ht], the target's last hidden states one after each slot; any with `at`
    depth: Tensor  # [L] int64, at how many steps each slot trains
    token: Tensor  # [k, L] int64, draft id of the data's token where each step proposes; -1 outside the vocabulary
    at: Tensor | None = None  # [k, L] int64, the row of `last` of each step and slot; None: r + t of slot r at step t


class HeadPart(NamedTuple):
    """A product that draft logits are a sum of: x @ weight.T."""

    x: Tensor  # [k, L, W], such as normed outputs
    weight: Tensor  # [V_d, W]


class LossChunk(NamedTuple):
    """The logits of C slots, the target's among them, at k steps.

    The target's row of slot c at step t is row c + t of C+k-1, or row t*C + c of k*C (`is_apart`).
    """

    logits: Tensor  # [k, C, V_d], the drafter's
    kept: Tensor  # [C+k-1 or k*C, V_d], the target's, as in `TargetLogits`
    lse: Tensor  # [C+k-1 or k*C]
    best: Tensor  # [C+k-1 or k*C] int64, draft id of the target's argmax; -1 outside the draft vocabulary
    token: Tensor  # [k, C] int64, as in `LossInputs`
    is_apart: bool = False

    def by_step(self, rows: Tensor) -> Tensor:
        """`rows` [C+k-1 or k*C, ...] of the target, as [k, C, ...]."""
        k, C, _ = self.logits.shape
        return rows.unflatten(0, (k, C)) if self.is_apart else rows.unfold(0, C, 1).movedim(-1, 1)


def head_weight(drafter: DrafterModel) -> Tensor:
    """[V_d, H] the drafter's head, merged with its adapters, or the rows that it borrows from the target."""
    if drafter.config.share_lm_head:
        return drafter._weight("lm_head")[: drafter.config.draft_vocab_size]
    return merged_weight(drafter.lm_head)


def merged_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, with its active low-rank adapters added."""
    weight: Tensor = getattr(module, "weight")  # noqa: B009  a linear layer, or its adapted form
    for name in getattr(module, "active_adapters", ()):
        if name in module.lora_A:  # type: ignore[operator]
            weight = weight + module.get_delta_weight(name)  # type: ignore[operator]
    return weight


class FusedHeadLoss(torch.autograd.Function):
    """The loss [] and the fields of `StepSums`. Gradients are computed along with it, and only scaled in the backward pass.

    The tensors after `grads` are those of one `HeadPart` after another.
    """

    @staticmethod
    def forward(ctx, inputs: LossInputs, grads: bool, *tensors: Tensor):  # type: ignore[no-untyped-def]
        parts = [HeadPart(x, weight) for x, weight in zip(tensors[::2], tensors[1::2], strict=True)]
        trains = [grads and needed for needed in ctx.needs_input_grad[3::2]]
        dtype = working_dtype(tensors[0].device, tensors[0].dtype)
        with torch.autocast(tensors[0].device.type, enabled=False):
            sums, ctx.grads = loss_in_chunks(inputs, parts, dtype, grads, trains)
        ctx.largest = largest_scale(inputs.method, dtype)
        ctx.mark_non_differentiable(*sums)
        return (inputs.method.scale * sums[0]).sum(), *sums

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Any):  # type: ignore[no-untyped-def]
        grads, ctx.grads = ctx.grads, None
        if ctx.largest is not None:
            grad = grad * ctx.largest
        scale_ = head_loss.scale_ if grad.is_cuda and language.is_available(grad.device) else Tensor.mul_
        return None, None, *(None if x is None else scale_(x, grad) for x in grads)


def largest_scale(method: Method, dtype: torch.dtype) -> Tensor | None:
    """The divisor of gradients in `dtype` until the backward pass: float16 holds those of order one."""
    return method.scale.max() if dtype == torch.float16 else None


def loss_in_chunks(
    inputs: LossInputs, parts: Sequence[HeadPart], dtype: torch.dtype, grads: bool, trains: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The fields of `StepSums`, and gradients for the tensors of each part.

    In float16 they are gradients of the loss with its largest scale at 1.

    Args:
        inputs: Everything else.
        parts: Logits are the sum of their products.
        dtype: Of the products.
        grads: Whether to compute gradients.
        trains: Whether the weight of each part has one.
    """
    first = parts[0].x
    k, L, _ = first.shape
    wide, device, method = torch.promote_types(first.dtype, torch.float32), first.device, inputs.method
    has_kernel = method.loss.has_kernel and first.is_cuda and dtype.itemsize == 2 and language.is_available(device)
    has_kernel &= inputs.at is None
    largest = largest_scale(method, dtype)
    step_scale = (method.scale if largest is None else method.scale / largest).to(wide)
    casts = [part.weight.to(dtype) for part in parts]
    x_grads = [torch.empty_like(part.x) if grads else None for part in parts]
    weight_grads: list[Tensor | None] = [None] * len(parts)
    totals: list[Tensor] = []
    hits = torch.zeros(k, L, dtype=torch.bool, device=device)
    alphas = torch.zeros(k, L, dtype=wide, device=device)
    steps = torch.arange(k, device=device)[:, None]
    for here, chunk in _chunks(inputs, [part.x for part in parts], casts):
        depth = inputs.depth[here]
        if has_kernel:
            *sums, hits[:, here], alphas[:, here], grad = chunk_loss_by_kernel(chunk, depth, step_scale)
        else:
            by_size = fuse_on_gpu(chunk_loss, chunk.logits, any_size=True)
            *sums, hits[:, here], alphas[:, here], grad = by_size(chunk, steps < depth, method, step_scale)
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        for i, (part, cast, x_grad) in enumerate(zip(parts, casts, x_grads, strict=True)):
            if x_grad is not None:
                x_grad[:, here] = grad @ cast
            if trains[i]:
                outer = (grad.flatten(0, 1), part.x[:, here].flatten(0, 1).to(dtype))
                weight_grads[i] = _add_outer(weight_grads[i], *outer, part.weight.dtype)
    for i, part in enumerate(parts):
        if trains[i] and weight_grads[i] is None:
            weight_grads[i] = torch.zeros_like(part.weight)
    found = [grad for pair in zip(x_grads, weight_grads, strict=True) for grad in pair]
    return [*(totals or _no_sums(k, wide, device)), hits, alphas], found


def _chunks(inputs: LossInputs, xs: Sequence[Tensor], weights: Sequence[Tensor]) -> Iterator[tuple[slice, LossChunk]]:
    """Consecutive slots and their logits, of at most `chunk_elements`.

    Without `at`, the target's row of slot r at step t is that of slot r + t: slots that train lie in unbroken spans.
    """
    k, L, _ = xs[0].shape
    size = max(1, inputs.method.chunk_elements // (k * len(weights[0])))
    to_draft, at = inputs.vocabulary.to_draft, inputs.at
    for first in range(0, L, size):
        end = min(first + size, L)
        rows = inputs.last[first : end + k - 1] if at is None else inputs.last[at[:, first:end].flatten()]
        target = inputs.head.logits(rows, inputs.vocabulary)
        missing = 0 if at is not None else end - first + k - 1 - len(target.best)
        kept, lse = F.pad(target.kept, (0, 0, 0, missing)), F.pad(target.lse, (0, missing))
        best = F.pad(target.best, (0, missing))
        logits = F.linear(xs[0][:, first:end].to(weights[0].dtype), weights[0])  # [k, C, V_d]
        for x, weight in zip(xs[1:], weights[1:], strict=True):
            logits = logits + F.linear(x[:, first:end].to(weight.dtype), weight)
        token = inputs.token[:, first:end]
        yield slice(first, end), LossChunk(logits, kept, lse, to_draft[best], token, at is not None)


def _no_sums(k: int, wide: torch.dtype, device: torch.device) -> list[Tensor]:
    """The sums of no slots."""
    zeros = [torch.zeros(k, dtype=kind, device=device) for kind in (wide, torch.int64, wide, torch.int64, wide)]
    return [*zeros, torch.zeros((), dtype=torch.int64, device=device)]


def chunk_loss(
    chunk: LossChunk,
    live: Tensor,  # [k, C]
    method: Method,
    step_scale: Tensor,  # [k]
) -> tuple[Tensor, ...]:
    """Sums, hits and alphas as in `StepSums`, and the gradient of the scaled loss for the logits."""
    token, lse, dtype = chunk.token, chunk.lse, chunk.logits.dtype
    wide = lse.dtype
    logits = chunk.logits.to(wide)
    log_p = chunk.by_step(chunk.kept.to(wide) - lse[:, None])  # [k, C, V_d]
    best = chunk.by_step(chunk.best)  # [k, C]
    loss, grad = method.loss.function(logits, TargetStep(log_p, best, live, method.mean_alpha))
    grad = (grad * step_scale[:, None, None]).where(live[..., None], 0).to(dtype)

    drafted, total = logits.argmax(-1), logits.logsumexp(-1)  # [k, C]
    alpha = torch.minimum((logits - total[..., None]).exp(), log_p.exp()).sum(-1)
    at = token.clamp_min(0)[..., None]
    log_q = logits.gather(-1, at)[..., 0] - total
    ratio = (log_q - log_p.gather(-1, at)[..., 0]).clamp_max(0).exp() * (token >= 0)
    whole = live[-1]  # [C]
    return (
        loss.where(live, 0).sum(-1),
        ((drafted == best) & live).sum(-1),
        alpha.where(live, 0).sum(-1),
        live.sum(-1),
        ratio.cumprod(0).where(whole, 0).sum(-1),
        whole.sum(),
        (drafted == token) & live,
        alpha.where(live, 0),
        grad,
    )


def chunk_loss_by_kernel(chunk: LossChunk, depth: Tensor, step_scale: Tensor) -> tuple[Tensor, ...]:
    """`chunk_loss` of `forward_kl`, for slots of `depth` [C]; the gradient overwrites the logits."""
    logits, kept, lse, best, token, _ = chunk
    k, C, _ = logits.shape
    loss, alpha, drafted, ratio = head_loss.head_loss(logits, kept, lse, best, token, depth, step_scale)
    live = depth > torch.arange(k, device=depth.device)[:, None]
    whole = live[-1]
    return (
        loss.sum(-1),
        (drafted == best.unfold(0, C, 1)).sum(-1),
        alpha.sum(-1),
        live.sum(-1),
        ratio.cumprod(0).where(whole, 0).sum(-1),
        whole.sum(),
        drafted == token,
        alpha,
        logits,
    )


def _add_outer(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a.T @ b, summed in `dtype`, added to `total` if there is one."""
    if a.is_cuda and a.dtype != dtype and SUMS_WIDE:
        if total is None:
            return torch.mm(a.T, b, out_dtype=dtype)
        return torch.addmm(total, a.T, b, out_dtype=dtype, out=total)
    outer = a.T @ b
    return outer.to(dtype) if total is None else total.add_(outer)
