"""Recurrent layers in a round: a block runs through them token by token, by the host's own path for one token.

The host has two: one over a prompt, by chunks, and one over a single token behind a state. Plain decoding takes the second
for each new token, so a block that takes it for each of its tokens computes the same, and leaves the state after each of
them (`memory.States`). Everything else in a layer runs over the whole block at once.
"""

import threading
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..recorder import find_layers
from .cache import WRITING
from .layers import find_unknown, has_states, name_layers
from .memory import States
from .substitutes import Substitute

# Classes of the host whose forward over one token reads and writes the states of the cache's layer `layer_idx`, and keeps
# nothing elsewhere; how each mixes tokens.
MIXERS = {
    **dict.fromkeys(
        (
            *("LaraMiniGatedDeltaNet", "OlmoHybridGatedDeltaNet", "Qwen3NextGatedDeltaNet"),
            *("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"),
        ),
        "gated delta net",
    ),
    **dict.fromkeys(("BailingHybridDeltaAttention", "KimiLinearDeltaAttention"), "delta attention"),
    **dict.fromkeys(
        (
            *("BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "Mamba2Mixer", "NemotronHMamba2Mixer"),
            "Zamba2MambaMixer",
        ),
        "Mamba-2",
    ),
    **dict.fromkeys(("FalconMambaMixer", "JambaMambaMixer", "MambaMixer", "ZambaMambaMixer"), "Mamba"),
    **dict.fromkeys(("Lfm2MoeShortConv", "Lfm2ShortConv", "Lfm3ShortConv"), "short convolution"),
}
KEEP_STATES = ("conv", "hybrid", "linear_attention")  # kinds of layers

_lock = threading.Lock()  # of the next
_steppers: "weakref.WeakKeyDictionary[nn.Module, Stepper]" = weakref.WeakKeyDictionary()


def find_mixers(target: PreTrainedModel) -> dict[int, nn.Module]:
    """The modules of `target` that keep states, all of kinds that are known, by their layer."""
    return {
        module.layer_idx: module
        for module in target.modules()
        if type(module).__name__ in MIXERS and type(module).__module__.startswith("transformers.models.")
    }


def why_not_layers(target: PreTrainedModel) -> str | None:
    """What about the layers of `target` our loop does not know, in words; None if it knows all."""
    config: PreTrainedConfig = target.config.get_text_config(decoder=True)
    name = type(target).__name__
    if (unknown := find_unknown(config)) is not None:
        return f"{name} has layers of a kind that our loop does not know ({unknown})"
    if getattr(target, "_is_stateful", False) and not has_states(target):
        return f"{name} keeps states in a way that our loop does not know (none of its layers says so)"
    mixers = find_mixers(target)
    for index, (kind, _) in enumerate(name_layers(config)):
        if kind in KEEP_STATES and index not in mixers:
            layer = type(find_layers(target)[1][index]).__name__
            return f"{name} keeps states in a way that our loop does not know ({kind} in {layer})"
    return None


class Stepper(Substitute):
    """Runs a block through a mixer of the host token by token."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: the host's
        """What the mixer gives, a tensor [B, T, H] or a tuple that begins with one."""
        cache = WRITING.get()
        assert self.original is not None
        if cache is None or cache.block is None or cache.is_first:
            return self.original(*args, **kwargs)
        layer = cache.layers[self.module.layer_idx]
        assert isinstance(layer, States)
        hidden_states: Tensor = args[0] if args else kwargs.pop("hidden_states")
        kwargs["attention_mask"] = None  # as for one token of plain decoding
        T = hidden_states.shape[1]
        layer.begin(T)
        outputs = []
        for token in range(T):
            layer.advance(token)
            outputs.append(self.original(hidden_states[:, token : token + 1], *args[1:], **kwargs))
        if isinstance(outputs[0], tuple):
            return torch.cat([output[0] for output in outputs], dim=1), *outputs[-1][1:]
        return torch.cat(outputs, dim=1)


class Stepping:
    """Lets recurrent layers of `target` take blocks token by token. A context for the forwards of rounds.

    It may be entered again and again; a second exit, as after an interrupt, does nothing.
    """

    def __init__(self, target: PreTrainedModel):
        with _lock:
            self._steppers = [_steppers.setdefault(m, Stepper(m)) for m in find_mixers(target).values()]

    def __enter__(self) -> None:
        for stepper in self._steppers:
            stepper.enter(self)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stepper in self._steppers:
            stepper.leave(self)
