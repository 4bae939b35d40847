"""What takes seconds before any command that uses a model: imports."""

import os
import sys

from ..console.interrupts import raise_again
from ..console.progress import Progress


def start() -> None:
    """Import PyTorch and Transformers, and let the host know drafters. Until then Ctrl-C ends the process as it is."""
    is_further = os.environ.get("RANK", "0") != "0"  # of the processes that a launcher started
    with Progress(is_silent=is_further or "hf_eagle3.host.install" in sys.modules) as step:
        step("Starting PyTorch and Transformers")
        from ..host.install import install

        install()
    raise_again()
