"""What weights cost to read: at few tokens, reading them is nearly all the time a forward takes."""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..drafters.kinds import find_kind
from ..recorder import find_layers
from ..speculation.shape import chain

NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # as configs of the host call it
EXPERTS = ".experts."  # part of the name of an expert's weights; shared ones are called otherwise
READ_ONCE = ("fc", "input_norm", "mask_hidden")  # of a drafter: by its first step alone
LOOKED_UP = "embed_tokens"  # a row for each token


@dataclass(frozen=True)
class Experts:
    """The routed experts of a target."""

    num_experts: int  # E, in each layer that has any
    num_chosen: int  # k, of each token
    num_layers: int  # that have experts
    num_bytes: int  # of all of them, in all layers


@dataclass(frozen=True)
class Weights:
    """What a round reads of weights, in bytes."""

    num_always: int  # of the target, by every forward
    num_drafting: int  # of the drafter, by all steps of a draft
    experts: Experts | None


@dataclass
class Reads:
    """What a round is expected to read of weights, and how long that takes."""

    kind: str
    batch_size: int
    num_tokens: int  # M, of the target's forward
    num_experts: float | None  # expected, in each layer; None without experts
    num_bytes: float
    milliseconds: float  # to read them
    measured_milliseconds: float  # the round


def read_counts(target: PreTrainedModel) -> tuple[int, int] | None:
    """E and k; None of a target without experts."""
    config = target.config.get_text_config(decoder=True)
    num_experts = next((n for name in NUM_EXPERTS if (n := getattr(config, name, None))), None)
    num_chosen = getattr(config, "num_experts_per_tok", None)
    return (num_experts, num_chosen) if num_experts and num_chosen else None


def has_experts(target: PreTrainedModel) -> bool:
    """Whether `target` is a mixture of experts."""
    return read_counts(target) is not None


def find_experts(target: PreTrainedModel) -> Experts | None:
    """The experts of `target`; None if it has none, or keeps them where they are not its parameters."""
    counts = read_counts(target)
    weights = [(name, p) for name, p in target.named_parameters() if EXPERTS in name]
    if counts is None or not weights:
        return None
    layers = {name.split(EXPERTS)[0] for name, _ in weights}
    return Experts(*counts, len(layers), sum(p.numel() * p.element_size() for _, p in weights))


def expect_distinct(num_experts: int, num_chosen: int, num_tokens: int) -> float:
    """How many of E experts M tokens are expected to choose, k each: E * (1 - (1 - k/E)^M).

    A token leaves a given expert out with probability 1 - k/E; if routing is uniform and tokens independent, all M do
    with probability (1 - k/E)^M, and expectations add. Routers that favour some experts, and texts whose tokens choose
    alike, read fewer: it is an upper bound on the mean.
    """
    return num_experts * (1 - (1 - num_chosen / num_experts) ** num_tokens)


def find_weights(target: PreTrainedModel, drafter: PreTrainedModel, depth: int) -> Weights | None:
    """What a round of `depth` draft steps reads; None of experts that are no parameters of the target."""
    experts = find_experts(target)
    if experts is None and has_experts(target):
        return None
    decoder, head = find_layers(target)[0], target.get_output_embeddings()  # what sees images is no part of a round
    read = {id(p): p.nbytes for module in (decoder, head) if module is not None for p in module.parameters()}
    embedding = target.get_input_embeddings().weight
    if head is None or head.weight is not embedding:
        read.pop(id(embedding), None)
    num_always = sum(read.values()) - (0 if experts is None else experts.num_bytes)
    parts = [(name, p.nbytes) for name, p in drafter.named_parameters() if not name.startswith(LOOKED_UP)]
    once = sum(n for name, n in parts if name.startswith(READ_ONCE))
    each = sum(n for _, n in parts) - once
    if drafter.config.share_lm_head and head is not None:
        each += head.weight.nbytes
    num_forwards = find_kind(drafter.config).count_forwards(chain(depth))
    return Weights(num_always, (once if depth else 0) + num_forwards * each, experts)


def account(
    weights: Weights,
    *,
    kind: str,
    batch_size: int,
    num_tokens: int,
    is_drafted: bool,
    measured_seconds: float,
    bandwidth: float,
) -> Reads:
    """What a round with a forward over `num_tokens` reads at `bandwidth` bytes a second."""
    experts, distinct = weights.experts, None
    num_bytes: float = weights.num_always + (weights.num_drafting if is_drafted else 0)
    if experts is not None:
        distinct = expect_distinct(experts.num_experts, experts.num_chosen, num_tokens)
        num_bytes += experts.num_bytes * distinct / experts.num_experts
    milliseconds = 1e3 * num_bytes / bandwidth
    return Reads(kind, batch_size, num_tokens, distinct, num_bytes, milliseconds, 1e3 * measured_seconds)


def measure_read_bandwidth(device: torch.device, *, repeats: int = 10) -> float:
    """Bytes a second that sums over a tensor larger than any cache reach; the median of `repeats`."""
    is_cuda = device.type == "cuda"
    x = torch.ones(2**28 if is_cuda else 2**25, dtype=torch.float32, device=device)  # 1 GiB; 128 MiB
    x.sum()
    seconds = []
    for _ in range(repeats):
        if is_cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            x.sum()
            stop.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(stop) / 1e3)
        else:
            began = time.perf_counter()
            x.sum()
            seconds.append(time.perf_counter() - began)
    return x.numel() * x.element_size() / sorted(seconds)[repeats // 2]
