"""The network: what is published with every drafter and runs alone, as remote code.

Names are imported when they are asked for: reading a config or text needs no network, which takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_dflash import DFlashDrafterConfig
    from .configuration_eagle3 import Eagle3DrafterConfig
    from .drafter_eagle3 import DrafterModel
    from .modeling_dflash import DFlashDrafterModel, DFlashDrafterOutput
    from .modeling_eagle3 import Eagle3DrafterModel, Eagle3DrafterOutput
    from .weights_eagle3 import CheckpointError

MODULES = {
    "CheckpointError": "weights_eagle3",
    "DFlashDrafterConfig": "configuration_dflash",
    "DFlashDrafterModel": "modeling_dflash",
    "DFlashDrafterOutput": "modeling_dflash",
    "DrafterModel": "drafter_eagle3",
    "Eagle3DrafterConfig": "configuration_eagle3",
    "Eagle3DrafterModel": "modeling_eagle3",
    "Eagle3DrafterOutput": "modeling_eagle3",
}
# What configs of drafters say in `model_type`.
MODEL_TYPES = ("eagle3", "dflash_drafter")
__all__ = [
    "MODEL_TYPES",
    "CheckpointError",
    "DFlashDrafterConfig",
    "DFlashDrafterModel",
    "DFlashDrafterOutput",
    "DrafterModel",
    "Eagle3DrafterConfig",
    "Eagle3DrafterModel",
    "Eagle3DrafterOutput",
]


def __getattr__(name: str) -> Any:  # whatever the modules have
    if name in MODULES:
        return getattr(import_module(f".{MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
