"""Reading a published drafter's config: whether it is EAGLE-3, of which flavour, and what it is in our terms.

The weights themselves are loaded by the host, under names that `register_weight_names` teaches the drafter, and checked
by `Eagle3DrafterModel.from_pretrained`.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling import CheckpointError, Eagle3DrafterConfig, Eagle3DrafterModel
from ..modeling.weights_eagle3 import StoredTensor, find_file, find_weight_files, list_tensors, to_our_names
from .convert import FIRST_QUERY, convert_config, make_config, read_shape
from .flavours import FLAVOURS, OTHERS, WEIGHT_NAMES, Flavour, Published

logger = logging.getLogger(__name__)

# Only a config with one of these is worth a look at its weights.
MARKERS = frozenset(
    {
        *("draft_vocab_size", "truncated_vocab_size", "eagle_config", "speculators_model_type", "norm_output"),
        *("num_aux_hidden_states", "norm_before_fc", "fc_norm", "use_aux_norm", "parallel_drafting"),
        "eagle_aux_hidden_state_layer_ids",
    }
)
USER_FIELDS = frozenset(Eagle3DrafterConfig.__annotations__)


def register_weight_names() -> None:
    """Teach the drafter the tensor names of published checkpoints; its `from_pretrained` renames by them."""
    Eagle3DrafterModel.published_names = WEIGHT_NAMES


def load_published_config(
    pretrained_model_name_or_path: str | os.PathLike,
    **kwargs: Any,  # the host's: where to look, and what a user gives to `AutoConfig.from_pretrained`
) -> Eagle3DrafterConfig | None:
    """The config of a published EAGLE-3 drafter, or None if this is anything else.

    Weights are looked at only if config.json has a marker of EAGLE-3.

    Args:
        pretrained_model_name_or_path: A folder or Hub repository.
        kwargs: Where to look (`revision`, `subfolder`, ...). Fields of `Eagle3DrafterConfig` replace what was read,
            for example `aux_layer_ids`; the rest is ignored.

    Raises:
        CheckpointError: It is marked as EAGLE-3, but is not, or not of a flavour that can be loaded, or damaged.
    """
    if not isinstance(pretrained_model_name_or_path, str | os.PathLike) or kwargs.get("gguf_file"):
        return None
    name = os.fspath(pretrained_model_name_or_path)
    try:
        file = find_file(name, "config.json", **kwargs)
        config = json.loads(file.read_text(encoding="utf-8")) if file is not None else None
    except (OSError, ValueError):
        return None  # the host says what is wrong
    if file is None or not isinstance(config, dict) or not is_candidate(config):
        return None

    stored = list_tensors(find_weight_files(name, **kwargs))
    published = describe(file, config, stored)
    flavour = recognise(published)
    if flavour is None:
        return None
    logger.info("%s is an EAGLE-3 drafter, flavour %s.", name, flavour.name)
    fields = convert_config(flavour, published)
    fields.update({key: value for key, value in kwargs.items() if key in USER_FIELDS})
    return make_config(published, {**fields, "name_or_path": name})


def is_candidate(config: Mapping[str, Any]) -> bool:
    """Whether config.json gives a reason to look at the weights."""
    if config.get("model_type") == Eagle3DrafterConfig.model_type:
        return False  # ours: the host loads it by itself
    if is_named_eagle(config):
        return True
    if (config.get("auto_map") or {}).keys() & {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}:
        return False  # it brings its own code
    return bool(config.keys() & MARKERS) or config.get("model_type") == "eagle"


def is_named_eagle(config: Mapping[str, Any]) -> bool:
    """Whether `architectures` says EAGLE. NVIDIA's Eagle vision-language models are something else."""
    architectures = str(config.get("architectures")).lower()
    return any(word in architectures for word in ("eagle3", "causallmeagle", "peagle"))


def describe(file: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Published:
    """A checkpoint under our tensor names, with `eagle_config` flattened.

    Raises:
        CheckpointError: Two tensors are one, or `eagle_config` is not a table.
    """
    flat = {key: value for key, value in config.items() if key != "eagle_config"}
    nested = config.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise CheckpointError(f"{file}: eagle_config must be a table of keys and values, got {nested!r}.")
    flat |= {f"eagle_config.{key}": value for key, value in nested.items()}
    names = to_our_names(stored, WEIGHT_NAMES)
    return Published(
        file=file,
        config=flat,
        tensors={ours: stored[name] for name, ours in names.items()},
        names={ours: name for name, ours in names.items()},
    )


def recognise(published: Published) -> Flavour | None:
    """The flavour of a candidate; None if it is no drafter at all.

    Raises:
        CheckpointError: It is a drafter of another kind, or one that cannot be loaded.
    """
    file, tensors = published.file, published.tensors
    if is_plain_model(tensors) and not is_named_eagle(published.config):
        return None
    for what, is_it in OTHERS.items():
        if is_it(published):
            raise CheckpointError(f"{file}: this is {what}.")
    if not tensors:
        raise CheckpointError(
            f"{file}: marked as an EAGLE-3 drafter, but there are no weights beside it. Expected model.safetensors or "
            "pytorch_model.bin."
        )
    if FIRST_QUERY not in tensors:
        raise CheckpointError(
            f"{file}: marked as an EAGLE-3 drafter, but its weights have no midlayer.self_attn.q_proj.weight or "
            f"{FIRST_QUERY}. It is a model of another kind, or damaged. It has {', '.join(sorted(tensors)[:8])}, ..."
        )
    H = read_shape(published, "layers.0.input_layernorm.weight", 1)[0]
    query = read_shape(published, FIRST_QUERY, 2)
    if query[1] != 2 * H:
        raise CheckpointError(
            f"{published.where(FIRST_QUERY)} has shape {list(query)}. An EAGLE-3 drafter of width {H} reads "
            f"[embedding ; hidden state], {2 * H} wide; this looks like an EAGLE-1 or EAGLE-2 drafter."
        )
    read_shape(published, "layers.0.hidden_norm.weight", 1)
    dtype = tensors[FIRST_QUERY].dtype
    if dtype is None or not dtype.is_floating_point:
        raise CheckpointError(f"{published.where(FIRST_QUERY)} has dtype {dtype or 'unknown'}, expected a float.")
    return next(flavour for flavour in FLAVOURS if flavour.matches(published))


def is_plain_model(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the weights are those of a whole model, so that only an odd key in config.json spoke for a drafter."""
    marks = ("fc.weight", "model.fc.weight", "d2t", "t2d", "mask_hidden")
    if any(name in marks or "hidden_norm" in name or "medusa" in name or "draft_heads" in name for name in tensors):
        return False
    return any("embed" in name or "layers.0." in name for name in tensors) and not any(
        name.startswith("midlayer") or name in WEIGHT_NAMES for name in tensors
    )
