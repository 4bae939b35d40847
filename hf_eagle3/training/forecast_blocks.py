"""The cost of training a block drafter, counted as `forecast` counts.

Letters: T tokens of a document, n tokens of a block, k depths, s blocks a token of the data.
"""

from dataclasses import dataclass

from ..modeling import DFlashDrafterConfig
from .step.blocks import MOST_TOKENS
from .step.head_loss import CHUNK_ELEMENTS

HALF = 2  # bytes of a number in bf16


@dataclass(frozen=True)
class BlockShape:
    """Numbers of a block drafter's weights by their part in a step, and its widths."""

    fc: int
    kv: int  # key and value of all layers, of the context and of blocks
    layers: int  # all weights of the layers
    head: int
    heads: int  # of confidence, and the Markov head's but its table
    width: int
    heads_width: int  # query heads, side by side
    kv_width: int  # key heads, side by side
    mlp_width: int
    aux_width: int  # aux hidden states of a position
    target_width: int  # its last hidden state
    vocab_size: int  # the target's
    draft_vocab_size: int
    num_layers: int
    block_size: int  # n
    has_own_head: bool

    @classmethod
    def of(cls, config: DFlashDrafterConfig) -> "BlockShape":
        """The shape of a drafter with this config."""
        H, I, L, r = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.markov_rank
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        Ht: int = config.target_hidden_size  # type: ignore[assignment]  # H where it is not given
        aux = config.num_aux_hidden_states * Ht
        return cls(
            fc=aux * H,
            kv=L * H * 2 * kv,
            layers=L * (H * (2 * q + 2 * kv) + 3 * H * I),
            head=H * config.draft_vocab_size,
            heads=r * config.draft_vocab_size + config.has_confidence_head * (H + r * config.confidence_reads_markov),
            width=H,
            heads_width=q,
            kv_width=kv,
            mlp_width=I,
            aux_width=aux,
            target_width=Ht,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.draft_vocab_size,
            num_layers=L,
            block_size=config.block_size,
            has_own_head=not config.share_lm_head,
        )

    def count_flops(self, T: float, k: int, share: float, *, recomputed: bool = False) -> float:
        """Operations a token of a document, forward and backward.

        A block sees half of its document on average, and itself.

        Args:
            T: Tokens of a document.
            k: Depths of a block that are compared with the target.
            share: Blocks a token of the data.
            recomputed: Whether the backward pass computes the layers once more.
        """
        attention = 4 * (T / 2 + self.block_size) * self.heads_width * self.num_layers
        layers = self.block_size * ((6 + 2 * recomputed) * self.layers + (3.5 + recomputed) * attention)
        heads = k * ((6 if self.has_own_head else 4) * self.head + 6 * self.heads)
        return 4 * self.fc + 6 * self.kv + share * (layers + heads)

    def count_bytes(self, num_slots: float, k: int, share: float, *, recomputed: bool = False) -> int:
        """The most that one micro-batch holds beside weights and their gradients.

        Args:
            num_slots: Tokens of the micro-batch.
            k: As above.
            share: Blocks a token of the data.
            recomputed: As above.
        """
        W, Q, K, I = self.width, self.heads_width, self.kv_width, self.mlp_width
        context = 2 * self.aux_width + self.target_width + 2 * W + 3 * K * self.num_layers
        layer = 4 * W + 3 * Q + 3 * K + 3 * I  # as `forecast.activation_bytes` counts a layer
        tokens = share * num_slots * self.block_size
        kept = tokens * (self.num_layers * (W if recomputed else layer) + 2 * W) + (
            layer * tokens if recomputed else 0
        )
        logits = min(CHUNK_ELEMENTS, k * share * num_slots * self.draft_vocab_size) * 2
        group = min(tokens, MOST_TOKENS)
        masks = group * (num_slots + group)  # of one group, a byte for each key, and once more as numbers
        return round((num_slots * context + kept + logits) * HALF + (1 + HALF) * masks)
