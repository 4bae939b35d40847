"""Output of a command: text of models, data and configs, without characters that move a terminal's cursor or hide a line."""

import logging
import sys

from transformers import TextStreamer

from ..modeling.text_eagle3 import escape_controls


def say(text: str = "") -> None:
    """Print a result to stdout."""
    sys.stdout.write(escape_controls(text) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Print progress or an error to stderr."""
    sys.stderr.write(escape_controls(text) + "\n")
    sys.stderr.flush()


class EscapingFormatter(logging.Formatter):
    """Another formatter's lines, escaped."""

    def __init__(self, inner: logging.Formatter):
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """A record as the other formatter writes it, escaped."""
        return escape_controls(self._inner.format(record))


class EscapingStreamer(TextStreamer):
    """The host's, escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is final."""
        super().on_finalized_text(escape_controls(text), stream_end=stream_end)


def escape_streams() -> None:
    """Let logs of this process be escaped, the host's too, and no stream fail on a letter that its encoding lacks."""
    for name in (None, "transformers", "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            if not isinstance(handler.formatter, EscapingFormatter):
                handler.setFormatter(EscapingFormatter(handler.formatter or logging.Formatter()))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
