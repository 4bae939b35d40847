"""The stand-in for a target whose states are stored: its config, embeddings and head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ...modeling.text_eagle3 import show
from ...modeling.weights_eagle3 import refuse_outside
from .folder import AGAIN, HEAD, MANIFEST, WRITE, StoredStatesError, is_count


class StoredTarget(nn.Module):
    """A target whose states are stored, as far as training needs it: config, embeddings and head. It cannot run."""

    def __init__(self, config: PreTrainedConfig, eos_token_id: int | list[int] | None, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig(eos_token_id=eos_token_id)
        embeddings = tensors["embed_tokens.weight"]
        self.embed_tokens = nn.Embedding(embeddings.shape[0], embeddings.shape[1], device="meta")
        self.embed_tokens.weight = nn.Parameter(embeddings, requires_grad=False)
        head, bias = tensors.get("lm_head.weight"), tensors.get("lm_head.bias")
        rows, width = (embeddings if head is None else head).shape
        self.lm_head = nn.Linear(width, rows, bias=bias is not None, device="meta")
        self.lm_head.weight = self.embed_tokens.weight if head is None else nn.Parameter(head, requires_grad=False)
        if bias is not None:
            self.lm_head.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return self.embed_tokens.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """The target's token embeddings."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The target's head."""
        return self.lm_head

    def forward(self, *_: Any, **__: Any) -> None:  # the arguments of a target
        """There are no layers.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "This is the head of a target whose states are stored; it cannot run. Load the target to let it speak."
        )


def head_tensors(target: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of `target` that a `StoredTarget` is made of: its embeddings, and its head if that is another weight."""
    embeddings, head = target.get_input_embeddings().weight.detach(), target.get_output_embeddings()
    if embeddings.is_meta:
        raise ValueError(
            "The target's embeddings are offloaded (device 'meta') and cannot be stored. Load it with them on a device."
        )
    tensors = {"embed_tokens.weight": embeddings}
    if isinstance(head, nn.Linear):
        if head.weight.data_ptr() != embeddings.data_ptr():
            tensors["lm_head.weight"] = head.weight.detach()
        if head.bias is not None:
            tensors["lm_head.bias"] = head.bias.detach()
    return tensors


def load_stored_target(folder: Path, manifest: Mapping[str, Any]) -> PreTrainedModel:
    """The stand-in for the target of the states in `folder`.

    Raises:
        StoredStatesError: The manifest has no config of a target, or the head cannot be read.
    """
    config, facts = make_config(folder, manifest), manifest["target"]
    path = folder / HEAD
    try:
        refuse_outside(path)
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoredStatesError(f"{path} cannot be read ({error}). Delete it and {AGAIN}.") from error
    check_head(path, tensors, config.vocab_size, manifest.get("last_size", manifest["hidden_size"]))
    return StoredTarget(config, facts["eos_token_id"], tensors)


def make_config(folder: Path, manifest: Mapping[str, Any]) -> PreTrainedConfig:
    """The target's config, from the fields in the manifest."""
    facts = manifest["target"]
    fields = dict(facts["config"])
    model_type = fields.pop("model_type")
    try:
        if model_type in CONFIG_MAPPING:
            config = AutoConfig.for_model(model_type, **fields)
        else:  # a config of remote code; only its fields are read
            config = PreTrainedConfig(**fields)
            config.model_type = model_type
        sizes = (config.vocab_size, config.hidden_size)
        if not all(is_count(size) and size > 0 for size in (*sizes, config.num_hidden_layers)):
            raise ValueError(f"vocab_size and hidden_size are {show(sizes)}, expected sizes")
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise StoredStatesError(
            f"{folder / MANIFEST} is damaged: target.config is no config of a target ({error}). Delete the folder and "
            f"{WRITE}."
        ) from error
    config.name_or_path = facts["name"] or ""
    return config


def check_head(path: Path, tensors: Mapping[str, Tensor], vocab_size: int, hidden_size: int) -> None:
    """Raise unless `tensors` are a target's embeddings and head.

    Raises:
        StoredStatesError: They are not; the message names the tensor.
    """
    dims = {"embed_tokens.weight": 2, "lm_head.weight": 2, "lm_head.bias": 1}
    for name, tensor in tensors.items():
        is_right = tensor.dim() == dims.get(name) and tensor.is_floating_point() and len(tensor) >= vocab_size
        if not is_right or (name == "lm_head.weight" and tensor.shape[1] != hidden_size):
            raise StoredStatesError(
                f"{path} is damaged: {show(name)} is {tensor.dtype} {list(tensor.shape)}, expected the embeddings or head of a "
                f"vocabulary of {vocab_size} and states of {hidden_size}. Delete it and {AGAIN}."
            )
    if "embed_tokens.weight" not in tensors:
        raise StoredStatesError(f"{path} is damaged: embed_tokens.weight is missing. Delete it and {AGAIN}.")
    rows = {name: len(tensor) for name, tensor in tensors.items() if name.startswith("lm_head.")}
    if len(set(rows.values())) > 1:
        raise StoredStatesError(f"{path} is damaged: its tensors differ in rows, {rows}. Delete it and {AGAIN}.")
