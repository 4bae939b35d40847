"""An EAGLE-3 drafter in plain tensor code: no module, no cache class, no host. What the tests hold to be right.

Weights are a dict under our tensor names, the config a dict of our fields. One row at a time, in float64.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_eagle3.modeling import Eagle3DrafterConfig


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
    scale = 0.1 * math.log(factor) + 1
    if "mscale" in rope and "mscale_all_dim" in rope:
        scale = (0.1 * rope["mscale"] * math.log(factor) + 1) / (0.1 * rope["mscale_all_dim"] * math.log(factor) + 1)
    return plain * (1 - ramp) + plain / factor * ramp, scale


def rotate_pairs(x: Tensor, positions: Tensor, rope: dict[str, Any]) -> Tensor:
    """`x` [T, heads, d], neighbouring entries rotated against each other."""
    frequencies, scale = inverse_frequencies(rope, x.shape[-1])
    angle = positions[:, None, None].double() * frequencies  # [T, 1, d / 2]
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(angle.new_tensor(scale), angle)
    return torch.view_as_real(turned).flatten(-2)


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

    def attend_latent(self, x: Tensor, i: int, new: list[int]) -> Tensor:
        """Multi-head latent attention, a head and a query at a time."""
        name, c = f"layers.{i}.self_attn", self.c
        n, nope, rope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["head_dim"], c["v_head_dim"]
        if f"{name}.q_a_proj.weight" in self.w:
            query = self.norm(self.linear(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm")
            query = self.linear(query, f"{name}.q_b_proj").view(len(x), n, nope + rope)
        else:
            query = self.linear(x, f"{name}.q_proj").view(len(x), n, nope + rope)
        both = self.linear(x, f"{name}.kv_a_proj_with_mqa")
        latent = self.norm(both[:, : c["kv_lora_rank"]], f"{name}.kv_a_layernorm")
        pair = self.linear(latent, f"{name}.kv_b_proj").view(len(x), n, nope + v)
        at, parameters = torch.tensor(new), c["rope_parameters"]
        turned = rotate_pairs(query[..., nope:], at, parameters)
        shared = rotate_pairs(both[:, None, c["kv_lora_rank"] :], at, parameters)[:, 0]  # [T, rope]
        self.keys[i] += [torch.cat([p[:, :nope], s.expand(n, rope)], dim=1) for p, s in zip(pair, shared, strict=True)]
        self.values[i] += list(pair[..., nope:])
        scale = 1 / math.sqrt(nope + rope)
        if "mscale_all_dim" in parameters:
            scale *= (0.1 * parameters["mscale_all_dim"] * math.log(parameters["factor"]) + 1) ** 2
        out = []
        for t in range(len(new)):
            seen = range(len(self.keys[i]) - len(new) + t + 1)
            if c["sliding_window"] is not None:
                seen = [s for s in seen if self.positions[s] > new[t] - c["sliding_window"]]
            heads = []
            for h in range(n):
                q = torch.cat([query[t, h, :nope], turned[t, h]])
                weights = torch.softmax(torch.stack([self.keys[i][s][h] for s in seen]) @ q * scale, 0)
                heads.append(weights @ torch.stack([self.values[i][s][h] for s in seen]))
            out.append(torch.cat(heads))
        return self.linear(torch.stack(out), f"{name}.o_proj")

    def attend(self, x: Tensor, i: int, new: list[int]) -> Tensor:
        name, c = f"layers.{i}.self_attn", self.c
        if f"{name}.kv_b_proj.weight" in self.w:
            return self.attend_latent(x, i, new)
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
        if self.c.get("hidden_act", "silu") == "gelu_pytorch_tanh":
            gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate * torch.sigmoid(gate)
        return self.linear(gate * up, f"layers.{i}.mlp.down_proj")

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


class ExactRotary(nn.Module):
    """Cosines and sines in float64; the host's are rounded to float32."""

    def __init__(self, rope: dict[str, Any], head_dim: int):
        super().__init__()
        self.frequencies, self.scale = inverse_frequencies(rope, head_dim)

    def forward(self, _: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.frequencies
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos() * self.scale, angle.sin() * self.scale


@contextmanager
def in_float64(drafter: nn.Module) -> Iterator[nn.Module]:
    """The drafter with nothing rounded to float32 on the way, as the host's norms and rotary tables are."""
    host = drafter.rotary_emb
    drafter.double()
    drafter.rotary_emb = ExactRotary(drafter.config.rope_parameters, drafter.config.head_dim)
    with mock.patch.object(LlamaRMSNorm, "forward", lambda norm, x: rms_norm(x, norm.weight, norm.variance_epsilon)):
        yield drafter
    drafter.rotary_emb = host
    drafter.float()


class DoubleRotary(nn.Module):
    """The host's cos and sin, without its detour through float32. Its frequencies are tested for themselves."""

    def __init__(self, config: Eagle3DrafterConfig):
        super().__init__()
        self.inv_freq, self.scale = inverse_frequencies(config.rope_parameters, config.head_dim)

    def forward(self, _x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = (position_ids[..., None].double() * self.inv_freq).repeat(1, 1, 2)
        return angle.cos() * self.scale, angle.sin() * self.scale
