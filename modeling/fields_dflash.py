"""The fields of a D-Flash or DSpark drafter's config, and what each may be.

Copied into every published drafter of this kind and run from there with `trust_remote_code=True`: it imports nothing but
its siblings.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

from .fields_eagle3 import DrafterFields, linear_shapes
from .text_eagle3 import show

LARGEST_BLOCK = 64  # tokens; who sees whom in a block is said by the bits of one number
LAYER_TYPES = ("full_attention", "sliding_attention")
MARKOV_HEADS = ("vanilla", "gated", "rnn")


@dataclass(kw_only=True, eq=False, repr=False)
class DFlashFields(DrafterFields):
    """What a `DFlashDrafterConfig` has beside the host's own fields; described there."""

    model_type: ClassVar[str] = "dflash_drafter"

    block_size: int
    drafts_from_root: bool = False
    is_causal: bool = False
    layer_types: list[str] | None = None
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    has_confidence_head: bool = False
    confidence_reads_markov: bool = False

    def validate_architecture(self):
        """Refuse combinations that no drafter has."""
        super().validate_architecture()
        if self.mask_token_id is None:
            raise ValueError("mask_token_id must be given: every position of a block but the first reads it.")
        least = 1 if self.drafts_from_root else 2
        if not least <= self.block_size <= LARGEST_BLOCK:
            raise ValueError(f"block_size must be from {least} to {LARGEST_BLOCK}, got {show(self.block_size)}.")
        if self.aux_layer_ids is None:
            raise ValueError("aux_layer_ids must be given: block drafters have no default boundaries.")
        self._validate_layers()
        self._validate_heads_of_block()

    def _validate_layers(self):
        types = self.layer_types
        if types is None:
            return
        if len(types) != self.num_hidden_layers or any(name not in LAYER_TYPES for name in types):
            raise ValueError(
                f"layer_types must name one of {', '.join(LAYER_TYPES)} for each of {self.num_hidden_layers} layers, got "
                f"{show(types)}."
            )
        if "sliding_attention" in types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention, so sliding_window must be given.")

    def _validate_heads_of_block(self):
        if self.markov_rank < 0:
            raise ValueError(f"markov_rank must be at least 0, got {self.markov_rank}.")
        if self.markov_head_type not in MARKOV_HEADS:
            raise ValueError(
                f"markov_head_type must be one of {', '.join(MARKOV_HEADS)}, got {show(self.markov_head_type)}."
            )
        if self.confidence_reads_markov and not (self.has_confidence_head and self.markov_rank):
            raise ValueError("confidence_reads_markov needs has_confidence_head and markov_rank above 0.")

    def _outer_shapes(self) -> dict:
        H, r = self.hidden_size, self.markov_rank
        shapes = {"hidden_norm.weight": (H,), **linear_shapes("fc", self.num_aux_hidden_states * self.context_size, H)}
        if r:
            shapes["markov_head.markov_w1.weight"] = (self.vocab_size, r)
            shapes |= linear_shapes("markov_head.markov_w2", r, self.draft_vocab_size)
            if self.markov_head_type == "gated":
                shapes |= linear_shapes("markov_head.gate_proj", H + r, r, bias=True)
            elif self.markov_head_type == "rnn":
                shapes |= linear_shapes("markov_head.joint_proj", H + 2 * r, 3 * r, bias=True)
        if self.has_confidence_head:
            shapes |= linear_shapes("confidence_head.proj", H + r * self.confidence_reads_markov, 1, bias=True)
        return shapes

    def _layer_shapes(self, layer: int) -> dict:  # noqa: ARG002  all are alike
        return self._attention_shapes(self.hidden_size, is_normed=True)

    @property
    def family(self) -> str:
        """What papers call it."""
        return "DSpark" if self.markov_rank else "D-Flash"

    @property
    def max_draft_depth(self) -> int:
        """Most draft tokens of a block."""
        return self.block_size if self.drafts_from_root else self.block_size - 1

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer; None where it sees all."""
        is_full = self.layer_types is not None and self.layer_types[layer] == "full_attention"
        return None if is_full else self.sliding_window


FIELD_NAMES = frozenset(field.name for field in fields(DFlashFields))
