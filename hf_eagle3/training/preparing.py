"""The preparation of a training, before the host's Trainer begins: settings, models, rows, and the source of states."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import liger
from transformers.utils import logging

from ..checkpoints.convert import check_rope
from ..drafters.blocks import drafts_blocks
from ..drafters.kinds import find_kind
from ..host.refusals import is_drafter, refuse_compiled, refuse_other_models
from ..modeling import DrafterModel
from ..modeling.text_eagle3 import show
from ..tensor_parallel import find_peers, is_spread
from .arguments import Eagle3TrainingArguments
from .data.reading import RowReader
from .data.vocabulary import check_coverage, count_supervised_tokens, end_tokens
from .loading import (
    load_drafter,
    load_in_every_process,
    load_target,
    make_drafter,
    place_target,
    refuse_empty_models,
)
from .states.folder import fingerprint_weights
from .states.online import OnlineStates, StateSource
from .states.shared import SharedStates
from .states.stored import StoredStates
from .step.losses import LOSSES

logger = logging.get_logger(__name__)

# Arguments of the host's Trainer that a drafter's does not honour, and what to do instead.
UNHONOURED: Mapping[str, str] = {
    "data_collator": "rows become batches in one way, by documents and slots",
    "model_init": "give model, or none for a new drafter",
    "compute_loss_func": "choose a loss by loss_type",
    "preprocess_logits_for_metrics": "compute_metrics is given sums over the whole evaluation, and no logits",
}


class Prepared(NamedTuple):
    """The parts of a training, loaded and checked."""

    target: PreTrainedModel | None  # frozen, on its device; None where states come from elsewhere
    drafter: DrafterModel  # bound to its target
    source: StateSource
    target_fingerprint: str | None  # of the target's weights or of the stored states; None if there is none
    tokenizer: PreTrainedTokenizerBase | None
    reader: RowReader
    train_rows: Any  # by index, of any class; or None
    eval_rows: Any  # one set, several by name, or None


def prepare(
    args: Eagle3TrainingArguments,
    *,
    model: DrafterModel | str | None,
    target_model: PreTrainedModel | str | None,
    states: StateSource | None,
    train_dataset: Any,  # rows as they are given
    eval_dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    has_adapters: bool,
) -> Prepared:
    """Load, check and bring together the arguments of `Eagle3Trainer`."""
    if tokenizer is None and isinstance(target_model, str):
        tokenizer = AutoTokenizer.from_pretrained(target_model)
    target, given = load_models(args, model, target_model, has_adapters=has_adapters)
    bound_to: Any = target if states is None or target is not None else states.target
    reader = RowReader(
        tokenizer,
        vocab_size=bound_to.config.get_text_config(decoder=True).vocab_size,
        ends=end_tokens(bound_to),
        chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]  # a dict by now
        is_quiet=args.disable_tqdm or args.local_process_index > 0,
    )
    train_rows = reader.read(train_dataset, args.max_length)
    eval_rows = reader.read_sets(eval_dataset, args.eval_max_length or args.max_length)
    drafter = choose_drafter(given, bound_to, args, train_rows, tokenizer)
    fit_steps(args, drafter)
    target_fingerprint = find_fingerprint(target, states, drafter)
    drafter.bind(bound_to)
    if given is not None:
        name_target(drafter)
    source = run_online(bound_to, drafter, args) if states is None else states
    return Prepared(target, drafter, source, target_fingerprint, tokenizer, reader, train_rows, eval_rows)


def load_models(
    args: Eagle3TrainingArguments,
    model: DrafterModel | str | None,
    target_model: PreTrainedModel | str | None,
    *,
    has_adapters: bool,
) -> tuple[PreTrainedModel | None, DrafterModel | None]:
    """The target, frozen and placed, and the drafter if one is given; both loaded if they are names."""
    was_first_only = load_in_every_process()
    target = load_target(target_model, args.target_model_init_kwargs, args.device)  # type: ignore[arg-type]  # a dict by now
    drafter = load_drafter(model, args.model_init_kwargs)  # type: ignore[arg-type]  # a dict by now
    if was_first_only:
        given = {"model": model, "target_model": target_model}
        refuse_empty_models({n: m for n, m in given.items() if isinstance(m, PreTrainedModel) and not is_spread(m)})
    if drafter is not None:
        check_drafter(drafter, has_adapters)
    if target is not None:
        if is_drafter(target):
            raise ValueError(
                f"target_model {target.name_or_path} is an EAGLE-3 drafter. Give the model that it is to draft for, "
                "and the drafter as model (--drafter)."
            )
        refuse_compiled(target)
        place_target(target, args)
    return target, drafter


def choose_drafter(
    drafter: DrafterModel | None,
    bound_to: Any,  # a target, or its stand-in
    args: Eagle3TrainingArguments,
    rows: Any,  # by index, of any class; or None
    tokenizer: PreTrainedTokenizerBase | None,
) -> DrafterModel:
    """The given drafter, after a check of its coverage of `rows`; else a new one."""
    if drafter is None:
        return make_drafter(bound_to, args, rows, tokenizer)
    if rows is not None:
        vocab_size = bound_to.config.get_text_config(decoder=True).vocab_size
        counts, ids = count_supervised_tokens(rows, vocab_size), drafter.draft_to_target_ids.cpu()
        check_coverage(counts, ids, 0.0, "Train a new drafter on this data if that is too little")
    return drafter


def fit_steps(args: Eagle3TrainingArguments, drafter: DrafterModel) -> None:
    """Let the steps of a block drafter's training be the depths of its blocks.

    Raises:
        ValueError: Evaluation would draft deeper, or a loss is one over the steps of a chain.
    """
    if (depth := drafter.config.max_draft_depth) is None:
        return
    args.ttt_steps = depth
    if args.eval_depth > depth:
        raise ValueError(
            f"eval_depth is {args.eval_depth}, and blocks of {drafter.config.block_size} draft {depth} tokens."
        )
    if LOSSES[args.loss_type].weighs_steps:
        raise ValueError(
            f"loss_type {args.loss_type} is one over the steps of a chain, which blocks do not have: choose another, such "
            "as ce_tv."
        )


def name_target(drafter: DrafterModel) -> None:
    """Let the config of a given drafter name the target that it is trained for now, if that has a name on the Hub."""
    recorded, now = drafter.config.target_name_or_path, drafter.bound_target_name
    if now is not None:
        drafter.config.target_name_or_path = now
    elif recorded is not None:
        logger.warning(
            f"The drafter's config says that it is for {show(recorded)}, and the target has no name on the Hub. If it is "
            "another model, set trainer.model.config.target_name_or_path, which model cards quote."
        )


def find_fingerprint(target: PreTrainedModel | None, states: StateSource | None, drafter: DrafterModel) -> str | None:
    """The fingerprint of stored states, checked against target and drafter, or of the target's weights."""
    if isinstance(states, StoredStates):
        states.check(drafter)
        if target is not None:
            states.check_target(target)
        return states.fingerprint
    return None if target is None or is_spread(target) else fingerprint_weights(target)


def run_online(target: PreTrainedModel, drafter: DrafterModel, args: Eagle3TrainingArguments) -> StateSource:
    """The target in the loop, with our kernels or Liger's; shared where processes share it."""
    if args.use_liger_kernel:
        liger.apply_liger_kernel(target, args.liger_kernel_config)
    boundaries, use_kernels = drafter.bound_aux_layer_ids or (), not args.use_liger_kernel
    source = OnlineStates(target, boundaries, args.target_batch_tokens, use_kernels=use_kernels)
    peers = find_peers(target)
    return source if peers is None else SharedStates(source, peers)


def refuse_settings(args: Any, options: Mapping[str, Any]) -> None:  # Any: as given
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs and would use them all by DataParallel, which cannot train a drafter. "
            f"Start a process for each: accelerate launch --num_processes {args.n_gpu} {Path(sys.argv[0]).name} ...; or "
            "set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if not isinstance(args, Eagle3TrainingArguments):
        raise TypeError(
            f"args must be Eagle3TrainingArguments, which has the host's fields and those of TTT, got {type(args).__name__}."
        )
    args.refuse_unhonoured()
    if refused := [f"{name}: {UNHONOURED[name]}" for name in UNHONOURED if options.get(name) is not None]:
        raise ValueError(f"Eagle3Trainer does not take {'; '.join(refused)}. Leave that out.")


def check_drafter(drafter: Any, will_adapt: bool) -> None:  # Any: as given
    refuse_other_models(drafter, "model")
    if not will_adapt and not any(p.requires_grad for p in drafter.parameters()):
        raise ValueError(
            "No weight of this drafter trains, as in a folder of adapters that were loaded with it. Merge them "
            "(merge_and_unload of PEFT), or resume the run that made them, or give peft_config (--use_peft)."
        )
    is_block = drafts_blocks(drafter.config)
    if not find_kind(drafter.config).has_steps and not is_block:
        raise ValueError(
            f"mask_token_id={drafter.config.mask_token_id}: a P-EAGLE drafter has no later steps to unroll, and cannot be "
            "trained here."
        )
    if is_block and will_adapt:
        raise ValueError("A block drafter trains whole, without adapters: leave out peft_config (--use_peft).")
    if drafter.dtype != torch.float32:
        raise ValueError(
            f"Train the drafter in float32 (load it with dtype=torch.float32), got {drafter.dtype}: half precision "
            "rounds small updates away. Use bf16=True for fast arithmetic."
        )
    check_rope(drafter.config)
    if drafter.config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            "TTT needs an attention that takes its mask: load the drafter with attn_implementation='sdpa', got "
            f"{drafter.config._attn_implementation!r}."
        )
