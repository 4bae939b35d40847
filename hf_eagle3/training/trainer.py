"""`Eagle3Trainer`: the host's Trainer around one step of a drafter, with the frozen target in the loop."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, enable_full_determinism, set_seed
from transformers.utils import logging

from ..checkpoints.card import is_on_hub, write_card
from ..checkpoints.engines import Target
from ..checkpoints.exporter import describe_target
from ..checkpoints.target_name import read_recorded_name
from ..modeling import DrafterModel
from .arguments import Eagle3TrainingArguments
from .callbacks import AroundUpdates, Average, FiniteGuard, KeepOwnConfigs
from .checkpointed_trainer import CheckpointedTrainer
from .data.eval_rows import ProcessRows, RowsWithin
from .data.packing import PackedDataset
from .distributed import base_drafter, call_as_forward, configure_fsdp, sum_over_processes
from .evaluation import Evaluation
from .forecast import Forecast, TargetShape, forecast_training, shape_of, target_flops
from .kinds import make_plan
from .loading import adapt, describe_adapters
from .metrics import TrainLog
from .preparing import prepare, refuse_settings
from .recipe import describe_recipe
from .states.online import StateSource
from .step.batch import Batch
from .step.blocks import choose_blocks
from .step.head_loss import Method, StepSums
from .step.losses import LOSSES
from .step.target_head import DraftVocabulary

logger = logging.get_logger(__name__)

ALPHA_FILE = "mean_alpha.json"
ACCEPTANCE = "eval_acceptance_length"  # in the log of an evaluation


class Eagle3Trainer(CheckpointedTrainer):
    """Train a drafter for a frozen target: EAGLE-3 by training-time test (arXiv:2503.01840), D-Flash and DSpark by blocks.

    The drafter is trained in float32 (under autocast with `bf16=True`); the target keeps its own precision, stays out
    of optimiser and checkpoints, and is never written to. Several processes, by `accelerate launch` or `torchrun`, share
    the rows, and each has a target, or a part of one (tensor parallelism); the drafter is replicated (DDP) or sharded
    (FSDP2).

    Args:
        model: The drafter to go on with, or its name; None: a new one of `args.drafter_version`, sized after the target,
            with the `args.draft_vocab_size` most frequent supervised tokens as draft vocabulary.
        target_model: The target, any decoder of the host, or its name.
        args: `Eagle3TrainingArguments`.
        train_dataset, eval_dataset: Rows with `messages`, or with `input_ids` and `loss_mask` (1 on generated
            tokens); any iterable of mappings. Several eval sets: a dict of them, by name. A torch `Dataset` of rows
            with `input_ids` and `loss_mask` is taken as it is.
        processing_class: The target's tokenizer; needed for `messages`, and saved with the drafter.
        peft_config: Train adapters of the drafter instead of its weights; of PEFT, such as `LoraConfig`.
        states: A source of hidden states, in the place of the target run over each batch. `target_model` may then be
            None, and nothing is generated in evaluation.
        compute_metrics: Called with the `StepSums` of an evaluation, summed over all processes; gives more metrics.
        kwargs: As for the host's Trainer.

    Raises:
        ValueError: Data without supervision, a drafter that does not fit the target, half-precision weights, several
            GPUs in one process.
    """

    # The loss is normed over the whole accumulated batch. Transformers 5.23 and later read this; older ones read
    # `model_accepts_loss_kwargs`.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: DrafterModel | str | None = None,
        target_model: PreTrainedModel | str | None = None,
        args: Eagle3TrainingArguments | None = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,  # of PEFT, which is optional
        states: StateSource | None = None,
        compute_metrics: Callable[[StepSums], dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        if target_model is None and states is None:
            raise ValueError("Eagle3Trainer needs target_model: the model whose output the drafter learns to propose.")
        args = Eagle3TrainingArguments() if args is None else args
        refuse_settings(args, kwargs)
        # The host does so later, after a new drafter and adapters have drawn their weights.
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        ready = prepare(
            args,
            model=model,
            target_model=target_model,
            states=states,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=processing_class,
            has_adapters=peft_config is not None,
        )
        drafter = ready.drafter
        # In a tuple, so that no module tracker takes the target for a part of this trainer's model.
        self._target = (ready.target,)
        self._target_fingerprint = ready.target_fingerprint
        self._source, self._reader, self._rows = ready.source, ready.reader, ready.train_rows
        self._vocabulary = DraftVocabulary(drafter.draft_to_target_ids.to(args.device), drafter.config.vocab_size)
        self._plan = make_plan(drafter.config, args)
        self._shape, self._loss = shape_of(drafter.config), LOSSES[args.loss_type]
        self._target_shape = None if ready.target is None or states is not None else TargetShape.of(ready.target)
        self._own_metrics = compute_metrics
        own_configs = KeepOwnConfigs(drafter)
        packs = args.packing and ready.train_rows
        super().__init__(
            model=drafter if peft_config is None else adapt(drafter, peft_config),
            args=args,
            train_dataset=PackedDataset(ready.train_rows, args.max_length) if packs else ready.train_rows,
            eval_dataset=ready.eval_rows,
            processing_class=ready.tokenizer,
            data_collator=self._plan.collator(),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        self._check_wrapping(has_adapters=peft_config is not None)
        self._mean_alpha = torch.zeros(self._plan.num_steps, device=args.device)
        self._average: Average | None = None
        self._begin_sums()
        own_configs.restore()
        self.add_callback(own_configs)
        self.add_callback(AroundUpdates(self))

    def _check_wrapping(self, *, has_adapters: bool) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError("Eagle3Trainer trains with DDP or FSDP2, not with DeepSpeed: a drafter needs no more.")
        if self.get_cp_size() * self.get_sp_size() * self.get_tp_size() > 1:
            raise ValueError("Eagle3Trainer splits rows over processes, and no row: leave out parallelism_config.")
        if self.is_fsdp_enabled:
            configure_fsdp(self.accelerator.state.fsdp_plugin, self.drafter, has_adapters=has_adapters)

    def _begin_sums(self) -> None:
        """Forget the losses and acceptance of earlier updates."""
        self._guard = FiniteGuard(self.accelerator, Path(self.args.output_dir))
        self._log = TrainLog()
        # Alpha and live slots of this update.
        self._alphas = torch.zeros(2, self._plan.num_steps, device=self.args.device)

    @property
    def target_model(self) -> PreTrainedModel | None:
        """The frozen target; None where `states` come from elsewhere."""
        return self._target[0]

    @property
    def drafter(self) -> DrafterModel:
        """The drafter that is trained, or whose adapters are trained."""
        return base_drafter(self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False))

    @property
    def eval_depth(self) -> int:
        """Draft depth K of the acceptance lengths."""
        return self._plan.eval_depth

    # ---- one batch ----

    def _run(self, model: torch.nn.Module, inputs: Batch, scale: Tensor) -> tuple[Tensor, StepSums]:
        """The loss of `inputs` and its sums, with `scale` [k] on the loss of each step."""
        states = self._source.states(inputs)
        drafter = base_drafter(self.accelerator.unwrap_model(model, keep_fp32_wrapper=False))
        last = self._mean_alpha[-1:].expand(max(0, len(scale) - len(self._mean_alpha)))
        method = Method(self._loss, scale, torch.cat([self._mean_alpha, last])[: len(scale)])

        def forward() -> tuple[Tensor, StepSums]:
            with self.accelerator.autocast():
                return self._plan.step(drafter, inputs, states, self._source.head, self._vocabulary, method)

        return call_as_forward(model, drafter, forward)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:  # the host's
        """As the host's; of the batches of an update, the blocks to train on, where the drafter drafts blocks."""
        blocks = self._plan.num_blocks
        if blocks is not None:
            epoch_iterator = (choose_blocks(batch, blocks, self._draws(i)) for i, batch in enumerate(epoch_iterator))
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _draws(self, micro_batch: int) -> np.random.Generator:
        """The random numbers of a micro-batch of this process, the same when training is resumed."""
        return np.random.default_rng(
            [self.args.seed, self.state.global_step, micro_batch, self.accelerator.process_index]
        )

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # the host moves tables
        """`inputs` on this process's device."""
        return inputs.to(self.args.device)

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """As the host's, which reads tables."""
        super()._track_num_input_tokens({"input_ids": inputs.input_ids})

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """[k] slots that train at each step, over all batches of one update and all processes."""
        k = self._plan.num_steps
        steps, counts = torch.arange(k, device=device)[:, None], torch.zeros(k, dtype=torch.int64, device=device)
        for batch in batch_samples:
            counts += (batch.depth.to(device) > steps).sum(1)
        return sum_over_processes(self.accelerator, counts)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, StepSums]:
        """Sum over steps of `ttt_decay`^t times the mean loss of step t over the supervised slots of the update.

        Gradients are averaged over processes, so each process's share is multiplied by their number.
        """
        counts = (
            self._get_num_items_in_batch([inputs], self.args.device)
            if num_items_in_batch is None
            else num_items_in_batch
        )
        loss, sums = self._run(model, inputs, self._step_scale(counts) * self.accelerator.num_processes)
        if model.training:
            self._log.add(sums, len(inputs.input_ids))
            self._guard.watch(loss, inputs)
            self._alphas += torch.stack([sums.alpha, sums.num_live])
        return (loss, sums) if return_outputs else loss

    def _step_scale(self, counts: Tensor) -> Tensor:
        """[k] the factor on each step's loss sum, given the slots that train there."""
        if self._loss.weighs_steps:
            return 1 / counts[:1].clamp_min(1).expand_as(counts)
        return self.args.ttt_decay ** torch.arange(len(counts), device=counts.device) / counts.clamp_min(1)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Operations of one micro-batch, the target's forward included."""
        lengths = inputs.lengths
        tokens = sum(lengths)
        T, share = sum(n * n for n in lengths) / tokens, len(inputs.rows) / tokens
        flops = self._shape.count_flops(T, self._plan.num_steps, share, recomputed=self.args.recomputes_activations)
        flops += 0 if self._target_shape is None else target_flops(self._target_shape, T)
        return round(tokens * flops)

    # ---- training ----

    def begin(self) -> None:
        """Before the first update, when weights are wrapped and loaded."""
        if self.args.ema_decay:
            self._average = Average(self.accelerator.unwrap_model(self.model), self.args.ema_decay)
            if self._resumed is not None:
                self._average.load(self._resumed)
        if self._resumed is not None and (path := self._resumed / ALPHA_FILE).exists():
            self._mean_alpha.copy_(torch.tensor(json.loads(path.read_text(encoding="utf-8"))))
        self._begin_sums()
        if self.is_world_process_zero():
            logger.info(f"Forecast: {self.forecast()}")

    def before_update(self) -> None:
        """Gradients are ready, the weights are not yet touched."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._guard.check(parameters, self.state.global_step + 1)

    def after_update(self) -> None:
        """The optimizer has taken its step."""
        if self.args.loss_type == "lk_hybrid":
            alpha, count = sum_over_processes(self.accelerator, self._alphas)
            self._mean_alpha = alpha / count.clamp_min(1)
        self._alphas.zero_()
        if self._average is not None:
            self._average.update()

    def finish(self) -> None:
        """After the last update: the average of the weights takes their place."""
        if self._average is not None:
            self._average.keep()
            self._average = None

    def forecast(self) -> Forecast:
        """The cost of this training. Only this process's part of the target counts."""
        if self._rows is None:
            raise ValueError("A forecast needs train_dataset.")
        return forecast_training(
            self.args, self._plan, self.train_dataset, self.model, self.target_model, self._shape, self._target_shape
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each step's loss and accuracy, and tokens a second, since the last training log."""
        if "loss" in logs:
            logs |= self._log.take(self._plan.num_steps, self.accelerator)
        super().log(logs, start_time)

    # ---- evaluation ----

    def get_eval_dataloader(
        self, eval_dataset: Any = None
    ) -> DataLoader:  # Any: rows, a name, or None, as in the host
        """Batches of this process's part of `eval_dataset`, whose rows may be as they are given to the constructor."""
        if isinstance(eval_dataset, str):
            rows = self.eval_dataset[eval_dataset]
        else:
            rows = (
                self.eval_dataset
                if eval_dataset is None
                else self._reader.read(eval_dataset, self.args.eval_max_length or self.args.max_length)
            )
        if rows is None:
            raise ValueError("Evaluation needs eval_dataset.")
        longest = self.args.max_length
        return self._load(RowsWithin(rows, longest) if (self.args.eval_max_length or 0) > longest else rows)

    def _load(self, rows: Any) -> DataLoader:  # Any: by index, of whatever class
        """Batches of this process's part of `rows`."""
        return DataLoader(
            ProcessRows(rows, self.accelerator.process_index, self.accelerator.num_processes),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # or the loader would draw from the random numbers of training
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the host's, with the average of the weights where there is one."""
        start = time.perf_counter()
        if self._average is not None:
            self._average.swap()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if self._average is not None:
                self._average.swap()
            self._log.pause(time.perf_counter() - start)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """There is nothing to predict.

        Raises:
            ValueError: Always; the message names the calls to use.
        """
        del args, kwargs
        raise ValueError(
            "A drafter predicts what its target says next, and has no predictions of rows. trainer.evaluate(rows) measures "
            "how many of them the target accepts; generate(assistant_model=...) uses them."
        )

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and accuracy by step, and acceptance lengths: decoded, walked along the answers, and simulated."""
        del prediction_loss_only, ignore_keys
        args, rows = self.args, dataloader.dataset.rows  # type: ignore[attr-defined]  # of `get_eval_dataloader`
        was_training = self.model.training
        self.model.eval()
        evaluation = Evaluation(
            args, self._plan, self.accelerator, self.model, self._source, self._vocabulary, self._run, self._step_scale
        )
        metrics, sums, walked = evaluation.measure(dataloader, description)
        if isinstance(rows, RowsWithin) and len(beyond := rows.beyond()):
            found = evaluation.measure(self._load(beyond), f"{description}, beyond {args.max_length} tokens")
            metrics |= {f"long_{name}": value for name, value in found.metrics.items()}
        target: Any = self.target_model  # a stand-in cannot generate
        if hasattr(target, "generate") and args.eval_generate_prompts:
            walked = evaluation.generate(target, rows)
        metrics["acceptance_length"] = float(walked.acceptance_length)
        metrics |= {f"accept_depth_{k}": rate for k, rate in enumerate(walked.rate_by_depth, 1)}
        if self._own_metrics is not None:
            metrics |= self._own_metrics(sums)
        self.model.train(was_training)
        prefix = f"{metric_key_prefix}_"
        metrics = {name if name.startswith(prefix) else prefix + name: value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))

    # ---- checkpoints ----

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return describe_recipe(self.drafter, self._plan, self.args, self._rows, self._target_fingerprint)

    def _save_own_state(self, folder: Path) -> None:
        """The averages of the weights, and of alpha where the loss reads it."""
        if self._average is not None:
            self._average.save(folder, is_writer=self.args.should_save)
        if self.args.should_save and self.args.loss_type == "lk_hybrid":
            (folder / ALPHA_FILE).write_text(json.dumps(self._mean_alpha.tolist()) + "\n", encoding="utf-8")

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._average is not None:
            self._average.load(Path(self.state.best_model_checkpoint))

    # ---- the Hub ----

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **others: Any,  # the host's, for models trained on a labelled data set
    ) -> None:
        """Write the drafter's card, with the results of the last evaluation; `push_to_hub` uploads it.

        Raises:
            ValueError: The target's name is not known, or an argument names a field that the card does not have.
        """
        if others or tags:
            raise ValueError(f"A drafter's card has no {', '.join(sorted([*others, *(['tags'] if tags else [])]))}.")
        if not self.is_world_process_zero():
            return
        if not is_on_hub(self._described_target().name):
            raise ValueError(
                "A model card names the target the drafter is for: set trainer.model.config.target_name_or_path."
            )
        name = self.hub_model_id or model_name or self.args.output_dir
        self._fill_card(Path(self.args.output_dir), name, {"language": language, "license": license})

    def _write_card(self, folder: Path, place: Path) -> None:
        self._fill_card(folder, self.hub_model_id or str(place), {})

    def _fill_card(self, folder: Path, name: str, metadata: Mapping[str, Any]) -> None:
        last: dict[str, float] = next(
            (logs for logs in reversed(self.state.log_history) if math.isfinite(logs.get(ACCEPTANCE, math.nan))), {}
        )
        write_card(
            self.drafter,
            folder,
            target=self._described_target(),
            metrics={"Acceptance length": last[ACCEPTANCE]} if last else {},
            name=name,
            metadata=metadata,
            adapters=describe_adapters(self.accelerator.unwrap_model(self.model), self.drafter),
        )

    def _described_target(self) -> Target:
        """The target by its config. Its name is that in the drafter's config, or where it was loaded from."""
        known = describe_target(self._source.target.config, self.drafter)
        name = read_recorded_name(self.drafter.config) or self.drafter.bound_target_name
        # A folder that was loaded from somewhere else than here may read like a repository.
        return replace(known, name=name or (None if is_on_hub(known.name) else known.name))
