"""Whether recurrent layers over whole blocks compute what the host's do token by token: found by a trial."""

import copy
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..kernels.language import is_available
from .attention import UnfitError
from .cache import RowCache
from .layers import find_kinds, has_states
from .memory import BY_KERNELS
from .recurrent import BLOCKS, find_mixers
from .states import States

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # how far results may be apart, as a share of their size
COARSE = 3e-2  # likewise in 16 bits
PROMPT_TOKENS, FIRST_TOKENS, SECOND_TOKENS = 5, 3, 2  # of the trial
KEPT = (2, 0)  # tokens of the first block that count, in each of two rows

_one_trial = threading.Lock()
# By target: why its recurrent layers cannot take blocks at once, None if they can.
_found: "weakref.WeakKeyDictionary[PreTrainedModel, str | None]" = weakref.WeakKeyDictionary()


def refuse_unequal(target: PreTrainedModel) -> None:
    """Try the recurrent layers of `target`, one of each class, if that was not done before.

    Raises:
        UnfitError: They compute something else.
    """
    if not has_states(target):
        return
    with _one_trial:
        if target not in _found:
            _found[target] = _try_layers(target)
    if (why := _found[target]) is not None:
        raise UnfitError(why)


def _try_layers(target: PreTrainedModel) -> str | None:
    # Up to Transformers 5.23 some layers ask the last one of the cache whether there are states.
    last = {type(module).__name__: module for module in find_mixers(target).values()}
    for name, module in last.items():
        try:
            with torch.no_grad():
                worst = measure_error(target, module)
        except Exception as error:  # noqa: BLE001  whatever it is, rounds can do without
            return f"{name} could not be tried over whole blocks ({type(error).__name__}: {error})"
        if not worst <= TOLERANCE.get(target.dtype, COARSE):
            return f"{name} does not compute its recurrence as our kernels do (apart by {worst:.1e})"
    return None


def measure_error(target: PreTrainedModel, module: Any) -> float:  # Any: a mixer of the host
    """How far blocks are from the host's own path token by token, outputs and states: the worst, as a share of its size."""
    generator = torch.Generator().manual_seed(0)
    like = next(p for p in module.parameters() if p.is_floating_point())
    width = target.config.get_text_config(decoder=True).hidden_size
    num_tokens = PROMPT_TOKENS + FIRST_TOKENS + SECOND_TOKENS
    x = torch.randn(len(KEPT), num_tokens, width, generator=generator).to(like.device, target.dtype)
    prompt, first, second = x.split([PROMPT_TOKENS, FIRST_TOKENS, SECOND_TOKENS], dim=1)
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    module(prompt, cache)
    layer = _hold(target, cache, module.layer_idx)
    kept = torch.tensor(KEPT, device=x.device)
    token = BY_KERNELS.set(is_available(x.device))
    run_block = BLOCKS[type(module).__name__]
    try:
        ours = [
            run_block(module, first, layer.replay, torch.zeros_like(kept)),
            run_block(module, second, layer.replay, kept),
        ]
    finally:
        BY_KERNELS.reset(token)
    layer.end_replay(torch.full_like(kept, SECOND_TOKENS))
    theirs = [_step(module, first, copy.deepcopy(cache))]
    rows, states = [], []
    for row, count in enumerate(KEPT):
        alone = copy.deepcopy(cache)
        if count:
            _step(module, first[:, :count], alone)
        rows.append(_step(module, second, alone)[row])
        states.append([x[row] for x in _states_of(alone.layers[module.layer_idx])])
    theirs += [torch.stack(rows), *map(torch.stack, zip(*states, strict=True))]
    return max(map(_share_of_error, [*ours, *_states_of(layer)], theirs))


def _hold(
    target: PreTrainedModel, cache: DynamicCache, index: int
) -> Any:  # Any: `States`, with a memory to replay from
    """The states of layer `index` of the host's `cache`, ready for blocks."""
    B = len(KEPT)
    whole = RowCache(find_kinds(target), 1)
    view = whole.view(0, B, of=B)
    layer = view.layers[index]
    assert isinstance(layer, States)
    layer.from_host(cache.layers[index], torch.zeros(B, 1, dtype=torch.long), move=False)
    layer.begin_replay(whole.layers[index], view.part, max(FIRST_TOKENS, SECOND_TOKENS))
    return layer


def _step(module: Any, x: Tensor, cache: DynamicCache) -> Tensor:
    """What the host makes of `x` [B, T, H], token by token behind `cache`."""
    return torch.cat([module(x[:, t : t + 1], cache) for t in range(x.shape[1])], dim=1)


def _states_of(layer: Any) -> list[Tensor]:  # Any: the host's, or ours
    return [layer.conv_states[0], layer.recurrent_states[0]]


def _share_of_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).float().norm() / theirs.float().norm().clamp(min=1e-30))
