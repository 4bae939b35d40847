"""From published keys and tensors to our config.

Sizes come from the tensors and are checked against what config.json states.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..console.quoting import is_model_name
from ..modeling import CheckpointError
from ..modeling.fields_dflash import DFlashFields
from ..modeling.fields_eagle3 import DrafterFields, Eagle3Fields
from ..modeling.text_eagle3 import escape_record, show
from .flavours import FIXED_VALUES, IGNORED_KEYS, READ_ELSEWHERE, Flavour, Published
from .layer_ids import read_layer_ids
from .measuring import find_first_query, measure
from .rope import check_rope, is_plain_rope, read_rope

if TYPE_CHECKING:
    from ..modeling import DFlashDrafterConfig, Eagle3DrafterConfig

logger = logging.getLogger(__name__)
logger.addFilter(escape_record)

# A disagreement between config and tensors on these is common, harmless, and settled by the tensors.
TENSORS_DECIDE = frozenset({"num_hidden_layers", "attention_bias", "mlp_bias"})
# So is a tensor on these for which config.json denies the flag; a flag without its tensor is an error.
TENSORS_GRANT = frozenset({"norm_before_fc"})


class Resolved(NamedTuple):
    """Our config's fields, and where each comes from, in words."""

    fields: dict[str, Any]
    sources: dict[str, str]


Stated = dict[str, dict[str, Any]]  # our field -> {published key: value}


def convert_config(flavour: Flavour, published: Published) -> Resolved:
    """Our config's fields.

    Raises:
        CheckpointError: A key is not known, or contradicts the tensors.
    """
    file = published.file
    config = {key: value for key, value in published.config.items() if key not in flavour.ignored}
    refuse_unknown(flavour, published, config)
    stated: Stated = {}
    for key, ours in flavour.config_keys.items():
        if config.get(key) is not None:
            stated.setdefault(ours, {})[published.spell(key)] = config[key]
    fields = {ours: next(iter(values.values())) for ours, values in stated.items()}
    sources = {ours: f"config.json: {next(iter(values))}" for ours, values in stated.items()}
    resolved = Resolved(fields, sources)

    resolve_layer_ids(flavour, file, stated, resolved)
    measured = measure(published, fields)
    check_all_stated(published, stated, measured)
    sources |= dict.fromkeys(measured, "the tensors")
    for ours, value in flavour.defaults.items():
        if ours not in stated:
            logger.warning("%s: %s is not stated, which in a %s checkpoint means %r.", file, ours, flavour.name, value)
            fields[ours], sources[ours] = value, f"not stated; a {flavour.name} checkpoint then means so"
    check_tied(file, config, measured)
    fields |= measured
    resolve_nested(file, config, resolved)
    return resolved


def refuse_unknown(flavour: Flavour, published: Published, config: Mapping[str, Any]) -> None:
    """Raise if config.json has keys, or values of keys, that no loadable drafter of this flavour has."""
    file = published.file
    known = flavour.config_keys.keys() | FIXED_VALUES.keys() | IGNORED_KEYS | READ_ELSEWHERE
    unknown = sorted(
        published.spell(key) for key in config.keys() - known if not key.startswith("_")
    )  # _name_or_path and the like
    if unknown and not flavour.is_clone:
        raise CheckpointError(
            f"{file}: {flavour.name} checkpoints are not known to have {unknown}. A key that is ignored may change the "
            "drafter's arithmetic, so none is: remove it if it changes nothing, or report it."
        )
    if unknown:
        logger.info("%s: %s are taken to be the target's, whose config this was made from.", file, unknown)
    for key in sorted(config.keys() & FIXED_VALUES.keys()):
        if config[key] not in FIXED_VALUES[key]:
            raise CheckpointError(
                f"{file}: {key} is {show(config[key])}, and no EAGLE-3 drafter that can be loaded has that."
            )


def resolve_layer_ids(flavour: Flavour, file: Path, stated: Stated, resolved: Resolved) -> None:
    """Put the captured boundaries into `resolved`, and their number into `stated`, beside what is stated of it."""
    ids = read_layer_ids(file, stated.pop("aux_layer_ids", {}), flavour.nested_ids_are_boundaries)
    if ids is None:
        resolved.fields["aux_layer_ids"] = None
        return
    key = resolved.sources["aux_layer_ids"].removeprefix("config.json: ")
    number = {f"{key}: the number of captured layer ids": len(ids.boundaries)}
    stated["num_aux_hidden_states"] = number | stated.get("num_aux_hidden_states", {})
    resolved.fields.update(aux_layer_ids=ids.boundaries, aux_layer_ids_from_outputs=ids.were_outputs)
    resolved.sources["aux_layer_ids"] += f" {ids.published}" + (", plus one each" if ids.were_outputs else "")


def resolve_nested(file: Path, config: Mapping[str, Any], resolved: Resolved) -> None:
    """Put the fields that have tables of their own into `resolved`: sliding window, rope, the target's name."""
    fields, sources = resolved
    fields["sliding_window"] = read_sliding_window(file, config, fields["num_hidden_layers"])
    fields["rope_parameters"], sources["rope_parameters"] = read_rope(file, config)
    if fields["sliding_window"] is not None:
        sources["sliding_window"] = "config.json: layer_types and sliding_window"
    if (target := read_target_name(file, config)) is not None:
        fields["target_name_or_path"] = target
        sources["target_name_or_path"] = "config.json: speculators_config.verifier.name_or_path"


def check_all_stated(published: Published, stated: Stated, measured: Mapping[str, Any]) -> None:
    """Raise if keys contradict the tensors, or each other where the tensors do not decide."""
    for ours in sorted(stated.keys() & measured.keys()):
        check_stated(published, ours, stated[ours], measured[ours])
    for ours in sorted(stated.keys() - measured.keys()):
        check_unmeasured(published.file, stated[ours])


def check_tied(file: Path, config: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Raise if the head would be the drafter's own embedding table."""
    if not config.get("tie_word_embeddings"):
        return
    if measured["share_lm_head"]:
        raise CheckpointError(
            f"{file}: tie_word_embeddings is true and there is no lm_head.weight, so the head would be the drafter's "
            "embedding table. That is not supported."
        )
    logger.warning("%s: tie_word_embeddings is ignored, since there is an lm_head.weight.", file)


def check_unmeasured(file: Path, stated: Mapping[str, Any]) -> None:
    """Raise if several keys for one field, which tensors do not show, contradict each other."""
    first, *others = stated.values()
    if any(value != first for value in others):
        says = " and ".join(f"{key} is {show(value)}" for key, value in stated.items())
        raise CheckpointError(f"{file}: {says}. They mean the same; remove the one that is wrong.")


def check_stated(published: Published, ours: str, stated: Mapping[str, Any], measured: Any) -> None:
    """Compare the values in config.json, under one key or several, with the tensors.

    Raises:
        CheckpointError: They differ in what matters.
    """
    if measured in stated.values():
        return
    says = " and ".join(f"{key} is {show(value)}" for key, value in stated.items())
    if ours in TENSORS_DECIDE or (ours in TENSORS_GRANT and measured):
        logger.warning("%s: %s, but by the tensors it is %s, which is taken.", published.file, says, measured)
        return
    raise CheckpointError(f"{published.file}: {says}, but by the tensors {ours} is {show(measured)}.")


def read_sliding_window(file: Path, config: Mapping[str, Any], num_layers: int) -> int | None:
    """The window, which counts only with `layer_types`; alone it is left over from the target's config.

    Raises:
        CheckpointError: Some layers have it and some not, or a layer is of another type.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    kinds = set(kinds[:num_layers]) if isinstance(kinds, list) else {repr(kinds)}
    if kinds == {"full_attention"}:
        return None
    window = config.get("sliding_window")
    if kinds != {"sliding_attention"} or not isinstance(window, int) or isinstance(window, bool):
        raise CheckpointError(
            f"{file}: layer_types starts with {sorted(map(str, kinds))} and sliding_window is {show(window)}. Expected "
            "full_attention, or sliding_attention with a window, the same for every layer of the drafter."
        )
    return window


def read_target_name(file: Path, config: Mapping[str, Any]) -> str | None:
    """The target's repository or folder, as speculators states it; None where what is stated can be neither."""
    table = config.get("speculators_config")
    verifier = table.get("verifier") if isinstance(table, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    if not name or (isinstance(name, str) and is_model_name(name)):
        return name or None
    logger.warning(
        "%s: speculators_config.verifier.name_or_path is %s, which is no repository and no folder; ignored.",
        *(file, show(name)),
    )
    return None


@strict
@dataclass(kw_only=True)
class ReadFields(Eagle3Fields):
    """The fields of a drafter that is looked at, not made: checked as a config's are."""


@strict
@dataclass(kw_only=True)
class ReadBlockFields(DFlashFields):
    """The same of a block drafter."""


def make_fields(published: Published, fields: dict[str, Any]) -> DrafterFields:
    """The fields, checked as `make_config` does.

    Raises:
        CheckpointError: A value is of the wrong type or out of range.
    """
    if not is_plain_rope(fields["rope_parameters"]):
        return make_config(published, fields)
    kind = ReadBlockFields if "block_size" in fields else ReadFields
    return make_checked(published.file, lambda: kind(**fields))


def make_config(published: Published, fields: dict[str, Any]) -> "Eagle3DrafterConfig | DFlashDrafterConfig":
    """The config, checked by itself and for its rotary table.

    Raises:
        CheckpointError: A value is of the wrong type or out of range.
    """
    from ..modeling import DFlashDrafterConfig, Eagle3DrafterConfig  # whose host takes seconds to import

    dtype = published.tensors[find_first_query(published)].dtype
    values = {**fields, "dtype": dtype}
    if "block_size" in fields:
        values["architectures"] = ["DFlashDrafterModel"]
        return make_checked(published.file, lambda: DFlashDrafterConfig(**values))
    values["architectures"] = ["Eagle3DrafterModel"]
    return make_checked(published.file, lambda: Eagle3DrafterConfig(**values))


Fields = TypeVar("Fields", bound=DrafterFields)


def make_checked(file: Path, make: Callable[[], Fields]) -> Fields:
    """The fields or the config that `make` returns, with every error named by `file`.

    Raises:
        CheckpointError: A value is of the wrong type or out of range, or gives no rotary table.
    """
    try:
        made = make()
        check_rope(made)
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return made
