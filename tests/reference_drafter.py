"""An EAGLE-3 drafter in plain tensor code: no module, no cache class, no host. What the tests hold to be right.

Weights are a dict under our tensor names, the config a dict of our fields. One row at a time, in float64.
"""

import math
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """[head_dim / 2] angles per position, and the factor on cos and sin."""
    theta, kind = rope["rope_theta"], rope["rope_type"]
    plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if kind == "default":
        return plain, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * plain / (2 * math.pi)  # over the original length
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * smooth + plain / factor * (1 - smooth), 1.0
    assert kind == "yarn"

    def dimension(turns: float) -> float:  # that turns so often over the original length
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast", 32)), dimension(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp, 0.1 * math.log(factor) + 1


def rotate(x: Tensor, positions: Tensor, rope: dict[str, Any]) -> Tensor:
    """`x` [T, heads, head_dim], halves rotated against each other."""
    frequencies, scale = inverse_frequencies(rope, x.shape[-1])
    angle = positions[:, None, None].double() * frequencies  # [T, 1, head_dim / 2]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class ReferenceDrafter:
    """One row's drafter: `step` appends positions and remembers their keys and values."""

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any]):
        self.w = {name: w.double() if w.is_floating_point() else w for name, w in weights.items()}
        self.c = config
        self.keys: list[list[Tensor]] = [[] for _ in range(config["num_hidden_layers"])]
        self.values: list[list[Tensor]] = [[] for _ in range(config["num_hidden_layers"])]
        self.positions: list[int] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.w[f"{name}.weight"], self.c["rms_norm_eps"])

    def fuse(self, states: Tensor) -> Tensor:
        if "fc.weight" not in self.w:
            return states
        if "input_norm.weight" in self.w:
            states = self.norm(states, "input_norm")
        if "fc_norm.0.weight" in self.w:
            width = self.c["target_hidden_size"]
            chunks = [states[:, i : i + width] for i in range(0, states.shape[1], width)]
            states = torch.cat([self.norm(chunk, f"fc_norm.{k}") for k, chunk in enumerate(chunks)], dim=-1)
        return self.linear(states, "fc")

    def attend(self, x: Tensor, i: int, new: list[int]) -> Tensor:
        name, c = f"layers.{i}.self_attn", self.c
        d, groups = c["head_dim"], c["num_attention_heads"] // c["num_key_value_heads"]
        q, k, v = (self.linear(x, f"{name}.{p}_proj").unflatten(-1, (-1, d)) for p in "qkv")  # [T, heads, d]
        if f"{name}.q_norm.weight" in self.w:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        at = torch.tensor(new)
        q, k = rotate(q, at, c["rope_parameters"]), rotate(k, at, c["rope_parameters"])
        self.keys[i] += list(k)
        self.values[i] += list(v)
        out = []
        for t, position in enumerate(new):
            seen = range(len(self.keys[i]) - len(new) + t + 1)
            if c["sliding_window"] is not None:
                seen = [s for s in seen if self.positions[s] > position - c["sliding_window"]]
            heads = []
            for h in range(c["num_attention_heads"]):
                keys = torch.stack([self.keys[i][s][h // groups] for s in seen])  # [S, d]
                values = torch.stack([self.values[i][s][h // groups] for s in seen])
                heads.append(torch.softmax(keys @ q[t, h] / math.sqrt(d), 0) @ values)
            out.append(torch.cat(heads))
        return self.linear(torch.stack(out), f"{name}.o_proj")

    def mlp(self, x: Tensor, i: int) -> Tensor:
        gate, up = self.linear(x, f"layers.{i}.mlp.gate_proj"), self.linear(x, f"layers.{i}.mlp.up_proj")
        return self.linear(gate * torch.sigmoid(gate) * up, f"layers.{i}.mlp.down_proj")

    def step(
        self, ids: Tensor, *, states: Tensor | None = None, feedback: Tensor | None = None, positions: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Logits [T, V_d] and feedback [T, H] for T more positions.

        Args:
            ids: [T] the tokens after the states.
            states: [T, A*Ht] the target's, or
            feedback: [T, H] what an earlier step returned.
        """
        self.positions += positions
        h = self.fuse(states.double()) if feedback is None else feedback.double()
        e = self.w["embed_tokens.weight"][ids]
        b = self.norm(h, "layers.0.hidden_norm")
        pair = torch.cat([self.norm(e, "layers.0.input_layernorm"), b], dim=-1)
        y = (b if self.c["norm_before_residual"] else h) + self.attend(pair, 0, positions)
        y = y + self.mlp(self.norm(y, "layers.0.post_attention_layernorm"), 0)
        for i in range(1, self.c["num_hidden_layers"]):
            y = y + self.attend(self.norm(y, f"layers.{i}.input_layernorm"), i, positions)
            y = y + self.mlp(self.norm(y, f"layers.{i}.post_attention_layernorm"), i)
        o = self.norm(y, "norm")
        return o @ self.w["lm_head.weight"].T, o if self.c["norm_output"] else y
