"""The EAGLE-3 and EAGLE-3.1 drafter network (arXiv:2503.01840, arXiv:2605.09992).

Read top to bottom: the decoder layers, the first of which attends over [embedding ; hidden state], then the drafter
itself. Attention is in `attention_eagle3.py`, what drafters of all kinds share in `drafter_eagle3.py`. Copied into every
published drafter and run from there with `trust_remote_code=True`, so it imports torch, Transformers and its siblings only.

Shapes: B batch, T positions of this call, S positions seen so far, H drafter width, Ht target width, A captured
states, V target vocabulary, V_d draft vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .attention_eagle3 import make_attention
from .configuration_eagle3 import Eagle3DrafterConfig
from .drafter_eagle3 import SHARED_FILES, DrafterModel
from .weights_eagle3 import StoredTensor, read_tensor

REMOTE_CODE = {
    "AutoConfig": "configuration_eagle3.Eagle3DrafterConfig",
    "AutoModel": "modeling_eagle3.Eagle3DrafterModel",
    "AutoModelForCausalLM": "modeling_eagle3.Eagle3DrafterModel",
}
REMOTE_CODE_FILES = tuple(
    sorted((*SHARED_FILES, "attention_eagle3.py", "configuration_eagle3.py", "modeling_eagle3.py"))
)


class Eagle3DrafterOutput(NamedTuple):
    """What one drafter forward returns."""

    logits: Tensor  # [B, T, V_d], over the draft vocabulary
    feedback: Tensor  # [B, T, H], what the next draft step takes as `hidden_states`
    past_key_values: Cache | None


class Eagle3Layer(GradientCheckpointingLayer):
    """A decoder layer after the first: Llama's, over the hidden state alone."""

    def __init__(self, config: Eagle3DrafterConfig, layer_idx: int):
        super().__init__()
        self.self_attn = make_attention(config, layer_idx, input_size=config.hidden_size)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, embeddings: Tensor, **kwargs) -> Tensor:  # noqa: ARG002  one signature
        attended = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        if kwargs.get("writes_only"):
            return attended
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Eagle3FirstLayer(GradientCheckpointingLayer):
    """The layer that makes EAGLE-3: attention reads [token embedding ; hidden state], each normed, 2H wide.

    The embedding never enters the residual stream. The residual is the hidden state as it came, or normed
    (`norm_before_residual`).
    """

    def __init__(self, config: Eagle3DrafterConfig):
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = make_attention(config, layer_idx=0, input_size=2 * config.hidden_size)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, embeddings: Tensor, **kwargs) -> Tensor:
        normed = self.hidden_norm(hidden_states)
        residual = normed if self.norm_before_residual else hidden_states
        pair = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)  # [B, T, 2H]
        attended = self.self_attn(pair, **kwargs)
        if kwargs.get("writes_only"):
            return attended
        hidden_states = residual + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Eagle3DrafterModel(DrafterModel):
    """An EAGLE-3 or EAGLE-3.1 drafter. Load it, pass it as `assistant_model`; nothing else is needed.

    What it lacks (token embeddings, sometimes the head) it borrows from a target by `bind`. Logits are over the draft
    vocabulary only; `draft_to_target_ids` maps ids.
    """

    config_class = Eagle3DrafterConfig
    config: Eagle3DrafterConfig
    kind_name = "An EAGLE-3 drafter"
    _no_split_modules = ["Eagle3FirstLayer", "Eagle3Layer"]
    remote_code = REMOTE_CODE
    remote_code_files = REMOTE_CODE_FILES

    def __init__(self, config: Eagle3DrafterConfig):
        super().__init__(config)
        H, A = config.hidden_size, config.num_aux_hidden_states
        Ht: int = config.target_hidden_size  # type: ignore[assignment]  # H where it is not given
        if config.use_aux_hidden_state:
            if config.fc_norm:
                self.fc_norm = nn.ModuleList(LlamaRMSNorm(Ht, eps=config.rms_norm_eps) for _ in range(A))
            if config.norm_before_fc:
                self.input_norm = LlamaRMSNorm(A * Ht, eps=config.rms_norm_eps)
            self.fc = nn.Linear(A * Ht, H, bias=config.fc_bias)
        if config.is_parallel:
            self.mask_hidden = nn.Parameter(torch.empty(1, 1, A * Ht))  # in the place of states that are not there yet
        self.layers = nn.ModuleList(
            Eagle3Layer(config, i) if i else Eagle3FirstLayer(config) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(H, eps=config.rms_norm_eps)
        self._add_head(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.is_parallel:
            init.normal_(self.mask_hidden, std=self.config.initializer_range)

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """The target's captured states [B, T, A*Ht] as one feature [B, T, H]. First draft step only.

        Norms work on the states as they come, in float32 inside: residual streams outgrow half precision.
        """
        if not self.config.use_aux_hidden_state:
            return aux_hidden_states.to(self.dtype)
        if self.config.norm_before_fc:
            aux_hidden_states = self.input_norm(aux_hidden_states)
        if self.config.fc_norm:
            chunks = aux_hidden_states.split(self.config.target_hidden_size, dim=-1)
            aux_hidden_states = torch.cat([norm(c) for norm, c in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        return self.fc(aux_hidden_states.to(self.fc.weight.dtype))

    def forward(
        self,
        input_ids: Tensor,
        aux_hidden_states: Tensor | None = None,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        writes_only: bool = False,
        **kwargs,
    ) -> Eagle3DrafterOutput:
        """One draft step over T positions (arXiv:2503.01840, section 3).

        Args:
            input_ids: [B, T] int64, the token one *after* the state at each position, in the target's vocabulary.
            aux_hidden_states: [B, T, A*Ht], the target's states at the boundaries, ascending: the first draft step.
            hidden_states: [B, T, H], `feedback` of the previous draft step: every later one. Exactly one of the two. A
                P-EAGLE drafter has no later step: see `with_masks`.
            attention_mask: [B, S] 1 = keep, over cached and new positions; or a 4D mask, used as it is.
            position_ids: [B, T], positions of the *states*. Default: counted on from the cache.
            past_key_values: Cache of earlier positions; extended in place.
            use_cache: Make a cache when none is given.
            logits_to_keep: Logits of the last so many positions only, or of these positions: [n] the same in every row,
                [B, n] each row's own; 0 means all.
            writes_only: Write to the cache what later positions attend to, and stop there: of the last layer that is its
                keys and values. There are no logits then, and no feedback: [B, 0, ...].

        Returns:
            `logits` [B, T, V_d], `feedback` [B, T, H] and `past_key_values`. Logits at t propose the token two after
            the state at t.
        """
        config = self.config
        if aux_hidden_states is not None and hidden_states is None:
            name, states = "aux_hidden_states", aux_hidden_states
            width = config.num_captured_states * config.target_hidden_size  # type: ignore[operator]  # as in __init__
        elif hidden_states is not None and aux_hidden_states is None:
            name, states, width = "hidden_states", hidden_states, config.hidden_size
        else:
            raise ValueError(
                "Give exactly one of aux_hidden_states (the target's, first draft step) and hidden_states (the "
                "drafter's own feedback, later steps)."
            )
        if states.shape != (*input_ids.shape, width):
            raise ValueError(
                f"{name} must be [B, T, {width}] with [B, T] = {list(input_ids.shape)} as in input_ids, got "
                f"{list(states.shape)}."
            )
        past_key_values = kwargs.pop("cache", past_key_values)  # the host's name for it from Transformers 5.24 on
        if past_key_values is None and use_cache:
            # Full layers even under a sliding window: the mask cuts, and what a refused draft wrote can be cut off.
            past_key_values = DynamicCache()

        hidden_states = self.fuse(states) if hidden_states is None else hidden_states  # [B, T, H]
        embeddings = self.embed(input_ids)  # [B, T, H]
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + input_ids.shape[1], device=hidden_states.device)[None]

        make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
        if writes_only and len(self.layers) == 1:  # attends to nothing
            attention_mask = None
        else:
            attention_mask = make_mask(
                config,
                embeddings,
                attention_mask,
                past_key_values,  # by position: the host calls it cache from Transformers 5.24 on
                position_ids=position_ids,
            )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            if writes_only and layer is self.layers[-1]:
                kwargs["writes_only"] = True
            hidden_states = layer(
                hidden_states,
                embeddings,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        if writes_only:
            no_logits = hidden_states.new_empty(len(hidden_states), 0, config.draft_vocab_size)
            return Eagle3DrafterOutput(no_logits, hidden_states, past_key_values)
        normed = self.norm(hidden_states)
        if isinstance(logits_to_keep, int):
            kept = normed[:, slice(-logits_to_keep, None)]
        elif logits_to_keep.dim() == 1:
            kept = normed[:, logits_to_keep]
        else:
            kept = normed.gather(1, logits_to_keep[..., None].expand(-1, -1, normed.shape[-1]))  # [B, n, H]
        feedback = normed if config.norm_output else hidden_states
        return Eagle3DrafterOutput(self.compute_logits(kept), feedback, past_key_values)

    def with_masks(self, input_ids: Tensor, aux_hidden_states: Tensor, num_real: Tensor) -> tuple[Tensor, Tensor]:
        """What a P-EAGLE drafter reads to draft several tokens at once: masks behind each row's real positions.

        Args:
            input_ids: [B, T] int64.
            aux_hidden_states: [B, T, A*Ht].
            num_real: [B, 1] int64, how many positions are kept.
        """
        token: int = self.config.mask_token_id  # type: ignore[assignment]  # not None in a P-EAGLE drafter
        is_real = torch.arange(input_ids.shape[1], device=input_ids.device) < num_real  # [B, T]
        states = aux_hidden_states.where(is_real[..., None], self.mask_hidden.to(aux_hidden_states.dtype))
        return input_ids.masked_fill(~is_real, token), states

    def _mend_mismatched(self, mismatched, stored: Mapping[str, StoredTensor], names: Mapping[str, str]) -> list:
        """Take a `mask_hidden` that is stored without its two leading ones; the mismatches that are left."""
        left = []
        for name, found, wanted in mismatched:
            if name == "mask_hidden" and tuple(found) == (wanted[-1],):
                (published,) = (theirs for theirs, ours in names.items() if ours == name)
                with torch.no_grad():
                    self.mask_hidden.copy_(read_tensor(stored[published], published))
            else:
                left.append((name, found, wanted))
        return left
