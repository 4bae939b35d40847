"""A checkpoint as text: its flavour, each field and its source, its size, and the engines that can serve it."""

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError

from ..modeling import CheckpointError
from ..modeling.fields_dflash import FIELD_NAMES as DFLASH_NAMES
from ..modeling.fields_dflash import DFlashFields
from ..modeling.fields_eagle3 import FIELD_NAMES, DrafterFields, Eagle3Fields, check_host_values
from ..modeling.text_eagle3 import one_line, show
from ..modeling.weights_eagle3 import (
    StoredTensor,
    find_file,
    find_weight_files,
    list_tensors,
    read_json_file,
    refuse_misfits,
    refuse_outside,
    to_our_names,
)
from .convert import ReadBlockFields, ReadFields, make_fields
from .engines import ENGINES, HF, find_refusals
from .flavours import WEIGHT_NAMES
from .load import read_published
from .target_name import CARD, NamedTarget, find_target

# What the config.json of a drafter of ours says it is -> its fields, and what reads them.
KINDS: dict[str, tuple[type[DrafterFields], frozenset[str], type[DrafterFields]]] = {
    Eagle3Fields.model_type: (Eagle3Fields, FIELD_NAMES, ReadFields),
    DFlashFields.model_type: (DFlashFields, DFLASH_NAMES, ReadBlockFields),
}
# Further keys of a config.json that we saved. The host reads one with any other key, and takes seconds to import.
BESIDE = frozenset({"architectures", "auto_map", "dtype", "model_type", "transformers_version"})


class Description(NamedTuple):
    """A drafter that was looked at, not loaded."""

    name: str
    flavour: str
    config: DrafterFields
    sources: dict[str, str]  # field -> where its value comes from
    tensors: dict[str, StoredTensor]
    target: NamedTarget | None  # what it was made for

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields of its kind."""
        kind = next(kind for kind, *_ in KINDS.values() if isinstance(self.config, kind))
        return tuple(field.name for field in fields(kind))

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
                for name in self.fields
            },
            "tensors": {name: list(tensor.shape) for name, tensor in self.tensors.items()},
            "refusals": self.refusals,
        }

    @property
    def head(self) -> list[str]:
        """Lines that say what it is, what it is made of, and what for."""
        files = sorted({tensor.file for tensor in self.tensors.values()})
        floats = [tensor for tensor in self.tensors.values() if "float" in (tensor.dtype or "")]
        dtypes = sorted({str(tensor.dtype) for tensor in floats})
        parameters = sum(math.prod(tensor.shape) for tensor in floats)
        lines = [
            f"{self.name}: {'an' if self.config.family == 'EAGLE-3' else 'a'} {self.config.family} drafter, flavour "
            f"{self.flavour}",
            f"Files    {', '.join(f'{file.name} ({file.stat().st_size / 1e6:.1f} MB)' for file in files)}",
            f"Weights  {parameters / 1e6:.1f} million parameters in {len(self.tensors)} tensors, {', '.join(dtypes)}",
            f"Target   {self.describe_target()}",
        ]
        return [one_line(line) for line in lines]

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """Each field with its value, and where that comes from."""
        return [(name, str(getattr(self.config, name)), self.sources.get(name, "default")) for name in self.fields]

    @property
    def engines(self) -> list[tuple[str, str, str]]:
        """Each engine with whether it can serve the drafter, and how or why not."""
        rows = [
            (ENGINES[engine], "NO", "; ".join(why))
            if why
            else (ENGINES[engine], "yes", f"hf-eagle3 export --to {engine}")
            for engine, why in self.refusals.items()
        ]
        return [(ENGINES[HF], "yes", "with hf-eagle3"), *rows]

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
        published, flavour, (values, sources) = found
        config = make_fields(published, values)
        tensors = {published.names[ours]: tensor for ours, tensor in published.tensors.items()}
        return Description(
            name, flavour.name, config, sources, tensors, find_named_target(name, config, sources, tensors, **kwargs)
        )
    file = find_file(name, "config.json", **kwargs)
    if file is None:
        raise CheckpointError(f"{name}: there is no config.json, in a folder or on the Hub.")
    config_dict = read_json_file(file)
    if not isinstance(config_dict, dict) or config_dict.get("model_type") not in KINDS:
        kind = config_dict.get("model_type") if isinstance(config_dict, dict) else config_dict
        raise CheckpointError(f"{file}: not an EAGLE-3 drafter, by its keys (model_type {show(kind)}).")
    config = read_fields(config_dict) or load_config(name, config_dict["model_type"], **kwargs)
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


def read_fields(config_dict: Mapping[str, Any]) -> DrafterFields | None:
    """The fields of a config.json of ours; None where the host is to say what it makes of them."""
    _, names, reader = KINDS[config_dict["model_type"]]
    if not config_dict.keys() <= names | BESIDE:
        return None
    try:
        check_host_values(config_dict)
        return reader(**{key: value for key, value in config_dict.items() if key in names})
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError):
        return None  # the host raises as well, and as it does when the drafter is loaded


def load_config(name: str, model_type: str, **kwargs: Any) -> DrafterFields:  # as in `describe_drafter`
    """The config as loading the drafter makes it.

    Raises:
        CheckpointError: It cannot be made.
    """
    from ..modeling import DFlashDrafterConfig, Eagle3DrafterConfig

    kind = DFlashDrafterConfig if model_type == DFlashFields.model_type else Eagle3DrafterConfig
    return kind.from_pretrained(name, **kwargs)


def find_named_target(
    name: str,
    config: DrafterFields,
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
