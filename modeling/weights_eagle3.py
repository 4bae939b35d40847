"""What a drafter's weight files hold: which tensor lies in which file, of which shape and dtype.

Reads headers where it can, without torch and Transformers, which take seconds to import. Copied into every published
drafter, so it imports these, safetensors and its siblings only.
"""

import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from .text_eagle3 import one_line, parse_json, show

if TYPE_CHECKING:
    from torch import Tensor

HUB_KEYS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}

# What a drafter can be made of. Floats of 8 bits mean nothing without scales, which no drafter has.
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})

PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"  # of a shard: a file beside its index

BESIDE = ("config.json", "generation_config.json", "*.index*.json")  # what else is read of a checkpoint

# SGLang and TensorRT-LLM call the input norm of a further layer so; a file for several engines has it under both names.
SECOND_NAME = r"^layers\.[1-9]\d*\.hidden_norm\.weight$"
NOT_LOADED = (r"^t2d$", SECOND_NAME)  # tensors that a file may have and no module has

MOST_PACKED = 64  # numbers of a quantised weight in one that is stored


class CheckpointError(ValueError):
    """A checkpoint that cannot be a drafter as it stands: says which file, which tensor or key, and what was expected.

    Its message is one line without control characters, whatever names and values a checkpoint brings.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class StoredTensor(NamedTuple):
    """Where one tensor lies, and what it is; its values are not read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str | None  # by PyTorch's name; None: a packed type that no drafter is made of


def find_file(name_or_path: str, filename: str, **kwargs) -> Path | None:
    """The local path of one file of a folder or Hub repository, downloaded if need be; None if there is none."""
    if os.path.isdir(name_or_path):  # noqa: PTH112  a Path raises where a name is too long
        file = Path(name_or_path, kwargs.get("subfolder") or "", filename)
        return file if file.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        name_or_path,
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None},
    )
    return Path(found) if found is not None else None


def refuse_outside(*files: Path) -> None:
    """Raise unless `files`, and what a checkpoint has beside them, lie where they seem to.

    That is in their folders, or in the blobs that the cache of the Hub keeps for their repository.

    Raises:
        CheckpointError: One is a link to something else, which a stranger's folder has no business to read.
    """
    beside = {path for folder in {file.parent for file in files} for name in BESIDE for path in folder.glob(name)}
    for file in (*files, *sorted(beside)):
        real = file.resolve()
        repository = next((parent.parent for parent in file.absolute().parents if parent.name == "snapshots"), None)
        allowed = [file.parent.resolve(), *([repository.resolve() / "blobs"] if repository is not None else [])]
        if not any(real.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{file}: a link to {real}, outside the checkpoint's folder. Copy the file there if it belongs to it."
            )


def read_json_file(file: Path) -> Any:
    """What a JSON file of a checkpoint says.

    Raises:
        CheckpointError: It cannot be read, is no JSON, or has a key twice.
    """
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not JSON that says one thing ({error}). Download it again.") from error


def find_weight_files(
    name_or_path: str, *, variant: str | None = None, use_safetensors: bool | None = None, **kwargs
) -> list[Path]:
    """The weight files the host will read, in its own order of preference; empty if there are none.

    Raises:
        CheckpointError: An index names a shard that is not there, or is no index.
    """
    middle = f".{variant}" if variant else ""
    names = []
    if use_safetensors is not False:
        names += [f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"]
    if not use_safetensors:
        names += [f"pytorch_model{middle}.bin", f"pytorch_model.bin.index{middle}.json"]
    for name in names:
        file = find_file(name_or_path, name, **kwargs)
        if file is not None:
            return [file] if file.suffix != ".json" else _find_shards(name_or_path, file, **kwargs)
    return []


def _find_shards(name_or_path: str, index: Path, **kwargs) -> list[Path]:
    try:
        found = parse_json(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({error}). Download it again.") from error
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(
            f"{index}: not an index of shards. Expected JSON with a weight_map from tensor name to file name, got "
            f"{show(weight_map if isinstance(found, dict) else found)}."
        )
    if not isinstance(found.get("metadata"), dict):
        raise CheckpointError(
            f"{index}: metadata must be a table, if an empty one, got {show(found.get('metadata'))}."
        )
    shards = []
    for name in sorted(set(weight_map.values())):
        if not re.fullmatch(PLAIN_NAME, name) or not name.endswith((".safetensors", ".bin")):
            raise CheckpointError(
                f"{index}: weight_map names the shard {show(name)}. Expected the name of a .safetensors or .bin file beside "
                "the index."
            )
        if (file := find_file(name_or_path, name, **kwargs)) is None:
            raise CheckpointError(f"{index}: names the shard {name}, which is not there. Download it again.")
        shards.append(file)
    return shards


def list_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of `files` by name.

    Raises:
        CheckpointError: A file is damaged, is not what its name says, or repeats a tensor of another file.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, (shape, dtype) in _read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{file}: holds {name}, and so does {tensors[name].file.name}.")
            tensors[name] = StoredTensor(file, shape, dtype)
    return tensors


def read_tensor(tensor: StoredTensor, name: str) -> "Tensor":
    """The values of the tensor stored as `name`, on the CPU."""
    if tensor.file.suffix == ".safetensors":
        with safe_open(tensor.file, framework="pt") as file:
            return file.get_tensor(name)
    return _read_pickle(tensor.file)[name]


def to_our_names(stored: Mapping[str, StoredTensor], published_names: Mapping[str, str]) -> dict[str, str]:
    """The drafter's name of each stored tensor.

    Args:
        published_names: Regular expression -> replacement, applied in turn.

    Raises:
        CheckpointError: Two tensors are the same one of the drafter's.
    """
    by_ours: dict[str, str] = {}
    for name in stored:
        ours = name
        for pattern, replacement in published_names.items():
            ours = re.sub(pattern, replacement, ours)
        if ours in by_ours:
            raise CheckpointError(
                f"{stored[name].file}: {by_ours[ours]} and {name} are both {ours}. Remove the one that is wrong."
            )
        by_ours[ours] = name
    for second in [ours for ours in by_ours if re.match(SECOND_NAME, ours)]:
        first = second.replace("hidden_norm", "input_layernorm")
        if first not in by_ours:
            by_ours[first] = by_ours.pop(second)
            continue
        a, b = by_ours[first], by_ours[second]
        # Widened, since there is no comparison of some dtypes.
        if not read_tensor(stored[a], a).double().equal(read_tensor(stored[b], b).double()):
            raise CheckpointError(f"{stored[b].file}: {a} and {b} name the same norm, but their values differ.")
    return {name: ours for ours, name in by_ours.items()}


def refuse_misfits(config, stored: Mapping[str, StoredTensor], names: Mapping[str, str], where: str) -> None:
    """Raise unless the stored tensors are those of `config`: before any is made, so that no size can take the memory.

    Raises:
        CheckpointError: They are not; the message names tensors and sizes.
    """
    for name in ("num_hidden_layers", "num_aux_hidden_states"):  # modules are made of these, before any shape is known
        if getattr(config, name) > len(stored):
            raise CheckpointError(
                f"{where}: {name} is {getattr(config, name)} in config.json, and there are {len(stored)} tensors in all."
            )
    wanted = config.tensor_shapes()
    shapes = {ours: stored[name].shape for name, ours in names.items()}
    if (
        getattr(config, "quantization_config", None) is not None
    ):  # stored as the quantiser likes, which the host checks
        most = MOST_PACKED * sum(map(math.prod, shapes.values()))
        if (total := sum(map(math.prod, wanted.values()))) > most:
            raise CheckpointError(f"{where}: {total} numbers by config.json, and at most {most} in the file.")
        return
    if "mask_hidden" in wanted and shapes.get("mask_hidden") == wanted["mask_hidden"][-1:]:
        shapes["mask_hidden"] = wanted["mask_hidden"]  # stored without its two leading ones
    unexpected = [name for name in shapes.keys() - wanted.keys() if not any(re.match(p, name) for p in NOT_LOADED)]
    missing = wanted.keys() - shapes.keys()
    if "t2d" in shapes or config.draft_vocab_size == config.vocab_size:
        missing -= {"d2t"}
    both = shapes.keys() & wanted.keys()
    mismatched = [(name, shapes[name], wanted[name]) for name in both if shapes[name] != wanted[name]]
    by_our_name = {ours: f"{stored[name].file}: {name}" for name, ours in names.items()}
    problems = [*list_problems(missing, unexpected, mismatched, by_our_name, where).values()]
    if problems := problems + _check_dtypes(stored, names):
        raise CheckpointError("; ".join(problems) + ". config.json and the weights do not agree.")


def list_problems(missing, unexpected, mismatched, by_our_name: Mapping[str, str], where: str) -> dict[str, str]:
    """Tensor -> what is wrong with it, in words."""
    return {
        **{
            name: f"{by_our_name.get(name, f'{where}: {name}')} has shape {list(found)}, expected {list(wanted)}"
            for name, found, wanted in sorted(mismatched)
        },
        **{
            name: f"{by_our_name.get(name, f'{where}: {name}')} has no place in this drafter"
            for name in sorted(unexpected)
        },
        **{name: f"{where}: {name} is missing" for name in sorted(missing)},
    }


def _check_dtypes(stored: Mapping[str, StoredTensor], names: Mapping[str, str]) -> list[str]:
    """What is wrong with the dtypes of the stored tensors; the host would cast each to what it needs."""
    problems = []
    for name, (file, _, dtype) in stored.items():
        if names[name] == "d2t":
            wanted, fits = "int64 or int32", dtype in ("int64", "int32")
        elif names[name] == "t2d":
            wanted, fits = "bool", dtype in ("bool", "uint8", "int8", "int32", "int64")
        else:
            wanted, fits = "a float of 16 bits or more, since quantised drafters are not supported", dtype in FLOATS
        if not fits:
            problems.append(f"{file}: {name} has dtype {f'torch.{dtype}' if dtype else 'unknown'}, expected {wanted}")
    return problems


def _read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str | None]]:
    if file.suffix != ".safetensors":
        tensors = _read_pickle(file)
        return {name: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items()}
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
            return {name: (tuple(s.get_shape()), DTYPES.get(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}). Download it again; it is cut short or something else."
        ) from error


# What torch.load raises on a file that is cut short, is something else, or holds objects with code.
NOT_A_PICKLE = (
    *(pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError),
    *(AssertionError, ArithmeticError, MemoryError, NotImplementedError, struct.error, zipfile.BadZipFile),
)


def _read_pickle(file: Path) -> dict[str, "Tensor"]:
    import torch

    try:
        # Files of before torch 1.6 are no zip archives, and cannot be mapped.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except NOT_A_PICKLE as error:
        raise CheckpointError(
            f"{file}: not a pickle of plain tensors ({type(error).__name__}: {str(error)[:200]}). It is damaged, or "
            "holds objects that could run code and are not loaded."
        ) from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file}: expected a dict from names to tensors, got {type(tensors).__name__}.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{file}: expected a dict from names to tensors, got {type(tensor).__name__} for {show(name)}."
            )
        if lack := _find_lack(tensor):
            raise CheckpointError(
                f"{file}: {name} is {lack}. Expected a plain tensor with all its numbers in the file."
            )
    return tensors


def _find_lack(tensor: "Tensor") -> str | None:
    """What keeps a tensor from being its shape and its numbers; None if nothing does."""
    import torch

    kinds = {
        "a nested tensor": tensor.is_nested,
        "a meta tensor, a shape without numbers": tensor.is_meta,
        f"a tensor of layout {tensor.layout}": tensor.layout != torch.strided,
        "a quantised tensor": tensor.is_quantized,
        f"a {type(tensor).__name__}": type(tensor) not in (torch.Tensor, torch.nn.Parameter),
    }
    if found := next((kind for kind, is_so in kinds.items() if is_so), None):
        return found
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes > tensor.untyped_storage().nbytes():  # a view that repeats what is there would grow when loaded
        return f"{num_bytes} bytes by its shape {list(tensor.shape)}, of which the file holds {tensor.untyped_storage().nbytes()}"
    return None
