"""Amounts in units that fit them, for people."""

from collections.abc import Sequence


def format_count(number: float, of: str = "") -> str:
    """Such as 950, 12.3 k, 4.2 M; or, of FLOP, 4.2 MFLOP."""
    return scale(number, [f" {prefix}{of}".rstrip() for prefix in ("", "k", "M", "G", "T")], 1000)


def format_memory(count: float) -> str:
    """Bytes in powers of 1024, as GPUs count theirs: 812 KiB, 3.4 GiB."""
    return scale(count, (" bytes", " KiB", " MiB", " GiB", " TiB"), 1024)


def format_seconds(seconds: float) -> str:
    """Such as 45 seconds, 12 minutes, 3.4 hours, 2.1 days."""
    for unit, length, enough in (("days", 86400, 2), ("hours", 3600, 2), ("minutes", 60, 2)):
        if seconds >= enough * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"


def scale(number: float, units: Sequence[str], step: int) -> str:
    """`number` in the largest of `units` of which there is at least one, a digit behind the point but for the first."""
    for unit in units[:-1]:
        if round(number, 1) < step:
            return f"{number:.0f}{unit}" if unit == units[0] else f"{number:.1f}{unit}"
        number /= step
    return f"{number:.1f}{units[-1]}"
