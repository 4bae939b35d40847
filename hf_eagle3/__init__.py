"""EAGLE-3 and EAGLE-3.1 drafters inside Transformers. Importing this is all: `generate(assistant_model=drafter)`."""

from typing import Any

from .console.interrupts import end_quietly

end_quietly()  # before what takes seconds

from .decoding.arena import release_graphs  # noqa: E402
from .host.depths import measure_depths  # noqa: E402
from .host.install import install, uninstall  # noqa: E402
from .kernels.qkv import join_projections  # noqa: E402
from .modeling import CheckpointError, Eagle3DrafterConfig, Eagle3DrafterModel  # noqa: E402
from .speculation.stats import Speculation  # noqa: E402

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
        from .diagnosis.readings import doctor

        return doctor
    # Training pulls in the host's Trainer, which takes seconds to import.
    if name in ("Eagle3Trainer", "Eagle3TrainingArguments"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module 'hf_eagle3' has no attribute {name!r}")
