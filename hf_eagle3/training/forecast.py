"""What a training will cost, before its first step: arithmetic, memory, time.

A multiply-add is two operations; causal attention counts half the square; the backward pass of a trained linear layer is
twice its forward, that of flash attention two and a half times; norms, rotations and elementwise losses are left out.
Letters: T tokens of a document, k draft steps, s the share of slots that train.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..modeling import Eagle3DrafterConfig

# Dense bf16 operations a second that a long matrix product really reaches, by part of the device's name.
SUSTAINED: Mapping[str, float] = {"H100": 790e12, "H200": 790e12, "A100": 250e12}
UTILISATION = 0.45  # of that, in training
STATE_BYTES = 18  # a trained weight: float32 itself, two Adam moments, gradient; and a bf16 copy for arithmetic


@dataclass(frozen=True)
class DrafterShape:
    """Weights of a drafter by what they do, in numbers, and its widths."""

    fc: int
    qkv: int  # query, key and value of all layers
    qkv_embeddings: int  # the half of the first layer's that reads embeddings
    kv: int  # key and value of all layers
    rest: int  # output projections and MLPs
    head: int
    width: int
    heads_width: int  # query heads, side by side
    kv_width: int  # key heads, side by side
    mlp_width: int
    num_layers: int = 1

    @classmethod
    def of(cls, config: Eagle3DrafterConfig) -> "DrafterShape":
        """The shape of a drafter with Llama's attention; of others, as if they had it."""
        H, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        inputs = (L + 1) * H  # the first layer reads two states
        Ht: int = config.target_hidden_size  # type: ignore[assignment]  # H where it is not given
        return cls(
            fc=config.num_aux_hidden_states * Ht * H if config.use_aux_hidden_state else 0,
            qkv=inputs * (q + 2 * kv),
            qkv_embeddings=H * (q + 2 * kv),
            kv=inputs * 2 * kv,
            rest=L * (q * H + 3 * H * I),
            head=H * config.draft_vocab_size,
            width=H,
            heads_width=q,
            kv_width=kv,
            mlp_width=I,
            num_layers=L,
        )

    @property
    def parameters(self) -> int:
        """Weights of matrices; norms are left out."""
        return self.fc + self.qkv + self.rest + self.head


@dataclass(frozen=True)
class TargetShape:
    """What of a target's forward costs time."""

    active: float  # weights that take part in one token's forward: without embeddings, with the experts it goes to
    heads_width: int
    windows: tuple[int | None, ...]  # by layer, the sliding window; None sees all

    @classmethod
    def of(cls, target: PreTrainedModel) -> "TargetShape":
        """The shape of `target`; of one with quantised weights, as many as they have elements."""
        config = target.config.get_text_config(decoder=True)
        embeddings, head = target.get_input_embeddings(), target.get_output_embeddings()
        experts = next(
            (
                n
                for name in ("num_local_experts", "num_experts", "n_routed_experts")
                if (n := getattr(config, name, 0))
            ),
            0,
        )
        share = getattr(config, "num_experts_per_tok", experts) / experts if experts else 1
        active = 0.0
        for name, weight in target.named_parameters():
            active += weight.numel() * (share if ".experts." in name and weight.dim() > 1 else 1)
        if embeddings is not None and (head is None or embeddings.weight is not head.weight):
            active -= embeddings.weight.numel()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        return cls(active, heads * head_dim, windows)


def drafter_flops(shape: DrafterShape, T: float, k: int, share: float = 1.0, *, recomputed: bool = False) -> float:
    """Operations a token of a document, forward and backward.

    Args:
        shape: Of the drafter.
        T: Tokens of a document.
        k: Draft steps.
        share: Of slots that train; the rest costs the first feature, and keys and values of the first step.
        recomputed: Whether the backward pass computes what follows attention once more.
    """
    return forward_flops(shape, T, k, share) + backward_flops(shape, T, k, share, recomputed=recomputed)


def forward_flops(shape: DrafterShape, T: float, k: int, share: float = 1.0) -> float:
    """The forward part of `drafter_flops`."""
    step = 2 * (shape.qkv + shape.rest + shape.head) + 2 * T * shape.heads_width * shape.num_layers
    return 2 * shape.fc + share * k * step + (1 - share) * 2 * shape.kv


def backward_flops(shape: DrafterShape, T: float, k: int, share: float = 1.0, *, recomputed: bool = False) -> float:
    """The backward part of `drafter_flops`."""
    attention = T * shape.heads_width * shape.num_layers
    step = 4 * (shape.qkv + shape.rest + shape.head) - 2 * shape.qkv_embeddings + 5 * attention
    if recomputed:
        step += 2 * shape.rest
    return 2 * shape.fc + share * k * step + (1 - share) * 3 * shape.kv


def target_flops(shape: TargetShape, T: float) -> float:
    """Operations a token of the target's forward over a document of T tokens."""
    seen = sum(T if window is None else min(T, 2 * window) for window in shape.windows)
    return 2 * shape.active + 2 * seen * shape.heads_width


def activation_bytes(shape: DrafterShape, k: int, *, recomputed: bool = False, size: int = 2) -> int:
    """Bytes kept for the backward pass by a slot that trains at k steps, at `size` bytes a number."""
    layer = 4 * shape.width + 2 * shape.heads_width + 2 * shape.kv_width
    if not recomputed:
        layer += 2 * shape.width + 3 * shape.mlp_width
    return k * shape.num_layers * layer * size


class Forecast(NamedTuple):
    """What is to come; sizes in bytes, of one device."""

    trained: int  # weights
    tokens: int  # of all updates and processes
    share: float  # of slots that train, averaged over steps
    flops: float  # a token, target included
    states: int  # weights, gradients and moments of the drafter
    target: int  # its weights; 0 where there is none
    activations: int  # of one micro-batch
    tokens_per_second: float | None  # of all devices; None where the device is not known
    seconds: float | None

    @property
    def memory(self) -> int:
        """All together."""
        return self.states + self.target + self.activations

    def __str__(self) -> str:
        text = (
            f"{self.trained / 1e6:.1f} M trained weights, {self.tokens / 1e6:.1f} M tokens in all, {self.share:.0%} of "
            f"slots train, {self.flops / 1e9:.2f} GFLOP a token. A device needs about {self.memory / 2**30:.1f} GiB: "
            f"target {self.target / 2**30:.1f}, drafter and optimizer {self.states / 2**30:.1f}, activations "
            f"{self.activations / 2**30:.1f}."
        )
        if self.tokens_per_second is None or self.seconds is None:
            return text
        return f"{text} At {UTILISATION:.0%} of the arithmetic, {self.tokens_per_second:,.0f} tokens/s: {self.seconds / 3600:.1f} hours."


def make_forecast(
    drafter: DrafterShape,
    target: TargetShape | None,
    *,
    trained: int,
    target_bytes: int,
    lengths: Any,  # [rows] whole numbers, of whatever array
    rows_at_once: int,
    num_rows: float,
    share: float,
    ttt_steps: int,
    recomputed: bool,
    has_average: bool,
    num_devices: int,
    device_name: str | None,
) -> Forecast:
    """Put together what `Forecast` has.

    Args:
        drafter, target: Their shapes; no target where its states are stored.
        trained: Weights that the optimizer changes.
        target_bytes: On one device.
        lengths: Tokens of some of the data's documents.
        rows_at_once: Of one micro-batch on one device.
        num_rows: Of all updates and devices.
        share: See `drafter_flops`.
        ttt_steps: k.
        recomputed: See `drafter_flops`.
        has_average: Whether there is an average of the weights.
        num_devices: That compute.
        device_name: Of a GPU, None elsewhere.
    """
    mean = sum(lengths) / len(lengths)
    T = sum(int(n) ** 2 for n in lengths) / sum(lengths)  # of the document that a token is in
    flops = drafter_flops(drafter, T, ttt_steps, share, recomputed=recomputed)
    flops += 0 if target is None else target_flops(target, T)
    tokens = round(num_rows * mean)
    peak = next((p for name, p in SUSTAINED.items() if name in (device_name or "")), None)
    speed = None if peak is None else num_devices * UTILISATION * peak / flops
    per_slot = activation_bytes(drafter, ttt_steps, recomputed=recomputed)
    return Forecast(
        trained=trained,
        tokens=tokens,
        share=share,
        flops=flops,
        states=trained * (STATE_BYTES + (4 if has_average else 0)),
        target=target_bytes,
        activations=round(rows_at_once * mean * share * per_slot),
        tokens_per_second=speed,
        seconds=None if speed is None else tokens / speed,
    )
