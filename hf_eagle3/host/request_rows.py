"""A request of its own, as a row: what plain decoding of it alone would be given, with settings that are its alone."""

import copy
import numbers
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import MaxTimeCriteria, StopStringCriteria

from ..decoding.preparation import find_switch
from ..decoding.row import Row
from ..speculation.sampling import stateless_warpers
from ..speculation.shared_noise import MAX_SEED
from ..speculation.warpers import RowSettings, read_settings
from .desk import Request
from .processors import copy_for_row, looks_at_batch
from .refusals import refuse_foreign_tokens, refuse_settings
from .seeds import is_seed

# What a request may bring beside fields of a generation config.
BRINGS = ("logits_processor", "prefix_allowed_tokens_fn", "seed", "stopping_criteria", "streamer", "tokenizer")
FIELDS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
# Fields that say nothing about one row, or that the host's batches do not look at either.
NOT_HERE = ("cache_implementation", "return_dict_in_generate", "output_scores", "output_logits")


class BadRequestError(ValueError):
    """A request that cannot be decoded, whatever else runs."""


class Asked(NamedTuple):
    """What a request asks for, all of it settled."""

    settings: GenerationConfig
    brings: dict[str, Any]
    eos: tuple[int, ...]


def refuse_unknown_settings(names: Sequence[str]) -> None:
    """Raise if a request is given settings by names that mean nothing."""
    if unknown := sorted(set(names) - FIELDS - set(BRINGS)):
        raise ValueError(
            f"A request was given {', '.join(unknown)}; expected fields of a GenerationConfig, or {', '.join(BRINGS)}."
        )


def read_tokens(given: Any) -> list[int]:  # Any: whatever was given
    """The token ids of a prompt.

    Raises:
        BadRequestError: It has none, or they are something else.
    """
    ids = given.tolist() if hasattr(given, "tolist") else given
    is_list = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
    if not is_list or not all(isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in ids):
        raise BadRequestError("The prompt of a request is a list of token ids.")
    if not len(ids):
        raise BadRequestError("The prompt is empty (input_ids of length 0): give at least one token, such as BOS.")
    if min(ids) < 0:
        raise BadRequestError(f"The prompt has the token {min(ids)}: ids count from 0.")
    return [int(x) for x in ids]


def count_positions(target: PreTrainedModel) -> int | None:
    """The longest text that `target` was made for; None if nothing says."""
    config = target.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


class RowMaker:
    """Makes rows of requests.

    Args:
        target: The model to generate with.
        settings: For requests that do not say otherwise, as they are: nothing is taken from the target's own, but what
            ends a text.
        keeps_logprobs: Keep how likely each token was.
    """

    def __init__(self, target: PreTrainedModel, settings: GenerationConfig, *, keeps_logprobs: bool = False):
        self.target, self.settings, self.keeps_logprobs = target, settings, keeps_logprobs
        self.positions = count_positions(target)
        self._switch = find_switch(target)

    def ask(self, settings: dict[str, Any], *, max_new_tokens: Any, eos_token_id: Any) -> Asked:  # Any: user's
        """What a request with these settings asks for; None leaves it to those of all requests.

        Raises:
            ValueError: They are unknown, contradict themselves, or decode in another way.
        """
        refuse_unknown_settings(list(settings))
        brings = {name: settings[name] for name in BRINGS if settings.get(name) is not None}
        if not is_seed(seed := brings.get("seed", 0)):
            raise ValueError(f"seed is a whole number from 0 to {MAX_SEED}, got {seed!r}.")
        own = copy.deepcopy(self.settings)
        for name in NOT_HERE:
            setattr(own, name, None)
        own.update(**{name: value for name, value in settings.items() if name in FIELDS})
        given = (max_new_tokens, own.max_new_tokens)
        own.max_new_tokens = next((n for n in given if n is not None), None)
        own.use_cache = True  # the host's engine has one whatever this says, and its server says False
        refuse_settings(own)
        config = self.target.config.get_text_config(decoder=True)  # not every family's has the field
        places = (eos_token_id, own.eos_token_id, getattr(config, "eos_token_id", None))
        eos = next((given for given in places if given is not None), ())
        eos = eos.tolist() if hasattr(eos, "tolist") else eos
        eos = [int(token) for token in (eos if isinstance(eos, Sequence) else [eos]) if int(token) >= 0]
        own.eos_token_id = eos or None
        if own.stop_strings is not None and "tokenizer" not in brings:
            raise ValueError("stop_strings needs the target's tokenizer: give tokenizer=... beside it.")
        return Asked(own, brings, tuple(eos))

    def make(self, tokens: list[int], asked: Asked, *, seed: int | None) -> Row:
        """The row of a request.

        Raises:
            BadRequestError: It is longer than the target's texts may be, or has tokens that the target does not have.
        """
        own, target = copy.deepcopy(asked.settings), self.target
        prompt = torch.tensor([tokens], device=target.device)
        try:
            refuse_foreign_tokens(target, prompt)
        except IndexError as error:
            raise BadRequestError(str(error)) from None
        max_new = self._find_limit(len(tokens), own.max_new_tokens)
        own.max_length = None if max_new is None else len(tokens) + max_new
        target._prepare_special_tokens(own, True, device=target.device, batch_size=1)
        processors = self._make_processors(prompt, own, asked.brings)
        stateless = stateless_warpers(processors)
        settings, further = read_settings(stateless)
        is_greedy, looks_at_text = not own.do_sample, len(stateless) < len(processors) or bool(further)
        # Beside rows that draw, scores of a greedy row say nothing but its token.
        is_plain = is_greedy and not looks_at_text
        return Row(
            prompt,
            max_new=max_new,
            eos=asked.eos,
            criteria=self._make_criteria(own, asked.brings),
            processors=processors,
            settings=RowSettings(is_greedy=True) if is_greedy else settings,
            looks_at_text=looks_at_text,
            seed=seed,
            keep_scores=self.keeps_logprobs and not is_plain,
            keep_logits=self.keeps_logprobs and is_plain,
        )

    def _find_limit(self, length: int, max_new: Any) -> int | None:  # Any: whatever was given
        """Most new tokens behind a prompt of that length.

        Raises:
            BadRequestError: It is too long.
        """
        limit = int(max_new) if isinstance(max_new, numbers.Integral) else None
        if max_new is not None and (limit is None or limit < 1):
            raise BadRequestError(f"max_new_tokens is a whole number above 0, got {max_new!r}.")
        name = type(self.target).__name__
        if self.positions is not None:
            room = self.positions - length
            if room < (1 if limit is None else limit):
                raise BadRequestError(
                    f"A prompt of {length} tokens and {limit or 'some'} new ones are more than the {self.positions} "
                    f"positions of {name}."
                )
            limit = room if limit is None else limit
        switch = self._switch
        if switch is not None and not switch.computes_anew and length <= switch.after:
            room = switch.after - length
            if limit is None or limit > room:
                raise BadRequestError(
                    f"Where a text passes {switch.after} tokens, {name} forgets it all in this version of Transformers: a "
                    f"prompt of {length} tokens has room for {room} new ones."
                )
        return limit

    def _make_processors(
        self, prompt: Tensor, settings: GenerationConfig, brings: dict[str, Any]
    ) -> LogitsProcessorList:
        """The host's for these settings, and the request's own, which belong to its text alone."""
        own = LogitsProcessorList(brings.get("logits_processor") or ())
        allow = brings.get("prefix_allowed_tokens_fn")
        processors = self.target._get_logits_processor(
            generation_config=settings,
            input_ids_seq_length=prompt.shape[1],
            encoder_input_ids=prompt,
            prefix_allowed_tokens_fn=allow,
            logits_processor=LogitsProcessorList([copy_for_row(p) if looks_at_batch(p) else p for p in own]),
            device=str(prompt.device),
            model_kwargs={},
        )
        return LogitsProcessorList(processors)

    def _make_criteria(self, settings: GenerationConfig, brings: dict[str, Any]) -> list[Any]:  # Any: user's, too
        """What ends the row by its own text, but for end-of-sequence and length."""
        criteria: list[Any] = list(brings.get("stopping_criteria") or ())
        if settings.max_time is not None:
            criteria.append(MaxTimeCriteria(max_time=settings.max_time))
        if settings.stop_strings is not None:
            criteria.append(StopStringCriteria(stop_strings=settings.stop_strings, tokenizer=brings["tokenizer"]))
        return criteria


class Asking:
    """Makes requests of what callers give.

    Args:
        maker: Makes their rows.
        num_return_sequences: Texts for each prompt.
        seed: What the first text draws by, which later ones count on from; None for chance.
    """

    def __init__(self, maker: RowMaker, *, num_return_sequences: int = 1, seed: int | None = None):
        self.maker, self._num_texts, self._seed = maker, num_return_sequences, seed
        self._lock = threading.Lock()  # of what follows
        self._ids: set[str] = set()  # under way
        self._num_ids = self._num_rows = 0

    def ask(
        self,
        input_ids: Any,  # whatever was given
        request_id: str | None,
        *,
        max_new_tokens: Any,
        eos_token_id: Any,
        settings: dict[str, Any],
        is_streaming: bool,
        records_times: bool,
    ) -> list[Request]:
        """One request for each text, the one that has the id last. What cannot be decoded has an error.

        Raises:
            ValueError: A setting means nothing, or the id is another request's.
        """
        asked = self.maker.ask(settings, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
        ids = self._take_ids(request_id)
        seeds = self._take_seeds(asked.brings.get("seed"))
        requests = []
        for name, seed in zip(ids, seeds, strict=True):
            request = Request(name, [], is_streaming=is_streaming, records_times=records_times)
            request.streamer = asked.brings.get("streamer")
            try:
                request.prompt = read_tokens(input_ids)
                request.row = self.maker.make(request.prompt, asked, seed=seed)
            except BadRequestError as error:
                request.error = error
            except Exception:
                for taken in ids:
                    self.forget(taken)
                raise
            requests.append(request)
        return requests

    def forget(self, request_id: str) -> None:
        """Let an id be used again."""
        with self._lock:
            self._ids.discard(request_id)

    def _take_ids(self, wanted: str | None) -> list[str]:
        """An id for each text of a prompt, the one that was wanted last."""
        with self._lock:
            while True:
                own = f"req_{self._num_ids}" if wanted is None else wanted
                self._num_ids += wanted is None
                ids = [*(f"{own}__child#{number}" for number in range(self._num_texts - 1)), own]
                if not self._ids & set(ids):
                    self._ids |= set(ids)
                    return ids
                if wanted is not None:
                    raise ValueError(f"request_id {wanted!r} is that of another request under way.")

    def _take_seeds(self, own: int | None) -> list[int | None]:
        """What each text of a prompt draws by."""
        with self._lock:
            first, self._num_rows = self._num_rows, self._num_rows + self._num_texts
        seed, first = (self._seed, first) if own is None else (int(own), 0)
        texts = range(first, first + self._num_texts)
        return [None if seed is None else (seed + text) % (MAX_SEED + 1) for text in texts]
