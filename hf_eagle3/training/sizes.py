"""Sizes of a target from its config, which may have one for each layer, or none."""

from collections.abc import Iterator

from transformers import PreTrainedConfig


def find_size(config: PreTrainedConfig, *names: str) -> int | None:
    """The largest value over all layers of the first field among `names` that has one; None if none has.

    A config may have a number, a list of numbers by layer (Gemma 3n), or another number in a config for each layer
    (`per_layer_config`, Gemma 4).
    """
    return next((max(sizes) for name in names if (sizes := list(each_size(config, name)))), None)


def each_size(config: PreTrainedConfig, name: str) -> Iterator[int]:
    """The positive whole numbers that `config` has for `name`, over all layers."""
    for layer in layer_configs(config) if getattr(config, "is_heterogeneous", False) else [config]:
        value = getattr(layer, name, None)
        for size in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(size, int) and size > 0:
                yield size


def layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config for each layer; `config` itself where all are alike."""
    return list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)
