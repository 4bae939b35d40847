"""The host's Trainer with whole checkpoints: replicated or sharded, published at once, resumed at the same row."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints
from transformers.utils import logging

from .arguments import Eagle3TrainingArguments
from .checkpointing import SAVING, STATE_FILE, check_whole, find_whole_checkpoint, publish, replacing_files, tidy
from .distributed import load_optimizer_state, load_whole_weights, whole_optimizer_state, whole_weights
from .locks import only_writer
from .recipe import check_recipe, write_recipe

logger = logging.get_logger(__name__)

POSITION_FILE = "hf_eagle3_position.json"  # the place of a checkpoint in the data
OPTIMIZER_FILE, SCHEDULER_FILE, WEIGHTS_FILE = "optimizer.pt", "scheduler.pt", "model.safetensors"  # the host's
CARD = "README.md"


class CheckpointedTrainer(Trainer, ABC):
    """Saves and resumes for any number of processes. The subclass trains."""

    args: Eagle3TrainingArguments
    _resumed: Path | None = None  # the checkpoint that training goes on from
    _is_saving = False  # whether a checkpoint is being written

    @property
    @abstractmethod
    def _recipe(self) -> Mapping[str, Any]:
        """The facts that must be the same for training to go on as if it had never stopped."""

    @abstractmethod
    def _write_card(self, folder: Path, place: Path) -> None:
        """Write the card of what is saved in `folder`, which becomes `place`."""

    @abstractmethod
    def _save_own_state(self, folder: Path) -> None:
        """Write the state of training that the host does not know. All processes must call."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,  # the host's
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As the host's, after a check that the checkpoint to resume from was trained in the same way.

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

    def _find_checkpoint(self, name: str | bool | None) -> Path | None:
        """The whole checkpoint `name`; the newest one for True."""
        if not name:
            return None
        if name is True:
            return find_whole_checkpoint(Path(self.args.output_dir))
        check_whole(Path(name))
        return Path(name)

    def _first(self, function: Callable[[], Any]) -> Any:
        """The result of `function` in the first process, for all; an error of its is raised in all."""
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

    # ---- writing ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the host's; a sharded drafter is saved whole."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or self.args.output_dir
        weights = whole_weights(self.model)  # by all processes
        self._save(folder, state_dict={name: value.cpu() for name, value in weights.items()})
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _get_output_dir(self, trial: Any) -> str:  # Any: the host's
        """The folder of checkpoints; while one is written, a folder beside it."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / SAVING) if self._is_saving else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:  # Any: the host's
        """As the host's, in a folder beside, which is renamed once all processes have written their files."""
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
        """As the host's, which takes the card from `output_dir`, when the checkpoint is in its place."""
        if self._is_saving:
            return
        if self.is_world_process_zero():
            shutil.copy(Path(checkpoint_folder) / CARD, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As the host's, with the recipe and a card; each file replaces an earlier one in one step."""
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        with replacing_files(folder) as beside:
            super()._save(str(beside), state_dict)
            write_recipe(beside, self._recipe)
            self._write_card(beside, Path(*(part for part in folder.parts if part != SAVING)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if self.is_fsdp_enabled:
            state = whole_optimizer_state(self.optimizer)  # by all processes
            if self.args.should_save:
                torch.save(state, folder / OPTIMIZER_FILE)
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        self._save_own_state(folder)
        if self.args.should_save:
            position = {"rows_per_update": self._rows_per_update, "updates_per_epoch": self._updates_per_epoch}
            (folder / POSITION_FILE).write_text(json.dumps(position) + "\n", encoding="utf-8")

    # ---- reading ----

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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """From a checkpoint of any number of processes, replicated or sharded."""
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
            # Updates have other rows than before: the schedule follows the data.
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
        """As the host's. If updates have other rows than before, training goes on at the same row, not the same update."""
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
