"""Sums over the steps of training and evaluation, added over batches and processes, and the metrics made of them."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from .distributed import sum_over_processes
from .step.acceptance import Walk
from .step.head_loss import StepSums


def add_sums(parts: Iterable[StepSums], steps: int, accelerator: Accelerator) -> StepSums:
    """`parts` summed over batches and processes, without `hits` and `alphas`. All processes must call, with any number of parts."""
    device = accelerator.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(5 * steps + 1, dtype=wide, device=device)
    for part in parts:
        total += torch.cat(
            [x.to(wide).reshape(-1) for x in (part.loss, part.correct, part.alpha, part.num_live, part.path)]
            + [part.num_whole.to(wide).reshape(1)]
        )
    loss, correct, alpha, num_live, path = (total := sum_over_processes(accelerator, total))[:-1].view(5, steps)
    whole = total[-1]
    nothing = torch.empty(steps, 0)
    return StepSums(loss, correct, alpha, num_live, path, whole, nothing.bool(), nothing)


def add_walks(walked: Walk, accelerator: Accelerator) -> Walk:
    """`walked` summed over processes."""
    counts = torch.tensor([walked.rounds, *walked.accepted.tolist()], device=accelerator.device)
    rounds, *accepted = sum_over_processes(accelerator, counts).tolist()
    return Walk(rounds, np.array(accepted, dtype=np.int64))


def by_step(prefix: str, sums: StepSums) -> dict[str, float]:
    """Mean loss and accuracy of each step."""
    count = sums.num_live.clamp_min(1)
    means = {"loss": (sums.loss / count).tolist(), "accuracy": (sums.correct / count).tolist()}
    return {f"{prefix}{name}_{t}": value for name, values in means.items() for t, value in enumerate(values)}


def simulated_acceptance_length(sums: StepSums, depth: int) -> float:
    """1 + the sum over t of the mean over the data of the products of min(1, q/p) up to step t.

    What speculative sampling gains a round, without bias if the data were sampled from the target at the temperature
    they will be decoded with. NaN if no slot has as many steps.
    """
    return float(1 + (sums.path[:depth] / sums.num_whole).sum())


class TrainLog:
    """Sums over the updates since the last log."""

    def __init__(self) -> None:
        self._sums: list[StepSums] = []
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, sums: StepSums, num_tokens: int) -> None:
        """Count a micro-batch."""
        self._sums.append(sums._replace(hits=sums.hits[:, :0], alphas=sums.alphas[:, :0]))
        self._tokens += num_tokens

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training."""
        self._since += seconds

    def take(self, steps: int, accelerator: Any) -> dict[str, float]:  # an Accelerator
        """Loss and accuracy by step, tokens and supervised tokens a second, and start anew. All processes must call."""
        sums = add_sums(self._sums, steps, accelerator)
        tokens = int(sum_over_processes(accelerator, torch.tensor([self._tokens], device=accelerator.device)))
        seconds = time.perf_counter() - self._since
        self._sums, self._tokens, self._since = [], 0, time.perf_counter()
        return {
            **by_step("", sums),
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": float(sums.num_live[0]) / seconds,
        }
