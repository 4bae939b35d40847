"""Who chooses the shapes of a call's rounds, with what earlier calls of the same models have taught."""

import weakref
from typing import NamedTuple

from transformers import PreTrainedModel

from ..drafters.kinds import find_kind
from ..speculation.costs import Chooser, Costs
from ..speculation.rates import Rates
from .loop import DeviceRead, HostTime
from .state import RoundConfig

LEAST_STEP = 0.02  # of a round: what a draft step costs however small the drafter is


class Known(NamedTuple):
    """What calls of a target and a drafter have taught, by what it depends on."""

    costs: dict[tuple, Costs]
    rates: dict[tuple, Rates]


# By target, and by drafter.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, weakref.WeakKeyDictionary[PreTrainedModel, Known]]"
_known = weakref.WeakKeyDictionary()


def make_chooser(
    target: PreTrainedModel,
    drafter: PreTrainedModel | None,
    config: RoundConfig,
    temperature: float,
    *,
    is_captured: bool,
) -> Chooser:
    """The chooser of a call.

    Args:
        target: The model to generate with.
        drafter: Bound to it, if there is one.
        config: What rounds may do.
        temperature: Of the call's rows.
        is_captured: Whether rounds are replayed.
    """
    if drafter is None or config.shapes.is_fixed:
        return Chooser(config.shapes, Costs(0.0, is_slow=False), Rates(), config.shape)
    known = _known.setdefault(target, weakref.WeakKeyDictionary()).setdefault(drafter, Known({}, {}))
    where = (target.device, target.dtype, is_captured, config.in_order)  # processors in Python take their time
    is_slow = target.device.type == "cpu"
    if (costs := known.costs.get(where)) is None:
        step, count = find_step(target, drafter), find_kind(drafter.config).count_forwards
        costs = known.costs[where] = Costs(step, is_slow=is_slow, count_forwards=count)
    how = (config.do_sample, round(temperature, 1))
    if (rates := known.rates.get(how)) is None:
        rates = known.rates[how] = Rates(read_rates(drafter))
    return Chooser(config.shapes, costs, rates, config.shape)


def forget(target: PreTrainedModel) -> None:
    """Know nothing of the drafters of `target`."""
    _known.pop(target, None)


def read_rates(drafter: PreTrainedModel) -> tuple[tuple[float, ...], ...]:
    """How often the true token has each rank, by depth, as a drafter's generation config may say."""
    return tuple(map(tuple, getattr(drafter.generation_config, "acceptance_by_rank", None) or ()))


def find_step(target: PreTrainedModel, drafter: PreTrainedModel) -> float:
    """What a draft step may cost, as a share of a forward of the target: that of the weights which it reads."""
    sizes = []
    for model in (target, drafter):
        embeddings = model.get_input_embeddings()
        idle = 0 if embeddings is None else sum(p.numel() for p in embeddings.parameters())
        sizes.append(sum(p.numel() for p in model.parameters()) - idle)
    return min(LEAST_STEP + sizes[1] / max(sizes[0], 1), 1.0)


class Pace:
    """Times rounds by when each ends, where nothing else ran between two of a kind."""

    def __init__(self) -> None:
        self._last: DeviceRead | HostTime | None = None

    def measure(self, end: DeviceRead | HostTime, *, is_steady: bool) -> float | None:
        """Seconds since the round before; None if that says nothing. A call has ends of one kind, waited for."""
        last, self._last = self._last, end
        return end.seconds_since(last) if last is not None and is_steady else None  # type: ignore[arg-type]  # one kind
