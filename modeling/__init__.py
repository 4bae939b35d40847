"""The network: what is published with every drafter and runs alone, as remote code."""

from .configuration_eagle3 import Eagle3DrafterConfig
from .modeling_eagle3 import CheckpointError, Eagle3DrafterModel, Eagle3DrafterOutput

__all__ = ["CheckpointError", "Eagle3DrafterConfig", "Eagle3DrafterModel", "Eagle3DrafterOutput"]
