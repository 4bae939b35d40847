"""Rotary embeddings that depend on the length of the text: longrope and dynamic NTK.

Plain decoding rotates a position when the position is new, by the length of the text at that time, and never again. One
forward of ours runs positions of several lengths, where the host would take the longest for all. So here each position
has a length of its own.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .substitutes import Substitute

# Lengths [.., B, T] or [.., B, 1] of the text at position ids [.., B, T].
ToLengths = Callable[[Tensor], Tensor]


def at_once(position_ids: Tensor) -> Tensor:
    """Lengths [.., B, 1] where a forward takes whole rows, as that of a prompt does: each row has its last position."""
    return position_ids.amax(-1, keepdim=True) + 1


def one_by_one(position_ids: Tensor) -> Tensor:
    """Lengths [.., B, T] where plain decoding has a forward for each position, as in a round."""
    return position_ids + 1


_to_lengths: ContextVar[ToLengths | None] = ContextVar("to_lengths", default=None)
_lock = threading.Lock()  # of the next
_rotaries: "weakref.WeakKeyDictionary[nn.Module, LengthRotary]" = weakref.WeakKeyDictionary()


@contextmanager
def rotating(to_lengths: ToLengths) -> Iterator[None]:
    """Let forwards of this thread inside `own_lengths` take the length of each position from `to_lengths`."""
    token = _to_lengths.set(to_lengths)
    try:
        yield
    finally:
        _to_lengths.reset(token)


def parameters_by_layer_type(module: nn.Module) -> dict[str | None, dict[str, Any]]:
    """Parameters of the rotary embeddings of `module` that depend on the length, by layer type, None if it has none."""
    kinds = getattr(module, "rope_type", None)
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    if not isinstance(parameters, dict):
        return {}
    by_type = kinds if isinstance(kinds, dict) else {None: kinds}
    return {
        layer_type: {**(parameters if layer_type is None else parameters[layer_type]), "rope_type": kind}
        for layer_type, kind in by_type.items()
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
    }


class LengthRotary(Substitute):
    """Stands in the place of the `forward` of a rotary embedding that depends on the length.

    Args:
        module: The host's. Only a weak reference is kept.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._parameters = parameters_by_layer_type(module)
        self._known: dict[tuple, Tensor] = {}  # what `_computed` gave
        # Whether longrope's frequencies of long texts go into a buffer of the short ones' dtype: in Transformers 5.24 yes,
        # in 5.17 no. `why_not` finds out.
        self.rounds_long = True

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, D], or [B, T, D/2] where the host's are."""
        to_lengths = _to_lengths.get()
        assert self.original is not None
        if to_lengths is None or layer_type not in self._parameters:
            more = () if layer_type is None else (layer_type,)
            return self.original(x, position_ids, *more)
        return self.rotate(x, position_ids, to_lengths(position_ids), layer_type)

    def rotate(
        self, x: Tensor, position_ids: Tensor, lengths: Tensor, layer_type: str | None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `position_ids` [B, T] in texts of `lengths` [B, T] or [B, 1]."""
        module, parameters = self.module, self._parameters[layer_type]
        prefix = "" if layer_type is None else f"{layer_type}_"
        short = getattr(module, f"{prefix}original_inv_freq").to(x.device)  # [D/2]
        scaling = getattr(module, f"{prefix}attention_scaling")
        inverse: Tensor  # [.., D/2]
        if is_longrope(parameters):
            switch = parameters["original_max_position_embeddings"]
            is_long = (lengths > switch)[..., None]
            if "long_mscale" in parameters:  # Phimoe, whose factors stay short, and are made anew in each forward
                inverse = self._computed(layer_type, x.device, length=None)
                scaling = torch.where(is_long, parameters["long_mscale"], parameters["short_mscale"])
            else:
                long = self._computed(layer_type, x.device, length=switch + 1)
                inverse = torch.where(is_long, long.to(short.dtype) if self.rounds_long else long, short)
        else:
            inverse = stretched(module, parameters, lengths[..., None], short)
        angles = position_ids[..., None].float() * inverse.float()  # [B, T, D/2]
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)

    def _computed(self, layer_type: str | None, device: torch.device, *, length: int | None) -> Tensor:
        """Longrope's inverse frequencies [D/2] for texts of `length`, as the host first computes them."""
        key = (layer_type, device, length)
        if key not in self._known:
            init = ROPE_INIT_FUNCTIONS["longrope"]
            self._known[key] = init(self.module.config, device, seq_len=length, layer_type=layer_type)[0]
        return self._known[key]

    def why_not(self) -> str | None:
        """What tells this from the host's own forward at some lengths; None if nothing does."""
        reason = None
        for rounds_long in (True, False):
            trial = LengthRotary(self.module)
            trial.rounds_long = rounds_long
            if (reason := trial._compare()) is None:
                self.rounds_long = rounds_long
                break
        return reason

    def _compare(self) -> str | None:
        module = self.module
        # The host's keeps the length that it last saw, so a new copy is asked.
        theirs = copy.deepcopy(module, {id(module.config): module.config})
        vars(theirs).pop("forward", None)
        device = next(theirs.buffers()).device
        try:
            for layer_type in self._parameters:
                forget_lengths(theirs, layer_type)
                for length in (1, self.switch, self.switch + 1, 2 * self.switch + 3):
                    position_ids = torch.tensor([[0, length // 2, length - 1]], device=device)
                    x = torch.empty(1, device=position_ids.device)
                    expected = theirs(x, position_ids, *(() if layer_type is None else (layer_type,)))
                    ours = self.rotate(x, position_ids, at_once(position_ids), layer_type)
                    if any(
                        a.shape != b.shape or not torch.allclose(a, b) for a, b in zip(ours, expected, strict=True)
                    ):
                        return f"at length {length} it rotates in a way that is not known here"
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    @property
    def switch(self) -> int:
        """The longest text up to which the rotation does not depend on the length."""
        module = self.module
        return min(
            p["original_max_position_embeddings"] if is_longrope(p) else module.config.max_position_embeddings
            for p in self._parameters.values()
        )


def is_longrope(parameters: dict[str, Any]) -> bool:
    """Whether these are longrope's parameters; else they are dynamic NTK's."""
    return parameters["rope_type"] == "longrope"


def forget_lengths(module: Any, layer_type: str | None) -> None:  # Any: one of the host's, as below
    """Let a rotary embedding of the host be as it was before its first forward."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").clone())
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


# Transformers 5.24 modeling_rope_utils.py:_compute_dynamic_ntk_parameters, for a length at each position.
def stretched(module: Any, parameters: dict[str, Any], lengths: Tensor, short: Tensor) -> Tensor:
    """Dynamic NTK's inverse frequencies [.., D/2] in texts of `lengths` [.., 1]; `short` [D/2] up to the usual length."""
    usual, factor, dim = module.config.max_position_embeddings, parameters["factor"], 2 * len(short)
    stretch = (factor * lengths.clamp(min=usual) / usual) - (factor - 1)
    base = parameters["rope_theta"] * stretch ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=short.device).float() / dim  # [D/2]
    return torch.where(lengths > usual, 1.0 / base**exponents, short)


def find_rotaries(target: PreTrainedModel) -> list[LengthRotary]:
    """What can stand in the place of those modules of the text decoder that rotate by the length."""
    found = []
    with _lock:
        for module in target.get_decoder().modules():
            if parameters_by_layer_type(module):
                found.append(_rotaries.setdefault(module, LengthRotary(module)))
    return found


def find_switch(target: PreTrainedModel) -> int | None:
    """The longest text that `target` rotates as if rotation did not depend on the length; None if it never does."""
    return min((rotary.switch for rotary in find_rotaries(target)), default=None)


def why_not_rotated(target: PreTrainedModel) -> str | None:
    """What keeps positions of `target` from having lengths of their own; None if nothing does."""
    for rotary in find_rotaries(target):
        if (reason := rotary.why_not()) is not None:
            return f"the rotary embedding of {type(target).__name__} depends on the length of the text ({reason})"
    return None


@contextmanager
def own_lengths(target: PreTrainedModel) -> Iterator[None]:
    """Let forwards of `target` inside `rotating` give each position a length of its own. Others are as ever."""
    with ExitStack() as stack:
        for rotary in find_rotaries(target):
            stack.enter_context(rotary.in_place())
        yield
