"""Models for the trainer: by name or as they are, new drafters, adapters."""

import functools
import os
import warnings
from typing import Any

import torch
from accelerate.utils import gather_object, str_to_bool
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from ..checkpoints.card import Adapters
from ..console.opening import opening
from ..modeling import DrafterModel
from ..modeling.fields_eagle3 import default_boundaries
from ..tensor_parallel import find_peers, is_spread, is_spread_further
from .arguments import Eagle3TrainingArguments
from .data.vocabulary import choose_draft_vocabulary, count_supervised_tokens, end_tokens, find_special_tokens
from .new_drafter import new_block_drafter, new_drafter
from .states.folder import fingerprint_weights

# A setting of accelerate that `from_pretrained` reads: in Transformers 5.17 all processes but the first then get zeros.
EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
DRAFT_VOCAB_SIZE = 32000  # of a new drafter whose arguments name none


def load_in_every_process() -> bool:
    """Let each process load its models whole from now on. Returns whether the first alone was to load them.

    Each process runs its own target, and shards a drafter that it has whole.
    """
    was_first_only = bool(str_to_bool(os.environ.get(EFFICIENT_LOADING, "false")))
    if was_first_only:
        os.environ[EFFICIENT_LOADING] = "false"
    return was_first_only


def refuse_empty_models(models: dict[str, PreTrainedModel]) -> None:
    """Compare models that were loaded before over all processes. All must call.

    Raises:
        ValueError: They differ.
    """
    for name, model in models.items():
        if len(set(gather_object([fingerprint_weights(model)]))) > 1:
            raise ValueError(
                f"{name} was loaded in the first process only (fsdp_cpu_ram_efficient_loading), and each process needs "
                f"it: give {name} by name, or set that to false."
            )


def load_target(target: Any, options: dict[str, Any] | None, device: torch.device) -> Any:  # a model, a name or None
    """`target`, loaded to `device` with `options` if it is a name; by tensor parallelism, a part in each process."""
    _refuse_options("target_model", target, options)
    if not isinstance(target, str):
        return target
    options = dict(options or {})
    split = {name: options.pop(name) for name in ("tp_plan", "tp_size") if name in options}
    if split:
        options["distributed_config"] = DistributedConfig(**split)
    # Few CPUs have fast half precision.
    defaults: dict[str, Any] = {"dtype": torch.float32 if device.type == "cpu" else "auto"}
    if device.type != "cpu" and "distributed_config" not in options:  # a quantised model cannot be moved later
        defaults["device_map"] = {"": device}
    with opening("target_model", target):
        return AutoModelForCausalLM.from_pretrained(target, **{**defaults, **options})


def load_drafter(drafter: Any, options: dict[str, Any] | None) -> Any:  # a model, a name or None
    """`drafter`, loaded in float32 with `options` if it is a name."""
    _refuse_options("model", drafter, options)
    if not isinstance(drafter, str):
        return drafter
    with opening("model", drafter):
        return AutoModel.from_pretrained(drafter, **{"dtype": torch.float32, **(options or {})})


def _refuse_options(name: str, model: Any, options: dict[str, Any] | None) -> None:
    if options and not isinstance(model, str):
        raise ValueError(
            f"{name}_init_kwargs {options} say how to load {name}, which is {'None' if model is None else 'loaded already'}."
            f" Give {name} by name, or leave them out."
        )


def make_drafter(
    target: Any, args: Eagle3TrainingArguments, rows: Any, tokenizer: PreTrainedTokenizerBase | None
) -> DrafterModel:
    """A new drafter for `target`: the most frequent supervised tokens of `rows`, and special ones, as its vocabulary."""
    if rows is None:
        raise ValueError("Eagle3Trainer needs train_dataset to choose a new drafter's vocabulary, or a drafter.")
    theirs = target.config.get_text_config(decoder=True)
    n, vocab_size = theirs.num_hidden_layers, theirs.vocab_size
    if not args.makes_blocks and args.aux_layer_ids is None and (n < 3 or len(set(default_boundaries(n))) < 3):
        raise ValueError(
            f"The target has {n} layers, too few to choose the three boundaries that a new drafter reads. Name them: "
            f"aux_layer_ids (--aux_layer_ids), each 0 to {n}, such as 1 {n // 2} {n - 1}."
        )
    counts = count_supervised_tokens(rows, vocab_size)
    always = end_tokens(target) + ([] if tokenizer is None else find_special_tokens(counts, tokenizer))
    fields, size = args.drafter_fields(), args.draft_vocab_size
    if args.makes_blocks and (size is None or size >= vocab_size):
        return new_block_drafter(target, tokenizer, **fields)
    size = min(DRAFT_VOCAB_SIZE if size is None else size, vocab_size)
    ids = choose_draft_vocabulary(counts, size, always=always, min_coverage=args.min_coverage)
    if args.makes_blocks:
        return new_block_drafter(target, tokenizer, draft_vocabulary=ids, **fields)
    return new_drafter(target, ids, **fields)


def place_target(target: PreTrainedModel, args: Eagle3TrainingArguments) -> None:
    """Freeze `target`, and move it to this process's device unless it was placed when it was loaded.

    Raises:
        ValueError: Several processes would share its devices, or share it otherwise than by tensor parallelism.
    """
    target.eval().requires_grad_(False)
    if is_spread(target):
        peers = find_peers(target)
        if peers is None or is_spread_further(target, peers):
            raise ValueError(
                "Processes have shards of the target otherwise than by tensor parallelism (FSDP?), and would wait for one "
                "another. Load it with tp_plan='auto' (--target_tp), or whole in each process."
            )
        return
    devices = set((getattr(target, "hf_device_map", None) or {}).values())
    if args.world_size > 1 and len(devices) > 1:
        raise ValueError(
            f"The target lies on the devices {sorted(map(str, devices))}, and each of {args.world_size} processes would "
            "put it there. Start one process (python ...), load the target on one device in each, or "
            "split it by tensor parallelism (tp_plan='auto', --target_tp)."
        )
    if not devices and not getattr(target, "is_quantized", False):
        target.to(args.device)


def adapt(drafter: DrafterModel, peft_config: Any) -> Any:  # of PEFT, which is optional
    """`drafter` with adapters of `peft_config`, which alone train.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs PEFT: pip install 'hf-eagle3[peft]'.") from error
    if peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"
    with warnings.catch_warnings():  # PEFT 0.21 reads a name that is deprecated from Transformers 5.23 on
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = get_peft_model(drafter, peft_config)
    # By default PEFT asks whether the vocabulary has grown, and for that reads the config that the drafter was published
    # with as one of ours. It never grows.
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def describe_adapters(model: Any, drafter: DrafterModel) -> Adapters | None:  # the drafter, or a model of PEFT
    """The adapters around `drafter` that train; None if it trains itself."""
    if model is drafter:
        return None
    kind = model.peft_config[model.active_adapter].peft_type.value
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Adapters(kind, count, drafter.name_or_path or None)
