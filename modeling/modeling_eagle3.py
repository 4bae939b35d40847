"""The EAGLE-3 and EAGLE-3.1 drafter network (arXiv:2503.01840, arXiv:2605.09992).

Read top to bottom: attention over [embedding ; hidden state], the decoder layers, then the drafter itself. Copied into
every published drafter and run from there with `trust_remote_code=True`, so it imports torch, safetensors, Transformers
and its sibling only.

Shapes: B batch, T positions of this call, S positions seen so far, H drafter width, Ht target width, A captured
states, V target vocabulary, V_d draft vocabulary.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import ModelOutput, cached_file

from .configuration_eagle3 import Eagle3DrafterConfig

GENERATION_CONFIG_NAME = "generation_config.json"
REMOTE_CODE = {
    "AutoConfig": "configuration_eagle3.Eagle3DrafterConfig",
    "AutoModel": "modeling_eagle3.Eagle3DrafterModel",
    "AutoModelForCausalLM": "modeling_eagle3.Eagle3DrafterModel",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be a drafter as it stands: says which file, which tensor or key, and what was expected."""


@dataclass
class Eagle3DrafterOutput(ModelOutput):
    """What one drafter forward returns."""

    logits: Tensor | None = None  # [B, T, V_d], over the draft vocabulary
    feedback: Tensor | None = None  # [B, T, H], what the next draft step takes as `hidden_states`
    past_key_values: Cache | None = None


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
        **kwargs,
    ) -> Tensor:  # [B, T, H]
        B, T, _ = hidden_states.shape
        heads = (B, T, -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # [B, heads, T, head_dim]
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, kv_heads, S, head_dim]

        attend: Callable = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.reshape(B, T, -1))


class Eagle3Layer(GradientCheckpointingLayer):
    """A decoder layer after the first: Llama's, over the hidden state alone."""

    def __init__(self, config: Eagle3DrafterConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Eagle3Attention(config, layer_idx, input_size=config.hidden_size)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, embeddings: Tensor, **kwargs) -> Tensor:  # noqa: ARG002  one signature
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Eagle3FirstLayer(GradientCheckpointingLayer):
    """The layer that makes EAGLE-3: attention reads [token embedding ; hidden state], each normed, 2H wide.

    The embedding never enters the residual stream. The residual is the hidden state as it came, or normed
    (`norm_before_residual`).
    """

    def __init__(self, config: Eagle3DrafterConfig):
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = Eagle3Attention(config, layer_idx=0, input_size=2 * config.hidden_size)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, embeddings: Tensor, **kwargs) -> Tensor:
        normed = self.hidden_norm(hidden_states)
        residual = normed if self.norm_before_residual else hidden_states
        pair = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)  # [B, T, 2H]
        hidden_states = residual + self.self_attn(pair, **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Eagle3DrafterModel(PreTrainedModel):
    """An EAGLE-3 or EAGLE-3.1 drafter. Load it, pass it as `assistant_model`; nothing else is needed.

    What it lacks (token embeddings, sometimes the head) it borrows from a target by `bind`. Logits are over the draft
    vocabulary only; `draft_to_target_ids` maps ids.
    """

    config_class = Eagle3DrafterConfig
    config: Eagle3DrafterConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Eagle3FirstLayer", "Eagle3Layer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Membership of the draft vocabulary. It says nothing that `d2t` does not.
    _keys_to_ignore_on_load_unexpected = [r"^t2d$"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Eagle3DrafterConfig):
        super().__init__(config)
        H, Ht, A = config.hidden_size, config.target_hidden_size, config.num_aux_hidden_states
        if config.has_own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, H)
        if config.use_aux_hidden_state:
            if config.fc_norm:
                self.fc_norm = nn.ModuleList(LlamaRMSNorm(Ht, eps=config.rms_norm_eps) for _ in range(A))
            if config.norm_before_fc:
                self.input_norm = LlamaRMSNorm(A * Ht, eps=config.rms_norm_eps)
            self.fc = nn.Linear(A * Ht, H, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            Eagle3Layer(config, i) if i else Eagle3FirstLayer(config) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(H, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        if not config.share_lm_head:
            self.lm_head = nn.Linear(H, config.draft_vocab_size, bias=False)
        # As published: offsets, target id = draft id + d2t[draft id].
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))  # [V_d]

        # Where `generate(assistant_model=...)` looks for the draft shape; null leaves it to hf-eagle3.
        self.generation_config = GenerationConfig()
        # The target's own tensors and the boundaries to read it at, once bound. Plain attributes: what is borrowed is
        # neither saved, nor trained, nor moved.
        self._borrowed: dict[str, Tensor] = {}
        self.bound_aux_layer_ids: tuple[int, ...] | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.d2t)

    # ---- the target ----

    def bind(self, target: PreTrainedModel) -> "Eagle3DrafterModel":
        """Borrow from `target` what this drafter lacks, after checking that the two fit. Returns the drafter.

        May be called again, with this or another target. Nothing changes when it raises.

        Raises:
            ValueError: `target` is an encoder-decoder, or its sizes, vocabulary or layers are not those this drafter
                was made for.
        """
        if target.config.is_encoder_decoder:
            raise ValueError(
                f"An EAGLE-3 drafter needs a decoder-only target, but {type(target).__name__} is an encoder-decoder. "
                "Call generate() without assistant_model."
            )
        config, text_config = self.config, target.config.get_text_config(decoder=True)
        for what, ours, theirs in (
            ("hidden size", config.target_hidden_size, text_config.hidden_size),
            ("vocabulary size", config.vocab_size, text_config.vocab_size),
        ):
            if ours != theirs:
                raise ValueError(
                    f"This drafter does not fit {type(target).__name__}: it was made for a target with {what} {ours}, "
                    f"and this one has {theirs}. Load the drafter that was trained for this target."
                )
        aux_layer_ids = config.resolve_aux_layer_ids(text_config.num_hidden_layers)

        borrowed: dict[str, Tensor] = {}
        if not config.has_own_embeddings:
            borrowed["embed_tokens"] = target.get_input_embeddings().weight  # [>= V, Ht]
        if config.share_lm_head:
            borrowed["lm_head"] = target.get_output_embeddings().weight  # [>= V, Ht]
        for name, weight in borrowed.items():
            if weight.is_meta:
                raise ValueError(
                    f"This drafter borrows the target's {name}, which is offloaded (device 'meta'). Load the target "
                    "with its embeddings on a device."
                )
            if weight.shape[-1] != config.hidden_size:
                raise ValueError(
                    f"This drafter of width {config.hidden_size} has no {name} of its own and cannot borrow the "
                    f"target's, whose width is {weight.shape[-1]}. The checkpoint is incomplete."
                )
        self._borrowed, self.bound_aux_layer_ids = borrowed, aux_layer_ids
        return self

    def _weight(self, name: str) -> Tensor:
        """The weight of `embed_tokens` or `lm_head`: our own, or the target's."""
        if (module := getattr(self, name, None)) is not None:
            return module.weight
        if name not in self._borrowed:
            raise ValueError(
                f"This drafter borrows {name} from its target and is bound to none yet. Pass it to "
                "generate(assistant_model=...), or call drafter.bind(target)."
            )
        return self._borrowed[name]

    # ---- the vocabulary ----

    @property
    def draft_to_target_ids(self) -> Tensor:
        """[V_d] int64: the target id of each draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Target ids of `draft_ids`, any shape."""
        return draft_ids + self.d2t[draft_ids]

    def set_draft_to_target_ids(self, ids: Tensor) -> None:
        """Make `ids` [V_d] int64, distinct target ids, the draft vocabulary."""
        with torch.no_grad():
            self.d2t.copy_(ids.to(self.d2t.device) - torch.arange(len(self.d2t), device=self.d2t.device))
        self._check_draft_vocabulary("the ids given")

    def _check_draft_vocabulary(self, where: str) -> None:
        if self.d2t.is_meta:
            return
        ids, V = self.draft_to_target_ids, self.config.vocab_size
        if (outside := ((ids < 0) | (ids >= V)).nonzero()).numel():
            i = int(outside[0])
            raise CheckpointError(
                f"{where}: d2t sends draft id {i} to target id {int(ids[i])}, outside the target's vocabulary of {V}. "
                "d2t holds offsets: target id = draft id + d2t[draft id]."
            )
        if ids.unique().numel() < ids.numel():
            twice = ids.sort().values
            twice = int(twice[1:][twice.diff() == 0][0])
            raise CheckpointError(f"{where}: d2t sends two draft ids to the same target id, {twice}.")

    # ---- the network ----

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings [B, T, H] of `input_ids` [B, T], unscaled: the first layer norms them."""
        weight = self._weight("embed_tokens")
        return F.embedding(input_ids.to(weight.device), weight).to(self.norm.weight.device, self.dtype)

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
            aux_hidden_states = torch.cat([norm(c) for norm, c in zip(self.fc_norm, chunks)], dim=-1)
        return self.fc(aux_hidden_states.to(self.fc.weight.dtype))

    def compute_logits(self, normed: Tensor) -> Tensor:
        """Draft logits [..., V_d] of normed outputs [..., H]."""
        if not self.config.share_lm_head:
            return self.lm_head(normed)
        weight = self._weight("lm_head")[: self.config.draft_vocab_size]
        return F.linear(normed.to(weight.device, weight.dtype), weight).to(normed.device, normed.dtype)

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
        **kwargs,
    ) -> Eagle3DrafterOutput:
        """One draft step over T positions (arXiv:2503.01840, section 3).

        Args:
            input_ids: [B, T] int64, the token one *after* the state at each position, in the target's vocabulary.
            aux_hidden_states: [B, T, A*Ht], the target's states at the boundaries, ascending: the first draft step.
            hidden_states: [B, T, H], `feedback` of the previous draft step: every later one. Exactly one of the two.
            attention_mask: [B, S] 1 = keep, over cached and new positions; or a 4D mask, used as it is.
            position_ids: [B, T], positions of the *states*. Default: counted on from the cache.
            past_key_values: Cache of earlier positions; extended in place.
            use_cache: Make a cache when none is given.
            logits_to_keep: Logits of the last so many positions only, or of these positions; 0 means all.

        Returns:
            `logits` [B, T, V_d], `feedback` [B, T, H] and `past_key_values`. Logits at t propose the token two after
            the state at t.
        """
        if (aux_hidden_states is None) == (hidden_states is None):
            raise ValueError(
                "Give exactly one of aux_hidden_states (the target's, first draft step) and hidden_states (the "
                "drafter's own feedback, later steps)."
            )
        states = aux_hidden_states if hidden_states is None else hidden_states
        config = self.config
        width = config.hidden_size
        if hidden_states is None:
            width = config.num_captured_states * config.target_hidden_size
        if states.shape != (*input_ids.shape, width):
            name = "aux_hidden_states" if hidden_states is None else "hidden_states"
            raise ValueError(
                f"{name} must be [B, T, {width}] with [B, T] = {list(input_ids.shape)} as in input_ids, got "
                f"{list(states.shape)}."
            )
        if past_key_values is None and use_cache:
            # Full layers even under a sliding window: the mask cuts, and what a refused draft wrote can be cut off.
            past_key_values = DynamicCache()

        if hidden_states is None:
            hidden_states = self.fuse(aux_hidden_states)
        embeddings = self.embed(input_ids)  # [B, T, H]
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + input_ids.shape[1], device=hidden_states.device)[None]

        make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
        attention_mask = make_mask(
            config=config,
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                embeddings,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        normed = self.norm(hidden_states)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return Eagle3DrafterOutput(
            logits=self.compute_logits(normed[:, keep]),
            feedback=normed if config.norm_output else hidden_states,
            past_key_values=past_key_values,
        )

    # ---- files ----

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ) -> "Eagle3DrafterModel":
        """Load a drafter; see `PreTrainedModel.from_pretrained`. Strict: no tensor is left out, made up or reshaped.

        Raises:
            CheckpointError: The weights are not readable, or tensors are missing, extra, misshapen or out of range.
        """
        where = describe_source(pretrained_model_name_or_path)
        kwargs["ignore_mismatched_sizes"] = True  # so that we hear of them; none is ignored
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise CheckpointError(
                f"{where}: the weights cannot be read ({type(error).__name__}: {error}). Expected a whole safetensors "
                "file, or a pickle of plain tensors."
            ) from error
        problems = []
        missing = set(info["missing_keys"])
        if model.config.draft_vocab_size == model.config.vocab_size:
            missing.discard("d2t")  # the identity
        if missing:
            problems.append(f"tensors are missing: {sorted(missing)}")
        if info["unexpected_keys"]:
            problems.append(f"tensors that this drafter has no place for: {sorted(info['unexpected_keys'])}")
        problems += [
            f"{name} has shape {list(found)}, expected {list(wanted)}"
            for name, found, wanted in sorted(info["mismatched_keys"])
        ]
        if info.get("error_msgs"):
            problems.append(str(info["error_msgs"]))
        if problems:
            raise CheckpointError(f"{where}: " + "; ".join(problems) + ". config.json and the weights do not agree.")
        model._check_draft_vocabulary(where)
        model._load_generation_config(pretrained_model_name_or_path, kwargs)
        return (model, info) if output_loading_info else model

    def _load_generation_config(self, name_or_path, kwargs: dict) -> None:
        hub = {k: kwargs[k] for k in ("cache_dir", "revision", "subfolder", "token", "local_files_only") if k in kwargs}
        found = cached_file(
            name_or_path,
            GENERATION_CONFIG_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        if found is not None:
            self.generation_config = GenerationConfig.from_pretrained(Path(found).parent)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Write config, weights, generation config and the `modeling/` files, so that the folder loads anywhere."""
        self.config.auto_map = dict(REMOTE_CODE)
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        self.generation_config.save_pretrained(folder)
        here = Path(__file__).parent
        for name in ("configuration_eagle3.py", "modeling_eagle3.py"):
            (folder / name).write_text((here / name).read_text(encoding="utf-8"), encoding="utf-8")


def describe_source(name_or_path) -> str:
    """The weight files of a local folder, or the repository's name: what an error points at."""
    folder = Path(name_or_path)
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")) if folder.is_dir() else []
    return f"{name_or_path} ({', '.join(files)})" if files else str(name_or_path)
