"""Text of a model, written as it comes."""

from transformers import TextStreamer

from ..modeling.text_eagle3 import escape_controls


class EscapingStreamer(TextStreamer):
    """The host's, escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is final."""
        super().on_finalized_text(escape_controls(text), stream_end=stream_end)
