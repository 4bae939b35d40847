"""Reading the target's residual stream at the boundaries a drafter asks for, from any host model."""

import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


def find_layers(target: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the text decoder, and its decoder layers.

    Raises:
        ValueError: No list of as many layers as the text config states.
    """
    config = target.config.get_text_config(decoder=True)
    num_layers = config.num_hidden_layers
    decoder = target.get_decoder()
    if decoder is target.get_output_embeddings():  # a head of that name, as ModernBERT's
        decoder = target.base_model
    for module in (decoder, *decoder.modules()):
        if type(getattr(module, "config", config)) not in (type(config), type(target.config)):  # of an image encoder
            continue
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return module, child
    raise ValueError(
        f"{type(target).__name__} has no list of {num_layers} decoder layers, so its states cannot be read at layer "
        "boundaries. Call generate() without assistant_model."
    )


def find_skippable(target: PreTrainedModel) -> set[int]:
    """Decoder layers of `target` that do not run for a text without images, as Mllama's that look at images."""
    return set(getattr(target.config.get_text_config(decoder=True), "cross_attention_layers", None) or ())


class StateRecorder:
    """Keeps the aux hidden states of the target's last forward, through hooks on exactly the boundaries needed.

    Boundary i < n is the input of layer i; boundary n is the output of the last layer, before the final norm, and n + 1
    what leaves that norm. No boundaries at all means n + 1 alone. The input of a layer that is skipped is that of the
    next one that runs. Use as a context manager: the hooks go when it closes. Forwards of other threads than the one
    that opened it are theirs.

    Args:
        target: Any decoder of the host; a vision-language model is read at its text decoder.
        aux_layer_ids: Ascending boundaries, as `Eagle3DrafterConfig.resolve_aux_layer_ids` gives them; None where nobody
            reads states, which then have no width.
    """

    def __init__(self, target: PreTrainedModel, aux_layer_ids: tuple[int, ...] | None):
        self._target = target
        self.aux_layer_ids = aux_layer_ids
        self._states: dict[int, list[Tensor]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []
        self._in_chunks = False

    def __enter__(self) -> "StateRecorder":
        self._thread = threading.get_ident()
        decoder, layers = find_layers(self._target)
        n, skippable = len(layers), find_skippable(self._target)
        self._boundaries = (0,) if self.aux_layer_ids is None else self.aux_layer_ids or (n + 1,)
        for boundary in self._boundaries:
            first, last = boundary, boundary
            while last in skippable:
                last += 1
            if last < n:
                has_run: list[int] = []
                for layer in range(first, last + 1):
                    keep = self._on_input(boundary, has_run, is_last=layer == last)
                    self._handles.append(layers[layer].register_forward_pre_hook(keep, with_kwargs=True))
            else:
                module = layers[-1] if boundary == n else decoder
                self._handles.append(module.register_forward_hook(self._on_output(boundary)))
        # Gemma 4 runs its later layers over the positions alone that logits are asked of.
        if "logits_to_keep" in inspect.signature(decoder.forward).parameters:
            self._handles.append(decoder.register_forward_pre_hook(self._keep_all_positions, with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._states.clear()

    @contextmanager
    def in_chunks(self) -> Iterator[None]:
        """Keep the states of each forward, one behind the other, not of the last alone."""
        self._states.clear()
        self._in_chunks = True
        try:
            yield
        finally:
            self._in_chunks = False

    def _keep_all_positions(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return args, ({**kwargs, "logits_to_keep": 0} if threading.get_ident() == self._thread else kwargs)

    def _keep(self, boundary: int, state: Tensor) -> None:
        if threading.get_ident() != self._thread:
            return
        # Gemma 3n has several streams, one of which each layer predicts and corrects the others by.
        stream = getattr(self._target.config.get_text_config(decoder=True), "altup_active_idx", None)
        if state.dim() == 4 and stream is not None:
            state = state[stream]
        if self.aux_layer_ids is None:
            state = state[..., :0]
        if not self._in_chunks:
            self._states[boundary].clear()
        self._states[boundary].append(state)

    def _on_input(self, boundary: int, has_run: list[int], *, is_last: bool) -> Callable:
        """A hook for one of the layers whose first to run has the boundary as its input, the `is_last` one always."""

        def keep(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not has_run:
                self._keep(boundary, args[0] if args else kwargs["hidden_states"])
            has_run[:] = [] if is_last else [boundary]

        return keep

    def _on_output(self, boundary: int) -> Callable:
        def keep(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
            self._keep(boundary, output if isinstance(output, Tensor) else output[0])

        return keep

    def take(self, device: torch.device | str, *, drop_last: int = 0) -> Tensor:
        """Aux hidden states [B, T, A*Ht] of the last forward, on `device`, ascending boundaries; then forget them.

        Args:
            device: Where to put them.
            drop_last: Leave out so many positions at the end.
        """
        if not self._states:
            raise RuntimeError("No target forward ran since the states were last taken.")
        parts = [self._states[boundary] for boundary in sorted(self._states)]
        states = [part[0] if len(part) == 1 else torch.cat(part, dim=1) for part in parts]  # [B, T + drop_last, Ht]
        self._states.clear()
        keep = states[0].shape[1] - drop_last
        return torch.cat([state[:, :keep].to(device) for state in states], dim=-1)
