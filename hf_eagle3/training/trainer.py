"""`Eagle3Trainer`: the host's Trainer around one TTT step, with the frozen target in the loop."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..checkpoints.card import write_card
from ..checkpoints.exporter import describe_target
from ..modeling import Eagle3DrafterModel
from .acceptance import Walk, walk
from .batch import Batch, Collator
from .data import TokenDataset, check_token_ids
from .losses import LOSSES
from .new import new_drafter
from .states import OnlineStates, StateSource
from .target_head import DraftVocabulary
from .ttt import Lessons, StepSums, ttt
from .vocabulary import choose_draft_vocabulary, count_supervised_tokens

# What the host's Trainer writes into the configs of the model it trains.
HOST_WRITES = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")


@dataclass
class Eagle3TrainingArguments(TrainingArguments):
    """The host's training arguments, and what TTT adds. Changed defaults: learning rate, schedule, clipping, betas."""

    ttt_steps: int = field(default=7, metadata={"help": "Draft steps unrolled in training (arXiv:2503.01840: 7)."})
    loss_type: str = field(default="forward_kl", metadata={"help": f"How a step is taught: {', '.join(LOSSES)}."})
    ttt_decay: float = field(default=0.8, metadata={"help": "Step t weighs ttt_decay to the power t in the loss."})
    draft_vocab_size: int = field(
        default=32000, metadata={"help": "Tokens a new drafter can propose; ignored when a drafter is given."}
    )
    max_length: int = field(default=2048, metadata={"help": "Longer training rows are cut on the right, in tokens."})
    eval_depth: int = field(default=3, metadata={"help": "Draft depth K of eval_acceptance_length."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradient norm is clipped to this."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave off: the collator reads the rows."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ttt_steps < 1:
            raise ValueError(f"ttt_steps must be at least 1, got {self.ttt_steps}.")
        if not 0 < self.ttt_decay <= 1:
            raise ValueError(f"ttt_decay must lie in (0, 1], got {self.ttt_decay}.")
        if self.eval_depth < 1:
            raise ValueError(f"eval_depth must be at least 1, got {self.eval_depth}.")


class Eagle3Trainer(Trainer):
    """Train a drafter for a frozen target by training-time test (arXiv:2503.01840).

    The drafter is trained in float32 (under autocast with `bf16=True`); the target keeps its own precision, stays out
    of optimiser and checkpoints, and is never written to.

    Args:
        model: The drafter to go on with, or None: a new EAGLE-3.1 drafter sized after the target, with the
            `args.draft_vocab_size` most frequent supervised tokens as draft vocabulary.
        target_model: The target; any decoder of the host.
        args: `Eagle3TrainingArguments`.
        train_dataset, eval_dataset: Rows with `messages`, or with `input_ids` and `loss_mask` (1 on generated
            tokens); any iterable of mappings. Several eval sets: a dict of them, by name. For
            `eval_acceptance_length` to be exact, the eval answers must be the target's own greedy ones.
        processing_class: The target's tokenizer; needed for `messages`, and saved with the drafter.
        kwargs: As for the host's Trainer.

    Raises:
        ValueError: Data without supervision, a drafter that does not fit the target, half-precision weights, several
            processes.
    """

    # The loss is normed over the whole accumulated batch. Read from Transformers 5.23 on; `__init__` says it to older.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Eagle3DrafterModel | None = None,
        target_model: PreTrainedModel | None = None,
        args: Eagle3TrainingArguments | None = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        if target_model is None:
            raise ValueError("Eagle3Trainer needs target_model: the model whose output the drafter learns to propose.")
        args = Eagle3TrainingArguments() if args is None else args
        if model is not None and model.config.is_parallel:
            raise ValueError(
                f"mask_token_id={model.config.mask_token_id}: a P-EAGLE drafter has no later steps to unroll, and cannot be "
                "trained here."
            )
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                f"Eagle3Trainer trains in one process on one device, and found {args.world_size} processes and "
                f"{args.n_gpu} GPUs. Set CUDA_VISIBLE_DEVICES to one GPU."
            )
        vocab_size = target_model.config.get_text_config(decoder=True).vocab_size
        train_rows = _tokenize(train_dataset, processing_class, args.max_length, vocab_size)
        eval_rows: Any  # one set, several by name, or None
        if isinstance(eval_dataset, dict):
            eval_rows = {
                name: _tokenize(rows, processing_class, args.max_length, vocab_size)
                for name, rows in eval_dataset.items()
            }
        else:
            eval_rows = _tokenize(eval_dataset, processing_class, args.max_length, vocab_size)
        if model is None:
            model = self._new_drafter(target_model, args, train_rows)
        if model.dtype != torch.float32:
            raise ValueError(
                f"Train the drafter in float32 (load it with dtype=torch.float32), got {model.dtype}: half precision "
                "rounds small updates away. Use bf16=True for fast arithmetic."
            )
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                "TTT needs an attention that takes its mask: load the drafter with attn_implementation='sdpa', got "
                f"{model.config._attn_implementation!r}."
            )
        target_model.eval().requires_grad_(False)
        if not getattr(target_model, "hf_device_map", None) and not getattr(target_model, "is_quantized", False):
            target_model.to(args.device)
        model.bind(target_model)
        # In a tuple, so that no module tracker takes the target for a part of this trainer's model.
        self._target = (target_model,)
        self._source: StateSource = OnlineStates(target_model, model.bound_aux_layer_ids or ())
        self._vocabulary = DraftVocabulary(model.draft_to_target_ids.to(args.device), model.config.vocab_size)
        self._train_sums: list[tuple[Tensor, ...]] = []
        own_configs = KeepOwnConfigs(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            data_collator=Collator(
                max(args.ttt_steps, args.eval_depth), every_slot=model.config.num_hidden_layers > 1
            ),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        own_configs.restore()
        self.add_callback(own_configs)

    @staticmethod
    def _new_drafter(
        target: PreTrainedModel, args: Eagle3TrainingArguments, dataset: TokenDataset | None
    ) -> Eagle3DrafterModel:
        if dataset is None:
            raise ValueError("Eagle3Trainer needs train_dataset to choose a new drafter's vocabulary, or a drafter.")
        vocab_size = target.config.get_text_config(decoder=True).vocab_size
        ends = target.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        counts = count_supervised_tokens(dataset, vocab_size)
        return new_drafter(
            target, choose_draft_vocabulary(counts, min(args.draft_vocab_size, vocab_size), always=ends)
        )

    @property
    def target_model(self) -> PreTrainedModel:
        """The frozen target."""
        return self._target[0]

    def _run(self, model: torch.nn.Module, inputs: Batch, scale: Tensor) -> tuple[Tensor, StepSums]:
        """The loss of `inputs` and its sums, with `scale` [k] on the loss of each step."""
        states = self._source.states(inputs)
        drafter = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        lessons = Lessons(LOSSES[self.args.loss_type], scale, torch.zeros_like(scale))

        def forward() -> tuple[Tensor, StepSums]:
            with self.accelerator.autocast():
                return ttt(drafter, inputs, states, self._source.head, self._vocabulary, lessons)

        return call_as_forward(model, drafter, forward)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:  # Any: rows, a name, or None, as the host's
        """Batches of `eval_dataset`, whose rows may be as they are given to the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            vocab_size = self.model.config.vocab_size
            eval_dataset = _tokenize(eval_dataset, self.processing_class, self.args.max_length, vocab_size)
        return super().get_eval_dataloader(eval_dataset)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """[k] slots that train at each step, over all batches of one update."""
        steps = torch.arange(self.args.ttt_steps)[:, None]
        counts = [(batch["depth"].cpu() > steps).sum(1) for batch in batch_samples]
        return torch.stack(counts).sum(0).to(device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, StepSums]:
        """Sum over steps of `ttt_decay`^t times the mean loss of step t over the supervised slots of the update."""
        counts = (
            self._get_num_items_in_batch([inputs], self.args.device)
            if num_items_in_batch is None
            else num_items_in_batch
        )
        loss, sums = self._run(model, inputs, self._step_weights(counts) / counts.clamp_min(1))
        if model.training:
            self._train_sums.append((sums.loss, sums.correct, sums.num_live))
        return (loss, sums) if return_outputs else loss

    def _step_weights(self, counts: Tensor) -> Tensor:
        return self.args.ttt_decay ** torch.arange(len(counts), device=counts.device)  # [k]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each step's loss and accuracy since the last training log."""
        if "loss" in logs and self._train_sums:
            loss, correct, count = (torch.stack(parts).sum(0) for parts in zip(*self._train_sums, strict=True))
            self._train_sums.clear()
            logs |= _by_step("", loss, correct, count)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and accuracy by step, and the acceptance length of greedy chain drafting along the eval answers."""
        del prediction_loss_only, ignore_keys
        self.model.eval()
        steps, depth = max(self.args.ttt_steps, self.args.eval_depth), self.args.eval_depth
        scale = torch.ones(steps, device=self.args.device)
        sums, walked, num_rows = [], Walk(0, np.zeros(depth, dtype=np.int64)), 0
        for inputs in tqdm(dataloader, desc=description, disable=self.args.disable_tqdm, leave=False):
            inputs = self._prepare_inputs(inputs)
            _, batch = self._run(self.model, inputs, scale)
            sums.append((batch.loss, batch.correct, batch.num_live))
            walked += walk_batch(batch.hits[:depth], inputs)
            num_rows += len(inputs["lengths"])
        loss, correct, count = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        weights = self.args.ttt_decay ** torch.arange(self.args.ttt_steps, device=loss.device)
        k = self.args.ttt_steps
        metrics = _by_step(f"{metric_key_prefix}_", loss, correct, count)
        metrics[f"{metric_key_prefix}_loss"] = float((weights * loss[:k] / count[:k].clamp_min(1)).sum())
        metrics[f"{metric_key_prefix}_acceptance_length"] = float(walked.acceptance_length)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_rows)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **others: Any,  # the host's, for models trained on a labelled data set
    ) -> None:
        """Write the drafter's card, with what the last evaluation measured; `push_to_hub` uploads it.

        Raises:
            ValueError: The target's name is not known, or an argument says what the card does not have.
        """
        if others or tags:
            raise ValueError(f"A drafter's card has no {', '.join(sorted([*others, *(['tags'] if tags else [])]))}.")
        if not self.is_world_process_zero():
            return
        target = describe_target(None, self.model)
        if target.name is None:
            raise ValueError(
                "A model card names the target the drafter is for: set trainer.model.config.target_name_or_path."
            )
        last: dict[str, float] = next(
            (logs for logs in reversed(self.state.log_history) if "eval_acceptance_length" in logs), {}
        )
        metrics = {"Acceptance length": last["eval_acceptance_length"]} if last else {}
        write_card(
            self.model,
            Path(self.args.output_dir),
            target=target,
            metrics=metrics,
            name=self.hub_model_id or model_name or self.args.output_dir,
            metadata={"language": language, "license": license},
        )


class KeepOwnConfigs(TrainerCallback):
    """Takes back what the host's Trainer writes into a drafter's configs: `use_cache`, and the tokenizer's tokens.

    A drafter's special tokens are its target's, and its generation config says how to draft and nothing else.
    """

    def __init__(self, drafter: Eagle3DrafterModel):
        configs = [drafter.config.__dict__, drafter.generation_config.__dict__]
        self._before = [(config, {name: config[name] for name in HOST_WRITES if name in config}) for config in configs]

    def restore(self) -> None:
        """Give `HOST_WRITES` the values they had, or none."""
        for config, values in self._before:
            for name in HOST_WRITES:
                config.pop(name, None)
            config.update(values)

    def on_train_begin(self, *_: Any, **__: Any) -> None:  # the host's arguments
        """The host has just written the tokenizer's special tokens."""
        self.restore()


def call_as_forward(model: torch.nn.Module, drafter: torch.nn.Module, function: Callable[[], Any]) -> Any:
    """Run `function` as the forward of `drafter`, through all that wraps it: gradients are synchronised there."""
    drafter.forward = function
    try:
        return model()
    finally:
        del drafter.forward


def walk_batch(hits: Tensor, batch: Batch) -> Walk:
    """`walk` over each document of a batch; `hits` [K, L] as in `StepSums`."""
    rows, trained = batch["rows"].cpu(), batch["trained"]
    mask = batch["loss_mask"].cpu().numpy()
    whole = np.zeros((len(hits), len(mask)), dtype=bool)
    whole[:, (rows if trained is None else rows[trained.cpu()]).numpy()] = hits.cpu().numpy()
    total, start = Walk(0, np.zeros(len(hits), dtype=np.int64)), 0
    for length in batch["lengths"]:
        total += walk(whole[:, start : start + length], mask[start : start + length])
        start += length
    return total


def _tokenize(
    rows: Iterable[Mapping[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    vocab_size: int,
) -> TokenDataset | None:
    if rows is None:
        return None
    dataset: TokenDataset
    if isinstance(rows, TokenDataset):
        dataset = rows
    else:
        dataset = TokenDataset(tqdm(rows, desc="Tokenizing", leave=False), tokenizer, max_length)
    check_token_ids(dataset, vocab_size)
    return dataset


def _by_step(prefix: str, loss: Tensor, correct: Tensor, count: Tensor) -> dict[str, float]:
    count = count.clamp_min(1)
    means = {"loss": (loss / count).tolist(), "accuracy": (correct / count).tolist()}
    return {f"{prefix}{name}_{t}": value for name, values in means.items() for t, value in enumerate(values)}
