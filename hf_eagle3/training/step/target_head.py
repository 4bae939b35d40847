"""The target's logits over the draft vocabulary, from its last hidden states.

The head is applied tile by tile, so that a row of the whole vocabulary never exists. The results are the logits of the
draft vocabulary, and log-sum-exp and argmax over the whole one.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...kernels import head_loss, language
from ...tensor_parallel import whole

TILE = 16384  # columns of the head at a time

# Fields of host configs for what lies between the head's output and the logits.
SOFT_CAP = "final_logit_softcapping"
FACTORS = {"logit_scale": 1, "logits_scaling": -1}  # multiplied (Cohere), divided (Granite)


class TargetLogits(NamedTuple):
    """The target's next-token distribution at n positions, over the draft vocabulary."""

    kept: Tensor  # [n, V_d], logits of the draft vocabulary, in the head's dtype
    lse: Tensor  # [n] float32, log-sum-exp of all logits: log p = kept - lse
    best: Tensor  # [n] int64, target id of the argmax


class DraftVocabulary:
    """The draft vocabulary, sorted and split into tiles of the target's head.

    Args:
        draft_ids: [V_d] int64, the target id of each draft id.
        vocab_size: V.
        tile: Columns of the head in a tile.
    """

    def __init__(self, draft_ids: Tensor, vocab_size: int, tile: int = TILE):
        self.tile = tile
        ids, order = draft_ids.sort()
        edges = torch.arange(0, vocab_size + tile, tile, device=ids.device)
        bounds = torch.searchsorted(ids, edges).tolist()
        self.by_tile = [ids[a:b] for a, b in pairwise(bounds)]  # ascending
        # The place of each draft id among the sorted ones; None if they are sorted already.
        self.order = None if torch.equal(ids, draft_ids) else order.argsort()
        self.to_draft = torch.full((vocab_size,), -1, dtype=torch.int64, device=ids.device)  # [V]
        self.to_draft[draft_ids] = torch.arange(len(draft_ids), device=ids.device)


class TargetHead:
    """The target's head as a plain function of its last hidden state.

    Args:
        weight: [>= V, Ht]; None if the last hidden states are logits already, because the target's head cannot be applied
            from outside.
        bias: [>= V] or None.
        vocab_size: V.
        soft_cap: Logits become `soft_cap * tanh(logits / soft_cap)`.
        factor: Logits are multiplied by it, before the cap.
    """

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        vocab_size: int,
        soft_cap: float | None = None,
        factor: float = 1.0,
    ):
        self.weight, self.bias, self.vocab_size = weight, bias, vocab_size
        self.soft_cap, self.factor = soft_cap, factor

    @classmethod
    def of(cls, target: PreTrainedModel) -> "TargetHead":
        """The head of `target`, or one that takes logits if its own is not a plain linear layer.

        Processes that share a target each get the whole head, since they apply it to different states. All must call.
        `check` tests whether it gives the target's logits.
        """
        config = target.config.get_text_config(decoder=True)
        head = target.get_output_embeddings()
        is_plain = type(head) is nn.Linear and head.weight.is_floating_point() and not head.weight.is_meta
        if not is_plain:
            return cls(None, None, config.vocab_size)
        factor = 1.0
        for name, power in FACTORS.items():
            factor *= (getattr(config, name, None) or 1.0) ** power
        weight, bias = whole(head.weight.detach()), None if head.bias is None else whole(head.bias.detach())
        return cls(weight, bias, config.vocab_size, getattr(config, SOFT_CAP, None), factor)

    def tiles(self, last: Tensor, tile: int = TILE) -> Iterator[tuple[int, Tensor]]:
        """First column and logits [n, <= tile] of one tile after another.

        Args:
            last: [n, Ht], the input of the target's head; [n, V] logits if there is no weight.
            tile: Columns.
        """
        for start in range(0, self.vocab_size, tile):
            end = min(start + tile, self.vocab_size)
            if self.weight is None:
                yield start, last[:, start:end]
                continue
            bias = None if self.bias is None else self.bias[start:end]
            logits = F.linear(last.to(self.weight.device, self.weight.dtype), self.weight[start:end], bias)
            if self.factor != 1:
                logits = logits * self.factor
            if self.soft_cap is not None:
                logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
            yield start, logits.to(last.device)

    def logits(self, last: Tensor, vocabulary: DraftVocabulary) -> TargetLogits:
        """The target's logits at n positions, from `last` as for `tiles`."""
        kept, largest, best, lse = [], None, None, None
        for (start, logits), ids in zip(self.tiles(last, vocabulary.tile), vocabulary.by_tile, strict=True):
            kept.append(logits.index_select(1, ids - start))
            top, at, sums = summarise(logits)
            if largest is None or best is None or lse is None:
                largest, best, lse = top, at + start, sums
            else:
                best = torch.where(top > largest, at + start, best)
                largest, lse = torch.maximum(top, largest), torch.logaddexp(lse, sums)
        assert best is not None  # a vocabulary has a tile
        assert lse is not None
        every = torch.cat(kept, dim=-1)
        return TargetLogits(every if vocabulary.order is None else every[:, vocabulary.order], lse, best)

    def check(self, last: Tensor, logits: Tensor) -> bool:
        """Whether these are the target's `logits` [n, >= V] of `last` [n, Ht], to rounding."""
        if self.weight is not None and last.shape[-1] != self.weight.shape[-1]:  # something lies between (BERT)
            return False
        ours = torch.cat([tile for _, tile in self.tiles(last)], dim=-1).float()
        theirs = logits[:, : self.vocab_size].to(ours.device).float()
        if ours.shape != theirs.shape:
            return False
        eps = torch.finfo(logits.dtype).eps
        return bool(torch.allclose(ours, theirs, rtol=8 * eps, atol=8 * eps * float(theirs.abs().max())))


def summarise(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest, argmax and log-sum-exp [n] of each row of `logits` [n, V], by a kernel where there is one."""
    if logits.is_cuda and logits.element_size() == 2 and language.is_available(logits.device):
        return head_loss.summarise(logits)
    return head_loss.summarise_eager(logits)
