"""What one forward adds to each row."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..speculation.tree import Ancestry

MANY_PADS = 32  # mean padding per row above which a CPU runs rows one by one
LONG_PROMPT = 2048  # positions from which on rows run one by one


class Block(NamedTuple):
    """T tokens of each of B rows, in slots one behind the other. Every forward of either model takes one.

    Caches write it, masks and attentions read it: a token sees all slots before the block, and of the block its
    ancestors and itself. Of a tree that was begun by earlier blocks, in the slots right before, it sees ancestors, too.
    """

    start: Tensor  # [B] int64, the slot of each row's first token
    num_tokens: int  # T
    ancestry: Ancestry | None = None  # None: a chain, where each token follows the one before it

    @property
    def slots(self) -> Tensor:
        """[B, T] int64, where each token is kept."""
        return self.start[:, None] + torch.arange(self.num_tokens, device=self.start.device)

    @property
    def places(self) -> Tensor:
        """[B, T] int64, where each token comes in its row's text: position ids, up to what a row begins with."""
        if self.ancestry is None:
            return self.slots
        num_before = self.ancestry.num_before
        return self.start[:, None] - num_before + self.ancestry.depths[num_before:]


def whole_rows(num_rows: int, num_tokens: int, device: torch.device) -> Block:
    """A block that begins its rows."""
    return Block(torch.zeros(num_rows, dtype=torch.long, device=device), num_tokens)


def is_by_rows(lengths: Tensor, width: int) -> bool:
    """Whether rows of `lengths` [B], padded to `width`, are better run one by one: long, or a CPU would compute pads."""
    B = len(lengths)
    num_pads = int(B * width - lengths.sum()) if lengths.device.type == "cpu" else 0
    return B > 1 and (width >= LONG_PROMPT or num_pads >= MANY_PADS * B)
