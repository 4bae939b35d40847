"""Recurrent layers in a round: a block runs through them token by token, by the host's own path for one token.

The host has two: one over a prompt, by chunks, and one over a single token behind a state. Plain decoding takes the second
for each new token, so a block that takes it for each of its tokens computes the same, and leaves the state after each of
them (`memory.States`). Everything else in a layer runs over the whole block at once.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ..recorder import find_layers
from . import delta_nets, state_spaces
from .attention import UnfitError, attending_by_rows
from .cache import REPLAYING, WRITING, RowCache
from .layers import KINDS, find_unknown, has_states, name_layers
from .states import States
from .substitutes import Substitute


@dataclass(frozen=True)
class Mixer:
    """How a recurrent layer of the host mixes tokens.

    Attributes:
        kind: In words.
        entries: Its parts that see nothing but the layer's input, token by token, and
        exit: the last one, whose output is the layer's. Both may run over a whole block at once.
        is_in_place: Whether recurrent states are changed where they are, and not handed to the cache anew.
        continues: Whether the host's path over several tokens begins with the states that it is given.
    """

    kind: str
    entries: tuple[str, ...]
    exit: str | None = "out_proj"
    is_in_place: bool = False
    continues: bool = True


DELTA_NET = Mixer("gated delta net", ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))
DELTA = ("q_proj", "k_proj", "v_proj", "b_proj")
# To 5.24 at least, the scan of Mamba takes no state to begin with.
MAMBA = Mixer("Mamba", ("in_proj",), is_in_place=True, continues=False)
MAMBA2, CONVOLUTION = Mixer("Mamba-2", ("in_proj",), is_in_place=True), Mixer("short convolution", ("in_proj",))
# By class of the host: those whose forward over one token reads and writes the states of the cache's layer `layer_idx`, and
# keeps nothing elsewhere.
MIXERS = {
    **dict.fromkeys(("LaraMiniGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"), DELTA_NET),
    "Qwen3NextGatedDeltaNet": Mixer("gated delta net", ("in_proj_qkvz", "in_proj_ba")),
    "OlmoHybridGatedDeltaNet": Mixer("gated delta net", (*DELTA, "a_proj", "g_proj"), "o_proj"),
    "BailingHybridDeltaAttention": Mixer("delta attention", (*DELTA, "g_proj"), "o_proj"),
    "KimiLinearDeltaAttention": Mixer("delta attention", (*DELTA, "g_a_proj", "forget_gate"), "o_proj"),
    "FalconH1Mixer": Mixer("Mamba-2", (), is_in_place=True),  # it scales its input before
    **dict.fromkeys(
        ("BambaMixer", "GraniteMoeHybridMambaLayer", "Mamba2Mixer", "NemotronHMamba2Mixer", "Zamba2MambaMixer"), MAMBA2
    ),
    **dict.fromkeys(("FalconMambaMixer", "JambaMambaMixer", "MambaMixer", "ZambaMambaMixer"), MAMBA),
    **dict.fromkeys(("Lfm2MoeShortConv", "Lfm2ShortConv", "Lfm3ShortConv"), CONVOLUTION),
    "ZayaCCAProjection": Mixer("convolutions before attention", ("q_proj", "k_proj", "v_proj_current"), None),
}

# By class of the host: what runs a block at once, as captured rounds do.
BLOCKS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(delta_nets.DELTA_NETS, delta_nets.run_block),
    **dict.fromkeys(state_spaces.STATE_SPACES, state_spaces.run_block),
}

_lock = threading.Lock()  # of the next
_steppers: "weakref.WeakKeyDictionary[nn.Module, Stepper]" = weakref.WeakKeyDictionary()


def find_mixers(target: PreTrainedModel) -> dict[int, nn.Module]:
    """The modules of `target` that keep states, all of kinds that are known, by their layer."""
    return {
        module.layer_idx: module
        for module in target.modules()
        if type(module).__name__ in MIXERS and type(module).__module__.startswith("transformers.models.")
    }


def continues(target: PreTrainedModel) -> bool:
    """Whether plain decoding of `target` goes on from a cache with several tokens as if it had them all at once."""
    return all(MIXERS[type(module).__name__].continues for module in find_mixers(target).values())


def why_not_layers(target: PreTrainedModel) -> str | None:
    """What about the layers of `target` our loop does not know, in words; None if it knows all."""
    config: PreTrainedConfig = target.config.get_text_config(decoder=True)
    name = type(target).__name__
    if (unknown := find_unknown(config)) is not None:
        return f"{name} has layers of a kind that our loop does not know ({unknown})"
    if getattr(target, "_is_stateful", False) and not has_states(target):
        return f"{name} keeps states in a way that our loop does not know (none of its layers says so)"
    mixers, places = find_mixers(target), DynamicCache(config=config).layers
    for index, (kind, _) in enumerate(name_layers(config)):
        if not issubclass(KINDS[kind].memory, States):
            continue
        if index not in mixers or places[index].number_of_states > 1:
            layer = type(find_layers(target)[1][index]).__name__
            return f"{name} keeps states in a way that our loop does not know ({kind} in {layer})"
    return None


class Slices(nn.Module):
    """Gives what a part of a mixer made of a whole block, [B, T, N], token by token."""

    def __init__(self, whole: Tensor):
        super().__init__()
        self.whole, self.token = whole, 0

    def forward(self, hidden_states: Tensor) -> Tensor:  # noqa: ARG002  of which the whole was made
        """That of the next token."""
        self.token += 1
        return self.whole[:, self.token - 1 : self.token]


class Collects(nn.Module):
    """Keeps what the last part of a mixer is given, token by token, and gives it back."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Tensor] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, 1, N] as it is."""
        self.parts.append(hidden_states)
        return hidden_states


class Stepper(Substitute):
    """Runs a block through a mixer of the host token by token."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: the host's
        """What the mixer gives, a tensor [B, T, H] or several [B, T, ...]."""
        cache, module = WRITING.get(), self.module
        assert self.original is not None
        if cache is None or cache.block is None or cache.is_first:
            return self.original(*args, **kwargs)
        layer = cache.layers[module.layer_idx]
        assert isinstance(layer, States)
        hidden_states: Tensor = args[0] if args else kwargs.pop("hidden_states")
        T = hidden_states.shape[1]
        if REPLAYING.get():
            return self._replay(cache, layer, hidden_states, kwargs.get("attention_mask"))
        layer.begin(T)
        mixer, parts = MIXERS[type(module).__name__], dict(module._modules)
        if T == 1 or cache.is_stock or self.had_its_own:
            return self._step(self.original, layer, hidden_states, *args[1:], **kwargs)
        for name in mixer.entries:
            parts[name] = Slices(getattr(module, name)(hidden_states))
        collects = None if mixer.exit is None else Collects()
        if mixer.exit is not None:
            parts[mixer.exit] = collects
        # The same weights, with other parts: nothing of the module itself changes.
        double = copy.copy(module)
        vars(double)["_modules"] = parts
        output = self._step(partial(type(module).forward, double), layer, hidden_states, *args[1:], **kwargs)
        if mixer.exit is None or collects is None:
            return output
        return getattr(module, mixer.exit)(torch.cat(collects.parts, dim=1))

    def _replay(self, cache: RowCache, layer: States, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """What the mixer gives for a block [B, T, H] behind what counts of the last one."""
        name = type(self.module).__name__
        if mask is not None:
            raise UnfitError(f"{name} brings a mask of its own")
        if self.had_its_own:
            raise UnfitError(f"{name} has a forward of its own")
        assert layer.replay is not None
        assert cache.replayed is not None
        layer.num_stepped = hidden_states.shape[1]
        return BLOCKS[name](self.module, hidden_states, layer.replay, cache.replayed)

    def _step(self, forward: Callable, layer: States, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What `forward` gives for each token of a block, one after the other."""
        outputs, is_in_place = [], MIXERS[type(self.module).__name__].is_in_place
        for token in range(hidden_states.shape[1]):
            layer.advance(token, is_in_place=is_in_place)
            outputs.append(forward(hidden_states[:, token : token + 1], *args, **kwargs))
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs, dim=1)
        return tuple(torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))


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


@contextmanager
def running_by_rows(*models: PreTrainedModel) -> Iterator[None]:
    """Let layers of `models` attend by rows, and take blocks at once where they keep states: what captured rounds do."""
    token = REPLAYING.set(True)
    try:
        with ExitStack() as stack:
            stack.enter_context(attending_by_rows(*models))
            for model in models:
                stack.enter_context(Stepping(model))
            yield
    finally:
        REPLAYING.reset(token)


def why_not_replayed(target: PreTrainedModel) -> str | None:
    """What keeps the recurrent layers of `target` from taking blocks at once, in words; None if they can."""
    if not has_states(target):
        return None
    name = type(target).__name__
    kinds = {MIXERS[type(m).__name__].kind for m in find_mixers(target).values() if type(m).__name__ not in BLOCKS}
    if kinds or not find_mixers(target):
        return (
            f"{name} has recurrent layers of a kind that is not captured yet ({', '.join(sorted(kinds)) or 'unknown'})"
        )
    return None
