"""The seeds of a call: from a seed comes one text, with and without a draft, in any batch and by any loop."""

import numbers
from collections.abc import Sequence
from typing import Any

from ..speculation.shared_noise import MAX_SEED

Seeds = int | list[int] | None


def is_seed(value: Any) -> bool:  # Any: whatever was given
    """Whether `value` can seed a row."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) <= MAX_SEED


def resolve_seeds(asked: Any) -> Seeds:  # Any: whatever was given
    """What rows draw by: a number for the first row, which later rows count on from, or one for each.

    Raises:
        ValueError: It is neither.
    """
    values = asked.tolist() if hasattr(asked, "tolist") else asked  # an array's or a tensor's numbers
    if values is None or is_seed(values):
        return None if values is None else int(values)
    if isinstance(values, Sequence) and not isinstance(values, str) and values and all(map(is_seed, values)):
        return [int(value) for value in values]
    raise ValueError(
        f"seed is a whole number from 0 to {MAX_SEED} for the first row, which later rows count on from, or a list with one "
        f"for each row; got {asked!r}."
    )


def seeds_of_rows(seeds: Seeds, num_rows: int) -> list[int] | list[None]:
    """One for each row; None where the call has none.

    Raises:
        ValueError: There are more or fewer rows.
    """
    if seeds is None:
        return [None] * num_rows
    if isinstance(seeds, int):
        return [(seeds + row) % (MAX_SEED + 1) for row in range(num_rows)]
    if len(seeds) != num_rows:
        raise ValueError(
            f"seed has {len(seeds)} numbers for {num_rows} rows: give one for each, counting num_return_sequences, or one "
            "in all."
        )
    return seeds
