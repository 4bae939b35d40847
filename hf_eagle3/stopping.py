"""Stopping where plain decoding would, though tokens come in blocks."""

import logging
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .cache import CACHE_NAME, rewind
from .peers import Agree, keep

logger = logging.getLogger(__name__)

# From 5.23 the host ends a block at end-of-sequence and at max_length by itself. Time is not a matter of tokens.
HOST_CUTS = Version(transformers.__version__).release >= (5, 23)
CUT_BY_HOST = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria) if HOST_CUTS else ()


class TokenwiseStop(StoppingCriteriaList):
    """Asks the criteria after each token of a block, as plain decoding does, and remembers where they first agreed.

    Args:
        criteria: The call's.
        prompt_length: Tokens before the first new one.
        streamer: The call's; gets each new token once it is known not to lie behind the end.
        agree: Makes one of what several processes of a target would say.
    """

    def __init__(
        self, criteria: StoppingCriteriaList, prompt_length: int, streamer: BaseStreamer | None, agree: Agree = keep
    ):
        super().__init__(criteria)
        self.streamer, self.agree = streamer, agree
        self.length = prompt_length  # tokens looked at so far; in the end, where to cut
        self.verified_length = prompt_length  # tokens verified so far, as the candidate generator hears it

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # scores: the host's tuple or None
        """[1] bool: whether the row is done within `input_ids` [1, S]."""
        is_done = torch.zeros(1, dtype=torch.bool, device=input_ids.device)
        # Before 5.23 the host also asks about candidates, which nobody has verified.
        if input_ids.shape[1] != self.verified_length:
            return is_done
        while self.length < self.verified_length and not is_done.any():
            self.length += 1
            known = scores[: len(scores) + self.length - self.verified_length] if scores else scores
            is_done = self.agree(super().__call__(input_ids[:, : self.length], known, **kwargs).long()).bool()
            if self.streamer is not None:
                self.streamer.put(input_ids[0, self.length - 1 : self.length].cpu())
        return is_done

    @property
    def num_behind(self) -> int:
        """Verified tokens behind the end."""
        return self.verified_length - self.length


class InOrder(LogitsProcessorList):
    """The call's processors, asked in greedy decoding about text alone, each prefix once, as in plain decoding.

    The host asks about all positions of a block, before it knows which draft tokens are kept. Those behind a token that
    the target would not have chosen are going to be thrown away, so nobody is asked about them. In sampling that cannot
    be known: there, all are asked.
    """

    def __init__(self, processors: LogitsProcessorList, *, is_greedy: bool):
        super().__init__([RaiseIfNan(), *processors])
        self.is_greedy = is_greedy
        self.length: int | None = None  # of the last prefix that was asked about
        self.next_token: Tensor | None = None  # [1] chosen after it

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Processed `scores` [1, V] after `input_ids` [1, S]."""
        if self.is_greedy and self.length is not None:
            follows = input_ids.shape[1] == self.length + 1 and bool(input_ids[0, -1] == self.next_token)
            if not follows:
                return scores
        processed = super().__call__(input_ids, scores, **kwargs)
        self.length, self.next_token = input_ids.shape[1], processed.argmax(-1)
        return processed


class NotANumberError(ValueError):
    """The target's logits are NaN."""


def has_nan(logits: Tensor) -> Tensor:
    """[] bool, whether any row of `logits` [B, V] holds a NaN, the largest of all to PyTorch.

    By the way that finds the largest fastest: argmax among our kernels on a GPU, amax on a CPU.
    """
    largest = logits.gather(-1, logits.argmax(-1)[:, None]) if logits.is_cuda else logits.amax(-1)
    return largest.isnan().any()


def raise_if_nan(is_nan: bool) -> None:
    """Name what would otherwise end in token 0, or in a complaint of the sampler."""
    if is_nan:
        raise NotANumberError(
            "The target's logits are NaN. Its weights are broken, or it overflows in this dtype: load it in bfloat16 "
            "or float32."
        )


class RaiseIfNan(LogitsProcessor):
    """Names NaN before others stumble over it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002  the host's signature
        """`scores` as they are."""
        raise_if_nan(bool(has_nan(scores)))
        return scores


class Muted(BaseStreamer):
    """Stands in for a streamer whose tokens `TokenwiseStop` passes on."""

    def __init__(self, streamer: BaseStreamer):
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        """Nothing: a block may reach behind the end."""

    def end(self) -> None:
        """Pass the end on."""
        self._streamer.end()


def needs_tokenwise_stop(criteria: StoppingCriteriaList, streamer: BaseStreamer | None) -> bool:
    """Whether the host alone might stop elsewhere than plain decoding, or stream in bursts."""
    return streamer is not None or any(type(criterion) not in CUT_BY_HOST for criterion in criteria)


def cut_output(output: ModelOutput | Tensor, num_tokens: int) -> ModelOutput | Tensor:
    """What `generate` returned, without its last `num_tokens` tokens and all that belongs to them."""
    if isinstance(output, Tensor):
        return output[:, : output.shape[1] - num_tokens]
    if num_tokens:
        output.sequences = output.sequences[:, :-num_tokens]
        for name in ("scores", "logits", "attentions", "hidden_states"):
            if (per_token := output.get(name)) is not None:
                setattr(output, name, per_token[:-num_tokens])
        if (cache := output.get(CACHE_NAME)) is not None:
            if is_whole(cache):
                rewind(cache, num_tokens)
            else:
                # A new one: the host's outputs keep the entry of a field that is set to None.
                output = type(output)(**{name: value for name, value in output.items() if name != CACHE_NAME})
                logger.warning(
                    "The call stopped inside a block of draft tokens, and the target's sliding-window or recurrent "
                    f"cache cannot be cut back to there: {CACHE_NAME} is None. Go on with the whole sequence."
                )
    return output


def is_whole(cache: Cache) -> bool:
    """Whether each layer still holds all positions it has seen, so that any number of them can be forgotten."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return all(hasattr(layer, "keys") and layer.keys.shape[-2] == layer.get_seq_length() for layer in layers)
