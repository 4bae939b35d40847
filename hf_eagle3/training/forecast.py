"""The cost of a training before its first step: arithmetic, memory, time.

A multiply-add is two operations; causal attention counts half the square; the backward pass of a trained linear layer is
twice its forward, that of flash attention two and a half times; norms, rotations and elementwise losses are left out.
Memory counts the tensors that autograd keeps (`activation_bytes`). Letters: T tokens of a document, k draft steps, s
the share of slots that train.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..drafters.blocks import drafts_blocks
from ..modeling import Eagle3DrafterConfig
from ..tensor_parallel import local
from .amounts import format_count, format_memory, format_seconds
from .arguments import Eagle3TrainingArguments
from .forecast_blocks import HALF, BlockShape
from .kinds import Plan
from .sizes import find_size, layer_configs
from .step.batch import live_steps
from .step.head_loss import CHUNK_ELEMENTS

# Dense bf16 operations a second that a long matrix product reaches, by a part of the device's name.
SUSTAINED: Mapping[str, float] = {"H100": 790e12, "H200": 790e12, "A100": 250e12}
# The share of these in training. Measured at the 8B shape, every position supervised: 0.70-0.73 with the target in the loop at TTT 4
# and 7, on H100 and H200; 0.69 on an H200 of one long document from stored states, but 0.56 on an H100, by older attention
# (benchmarks/results/training_8b_shape_*_202611.md). Small shapes reach less: they wait for launches. A100: not measured.
UTILISATION = 0.70
FORECAST_ROWS = 1000  # the rows that a forecast reads
STATE_BYTES = 18  # a trained weight: float32 itself, two Adam moments, gradient; and a bf16 copy for arithmetic
# Kinds of layers whose cost of a token does not grow with those before it; "mamba" up to Transformers 5.17.
NOT_ATTENDING = frozenset({"linear_attention", "mamba", "recurrent", "conv", "moe"})


@dataclass(frozen=True)
class DrafterShape:
    """Numbers of a drafter's weights by their part in a step, and its widths."""

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
    aux_width: int  # aux hidden states of a position
    target_width: int  # its last hidden state
    vocab_size: int  # the target's
    num_layers: int = 1

    @classmethod
    def of(cls, config: Eagle3DrafterConfig) -> "DrafterShape":
        """The shape of a drafter with Llama's attention; of others, as if they had it."""
        H, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        inputs = (L + 1) * H  # the first layer reads two states
        Ht: int = config.target_hidden_size  # type: ignore[assignment]  # H where it is not given
        aux = config.num_aux_hidden_states * Ht
        return cls(
            fc=aux * H if config.use_aux_hidden_state else 0,
            qkv=inputs * (q + 2 * kv),
            qkv_embeddings=H * (q + 2 * kv),
            kv=inputs * 2 * kv,
            rest=L * (q * H + 3 * H * I),
            head=H * config.draft_vocab_size,
            width=H,
            heads_width=q,
            kv_width=kv,
            mlp_width=I,
            aux_width=aux if config.use_aux_hidden_state else H,
            target_width=Ht,
            vocab_size=config.vocab_size,
            num_layers=L,
        )

    def count_flops(self, T: float, k: int, share: float, *, recomputed: bool = False) -> float:
        """See `drafter_flops`."""
        return drafter_flops(self, T, k, share, recomputed=recomputed)

    def count_bytes(self, num_slots: float, k: int, share: float, *, recomputed: bool = False) -> int:
        """See `activation_bytes`."""
        return activation_bytes(self, num_slots, k, share, recomputed=recomputed)

    @property
    def draft_vocab_size(self) -> int:
        """V_d."""
        return self.head // self.width

    @property
    def parameters(self) -> int:
        """Weights of matrices; norms are left out."""
        return self.fc + self.qkv + self.rest + self.head


@dataclass(frozen=True)
class TargetShape:
    """The sizes that a target's forward time depends on."""

    active: float  # weights that take part in one token's forward: without embeddings, with the experts it goes to
    attending: tuple[
        tuple[int, int | None], ...
    ]  # by layer that attends: width of all heads, and window; None sees all

    @classmethod
    def of(cls, target: PreTrainedModel) -> "TargetShape":
        """The shape of `target`; of one with quantised weights, as many as they have elements."""
        config = target.config.get_text_config(decoder=True)
        embeddings, head = target.get_input_embeddings(), target.get_output_embeddings()
        experts = find_size(config, "num_local_experts", "num_experts", "n_routed_experts")
        share = (find_size(config, "num_experts_per_tok") or experts) / experts if experts else 1
        active = 0.0
        for name, weight in target.named_parameters():
            active += weight.numel() * (share if ".experts." in name and weight.dim() > 1 else 1)
        if embeddings is not None and (head is None or embeddings.weight is not head.weight):
            active -= embeddings.weight.numel()
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        layers = zip(kinds, layer_configs(config), strict=False)
        return cls(active, tuple(attention_of(kind, layer) for kind, layer in layers if kind not in NOT_ATTENDING))


def attention_of(kind: str, layer: PreTrainedConfig) -> tuple[int, int | None]:
    """Width of all heads and window of a layer of `kind`, by its config; 0 and None where there are no heads."""
    heads = find_size(layer, "num_attention_heads") or 0
    head_dim = find_size(layer, "head_dim") or (layer.hidden_size // heads if heads else 0)
    return heads * head_dim, find_size(layer, "sliding_window") if "sliding" in kind else None


def drafter_flops(shape: DrafterShape, T: float, k: int, share: float = 1.0, *, recomputed: bool = False) -> float:
    """Operations a token of a document, forward and backward.

    Args:
        shape: The drafter's.
        T: Tokens of a document.
        k: Draft steps.
        share: The share of slots that train; the rest costs the first feature, and keys and values of the first step.
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
    attention = sum(width * (T if window is None else min(T, 2 * window)) for width, window in shape.attending)
    return 2 * shape.active + 2 * attention


def activation_bytes(
    shape: DrafterShape, num_slots: float, k: int, share: float = 1.0, *, recomputed: bool = False, size: int = HALF
) -> int:
    """The most that one micro-batch holds beside weights and their gradients.

    Log-sum-exps, positions and what lives within one kernel are left out.

    Args:
        shape: The drafter's.
        num_slots: Tokens of the micro-batch.
        k: Draft steps.
        share: The share of slots that train.
        recomputed: Whether the backward pass computes what follows attention once more.
        size: Bytes of a number.
    """
    W, Q, K, I = shape.width, shape.heads_width, shape.kv_width, shape.mlp_width
    every = 2 * shape.aux_width + shape.target_width  # states of the target, and aux states normed
    every += 2 * W + 2 * K  # features; token embeddings normed, and their share of keys and values
    idle = W + 3 * K  # features normed, keys and values of the first step, keys once more as they are rotated

    after_attention = 2 * W + 3 * I  # the sum, normed; gate, up and their product
    layer = 2 * W + (Q + 2 * K)  # its input, normed; query, key and value side by side: values are a view of that
    layer += Q + K + Q  # query and key rotated; attention's output
    layer += 0 if recomputed else after_attention
    step = shape.num_layers * layer + 2 * W  # the last layer's output; the gradient of its norm, which the loss gives
    trained = k * step + Q + 2 * K  # the share of token embeddings in query, key and value

    num_trained = share * num_slots
    # At the end of the forward pass outputs stand side by side, and logits of one chunk and the target's of its slots.
    logits = min(CHUNK_ELEMENTS, k * num_trained * shape.draft_vocab_size)
    loss = k * W * num_trained + logits * (1 + 1 / k)
    # On the way back, of one layer: gradients of gate, up and their product.
    back = num_trained * (3 * I + (after_attention if recomputed else 0))
    numbers = num_slots * every + (num_slots - num_trained) * idle + num_trained * trained + max(loss, back)
    return round(numbers * size)


def shape_of(config: Any) -> DrafterShape | BlockShape:  # Any: a drafter's config
    """The shape of a drafter of any kind."""
    return (BlockShape if drafts_blocks(config) else DrafterShape).of(config)


def borrowed_bytes(shape: DrafterShape | BlockShape) -> int:
    """Bytes of the head and embeddings that training keeps of a target whose states are stored."""
    return 2 * shape.vocab_size * shape.target_width * HALF


class Forecast(NamedTuple):
    """The cost of a training; sizes in bytes, of one device."""

    trained: int  # weights
    tokens: int  # of all updates and processes
    share: float  # of slots that train, averaged over steps; of a block drafter, of slots that have a block
    flops: float  # a token, target included
    states: int  # weights, gradients and moments of the drafter
    target: int  # its weights; of stored states, its head and embeddings
    activations: int  # of one micro-batch
    tokens_per_second: float | None  # of all devices; None where the device is not known
    seconds: float | None

    @property
    def memory(self) -> int:
        """All together."""
        return self.states + self.target + self.activations

    def __str__(self) -> str:
        text = (
            f"{format_count(self.trained)} trained weights, {format_count(self.tokens)} tokens in all, {self.share:.0%} of "
            f"slots train, {format_count(self.flops, 'FLOP')} a token. A device needs about {format_memory(self.memory)}: "
            f"target {format_memory(self.target)}, drafter and optimizer {format_memory(self.states)}, activations "
            f"{format_memory(self.activations)}."
        )
        if self.tokens_per_second is None or self.seconds is None:
            return text
        return (
            f"{text} At {UTILISATION:.0%} of the arithmetic, {self.tokens_per_second:,.0f} tokens/s: "
            f"{format_seconds(self.seconds)}."
        )


def make_forecast(
    drafter: DrafterShape | BlockShape,
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
    """Compute a `Forecast`.

    Args:
        drafter, target: Their shapes; no target where its states are stored.
        trained: Weights that the optimizer changes.
        target_bytes: On one device; 0 where none is loaded.
        lengths: Tokens of some of the data's documents.
        rows_at_once: Rows of one micro-batch on one device.
        num_rows: Rows of all updates and devices.
        share: See `drafter_flops`.
        ttt_steps: k; of a block drafter, the depths of a block.
        recomputed: See `drafter_flops`.
        has_average: Whether there is an average of the weights.
        num_devices: That compute.
        device_name: The GPU's name; None elsewhere.
    """
    mean = sum(lengths) / len(lengths)
    T = sum(int(n) ** 2 for n in lengths) / sum(lengths)  # of the document that a token is in
    flops = drafter.count_flops(T, ttt_steps, share, recomputed=recomputed)
    flops += 0 if target is None else target_flops(target, T)
    tokens = round(num_rows * mean)
    peak = next((p for name, p in SUSTAINED.items() if name in (device_name or "")), None)
    speed = None if peak is None else num_devices * UTILISATION * peak / flops
    return Forecast(
        trained=trained,
        tokens=tokens,
        share=share,
        flops=flops,
        states=trained * (STATE_BYTES + (4 if has_average else 0)),
        target=target_bytes or borrowed_bytes(drafter),
        activations=drafter.count_bytes(rows_at_once * mean, ttt_steps, share, recomputed=recomputed),
        tokens_per_second=speed,
        seconds=None if speed is None else tokens / speed,
    )


def forecast_training(
    args: Eagle3TrainingArguments,
    plan: Plan,
    rows: Any,  # by index, of any class
    model: nn.Module,
    target: PreTrainedModel | None,
    shape: DrafterShape | BlockShape,
    target_shape: TargetShape | None,
) -> Forecast:
    """The cost of training `model` by `args` on `rows`, by the first of them. Only this process's part of the target counts."""
    some = [rows[i] for i in range(min(FORECAST_ROWS, len(rows)))]
    lengths = [int(n) for row in some for n in row.get("lengths", [len(row["input_ids"])])]
    depth = np.concatenate(
        [live_steps(np.asarray(r["loss_mask"], bool), [len(r["input_ids"])], plan.num_steps) for r in some]
    )
    update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_rows = args.max_steps * update if args.max_steps > 0 else args.num_train_epochs * len(rows)
    per_row = len(lengths) / len(some)
    share = float(depth.mean() / plan.num_steps)
    if plan.num_blocks is not None:
        batch = args.per_device_train_batch_size * len(depth) / len(some)  # tokens
        share = min(float((depth > 0).mean()), plan.num_blocks / batch)
    return make_forecast(
        shape,
        target_shape,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        target_bytes=0 if target is None else sum(local(p).nbytes for p in target.parameters()),
        lengths=lengths,
        rows_at_once=round(args.per_device_train_batch_size * per_row),
        num_rows=num_rows * per_row,
        share=share,
        ttt_steps=plan.num_steps,
        recomputed=args.recomputes_activations,
        has_average=args.ema_decay > 0,
        num_devices=args.world_size,
        device_name=torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None,
    )
