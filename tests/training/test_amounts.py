"""Amounts in units that fit."""

import pytest

from hf_eagle3.training.amounts import format_count, format_memory, format_seconds


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.96, "1.0 k"),
        (20_123, "20.1 k"),
        (4.2e6, "4.2 M"),
        (999_960, "1.0 M"),
        (3e15, "3000.0 T"),
    ],
)
def test_counts(number, text):
    assert format_count(number) == text


def test_counts_of_something():
    assert [format_count(n, "FLOP") for n in (12, 35e9)] == ["12 FLOP", "35.0 GFLOP"]


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 bytes"), (1024, "1.0 KiB"), (3.4 * 2**30, "3.4 GiB"), (5 * 2**41, "10.0 TiB")]
)
def test_memory(size, text):
    assert format_memory(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "a second"),
        (1.6, "2 seconds"),
        (45, "45 seconds"),
        (119, "119 seconds"),
        (150, "2.5 minutes"),
        (7200, "2.0 hours"),
        (200_000, "2.3 days"),
    ],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text
