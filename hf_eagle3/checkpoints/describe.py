"""A checkpoint as text: its flavour, each field and its source, its size, and the engines that can serve it."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..modeling import CheckpointError, Eagle3DrafterConfig
from ..modeling.text_eagle3 import one_line, show
from ..modeling.weights_eagle3 import (
    StoredTensor,
    find_file,
    find_weight_files,
    list_tensors,
    refuse_misfits,
    refuse_outside,
    to_our_names,
)
from .convert import make_config
from .engines import ENGINES, HF, find_refusals
from .flavours import WEIGHT_NAMES
from .load import read_published
from .target_name import CARD, NamedTarget, find_target

FIELDS = tuple(name for name in Eagle3DrafterConfig.__annotations__ if name not in ("model_type",))


class Description(NamedTuple):
    """A drafter that was looked at, not loaded."""

    name: str
    flavour: str
    config: Eagle3DrafterConfig
    sources: dict[str, str]  # field -> where its value comes from
    tensors: dict[str, StoredTensor]
    target: NamedTarget | None  # what it was made for

    @property
    def refusals(self) -> dict[str, list[str]]:
        """Engine -> why it cannot serve the drafter; empty where it can."""
        return {engine: find_refusals(self.config, engine) for engine in ENGINES if engine != HF}

    def to_dict(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "name": self.name,
            "flavour": self.flavour,
            "target": None if self.target is None else {"name": self.target.name, "from": self.target.source},
            "fields": {
                name: {"value": getattr(self.config, name), "from": self.sources.get(name, "default")}
                for name in FIELDS
            },
            "tensors": {name: list(tensor.shape) for name, tensor in self.tensors.items()},
            "refusals": self.refusals,
        }

    def __str__(self) -> str:
        files = sorted({tensor.file for tensor in self.tensors.values()})
        floats = [
            tensor for tensor in self.tensors.values() if tensor.dtype is not None and tensor.dtype.is_floating_point
        ]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in floats})
        parameters = sum(math.prod(tensor.shape) for tensor in floats)
        rows = [
            (name, one_line(str(getattr(self.config, name))), self.sources.get(name, "default")) for name in FIELDS
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(
            one_line(line)
            for line in [
                f"{self.name}: an EAGLE-3 drafter, flavour {self.flavour}",
                f"Files    {', '.join(f'{file.name} ({file.stat().st_size / 1e6:.1f} MB)' for file in files)}",
                f"Weights  {parameters / 1e6:.1f} million parameters in {len(self.tensors)} tensors, {', '.join(dtypes)}",
                f"Target   {self.describe_target()}",
                "",
                *(f"{name:{widths[0]}}  {value:{widths[1]}}  {source}" for name, value, source in rows),
                "",
                f"{ENGINES[HF]:24} yes, with hf-eagle3",
                *(
                    f"{ENGINES[engine]:24} {'no: ' + '; '.join(why) if why else 'yes, after hf-eagle3 export --to ' + engine}"
                    for engine, why in self.refusals.items()
                ),
            ]
        )

    def describe_target(self) -> str:
        """The target's name and where it stands, and sizes to know the target by."""
        config = self.config
        kind = f"{config.target_model_type}, " if config.target_model_type else ""
        sizes = f"{kind}hidden size {config.target_hidden_size or config.hidden_size}, {config.vocab_size:,} tokens"
        return f"{'not named' if self.target is None else ', by '.join(self.target)}; {sizes}"


def describe_drafter(
    name_or_path: str | os.PathLike,
    **kwargs: Any,  # the host's: where to look (`revision`, `subfolder`, ...)
) -> Description:
    """Look at a drafter's config and the headers of its weights.

    Raises:
        CheckpointError: It is no EAGLE-3 drafter, or damaged.
    """
    name = os.fspath(name_or_path)
    found = read_published(name, **kwargs)
    if found is not None:
        published, flavour, (fields, sources) = found
        config = make_config(published, fields)
        tensors = {published.names[ours]: tensor for ours, tensor in published.tensors.items()}
        return Description(
            name, flavour.name, config, sources, tensors, find_named_target(name, config, sources, tensors, **kwargs)
        )
    file = find_file(name, "config.json", **kwargs)
    if file is None:
        raise CheckpointError(f"{name}: there is no config.json, in a folder or on the Hub.")
    config_dict, _ = Eagle3DrafterConfig.get_config_dict(name, **kwargs)
    if config_dict.get("model_type") != Eagle3DrafterConfig.model_type:
        raise CheckpointError(
            f"{file}: not an EAGLE-3 drafter, by its keys (model_type {show(config_dict.get('model_type'))})."
        )
    config = Eagle3DrafterConfig.from_pretrained(name, **kwargs)
    files = find_weight_files(name, **kwargs)
    refuse_outside(file, *files)
    tensors = list_tensors(files)
    if not tensors:
        raise CheckpointError(
            f"{file}: there are no weights beside it. Expected model.safetensors or pytorch_model.bin."
        )
    where = ", ".join(map(str, files))
    refuse_misfits(config, tensors, to_our_names(tensors, WEIGHT_NAMES), where)
    sources = {key: f"config.json: {key}" for key in config_dict}
    return Description(
        name, "hf-eagle3", config, sources, tensors, find_named_target(name, config, sources, tensors, **kwargs)
    )


def find_named_target(
    name: str,
    config: Eagle3DrafterConfig,
    sources: Mapping[str, str],
    tensors: Mapping[str, StoredTensor],
    **kwargs: Any,  # as in `describe_drafter`
) -> NamedTarget | None:
    """The target that a drafter's config, card, or names of files say."""
    card = find_file(name, CARD, **kwargs)
    if card is not None:
        refuse_outside(card)
    files = sorted({tensor.file.stem for tensor in tensors.values()})
    return find_target(config, sources, card, [Path(name).resolve().name, *files])
