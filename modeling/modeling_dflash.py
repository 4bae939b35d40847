"""The D-Flash drafter network (arXiv:2602.06036), and what makes it DSpark (arXiv:2607.05147).

A block is the newest token of the text, the root, and mask tokens behind it; one forward proposes a token for each. The
target's states of all tokens before the root become one feature each, which every layer reads as further keys and values
beside the block's own. DSpark's Markov head adds to each position's logits what the drafted token before it says.

Copied into every published drafter of this kind and run from there with `trust_remote_code=True`, so it imports torch,
Transformers and its siblings only.

Shapes: B batch, M context positions of this call, n tokens of a block, S positions seen so far, H drafter width, Ht target
width, A captured states, V target vocabulary, V_d draft vocabulary, r rank of the Markov head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from .configuration_dflash import DFlashDrafterConfig
from .drafter_eagle3 import SHARED_FILES, DrafterModel, attend

REMOTE_CODE = {
    "AutoConfig": "configuration_dflash.DFlashDrafterConfig",
    "AutoModel": "modeling_dflash.DFlashDrafterModel",
    "AutoModelForCausalLM": "modeling_dflash.DFlashDrafterModel",
}
REMOTE_CODE_FILES = tuple(sorted((*SHARED_FILES, "configuration_dflash.py", "fields_dflash.py", "modeling_dflash.py")))


class DFlashDrafterOutput(NamedTuple):
    """What one drafter forward returns."""

    logits: Tensor  # [B, n, V_d], over the draft vocabulary; without what a Markov head adds
    hidden_states: Tensor  # [B, n, H], what logits are made of
    past_key_values: Cache | None


class DFlashAttention(nn.Module):
    """Attention of a block's tokens over the context and the block. Queries and keys are normed head by head."""

    def __init__(self, config: DFlashDrafterConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.sliding_window = config.window_of(layer_idx)
        self.attention_dropout = config.attention_dropout
        self.is_causal = False

        H, q_size = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(H, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(H, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(H, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, H, bias=config.attention_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def make_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, kv_heads, T, head_dim] of `x` [B, T, H], the keys not rotated yet."""
        heads = (*x.shape[:2], -1, self.head_dim)
        return self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), self.v_proj(x).view(heads).transpose(1, 2)

    def project(self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, heads, n, head_dim], key and value [B, kv_heads, n, head_dim] of a block's normed states [B, n, H]."""
        B, n, _ = hidden_states.shape
        query = self.q_norm(self.q_proj(hidden_states).view(B, n, -1, self.head_dim)).transpose(1, 2)
        key, value = self.make_keys(hidden_states)
        return *apply_rotary_pos_emb(query, key, *rotation), value

    def read_context(self, context: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, kv_heads, M, head_dim] of context features [B, M, H]."""
        key, value = self.make_keys(context)
        return apply_rotary_pos_emb(key, key, *rotation)[1], value

    def forward(
        self,
        hidden_states: Tensor,  # [B, n, H]
        rotation: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor] | None,  # keys and values [B, kv_heads, M, head_dim] that no cache holds
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> Tensor:  # [B, n, H]
        query, key, value = self.project(hidden_states, rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, kv_heads, S, head_dim]
        elif context is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(context, (key, value), strict=True))
        out = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(out.flatten(2))


class DFlashLayer(GradientCheckpointingLayer):
    """A decoder layer over the tokens of a block."""

    def __init__(self, config: DFlashDrafterConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DFlashAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MarkovHead(nn.Module):
    """What the drafted tokens before a position add to its logits (arXiv:2607.05147, section 3)."""

    def __init__(self, config: DFlashDrafterConfig):
        super().__init__()
        self.kind, r, H = config.markov_head_type, config.markov_rank, config.hidden_size
        self.markov_w1 = nn.Embedding(config.vocab_size, r)  # of the token before, a target id
        self.markov_w2 = nn.Linear(r, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(H + r, r)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * r + H, 3 * r)

    def read(self, before: Tensor, hidden_states: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What `markov_w2` is applied to, [..., r], at one position, and the state [..., r] for the next one.

        Args:
            before: [...] int64, the token before, a target id.
            hidden_states: [..., H], the output at the position.
            state: [..., r] of the position before; None at the first.
        """
        token = self.markov_w1(before).to(hidden_states.dtype)  # [..., r]
        if self.kind == "vanilla":
            return token, None
        if self.kind == "gated":
            return self.gate_proj(torch.cat([hidden_states, token], dim=-1)).sigmoid() * token, None
        state = torch.zeros_like(token) if state is None else state
        joint = self.joint_proj(torch.cat([state, token, hidden_states], dim=-1))
        gate, candidate, out = joint.chunk(3, dim=-1)
        gate = gate.sigmoid()
        return out.tanh(), gate * state + (1 - gate) * candidate.tanh()

    def forward(self, before: Tensor, hidden_states: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is added to the logits [..., V_d] of one position, and the state for the next; arguments as of `read`."""
        read, state = self.read(before, hidden_states, state)
        return self.markov_w2(read), state


class ConfidenceHead(nn.Module):
    """How likely a draft token is accepted, as a logit."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).squeeze(-1)


class DFlashDrafterModel(DrafterModel):
    """A D-Flash or DSpark drafter. Load it, pass it as `assistant_model`; nothing else is needed.

    What it lacks (token embeddings, the head) it borrows from a target by `bind`. Logits are over the draft vocabulary
    only; `draft_to_target_ids` maps ids.
    """

    config_class = DFlashDrafterConfig
    config: DFlashDrafterConfig
    kind_name = "A D-Flash drafter"
    base_model_prefix = "dflash_drafter"
    _no_split_modules = ["DFlashLayer"]
    _supports_flash_attn = False  # a block sees itself from both sides, behind a context of any length
    _supports_flex_attn = False
    remote_code = REMOTE_CODE
    remote_code_files = REMOTE_CODE_FILES

    def __init__(self, config: DFlashDrafterConfig):
        super().__init__(config)
        H, width = config.hidden_size, config.num_aux_hidden_states * config.target_hidden_size  # type: ignore[operator]
        self.fc = nn.Linear(width, H, bias=False)
        self.hidden_norm = LlamaRMSNorm(H, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(H, eps=config.rms_norm_eps)
        self._add_head(config)
        if config.markov_rank:
            self.markov_head = MarkovHead(config)
        if config.has_confidence_head:
            self.confidence_head = ConfidenceHead(H + config.markov_rank * config.confidence_reads_markov)
        self.post_init()

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """The target's captured states [B, M, A*Ht] as context features [B, M, H]."""
        return self.hidden_norm(self.fc(aux_hidden_states.to(self.fc.weight.dtype)))

    def make_block(self, root: Tensor, num_tokens: int) -> Tensor:
        """[B, num_tokens] int64: `root` [B], and mask tokens behind it."""
        masks = root.new_full((len(root), num_tokens - 1), self.config.mask_token_id)  # type: ignore[arg-type]
        return torch.cat([root[:, None], masks], dim=1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        aux_hidden_states: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        has_logits: bool = True,
        writes_only: bool = False,
        **kwargs,
    ) -> DFlashDrafterOutput:
        """Propose a token for each position of a block.

        Args:
            input_ids: [B, n] int64, the blocks; of no account with `writes_only`. Several blocks of one text may stand one
                behind the other, where `attention_mask` keeps them apart.
            aux_hidden_states: [B, M, A*Ht], the target's states of context positions that the cache does not hold.
            attention_mask: [B, 1, n, S] as the attention takes it, over context and blocks, or a table of such by
                `layer_types`. By default a block sees all of the context.
            position_ids: [B, M + n], of the context positions of this call and then of the blocks. Default: counted on
                from the cache.
            past_key_values: Cache of context positions. Without `writes_only`, what it is given is extended by the block,
                which is to be cut off again.
            has_logits: Whether logits are wanted; else there are none, [B, 0, V_d].
            writes_only: Write `aux_hidden_states` to the cache, and stop there. There are no logits then: [B, 0, ...].

        Returns:
            `logits` [B, n, V_d], `hidden_states` [B, n, H] and `past_key_values`. Logits at a position are of its own
            token, or of the one behind it (`drafts_from_root`).
        """
        past_key_values = kwargs.pop("cache", past_key_values)  # the host's name for it from Transformers 5.24 on
        context = None if aux_hidden_states is None else self.fuse(aux_hidden_states)  # [B, M, H]
        M = 0 if context is None else context.shape[1]
        like = self.norm.weight if context is None else context
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            n = 0 if writes_only or input_ids is None else input_ids.shape[1]
            position_ids = torch.arange(past, past + M + n, device=like.device)[None]
        cos, sin = self.rotary_emb(like, position_ids)
        at_context, at_block = (cos[:, :M], sin[:, :M]), (cos[:, M:], sin[:, M:])
        if context is not None and past_key_values is not None:
            for layer in self.layers:
                past_key_values.update(*layer.self_attn.read_context(context, at_context), layer.self_attn.layer_idx)  # type: ignore[operator, union-attr]
            context = None
        if writes_only:
            nothing = like.new_empty(len(like), 0, self.config.hidden_size)
            no_logits = like.new_empty(len(like), 0, self.config.draft_vocab_size)
            return DFlashDrafterOutput(no_logits, nothing, past_key_values)
        if input_ids is None:
            raise ValueError("Give input_ids, the tokens of a block; or writes_only=True, to fill the cache alone.")

        hidden_states = self.embed(input_ids)  # [B, n, H]
        if attention_mask is None:
            attention_mask = self.make_masks(position_ids, M, past_key_values)
        for i, layer in enumerate(self.layers):
            keys = None if context is None else layer.self_attn.read_context(context, at_context)  # type: ignore[operator, union-attr]
            mask = attention_mask
            if isinstance(mask, dict):
                mask = mask[(self.config.layer_types or ["full_attention"] * len(self.layers))[i]]
            hidden_states = layer(
                hidden_states,
                rotation=at_block,
                context=keys,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        normed = self.norm(hidden_states)
        logits = self.compute_logits(normed if has_logits else normed[:, :0])
        return DFlashDrafterOutput(logits, normed, past_key_values)

    def make_masks(
        self, position_ids: Tensor, num_context: int, past_key_values: Cache | None
    ) -> dict[str, Tensor] | None:
        """What hides keys from one block behind its whole context; None where nothing does, or the attention knows.

        Args:
            position_ids: [B, M + n], of this call.
            num_context: M.
            past_key_values: Holds the context before, position by position.
        """
        config = self.config
        if config._attn_implementation not in ("eager", "sdpa") or (
            not config.is_causal and not config.sliding_window
        ):
            return None
        block = position_ids[:, num_context:]  # [B, n]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        num_new = num_context if past_key_values is None else 0  # what was written is part of the past
        before = torch.arange(past, device=block.device).expand(len(block), -1)
        keys = torch.cat([before, position_ids[:, num_context - num_new :]], dim=1)[:, None]  # [B, 1, S]
        seen = (keys <= block[..., None]) if config.is_causal else torch.ones_like(keys, dtype=torch.bool)
        masks = {"full_attention": seen.expand(-1, block.shape[1], -1)}
        if config.sliding_window:
            masks["sliding_attention"] = seen & (keys > block[..., None] - config.sliding_window)
            if config.layer_types is None:
                masks["full_attention"] = masks["sliding_attention"]
        if config._attn_implementation == "sdpa":
            return {name: mask[:, None] for name, mask in masks.items()}
        least = torch.finfo(self.dtype).min
        return {
            name: torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, least)[:, None]
            for name, mask in masks.items()
        }

    def add_markov(
        self, logits: Tensor, before: Tensor, hidden_states: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [..., V_d] with what the token before says; and the state for the next position.

        Args:
            logits: [..., V_d] of one position, as `forward` gives them.
            before: [...] int64, the token before, a target id.
            hidden_states: [..., H], of the position.
            state: As this gave it for the position before; None at the first of a block.
        """
        if not self.config.markov_rank:
            return logits, None
        bias, state = self.markov_head(before, hidden_states, state)
        return logits + bias, state

    def find_confidence(self, before: Tensor, hidden_states: Tensor) -> Tensor:
        """Logits [...] of how likely the draft token at each position is accepted; arguments as of `add_markov`."""
        if self.config.confidence_reads_markov:
            token = self.markov_head.markov_w1(before).to(hidden_states.dtype)
            hidden_states = torch.cat([hidden_states, token], dim=-1)
        return self.confidence_head(hidden_states)
