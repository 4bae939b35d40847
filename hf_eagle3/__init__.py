"""EAGLE-3 and EAGLE-3.1 drafters inside Transformers. Importing this is all: `generate(assistant_model=drafter)`."""

from typing import Any

from .depths import measure_depths
from .graphs import release_graphs
from .integration import install, uninstall
from .kernels.joined import join_projections
from .modeling import CheckpointError, Eagle3DrafterConfig, Eagle3DrafterModel
from .stats import Speculation

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Eagle3DrafterConfig",
    "Eagle3DrafterModel",
    "Eagle3Trainer",
    "Eagle3TrainingArguments",
    "Speculation",
    "doctor",
    "install",
    "join_projections",
    "measure_depths",
    "release_graphs",
    "uninstall",
]

install()


def __getattr__(name: str) -> Any:  # whatever training exports
    if name == "doctor":
        from .diagnosis import doctor

        return doctor
    # Training pulls in the host's Trainer, which takes seconds to import.
    if name in ("Eagle3Trainer", "Eagle3TrainingArguments"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module 'hf_eagle3' has no attribute {name!r}")
