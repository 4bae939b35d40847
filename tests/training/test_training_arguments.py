"""Each argument that the host's Trainer takes is honoured, does nothing for a reason, or is refused in words."""

import dataclasses

import pytest
import torch
from helpers.training import TINY, make_args, make_drafter, progressions
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_eagle3 import Eagle3Trainer, cli
from hf_eagle3.training.arguments import REFUSED, REFUSED_OF_ACCELERATE
from hf_eagle3.training.preparing import UNHONOURED

HONOURED = {
    # the optimizer and its schedule
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    # how much at once, and how precisely
    *("per_device_train_batch_size", "num_train_epochs", "max_steps", "gradient_accumulation_steps"),
    *("auto_find_batch_size", "bf16", "fp16", "tf32", "activation_checkpointing", "gradient_checkpointing"),
    *("use_liger_kernel", "liger_kernel_config", "torch_empty_cache_steps", "use_cpu", "full_determinism", "seed"),
    *("data_seed", "train_sampling_strategy", "ignore_data_skip"),
    # what is said
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics"),
    # evaluation and checkpoints
    *("output_dir", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "save_only_model"),
    *("enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("restore_callback_states_from_checkpoint",),
    # the Hub
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    "hub_revision",
    # loading, and several processes
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    *("accelerator_config", "fsdp", "fsdp_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"),
    *("ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"),
}
INERT = {
    "do_train": "the script trains, and so does train()",
    "do_eval": "eval_strategy and --eval_file say whether to evaluate",
    "resume_from_checkpoint": "as the host says, the script reads it; train() has an argument",
    "local_rank": "the host reads the environment instead",
    "eval_accumulation_steps": "evaluation gathers sums alone, so nothing accumulates",
    "eval_use_gather_object": "evaluation gathers sums alone, which are tensors",
    "torch_compile": "said in a warning: what pays is compiled anyway",
    "torch_compile_backend": "as torch_compile",
    "torch_compile_mode": "as torch_compile",
}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
# What a field is set to whose default is None or empty.
OTHERS = {
    "neftune_noise_alpha": 5.0,
    "activation_checkpointing_kwargs": {"every_n_layers": 2},
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "length_column_name": "n",
    "debug": "underflow_overflow",
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "parallelism_config": object(),
}


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows():
    lengths = [12 + i % 7 for i in range(12)]
    return [
        {"input_ids": ids[:n].tolist(), "loss_mask": [0] * 6 + [1] * (n - 6)}
        for ids, n in zip(progressions(12, 20, seed=7), lengths, strict=True)
    ]


def test_every_field_of_the_host_has_its_place():
    """A field that a new host adds fails here, until somebody has looked at what it does for a drafter."""
    places = [HONOURED, INERT.keys(), REFUSED.keys()]
    assert FIELDS.keys() <= set().union(*places), "fields without a place"
    assert sum(map(len, places)) == len(set().union(*places)), "fields with two"
    unknown = set().union(*places) - FIELDS.keys()
    assert unknown <= {"activation_checkpointing", "activation_checkpointing_kwargs"}  # Transformers 5.23 on


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_kwargs. is deprecated:FutureWarning")  # the host's
@pytest.mark.parametrize("name", sorted(REFUSED.keys() & FIELDS.keys()))
def test_what_is_not_honoured_is_refused_in_words(tmp_path, name):
    default = make_args(tmp_path).__dataclass_fields__[name].default
    other = OTHERS.get(name, not default if isinstance(default, bool) else 0.1)
    with pytest.raises(ValueError, match=rf"does not honour .*{name}=.*: {REFUSED[name][:20]}.*Leave that out"):
        make_args(tmp_path, **{name: other})


@pytest.mark.parametrize("name", REFUSED_OF_ACCELERATE)
def test_of_accelerate_too(tmp_path, name):
    with pytest.raises(ValueError, match=f"does not honour accelerator_config {name}=True"):
        make_args(tmp_path, accelerator_config={name: True})


def test_defaults_that_are_said_are_no_reason_to_refuse(tmp_path):
    said = {name: FIELDS[name].default for name in REFUSED.keys() & FIELDS.keys() if name != "include_for_metrics"}
    said |= {"remove_unused_columns": False, "gradient_checkpointing_kwargs": None}
    make_args(tmp_path, **said)
    checkpointing = next(name for name in REFUSED if name in FIELDS and name.endswith("checkpointing_kwargs"))
    make_args(tmp_path, **{checkpointing: {"use_reentrant": False}})  # which is what is done


def test_a_field_that_is_set_later_is_refused_by_the_trainer(target, rows, tmp_path):
    args = make_args(tmp_path)
    args.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1"):
        Eagle3Trainer(target_model=target, args=args, train_dataset=rows)


def test_the_command_line_says_so_in_a_line(tmp_path, capsys):
    arguments = [
        "train",
        "--target_model_name_or_path",
        "x",
        "--train_file",
        "y",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert cli.main([*arguments, "--neftune_noise_alpha", "5"]) == 2
    assert "neftune_noise_alpha=5.0: a drafter reads its target's embeddings" in capsys.readouterr().err


@pytest.mark.parametrize("name", UNHONOURED)
def test_what_the_hosts_trainer_takes_and_ours_does_not(target, rows, tmp_path, name):
    with pytest.raises(ValueError, match=f"Eagle3Trainer does not take {name}: "):
        Eagle3Trainer(target_model=target, args=make_args(tmp_path), train_dataset=rows, **{name: object()})


def test_the_hosts_own_arguments_are_refused(target, rows, tmp_path):
    with pytest.raises(TypeError, match=r"args must be Eagle3TrainingArguments.*got TrainingArguments"):
        Eagle3Trainer(target_model=target, args=TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=rows)


def test_there_is_nothing_to_predict(target, rows, tmp_path):
    trainer = Eagle3Trainer(target_model=target, args=make_args(tmp_path), train_dataset=rows)
    with pytest.raises(ValueError, match=r"trainer.evaluate\(rows\)"):
        trainer.predict(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"include_num_input_tokens_seen": "non_padding"},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_accumulation_steps": 1, "eval_on_start": True},
        {"logging_first_step": True, "skip_memory_metrics": False, "torch_empty_cache_steps": 1},
        {"dataloader_drop_last": True, "optim": "adafactor", "lr_scheduler_type": "linear"},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_what_is_honoured_runs(target, rows, tmp_path, changes):
    args = make_args(tmp_path, max_steps=1, eval_generate_prompts=0, **changes)
    trainer = Eagle3Trainer(make_drafter(target), target, args, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    if "include_num_input_tokens_seen" in changes:  # none of them is padding, whatever the pad token
        assert trainer.state.num_input_tokens_seen > 8 * 12


@pytest.mark.slow
def test_a_batch_size_that_fits_is_found(target, rows, tmp_path):
    args = make_args(tmp_path, max_steps=2, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer = Eagle3Trainer(make_drafter(target), target, args, train_dataset=rows)
    sizes = []

    def hook(batch):
        sizes.append(len(batch.lengths))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return states(batch)

    states, trainer._source.states = trainer._source.states, hook
    trainer.train()
    assert sizes[0] == 8
    assert sizes[-2:] == [sizes[-1]] * 2
    assert trainer.state.global_step == 2
