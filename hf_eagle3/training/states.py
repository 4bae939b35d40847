"""The target's hidden states of a batch: what a drafter reads, and what the target's head reads."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import logging

from ..features import StateRecorder, find_layers
from ..kernels.fusion import FusedElements
from .batch import Batch
from .target_head import TargetHead

logger = logging.get_logger(__name__)

MAX_PADDING = 0.1  # of the tokens of one target forward
KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LENGTH_STEP = 128  # on a GPU rows are padded to a multiple of it: cuDNN plans its attention once for each shape


class States(NamedTuple):
    """Of the N tokens of a flat batch."""

    aux_hidden_states: Tensor  # [N, A*Ht], at the drafter's boundaries, ascending
    last_hidden_states: Tensor  # [N, Ht], after the final norm: what the head reads; [N, V] if `head` takes logits


class StateSource(Protocol):
    """Where hidden states come from."""

    head: TargetHead

    def states(self, batch: Batch) -> States:
        """The hidden states of `batch`, on its device."""
        ...


class OnlineStates:
    """The frozen target, run over each batch.

    Documents of like length run side by side, padded on the right without a mask: causal attention never looks there, and
    without a mask its fast kernels apply.

    Args:
        target: Any decoder of the host.
        aux_layer_ids: Boundaries, as the bound drafter has them.
        max_tokens: Of one forward, padding included; a longer document runs alone.
        use_kernels: Norms, rotary embeddings and gated MLPs of a 16-bit target on a GPU as kernels of ours, where they
            agree with its own.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        aux_layer_ids: Sequence[int],
        max_tokens: int = 16384,
        use_kernels: bool = True,
    ):
        self._target, self._boundaries, self._max_tokens = target, tuple(aux_layer_ids), max_tokens
        self._kernels: AbstractContextManager[None] = FusedElements(target) if use_kernels else nullcontext()
        self.head = TargetHead.of(target)
        self._is_checked = False
        self._stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def states(self, batch: Batch) -> States:
        """Run the target over the documents of `batch`.

        On a GPU it has a stream of its own that waits for nothing: the target of this batch runs beside what is still to
        do for the last one, such as the optimiser's step.
        """
        device = batch["input_ids"].device
        if not self._runs_beside(device):
            return self._states(batch, device)
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            states = self._states(batch, device)
        main = torch.cuda.current_stream(device)
        main.wait_stream(self._stream)
        for x in states:
            x.record_stream(main)
        return states

    def _runs_beside(self, device: torch.device) -> bool:
        return device.type == "cuda" and self._target.device == device and not hasattr(self._target, "hf_device_map")

    def _states(self, batch: Batch, device: torch.device) -> States:
        lengths = batch["lengths"]
        documents = torch.from_numpy(batch["tokens"]).split(lengths)
        aux: list[Tensor] = [documents[0]] * len(lengths)
        last = list(aux)
        for group in group_by_length(lengths, self._max_tokens):
            rows = torch.nn.utils.rnn.pad_sequence([documents[i] for i in group], batch_first=True)  # [b, T]
            if device.type == "cuda":
                rows = F.pad(rows, (0, -rows.shape[1] % LENGTH_STEP)).pin_memory()
            rows = rows.to(self._target.device, non_blocking=True)
            if not self._is_checked:
                self._check_head(rows[:1, : lengths[group[0]]])
            group_aux, group_last = self._run(rows, device)
            for row, i in enumerate(group):
                aux[i], last[i] = group_aux[row, : lengths[i]], group_last[row, : lengths[i]]
        if len(lengths) == 1:
            return States(aux[0], last[0])
        return States(torch.cat(aux), torch.cat(last))

    def _run(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Aux and last hidden states [b, T, ...] of `rows` [b, T]."""
        with (
            StateRecorder(self._target, self._boundaries) as recorder,
            sdpa_kernel(KERNELS, set_priority=True),
            self._kernels,
        ):
            if self.head.weight is None:
                last = self._target(input_ids=rows, use_cache=False).logits
            else:
                last = find_layers(self._target)[0](input_ids=rows, use_cache=False).last_hidden_state
            return recorder.take(device), last.to(device)

    def _check_head(self, row: Tensor) -> None:
        """Take logits as the target gives them, from now on, if its head applied from outside gives others."""
        self._is_checked = True
        if self.head.weight is None:
            return
        row = row[:, :64]
        with sdpa_kernel(KERNELS, set_priority=True):
            last = find_layers(self._target)[0](input_ids=row, use_cache=False).last_hidden_state
            logits = self._target(input_ids=row, use_cache=False).logits
        if not self.head.check(last[0], logits[0]):
            logger.warning(
                f"{type(self._target).__name__} does more than a linear layer to its last hidden states, so all of its "
                "logits are kept in memory while training: correct, but larger and slower."
            )
            self.head = TargetHead(None, None, self.head.vocab_size)


def group_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Documents to run side by side: as many as fit, as long as padding stays below `MAX_PADDING`."""
    group: list[int] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = lengths[group[0]] if group else lengths[i]
        total = width * (len(group) + 1)
        if group and (total > max_tokens or total - used - lengths[i] > MAX_PADDING * total):
            yield group
            group, used = [], 0
        group.append(i)
        used += lengths[i]
    if group:
        yield group
