"""Drafting inside the host's assisted decoding: batch of one, chains. The host's words end here."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import ModelOutput

from ..compat import CACHE_NAME
from ..drafters.draft import (
    Choose,
    Committed,
    Draft,
    DrafterMemory,
    Prompted,
    choose_greedy,
    make_choose_sampled,
    make_choose_shared,
)
from ..drafters.kinds import find_kind
from ..recorder import StateRecorder
from ..speculation.accept import RULES, SHARED, Judging
from ..speculation.sampling import stateless_warpers
from ..speculation.shape import Shapes, chain
from ..speculation.stats import Stopwatch
from ..speculation.verdict import Proposal, Verdict
from ..speculation.warpers import RowWarper, read_settings
from .stopping import InOrder, TokenwiseStop


@dataclass(frozen=True)
class Session:
    """What one `generate` call needs of us, and finds out. Travels through the host's loop in the place of `assistant_model`."""

    drafter: PreTrainedModel  # an Eagle3DrafterModel, bound to the target
    recorder: StateRecorder  # open, on the target
    depth: int  # K
    rule: str  # of `speculation.accept.RULES`
    judging: Judging  # what the rule may need; of a row's length it knows what the candidate generator says
    num_hidden: int  # columns of the text that are no tokens of it
    stopwatch: Stopwatch  # of the draft steps
    stop: TokenwiseStop | None = None  # where the call's criteria are asked token by token
    in_order: InOrder | None = None  # where tokens are drawn one after the other, for processors that look at the text
    verdicts: list[tuple[int, int]] = field(default_factory=list)  # draft tokens verified and kept, for each forward

    @property
    def is_shared(self) -> bool:
        """Whether tokens are chosen by shared noise, those without a draft, too."""
        return self.rule == SHARED

    def judge(self, proposal: Proposal, scores: Tensor) -> Verdict:
        """The verdict over a chain, by the target's scores [1, K+1, V]."""
        judging = self.judging._replace(shape=chain(proposal.tokens.shape[1]))
        return RULES[self.rule].judge(proposal, scores, judging)

    def begin_in_order(self, proposal: Proposal) -> None:
        """Let processors that look at the text see it token by token, if there are any."""
        if self.in_order is not None:
            judging = self.judging._replace(shape=chain(proposal.tokens.shape[1]))
            self.in_order.begin(proposal, RULES[self.rule], judging)


class DraftLogProbs(Tensor):
    """The log q [1, K, V] of a draft of ours, empty where no rule needs it: by its type it is known where the host verifies.

    Log probabilities are logits, too, so host code that knows nothing of this may take them for such.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch advises
    session: Session | None = None


class Eagle3CandidateGenerator(CandidateGenerator):
    """Proposes a chain of draft tokens each round, from the states that the target's last forward left behind.

    Between rounds the drafter's cache holds exactly the positions that the target has verified and this call has
    seen, each with the target's own states.

    Args:
        session: Drafter, recorder and verdicts of this call.
        generation_config: The call's, with its `max_length`.
        logits_processor: The call's. Its stateless warpers shape the draft too; no other ever sees a drafter's logits.
    """

    requires_model_outputs: bool = True
    # The states come from the recorder, so the host is asked for none.
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, session: Session, generation_config: GenerationConfig, logits_processor: LogitsProcessorList | None
    ):
        self.session = session
        self.max_length = generation_config.max_length
        self.kind = find_kind(session.drafter.config)
        self.memory: DrafterMemory | None = None  # from the first draft on
        self.choose: Choose = choose_greedy
        if generation_config.do_sample:
            settings, further = read_settings(stateless_warpers(logits_processor or []))
            warper, judging = RowWarper([settings], further, self.device), session.judging
            self.choose = make_choose_sampled(warper, judging.noise)
            if session.is_shared:
                self.choose = make_choose_shared(warper, judging.shared, session.drafter.draft_to_target_ids)
        self.num_drafted = 0  # draft tokens in the round under way

    @property
    def device(self) -> torch.device:
        """Where the drafter runs."""
        return self.session.drafter.device

    def get_candidates(
        self,
        input_ids: Tensor,
        *,
        model_kwargs: dict[str, Any],
        model_outputs: ModelOutput | None,
        is_first_iteration: bool,
        n_last_matches: int,
        **_: Any,  # what later hosts may pass to every generator
    ) -> tuple[Tensor, Tensor | None]:
        """Verified tokens and draft tokens [1, S+K], and log q [1, K, V] unless the draft is greedy."""
        num_refused = self.num_drafted - int(n_last_matches)
        self.num_drafted = 0
        session, draft = self.session, None
        session.judging.shared.length.fill_(input_ids.shape[1] - session.num_hidden)
        depth = min(session.depth, self.max_length - input_ids.shape[1] - 1)
        if not is_first_iteration and depth >= 1:
            with session.stopwatch:
                draft = self._draft(input_ids, model_kwargs, num_refused, depth)
        tokens = input_ids[:, :0] if draft is None else draft.tokens.to(input_ids.device)  # [1, K]
        self.num_drafted = tokens.shape[1]
        candidate_input_ids = torch.cat([input_ids, tokens], dim=-1)
        q: Tensor | None = None
        if draft is not None and draft.probs is not None:
            assert model_outputs is not None  # only the first iteration has none
            log_q = self._scatter_log(draft.probs, model_outputs.logits)
            q = log_q.as_subclass(Tensor).exp()
        elif session.is_shared:
            log_q = input_ids.new_zeros(1, 0, 1, dtype=torch.float32).as_subclass(DraftLogProbs)
        else:
            return candidate_input_ids, None
        log_q.session = session
        session.begin_in_order(Proposal(tokens, q))
        return candidate_input_ids, log_q

    def _draft(self, input_ids: Tensor, model_kwargs: dict[str, Any], num_refused: int, depth: int) -> Draft | None:
        """The draft after `input_ids` [1, S], or None if there is no position to draft from."""
        states = self.session.recorder.take(self.device, drop_last=num_refused)  # [1, T, A*Ht]
        # Embeddings given as a prompt have no token ids: the drafter starts where ids do.
        T = min(states.shape[1], input_ids.shape[1])
        states, tokens = states[:, -T:], input_ids[:, -T:].to(self.device)  # each token one after its state
        drafter, widest = self.session.drafter, chain(self.session.depth)
        if self.memory is None:
            position_ids, is_real = first_positions(T, model_kwargs)
            states, tokens = states[:, is_real.to(self.device)], tokens[:, is_real.to(self.device)]
            if not (T := tokens.shape[1]):
                return None
            count, first = torch.tensor([T]), position_ids[:, 0]
            prompted = Prompted(tokens.roll(1, dims=1), states, count, first)
            self.memory = self.kind.begin(drafter, prompted, Shapes((widest,)))
            committed = Committed(tokens[:, -1:], None, torch.ones_like(count))
        else:
            committed = Committed(tokens, states, torch.tensor([T]))
        self.memory.cache.reserve(int(self.memory.start) + 2 * widest.num_slots)
        self.kind.catch_up(self.memory, committed, widest)
        return self.kind.propose(drafter, self.memory, chain(depth), self.choose)

    def _scatter_log(self, probs: Tensor, target_logits: Tensor) -> DraftLogProbs:
        """Log q [1, K, V] of `probs` [1, K, V_d], -inf outside the draft vocabulary, on the target's device."""
        B, K, _ = probs.shape
        log_q = probs.new_full((B, K, target_logits.shape[-1]), -torch.inf)
        index = self.session.drafter.draft_to_target_ids.expand(B, K, -1)  # [1, K, V_d]
        log_q = log_q.scatter_(-1, index, probs.log()).to(target_logits.device)
        return log_q.as_subclass(DraftLogProbs)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:  # noqa: ARG002
        """Note the verdict of the round over `input_ids` [1, S], all verified."""
        self.session.verdicts.append((self.num_drafted, int(num_matches)))
        if self.session.stop is not None:
            self.session.stop.verified_length = input_ids.shape[1]


def first_positions(num_states: int, model_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Positions [1, T'] of the last `num_states` states that are not padding, and which those are, [T] bool.

    Counted as the host counts them: from the attention mask, or from the cache where it dropped a mask of ones. Both
    cover what an earlier call left in the cache.
    """
    mask = model_kwargs.get("attention_mask")  # [1, S], the root included
    if mask is None:
        past = int(model_kwargs[CACHE_NAME].get_seq_length())  # in 5.17 a tensor at times
        return torch.arange(past - num_states, past)[None], torch.ones(num_states, dtype=torch.bool)
    is_real = mask[0, -1 - num_states : -1].bool()  # [T]
    position_ids = mask.long().cumsum(-1)[:, -1 - num_states : -1] - 1
    return position_ids[:, is_real], is_real
