"""Reading a published drafter's config: whether it is EAGLE-3, of which flavour, and what it is in our terms.

The weights themselves are loaded by the host, under names that `register_weight_names` teaches the drafter, and checked
by `Eagle3DrafterModel.from_pretrained`.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..modeling import MODEL_TYPES, CheckpointError
from ..modeling.fields_dflash import FIELD_NAMES as DFLASH_NAMES
from ..modeling.fields_eagle3 import FIELD_NAMES, check_host_values
from ..modeling.text_eagle3 import KeyTwiceError, escape_record, parse_json, show
from ..modeling.weights_eagle3 import (
    FLOATS,
    StoredTensor,
    find_file,
    find_weight_files,
    list_tensors,
    refuse_outside,
    to_our_names,
)
from .block_flavours import BlockFlavour, find_block_flavour
from .blocks import convert_blocks
from .convert import Resolved, convert_config, make_config
from .flavours import FLAVOURS, IGNORED_KEYS, LIFTED, OTHERS, WEIGHT_NAMES, Flavour, Published
from .measuring import FIRST_QUERY, find_first_query, read_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)
logger.addFilter(escape_record)

# Only a config with one of these is worth a look at its weights.
MARKERS = frozenset(
    {
        *("draft_vocab_size", "truncated_vocab_size", "eagle_config", "speculators_model_type", "norm_output"),
        *("num_aux_hidden_states", "norm_before_fc", "fc_norm", "use_aux_norm", "parallel_drafting"),
        *("eagle_aux_hidden_state_layer_ids", "transformer_layer_config"),
    }
)
TABLES = frozenset({"d2t", "t2d"})  # tensors of numbers that are no weights
# Keys that say something else of the whole checkpoint than of the table within.
OF_WHOLE = frozenset({"architectures", "tie_word_embeddings", "quantization_config", "compression_config"})


def register_weight_names() -> None:
    """Teach the drafter the tensor names of published checkpoints; its `from_pretrained` renames by them."""
    from ..modeling import DrafterModel  # whose imports take seconds, and reading a config needs none of them

    DrafterModel.published_names = WEIGHT_NAMES


def load_published_config(
    pretrained_model_name_or_path: str | os.PathLike,
    **kwargs: Any,  # the host's: where to look, and what a user gives to `AutoConfig.from_pretrained`
) -> "PreTrainedConfig | None":
    """The config of a published drafter, or None if this is anything else.

    Weights are looked at only if config.json has a marker of EAGLE-3.

    Args:
        pretrained_model_name_or_path: A folder or Hub repository.
        kwargs: Where to look (`revision`, `subfolder`, ...). Fields of `Eagle3DrafterConfig` replace what was read,
            for example `aux_layer_ids`; the rest is ignored.

    Raises:
        CheckpointError: It is marked as EAGLE-3, but is not, or not of a flavour that can be loaded, or damaged.
    """
    found = read_published(pretrained_model_name_or_path, **kwargs)
    if found is None:
        return None
    name = os.fspath(pretrained_model_name_or_path)
    is_block = isinstance(found.flavour, BlockFlavour)
    logger.info("%s is %s drafter, flavour %s.", name, "a block" if is_block else "an EAGLE-3", found.flavour.name)
    known = DFLASH_NAMES if is_block else FIELD_NAMES
    theirs = {key: value for key, value in kwargs.items() if key in known}
    if "aux_layer_ids" in theirs:  # an argument counts boundaries
        theirs.setdefault("aux_layer_ids_from_outputs", False)
    return make_config(found.published, {**found.resolved.fields, **theirs, "name_or_path": name})


class Found(NamedTuple):
    """A published drafter, read but not loaded."""

    published: Published
    flavour: Flavour | BlockFlavour
    resolved: Resolved


def read_published(
    pretrained_model_name_or_path: str | os.PathLike,
    **kwargs: Any,  # the host's: where to look
) -> Found | None:
    """The drafter in a folder or repository, or None if there is no drafter of another producer.

    Raises:
        CheckpointError: As `load_published_config`.
    """
    if not isinstance(pretrained_model_name_or_path, str | os.PathLike) or kwargs.get("gguf_file"):
        return None
    name = os.fspath(pretrained_model_name_or_path)
    try:
        file = find_file(name, "config.json", **kwargs)
    except (OSError, ValueError):
        return None  # the host reports it
    if file is None:
        return None
    config = read_config(file, lambda: find_weight_files(name, **kwargs))
    if isinstance(config, dict) and config.get("model_type") in MODEL_TYPES:
        try:
            check_host_values(config)  # ours, which the host loads by itself, and reads these first
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error
    if not isinstance(config, dict):
        return None
    if (blocks := find_block_flavour(config)) is not None:
        return read_blocks(
            file, config, find_weight_files(name, **kwargs), blocks, runs_code=bool(kwargs.get("trust_remote_code"))
        )
    if not is_candidate(config):
        return None
    weights = find_weight_files(name, **kwargs)
    published = describe(file, config, list_tensors(weights))
    flavour = recognise(published)
    if flavour is None:
        return None
    refuse_outside(file, *weights)
    return Found(published, flavour, convert_config(flavour, published))


def read_config(file: Path, find_weights: Callable[[], list[Path]]) -> Any:  # whatever the file holds
    """config.json; None if it is broken and no drafter's, which the host reports.

    Raises:
        CheckpointError: It is broken or has a key twice, and is a drafter's by its keys or by the weights beside it.
    """
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        is_ours = isinstance(error, KeyTwiceError) and is_drafters(json.loads(file.read_text(encoding="utf-8")))
        if is_ours or any(name.endswith("hidden_norm.weight") for name in list_tensors(find_weights())):
            raise CheckpointError(
                f"{file}: not JSON that says one thing ({error}), and it is an EAGLE-3 drafter's. Download it again, or "
                "remove what is wrong."
            ) from error
        return None


def is_drafters(config: Any) -> bool:  # whatever the file holds
    """Whether config.json may be a drafter's, ours or published."""
    if not isinstance(config, dict):
        return False
    return config.get("model_type") in MODEL_TYPES or find_block_flavour(config) is not None or is_candidate(config)


def is_candidate(config: Mapping[str, Any]) -> bool:
    """Whether config.json gives a reason to look at the weights."""
    if config.get("model_type") in MODEL_TYPES:
        return False  # ours: the host loads it by itself
    if is_named_eagle(config):
        return True
    code = config.get("auto_map")
    if isinstance(code, dict) and code.keys() & {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}:
        return False  # it brings its own code
    return bool(config.keys() & MARKERS) or config.get("model_type") == "eagle"


def is_named_eagle(config: Mapping[str, Any]) -> bool:
    """Whether `architectures` names EAGLE. NVIDIA's Eagle vision-language models are something else."""
    architectures = str(config.get("architectures")).lower()
    return any(word in architectures for word in ("eagle3", "causallmeagle", "peagle"))


def describe(file: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Published:
    """A checkpoint under our tensor names, with `eagle_config` flattened.

    Raises:
        CheckpointError: Two tensors are one, or `eagle_config` is not a table.
    """
    lifted, tables = lift_tables(file, config)
    flat = {key: value for key, value in lifted.items() if key != "eagle_config"}
    nested = read_table(file, lifted, "eagle_config")
    flat |= {f"eagle_config.{key}": value for key, value in nested.items()}
    return publish(file, flat, stored, tables)


def publish(
    file: Path, config: dict[str, Any], stored: Mapping[str, StoredTensor], tables: dict[str, str]
) -> Published:
    """A checkpoint with this flat config, its tensors under our names.

    Raises:
        CheckpointError: Two tensors are one.
    """
    names = to_our_names(stored, WEIGHT_NAMES)
    return Published(
        file=file,
        config=config,
        tensors={ours: stored[name] for name, ours in names.items()},
        names={ours: name for name, ours in names.items()},
        tables=tables,
    )


def read_blocks(
    file: Path, config: Mapping[str, Any], weights: list[Path], flavour: BlockFlavour, *, runs_code: bool
) -> Found | None:
    """The block drafter in a folder; None if it brings code of its own that is to run, or that nothing else would read.

    Raises:
        CheckpointError: As `load_published_config`.
    """
    stored = list_tensors(weights)
    brings_code = "auto_map" in config
    if brings_code and (runs_code or not any(name.endswith("self_attn.q_norm.weight") for name in stored)):
        return None
    refuse_outside(file, *weights)
    published = describe_blocks(file, config, stored, flavour)
    return Found(published, flavour, convert_blocks(flavour, published))


def describe_blocks(
    file: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor], flavour: BlockFlavour
) -> Published:
    """The same of a block drafter, with the keys of its flavour's tables in their places.

    Raises:
        CheckpointError: Two tensors are one, a table is none, or a key is there twice with different values.
    """
    flat, tables = dict(config), dict[str, str]()
    if flavour.table:
        nested = read_table(file, config, flavour.table)
        flat |= {f"{flavour.table}.{key}": value for key, value in nested.items()}
    if flavour.lifted:
        for key, value in read_table(file, config, flavour.lifted).items():
            if flat.get(key) is None or key in IGNORED_KEYS | OF_WHOLE:
                flat[key], tables[key] = value, flavour.lifted
            elif value is not None and flat[key] != value:
                raise CheckpointError(
                    f"{file}: {key} is {show(flat[key])} at the top and {show(value)} in {flavour.lifted}. Remove the one "
                    "that is wrong."
                )
    return publish(file, flat, stored, tables)


def read_table(file: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A table inside the config; empty if it is not there.

    Raises:
        CheckpointError: It is something else.
    """
    table = config.get(key)
    if table is not None and not isinstance(table, dict):
        raise CheckpointError(f"{file}: {key} must be a table of keys and values, got {show(table)}.")
    return table or {}


def lift_tables(file: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The config with the keys of its `LIFTED` tables at the top, and which key came from which table.

    Raises:
        CheckpointError: A key that matters is there twice, with different values.
    """
    flat = {key: value for key, value in config.items() if key not in LIFTED}
    tables = {}
    for table in LIFTED:
        for key, value in read_table(file, config, table).items():
            if flat.get(key) is None:
                flat[key], tables[key] = value, table
            elif value is not None and flat[key] != value and key not in IGNORED_KEYS | OF_WHOLE:
                raise CheckpointError(
                    f"{file}: {key} is {show(flat[key])} at the top and {show(value)} in {table}. Remove the one that is "
                    "wrong."
                )
    return flat, tables


def recognise(published: Published) -> Flavour | None:
    """The flavour of a candidate; None if it is no drafter at all.

    Raises:
        CheckpointError: It is a drafter of another kind, or one that cannot be loaded.
    """
    file, tensors = published.file, published.tensors
    if is_plain_model(tensors):
        if not is_named_eagle(published.config):
            return None
        raise CheckpointError(
            f"{file}: marked as an EAGLE-3 drafter, but its weights are those of a model of another kind, or damaged. It "
            f"has {', '.join(sorted(published.names.values())[:8])}, ..."
        )
    for what, is_it in OTHERS.items():
        if is_it(published):
            raise CheckpointError(f"{file}: this is {what}.")
    if not tensors:
        raise CheckpointError(
            f"{file}: marked as an EAGLE-3 drafter, but there are no weights beside it. Expected model.safetensors or "
            "pytorch_model.bin."
        )
    first_query = find_first_query(published)
    if first_query not in tensors:
        raise CheckpointError(
            f"{file}: marked as an EAGLE-3 drafter, but its weights have none of {', '.join(FIRST_QUERY)} (or midlayer in "
            f"place of layers.0). It is a model of another kind, or damaged. It has {', '.join(sorted(tensors)[:8])}, ..."
        )
    H = read_shape(published, "layers.0.input_layernorm.weight", 1)[0]
    query = read_shape(published, first_query, 2)
    if query[1] != 2 * H:
        raise CheckpointError(
            f"{published.where(first_query)} has shape {list(query)}. An EAGLE-3 drafter of width {H} reads "
            f"[embedding ; hidden state], {2 * H} wide; this looks like an EAGLE-1 or EAGLE-2 drafter."
        )
    read_shape(published, "layers.0.hidden_norm.weight", 1)
    for name, tensor in tensors.items():
        if name not in TABLES and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{published.where(name)} has dtype {f'torch.{tensor.dtype}' if tensor.dtype else 'unknown'}, expected a float of 16 bits or more: "
                "quantised drafters are not supported."
            )
    return next(flavour for flavour in FLAVOURS if flavour.matches(published))


def is_plain_model(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the weights are those of a whole model, so that only an odd key in config.json spoke for a drafter."""
    marks = ("fc.weight", "d2t", "t2d", "mask_hidden")
    if any(name in marks or "hidden_norm" in name or "medusa" in name or "draft_heads" in name for name in tensors):
        return False
    return any("embed" in name or "layers.0." in name for name in tensors)
