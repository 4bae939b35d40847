"""The attention of a drafter's layers: Llama's, or multi-head latent attention (MLA, arXiv:2405.04434).

Both take an input width of their own, since the first layer reads [embedding ; hidden state]. Copied into every
published drafter, so it imports torch, Transformers and its siblings only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave, yarn_get_mscale
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from .configuration_eagle3 import Eagle3DrafterConfig
from .drafter_eagle3 import attend


def make_attention(config: Eagle3DrafterConfig, layer_idx: int, input_size: int) -> nn.Module:
    """The attention that `config` asks for, over inputs [B, T, input_size]."""
    kind = Eagle3LatentAttention if config.is_latent else Eagle3Attention
    return kind(config, layer_idx, input_size)


class Eagle3Attention(nn.Module):
    """Llama's attention with an input width of its own, and norms over heads where the drafter has them."""

    def __init__(self, config: Eagle3DrafterConfig, layer_idx: int, input_size: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.sliding_window = config.sliding_window
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(input_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(input_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, input_size]
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        writes_only: bool = False,
        **kwargs,
    ) -> Tensor:  # [B, T, H]; nothing to go on with, [B, 0, H], if it only writes to the cache
        B, T, _ = hidden_states.shape
        heads = (B, T, -1, self.head_dim)
        query = None if writes_only else self.q_proj(hidden_states).view(heads)
        key = self.k_proj(hidden_states).view(heads)
        if self.config.qk_norm:
            query, key = query if query is None else self.q_norm(query), self.k_norm(key)
        key = key.transpose(1, 2)  # [B, kv_heads, T, head_dim]
        query = key if query is None else query.transpose(1, 2)  # [B, heads, T, head_dim]
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, kv_heads, S, head_dim]
        if writes_only:
            return hidden_states.new_empty(B, 0, self.config.hidden_size)
        out = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(out.reshape(B, T, -1))


class Eagle3LatentAttention(nn.Module):
    """Multi-head latent attention with an input width of its own.

    Keys and values come from one narrow latent. A head's query and key are [unrotated ; rotated]; the rotated key is the
    same in every head, and rotates in interleaved pairs.
    """

    def __init__(self, config: Eagle3DrafterConfig, layer_idx: int, input_size: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = 1
        self.sliding_window = config.sliding_window
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.rope_size = config.head_dim
        self.nope_size: int = config.qk_nope_head_dim  # type: ignore[assignment]  # is_latent: all three are given
        self.v_size: int = config.v_head_dim  # type: ignore[assignment]
        self.rank: int = config.kv_lora_rank  # type: ignore[assignment]
        self.qk_size = self.nope_size + self.rope_size
        self.scaling = self.qk_size**-0.5
        rope = config.rope_parameters or {}
        if rope.get("mscale_all_dim"):  # yarn; cos and sin carry the ratio of mscale to it
            self.scaling *= yarn_get_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2

        n, H = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(input_size, n * self.qk_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(input_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = LlamaRMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, n * self.qk_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(input_size, self.rank + self.rope_size, bias=False)
        self.kv_a_layernorm = LlamaRMSNorm(self.rank, eps=config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.rank, n * (self.nope_size + self.v_size), bias=False)
        self.o_proj = nn.Linear(n * self.v_size, H, bias=False)

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, input_size]
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        writes_only: bool = False,
        **kwargs,
    ) -> Tensor:  # [B, T, H]; nothing to go on with, [B, 0, H], if it only writes to the cache
        B, T, _ = hidden_states.shape
        if writes_only:
            query = hidden_states.new_empty(B, T, self.qk_size)
        elif self.config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.view(B, T, -1, self.qk_size).transpose(1, 2)  # [B, heads, T, nope + rope]
        query, query_rope = query.split([self.nope_size, self.rope_size], dim=-1)
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.rank, self.rope_size], dim=-1)
        pair = self.kv_b_proj(self.kv_a_layernorm(latent)).view(B, T, -1, self.nope_size + self.v_size).transpose(1, 2)
        key, value = pair.split([self.nope_size, self.v_size], dim=-1)  # [B, heads, T, nope], [B, heads, T, v]
        query_rope, key_rope = apply_rotary_pos_emb_interleave(query_rope, key_rope[:, None], *position_embeddings)
        query = torch.cat([query, query_rope], dim=-1)
        key = torch.cat([key, key_rope.expand(-1, key.shape[1], -1, -1)], dim=-1)
        # One width for all three, as fast kernels and caches take it; zeros change neither scores nor sums.
        width = max(self.qk_size, self.v_size)
        query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if writes_only:
            return hidden_states.new_empty(B, 0, self.config.hidden_size)
        out = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(out[..., : self.v_size].reshape(B, T, -1))
