"""Training-time test: the drafter unrolled on its own features, against what the target says.

`hf_eagle3/unroll.py` is the eager twin of the unrolling here: the stock network over padded rows. This one runs the same
weights over a flat batch, and does no work that no loss depends on:

* slots that never train get keys and values of the first step, and nothing else;
* the embedding half of the first layer's query, key and value is computed once, since the token at slot i and step t is
  the token at slot i+t and step 0;
* the causal block is one kernel a step, each slot's own earlier steps are merged into it (`attention.py`);
* heads and loss go chunk by chunk over slots, gradients included, so that neither the target's nor the drafter's logits
  of a whole step ever exist.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..modeling import Eagle3DrafterModel
from ..modeling.attention_eagle3 import Eagle3Attention
from ..unroll import unroll
from .attention import attend
from .batch import Batch
from .elementwise import fuse_on_gpu, norm, rotate, swiglu, working_dtype
from .losses import Lesson, Loss
from .states import States
from .target_head import DraftVocabulary, TargetHead

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


@dataclass(frozen=True)
class Lessons:
    """How a batch is taught.

    Args:
        loss: A row of `LOSSES`.
        scale: [k] float32, what the loss sum of each step is multiplied by.
        mean_alpha: [k] float32, of the last update.
    """

    loss: Loss
    scale: Tensor
    mean_alpha: Tensor


def ttt(
    drafter: Eagle3DrafterModel,
    batch: Batch,
    states: States,
    head: TargetHead,
    vocabulary: DraftVocabulary,
    lessons: Lessons,
) -> tuple[Tensor, StepSums]:
    """Unroll `drafter` over `batch` for as many steps as `lessons.scale` has, and teach it.

    Returns:
        The loss [], the sum over steps of scale times loss, and what happened.
    """
    steps = len(lessons.scale)
    if len(batch["rows"]):
        normed = unroll_rows(drafter, batch, states.aux_hidden_states, steps)  # [k, R, H]
    else:
        normed = states.aux_hidden_states.new_zeros(steps, 0, drafter.config.hidden_size)
    rows, depth, trained = batch["rows"], batch["depth"], batch["trained"]
    if trained is not None:
        normed, rows, depth = normed[:, trained], rows[trained], depth[trained]
    last = states.last_hidden_states[rows + 1]  # [L, Ht]
    ahead = torch.arange(2, steps + 2, device=rows.device)[:, None]
    token = batch["input_ids"][(rows + ahead).clamp_max(len(batch["input_ids"]) - 1)]  # [k, L]
    room = Classroom(head, vocabulary, lessons, last, depth, vocabulary.to_draft[token])
    loss, *sums = _Teach.apply(room, torch.is_grad_enabled(), normed, head_weight(drafter))
    if not len(rows):  # every weight takes part in every step, or other processes would wait for its gradient
        loss = loss + sum(p.flatten()[:1].sum() * 0 for p in drafter.parameters() if p.requires_grad)
    return loss, StepSums(*sums)


def head_weight(drafter: Eagle3DrafterModel) -> Tensor:
    """[V_d, H] the drafter's head, or the target's rows that it borrows. Of an adapted head, the merged weight."""
    if drafter.config.share_lm_head:
        return drafter._weight("lm_head")[: drafter.config.draft_vocab_size]
    return merged_weight(drafter.lm_head)


def merged_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, with its active low-rank adapters added."""
    weight: Tensor = getattr(module, "weight")  # noqa: B009  of a layer, or of what adapts one
    for name in getattr(module, "active_adapters", ()):
        if name in module.lora_A:  # type: ignore[operator]
            weight = weight + module.get_delta_weight(name)  # type: ignore[operator]
    return weight


# ---- the steps ----


def unroll_rows(drafter: Eagle3DrafterModel, batch: Batch, aux_hidden_states: Tensor, steps: int) -> Tensor:
    """Normed outputs [k, R, H] of the slots `batch["rows"]` at each of k steps."""
    layers: Any = drafter.layers
    if not all(isinstance(layer.self_attn, Eagle3Attention) for layer in layers):
        return _unroll_padded(drafter, batch, aux_hidden_states, steps)
    rows, spans, ids, at = batch["rows"], batch["spans"], batch["input_ids"], batch["position_ids"]
    N, device = len(ids), ids.device
    first = layers[0]
    features = fuse_states(drafter, aux_hidden_states)  # [N, H]
    embeddings = norm(first.input_layernorm, drafter.embed(ids[None])[0].to(features.dtype))  # [N, H]
    halves = EmbeddingHalves(first.self_attn, embeddings)
    hidden = features
    blocks: list[tuple[Tensor, Tensor]] = []  # by layer: keys and values of step 0, [M, Hkv, D]
    own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]  # by layer and later step, [R, Hkv, D]
    outputs = []
    for t in range(steps):
        here = torch.arange(N, device=device) if t == 0 else rows
        token = (here + 1 + t).clamp_max(N - 1)  # past the end of a row nothing is live
        queries = rows if t == 0 else slice(None)  # of what this step runs over, which are asked
        positions = at[here] + t
        rope = rotary(drafter, positions, hidden)
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            if i == 0:
                normed = norm(layer.hidden_norm, hidden)
                residual = (normed if layer.norm_before_residual else hidden)[queries]
                q, k, v = halves.project(normed, token, queries)
            else:
                normed, residual = norm(layer.input_layernorm, hidden), hidden[queries]
                q, k, v = project(attention, normed, queries)
            q, k, v = to_heads(attention, q, k, v, rope, queries)
            if t == 0:
                keys = spans.keys
                blocks.append((k, v) if keys is None else (k[keys], v[keys]))
            else:
                own[i].append((k, v))
            out = attend(q, blocks[i], own[i], spans, attention.scaling, attention.sliding_window)
            hidden = after_attention(layer, residual, out.flatten(1))
            queries = slice(None)
        normed = norm(drafter.norm, hidden)
        outputs.append(normed)
        hidden = normed if drafter.config.norm_output else hidden
    return torch.stack(outputs)


def fuse_states(drafter: Eagle3DrafterModel, aux_hidden_states: Tensor) -> Tensor:
    """`drafter.fuse` of [N, A*Ht], with norms that keep half precision where the states have it."""
    config = drafter.config
    if not config.use_aux_hidden_state:
        return drafter.fuse(aux_hidden_states)
    if config.norm_before_fc:
        aux_hidden_states = norm(drafter.input_norm, aux_hidden_states)
    if config.fc_norm:
        chunks = aux_hidden_states.split(config.target_hidden_size, dim=-1)
        aux_hidden_states = torch.cat([norm(n, c) for n, c in zip(drafter.fc_norm, chunks, strict=True)], dim=-1)
    dtype = working_dtype(aux_hidden_states.device, drafter.fc.weight.dtype)
    return drafter.fc(aux_hidden_states.to(dtype))


class EmbeddingHalves:
    """What token embeddings bring to the first layer's query, key and value, for all tokens and steps at once.

    W [e ; c] = W_e e + W_c c, and only c changes from step to step. An adapted or quantised projection is applied whole.
    """

    def __init__(self, attention: Eagle3Attention, embeddings: Tensor):
        self._projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._embeddings = embeddings  # [N, H]
        self._split = all(type(p) is nn.Linear for p in self._projections)
        if self._split:
            H = embeddings.shape[-1]
            self._halves = [F.linear(embeddings, p.weight[:, :H], p.bias) for p in self._projections]

    def project(self, normed: Tensor, token: Tensor, queries: Any) -> list[Tensor]:
        """Query of `queries`, key and value of all, from `normed` [n, H] and the tokens at `token` [n]."""
        asked = token[queries], normed[queries]
        inputs = (asked, (token, normed), (token, normed))
        if not self._split:
            return [
                projection(torch.cat([self._embeddings[at], c], dim=-1))
                for projection, (at, c) in zip(self._projections, inputs, strict=True)
            ]
        H = normed.shape[-1]
        return [
            half[at] + F.linear(c, projection.weight[:, H:])
            for projection, half, (at, c) in zip(self._projections, self._halves, inputs, strict=True)
        ]


def project(attention: Eagle3Attention, normed: Tensor, queries: Any) -> list[Tensor]:
    """Query of `queries`, key and value of all."""
    return [attention.q_proj(normed[queries]), attention.k_proj(normed), attention.v_proj(normed)]


def to_heads(
    attention: Eagle3Attention, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], queries: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads [n, heads, D], normed where the drafter does, rotated."""
    D = attention.head_dim
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    if attention.config.qk_norm:
        q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
    cos, sin = rope
    turn = fuse_on_gpu(rotate, q)
    return turn(q, cos[queries], sin[queries]), turn(k, cos, sin), v


def rotary(drafter: Eagle3DrafterModel, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin [n, D] at `positions` [n]."""
    cos, sin = drafter.rotary_emb(like, positions[None])
    return cos[0].to(like.dtype), sin[0].to(like.dtype)


def after_attention(layer: Any, residual: Tensor, out: Tensor) -> Tensor:
    """The rest of a decoder layer; recomputed in the backward pass under activation checkpointing."""
    if layer.gradient_checkpointing and layer.training:
        return checkpoint(_after_attention, layer, residual, out, use_reentrant=False)
    return _after_attention(layer, residual, out)


def _after_attention(layer: Any, residual: Tensor, out: Tensor) -> Tensor:
    hidden, mlp = residual + layer.self_attn.o_proj(out), layer.mlp
    normed = norm(layer.post_attention_layernorm, hidden)
    if layer.self_attn.config.hidden_act != "silu":
        return hidden + mlp(normed)
    return hidden + mlp.down_proj(fuse_on_gpu(swiglu, normed)(mlp.gate_proj(normed), mlp.up_proj(normed)))


def _unroll_padded(drafter: Eagle3DrafterModel, batch: Batch, aux_hidden_states: Tensor, steps: int) -> Tensor:
    """`unroll_rows` of a drafter whose attention is not Llama's, by the eager twin."""
    lengths = batch["lengths"]
    ids = nn.utils.rnn.pad_sequence(batch["input_ids"].split(lengths), batch_first=True)  # [D, T]
    aux = nn.utils.rnn.pad_sequence(aux_hidden_states.split(lengths), batch_first=True)
    starts = torch.tensor([i * ids.shape[1] for i in range(len(lengths))], device=ids.device)
    document = torch.repeat_interleave(
        torch.arange(len(lengths), device=ids.device), torch.tensor(lengths, device=ids.device)
    )
    flat = (starts[document] + batch["position_ids"])[batch["rows"]]  # [R]
    return torch.stack([normed.flatten(0, 1)[flat] for normed in unroll(drafter, ids, aux, steps)])


# ---- heads and loss ----


@dataclass(frozen=True)
class Classroom:
    """All that teaching needs beside what it has gradients for."""

    head: TargetHead
    vocabulary: DraftVocabulary
    lessons: Lessons
    last: Tensor  # [L, Ht], the target's last hidden states one after each slot
    depth: Tensor  # [L] int64, at how many steps each slot trains
    token: Tensor  # [k, L] int64, draft id of what the data has where each step proposes; -1 outside the vocabulary


class _Teach(torch.autograd.Function):
    """Gradients are computed along with the loss, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx, room: Classroom, grads: bool, normed: Tensor, weight: Tensor):  # type: ignore[no-untyped-def]
        dtype = working_dtype(normed.device, normed.dtype)
        with torch.autocast(normed.device.type, enabled=False):
            sums, *ctx.grads = teach_in_chunks(room, normed, weight, dtype, grads, grads and ctx.needs_input_grad[3])
        ctx.mark_non_differentiable(*sums)
        return (room.lessons.scale * sums[0]).sum(), *sums

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Any):  # type: ignore[no-untyped-def]
        (normed_grad, weight_grad), ctx.grads = ctx.grads, None
        return None, None, normed_grad.mul_(grad), None if weight_grad is None else weight_grad.mul_(grad)


def teach_in_chunks(
    room: Classroom, normed: Tensor, weight: Tensor, dtype: torch.dtype, grads: bool, weight_grads: bool
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """What `StepSums` has, and gradients of the scaled loss for `normed` [k, L, H] and `weight` [V_d, H].

    The target row of slot r at step t is that of slot r + t: slots that train lie in unbroken spans.
    """
    k, L, _ = normed.shape
    wide, device = torch.promote_types(normed.dtype, torch.float32), normed.device
    lessons, vocabulary = room.lessons, room.vocabulary
    size = max(1, CHUNK_ELEMENTS // (k * len(weight)))
    unit = lessons.scale.max()  # half precision takes gradients of order one
    step_scale = (lessons.scale / unit).to(wide)
    cast = weight.to(dtype)
    normed_grad = torch.zeros_like(normed) if grads else None
    weight_grad = torch.zeros(weight.shape, dtype=wide, device=device) if weight_grads else None
    totals: list[Tensor] = []
    hits = torch.zeros(k, L, dtype=torch.bool, device=device)
    steps = torch.arange(k, device=device)[:, None]
    for first in range(0, L, size):
        end = min(first + size, L)
        said = room.head.say(room.last[first : end + k - 1], vocabulary)
        missing = end - first + k - 1 - len(said.best)
        kept, lse, best = (
            F.pad(said.kept, (0, 0, 0, missing)),
            F.pad(said.lse, (0, missing)),
            F.pad(said.best, (0, missing)),
        )
        logits = F.linear(normed[:, first:end].to(dtype), cast)  # [k, C, V_d]
        live = steps < room.depth[first:end]
        *sums, hits[:, first:end], grad = fuse_on_gpu(teach_chunk, logits)(
            logits, kept, lse, vocabulary.to_draft[best], room.token[:, first:end], live, lessons, step_scale
        )
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        if normed_grad is not None:
            normed_grad[:, first:end] = (grad @ cast).to(wide) * unit
        if weight_grad is not None:
            _add_outer(weight_grad, grad.flatten(0, 1), normed[:, first:end].flatten(0, 1).to(dtype))
    if weight_grad is not None:
        weight_grad = weight_grad.mul_(unit).to(weight.dtype)
    if not totals:
        nothing = torch.zeros(k, dtype=wide, device=device)
        counts = torch.zeros(k, dtype=torch.int64, device=device)
        totals = [nothing, counts, nothing.clone(), counts.clone(), nothing.clone(), counts[0].clone()]
    return [*totals, hits], normed_grad, weight_grad


def teach_chunk(
    logits: Tensor,  # [k, C, V_d]
    kept: Tensor,  # [C+k-1, V_d]
    lse: Tensor,  # [C+k-1]
    best: Tensor,  # [C+k-1]
    token: Tensor,  # [k, C]
    live: Tensor,  # [k, C]
    lessons: Lessons,
    step_scale: Tensor,  # [k]
) -> tuple[Tensor, ...]:
    """Sums and hits as in `StepSums`, and the gradient of the scaled loss for `logits`."""
    C, wide, dtype = logits.shape[1], lse.dtype, logits.dtype
    logits, log_p = logits.to(wide), kept.to(wide) - lse[:, None]
    log_p, best = log_p.unfold(0, C, 1).transpose(1, 2), best.unfold(0, C, 1)  # [k, C, V_d], [k, C]
    loss, grad = lessons.loss.function(logits, Lesson(log_p, best, live, lessons.mean_alpha))
    grad = (grad * step_scale[:, None, None]).where(live[..., None], 0).to(dtype)

    guess, total = logits.argmax(-1), logits.logsumexp(-1)  # [k, C]
    alpha = torch.minimum((logits - total[..., None]).exp(), log_p.exp()).sum(-1)
    at = token.clamp_min(0)[..., None]
    log_q = logits.gather(-1, at)[..., 0] - total
    ratio = (log_q - log_p.gather(-1, at)[..., 0]).clamp_max(0).exp() * (token >= 0)
    whole = live[-1]  # [C]
    return (
        loss.where(live, 0).sum(-1),
        ((guess == best) & live).sum(-1),
        alpha.where(live, 0).sum(-1),
        live.sum(-1),
        ratio.cumprod(0).where(whole, 0).sum(-1),
        whole.sum(),
        (guess == token) & live,
        grad,
    )


def _add_outer(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Total += a.T @ b, summed in the dtype of `total`."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a.T, b, out_dtype=total.dtype, out=total)  # torch 2.8's
    else:
        total += a.T @ b
