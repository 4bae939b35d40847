"""Around an update: keep configs, average weights, stop at losses that are not finite."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from ..modeling import DrafterModel
from ..tensor_parallel import whole
from .distributed import local, shard_like, sum_over_processes
from .step.batch import Batch

logger = logging.get_logger(__name__)

# Fields that the host's Trainer writes into the configs of the model it trains.
HOST_WRITES = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
AVERAGE_FILE = "ema.safetensors"
MOST_SKIPPED = 20  # updates in a row without finite gradients


class KeepOwnConfigs(TrainerCallback):
    """Undoes the changes of the host's Trainer to a drafter's configs: `use_cache`, and the tokenizer's tokens.

    A drafter's special tokens are its target's, and its generation config holds settings of drafting alone.
    """

    def __init__(self, drafter: DrafterModel):
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


class Average:
    """An exponential moving average of the trained weights, in float32, sharded as they are."""

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._weights.items()}
        self._is_in = False

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the weights: average = decay * average + (1 - decay) * weight."""
        averages, weights = ([local(x) for x in part.values()] for part in (self._averages, self._weights))
        torch._foreach_lerp_(averages, weights, 1 - self._decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages: in, then out again."""
        for name, weight in self._weights.items():
            ours, theirs = local(self._averages[name]), local(weight)
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
        self._is_in = not self._is_in

    def keep(self) -> None:
        """Put the averages into the model for good."""
        if not self._is_in:
            self.swap()

    def save(self, folder: Path, *, is_writer: bool) -> None:
        """Write the averages into a checkpoint. All processes must call."""
        averages = {name: whole(x).cpu().contiguous() for name, x in self._averages.items()}
        if is_writer:
            save_file(averages, folder / AVERAGE_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read the averages of a checkpoint; where it has none, the average starts at its weights."""
        path = folder / AVERAGE_FILE
        stored = load_file(path) if path.exists() else {}
        if not stored:
            logger.warning(f"{folder} has no {AVERAGE_FILE}: the average starts at the weights of the checkpoint.")
        for name, average in self._averages.items():
            value = shard_like(stored[name], average) if stored else self._weights[name].detach()
            local(average).copy_(local(value))


class FiniteGuard:
    """Stops at a loss that is not finite and saves its batch; skips updates whose gradients are not finite.

    It checks once an update: one wait for the device and one small sum over processes, at any accumulation.
    """

    def __init__(self, accelerator: Accelerator, folder: Path):
        self._accelerator, self._folder = accelerator, folder
        self._seen: list[tuple[Tensor, Batch]] = []
        self._skipped = 0

    def watch(self, loss: Tensor, batch: Batch) -> None:
        """Keep the loss of a micro-batch for the check."""
        self._seen.append((loss.detach().isfinite(), batch))

    def check(self, parameters: list[Tensor], step: int) -> None:
        """Check update `step` (from 1) before the optimizer takes it.

        Raises:
            FloatingPointError: A loss of this update is NaN or infinite, in any process.
        """
        seen, self._seen = self._seen, []
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        losses = torch.stack([is_finite for is_finite, _ in seen])
        bad = torch.stack([~losses.all(), ~finite]).to(torch.int64)
        bad_loss, bad_gradient = sum_over_processes(self._accelerator, bad).tolist()
        if bad_loss:
            self._stop([batch for is_finite, batch in seen if not is_finite], step)
        if self._accelerator.scaler is not None:  # float16: the host's scaler skips by itself, and often
            return
        self._skipped = self._skipped + 1 if bad_gradient else 0
        if bad_gradient:
            logger.warning(f"Update {step}: gradients are not finite, though the loss is. The update is left out.")
            for p in parameters:
                p.grad = None
        if self._skipped >= MOST_SKIPPED:
            raise FloatingPointError(
                f"Gradients of {MOST_SKIPPED} updates in a row were not finite. Lower learning_rate or max_grad_norm, or "
                "use norm_before_fc / fc_norm for a target with large hidden states."
            )

    def _stop(self, batches: list[Batch], step: int) -> None:
        rank = self._accelerator.process_index
        path = self._folder / f"nan_batch_step{step}{f'_process{rank}' if rank else ''}.pt"
        where = "in another process"
        if batches:
            kept = [
                {"input_ids": b.input_ids.cpu(), "loss_mask": b.loss_mask.cpu(), "lengths": b.lengths} for b in batches
            ]
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(kept, path)
            where = f"see {path} for its tokens"
        raise FloatingPointError(
            f"The loss of update {step} is NaN or infinite ({where}), so training stops before it spoils the weights. "
            "Either the target's hidden states are no numbers there (another dtype?), or learning_rate is too high. "
            "Resume from the last checkpoint."
        )


class AroundUpdates(TrainerCallback):
    """Calls the trainer at the points of an update."""

    def __init__(self, trainer: Any):  # an Eagle3Trainer, which imports this module
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Weights are loaded and wrapped."""
        self._trainer.begin()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Gradients are clipped."""
        self._trainer.before_update()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Weights are new."""
        self._trainer.after_update()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The best checkpoint is loaded, if the arguments say so."""
        self._trainer.finish()
