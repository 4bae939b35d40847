"""Stopping where plain decoding would, though tokens come in blocks."""

import logging
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ..compat import CACHE_NAME, rewind
from ..decoding.in_order import Walk, begin_walks, offer
from ..speculation.accept import AcceptRule, Judging
from ..speculation.numbers import has_nan, raise_if_nan
from ..speculation.sampling import stateless_warpers
from ..speculation.verdict import Proposal
from ..tensor_parallel import Agree, keep

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
    """The call's processors, asked about text alone, each prefix once, as in plain decoding.

    The host asks about all positions of a block, before it knows which draft tokens are kept. So each token is chosen
    here as soon as its scores are known, and nobody is asked about what lies behind a refused token or an end.

    Args:
        processors: The call's.
        is_greedy: Whether the likeliest token is chosen. Otherwise the tokens of a block that `begin` announced are
            chosen here, and of any other block all positions are asked about.
        eos_token_ids: What ends a text.
    """

    def __init__(self, processors: LogitsProcessorList, *, is_greedy: bool, eos_token_ids: list[int]):
        super().__init__([RaiseIfNan(), *processors])
        self.is_greedy, self.eos_token_ids = is_greedy, eos_token_ids
        self.looks_at_text = len(stateless_warpers(processors)) < len(processors)
        self.length: int | None = None  # of the last prefix that was asked about, where tokens are chosen here
        self.next_token: int | None = None  # chosen after it, if the text goes on
        self.draft: tuple[Proposal, AcceptRule, Judging] | None = None  # a sampled one
        self.walk: Walk | None = None  # through it
        self.tokens: list[int] = []  # chosen on the way

    def begin(self, proposal: Proposal, rule: AcceptRule, judging: Judging) -> None:
        """Let the tokens of the next block be chosen here: a chain is proposed."""
        (self.walk,) = begin_walks(proposal, judging, [proposal.tokens.shape[1]])
        self.draft, self.tokens, self.length = (proposal, rule, judging), [], None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Processed `scores` [1, V] after `input_ids` [1, S]."""
        if self.length is not None:
            follows = input_ids.shape[1] == self.length + 1 and int(input_ids[0, -1]) == self.next_token
            if not follows:
                return scores
        processed = super().__call__(input_ids, scores, **kwargs)
        if self.is_greedy or self.draft is not None:
            self.length, self.next_token = input_ids.shape[1], self._choose(processed)
        return processed

    def _choose(self, scores: Tensor) -> int | None:
        """The token after `scores` [1, V] if the text goes on with a draft token, as far as is known."""
        if self.draft is None or self.walk is None:
            token, goes_on = int(scores.argmax(-1)), True
        else:
            proposal, rule, judging = self.draft
            token = int(rule.choose_next(offer(proposal, self.walk), scores, self.walk.depth, judging))
            goes_on = self.walk.follow(token)
            self.tokens.append(token)
        return token if goes_on and token not in self.eos_token_ids else None

    def take(self) -> tuple[list[int], int]:
        """The tokens of the block that was begun, and how many of them come before the last."""
        self.draft = self.walk = self.length = None
        return self.tokens, len(self.tokens) - 1


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
    if isinstance(cache, StaticCache):
        return cache.is_croppable
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return all(hasattr(layer, "keys") and layer.keys.shape[-2] == layer.get_seq_length() for layer in layers)
