"""What a drafter of any kind owes the loops: `begin`, `catch_up` and `propose`, over a memory of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..kernels.top import top_rows_eager
from ..rows.cache import RowCache
from ..speculation.noise import Noise
from ..speculation.sampling import likeliest, to_probs, without_overflow
from ..speculation.shape import DraftShape, Shapes
from ..speculation.shared_noise import SharedNoise


class Draft(NamedTuple):
    """Draft tokens, and the probabilities they were drawn from."""

    tokens: Tensor  # [B, N] int64, target vocabulary
    probs: Tensor | None  # [B, N, V_d] float32 over the draft vocabulary; None where no ratio test needs them


class Choose(Protocol):
    """How draft tokens are chosen."""

    def __call__(self, logits: Tensor, depths: range, width: int) -> tuple[Tensor, Tensor | None]:
        """Draft ids [B, n, width] that differ and, where verification needs them, the probabilities [B, n, V_d] they were drawn from.

        Args:
            logits: [B, n, V_d], of the token behind each of n nodes.
            depths: Of the nodes, one after the other, or one for all.
            width: Tokens to choose behind each of them.
        """


# [..., width] int64, where the largest of scores [..., V] are, the largest first, the first among equals.
FindTop = Callable[[Tensor, int], Tensor]


def find_best(scores: Tensor, width: int, find_top: FindTop) -> Tensor:
    """[..., width] int64, where the largest of `scores` [..., V] are."""
    return likeliest(scores)[..., None] if width == 1 else find_top(scores, width)


def make_choose_greedy(find_top: FindTop = top_rows_eager) -> Choose:
    """A choice of the likeliest; captured rounds have a kernel that finds them."""

    def choose_greedy(logits: Tensor, depths: range, width: int) -> tuple[Tensor, None]:  # noqa: ARG001  as `Choose`
        return find_best(logits, width, find_top), None

    return choose_greedy


choose_greedy = make_choose_greedy()


def make_choose_sampled(warp: Callable[[Tensor], Tensor], noise: Noise) -> Choose:
    """A choice that draws one draft id from what `warp` leaves of [B, n, V_d] logits, by the numbers of `noise`."""

    def choose_sampled(logits: Tensor, depths: range, width: int) -> tuple[Tensor, Tensor]:
        assert width == 1, "the ratio test is for chains"
        probs = to_probs(logits, warp)  # [B, n, V_d]
        return noise.draw(probs, depths.start)[..., None], probs

    return choose_sampled


def make_choose_shared(
    warp: Callable[[Tensor], Tensor], shared: SharedNoise, ids: Tensor, find_top: FindTop = top_rows_eager
) -> Choose:
    """A choice that draws draft ids, without replacement, by the noise that the target's tokens are chosen by.

    Args:
        warp: What is left of [B, n, V_d] logits.
        shared: The noise.
        ids: [V_d] int64, the target ids of draft ids.
        find_top: Finds the largest; captured rounds have a kernel.
    """

    def choose_shared(logits: Tensor, depths: range, width: int) -> tuple[Tensor, None]:
        scores = warp(without_overflow(logits))  # [B, n, V_d]
        return find_best(shared.perturb(scores, depths, ids=ids), width, find_top), None

    return choose_shared


class Prompted(NamedTuple):
    """The target's states after the prompts, as a drafter begins with them: M positions, pads last."""

    tokens: Tensor  # [B, M] int64, the tokens at these positions
    states: Tensor  # [B, M, A*Ht]
    num_states: Tensor  # [B] int64, 1..M
    first: Tensor  # [B] int64, the position of each row's first state


class Committed(NamedTuple):
    """What a round adds to each row: up to D+1 positions, junk behind them."""

    tokens: Tensor  # [B, D+1] int64, the token one after each position
    states: Tensor | None  # [B, D+1, A*Ht], the target's; None after the prompt, whose last state is pending already
    num_new: Tensor  # [B] int64, 1..D+1


@dataclass(slots=True)
class DrafterMemory:
    """What a drafter knows of B rows. Its kind writes to it, and `put` and `copy_from` do.

    The cache holds the slots before the pending states, each computed from the target's own states. Slots count from the
    first position that the drafter has seen.
    """

    tokens: Tensor  # [B, W] int64, the token after each pending state; junk from num_pending on
    states: Tensor  # [B, W, A*Ht], pending: made by the target, not seen by the drafter
    num_pending: Tensor  # [B] int64, 1..W
    start: Tensor  # [B] int64, the slot of the first pending state
    first: Tensor  # [B] int64, the position of slot 0
    room: int  # slots to leave behind `start`, for the next draft
    cache: RowCache

    TENSORS: ClassVar = ("tokens", "states", "num_pending", "start", "first")

    def narrowed(self, num_pending: int) -> "DrafterMemory":
        """A view of no more than so many pending states in each row."""
        return replace(self, tokens=self.tokens[:, :num_pending], states=self.states[:, :num_pending])

    def over(self, cache: RowCache, rows: Tensor | None = None) -> "DrafterMemory":
        """A copy over another cache, of `rows` [B'] int64 if they are given."""
        with torch.inference_mode(False):
            values = {name: getattr(self, name) for name in self.TENSORS}
            values = {name: x if rows is None else x[rows.to(x.device)] for name, x in values.items()}
            return DrafterMemory(**{name: x.clone() for name, x in values.items()}, room=self.room, cache=cache)

    @classmethod
    def joined(cls, parts: "Sequence[DrafterMemory]", cache: RowCache) -> "DrafterMemory":
        """That of the rows of several memories, over one cache that theirs are views of."""
        values = {name: torch.cat([getattr(part, name) for part in parts]) for name in cls.TENSORS}
        return cls(**values, room=parts[0].room, cache=cache)

    def put(self, other: "DrafterMemory", places: Tensor) -> None:
        """Let the rows of another memory be in the `places` [B'] int64."""
        for name in self.TENSORS:
            mine = getattr(self, name)
            mine[places.to(mine.device)] = getattr(other, name)

    def copy_from(self, other: "DrafterMemory") -> None:
        """Take the values of another memory of the same sizes, in place."""
        for name in self.TENSORS:
            getattr(self, name).copy_(getattr(other, name))


class Begin(Protocol):
    """`begin` of a kind."""

    def __call__(
        self, drafter: PreTrainedModel, prompted: Prompted, shapes: Shapes, *, cache: RowCache | None = None
    ) -> DrafterMemory:
        """Memory behind the prompts: all states seen but the last of each row, whose next token is not known yet."""


class CatchUp(Protocol):
    """`catch_up` of a kind."""

    def __call__(self, memory: DrafterMemory, committed: Committed, shape: DraftShape) -> None:
        """Take what the target has verified in a round of this shape; the next draft begins with it."""


class ReadPending(Protocol):
    """`read_pending` of a kind."""

    def __call__(self, drafter: PreTrainedModel, memory: DrafterMemory) -> None:
        """Read the pending states but the last of each row, which is then the only one."""


class Propose(Protocol):
    """`propose` of a kind."""

    def __call__(self, drafter: PreTrainedModel, memory: DrafterMemory, shape: DraftShape, choose: Choose) -> Draft:
        """A draft behind each row's newest token; the memory then is as before."""


@dataclass(frozen=True)
class DrafterKind:
    """A way to draft. A row of `kinds.KINDS`."""

    name: str
    fits: Callable[[PreTrainedConfig | None], bool]
    begin: Begin
    catch_up: CatchUp
    read_pending: ReadPending
    propose: Propose
    count_forwards: Callable[[DraftShape], int]  # of the drafter, in a round
    has_steps: bool = True  # whether later steps follow the first, as training and the doctor unroll them
