"""Loading published drafters of every known flavour, and writing them."""

from .describe import Description, describe_drafter
from .engines import ENGINES, find_refusals
from .exporter import Exported, export
from .flavours import FLAVOURS, Flavour
from .load import load_published_config, register_weight_names

__all__ = [
    "ENGINES",
    "FLAVOURS",
    "Description",
    "Exported",
    "Flavour",
    "describe_drafter",
    "export",
    "find_refusals",
    "load_published_config",
    "register_weight_names",
]
