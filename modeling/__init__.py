"""The network: what is published with every drafter and runs alone, as remote code.

Names are imported when they are asked for: reading a config or text needs no network, which takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_eagle3 import Eagle3DrafterConfig
    from .modeling_eagle3 import Eagle3DrafterModel, Eagle3DrafterOutput
    from .weights_eagle3 import CheckpointError

MODULES = {
    "CheckpointError": "weights_eagle3",
    "Eagle3DrafterConfig": "configuration_eagle3",
    "Eagle3DrafterModel": "modeling_eagle3",
    "Eagle3DrafterOutput": "modeling_eagle3",
}
__all__ = ["CheckpointError", "Eagle3DrafterConfig", "Eagle3DrafterModel", "Eagle3DrafterOutput"]


def __getattr__(name: str) -> Any:  # whatever the modules have
    if name in MODULES:
        return getattr(import_module(f".{MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
