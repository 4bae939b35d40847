"""Several processes, each with its share of the prompts on a device of its own, as accelerate or torchrun starts them."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

# How long a process waits for the others. Shares of work differ; if one process fails, the launcher ends all.
PATIENCE = timedelta(days=7)


class Team:
    """The processes that take part; one, unless a launcher started several.

    Args:
        device: For one process, or its kind for several.
        is_alone: Take no notice of the launcher.
        is_one: All processes do the same work together, over a target that they share, so that each has all prompts.
    """

    def __init__(self, device: torch.device, *, is_alone: bool = False, is_one: bool = False):
        self.size, self.rank, self.device, self._state = 1, 0, device, None
        self._has_group = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_alone
        if not self._has_group:
            return
        if is_one:
            self.rank = int(os.environ["RANK"])
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
        else:
            from accelerate import PartialState  # heavy, and of use to launched processes only

            self._state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
            self.size, self.rank = self._state.num_processes, self._state.process_index
            self.device = self._state.device

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._has_group and kind is None:
            torch.distributed.destroy_process_group()

    def split(self, items: Any) -> Any:  # a list or a tensor
        """This process's share of `items`."""
        if self._state is None:
            return items
        with self._state.split_between_processes(items) as share:
            return share

    def gather(self, item: Any) -> list[Any]:  # anything that can be pickled
        """One item of each process, by rank."""
        if self._state is None:
            return [item]
        from accelerate.utils import gather_object

        return gather_object([item])

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def must_launch(num_processes: int | None, option: str = "--dp-size") -> bool:
    """Whether `option` asks for processes that nobody has started yet.

    Raises:
        ValueError: It is no number of processes, or others were started.
    """
    if num_processes is None:
        return False
    if num_processes < 1:
        raise ValueError(f"{option} is a number of processes, at least 1; got {num_processes}.")
    if not is_launched():
        return num_processes > 1
    launched = int(os.environ["WORLD_SIZE"])
    if num_processes != launched:
        raise ValueError(f"{option} {num_processes}, but {launched} processes were launched: leave it out.")
    return False


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Start this command in `num_processes` processes on this machine; their exit status.

    Who ends this process by SIGTERM ends them too.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    process = subprocess.Popen([*launcher, "-m", "hf_eagle3.cli", *arguments])
    is_main = threading.current_thread() is threading.main_thread()  # only there signals can be heard
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate()) if is_main else None
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def list_arguments(args: argparse.Namespace) -> list[str]:
    """A command's arguments as they would be typed again."""
    words = []
    for name, value in vars(args).items():
        if name in ("command", "run") or value is None or value is False or value == []:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words.append(f"--{name.replace('_', '-')}")
        words += [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
    return words
