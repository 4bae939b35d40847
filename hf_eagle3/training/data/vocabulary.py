"""The draft vocabulary: the target's tokens that the drafter can propose, and their share of its text."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .token_rows import TokenDataset

logger = logging.get_logger(__name__)

SIZES = (8_000, 16_000, 32_000, 64_000)
GOOD_COVERAGE = 0.98  # warned about below
MIN_COVERAGE = 0.90  # refused below
FEW_TOKENS = 1_000_000  # fewer give no good estimate of the share of unseen tokens


class Coverage(NamedTuple):
    """How much of the supervised tokens the most frequent ones are."""

    num_tokens: int  # supervised
    num_distinct: int
    shares: dict[int, float]  # by vocabulary size, the target's last


def count_supervised_tokens(dataset: TokenDataset, vocab_size: int) -> Tensor:
    """[V] int64: how often each token stands where the target generated it."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for i in range(len(dataset)):
        np.add.at(counts, dataset[i]["input_ids"][dataset[i]["loss_mask"]], 1)
    return torch.from_numpy(counts)


def count_by_source(dataset: TokenDataset, vocab_size: int) -> dict[str, Tensor]:
    """Counts as `count_supervised_tokens` gives them, for each `source` that rows name."""
    counts: dict[str, np.ndarray] = {}
    for i, source in enumerate(dataset.sources):
        if source is not None:
            of_source = counts.setdefault(source, np.zeros(vocab_size, dtype=np.int64))
            np.add.at(of_source, dataset[i]["input_ids"][dataset[i]["loss_mask"]], 1)
    return {source: torch.from_numpy(counts[source]) for source in sorted(counts)}


def measure_coverage(counts: Tensor, sizes: Sequence[int] = SIZES, ranking: Tensor | None = None) -> Coverage:
    """The share of the most frequent tokens in `counts` [V], for each of `sizes` below V, and for V.

    Args:
        counts: [V] counts of supervised tokens.
        sizes: Sizes of draft vocabularies.
        ranking: [V] counts by which tokens are ranked; `counts` by default. With the counts of all data here, the
            result is the coverage of one source by a vocabulary chosen on all.
    """
    order = (counts if ranking is None else ranking).sort(descending=True, stable=True).indices
    cumulated = counts[order].cumsum(0)  # [V]
    total = int(cumulated[-1])
    kept = [*(size for size in sizes if size < len(counts)), len(counts)]
    shares = {size: int(cumulated[size - 1]) / max(total, 1) for size in kept}
    return Coverage(total, int((counts > 0).sum()), shares)


def find_special_tokens(counts: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special and added tokens that the target generated, which a draft vocabulary should hold however rare: `always`."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return sorted(i for i in special if i < len(counts) and counts[i] > 0)


def choose_draft_vocabulary(
    counts: Tensor, size: int, always: Iterable[int] = (), *, min_coverage: float = MIN_COVERAGE
) -> Tensor:
    """The `size` most frequent target ids, ascending, [V_d] int64; `always` (end-of-turn tokens) are among them.

    Ties, and places left over when fewer distinct tokens were seen, go to the lowest ids (SafeAILab/EAGLE).

    Raises:
        ValueError: `size` exceeds the vocabulary or does not hold `always`, or covers less than `min_coverage` of
            `counts` (a share).
    """
    always = sorted(set(always))
    if not len(always) <= size <= len(counts):
        raise ValueError(f"draft_vocab_size must lie in {len(always)}..{len(counts)}, got {size}.")
    if always and not 0 <= always[0] <= always[-1] < len(counts):
        raise ValueError(f"always must hold ids in 0..{len(counts) - 1}, got {always[0]}..{always[-1]}.")
    priority = counts.to(torch.float64)
    priority[always] = torch.inf
    ids = priority.sort(descending=True, stable=True).indices[:size].sort().values
    check_coverage(counts, ids, min_coverage, "Raise draft_vocab_size")
    return ids


def check_coverage(counts: Tensor, ids: Tensor, min_coverage: float, advice: str) -> None:
    """Say how many of the supervised tokens, `counts` [V], the draft vocabulary `ids` [V_d] is.

    Raises:
        ValueError: They are less than `min_coverage` (a share); `advice` ends the message.
    """
    covered = counts[ids].sum().item() / max(counts.sum().item(), 1)
    logger.info(f"Draft vocabulary: {len(ids)} of {len(counts)} tokens cover {covered:.2%} of the supervised tokens.")
    what = (
        f"The draft vocabulary of {len(ids)} tokens covers only {covered:.1%} of the supervised tokens; what it lacks can "
        "never be accepted."
    )
    if covered < min_coverage:
        raise ValueError(f"{what} {advice}, or lower min_coverage ({min_coverage:g}) if that is meant.")
    if covered < GOOD_COVERAGE:
        logger.warning(f"{what} {advice}.")


def vocabulary_fingerprint(draft_to_target_ids: Tensor, vocab_size: int) -> str:
    """A sha256 over V, V_d and the ids [V_d]: two drafters with one fingerprint mean the same by each draft id."""
    ids = draft_to_target_ids.detach().cpu().to(torch.int64).numpy()
    return hashlib.sha256(f"{vocab_size},{len(ids)}:".encode() + ids.astype("<i8").tobytes()).hexdigest()


def end_tokens(target: Any) -> list[int]:  # Any: a target, or its stand-in
    """The tokens that end a text of `target`."""
    settings = getattr(target, "generation_config", None) or target.config
    ends = getattr(settings, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
