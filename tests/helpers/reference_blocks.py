"""A block drafter in plain tensor code: what the tests hold to be right. One row at a time, in float64.

Weights are a dict under our tensor names, the config is ours.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.reference_drafter import rms_norm, rotate
from hf_eagle3.modeling import DFlashDrafterConfig

Weights = dict[str, Tensor]


def sees(config: DFlashDrafterConfig, layer: int, query: int, key: int, num_context: int) -> bool:
    """Whether the block's token at position `query` sees position `key`: of the context below `num_context`, else of the block."""
    window = config.window_of(layer)
    if window is not None and key <= query - window:
        return False
    return key < num_context or not config.is_causal or key <= query


def run_block(weights: Weights, config: DFlashDrafterConfig, states: Tensor, embeddings: Tensor) -> Tensor:
    """Normed outputs [n, H] of the block behind a context.

    Args:
        states: [M, A*Ht], the target's, of positions 0 to M - 1.
        embeddings: [n, H], of the block's tokens, at positions M to M + n - 1.
    """
    eps, rope, D = config.rms_norm_eps, config.rope_parameters, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    M, n = len(states), len(embeddings)
    context = rms_norm(states @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)  # [M, H]
    positions = torch.arange(M + n)
    x = embeddings
    for i in range(config.num_hidden_layers):
        w = {k.removeprefix(f"layers.{i}."): v for k, v in weights.items() if k.startswith(f"layers.{i}.")}
        normed = rms_norm(x, w["input_layernorm.weight"], eps)

        def project(y: Tensor, name: str, w: Weights = w) -> Tensor:
            return F.linear(y, w[f"self_attn.{name}.weight"], w.get(f"self_attn.{name}.bias"))

        both = torch.cat([context, normed])  # [M + n, H]
        q = rms_norm(project(normed, "q_proj").unflatten(-1, (-1, D)), w["self_attn.q_norm.weight"], eps)
        k = rms_norm(project(both, "k_proj").unflatten(-1, (-1, D)), w["self_attn.k_norm.weight"], eps)
        q, k = rotate(q, positions[M:], rope), rotate(k, positions, rope)
        v = project(both, "v_proj").unflatten(-1, (-1, D))  # [M + n, kv heads, D]
        rows = []
        for t in range(n):
            seen = [j for j in range(M + n) if sees(config, i, M + t, j, M)]
            keys, values = (y[seen].repeat_interleave(group, dim=1) for y in (k, v))  # [S, heads, D]
            scores = torch.einsum("hd,shd->hs", q[t], keys) / D**0.5
            rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values).flatten())
        x = x + project(torch.stack(rows), "o_proj")
        y = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
    return rms_norm(x, weights["norm.weight"], eps)


def markov_bias(weights: Weights, kind: str, tokens: list[int], outputs: Tensor) -> Tensor:
    """[n, V_d]: what the tokens before each position of a block, `tokens`, add to its logits; `outputs` [n, H]."""
    w = {k.removeprefix("markov_head."): v for k, v in weights.items() if k.startswith("markov_head.")}
    state, rows = torch.zeros(w["markov_w1.weight"].shape[1], dtype=torch.float64), []
    for token, out in zip(tokens, outputs, strict=True):
        e = w["markov_w1.weight"][token]
        if kind == "gated":
            e = e * torch.sigmoid(w["gate_proj.weight"] @ torch.cat([out, e]) + w["gate_proj.bias"])
        elif kind == "rnn":
            gate, candidate, read = (w["joint_proj.weight"] @ torch.cat([state, e, out]) + w["joint_proj.bias"]).chunk(
                3
            )
            e = torch.tanh(read)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
        rows.append(w["markov_w2.weight"] @ e)
    return torch.stack(rows)
