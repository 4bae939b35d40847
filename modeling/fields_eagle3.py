"""The fields of a drafter's config, and what each may be: without torch and Transformers, which take seconds to import.

Copied into every published drafter and run from there with `trust_remote_code=True`: it imports nothing but its siblings.
"""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import ClassVar

from .text_eagle3 import show

# What Transformers itself may put into a config.json or pass along; none of it changes the drafter's arithmetic.
HOST_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
        "trust_remote_code",
        "use_cache",
    }
)

DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})


def is_dtype(value) -> bool:
    """Whether `value` is a dtype that a drafter can have, or its name."""
    return value is None or str(value).removeprefix("torch.") in DTYPES


# The host's own keys that it reads before or beside ours -> what each must be, in words, and whether it is.
HOST_VALUES = {
    "auto_map": ("a table of texts", lambda x: isinstance(x, dict) and all(isinstance(y, str) for y in x.values())),
    "architectures": ("a list of texts", lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x)),
    "quantization_config": ("a table", lambda x: isinstance(x, dict) or hasattr(x, "to_dict")),
    "dtype": ("a float of 16 bits or more", is_dtype),
    "torch_dtype": ("a float of 16 bits or more", is_dtype),
    "num_labels": ("a small number", lambda x: type(x) is int and 0 <= x <= 1000),  # a label is made for each
    "id2label": ("a table", lambda x: isinstance(x, dict)),
    "label2id": ("a table", lambda x: isinstance(x, dict)),
}


def check_host_values(config_dict) -> None:
    """Raise ValueError if one of the host's own keys has a value on which it would fail without naming it."""
    for key, (wanted, fits) in HOST_VALUES.items():
        if config_dict.get(key) is not None and not fits(config_dict[key]):
            raise ValueError(f"{key} must be {wanted}, got {show(config_dict[key])}.")


LARGEST = 2**31 - 1  # of a size
LARGEST_VOCABULARY = 2**24  # what tables of it cost is allocated before any tensor is read


def is_number(value, above: float, most: float = math.inf) -> bool:
    """Whether `value` is a finite number above `above`, and at most `most`."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and abs(value) < 1e30 and above < value <= most


def is_factors(value, most: float = math.inf) -> bool:
    """Whether `value` is a list of positive numbers, a factor for each frequency."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(is_number(x, 0, most) for x in value)


# Rotary parameter -> what it must be, in words, and whether it is. Outside of these, a table comes out without an error
# and means nothing.
ROPE_VALUES = {
    "rope_theta": ("a number above 1", lambda x: is_number(x, 1)),
    "factor": ("a number of at least 1", lambda x: is_number(x, 0) and x >= 1),
    "original_max_position_embeddings": ("a number of positions", lambda x: is_number(x, 0, LARGEST)),
    "attention_factor": ("a positive number", lambda x: is_number(x, 0)),
    "beta_fast": ("a positive number", lambda x: is_number(x, 0)),
    "beta_slow": ("a positive number", lambda x: is_number(x, 0)),
    "mscale": ("a number of at least 0", lambda x: is_number(x, -1) and x >= 0),
    "mscale_all_dim": ("a number of at least 0", lambda x: is_number(x, -1) and x >= 0),
    "low_freq_factor": ("a positive number", lambda x: is_number(x, 0)),
    "high_freq_factor": ("a positive number", lambda x: is_number(x, 0)),
    "short_factor": ("a list of positive numbers", is_factors),
    "long_factor": ("a list of positive numbers", is_factors),
    "truncate": ("true or false", lambda x: isinstance(x, bool)),
    "rope_type": ("a text", lambda x: isinstance(x, str)),
    "type": ("a text", lambda x: isinstance(x, str)),
}
ASCENDING = (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))  # each pair of rotary parameters


def check_rope_values(rope) -> None:
    """Raise ValueError if rotary parameters are nonsense: the message names the one."""
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise ValueError(f"rotary parameters must be a table or null, got {show(rope)}.")
    for key, (wanted, fits) in ROPE_VALUES.items():
        if rope.get(key) is not None and not fits(rope[key]):
            raise ValueError(f"rotary parameters: {key} must be {wanted}, got {show(rope[key])}.")
    for low, high in ASCENDING:
        if rope.get(low) is not None and rope.get(high) is not None and rope[low] >= rope[high]:
            raise ValueError(f"rotary parameters: {low} ({rope[low]}) must be below {high} ({rope[high]}).")


def refuse_second_rope(rope, scaling, theta) -> None:
    """Raise ValueError if `rope_scaling` or `rope_theta` beside rotary parameters say something else than these."""
    for name, other in (("rope_scaling", scaling), ("rope_theta", {"rope_theta": theta})):
        if not isinstance(rope, dict) or not isinstance(other, dict):
            continue
        one, two = ({"rope_type": table.get("type"), **_stated(table)} for table in (rope, other))
        for key in sorted(one.keys() & two.keys() - {"type"}):
            if one[key] is not None and two[key] is not None and one[key] != two[key]:
                raise ValueError(
                    f"{name} says {key} {show(two[key])}, and the rotary parameters beside it {show(one[key])}. Remove "
                    "the one that is wrong."
                )


def _stated(table) -> dict:
    return {key: value for key, value in table.items() if value is not None}


def default_boundaries(num_layers: int) -> list[int]:
    """The three boundaries at which drafters read a target of `num_layers` where nothing else is stated, ascending."""
    return sorted((2, num_layers // 2, num_layers - 3))


def linear_shapes(name: str, inputs: int, outputs: int, *, bias: bool = False) -> dict:
    """The tensors of a linear layer, by name."""
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


@dataclass(kw_only=True, eq=False, repr=False)
class DrafterFields:
    """What the config of a drafter of any kind has beside the host's own fields; described with each kind's config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int | None = None
    num_aux_hidden_states: int = 3
    aux_layer_ids: list[int] | tuple[int, ...] | None = None
    aux_layer_ids_from_outputs: bool = False
    mask_token_id: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    has_own_embeddings: bool = False
    share_lm_head: bool = False
    sliding_window: int | None = None
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    attention_dropout: int | float = 0.0
    target_model_type: str | None = None
    target_name_or_path: str | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self):
        self.finish_fields()

    def finish_fields(self):
        """Fill in what follows from other fields."""
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.aux_layer_ids is not None:
            self.aux_layer_ids = [int(i) for i in self.aux_layer_ids]

    def validate_architecture(self):
        """Refuse combinations that no drafter has."""
        self._validate_sizes()
        check_rope_values(self.rope_parameters)
        self._validate_heads()
        if not 0 < self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps must be a small positive number, got {self.rms_norm_eps}.")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size ({self.draft_vocab_size}) is larger than the target's vocab_size "
                f"({self.vocab_size}); the draft vocabulary is a subset of the target's."
            )
        if self.share_lm_head and self.draft_vocab_size != self.vocab_size:
            raise ValueError(
                f"share_lm_head borrows the target's head of {self.vocab_size} rows, so draft_vocab_size must equal "
                f"vocab_size; got {self.draft_vocab_size}."
            )
        if self.hidden_act != "silu":  # nearly every drafter's; the host's table takes a second to import
            from transformers.activations import ACT2FN

            if self.hidden_act not in ACT2FN:
                raise ValueError(f"hidden_act {self.hidden_act!r} is not known to Transformers.")
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings must be false: a drafter's head is its own, or the target's (share_lm_head)."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1 or null, got {self.sliding_window}.")
        self._validate_captured()

    def _validate_sizes(self):
        sizes = [
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "vocab_size", "draft_vocab_size", "target_hidden_size", "num_aux_hidden_states"),
            "max_position_embeddings",
        ]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {show(getattr(self, name))}.")
            if getattr(self, name) > (most := LARGEST_VOCABULARY if "vocab" in name else LARGEST):
                raise ValueError(f"{name} must be at most {most}, got {show(getattr(self, name))}.")

    def _validate_heads(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if self.mask_token_id is not None:
            self._validate_mask_token(self.mask_token_id)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}.")
        for name in ("short_factor", "long_factor"):
            factors = (self.rope_parameters or {}).get(name)
            if factors is not None and len(factors) != self.head_dim // 2:
                raise ValueError(
                    f"rotary parameters: {name} has {len(factors)} factors, expected {self.head_dim // 2}, half of head_dim."
                )

    def _validate_mask_token(self, mask_token_id: int):
        if not 0 <= mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id must be a token of the target's vocabulary of {self.vocab_size}, got {mask_token_id}."
            )

    def _validate_captured(self):
        if (ids := self.aux_layer_ids) is not None:
            if len(ids) != self.num_aux_hidden_states:
                raise ValueError(
                    f"aux_layer_ids {ids} names {len(ids)} states, but num_aux_hidden_states is "
                    f"{self.num_aux_hidden_states}."
                )
            if any(a >= b for a, b in pairwise(ids)) or ids[0] < 0:
                raise ValueError(f"aux_layer_ids must be boundaries 0, 1, ... in ascending order, got {ids}.")

    def tensor_shapes(self) -> dict:
        """The tensors of the network, by name, with their shapes."""
        H, inner, bias = self.hidden_size, self.intermediate_size, self.mlp_bias
        shapes = {"norm.weight": (H,), "d2t": (self.draft_vocab_size,), **self._outer_shapes()}
        if self.has_own_embeddings:
            shapes["embed_tokens.weight"] = (self.vocab_size, H)
        if not self.share_lm_head:
            shapes["lm_head.weight"] = (self.draft_vocab_size, H)
        for i in range(self.num_hidden_layers):
            layer = {
                **self._layer_shapes(i),
                **linear_shapes("mlp.gate_proj", H, inner, bias=bias),
                **linear_shapes("mlp.up_proj", H, inner, bias=bias),
                **linear_shapes("mlp.down_proj", inner, H, bias=bias),
                **{f"{name}.weight": (H,) for name in ("input_layernorm", "post_attention_layernorm")},
            }
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes

    def _outer_shapes(self) -> dict:
        """Those outside of the layers that not every kind has."""
        raise NotImplementedError

    def _layer_shapes(self, layer: int) -> dict:
        """Those of a layer that not every kind has."""
        raise NotImplementedError

    def _attention_shapes(self, input_size: int, *, is_normed: bool) -> dict:
        """Those of Llama's attention over inputs of `input_size`."""
        n, H, width, bias = self.num_attention_heads, self.hidden_size, self.head_dim, self.attention_bias
        kv_size = self.num_key_value_heads * width
        return {
            **linear_shapes("self_attn.q_proj", input_size, n * width, bias=bias),
            **linear_shapes("self_attn.k_proj", input_size, kv_size, bias=bias),
            **linear_shapes("self_attn.v_proj", input_size, kv_size, bias=bias),
            **linear_shapes("self_attn.o_proj", n * width, H, bias=bias),
            **{f"self_attn.{name}.weight": (width,) for name in (("q_norm", "k_norm") if is_normed else ())},
        }

    @property
    def context_size(self) -> int:
        """Width of one captured state."""
        return self.target_hidden_size or self.hidden_size

    @property
    def num_captured_states(self) -> int:
        """How many target states one position needs."""
        return self.num_aux_hidden_states

    @property
    def family(self) -> str:
        """What papers call it."""
        raise NotImplementedError

    @property
    def max_draft_depth(self) -> int | None:
        """Most tokens on a path of a draft; None: any number."""
        return None

    def resolve_aux_layer_ids(self, num_target_layers: int) -> tuple[int, ...]:
        """The boundaries to capture from a target of `num_target_layers` layers, ascending.

        Raises:
            ValueError: A boundary lies outside 0..`num_target_layers`, or null cannot stand for A states.
        """
        n = num_target_layers
        ids = self.aux_layer_ids
        if ids is None:
            if self.num_aux_hidden_states != 3:
                raise ValueError(
                    f"aux_layer_ids is null, which stands for three states, but this drafter reads "
                    f"{self.num_aux_hidden_states}. Set config.aux_layer_ids to the boundaries it was trained with."
                )
            ids = default_boundaries(n)
            if len(set(ids)) < 3:
                raise ValueError(
                    f"aux_layer_ids is null, which stands for boundaries 2, n/2 and n-3, but in a target of {n} layers "
                    f"these are {ids}, not three. Set config.aux_layer_ids to the boundaries it was trained with."
                )
        if self.aux_layer_ids_from_outputs and ids[-1] == n + 1:
            ids = [i - 1 for i in ids]  # SGLang's rule for gpt-oss; the other reading is impossible
        if ids[0] < 0 or ids[-1] > n:
            raise ValueError(
                f"This drafter reads the target at boundaries {list(ids)}, but the target has {n} layers, so "
                f"boundaries 0 to {n}. It was made for another target."
            )
        return tuple(ids)


@dataclass(kw_only=True, eq=False, repr=False)
class Eagle3Fields(DrafterFields):
    """What an `Eagle3DrafterConfig` has beside the host's own fields; described there."""

    model_type: ClassVar[str] = "eagle3"

    norm_last_state: bool = False
    use_aux_hidden_state: bool = True
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    fc_bias: bool = False

    def validate_architecture(self):
        """Refuse combinations that no drafter has."""
        super().validate_architecture()
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm and norm_before_fc both norm the input of fc; a drafter has one of them.")
        if self.norm_last_state and not self.use_aux_hidden_state:
            raise ValueError(
                "use_aux_hidden_state=False reads the normed state anyway; norm_last_state must be false."
            )

    def _validate_heads(self):
        if self.is_latent:
            self._validate_latent()
        super()._validate_heads()

    def _validate_captured(self):
        if self.use_aux_hidden_state:
            super()._validate_captured()
            return
        if self.aux_layer_ids or self.fc_norm or self.norm_before_fc or self.fc_bias:
            raise ValueError(
                "use_aux_hidden_state=False has no fc, so aux_layer_ids, fc_norm, norm_before_fc and fc_bias "
                "must not be set."
            )
        if self.target_hidden_size != self.hidden_size:
            raise ValueError(
                f"use_aux_hidden_state=False feeds the target's state (width {self.target_hidden_size}) to the "
                f"drafter as it is, whose width is {self.hidden_size}."
            )

    def _validate_latent(self):
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            if (getattr(self, name) or 0) < 1:
                raise ValueError(
                    f"{name} must be at least 1 with multi-head latent attention (kv_lora_rank is "
                    f"{self.kv_lora_rank}), got {getattr(self, name)}."
                )
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank must be at least 1 or null, got {self.q_lora_rank}.")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                "With multi-head latent attention every query head has a key head: num_key_value_heads must be "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}."
            )
        if self.qk_norm or self.attention_bias:
            raise ValueError("No drafter has multi-head latent attention with qk_norm or attention_bias.")

    def _validate_mask_token(self, mask_token_id: int):
        super()._validate_mask_token(mask_token_id)
        if self.is_latent or not self.use_aux_hidden_state:
            raise ValueError(
                "No P-EAGLE drafter (mask_token_id) has multi-head latent attention or use_aux_hidden_state=False."
            )

    def _outer_shapes(self) -> dict:
        A, Ht = self.num_aux_hidden_states, self.context_size
        shapes: dict[str, tuple[int, ...]] = {}
        if self.use_aux_hidden_state:
            if self.fc_norm:
                shapes |= {f"fc_norm.{i}.weight": (Ht,) for i in range(A)}
            if self.norm_before_fc:
                shapes["input_norm.weight"] = (A * Ht,)
            shapes |= linear_shapes("fc", A * Ht, self.hidden_size, bias=self.fc_bias)
        if self.is_parallel:
            shapes["mask_hidden"] = (1, 1, A * Ht)
        return shapes

    def _layer_shapes(self, layer: int) -> dict:
        H = self.hidden_size
        input_size = H if layer else 2 * H
        if self.is_latent:
            shapes = self._latent_shapes(input_size)
        else:
            shapes = self._attention_shapes(input_size, is_normed=self.qk_norm)
        return shapes if layer else {**shapes, "hidden_norm.weight": (H,)}

    def _latent_shapes(self, input_size: int) -> dict:
        n, width, q_rank = self.num_attention_heads, self.head_dim, self.q_lora_rank
        rank: int = self.kv_lora_rank  # type: ignore[assignment]  # is_latent: all three are given
        nope_size: int = self.qk_nope_head_dim  # type: ignore[assignment]
        v_size: int = self.v_head_dim  # type: ignore[assignment]
        qk_size = nope_size + width
        shapes = linear_shapes("self_attn.q_proj", input_size, n * qk_size)
        if q_rank is not None:
            shapes = {
                **linear_shapes("self_attn.q_a_proj", input_size, q_rank),
                "self_attn.q_a_layernorm.weight": (q_rank,),
                **linear_shapes("self_attn.q_b_proj", q_rank, n * qk_size),
            }
        return {
            **shapes,
            **linear_shapes("self_attn.kv_a_proj_with_mqa", input_size, rank + width),
            "self_attn.kv_a_layernorm.weight": (rank,),
            **linear_shapes("self_attn.kv_b_proj", rank, n * (nope_size + v_size)),
            **linear_shapes("self_attn.o_proj", n * v_size, self.hidden_size),
        }

    @property
    def family(self) -> str:
        """What papers call it."""
        return "EAGLE-3"

    @property
    def is_parallel(self) -> bool:
        """Whether all draft tokens come from one forward (P-EAGLE)."""
        return self.mask_token_id is not None

    @property
    def is_latent(self) -> bool:
        """Whether the layers have multi-head latent attention."""
        return self.kv_lora_rank is not None

    @property
    def num_captured_states(self) -> int:
        """How many target states one position needs: A, or 1 for a drafter without `fc`."""
        return self.num_aux_hidden_states if self.use_aux_hidden_state else 1

    def resolve_aux_layer_ids(self, num_target_layers: int) -> tuple[int, ...]:
        """The boundaries to capture from a target of `num_target_layers` layers, ascending.

        Empty for a drafter without `fc`, which reads the final normed state. With `norm_last_state`, boundary n is
        n + 1: what leaves the final norm.

        Raises:
            ValueError: A boundary lies outside 0..`num_target_layers`, or null cannot stand for A states.
        """
        if not self.use_aux_hidden_state:
            return ()
        n, ids = num_target_layers, super().resolve_aux_layer_ids(num_target_layers)
        if self.norm_last_state:
            if ids[-1] != n:
                raise ValueError(
                    f"norm_last_state norms boundary {n} of this target, but the drafter reads boundaries {list(ids)}."
                )
            ids = (*ids[:-1], n + 1)
        return ids


FIELD_NAMES = frozenset(field.name for field in fields(Eagle3Fields))
