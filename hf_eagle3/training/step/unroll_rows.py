"""The drafter unrolled on its own features over the slots of a flat batch.

`hf_eagle3/drafters/unroll.py` is the eager twin: the stock network over padded rows. This one runs the same weights over
a flat batch, and leaves out work that no loss depends on:

* slots that never train get keys and values of the first step, and nothing else;
* the embedding half of the first layer's query, key and value is computed once, since the token at slot i and step t is
  the token at slot i+t and step 0;
* the causal block is one kernel a step, and each slot's own earlier steps are merged into it (`attention.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...drafters.unroll import unroll
from ...modeling import Eagle3DrafterModel
from ...modeling.attention_eagle3 import Eagle3Attention
from .attention import attend
from .batch import Batch
from .elementwise import bare_norm, fuse_on_gpu, norm, rotate, swiglu, working_dtype


def unroll_rows(drafter: Eagle3DrafterModel, batch: Batch, aux_hidden_states: Tensor, steps: int) -> Tensor:
    """Normed outputs [k, R, H] of the slots `batch.rows` at each of k steps."""
    layers: Any = drafter.layers
    if not all(isinstance(layer.self_attn, Eagle3Attention) for layer in layers):
        return _unroll_padded(drafter, batch, aux_hidden_states, steps)
    rows, spans, at = batch.rows, batch.spans, batch.position_ids
    first = layers[0]
    features = fuse_states(drafter, aux_hidden_states)  # [N, H]
    tokens = batch.input_ids.roll(-1)  # [N], one after each slot; the last is never live
    inputs = FirstInputs(first, drafter.embed(tokens[None])[0].to(features.dtype), rows)
    hidden = features
    blocks: list[tuple[Tensor, Tensor]] = []  # by layer: keys and values of step 0, [M, Hkv, D]
    own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]  # by layer and later step, [R, Hkv, D]
    outputs = []
    for t in range(steps):
        rope = rotary(drafter, at if t == 0 else at[rows] + t, hidden)
        query_rope = rope if t else (rope[0][rows], rope[1][rows])
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            # In the first layer of step 0, all slots have keys and the rows have queries; afterwards only rows run.
            narrows = t == 0 and i == 0
            normed = norm(layer.hidden_norm if i == 0 else layer.input_layernorm, hidden)
            residual = normed if i == 0 and layer.norm_before_residual else hidden
            if narrows:
                residual = take(residual, rows)
            q, k, v = inputs.project(normed, t) if i == 0 else project(attention, normed)
            q, k = (
                to_heads(attention.q_norm if attention.config.qk_norm else None, q, attention.head_dim, query_rope),
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
    """`drafter.fuse` of [N, A*Ht], without a gradient for the states, which are frozen.

    W (w * x) = (W * w) x: with the norms' weights in the matrix, the norms themselves have none.
    """
    config = drafter.config
    if not config.use_aux_hidden_state or type(drafter.fc) is not nn.Linear:
        return drafter.fuse(aux_hidden_states)
    dtype = working_dtype(aux_hidden_states.device, drafter.fc.weight.dtype)
    norms: list[Any] = []  # their weights
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
    """The halves [n, H] of several weights [n_i, 2H], one behind the other: for embeddings, with the weight of their norm
    folded in, and for states.
    """
    weight, H = torch.cat(weights), len(norm_weight)
    return (weight[:, :H] * norm_weight).to(dtype), weight[:, H:].to(dtype)


class FirstInputs:
    """Query, key and value of the first layer; the contribution of token embeddings is computed once for all steps.

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
        # As in `fuse_states`: embeddings are frozen, so their gradient is not needed.
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
        """Query [R, Q], key and value from normed states: keys and values of all slots at step 0, of the rows later."""
        ours = F.pad(self._ours[step:], (0, 0, 0, min(step, len(self._ours))))
        if not self._split:
            for_query = torch.cat([ours, take(normed, self._rows) if step == 0 else normed], dim=-1)
            for_key = torch.cat([self._every, normed], dim=-1) if step == 0 else for_query
            q, k, v = self._projections
            return [q(for_query), k(for_key), v(for_key)]
        if step:
            return list((ours + F.linear(normed, self._of_state)).split(self._sizes, dim=-1))
        Q = self._sizes[0]
        query = ours[:, :Q] + F.linear(take(normed, self._rows), self._of_state[:Q])
        return [query, *(self._every + F.linear(normed, self._of_state[Q:])).split(self._sizes[1:], dim=-1)]


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], for distinct rows; `x` itself if these are all of its rows."""
    return x if len(rows) == len(x) else _Take.apply(x, rows)


class _Take(torch.autograd.Function):
    """Distinct rows, so that gradients are copied and not summed."""

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
    """`unroll_rows` by the eager twin, for a drafter whose attention is not Llama's."""
    lengths = batch.lengths
    ids = nn.utils.rnn.pad_sequence(batch.input_ids.split(lengths), batch_first=True)  # [D, T]
    aux = nn.utils.rnn.pad_sequence(aux_hidden_states.split(lengths), batch_first=True)
    starts = torch.tensor([i * ids.shape[1] for i in range(len(lengths))], device=ids.device)
    document = torch.repeat_interleave(
        torch.arange(len(lengths), device=ids.device), torch.tensor(lengths, device=ids.device)
    )
    flat = (starts[document] + batch.position_ids)[batch.rows]  # [R]
    return torch.stack([normed.flatten(0, 1)[flat] for normed in unroll(drafter, ids, aux, steps)])
