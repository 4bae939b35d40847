"""The target's hidden states of a batch, computed by the target: those that a drafter reads, and those that its head reads."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import logging

from ...kernels.fusion import FusedElements
from ...recorder import StateRecorder, find_layers
from ...rows.attention import UnfitError
from ...tensor_parallel import is_spread
from ..step.batch import Batch, States
from ..step.target_head import TargetHead
from .packed import attending_by_documents, attends_by_interface

logger = logging.get_logger(__name__)

MAX_DIFFERENCE = 0.05  # relative, between states: far above rounding, far below the effect of seeing another document
MAX_PADDING = 0.1  # share of padding in one target forward
KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LENGTH_STEP = 128  # on a GPU rows are padded to a multiple of it: cuDNN plans its attention once for each shape


class StateSource(Protocol):
    """A source of hidden states."""

    @property
    def head(self) -> TargetHead:
        """The head that reads the last hidden states."""
        ...

    @property
    def target(self) -> PreTrainedModel:
        """The model that a drafter binds to: `config`, `get_input_embeddings()`, `get_output_embeddings()`."""
        ...

    def states(self, batch: Batch) -> States:
        """The hidden states of `batch`, on its device."""
        ...


class OnlineStates:
    """The frozen target, run over each batch.

    Documents run end to end where the target's attention can keep them apart. Otherwise documents of similar length run
    side by side, padded on the right without a mask: causal attention never reads the padding.

    Args:
        target: Any decoder of the host.
        aux_layer_ids: Boundaries, as the bound drafter has them.
        max_tokens: Tokens of one forward, padding included; a longer document runs alone.
        use_kernels: Norms, rotary embeddings and gated MLPs of a 16-bit target on a GPU as kernels of ours, where they
            agree with its own. A target that processes share keeps its own.
        packs: Whether documents go end to end through the target; by default where its attention is plain, on a GPU in 16
            bits, and a trial gives the same states.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        aux_layer_ids: Sequence[int],
        max_tokens: int = 16384,
        use_kernels: bool = True,
        packs: bool | None = None,
    ):
        self._target, self._boundaries, self._max_tokens = target, tuple(aux_layer_ids), max_tokens
        self._is_shared = is_spread(target)
        has_kernels = use_kernels and not self._is_shared
        self._kernels: AbstractContextManager[None] = FusedElements(target) if has_kernels else nullcontext()
        self.head = TargetHead.of(target)
        self._counts_length = rotates_by_length(target)
        self._is_checked, self._packs = False, False if self._counts_length else packs
        self._stream: torch.cuda.Stream | None = None

    @property
    def target(self) -> PreTrainedModel:
        """The target that runs."""
        return self._target

    def states(self, batch: Batch) -> States:
        """Run the target over the documents of `batch`."""
        return self.run(batch.split_documents(), batch.input_ids.device)

    @torch.no_grad()
    def run(self, documents: Sequence[Tensor], device: torch.device) -> States:
        """Run the target over `documents`, each [T] int64 on the host; the states are on `device`.

        On a GPU the target has a stream of its own that waits for nothing, so it runs beside the rest of the last step,
        such as the optimiser's update.
        """
        if not self._runs_beside(device):
            return self._states(documents, device)
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            states = self._states(documents, device)
        main = torch.cuda.current_stream(device)
        main.wait_stream(self._stream)
        for x in states:
            x.record_stream(main)
        return states

    def _runs_beside(self, device: torch.device) -> bool:
        devices = set(getattr(self._target, "hf_device_map", {}).values())
        # On two streams, messages between processes that share the target could go out in different orders.
        is_here = self._target.device == device and len(devices) <= 1
        return device.type == "cuda" and is_here and not self._is_shared

    def _states(self, documents: Sequence[Tensor], device: torch.device) -> States:
        if not self._is_checked:
            self._check_target(documents[0][None, :64].to(self._target.device))
        if self._packs is None:
            self._packs = self._can_pack(documents)
        run = self._run_packed if self._packs and len(documents) > 1 else self._run_side_by_side
        aux, last = run(documents, device)
        return States(aux[0], last[0]) if len(documents) == 1 else States(torch.cat(aux), torch.cat(last))

    def _run_side_by_side(
        self, documents: Sequence[Tensor], device: torch.device
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Aux and last hidden states of each document, those of like length in one padded forward."""
        lengths = [len(document) for document in documents]
        aux: list[Tensor] = [documents[0]] * len(documents)
        last = list(aux)
        for group in group_by_length(lengths, self._max_tokens, 0 if self._counts_length else MAX_PADDING):
            rows = torch.nn.utils.rnn.pad_sequence([documents[i] for i in group], batch_first=True)  # [b, T]
            if device.type == "cuda":
                step = 1 if self._counts_length else LENGTH_STEP
                rows = F.pad(rows, (0, -rows.shape[1] % step)).pin_memory()
            group_aux, group_last = self._run(rows.to(self._target.device, non_blocking=True), device)
            for row, i in enumerate(group):
                aux[i], last[i] = group_aux[row, : lengths[i]], group_last[row, : lengths[i]]
        return aux, last

    def _run_packed(self, documents: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """The same with documents end to end: no padding, and one forward for up to `max_tokens`."""
        aux, last, there = [], [], self._target.device
        for part in _parts([len(document) for document in documents], self._max_tokens):
            here = documents[part]
            lengths = [len(document) for document in here]
            row = torch.cat(list(here))[None]
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            with attending_by_documents(self._target, lengths, there):
                part_aux, part_last = self._run(
                    row.to(there, non_blocking=True), device, position_ids=positions.to(there, non_blocking=True)
                )
            aux.append(part_aux[0])
            last.append(part_last[0])
        return aux, last

    def _can_pack(self, documents: Sequence[Tensor]) -> bool:
        """Whether documents end to end give the states of documents side by side: tried on the first three."""
        device, dtype = self._target.device, self._target.dtype
        if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
            return False
        if not attends_by_interface(self._target):
            logger.info("Documents run side by side: the target has layers that attend in other ways.")
            return False
        few = [document[:256] for document in documents[:3]]
        try:
            packed = [torch.cat(x) for x in self._run_packed([*few, few[0]], device)]
        except UnfitError as reason:
            logger.info(f"Documents run side by side: {reason}.")
            return False
        apart = [torch.cat(x) for x in self._run_side_by_side([*few, few[0]], device)]
        error = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(packed, apart, strict=True))
        if not error < MAX_DIFFERENCE:
            logger.info(f"Documents run side by side: end to end their states differ by {error:.2f}.")
        return error < MAX_DIFFERENCE

    def _run(self, rows: Tensor, device: torch.device, **positions: Tensor) -> tuple[Tensor, Tensor]:
        """Aux and last hidden states [b, T, ...] of `rows` [b, T]."""
        with (
            StateRecorder(self._target, self._boundaries) as recorder,
            sdpa_kernel(KERNELS, set_priority=True),
            self._kernels,
        ):
            if self.head.weight is None:
                last = self._target(input_ids=rows, use_cache=False, **positions).logits
            else:
                last = find_text_model(self._target)(input_ids=rows, use_cache=False, **positions).last_hidden_state
            aux = recorder.take(device)
        if aux.shape[:-1] != rows.shape:
            raise ValueError(
                f"A drafter reads one state [B, T, H] of its target at each boundary, and the layers of "
                f"{type(self._target).__name__} hand on several streams: {list(aux.shape)} where {list(rows.shape)} tokens "
                "were run. No drafter can be trained for it."
            )
        return aux, last.to(device)

    def _check_target(self, row: Tensor) -> None:
        """Try the target on `row` [1, T].

        If its head, applied from outside, gives other logits, the target's own logits are used from now on.

        Raises:
            ValueError: Its logits at a token depend on later tokens.
        """
        self._is_checked = True
        with sdpa_kernel(KERNELS, set_priority=True):
            logits = self._target(input_ids=row, use_cache=False).logits
            self._refuse_lookahead(row, logits)
            if self.head.weight is None:
                return
            last = find_text_model(self._target)(input_ids=row, use_cache=False).last_hidden_state
        if not self.head.check(last[0], logits[0]):
            logger.warning(
                f"{type(self._target).__name__} does more than a linear layer to its last hidden states, so all of its "
                "logits are kept in memory while training: correct, but larger and slower."
            )
            self.head = TargetHead(None, None, self.head.vocab_size)

    def _refuse_lookahead(self, row: Tensor, logits: Tensor) -> None:
        """Compare `logits` [1, T, V] of `row` with those of a row that ends with another token."""
        other = row.clone()
        other[:, -1] = (other[:, -1] + 1) % self.head.vocab_size
        ours, theirs = (x[0, :-1].float() for x in (logits, self._target(input_ids=other, use_cache=False).logits))
        if float((ours - theirs).norm()) > 8 * torch.finfo(logits.dtype).eps * float(ours.norm()):
            raise ValueError(
                f"{type(self._target).__name__} is not causal: what it says of a token depends on the tokens after it, "
                "which are not there yet when it generates. Load it as a decoder (is_decoder=True in its config, if it "
                "was trained as one), or choose another target."
            )


def find_text_model(target: PreTrainedModel) -> nn.Module:
    """The part of `target` from token ids to the last hidden states, which its head reads."""
    module = find_layers(target)[0]
    # In encoders that may be decoders (BERT), layers lie in a module that takes embeddings.
    return module if "input_ids" in inspect.signature(module.forward).parameters else target.get_decoder()


def _parts(lengths: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Runs of documents of up to `max_tokens` together, in order; a longer document alone."""
    first, used = 0, 0
    for i, length in enumerate(lengths):
        if i > first and used + length > max_tokens:
            yield slice(first, i)
            first, used = i, 0
        used += length
    yield slice(first, len(lengths))


def rotates_by_length(target: PreTrainedModel) -> bool:
    """Whether the angles of `target` depend on the longest text of a forward, so that a short one must not be padded."""
    rope = getattr(target.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    sets = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in sets)


def group_by_length(lengths: Sequence[int], max_tokens: int, max_padding: float = MAX_PADDING) -> Iterator[list[int]]:
    """Groups of documents to run side by side: as many as fit, with at most `max_padding` as the share of padding."""
    group: list[int] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = lengths[group[0]] if group else lengths[i]
        total = width * (len(group) + 1)
        if group and (total > max_tokens or total - used - lengths[i] > max_padding * total):
            yield group
            group, used = [], 0
        group.append(i)
        used += lengths[i]
    if group:
        yield group
