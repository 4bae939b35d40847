"""Output of a command: text of models, data and configs, without characters that move a terminal's cursor or hide a line."""

import json
import logging
import math
import sys
from typing import Any

from ..modeling.text_eagle3 import escape_controls


def say(text: str = "") -> None:
    """Print a result to stdout."""
    sys.stdout.write(escape_controls(text) + "\n")
    sys.stdout.flush()


def say_json(data: Any) -> None:  # Any: anything JSON can hold
    """Print a result to stdout as JSON, null for NaN and infinities."""
    sys.stdout.write(to_json(data))
    sys.stdout.flush()


def note(text: str) -> None:
    """Print progress or an error to stderr."""
    sys.stderr.write(escape_controls(text) + "\n")
    sys.stderr.flush()


def to_json(data: Any) -> str:  # Any: anything JSON can hold
    """`data` as lines of JSON in ASCII, null for NaN and infinities."""
    return json.dumps(without_nan(data), indent=1, allow_nan=False) + "\n"


def without_nan(data: Any) -> Any:  # Any: anything JSON can hold
    """`data` with null for NaN and infinities, which JSON does not have."""
    if isinstance(data, dict):
        return {name: without_nan(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


class EscapingFormatter(logging.Formatter):
    """Another formatter's lines, escaped."""

    def __init__(self, inner: logging.Formatter):
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """A record as the other formatter writes it, escaped."""
        return escape_controls(self._inner.format(record))


def escape_streams() -> None:
    """Let logs of this process be escaped, the host's too, and no stream fail on a letter that its encoding lacks."""
    for name in (None, "transformers", "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            if not isinstance(handler.formatter, EscapingFormatter):
                handler.setFormatter(EscapingFormatter(handler.formatter or logging.Formatter()))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
