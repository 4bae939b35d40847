"""What a batch carries from round to round, of the target; what the drafter carries is in its memory."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..drafters.draft import Committed
from ..rows.cache import RowCache
from ..speculation.accept import BLOCK, GREEDY, SHARED, SIMULATED
from ..speculation.coverage import Coverage
from ..speculation.numbers import send
from ..speculation.shape import NONE, DraftShape, Shapes
from ..speculation.verdict import Proposal, Verdict
from .prefill import Prompt
from .preparation import AskedPositions

NOWHERE = 2**62


@dataclass(frozen=True)
class RoundConfig:
    """What the rounds of a batch do; what rows may differ in is in tensors instead."""

    shape: DraftShape = NONE  # where nothing is to be chosen
    others: tuple[DraftShape, ...] = ()  # what else rounds may propose
    do_sample: bool = False
    is_reproducible: bool = False  # a row's seed says its text, whatever is drafted: by shared noise along chains, too
    in_order: bool = False  # tokens are chosen one after the other in Python, since some processor looks at the text
    simulated_length: float | None = None  # accept as if drafts were that good, to measure speed
    coverage: Coverage | None = None  # likewise, by depth and rank; what the accept rule says is computed and dropped
    keeps_rows: bool = False  # rows that are done stay: their cache is returned, or hooks of others count on them
    keeps_cache: bool = False  # the target's cache is returned
    keeps_scores: bool = False  # what tokens were chosen by is handed out, so it must not be overwritten
    is_seeded: bool = False  # the ratio test draws by each row's own seed
    starts_anew: int | None = None  # after so many tokens of a text the target computes its cache anew
    max_length: int | None = None  # of a row without pads: nothing at or behind that position is ever read
    further_warpers: tuple[LogitsProcessor, ...] = ()  # stateless ones that rows do not differ in

    @property
    def shapes(self) -> Shapes:
        """What rounds may propose."""
        return Shapes((self.shape, *self.others))

    def find_rule(self, shape: DraftShape) -> str:
        """The name of the accept rule for rounds of a shape, of `speculation.accept.RULES`."""
        if self.simulated_length is not None and not self.in_order:
            return SIMULATED
        if not self.do_sample:
            return GREEDY
        return SHARED if self.is_reproducible or not shape.is_chain else BLOCK

    @property
    def needs_seeds(self) -> bool:
        """Whether some round chooses tokens by shared noise."""
        return any(self.find_rule(shape) == SHARED for shape in self.shapes.shapes)


@dataclass(slots=True)
class RoundState:
    """What a batch carries from round to round. Only `commit`, `put` and `copy_from` write to it.

    Between rounds the target's cache holds, row by row, the slots 0..length-2: all verified tokens but the root.
    """

    length: Tensor  # [B] int64, verified tokens
    root: Tensor  # [B] int64, the newest of them
    shift: Tensor  # [B, 1] or [axes, B, 1] int64, the target's position ids less its slots
    last_position: Tensor  # [] int64: nothing behind it is ever read, and a learned position embedding may end there
    seeds: Tensor  # [B] int64, what each row draws by in shared noise, or where rows have seeds
    cache: RowCache  # the target's
    asked: AskedPositions | None = None  # the target's position ids where `shift` does not say them

    TENSORS: ClassVar = ("length", "root", "shift", "last_position", "seeds")

    @classmethod
    def behind(cls, prompt: Prompt, *, max_length: int | None, seeds: list[int]) -> "RoundState":
        """The state behind the prompts, without a root yet. `max_length` is that of `RoundConfig`."""
        last = NOWHERE if max_length is None else max_length - 1 + prompt.extra
        return cls(
            length=prompt.lengths.clone(),
            root=torch.zeros_like(prompt.lengths),
            shift=prompt.shift,
            last_position=send(last, prompt.lengths.device),
            seeds=send(seeds, prompt.lengths.device),
            cache=prompt.cache,
            asked=prompt.asked,
        )

    def commit(self, proposal: Proposal, verdict: Verdict, states: Tensor | None, num_verified: int) -> Committed:
        """Make the tokens on the accepted path and the next token text. A chain's stay where they are in the cache.

        Args:
            proposal: Of the shape; no tokens after the prompt's forward.
            verdict: Over it.
            states: [B, N+1, A*Ht], the target's, of the root and the draft tokens; None after the prompt's forward.
            num_verified: Most tokens that the target may run over in the next round.

        Returns:
            What the drafter has to catch up with.
        """
        tokens, (num_accepted, next_token, path) = proposal.tokens, verdict
        if path is not None:
            self.cache.keep(self.length - 1, path)
            tokens = tokens.gather(1, (path[:, 1:] - 1).clamp(min=0))  # [B, D]
            if states is not None:
                index = path.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
                states = states.gather(1, index)  # [B, D+1, A*Ht]
        tokens = torch.nn.functional.pad(tokens, (0, 1)).scatter(1, num_accepted[:, None], next_token[:, None])
        if states is not None and self.cache.has_states:
            self.cache.keep_first(num_accepted + 1)
        if self.asked is not None:
            self.asked.commit(self.length, tokens, num_accepted + 1)
        # A row that is done and stays goes on over junk. It must not leave the cache.
        longest = self.cache.capacity - num_verified
        self.length.copy_((self.length + num_accepted + 1).clamp(max=longest))
        self.root.copy_(next_token)
        return Committed(tokens, states, num_accepted + 1)

    def over(self, cache: RowCache, rows: Tensor | None = None) -> "RoundState":
        """A copy over another cache, of `rows` [B'] int64 if they are given."""
        with torch.inference_mode(False):
            values = {name: getattr(self, name) for name in self.TENSORS}
            if rows is not None:
                values |= {name: values[name][rows] for name in ("length", "root", "seeds")}
                values["shift"] = values["shift"][..., rows, :]
            asked = self.asked if rows is None or self.asked is None else self.asked.of_rows(rows.tolist())
            return RoundState(**{name: x.clone() for name, x in values.items()}, cache=cache, asked=asked)

    def put(self, other: "RoundState", places: Tensor) -> None:
        """Let the rows of another state be in the `places` [B'] int64."""
        for name in ("length", "root", "seeds"):
            getattr(self, name)[places] = getattr(other, name)
        self.shift[..., places, :] = other.shift
        if self.asked is not None and other.asked is not None:
            self.asked.put(other.asked, places.tolist())

    def copy_from(self, other: "RoundState") -> None:
        """Take the values of another state of the same sizes, in place."""
        for name in self.TENSORS:
            getattr(self, name).copy_(getattr(other, name))
