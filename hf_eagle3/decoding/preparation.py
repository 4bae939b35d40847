"""How a target prepares the inputs of its forwards, where it does so in a way of its own.

For each new token, plain decoding calls `prepare_inputs_for_generation`, runs the target, and calls
`_update_model_kwargs_for_generation`. Our rounds call the target's forward with positions and masks of ours, so whatever
a class or an instance decides there must be asked for: once after the prompt where the class is the host's, since the
position ids of later tokens then count on from there, and else for each token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin

from ..compat import CACHE_NAME
from ..speculation.tree import Ancestry

NAMES = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
# What our forwards have, whatever a target prepares. `return_dict` the host adds itself.
GIVEN = {"input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict", CACHE_NAME}
# From 5.23 on the host drops an attention mask of ones.
HOST_DROPS_MASKS = Version(transformers.__version__).release >= (5, 23)


def find_override(target: PreTrainedModel, name: str) -> Callable | None:
    """The function of that name that `target` has of its own, by its class or instance; None if it is the host's."""
    function = getattr(target, name)
    while adds_nothing(function):
        function = function.__self__.base_model_prepare_inputs_for_generation
    return None if getattr(function, "__func__", function) is getattr(GenerationMixin, name) else function


def adds_nothing(function: Any) -> bool:  # Any: whatever stands there
    """Whether `function` is what PEFT puts on a model, for adapters that leave inputs as they are."""
    config = getattr(getattr(function, "__self__", None), "active_peft_config", None)
    has_original = hasattr(getattr(function, "__self__", None), "base_model_prepare_inputs_for_generation")
    return has_original and config is not None and not config.is_prompt_learning and config.peft_type != "POLY"


def is_the_hosts(function: Callable) -> bool:
    """Whether `function` belongs to a model of the host."""
    return getattr(function, "__module__", "").startswith("transformers.models.")


def find_asked(target: PreTrainedModel) -> Callable | None:
    """The function that makes `target` one to be asked for each token; None if it need not be."""
    overrides = [found for name in NAMES if (found := find_override(target, name)) is not None]
    return next((function for function in overrides if not is_the_hosts(function)), None)


def name_of(function: Callable) -> str:
    """What to call `function` in a message."""
    return getattr(function, "__qualname__", type(function).__name__)


class SeenCache(DynamicCache):
    """Stands for a cache of the host that holds `length` positions; it holds none."""

    def __init__(self, target: PreTrainedModel, length: int):
        super().__init__(config=target.config.get_text_config(decoder=True))
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  the host's signature
        """Positions that plain decoding would have cached."""
        return self.length


class Switch(NamedTuple):
    """Where a target drops its cache because another rotation begins, as Phi-3 does."""

    after: int  # tokens of a text up to which it does not
    computes_anew: bool  # whether it then runs over the whole text; else plain decoding forgets the text


def find_switch(target: PreTrainedModel) -> Switch | None:
    """Where the class of `target` drops its cache; None if it does not."""
    function = find_override(target, NAMES[0])
    after = getattr(target.config, "original_max_position_embeddings", None)
    if function is None or not is_the_hosts(function) or not isinstance(after, int):
        return None
    ids = torch.zeros(1, after + 1, dtype=torch.long, device=target.device)
    kwargs = {
        CACHE_NAME: SeenCache(target, after),
        "position_ids": torch.arange(after + 1, device=target.device)[None],
    }
    inputs = target.prepare_inputs_for_generation(ids, next_sequence_length=1, use_cache=True, **kwargs)
    if inputs.get(CACHE_NAME) is not None:
        return None
    # Up to 5.23 the host then feeds the last token alone.
    return Switch(after, computes_anew=inputs["input_ids"].shape[1] == after + 1)


def prepare_next(
    target: PreTrainedModel, outputs: Any, input_ids: Tensor, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What plain decoding would give the forward after the prompt's, whose `outputs` these are.

    Args:
        input_ids: [B, T] as the host passes them to its decode loop.
        model_kwargs: Likewise; left as they are.
    """
    kwargs = target._update_model_kwargs_for_generation(outputs, dict(model_kwargs), is_encoder_decoder=False)
    ids = torch.cat([input_ids, input_ids.new_zeros(len(input_ids), 1)], dim=1)  # whichever token it is
    return target.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)


class UnfollowableError(ValueError):
    """A target prepares its inputs in a way that our decode loop cannot follow."""

    def __init__(self, target: PreTrainedModel, what: str):
        function = find_asked(target)
        name = NAMES[0] if function is None else name_of(function)
        super().__init__(
            f"{type(target).__name__} prepares the inputs of its forwards in a way of its own ({name}), which a drafter's "
            f"rounds cannot follow: {what}. Call generate() without assistant_model."
        )


class OutputsToCome(dict):
    """Stands for the outputs of a forward that plain decoding would have run by now, and a round has not."""

    def __init__(self, target: PreTrainedModel, cache: SeenCache):
        super().__init__({CACHE_NAME: cache})
        self._target = target

    def __missing__(self, name: str) -> Any:
        raise UnfollowableError(self._target, f"it reads {name!r} of the forward before")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ARG002  dict's signature
        """As by index: there is no default for what is yet to come."""
        return self[name]


@dataclass(slots=True)
class AskedRow:
    """What plain decoding of a row by itself has when it prepares a forward."""

    text: list[int]
    extra: int  # cached positions that no token of the text stands for
    # By the number of tokens of the text: the kwargs with which the last of them is prepared.
    kwargs: dict[int, dict[str, Any]]

    def forget_before(self, slot: int) -> None:
        """Drop kwargs that the tokens from `slot` on do not follow from."""
        num_tokens = slot - self.extra + 1
        last = max(n for n in self.kwargs if n <= num_tokens)
        self.kwargs = {n: kwargs for n, kwargs in self.kwargs.items() if n >= last}


class AskedPositions:
    """Position ids as the target itself prepares them, token by token, each row as if it were alone."""

    def __init__(self, target: PreTrainedModel, rows: list[AskedRow]):
        self._target, self._rows = target, rows

    def of_rows(self, rows: Iterable[int]) -> "AskedPositions":
        """Those of these rows alone."""
        return AskedPositions(self._target, [self._rows[b] for b in rows])

    def put(self, other: "AskedPositions", places: list[int]) -> None:
        """Let the rows of another be in these places."""
        for place, row in zip(places, other._rows, strict=True):
            self._rows[place] = row

    def commit(self, length: Tensor, tokens: Tensor, num_new: Tensor) -> None:
        """Let the first `num_new` [B] of `tokens` [B, n] be the text behind `length` [B] positions."""
        for row, place, new, n in zip(self._rows, length.tolist(), tokens.tolist(), num_new.tolist(), strict=True):
            row.text[place - row.extra :] = new[:n]

    def __call__(self, places: Tensor, tokens: Tensor, ancestry: Ancestry | None) -> Tensor:
        """Position ids [B, T], or [axes, B, T], of `tokens` [B, T] at `places` [B, T]. It waits for both.

        Args:
            ancestry: Of the tokens, if they are no chain: each is asked about behind its ancestors.

        Raises:
            UnfollowableError: The target prepares something else than positions.
        """
        T = tokens.shape[1]
        sees = [(2 << t) - 1 for t in range(T)] if ancestry is None else ancestry.bits.tolist()
        before = [[j for j in range(t) if bits >> j & 1] for t, bits in enumerate(sees)]
        rows = []
        for row, row_places, row_tokens in zip(self._rows, places.tolist(), tokens.tolist(), strict=True):
            row.forget_before(row_places[0])
            first, asked = row_places[0] - row.extra, []
            for ancestors, place, token in zip(before, row_places, row_tokens, strict=True):
                row.text[first:] = [row_tokens[j] for j in ancestors]
                asked.append(self._ask(row, place, token))
            rows.append(torch.cat(asked, dim=-1))
        return torch.cat(rows, dim=-2).to(places.device)

    def _ask(self, row: AskedRow, slot: int, token: int) -> Tensor:
        """Position ids [1, 1] or [axes, 1, 1] of a token behind those of a row."""
        target, place = self._target, slot - row.extra
        row.text[place:] = [token]
        num_tokens = place + 1
        while num_tokens not in row.kwargs:
            last = max(n for n in row.kwargs if n < num_tokens)
            outputs = OutputsToCome(target, SeenCache(target, last + row.extra))
            row.kwargs[last + 1] = target._update_model_kwargs_for_generation(
                outputs, dict(row.kwargs[last]), is_encoder_decoder=False
            )
        cache = SeenCache(target, slot)
        kwargs = {**row.kwargs[num_tokens], CACHE_NAME: cache}
        ids = torch.tensor([row.text], device=target.device)
        inputs = target.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        return read_position(target, inputs, token, cache)


def shows_all(mask: Any, num_positions: int) -> bool:  # Any: whatever was prepared
    """Whether an attention mask hides nothing of so many positions; None hides nothing."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == num_positions and bool(mask.bool().all())


def read_position(target: PreTrainedModel, inputs: dict[str, Any], token: int, cache: SeenCache) -> Tensor:
    """Position ids [1, 1] or [axes, 1, 1] of the one token among prepared inputs that are otherwise the usual ones."""
    if inputs.get(CACHE_NAME) is not cache:
        raise UnfollowableError(target, "it changes the cache between forwards")
    ids = inputs.get("input_ids")
    if ids is None or ids.tolist() != [[token]]:
        raise UnfollowableError(target, "its forwards take more than the newest token")
    if not shows_all(inputs.get("attention_mask"), cache.length + 1):
        raise UnfollowableError(target, "its attention_mask hides something")
    if more := sorted(n for n, value in inputs.items() if n not in GIVEN and value is not None and value is not False):
        raise UnfollowableError(target, f"its forwards also take {', '.join(more)}")
    position_ids = inputs.get("position_ids")
    if position_ids is None:  # a forward of the host then counts on from the cache
        return torch.tensor([[cache.length]])
    if position_ids.shape[-2:] != (1, 1):
        raise UnfollowableError(target, f"position_ids of a token are {list(position_ids.shape)}, not [1, 1]")
    return position_ids
