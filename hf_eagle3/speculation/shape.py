"""What a round proposes, and how much room that takes: the one owner of these counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .tree import (
    MAX_NODES,
    Ancestry,
    Descent,
    Level,
    find_children,
    find_depths,
    make_ancestry,
    make_descent,
    make_levels,
    make_node_order,
    make_paths,
    make_ranks,
)


@dataclass(frozen=True)
class DraftShape:
    """The draft tokens of a round, each by the node it follows: 0 is the root, node n the n-th draft token.

    Raises:
        ValueError: A node follows itself or a later one, or there are too many.
    """

    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(not 0 <= parent <= node for node, parent in enumerate(self.parents)):
            raise ValueError(f"Each draft token follows an earlier one, or 0, the root; got parents {self.parents}.")
        if len(self.parents) > MAX_NODES and not self.is_chain:
            raise ValueError(f"A draft tree has at most {MAX_NODES} tokens, got {len(self.parents)}.")

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it; no token at all is a chain, too."""
        return self.parents == tuple(range(len(self.parents)))

    @property
    def num_nodes(self) -> int:
        """N, draft tokens of a round."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """D, draft tokens on the longest path: as many can be accepted. A chain of K has depth K."""
        return len(self.parents) if self.is_chain else max(find_depths(self.parents))

    @property
    def width(self) -> int:
        """Most children of a node."""
        return max(map(len, find_children(self.parents)))

    @property
    def num_verified(self) -> int:
        """Tokens that the target runs over in a round: the root and the draft."""
        return self.num_nodes + 1

    @property
    def max_new(self) -> int:
        """Most tokens that a round adds to a row, and states that are then pending."""
        return self.depth + 1

    @property
    def num_drafter_slots(self) -> int:
        """Slots that drafting writes at most, from the first pending state on: the states that are pending, and a block."""
        return self.max_new + self.num_verified

    @property
    def num_slots(self) -> int:
        """Slots that a round may write behind a row's verified tokens, by either model."""
        return self.num_verified + self.max_new

    @property
    def first_slots(self) -> int:
        """Slots behind a prompt that the first round needs: that of the token which the prompt's logits give, and its own."""
        return 1 + self.num_slots

    @property
    def slack(self) -> int:
        """Slots behind the longest text that memory is made with: for the rounds under way when the last row ends."""
        return self.num_slots + 2 * self.max_new + 2

    def slots_ahead(self, num_rounds: int) -> int:
        """Slots behind what is known of a text that the next round needs, with `num_rounds` launched and not read."""
        return num_rounds * self.max_new + self.num_slots

    def ancestry(self, device: torch.device) -> Ancestry | None:
        """Who sees whom, as tensors; None for a chain, whose tokens see those before them."""
        return None if self.is_chain else make_ancestry(self.parents, device)

    def paths(self, device: torch.device) -> Tensor:
        """[N+1, D+1] int64, the way from the root to each node; its end repeats."""
        return make_paths(self.parents, device)

    def descent(self, device: torch.device) -> Descent:
        """What finds the end of a path."""
        return make_descent(self.parents, device)

    def levels(self, device: torch.device) -> tuple[Level, ...]:
        """The draft steps that grow it level by level."""
        return make_levels(self.parents, device)

    def node_order(self, device: torch.device) -> Tensor | None:
        """[N] int64, where each node is among those that were drafted level by level; None if it is there already."""
        return make_node_order(self.parents, device)

    def ranks(self, device: torch.device) -> Tensor | None:
        """[N] int64, which of the `width` best of each depth a node is, depth by depth; None if they are all nodes."""
        return make_ranks(self.parents, self.width, device)

    @property
    def name(self) -> str:
        """In words."""
        if not self.num_nodes:
            return "none"
        return f"chain of {self.depth}" if self.is_chain else f"tree of {self.num_nodes}, depth {self.depth}"


@dataclass(frozen=True)
class Shapes:
    """The shapes that the rounds of a call may have. Memory is made for the largest count of each kind.

    Raises:
        ValueError: There is none.
    """

    shapes: tuple[DraftShape, ...]

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError("Rounds need a shape; NONE is one.")

    @property
    def drafts(self) -> bool:
        """Whether any of them drafts."""
        return any(shape.num_nodes for shape in self.shapes)

    @property
    def depth(self) -> int:
        """D of the deepest."""
        return max(shape.depth for shape in self.shapes)

    @property
    def name(self) -> str:
        """In words."""
        return self.shapes[0].name if self.is_fixed else f"one of {len(self.shapes)} shapes by cost"

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.shapes) == 1

    @property
    def num_pending(self) -> int:
        """Most states that may be pending: rounds without a draft in between add one each."""
        most = max(shape.max_new for shape in self.shapes)
        return most if self.is_fixed or NONE not in self.shapes else max(most, PATIENCE)

    @property
    def num_verified(self) -> int:
        """Most tokens that the target runs over in a round."""
        return max(shape.num_verified for shape in self.shapes)

    @property
    def num_drafter_slots(self) -> int:
        """Most slots that drafting writes, from the first pending state on."""
        return max(shape.num_drafter_slots for shape in self.shapes) + self._num_read

    @property
    def first_slots(self) -> int:
        """Slots behind a prompt that the first round needs."""
        return max(shape.first_slots for shape in self.shapes) + self._num_read

    @property
    def slack(self) -> int:
        """Slots behind the longest text that memory is made with."""
        return max(shape.slack for shape in self.shapes) + self._num_read

    def slots_ahead(self, num_rounds: int) -> int:
        """Slots behind what is known of a text that the next round needs, with `num_rounds` launched and not read."""
        return max(shape.slots_ahead(num_rounds) for shape in self.shapes) + self._num_read

    @property
    def _num_read(self) -> int:
        """Slots that the drafter writes as it reads pending states, junk behind them."""
        return 0 if self.is_fixed else self.num_pending


def chain(num_tokens: int) -> DraftShape:
    """`num_tokens` draft tokens, one after the other."""
    return DraftShape(tuple(range(num_tokens)))


NONE = chain(0)
PATIENCE = 16  # states that wait for the drafter while rounds go without it, before it has to read them
