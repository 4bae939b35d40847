"""An evaluation: sums over rows, rounds walked along the answers, and rounds really decoded."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..decoding.arena import release_graphs
from ..host.batching import why_not_open
from ..host.loop_choice import why_not_target
from ..modeling import DrafterModel
from ..speculation.stats import Speculation
from .arguments import Eagle3TrainingArguments
from .distributed import number_targets, served_copy, sum_over_processes
from .kinds import Plan
from .metrics import add_sums, add_walks, by_step, simulated_acceptance_length
from .states.online import StateSource
from .step.acceptance import Walk, walk
from .step.batch import Batch, Collator
from .step.head_loss import Method, StepSums
from .step.losses import LOSSES
from .step.target_head import DraftVocabulary

logger = logging.get_logger(__name__)


class Measured(NamedTuple):
    """The results of an evaluation without decoding."""

    metrics: dict[str, float]
    sums: StepSums  # the metrics are computed from them
    walked: Walk  # rounds along the answers


@dataclass(frozen=True)
class Evaluation:
    """Measures the drafter of a trainer. All processes must call its methods.

    Args:
        args: The trainer's.
        plan: The trainer's.
        accelerator: The trainer's.
        model: The wrapped drafter.
        source: Gives hidden states.
        vocabulary: The drafter's.
        run: Gives loss and sums of a batch, with a scale [k] of each step's loss.
        step_scale: Gives the factor [k] on the loss sum of each step, from the number [k] of slots that train there.
    """

    args: Eagle3TrainingArguments
    plan: Plan
    accelerator: Accelerator
    model: nn.Module
    source: StateSource
    vocabulary: DraftVocabulary
    run: Callable[[nn.Module, Batch, Tensor], tuple[Tensor, StepSums]]
    step_scale: Callable[[Tensor], Tensor]

    def measure(self, batches: DataLoader, description: str) -> Measured:
        """Losses, accuracies and rounds along the answers, over all of `batches`."""
        args, k, depth = self.args, self.plan.num_steps, self.plan.eval_depth
        steps = max(k, depth)
        walked = Walk(0, np.zeros(depth, dtype=np.int64))
        proposable = torch.zeros(
            2, dtype=torch.int64, device=args.device
        )  # tokens of answers; those in the vocabulary

        def sums_of_batches() -> Iterator[StepSums]:
            nonlocal walked
            scale = torch.ones(steps, device=args.device)
            for batch in tqdm(batches, desc=description, disable=self._is_quiet, leave=False):
                batch = batch.to(args.device)
                _, sums = self.run(self.model, batch, scale)
                walked += walk_batch(sums.hits[:depth], batch)
                draft_ids = self.vocabulary.to_draft[batch.input_ids[batch.loss_mask]]
                proposable.add_(torch.stack([draft_ids.ge(-1).sum(), draft_ids.ge(0).sum()]))
                yield sums

        sums = add_sums(sums_of_batches(), steps, self.accelerator)
        walked = add_walks(walked, self.accelerator)
        tokens, in_vocabulary = sum_over_processes(self.accelerator, proposable).tolist()
        losses = sums.loss[:k] * self.step_scale(sums.num_live[:k])
        metrics = {
            **by_step("", sums),
            "loss": float(losses.sum()),
            "oov_rate": 1 - in_vocabulary / max(tokens, 1),
            "walked_acceptance_length": float(walked.acceptance_length),
            "simulated_acceptance_length": simulated_acceptance_length(sums, depth),
        }
        return Measured(metrics, sums, walked)

    def generate(self, target: PreTrainedModel, rows: Any) -> Walk:  # Any: by index, of any class
        """Rounds of greedy decoding from the prompts of the first of `rows`, by all processes together."""
        index, count = number_targets(target, self.accelerator)
        mine = list(prompts_of(rows, self.args.eval_generate_prompts))[index::count]
        # Processes that share a target each count the same rounds.
        return add_walks(self._decode(target, mine), self.accelerator)

    @property
    def _is_quiet(self) -> bool:
        return self.args.disable_tqdm or self.args.local_process_index > 0

    def _decode(self, target: PreTrainedModel, prompts: list[Tensor]) -> Walk:
        """Rounds of greedy decoding from `prompts`, really decoded where the drafter can assist `target`."""
        args, depth = self.args, self.plan.eval_depth
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        on_gpu = target.device.type == "cuda"  # there, decoding is fastest in the target's dtype, as it will be served
        why_not = why_not_target(target)
        if why_not is None:
            served = served_copy(model, target.dtype if on_gpu else torch.float32, target.device)
            given = (target, served, prompts, depth, args.eval_max_new_tokens)
            return generate_and_count(*given, is_quiet=self._is_quiet)
        logger.warning_once(
            f"{why_not}: in evaluation the target answers by itself, and acceptance lengths are walked along its greedy "
            "answers, which gives what decoding with the drafter would."
        )
        served = served_copy(model, torch.float32, args.device).bind(target)
        nothing = torch.zeros(max(depth, self.plan.num_steps), device=args.device)
        method = Method(LOSSES["cross_entropy"], nothing, nothing)

        def find_hits(batch: Batch) -> Tensor:
            batch = batch.to(args.device)
            states = self.source.states(batch)
            with self.accelerator.autocast():
                sums = self.plan.step(served, batch, states, self.source.head, self.vocabulary, method)[1]
            return sums.hits[:depth]

        collate = self.plan.collator(depth)
        bar = tqdm(prompts, desc="Generating", disable=self._is_quiet, leave=False)
        return generate_and_walk(target, bar, args.eval_max_new_tokens, collate, find_hits)


def walk_batch(hits: Tensor, batch: Batch, *, is_cut: bool = False) -> Walk:
    """`walk` over each document of a batch; `hits` [K, L] as in `StepSums`."""
    rows, trained = batch.rows.cpu(), batch.trained
    mask = batch.loss_mask.cpu().numpy()
    whole = np.zeros((len(hits), len(mask)), dtype=bool)
    whole[:, (rows if trained is None else rows[trained.cpu()]).numpy()] = hits.cpu().numpy()
    total, start = Walk(0, np.zeros(len(hits), dtype=np.int64)), 0
    for length in batch.lengths:
        total += walk(whole[:, start : start + length], mask[start : start + length], is_cut=is_cut)
        start += length
    return total


def prompts_of(rows: Any, count: int) -> Iterator[Tensor]:  # Any: rows by index, of whatever class
    """[T] int64, the prompts of the first `count` rows: the tokens before the first one that the target generated."""
    for i in range(min(count, len(rows))):
        ids, mask = np.asarray(rows[i]["input_ids"]), np.asarray(rows[i]["loss_mask"], dtype=bool)
        if (length := int(mask.argmax())) > 0:
            yield torch.from_numpy(ids[:length].astype(np.int64))


@torch.no_grad()
def generate_and_count(
    target: PreTrainedModel,
    drafter: DrafterModel,
    prompts: list[Tensor],
    depth: int,
    max_new_tokens: int,
    *,
    is_quiet: bool = True,
) -> Walk:
    """Decode greedily from each of `prompts` [T] with the real loop, and count its rounds; a bar tells how far it is."""
    settings = copy.deepcopy(target.generation_config)
    # With a cache, whatever the target's config says, as MPT's does.
    settings.update(max_new_tokens=max_new_tokens, max_length=None, do_sample=False, num_beams=1, use_cache=True)
    given = {"generation_config": settings, "assistant_model": drafter, "num_assistant_tokens": depth}
    decode = decode_together if why_not_open(target) is None else decode_alone
    total = Walk(0, np.zeros(depth, dtype=np.int64))
    for speculation in decode(target, prompts, given, is_quiet=is_quiet):
        accepted = np.zeros(depth, dtype=np.int64)
        counts = speculation.rounds_accepting[:depth]
        accepted[: len(counts)] = counts
        total += Walk(speculation.rounds, accepted)
    if target.device.type == "cuda":
        release_graphs()  # training needs the memory
        torch.cuda.empty_cache()
    return total


def decode_together(
    target: PreTrainedModel, prompts: list[Tensor], given: dict[str, Any], *, is_quiet: bool
) -> Iterator[Speculation]:
    """How each of `prompts` [T] went, in rounds that they share as long as they run.

    Raises:
        RuntimeError: One could not be decoded.
    """
    settings = given["generation_config"]
    if settings.eos_token_id is None:  # `generate` then never ends; the requests of `generate_batch` ask the config
        settings.eos_token_id = -1
    outputs = target.generate_batch([prompt.tolist() for prompt in prompts], progress_bar=not is_quiet, **given)
    for output in outputs.values():
        if output.error is not None:
            raise RuntimeError(f"An evaluation's prompt could not be decoded: {output.error}")
        yield output.speculation


def decode_alone(
    target: PreTrainedModel, prompts: list[Tensor], given: dict[str, Any], *, is_quiet: bool
) -> Iterator[Speculation]:
    """The same one after the other, where rounds of `target` cannot be joined."""
    for prompt in tqdm(prompts, desc="Generating", disable=is_quiet, leave=False):
        ids = prompt[None].to(target.device)
        options = {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
        yield target.generate(ids, **options, **given).speculation


@torch.no_grad()
def generate_and_walk(
    target: PreTrainedModel,
    prompts: Iterable[Tensor],
    max_new_tokens: int,
    collate: Collator,
    find_hits: Callable[[Batch], Tensor],
) -> Walk:
    """The counts of `generate_and_count` for a target that no drafter can assist.

    The target answers each of `prompts` [T] greedily by itself, and rounds are walked along its answers.

    Args:
        target: The model that answers.
        prompts: [T] int64 each.
        max_new_tokens: The longest answer.
        collate: Makes a batch of one row.
        find_hits: Gives the hits [K, L] of a batch, as in `StepSums`.
    """
    total = Walk(0, np.zeros(collate.ttt_steps, dtype=np.int64))
    for prompt in prompts:
        ids = prompt[None].to(target.device)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        text = target.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].cpu().numpy()
        batch = collate([{"input_ids": text, "loss_mask": np.arange(len(text)) >= len(prompt)}])
        total += walk_batch(find_hits(batch), batch, is_cut=len(text) == len(prompt) + max_new_tokens)
    return total
