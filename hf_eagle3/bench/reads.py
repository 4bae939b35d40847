"""The cost of reading weights, which is nearly all the time of a forward over few tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..drafters.kinds import find_kind
from ..recorder import find_layers
from ..speculation.shape import chain
from ..tensor_parallel import is_spread
from .names import DRAFTED, is_drafting
from .results import Measured
from .ways import OF_OTHERS

NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names in host configs
EXPERTS = ".experts."  # part of the name of routed experts' weights
READ_ONCE = ("fc", "input_norm", "mask_hidden")  # parts of a drafter that its first step alone reads
LOOKED_UP = ("embed_tokens", "markov_head.markov_w1", "confidence_head")  # a row for each token, or nothing
EACH_DEPTH = "markov_head."  # what is read for each depth, also where one forward drafts all of them


@dataclass(frozen=True)
class Experts:
    """The routed experts of a target."""

    num_experts: int  # E, in each layer that has any
    num_chosen: int  # k, of each token
    num_layers: int  # that have experts
    num_bytes: int  # of all of them, in all layers


@dataclass(frozen=True)
class Weights:
    """Bytes of weights that a round reads."""

    num_always: int  # the target's, read by every forward
    num_drafting: int  # the drafter's, over all steps of a draft
    experts: Experts | None


class Account(NamedTuple):
    """Weights that rounds read, and how fast they are read."""

    weights: Weights
    bandwidth: float  # bytes a second
    how: str  # given, or measured


@dataclass
class Reads:
    """Bytes of weights that a round is expected to read, and the time that takes."""

    kind: str
    batch_size: int
    num_tokens: int  # M, of the target's forward
    num_experts: float | None  # expected, in each layer; None without experts
    num_bytes: float
    milliseconds: float  # to read them
    measured_milliseconds: float  # the round


def read_counts(target: PreTrainedModel) -> tuple[int, int] | None:
    """E and k; None for a target without experts."""
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
    """Bytes that a round of `depth` draft steps reads; None if the experts are no parameters of the target."""
    experts = find_experts(target)
    if experts is None and has_experts(target):
        return None
    decoder, head = (
        find_layers(target)[0],
        target.get_output_embeddings(),
    )  # the part for images takes no part in a round
    read = {id(p): p.nbytes for module in (decoder, head) if module is not None for p in module.parameters()}
    embedding = target.get_input_embeddings().weight
    if head is None or head.weight is not embedding:
        read.pop(id(embedding), None)
    num_always = sum(read.values()) - (0 if experts is None else experts.num_bytes)
    parts = [(name, p.nbytes) for name, p in drafter.named_parameters() if not name.startswith(LOOKED_UP)]
    once = sum(n for name, n in parts if name.startswith(READ_ONCE))
    for_depth = sum(n for name, n in parts if name.startswith(EACH_DEPTH))
    each = sum(n for _, n in parts) - once - for_depth
    if drafter.config.share_lm_head and head is not None:
        each += head.weight.nbytes
    num_forwards = find_kind(drafter.config).count_forwards(chain(depth))
    return Weights(num_always, (once if depth else 0) + num_forwards * each + depth * for_depth, experts)


def make_account(
    target: PreTrainedModel, drafter: PreTrainedModel, depth: int, read_bandwidth: float | None
) -> Account | None:
    """Weights and bandwidth; None where some weights are no whole parameters of the target.

    Args:
        target: The target.
        drafter: Its drafter.
        depth: Draft steps a round.
        read_bandwidth: Terabytes a second; measured if it is not given.
    """
    weights = None if is_spread(target) else find_weights(target, drafter, depth)
    if weights is None:
        return None
    if read_bandwidth:
        return Account(weights, 1e12 * read_bandwidth, "given")
    return Account(weights, measure_read_bandwidth(target.device), "measured")


def account_for(results: Sequence[Measured], account: Account, *, depth: int, num_processes: int) -> list[Reads]:
    """The cost of reading weights in a round of each kind; plain kinds have one token a row, drafts K+1."""
    reads = []
    for r in results:
        # Where it is not known here how many tokens a round verifies.
        if r.kind in OF_OTHERS or (is_drafting(r.kind) and r.kind != DRAFTED):
            continue
        is_drafted = r.kind == DRAFTED
        gained = r.acceptance_length if is_drafted and r.acceptance_length is not None else 1.0
        num_tokens = r.batch_size * (depth + 1 if is_drafted else 1)
        num_bytes, num_experts = count_bytes(account.weights, num_tokens, is_drafted=is_drafted)
        seconds = num_processes * r.batch_size * gained / r.tokens_per_second
        milliseconds = 1e3 * num_bytes / account.bandwidth
        reads.append(Reads(r.kind, r.batch_size, num_tokens, num_experts, num_bytes, milliseconds, 1e3 * seconds))
    return reads


def count_bytes(weights: Weights, num_tokens: int, *, is_drafted: bool) -> tuple[float, float | None]:
    """Bytes that a round with a forward over `num_tokens` reads, and the experts among them; None without experts."""
    num_bytes: float = weights.num_always + (weights.num_drafting if is_drafted else 0)
    experts = weights.experts
    if experts is None:
        return num_bytes, None
    distinct = expect_distinct(experts.num_experts, experts.num_chosen, num_tokens)
    return num_bytes + experts.num_bytes * distinct / experts.num_experts, distinct


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
