"""Criteria, processors and streamers, as callers hand them to `generate`."""

import torch
from transformers import LogitsProcessor, StoppingCriteria, TextStreamer


class StopAt(StoppingCriteria):
    """Stops once the sequence has `length` tokens, and counts how often it is asked."""

    def __init__(self, length):
        self.length, self.lengths_seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths_seen.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class RecordingStreamer(TextStreamer):
    """A text streamer that also notes what it is given."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.puts, self.text = [], ""

    def put(self, value):
        self.puts.append(value.tolist())
        super().put(value)

    def on_finalized_text(self, text, stream_end=False):
        self.text += text + ("\n" if stream_end else "")


class Raise(LogitsProcessor):
    """A user's interrupt in the middle of a call."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise KeyboardInterrupt
        return scores


class StopOn(StoppingCriteria):
    """Ends a row after a token of a set."""

    def __init__(self, tokens):
        self.tokens = torch.tensor(sorted(tokens))

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens)
