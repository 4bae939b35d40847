"""`Eagle3Trainer`: the host's Trainer around one TTT step, with the frozen target in the loop."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    SaveStrategy,
    enable_full_determinism,
    rotate_checkpoints,
    set_seed,
)
from transformers.utils import logging

from ..checkpoints.card import write_card
from ..checkpoints.convert import check_rope
from ..checkpoints.exporter import describe_target
from ..drafters.kinds import find_kind
from ..host.loop_choice import why_not_target
from ..host.refusals import is_drafter, refuse_other_models
from ..modeling import Eagle3DrafterModel
from ..tensor_parallel import find_peers, is_spread
from .arguments import Eagle3TrainingArguments
from .callbacks import AroundUpdates, Average, FiniteGuard, KeepOwnConfigs
from .checkpointing import SAVING, STATE_FILE, check_whole, find_whole_checkpoint, publish, replacing_files, tidy
from .data.packing import PackedDataset
from .data.token_rows import TokenDataset, check_token_ids, trains_something
from .data.vocabulary import check_coverage, count_supervised_tokens
from .distributed import (
    base_drafter,
    call_as_forward,
    load_optimizer_state,
    load_whole_weights,
    local,
    number_targets,
    served_copy,
    sum_over_processes,
    whole_optimizer_state,
    whole_weights,
)
from .evaluation import (
    ProcessRows,
    RowsWithin,
    add_sums,
    add_walks,
    by_step,
    generate_and_count,
    generate_and_walk,
    prompts_of,
    simulated_acceptance_length,
    walk_batch,
)
from .forecast import DrafterShape, Forecast, TargetShape, drafter_flops, make_forecast, target_flops
from .loading import (
    adapt,
    end_tokens,
    load_drafter,
    load_in_every_process,
    load_target,
    make_drafter,
    place_target,
    refuse_empty_models,
)
from .locks import only_writer
from .recipe import check_recipe, describe_recipe, write_recipe
from .states.online import OnlineStates, StateSource
from .states.shared import SharedStates
from .states.stored import StoredStates, fingerprint_weights
from .step.acceptance import Walk
from .step.batch import Batch, Collator, live_steps
from .step.head_loss import Method, StepSums
from .step.losses import LOSSES
from .step.target_head import DraftVocabulary
from .step.ttt import ttt

logger = logging.get_logger(__name__)

POSITION_FILE = "hf_eagle3_position.json"  # where in the data a checkpoint stands
OPTIMIZER_FILE, SCHEDULER_FILE, WEIGHTS_FILE = "optimizer.pt", "scheduler.pt", "model.safetensors"  # as the host's
ALPHA_FILE = "mean_alpha.json"
CARD = "README.md"
# What the host's Trainer takes and a drafter's does not honour: what to do instead.
UNHONOURED: Mapping[str, str] = {
    "data_collator": "rows become batches in one way, by documents and slots",
    "model_init": "give model, or none for a new drafter",
    "compute_loss_func": "choose a loss by loss_type",
    "preprocess_logits_for_metrics": "compute_metrics is given sums over the whole evaluation, and no logits",
}
FORECAST_ROWS = 1000  # looked at for a forecast


class Eagle3Trainer(Trainer):
    """Train a drafter for a frozen target by training-time test (arXiv:2503.01840).

    The drafter is trained in float32 (under autocast with `bf16=True`); the target keeps its own precision, stays out
    of optimiser and checkpoints, and is never written to. Several processes, by `accelerate launch` or `torchrun`, share
    the rows, and each has a target, or a part of one (tensor parallelism); the drafter is replicated (DDP) or sharded
    (FSDP2).

    Args:
        model: The drafter to go on with, or its name; None: a new EAGLE-3.1 drafter sized after the target, with the
            `args.draft_vocab_size` most frequent supervised tokens as draft vocabulary.
        target_model: The target, any decoder of the host, or its name.
        args: `Eagle3TrainingArguments`.
        train_dataset, eval_dataset: Rows with `messages`, or with `input_ids` and `loss_mask` (1 on generated
            tokens); any iterable of mappings. Several eval sets: a dict of them, by name. A torch `Dataset` of rows
            with `input_ids` and `loss_mask` is taken as it is.
        processing_class: The target's tokenizer; needed for `messages`, and saved with the drafter.
        peft_config: Train adapters of the drafter instead of its weights; of PEFT, such as `LoraConfig`.
        states: Where hidden states come from, instead of the target run over each batch. `target_model` may then be
            None, and nothing is generated in evaluation.
        compute_metrics: Called with the `StepSums` of an evaluation, summed over all processes; gives more metrics.
        kwargs: As for the host's Trainer.

    Raises:
        ValueError: Data without supervision, a drafter that does not fit the target, half-precision weights, several
            GPUs in one process.
    """

    # The loss is normed over the whole accumulated batch. Read from Transformers 5.23 on; `__init__` says it to older.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Eagle3DrafterModel | str | None = None,
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
        _refuse_settings(args, kwargs)
        # The host does so later, when a new drafter and adapters have drawn their weights.
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        if processing_class is None and isinstance(target_model, str):
            processing_class = AutoTokenizer.from_pretrained(target_model)
        was_first_only = load_in_every_process()
        target = load_target(target_model, args.target_model_init_kwargs, args.device)  # type: ignore[arg-type]  # a dict by now
        drafter = load_drafter(model, args.model_init_kwargs)  # type: ignore[arg-type]  # a dict by now
        if was_first_only:
            given = {"model": model, "target_model": target_model}
            refuse_empty_models(
                {n: m for n, m in given.items() if isinstance(m, PreTrainedModel) and not is_spread(m)}
            )
        if drafter is not None:
            _check_drafter(drafter, peft_config is not None)
        if target is not None:
            if is_drafter(target):
                raise ValueError(
                    f"target_model {target.name_or_path} is an EAGLE-3 drafter. Give the model that it is to draft for, "
                    "and the drafter as model (--drafter_name_or_path)."
                )
            place_target(target, args)
        bound_to = target if target is not None else states.target  # type: ignore[union-attr]  # one of the two
        vocab_size = bound_to.config.get_text_config(decoder=True).vocab_size

        def read(rows: Any, max_length: int) -> Any:  # by index, of whatever class
            is_quiet = args.disable_tqdm or args.local_process_index > 0
            return _tokenize(
                rows,
                processing_class,
                max_length,
                vocab_size,
                end_tokens(bound_to),
                args.chat_template_kwargs,  # type: ignore[arg-type]  # a dict by now
                is_quiet=is_quiet,
            )

        eval_length = args.eval_max_length or args.max_length
        train_rows = read(train_dataset, args.max_length)
        eval_rows: Any  # one set, several by name, or None
        if isinstance(eval_dataset, dict):
            eval_rows = {name: read(rows, eval_length) for name, rows in eval_dataset.items()}
        else:
            eval_rows = read(eval_dataset, eval_length)
        if drafter is None:
            drafter = make_drafter(bound_to, args, train_rows, processing_class)
        elif train_rows is not None:
            counts, ids = count_supervised_tokens(train_rows, vocab_size), drafter.draft_to_target_ids.cpu()
            check_coverage(counts, ids, 0.0, "Train a new drafter on this data if that is too little")
        if isinstance(states, StoredStates):
            states.check(drafter)
            if target is not None:
                states.check_target(target)
            self._teacher: str | None = states.fingerprint
        else:
            self._teacher = None if target is None or is_spread(target) else fingerprint_weights(target)
        drafter.bind(bound_to)
        # In a tuple, so that no module tracker takes the target for a part of this trainer's model.
        self._target = (target,)
        self._source: StateSource
        if states is not None:
            self._source = states
        else:
            if args.use_liger_kernel:
                apply_liger_kernel(target, args.liger_kernel_config)
            boundaries = drafter.bound_aux_layer_ids or ()
            use_kernels = not args.use_liger_kernel
            self._source = OnlineStates(target, boundaries, args.target_batch_tokens, use_kernels=use_kernels)
            if (peers := find_peers(target)) is not None:
                self._source = SharedStates(self._source, peers)
        self._vocabulary = DraftVocabulary(drafter.draft_to_target_ids.to(args.device), drafter.config.vocab_size)
        self._shape = DrafterShape.of(drafter.config)
        self._target_shape = None if target is None or states is not None else TargetShape.of(target)
        self._read_eval = lambda rows: read(rows, eval_length)
        self._own_metrics = compute_metrics
        self._rows = train_rows
        own_configs = KeepOwnConfigs(drafter)
        super().__init__(
            model=drafter if peft_config is None else adapt(drafter, peft_config),
            args=args,
            train_dataset=PackedDataset(train_rows, args.max_length) if args.packing and train_rows else train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            data_collator=Collator(
                max(args.ttt_steps, args.eval_depth), every_slot=drafter.config.num_hidden_layers > 1
            ),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        self._settle_wrapping(peft_config)
        self._loss = LOSSES[args.loss_type]
        self._mean_alpha = torch.zeros(args.ttt_steps, device=args.device)
        self._guard = FiniteGuard(self.accelerator, Path(args.output_dir))
        self._average: Average | None = None
        self._resumed: Path | None = None  # the checkpoint that training goes on from
        self._is_saving = False  # whether a checkpoint is being written
        self._log = TrainLog()
        self._alphas = torch.zeros(2, args.ttt_steps, device=args.device)  # alpha and live slots of this update
        own_configs.restore()
        self.add_callback(own_configs)
        self.add_callback(AroundUpdates(self))

    def _settle_wrapping(self, peft_config: Any) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError("Eagle3Trainer trains with DDP or FSDP2, not with DeepSpeed: a drafter needs no more.")
        if self.get_cp_size() * self.get_sp_size() * self.get_tp_size() > 1:
            raise ValueError("Eagle3Trainer splits rows over processes, and no row: leave out parallelism_config.")
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise ValueError("Eagle3Trainer needs version 2 of FSDP: set fsdp_version: 2 (accelerate) or drop --fsdp.")
        # Else accelerate would send round what the first process has of the drafter, which all have, and stop at its
        # buffers (accelerate 1.15: they are no DTensors).
        plugin.cpu_ram_efficient_loading = False
        load_in_every_process()  # which the plugin denied again
        if peft_config is not None:
            raise ValueError("Adapters are too few weights to shard: train them with DDP, without FSDP.")
        if (
            plugin.mixed_precision_policy is not None
        ):  # else gradients are summed, and sums of losses kept, in bfloat16
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=torch.float32
            )
        if not plugin.transformer_cls_names_to_wrap:  # those of the class, else, of which a drafter may lack one
            plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in self.drafter.layers})

    @property
    def target_model(self) -> PreTrainedModel | None:
        """The frozen target; None where `states` come from elsewhere."""
        return self._target[0]

    @property
    def drafter(self) -> Eagle3DrafterModel:
        """The drafter that is trained, or whose adapters are."""
        return base_drafter(self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False))

    # ---- one batch ----

    def _run(self, model: torch.nn.Module, inputs: Batch, scale: Tensor) -> tuple[Tensor, StepSums]:
        """The loss of `inputs` and its sums, with `scale` [k] on the loss of each step."""
        states = self._source.states(inputs)
        drafter = base_drafter(self.accelerator.unwrap_model(model, keep_fp32_wrapper=False))
        last = self._mean_alpha[-1:].expand(max(0, len(scale) - len(self._mean_alpha)))
        method = Method(self._loss, scale, torch.cat([self._mean_alpha, last])[: len(scale)])

        def forward() -> tuple[Tensor, StepSums]:
            with self.accelerator.autocast():
                return ttt(drafter, inputs, states, self._source.head, self._vocabulary, method)

        return call_as_forward(model, drafter, forward)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """[k] slots that train at each step, over all batches of one update and all processes."""
        steps = torch.arange(self.args.ttt_steps, device=device)[:, None]
        counts = torch.zeros(self.args.ttt_steps, dtype=torch.int64, device=device)
        for batch in batch_samples:
            counts += (batch["depth"].to(device) > steps).sum(1)
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
            self._log.add(sums, len(inputs["input_ids"]))
            self._guard.watch(loss, inputs)
            self._alphas += torch.stack([sums.alpha, sums.num_live])
        return (loss, sums) if return_outputs else loss

    def _step_scale(self, counts: Tensor) -> Tensor:
        """[k] what the sum of each step's losses is multiplied by, given the slots that train at each."""
        if self._loss.weighs_steps:
            return 1 / counts[:1].clamp_min(1).expand_as(counts)
        return self.args.ttt_decay ** torch.arange(len(counts), device=counts.device) / counts.clamp_min(1)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Operations of one micro-batch, the target's forward included."""
        lengths = inputs["lengths"]
        tokens = sum(lengths)
        T, share = sum(n * n for n in lengths) / tokens, len(inputs["rows"]) / tokens
        flops = drafter_flops(self._shape, T, self.args.ttt_steps, share, recomputed=self.args.recomputes_activations)
        flops += 0 if self._target_shape is None else target_flops(self._target_shape, T)
        return round(tokens * flops)

    # ---- training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,  # the host's
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As the host's, after a look whether a checkpoint to resume from was trained in this way.

        Raises:
            ValueError: It was not.
            FloatingPointError: The loss became NaN or infinite; its batch is in `output_dir`.
        """
        with ExitStack() as stack:
            if self.args.save_strategy != SaveStrategy.NO:
                self._first(lambda: self._prepare_output(stack))
            self._resumed = self._first(lambda: self._find_checkpoint(resume_from_checkpoint))
            if self._resumed is not None and not self.args.ignore_recipe_mismatch:
                check_recipe(self._resumed, self._recipe)
            folder = None if self._resumed is None else str(self._resumed)
            return super().train(folder, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)

    def _prepare_output(self, stack: ExitStack) -> None:
        """Lock `output_dir` until `stack` closes, and clear up after a run that was killed."""
        folder = Path(self.args.output_dir)
        stack.enter_context(only_writer(folder))
        tidy(folder)

    def _find_checkpoint(self, asked: str | bool | None) -> Path | None:
        """The whole checkpoint that is asked for by name, or by True for the newest."""
        if not asked:
            return None
        if asked is True:
            return find_whole_checkpoint(Path(self.args.output_dir))
        check_whole(Path(asked))
        return Path(asked)

    def _first(self, function: Callable[[], Any]) -> Any:
        """What `function` gives in the first process, for all; what it raises is raised in all."""
        found: list[Any] = [None, None]  # its result, and its error
        if self.is_world_process_zero():
            try:
                found[0] = function()
            except (ValueError, OSError) as error:
                found[1] = error
        result, wrong = broadcast_object_list(found)
        if wrong is not None:
            raise wrong
        return result

    def _run_epoch(self, **kwargs: Any) -> None:  # Any: the host's
        """As the host's, which would go one update beyond the last if a run was killed after its last checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def begin(self) -> None:
        """Before the first update, when weights are wrapped and loaded."""
        if self.args.ema_decay:
            self._average = Average(self.accelerator.unwrap_model(self.model), self.args.ema_decay)
            if self._resumed is not None:
                self._average.load(self._resumed)
        if self._resumed is not None and (path := self._resumed / ALPHA_FILE).exists():
            self._mean_alpha.copy_(torch.tensor(json.loads(path.read_text(encoding="utf-8"))))
        self._alphas.zero_()
        self._log = TrainLog()
        self._guard = FiniteGuard(self.accelerator, Path(self.args.output_dir))
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
            self._average.settle()
            self._average = None

    def forecast(self) -> Forecast:
        """What this training will cost. Of the target, as much as lies in this process."""
        if self._rows is None:
            raise ValueError("A forecast needs train_dataset.")
        args, rows = self.args, self.train_dataset
        some = [rows[i] for i in range(min(FORECAST_ROWS, len(rows)))]
        lengths = [int(n) for row in some for n in row.get("lengths", [len(row["input_ids"])])]
        depth = np.concatenate(
            [live_steps(np.asarray(r["loss_mask"], bool), [len(r["input_ids"])], args.ttt_steps) for r in some]
        )
        update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        num_rows = args.max_steps * update if args.max_steps > 0 else args.num_train_epochs * len(rows)
        per_row = len(lengths) / len(some)
        target, cuda = self.target_model, args.device.type == "cuda"
        return make_forecast(
            self._shape,
            self._target_shape,
            trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            target_bytes=0 if target is None else sum(local(p).nbytes for p in target.parameters()),
            lengths=lengths,
            rows_at_once=round(args.per_device_train_batch_size * per_row),
            num_rows=num_rows * per_row,
            share=float(depth.mean() / args.ttt_steps),
            ttt_steps=args.ttt_steps,
            recomputed=args.recomputes_activations,
            has_average=args.ema_decay > 0,
            num_devices=args.world_size,
            device_name=torch.cuda.get_device_name(args.device) if cuda else None,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each step's loss and accuracy, and tokens a second, since the last training log."""
        if "loss" in logs:
            logs |= self._log.take(self.args.ttt_steps, self.accelerator)
        super().log(logs, start_time)

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:  # Any: rows, a name, or None, as the host's
        """Batches of this process's part of `eval_dataset`, whose rows may be as they are given to the constructor."""
        if isinstance(eval_dataset, str):
            rows = self.eval_dataset[eval_dataset]
        else:
            rows = self.eval_dataset if eval_dataset is None else self._read_eval(eval_dataset)
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
            ValueError: Always; the message says what to call.
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
        metrics, sums, walked = self._measure(dataloader, description)
        if isinstance(rows, RowsWithin) and len(beyond := rows.beyond()):
            found, *_ = self._measure(self._load(beyond), f"{description}, beyond {args.max_length} tokens")
            metrics |= {f"long_{name}": value for name, value in found.items()}
        if hasattr(self.target_model, "generate") and args.eval_generate_prompts:
            walked = self._generate(rows)
        metrics["acceptance_length"] = float(walked.acceptance_length)
        metrics |= {f"accept_depth_{k}": rate for k, rate in enumerate(walked.rate_by_depth, 1)}
        if self._own_metrics is not None:
            metrics |= self._own_metrics(sums)
        self.model.train(was_training)
        prefix = f"{metric_key_prefix}_"
        metrics = {name if name.startswith(prefix) else prefix + name: value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))

    def _measure(self, dataloader: DataLoader, description: str) -> tuple[dict[str, float], StepSums, Walk]:
        """What there is to say without decoding, the sums that it comes from, and rounds walked along the answers."""
        args, k, depth = self.args, self.args.ttt_steps, self.args.eval_depth
        steps = max(k, depth)
        walked = Walk(0, np.zeros(depth, dtype=np.int64))
        proposable = torch.zeros(2, dtype=torch.int64, device=args.device)  # tokens of answers; that can be proposed

        def teach() -> Iterator[StepSums]:
            nonlocal walked
            scale = torch.ones(steps, device=args.device)
            is_quiet = args.disable_tqdm or args.local_process_index > 0
            for inputs in tqdm(dataloader, desc=description, disable=is_quiet, leave=False):
                inputs = self._place(inputs)
                _, sums = self._run(self.model, inputs, scale)
                walked += walk_batch(sums.hits[:depth], inputs)
                answers = inputs["input_ids"][inputs["loss_mask"]]
                proposable.add_(torch.stack([(x := self._vocabulary.to_draft[answers]).ge(-1).sum(), x.ge(0).sum()]))
                yield sums

        sums = add_sums(teach(), steps, self.accelerator)
        walked = add_walks(walked, self.accelerator)
        tokens, can = sum_over_processes(self.accelerator, proposable).tolist()
        losses = sums.loss[:k] * self._step_scale(sums.num_live[:k])
        metrics = {
            **by_step("", sums),
            "loss": float(losses.sum()),
            "oov_rate": 1 - can / max(tokens, 1),
            "walked_acceptance_length": float(walked.acceptance_length),
            "simulated_acceptance_length": simulated_acceptance_length(sums, depth),
        }
        return metrics, sums, walked

    def _generate(self, rows: Any) -> Walk:  # Any: by index, of whatever class
        """Rounds of greedy decoding from the prompts of the first of `rows`, by all processes together."""
        args, target = self.args, self.target_model
        assert target is not None  # asked before
        index, count = number_targets(target, self.accelerator)
        mine = list(prompts_of(rows, args.eval_generate_prompts))[index::count]
        is_quiet = args.disable_tqdm or args.local_process_index > 0
        bar = tqdm(mine, desc="Generating", disable=is_quiet, leave=False)
        # Where processes share a target, each counts the same rounds.
        return add_walks(self._decode(target, bar), self.accelerator)

    def _decode(self, target: PreTrainedModel, prompts: Iterable[Tensor]) -> Walk:
        """Rounds of greedy decoding from `prompts`, really decoded where the drafter can assist `target`."""
        args, model = self.args, self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        on_gpu = target.device.type == "cuda"  # there, decoding is fastest in the target's dtype, as it will be served
        why_not = why_not_target(target)
        if why_not is None:
            served = served_copy(model, target.dtype if on_gpu else torch.float32, target.device)
            return generate_and_count(target, served, prompts, args.eval_depth, args.eval_max_new_tokens)
        logger.warning_once(
            f"{why_not}: in evaluation the target answers by itself, and acceptance lengths are walked along its greedy "
            "answers, which gives what decoding with the drafter would."
        )
        served = served_copy(model, torch.float32, args.device).bind(target)
        nothing = torch.zeros(args.eval_depth, device=args.device)
        method = Method(LOSSES["cross_entropy"], nothing, nothing)

        def find_hits(batch: Batch) -> Tensor:
            batch = self._place(batch)
            states = self._source.states(batch)
            with self.accelerator.autocast():
                return ttt(served, batch, states, self._source.head, self._vocabulary, method)[1].hits

        collate = Collator(args.eval_depth, every_slot=self.drafter.config.num_hidden_layers > 1)
        return generate_and_walk(target, prompts, args.eval_max_new_tokens, collate, find_hits)

    def _place(self, inputs: Batch) -> Batch:
        """`inputs` on this process's device."""
        return {name: x.to(self.args.device) if hasattr(x, "to") else x for name, x in inputs.items()}

    # ---- checkpoints ----

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return describe_recipe(self.drafter, self.args, self._rows, self._teacher)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the host's; of a sharded drafter, the whole."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or self.args.output_dir
        weights = whole_weights(self.model)  # by all processes
        self._save(folder, state_dict={name: value.cpu() for name, value in weights.items()})
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _get_output_dir(self, trial: Any) -> str:  # Any: the host's
        """Where checkpoints go; while one is written, a folder beside."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / SAVING) if self._is_saving else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:  # Any: the host's
        """As the host's, beside its place; once all processes have written their files, it is renamed."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run_dir / SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        self._publish(run_dir / SAVING / name, run_dir / name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(str(run_dir), limit, best_model_checkpoint=best, use_mtime=True)

    def _publish(self, folder: Path, place: Path) -> None:
        """Rename a checkpoint that is written. All processes must call."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == folder:
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(folder / STATE_FILE))
        self.accelerator.wait_for_everyone()
        # Files of processes on another machine, with a disk of its own, follow.
        for is_mine in (self.args.should_save, self.is_local_process_zero()):
            if is_mine and folder.exists():
                publish(folder, place)
                shutil.rmtree(folder.parent, ignore_errors=True)
            self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the host's, when the checkpoint is in its place."""
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As the host's, with how it was trained; each file takes the place of an earlier one at once."""
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        with replacing_files(folder) as beside:
            if (card := folder / CARD).exists():  # PEFT adds to the one that is there
                shutil.copy(card, beside)
            super()._save(str(beside), state_dict)
            write_recipe(beside, self._recipe)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if self.is_fsdp_enabled:
            state = whole_optimizer_state(self.optimizer)  # by all processes
            if self.args.should_save:
                torch.save(state, folder / OPTIMIZER_FILE)
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None:
            self._average.save(folder, is_writer=self.args.should_save)
        if self.args.should_save:
            position = {"rows_per_update": self._rows_per_update, "updates_per_epoch": self._updates_per_epoch}
            (folder / POSITION_FILE).write_text(json.dumps(position) + "\n", encoding="utf-8")
            if self.args.loss_type == "lk_hybrid":
                (folder / ALPHA_FILE).write_text(json.dumps(self._mean_alpha.tolist()) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            load_whole_weights(model or self.model, load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            load_whole_weights(self.model, load_file(Path(self.state.best_model_checkpoint) / WEIGHTS_FILE))
        else:
            super()._load_best_model()
        if self._average is not None:
            self._average.load(Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As any number of processes wrote them, replicated or sharded."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / OPTIMIZER_FILE).exists():
            logger.warning(f"{folder} has no {OPTIMIZER_FILE}: the optimizer and the schedule start anew.")
            return
        load_optimizer_state(
            self.optimizer, torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        )
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))
        if self.lr_scheduler.last_epoch != self.state.global_step:
            # Other updates than before: the schedule goes on where the data does.
            self.lr_scheduler.last_epoch = self.state.global_step - 1
            self.lr_scheduler.step()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,  # the host's
    ) -> tuple[int, int]:
        """As the host's; when an update has other rows than before, go on at the same row, not the same update."""
        args = self.args
        self._updates_per_epoch = num_update_steps_per_epoch
        self._rows_per_update = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        path = Path(resume_from_checkpoint or "") / POSITION_FILE
        if resume_from_checkpoint is None or not path.exists():
            return epochs, batches
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["rows_per_update"] == self._rows_per_update:
            return epochs, batches
        epochs, updates = divmod(self.state.global_step, before["updates_per_epoch"])
        updates = min(updates * before["rows_per_update"] // self._rows_per_update, num_update_steps_per_epoch)
        self.state.global_step = epochs * num_update_steps_per_epoch + updates
        logger.warning(
            f"An update has {self._rows_per_update} rows now and had {before['rows_per_update']}: going on at the same row, "
            f"as update {self.state.global_step}."
        )
        return epochs, 0 if args.ignore_data_skip else updates * args.gradient_accumulation_steps

    # ---- the Hub ----

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
        drafter = self.drafter
        target = describe_target(None, drafter)
        if target.name is None:
            raise ValueError(
                "A model card names the target the drafter is for: set trainer.model.config.target_name_or_path."
            )
        last: dict[str, float] = next(
            (logs for logs in reversed(self.state.log_history) if "eval_acceptance_length" in logs), {}
        )
        metrics = {"Acceptance length": last["eval_acceptance_length"]} if last else {}
        write_card(
            drafter,
            Path(self.args.output_dir),
            target=target,
            metrics=metrics,
            name=self.hub_model_id or model_name or self.args.output_dir,
            metadata={"language": language, "license": license},
        )


class TrainLog:
    """What there is to say of the updates since the last log."""

    def __init__(self) -> None:
        self._sums: list[StepSums] = []
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, sums: StepSums, num_tokens: int) -> None:
        """One micro-batch."""
        self._sums.append(sums._replace(hits=sums.hits[:, :0]))
        self._tokens += num_tokens

    def pause(self, seconds: float) -> None:
        """Time that was not training."""
        self._since += seconds

    def take(self, steps: int, accelerator: Any) -> dict[str, float]:  # an Accelerator
        """Loss and accuracy by step, tokens and supervised tokens a second; and start anew. All processes must call."""
        sums = add_sums(self._sums, steps, accelerator)
        tokens = int(sum_over_processes(accelerator, torch.tensor([self._tokens], device=accelerator.device)))
        seconds = time.perf_counter() - self._since
        self._sums, self._tokens, self._since = [], 0, time.perf_counter()
        return {
            **by_step("", sums),
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": float(sums.num_live[0]) / seconds,
        }


def _refuse_settings(args: Any, options: Mapping[str, Any]) -> None:  # Any: whatever was given as args
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs and would use them all by DataParallel, which cannot train a drafter. "
            f"Start a process for each: accelerate launch --num_processes {args.n_gpu} {Path(sys.argv[0]).name} ...; or "
            "set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if not isinstance(args, Eagle3TrainingArguments):
        raise TypeError(
            f"args must be Eagle3TrainingArguments, which has the host's fields and those of TTT, got {type(args).__name__}."
        )
    args.refuse_unhonoured()
    if refused := [f"{name}: {UNHONOURED[name]}" for name in UNHONOURED if options.get(name) is not None]:
        raise ValueError(f"Eagle3Trainer does not take {'; '.join(refused)}. Leave that out.")


def _check_drafter(drafter: Any, will_adapt: bool) -> None:  # whatever was given as model
    refuse_other_models(drafter, "model")
    if not will_adapt and not any(p.requires_grad for p in drafter.parameters()):
        raise ValueError(
            "No weight of this drafter trains, as in a folder of adapters that were loaded with it. Merge them "
            "(merge_and_unload of PEFT), or resume the run that made them, or give peft_config (--use_peft)."
        )
    if not find_kind(drafter.config).has_steps:
        raise ValueError(
            f"mask_token_id={drafter.config.mask_token_id}: a P-EAGLE drafter has no later steps to unroll, and cannot be "
            "trained here."
        )
    if drafter.dtype != torch.float32:
        raise ValueError(
            f"Train the drafter in float32 (load it with dtype=torch.float32), got {drafter.dtype}: half precision "
            "rounds small updates away. Use bf16=True for fast arithmetic."
        )
    check_rope(drafter.config)
    if drafter.config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            "TTT needs an attention that takes its mask: load the drafter with attn_implementation='sdpa', got "
            f"{drafter.config._attn_implementation!r}."
        )


def _tokenize(
    rows: Iterable[Mapping[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    vocab_size: int,
    ends: Sequence[int],
    chat_template_kwargs: Mapping[str, Any] | None,
    *,
    is_quiet: bool,
) -> Any:  # rows by index, of whatever class
    if rows is None:
        return None
    if isinstance(rows, IterableDataset):
        raise ValueError("Rows must have a number and come by index: give a list, or a Dataset that is not a stream.")
    dataset: Any = rows
    if not isinstance(rows, Dataset):
        rows = tqdm(rows, desc="Tokenizing", disable=is_quiet, leave=False)
        dataset = TokenDataset(
            rows, tokenizer, max_length, eos_token_ids=ends, chat_template_kwargs=chat_template_kwargs
        )
    elif len(dataset) and not isinstance(dataset, TokenDataset):  # which has looked at its rows
        _refuse_degenerate_masks(dataset)
    check_token_ids(dataset, vocab_size)
    return dataset


def _refuse_degenerate_masks(dataset: Any) -> None:  # rows by index, of whatever class, as they are
    masks = [np.asarray(dataset[i]["loss_mask"], dtype=bool) for i in range(len(dataset))]
    what = "none" if not any(map(trains_something, masks)) else "all" if all(mask.all() for mask in masks) else None
    if what is not None:
        raise ValueError(
            f"There is nothing to learn: of {len(masks)} rows, each marks {what} of its tokens as generated"
            f"{' (or only single ones)' if what == 'none' else ''}. loss_mask must be 1 on what the target generated, "
            "two tokens in a row or more, and 0 on what it was given."
        )
