"""`Eagle3TrainingArguments`: the host's training arguments, and those of training a drafter."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.utils import logging

from .step.losses import LOSSES

logger = logging.get_logger(__name__)

# What a new drafter can be, and the fields of its config that make it so.
VERSIONS: dict[str, dict[str, bool]] = {
    "3": {"fc_norm": False, "norm_output": False},
    "3.1": {"fc_norm": True, "norm_output": True},
    "dflash": {"drafts_from_root": False},
    "dspark": {"drafts_from_root": True, "has_confidence_head": True, "confidence_reads_markov": True},
}
BLOCK_VERSIONS = ("dflash", "dspark")
NORMS = ("fc_norm", "norm_output", "norm_before_fc")

# Fields of the host that training a drafter does not honour, with what to do instead; refused unless at their default.
REFUSED: Mapping[str, str] = {
    "label_smoothing_factor": "a drafter is taught the target's own distribution, which has no labels to smooth",
    "neftune_noise_alpha": "a drafter reads its target's embeddings, which stay as they are",
    "bf16_full_eval": "evaluation runs as training does: set bf16",
    "fp16_full_eval": "evaluation runs as training does: set fp16",
    "activation_checkpointing_kwargs": "what follows attention is recomputed, in one way",
    "gradient_checkpointing_kwargs": "what follows attention is recomputed, in one way",
    "use_cache": "training keeps no cache",
    "average_tokens_across_devices": "the loss is normed over the tokens of all processes",
    "prediction_loss_only": "evaluation measures acceptance; eval_generate_prompts=0 leaves out generating",
    "eval_do_concat_batches": "compute_metrics is given sums over the whole evaluation, and no predictions",
    "include_for_metrics": "compute_metrics is given sums over the whole evaluation, and no inputs",
    "batch_eval_metrics": "compute_metrics is called once, with sums over the whole evaluation",
    "label_names": "rows have input_ids and loss_mask, and no labels",
    "length_column_name": "lengths are counted from the rows",
    "remove_unused_columns": "the collator reads loss_mask, which no forward takes",
    "debug": "a loss or gradient that is no number is found and named without it",
    "do_predict": "a drafter has no predictions of its own; evaluate on rows instead (eval_dataset, --eval_file)",
    "deepspeed": "a drafter is trained with DDP or FSDP2",
    "parallelism_config": "rows are split over processes, and no row is",
}
# Refused before the host looks for the packages that they need.
WITH_PACKAGES = ("deepspeed", "parallelism_config")
NOT_REENTRANT = {"use_reentrant": False}  # how activations are recomputed, always
# The same of `accelerator_config`.
REFUSED_OF_ACCELERATE: Mapping[str, str] = {
    "split_batches": "per_device_train_batch_size is that of a process",
    "dispatch_batches": "each process makes its own batches, which cannot be sent as tensors",
}

AT_LEAST_ONE = (
    *("ttt_steps", "eval_depth", "eval_max_new_tokens", "max_length", "eval_max_length", "target_batch_tokens"),
    *("num_anchors", "markov_rank"),
)


@dataclass
class Eagle3TrainingArguments(TrainingArguments):
    """The host's training arguments, and those of TTT.

    Changed defaults: learning rate, schedule, warm-up, clipping, second beta; columns are left alone; DDP neither looks
    for unused parameters nor sends buffers around; a loss of NaN is not hidden from the log.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "chat_template_kwargs",
        "model_init_kwargs",
        "target_model_init_kwargs",
    ]

    ttt_steps: int = field(
        default=7,
        metadata={
            "help": "Draft steps unrolled in training (arXiv:2503.01840: 7); a block drafter has none, and trains whole blocks."
        },
    )
    loss_type: str = field(default="forward_kl", metadata={"help": f"How a step is taught: {', '.join(LOSSES)}."})
    ttt_decay: float = field(
        default=0.8,
        metadata={"help": "Step t weighs ttt_decay to the power t in the loss; ignored by losses that weigh steps."},
    )
    draft_vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens a new drafter can propose; by default 32000, of a dflash or dspark drafter all, by the target's "
            "own head. Ignored when a drafter is given."
        },
    )
    min_coverage: float = field(
        default=0.9,
        metadata={
            "help": "Refuse a new draft vocabulary that covers less of the supervised tokens than this share; of a drafter "
            "that is given, it is only said."
        },
    )
    drafter_version: str = field(
        default="3.1", metadata={"help": "What a new drafter is: 3.1 or 3, of EAGLE; dflash; or dspark."}
    )
    block_size: int = field(
        default=8,
        metadata={"help": "New dflash or dspark drafter: tokens of a block, the newest of the text included."},
    )
    mask_token_id: int | None = field(
        default=None,
        metadata={
            "help": "New dflash or dspark drafter: what a block has behind its root; by default a special token."
        },
    )
    markov_rank: int = field(default=256, metadata={"help": "New dspark drafter: rank of its Markov head."})
    num_anchors: int = field(
        default=512, metadata={"help": "Blocks of a batch that train, of a dflash or dspark drafter, drawn at random."}
    )
    aux_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "Boundaries of the target that a new drafter reads; by default three of them."}
    )
    fc_norm: bool | None = field(
        default=None,
        metadata={"help": "New drafter: norm each aux hidden state. By default, as drafter_version says."},
    )
    norm_output: bool | None = field(
        default=None, metadata={"help": "New drafter: feed back normed states. By default, as drafter_version says."}
    )
    norm_before_fc: bool | None = field(
        default=None, metadata={"help": "New drafter: one norm over all aux hidden states. By default not."}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Layers of a new drafter; by default 1."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "MLP width of a new drafter; by default the target's."}
    )
    max_length: int = field(default=2048, metadata={"help": "Longer training rows are cut on the right, in tokens."})
    packing: bool = field(
        default=False, metadata={"help": "Put several documents into one row of at most max_length tokens."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What the chat template is given for every row, such as enable_thinking; a dict or JSON."},
    )
    eval_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longer eval rows are cut to so many tokens; max_length if left out. What lies beyond max_length is "
            "reported apart, as eval_long_*."
        },
    )
    eval_depth: int | None = field(
        default=None,
        metadata={"help": "Draft depth K of the acceptance lengths; by default 3, or all of a block."},
    )
    eval_generate_prompts: int = field(
        default=16,
        metadata={
            "help": "eval_acceptance_length is measured by generating greedily from the prompts of so many eval rows; "
            "0 walks along the eval answers instead."
        },
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Longest answer generated in evaluation."})
    target_batch_tokens: int = field(default=16384, metadata={"help": "Most tokens of one target forward."})
    ema_decay: float = field(
        default=0.0, metadata={"help": "Evaluate and keep an exponential average of the weights; 0 for none."}
    )
    ignore_recipe_mismatch: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that was trained in another way."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Of from_pretrained, where the drafter is given by name; a dict or JSON."}
    )
    target_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Of from_pretrained, where the target is given by name; a dict or JSON."}
    )

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradient norm is clipped to this."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Updates between logs; below 1, a share of all."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave off: the collator reads the rows."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave off: it waits for the device each micro-batch, only to hide a NaN."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Leave off: every weight takes part in every step."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Leave off: a drafter's buffers do not change."}
    )

    def __post_init__(self) -> None:
        given: Any = self  # the host's fields, whose types are not read here
        if given.torch_compile or given.torch_compile_backend or given.torch_compile_mode:
            logger.warning(
                "torch_compile is ignored: a drafter's training compiles by itself what pays, and its forward is not "
                "one that could be compiled as a whole."
            )
            given.torch_compile, given.torch_compile_backend, given.torch_compile_mode = False, None, None
        chooses = given.load_best_model_at_end or given.save_strategy == "best"
        if chooses and given.metric_for_best_model is None:
            given.metric_for_best_model = "eval_acceptance_length"
        if given.include_num_input_tokens_seen == "non_padding":  # batches have none
            given.include_num_input_tokens_seen = "all"
        self.refuse_unhonoured(WITH_PACKAGES)
        super().__post_init__()
        self.refuse_unhonoured()
        for name in AT_LEAST_ONE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.eval_generate_prompts < 0:
            raise ValueError(f"eval_generate_prompts must be at least 0, got {self.eval_generate_prompts}.")
        if not 0 < self.ttt_decay <= 1:
            raise ValueError(f"ttt_decay must lie in (0, 1], got {self.ttt_decay}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}; 0 keeps no average.")
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"min_coverage is a share and must lie in [0, 1], got {self.min_coverage}.")
        for name, table in (("loss_type", LOSSES), ("drafter_version", VERSIONS)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}; got {getattr(self, name)!r}.")

    def refuse_unhonoured(self, names: Iterable[str] = REFUSED) -> None:
        """Raise ValueError if a field is set that training a drafter does not honour; the message names the alternative."""
        fields = self.__dataclass_fields__
        reasons = [
            f"{name}={value!r}: {REFUSED[name]}"
            for name in names
            if name in fields and not _is_default(value := getattr(self, name), fields[name])
        ]
        for name, why in REFUSED_OF_ACCELERATE.items():
            if is_set := getattr(self.accelerator_config, name, None):
                reasons.append(f"accelerator_config {name}={is_set!r}: {why}")
        if reasons:
            raise ValueError(f"Training a drafter does not honour {'; '.join(reasons)}. Leave that out.")

    def drafter_fields(self) -> dict[str, Any]:
        """Fields of a new drafter's config that these arguments set.

        Raises:
            ValueError: One is set that drafters of this version do not have.
        """
        given = [name for name in NORMS if getattr(self, name) is not None]
        if self.makes_blocks and given:
            raise ValueError(f"A {self.drafter_version} drafter has no {', '.join(given)}: leave that out.")
        fields: dict[str, Any] = dict(VERSIONS[self.drafter_version])
        if self.makes_blocks:
            fields["block_size"] = self.block_size
            if self.drafter_version == "dspark":
                fields["markov_rank"] = self.markov_rank
            names: tuple[str, ...] = ("mask_token_id", "aux_layer_ids", "num_hidden_layers", "intermediate_size")
            return fields | {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.norm_before_fc:  # in place of a norm for each state
            fields["fc_norm"] = False
        if self.aux_layer_ids is not None:
            fields["num_aux_hidden_states"] = len(self.aux_layer_ids)
        names = (*NORMS, "aux_layer_ids", "num_hidden_layers", "intermediate_size")
        return fields | {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def makes_blocks(self) -> bool:
        """Whether a new drafter drafts in blocks."""
        return self.drafter_version in BLOCK_VERSIONS

    @property
    def recomputes_activations(self) -> bool:
        """Whether activations are recomputed: the host's activation checkpointing, gradient checkpointing up to 5.22."""
        name = "activation_checkpointing" if hasattr(self, "activation_checkpointing") else "gradient_checkpointing"
        return bool(getattr(self, name))


def _is_default(value: Any, field: Field) -> bool:
    """Whether `value` is equivalent to the default of `field`; all empty values are."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return value in (default, NOT_REENTRANT) or (not value and not default)
