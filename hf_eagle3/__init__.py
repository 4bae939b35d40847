"""EAGLE-3 and EAGLE-3.1 drafters inside Transformers. Importing this is all: `generate(assistant_model=drafter)`."""

from importlib import import_module
from typing import Any

from .console.interrupts import end_quietly, is_command_line

end_quietly()  # before what takes seconds

__version__ = "0.1.0"

# Public name -> its module. Training pulls in the host's Trainer, which takes seconds to import.
MODULES = {
    "CheckpointError": "modeling",
    "DFlashDrafterConfig": "modeling",
    "DFlashDrafterModel": "modeling",
    "Eagle3DrafterConfig": "modeling",
    "Eagle3DrafterModel": "modeling",
    "Eagle3Trainer": "training",
    "Eagle3TrainingArguments": "training",
    "Speculation": "speculation.stats",
    "attach": "host.attaching",
    "detach": "host.attaching",
    "doctor": "diagnosis.readings",
    "drift": "diagnosis.drift",
    "install": "host.install",
    "join_projections": "kernels.qkv",
    "release_graphs": "decoding.arena",
    "uninstall": "host.install",
}
__all__ = [
    "CheckpointError",
    "DFlashDrafterConfig",
    "DFlashDrafterModel",
    "Eagle3DrafterConfig",
    "Eagle3DrafterModel",
    "Eagle3Trainer",
    "Eagle3TrainingArguments",
    "Speculation",
    "attach",
    "detach",
    "doctor",
    "drift",
    "install",
    "join_projections",
    "release_graphs",
    "uninstall",
]

if not is_command_line():  # whose commands install when they need a model: `--help` does not
    from .decoding.arena import release_graphs
    from .host.attaching import attach, detach
    from .host.install import install, uninstall
    from .kernels.qkv import join_projections
    from .modeling import (
        CheckpointError,
        DFlashDrafterConfig,
        DFlashDrafterModel,
        Eagle3DrafterConfig,
        Eagle3DrafterModel,
    )
    from .speculation.stats import Speculation

    install()


def __getattr__(name: str) -> Any:  # whatever the modules have
    if name in MODULES:
        return getattr(import_module(f".{MODULES[name]}", __name__), name)
    raise AttributeError(f"module 'hf_eagle3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
