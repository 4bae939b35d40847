"""Levels of parameters, marked."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(everyday: Iterable[Any], levels: Iterable[Any]) -> list[Any]:
    """Levels of a parameter, all but the `everyday` ones marked slow."""
    everyday = list(everyday)
    return [level if level in everyday else pytest.param(level, marks=pytest.mark.slow) for level in levels]


def slow_rows_but(everyday: Iterable[tuple], rows: Iterable[tuple]) -> list[Any]:
    """The same for levels of several parameters at once."""
    everyday = list(everyday)
    return [row if row in everyday else pytest.param(*row, marks=pytest.mark.slow) for row in rows]
