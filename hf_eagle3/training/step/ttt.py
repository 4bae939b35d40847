"""Training-time test: the drafter unrolled on its own features, against what the target says.

`hf_eagle3/drafters/unroll.py` is the eager twin of the unrolling here: the stock network over padded rows. This one runs the same
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
from packaging import version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...drafters.unroll import unroll
from ...kernels import language, teaching
from ...modeling import Eagle3DrafterModel
from ...modeling.attention_eagle3 import Eagle3Attention
from ..states.online import States
from .attention import attend
from .batch import Batch
from .elementwise import bare_norm, fuse_on_gpu, norm, rotate, swiglu, working_dtype
from .losses import Lesson, Loss
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


@dataclass(frozen=True)
class Method:
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
    method: Method,
) -> tuple[Tensor, StepSums]:
    """Unroll `drafter` over `batch` for as many steps as `method.scale` has, and teach it.

    Returns:
        The loss [], the sum over steps of scale times loss, and what happened.
    """
    steps = len(method.scale)
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
    room = Classroom(head, vocabulary, method, last, depth, vocabulary.to_draft[token])
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
    rows, spans, at = batch["rows"], batch["spans"], batch["position_ids"]
    first = layers[0]
    features = fuse_states(drafter, aux_hidden_states)  # [N, H]
    tokens = batch["input_ids"].roll(-1)  # [N], one after each slot; the last is never live
    inputs = FirstInputs(first, drafter.embed(tokens[None])[0].to(features.dtype), rows)
    hidden = features
    blocks: list[tuple[Tensor, Tensor]] = []  # by layer: keys and values of step 0, [M, Hkv, D]
    own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]  # by layer and later step, [R, Hkv, D]
    outputs = []
    for t in range(steps):
        rope = rotary(drafter, at if t == 0 else at[rows] + t, hidden)
        asked = rope if t else (rope[0][rows], rope[1][rows])
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            # In the first layer of step 0, all slots have keys, and the rows ask; from there on there are rows alone.
            narrows = t == 0 and i == 0
            normed = norm(layer.hidden_norm if i == 0 else layer.input_layernorm, hidden)
            residual = normed if i == 0 and layer.norm_before_residual else hidden
            if narrows:
                residual = take(residual, rows)
            q, k, v = inputs.project(normed, t) if i == 0 else project(attention, normed)
            q, k = (
                to_heads(attention.q_norm if attention.config.qk_norm else None, q, attention.head_dim, asked),
                to_heads(attention.k_norm if attention.config.qk_norm else None, k, attention.head_dim, rope),
            )
            v = v.unflatten(-1, (-1, attention.head_dim))
            if t == 0:
                keys = spans.keys
                blocks.append((k, v) if keys is None else (k.index_select(0, keys), v.index_select(0, keys)))
            else:
                own[i].append((k, v))
            out = attend(q, blocks[i], own[i], spans, attention.scaling, attention.sliding_window)
            hidden = after_attention(layer, residual, out.flatten(1))
        normed = norm(drafter.norm, hidden)
        outputs.append(normed)
        hidden = normed if drafter.config.norm_output else hidden
    return torch.stack(outputs)


def fuse_states(drafter: Eagle3DrafterModel, aux_hidden_states: Tensor) -> Tensor:
    """`drafter.fuse` of [N, A*Ht], without a gradient for states that nothing is learnt from.

    W (w * x) = (W * w) x: with the norms' weights in the matrix, what is left of the norms has none.
    """
    config = drafter.config
    if not config.use_aux_hidden_state or type(drafter.fc) is not nn.Linear:
        return drafter.fuse(aux_hidden_states)
    dtype = working_dtype(aux_hidden_states.device, drafter.fc.weight.dtype)
    norms: list[Any] = []  # and so their weights
    if config.norm_before_fc:
        aux_hidden_states = bare_norm(drafter.input_norm, aux_hidden_states)
        norms.append(drafter.input_norm.weight)
    if config.fc_norm:
        chunks = aux_hidden_states.unflatten(-1, (-1, config.target_hidden_size))
        aux_hidden_states = bare_norm(drafter.fc_norm[0], chunks).flatten(-2)
        each: list[Any] = list(drafter.fc_norm)
        norms.append(torch.cat([n.weight for n in each]))
    weight = fuse_on_gpu(fold_norms, aux_hidden_states)(drafter.fc.weight, norms, dtype)
    bias = drafter.fc.bias
    return F.linear(aux_hidden_states.to(dtype), weight, None if bias is None else bias.to(dtype))


def fold_norms(weight: Tensor, norms: list[Tensor], dtype: torch.dtype) -> Tensor:
    """`weight` [H, n] times the weights [n] of norms before it."""
    for norm_weight in norms:
        weight = weight * norm_weight
    return weight.to(dtype)


def split_halves(weights: list[Tensor], norm_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of several weights [n_i, 2H], one behind the other, the half for embeddings, with their norm's weight in it, and the
    half for states: [n, H] each.
    """
    weight, H = torch.cat(weights), len(norm_weight)
    return (weight[:, :H] * norm_weight).to(dtype), weight[:, H:].to(dtype)


class FirstInputs:
    """Query, key and value of the first layer, with what token embeddings bring to them computed once for all steps.

    W [e ; c] = W_e e + W_c c, and only c changes from step to step: the token of row r at step t is that of row r + t at
    step 0, as rows lie in unbroken spans wherever they are live. An adapted or quantised projection is applied whole.

    Args:
        layer: The first.
        embeddings: [N, H] of the token after each slot.
        rows: [R], the slots that run.
    """

    def __init__(self, layer: Any, embeddings: Tensor, rows: Tensor):
        attention: Eagle3Attention = layer.self_attn
        self._projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._rows = rows
        self._split = all(type(p) is nn.Linear for p in self._projections)
        if not self._split:
            self._every = norm(layer.input_layernorm, embeddings)
            self._ours = take(self._every, rows)  # [R, H]
            return
        dtype = working_dtype(embeddings.device, attention.q_proj.weight.dtype)
        self._sizes = [p.out_features for p in self._projections]
        # As in `fuse_states`: embeddings are frozen, so nothing wants their gradient.
        bare = bare_norm(layer.input_layernorm, embeddings).to(dtype)
        weights = [p.weight for p in self._projections]
        of_embedding, self._of_state = fuse_on_gpu(split_halves, bare)(weights, layer.input_layernorm.weight, dtype)
        biases: list[Tensor] = [p.bias for p in self._projections if p.bias is not None]
        bias = torch.cat(biases).to(dtype) if biases else None
        Q = self._sizes[0]
        self._every = F.linear(bare, of_embedding[Q:], None if bias is None else bias[Q:])  # [N, 2K]
        query = F.linear(take(bare, rows), of_embedding[:Q], None if bias is None else bias[:Q])
        self._ours = torch.cat([query, take(self._every, rows)], dim=-1)  # [R, Q+2K]

    def project(self, normed: Tensor, step: int) -> list[Tensor]:
        """Query [R, Q], key and value, of all slots at step 0 and of the rows later, from normed states like these."""
        ours = F.pad(self._ours[step:], (0, 0, 0, min(step, len(self._ours))))
        if not self._split:
            asked = torch.cat([ours, take(normed, self._rows) if step == 0 else normed], dim=-1)
            answering = torch.cat([self._every, normed], dim=-1) if step == 0 else asked
            q, k, v = self._projections
            return [q(asked), k(answering), v(answering)]
        if step:
            return list((ours + F.linear(normed, self._of_state)).split(self._sizes, dim=-1))
        Q = self._sizes[0]
        query = ours[:, :Q] + F.linear(take(normed, self._rows), self._of_state[:Q])
        return [query, *(self._every + F.linear(normed, self._of_state[Q:])).split(self._sizes[1:], dim=-1)]


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], for rows that are all different; as they are if they are all."""
    return x if len(rows) == len(x) else _Take.apply(x, rows)


class _Take(torch.autograd.Function):
    """Rows that are all different: their gradients are copied, not added up."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.rows, ctx.num_rows = rows, len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, ctx.rows, grad), None


def project(attention: Eagle3Attention, normed: Tensor) -> list[Tensor]:
    """Query, key and value of a later layer."""
    return [attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)]


def to_heads(head_norm: nn.Module | None, x: Tensor, head_dim: int, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Heads [n, heads, D], normed where the drafter does, rotated."""
    x = x.unflatten(-1, (-1, head_dim))
    if head_norm is not None:
        x = norm(head_norm, x)
    return fuse_on_gpu(rotate, x)(x, *rope)


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
    method: Method
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
        ctx.largest = largest_scale(room.method, dtype)
        ctx.mark_non_differentiable(*sums)
        return (room.method.scale * sums[0]).sum(), *sums

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Any):  # type: ignore[no-untyped-def]
        (normed_grad, weight_grad), ctx.grads = ctx.grads, None
        if ctx.largest is not None:
            grad = grad * ctx.largest
        scale_ = teaching.scale_ if grad.is_cuda and language.is_available(grad.device) else Tensor.mul_
        return None, None, scale_(normed_grad, grad), None if weight_grad is None else scale_(weight_grad, grad)


def largest_scale(method: Method, dtype: torch.dtype) -> Tensor | None:
    """What gradients of `dtype` are divided by until the backward pass: float16 takes those of order one."""
    return method.scale.max() if dtype == torch.float16 else None


def teach_in_chunks(
    room: Classroom, normed: Tensor, weight: Tensor, dtype: torch.dtype, grads: bool, weight_grads: bool
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """What `StepSums` has, and gradients for `normed` [k, L, H] and `weight` [V_d, H].

    In float16 they are of the loss with its largest scale at 1.

    The target row of slot r at step t is that of slot r + t: slots that train lie in unbroken spans.
    """
    k, L, _ = normed.shape
    wide, device = torch.promote_types(normed.dtype, torch.float32), normed.device
    method, vocabulary = room.method, room.vocabulary
    by_kernel = (
        method.loss.has_kernel and normed.is_cuda and dtype.itemsize == 2 and language.is_available(normed.device)
    )
    size = max(1, CHUNK_ELEMENTS // (k * len(weight)))
    largest = largest_scale(method, dtype)
    step_scale = (method.scale if largest is None else method.scale / largest).to(wide)
    cast = weight.to(dtype)
    normed_grad = torch.empty_like(normed) if grads else None
    weight_grad = None
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
        chunk = (logits, kept, lse, vocabulary.to_draft[best], room.token[:, first:end])
        if by_kernel:
            *sums, hits[:, first:end], grad = _teach_by_kernel(*chunk, room.depth[first:end], step_scale)
        else:
            live = steps < room.depth[first:end]
            *sums, hits[:, first:end], grad = fuse_on_gpu(teach_chunk, logits, any_size=True)(
                *chunk, live, method, step_scale
            )
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        if normed_grad is not None:
            normed_grad[:, first:end] = grad @ cast
        if weight_grads:
            outer = (grad.flatten(0, 1), normed[:, first:end].flatten(0, 1).to(dtype))
            weight_grad = _add_outer(weight_grad, *outer, weight.dtype)
    if weight_grads and weight_grad is None:
        weight_grad = torch.zeros_like(weight)
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
    method: Method,
    step_scale: Tensor,  # [k]
) -> tuple[Tensor, ...]:
    """Sums and hits as in `StepSums`, and the gradient of the scaled loss for `logits`."""
    C, wide, dtype = logits.shape[1], lse.dtype, logits.dtype
    logits, log_p = logits.to(wide), kept.to(wide) - lse[:, None]
    log_p, best = log_p.unfold(0, C, 1).transpose(1, 2), best.unfold(0, C, 1)  # [k, C, V_d], [k, C]
    loss, grad = method.loss.function(logits, Lesson(log_p, best, live, method.mean_alpha))
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


def _teach_by_kernel(
    logits: Tensor, kept: Tensor, lse: Tensor, best: Tensor, token: Tensor, depth: Tensor, step_scale: Tensor
) -> tuple[Tensor, ...]:
    """`teach_chunk` of `forward_kl`; the gradient takes the place of `logits`."""
    k, C, _ = logits.shape
    loss, alpha, guess, ratio = teaching.teach(logits, kept, lse, best, token, depth, step_scale)
    live = depth > torch.arange(k, device=depth.device)[:, None]
    whole = live[-1]
    return (
        loss.sum(-1),
        (guess == best.unfold(0, C, 1)).sum(-1),
        alpha.sum(-1),
        live.sum(-1),
        ratio.cumprod(0).where(whole, 0).sum(-1),
        whole.sum(),
        guess == token,
        logits,
    )


def _add_outer(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Total, if there is one, + a.T @ b, summed in `dtype`."""
    if a.is_cuda and a.dtype != dtype and SUMS_WIDE:
        if total is None:
            return torch.mm(a.T, b, out_dtype=dtype)
        return torch.addmm(total, a.T, b, out_dtype=dtype, out=total)
    outer = a.T @ b
    return outer.to(dtype) if total is None else total.add_(outer)
