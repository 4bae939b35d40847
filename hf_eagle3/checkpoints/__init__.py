"""Loading published drafters of every known flavour."""

from .flavours import FLAVOURS, Flavour
from .load import load_published_config, register_weight_names

__all__ = ["FLAVOURS", "Flavour", "load_published_config", "register_weight_names"]
