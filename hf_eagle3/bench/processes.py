"""Several processes, each with its share of the prompts on a device of its own, as accelerate or torchrun starts them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch


class Team:
    """The processes that take part; one, unless a launcher started several."""

    def __init__(self, device: torch.device):
        self.size, self.rank, self.device, self._state = 1, 0, device, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # heavy, and of use to launched processes only

            self._state = PartialState(cpu=device.type == "cpu")
            self.size, self.rank = self._state.num_processes, self._state.process_index
            self.device = self._state.device

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._state is not None and kind is None:
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


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Start this command in `num_processes` processes on this machine; their exit status."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return subprocess.run([*launcher, "-m", "hf_eagle3.cli", *arguments], check=False).returncode
