"""The target's hidden states of a batch: what a drafter reads, and what the target's head reads."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..features import StateRecorder, find_layers
from ..unroll import attention_kernels
from .batch import Batch
from .target_head import TargetHead

logger = logging.get_logger(__name__)

MAX_PADDING = 0.1  # of the tokens of one target forward


class States(NamedTuple):
    """Of the N tokens of a flat batch."""

    aux_hidden_states: Tensor  # [N, A*Ht], at the drafter's boundaries, ascending
    last_hidden_states: Tensor  # [N, Ht], after the final norm: what the head reads; [N, V] if `head` takes logits


class StateSource(Protocol):
    """Where hidden states come from."""

    head: TargetHead

    @property
    def target(self) -> PreTrainedModel:
        """What a drafter binds to: `config`, `get_input_embeddings()`, `get_output_embeddings()`."""
        ...

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
    """

    def __init__(self, target: PreTrainedModel, aux_layer_ids: Sequence[int], max_tokens: int = 16384):
        self._target, self._boundaries, self._max_tokens = target, tuple(aux_layer_ids), max_tokens
        self.head = TargetHead.of(target)
        self._is_checked = False

    @property
    def target(self) -> PreTrainedModel:
        """The target that runs."""
        return self._target

    @torch.no_grad()
    def states(self, batch: Batch) -> States:
        """Run the target over the documents of `batch`."""
        ids, lengths = batch["input_ids"], batch["lengths"]
        documents = ids.split(lengths)
        aux: list[Tensor] = [ids] * len(lengths)
        last = list(aux)
        for group in group_by_length(lengths, self._max_tokens):
            rows = torch.nn.utils.rnn.pad_sequence([documents[i] for i in group], batch_first=True)  # [b, T]
            if not self._is_checked:
                self._check_head(rows[:1, : lengths[group[0]]])
            group_aux, group_last = self._run(rows, ids.device)
            for row, i in enumerate(group):
                aux[i], last[i] = group_aux[row, : lengths[i]], group_last[row, : lengths[i]]
        return States(torch.cat(aux), torch.cat(last))

    def _run(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Aux and last hidden states [b, T, ...] of `rows` [b, T]."""
        rows = rows.to(self._target.device)
        with StateRecorder(self._target, self._boundaries) as recorder, attention_kernels():
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
        row = row[:, :64].to(self._target.device)
        with attention_kernels():
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
