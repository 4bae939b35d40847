"""A conversation with a target: each turn goes on from the cache of the one before, with or without a drafter."""

import math
import threading
import time
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from ..compat import CACHE_NAME, count_cached, rewind
from ..console.opening import rendering
from ..rows.recurrent import continues
from .loading import Pair


class Reply(NamedTuple):
    """An answer, and what it took."""

    text: str
    num_tokens: int
    seconds: float
    acceptance_length: float | None  # None where nothing was drafted
    num_cached: int  # tokens of the prompt that the cache held

    def __str__(self) -> str:
        drafts = "drafting off" if self.acceptance_length is None else f"{self.acceptance_length:.2f} tokens a round"
        if self.acceptance_length is not None and math.isnan(self.acceptance_length):
            drafts = "too short to draft"
        return f"{self.num_tokens / self.seconds:.1f} tok/s, {drafts}"


class StopWhen(StoppingCriteria):
    """Stops a call when an event is set."""

    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # noqa: ARG002  the host's signature
        """[B] bool."""
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


class Conversation:
    """Turns so far, and the target's cache of them.

    Args:
        pair: The models.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0: greedy.
    """

    def __init__(self, pair: Pair, *, max_new_tokens: int, temperature: float = 0.0):
        if not pair.tokenizer.chat_template:
            raise ValueError(
                f"{pair.tokenizer.name_or_path} has no chat template, so there is nothing to chat by: it goes on with text. Give a "
                "target that was made to chat."
            )
        self._pair, self.is_drafting = pair, True
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self._options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True, **sampling}
        self.clear()

    def clear(self) -> None:
        """Forget all turns."""
        self._messages: list[dict[str, str]] = []
        self._cache: Cache | None = None
        self._cached: list[int] = []  # the tokens that it holds

    def ask(self, text: str, *, stop: threading.Event, streamer: BaseStreamer | None = None) -> Reply:
        """The answer to the user's next turn. Setting `stop` ends it early; what was said by then stays said.

        Raises:
            ValueError: It cannot be answered; then it was not asked.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = self._render(messages)  # [1, T]
        cache, num_cached = self._take_cache(ids[0].tolist())
        target, drafter, tokenizer = self._pair
        start = time.perf_counter()
        out = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=drafter if self.is_drafting else None,
            stopping_criteria=StoppingCriteriaList([StopWhen(stop)]),
            streamer=streamer,
            **({} if cache is None else {CACHE_NAME: cache}),
            **self._options,
        )
        whole = out.sequences[0].tolist()
        seconds = time.perf_counter() - start
        new = whole[ids.shape[1] :]
        self._cache = out.get(CACHE_NAME)
        self._cached = [] if self._cache is None else whole[: count_cached(self._cache)]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        speculation = getattr(out, "speculation", None)
        length = None if speculation is None else speculation.acceptance_length
        return Reply(answer, len(new), seconds, length, num_cached)

    def _render(self, messages: list[dict[str, str]]) -> Tensor:
        """[1, T] int64: the conversation up to where the target answers."""
        with rendering(self._pair.tokenizer):
            found = self._pair.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        return found["input_ids"].to(self._pair.target.device)

    def _take_cache(self, ids: list[int]) -> tuple[Cache | None, int]:
        """The cache of as many first tokens of `ids` as it can be cut back to, and their number."""
        cache, self._cache = self._cache, None  # a call that fails may leave anything in it
        pairs = zip(self._cached, ids[:-1], strict=False)  # as far as both go
        num_common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._cached), len(ids) - 1))
        if cache is None or not num_common or not continues(self._pair.target):
            return None, 0
        surplus = len(self._cached) - num_common
        if surplus and not cache.is_croppable:
            return None, 0
        try:
            rewind(cache, surplus)
        except RuntimeError:  # a window has moved on
            return None, 0
        return cache, num_common
