"""One of several processes that train; started by `test_distributed_training.py`, not a test by itself."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_eagle3 import Eagle3Trainer, Eagle3TrainingArguments
from hf_eagle3.training import new_drafter
from hf_eagle3.training.distributed import number_targets
from hf_eagle3.training.new_drafter import new_block_drafter
from hf_eagle3.training.states.shared import SharedStates

V = 48
LONG = {"max_steps": 20, "save_strategy": "no"}
FSDP = {"version": 2, "auto_wrap_policy": "NO_WRAP"}


class Rows(Dataset):
    """Rows as they are, also those that teach nothing."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class CpuTrainer(Eagle3Trainer):
    """Lets accelerate take CPUs for GPUs: it has FSDP2 for accelerators only, PyTorch has it for CPUs as well."""

    def create_accelerator_and_postprocess(self):
        if self.args.fsdp and self.args.use_cpu:
            AcceleratorState._reset_state()
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def make_target():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, vocab_size=V, num_hidden_layers=8, initializer_range=0.3, eos_token_id=None, bos_token_id=None
    )
    return LlamaForCausalLM(config).eval()


def make_rows(count, silent=()):
    """Rows of 10 to 15 tokens, generated from the fifth on; of those in `silent`, nothing is."""
    generator = torch.Generator().manual_seed(1)
    lengths = [10 + i % 6 for i in range(count)]
    ids = [torch.randint(0, V, (n,), generator=generator).numpy() for n in lengths]
    masks = [torch.arange(n).numpy() >= (99 if i in silent else 4) for i, n in enumerate(lengths)]
    return Rows([{"input_ids": i, "loss_mask": m} for i, m in zip(ids, masks, strict=True)])


def make_uneven_rows():
    """Rows of which one process's take many forwards of the target, and the other's few."""
    rows = make_rows(40).rows
    short = {"input_ids": rows[0]["input_ids"][:7], "loss_mask": rows[0]["loss_mask"][:7]}
    return Rows([row if i // 4 % 2 else short for i, row in enumerate(rows)])


def make_drafter(target):
    torch.manual_seed(5)
    return new_drafter(target, torch.arange(2, 42))


def make_block_drafter(target):
    torch.manual_seed(5)
    sizes = {"block_size": 4, "num_hidden_layers": 2, "markov_rank": 4, "initializer_range": 0.3}
    heads = {"drafts_from_root": True, "has_confidence_head": True, "confidence_reads_markov": True}
    return new_block_drafter(target, **sizes, **heads)


def make_trainer(folder, rows=None, lora=None, target_dtype=torch.float32, target=None, drafter=None, **changes):
    """A trainer whose runs can be compared: rows in order, an optimizer that forgives no wrong scale."""
    target = make_target().to(target_dtype) if target is None else target
    drafter = make_drafter(target) if drafter is None else drafter
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "ttt_steps": 3,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "adam_epsilon": 1e-2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_generate_prompts": 3,
        "eval_max_new_tokens": 8,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = Eagle3TrainingArguments(**{**settings, **changes})
    eval_rows = make_rows(7)
    peft_config = None
    if lora is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(r=lora, target_modules=["q_proj", "down_proj", "lm_head"])
    return CpuTrainer(
        model=drafter,
        peft_config=peft_config,
        target_model=target,
        args=args,
        train_dataset=make_rows(40) if rows is None else rows,
        eval_dataset=eval_rows,
    )


def curve(trainer):
    """What was logged at each update, without the clock's."""
    names = ("loss", "grad_norm", "learning_rate", "loss_2", "accuracy_0")
    return [{name: log[name] for name in names} for log in trainer.state.log_history if "loss" in log]


def evaluate(trainer):
    metrics = trainer.evaluate()
    return {name: value for name, value in metrics.items() if "per_second" not in name and "runtime" not in name}


def run(name, folder, resume=None, **changes):
    """Train, evaluate, save; the first process writes down what came out."""
    if "fsdp_config" in changes:
        changes["fsdp_config"] = dict(changes["fsdp_config"])  # the host takes entries out
    trainer = make_trainer(folder / name, **changes)
    trainer.train(resume_from_checkpoint=resume)
    result = {"curve": curve(trainer), "metrics": evaluate(trainer), "step": trainer.state.global_step}
    trainer.save_model()
    if trainer.is_world_process_zero():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return trainer


ON_GPUS = {"use_cpu": False, "eval_strategy": "steps", "eval_steps": 2}


def main_on_gpus(folder):
    """The same on the GPUs that are there, one or more; in float32 and with bf16 arithmetic and target."""
    world = int(os.environ["WORLD_SIZE"])

    def run_afresh(name, **changes):
        AcceleratorState._reset_state()
        run(name, folder, per_device_train_batch_size=8 // world, **ON_GPUS, **changes)

    half = {"bf16": True, "target_dtype": torch.bfloat16}
    if world == 1:
        run_afresh("one")
        run_afresh("one_bf16", **half)
        make_target().save_pretrained(folder / "target")
        return
    begun = str(folder / "one" / "checkpoint-2")
    sharded = {"fsdp": True, "fsdp_config": FSDP}
    for way, more in {
        "ddp": {},
        "fsdp": sharded,
    }.items():  # accelerate remembers FSDP in the environment, so it is last
        run_afresh(way, **more)
        run_afresh(f"{way}_bf16", **half, **more)
        run_afresh(f"{way}_resumed", resume=begun, **more)
        run_afresh({"ddp": "tp", "fsdp": "tp_fsdp"}[way], target=load_split(folder), **more)


def go_on_on_a_gpu(folder):
    """One process, with what two began."""
    for name in ("ddp", "fsdp", "tp"):
        AcceleratorState._reset_state()
        begun = str(folder / name / "checkpoint-2")
        run(f"{name}_gone_on", folder, resume=begun, per_device_train_batch_size=8, **ON_GPUS)


def main_on_cpus(folder):
    torch.set_num_threads(1)
    two = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    run("ddp", folder, **two)
    run("ddp_accumulated", folder, **{**two, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    run("ddp_resumed", folder, resume=str(folder / "one" / "checkpoint-2"), **two)
    run("ddp_moved", folder, resume=str(folder / "small" / "checkpoint-2"), **two)
    silent = set(range(1, 40, 2))  # each second row, so one process has nothing to learn from
    quiet = {**two, "per_device_train_batch_size": 1, "max_steps": 2, "save_strategy": "no"}
    run("ddp_silent", folder, rows=make_rows(40, silent), **quiet)
    averaged = {"ema_decay": 0.5, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    averaged["metric_for_best_model"] = "eval_loss"
    run("ddp_average", folder, **two, **averaged)
    run("ddp_hybrid", folder, loss_type="lk_hybrid", **two)

    run("ddp_long", folder, **LONG, **two)

    if importlib.util.find_spec("peft") is not None:
        run("ddp_adapted", folder, lora=4, **two)

    sharded = {**two, "fsdp": True}
    trainer = run("fsdp", folder, fsdp_config=FSDP, **sharded)
    assert type(trainer.model.fc.weight).__name__ == "DTensor"
    run("fsdp_by_layer", folder, fsdp_config={**FSDP, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}, **sharded)
    run("fsdp_resumed", folder, resume=str(folder / "one" / "checkpoint-2"), fsdp_config=FSDP, **sharded)
    efficient = {**FSDP, "cpu_ram_efficient_loading": True}
    names = {"target": str(folder / "target"), "drafter": str(folder / "drafter")}
    run("fsdp_efficient", folder, fsdp_config=efficient, **names, **sharded)
    refuse_empty(folder, efficient, sharded)
    run("fsdp_silent", folder, rows=make_rows(40, silent), **{**quiet, "fsdp": True, "fsdp_config": FSDP})
    run("fsdp_average", folder, fsdp_config=FSDP, **sharded, **averaged)
    run_split(folder, two, sharded)
    run("fsdp_bf16", folder, fsdp_config=FSDP, bf16=True, **sharded)
    run("fsdp_long", folder, fsdp_config=FSDP, **LONG, **sharded)


def refuse_empty(folder, efficient, sharded):
    """Models that were loaded in the first process only, before there was a trainer."""
    for name in ("target", "drafter"):
        target = make_target()
        given = {"target": target, "drafter": make_drafter(target)}
        if not PartialState().is_main_process:
            with torch.no_grad():
                [weight.zero_() for weight in given[name].parameters()]
        try:
            make_trainer(folder / "refused", fsdp_config=dict(efficient), **given, **sharded)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        if PartialState().is_main_process:
            (folder / f"refused_{name}.json").write_text(json.dumps(said))


def main_of_blocks(folder):
    """A drafter of blocks, replicated and sharded, and where one process has nothing to learn from."""
    torch.set_num_threads(1)
    silent = make_rows(40, set(range(1, 40, 2)))
    two = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    by_layer = {**FSDP, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    ways = {"ddp": {}, "fsdp": {"fsdp": True, "fsdp_config": FSDP}}
    ways["fsdp_by_layer"] = {"fsdp": True, "fsdp_config": by_layer}
    for way, more in ways.items():
        run(f"{way}_blocks", folder, drafter=make_block_drafter(make_target()), loss_type="ce_tv", **two, **more)
        quiet = {**two, "per_device_train_batch_size": 1, "max_steps": 2, "save_strategy": "no"}
        run(f"{way}_blocks_silent", folder, rows=silent, drafter=make_block_drafter(make_target()), **quiet, **more)


def main_with_two_targets(folder):
    """Four processes, of which each two share a target."""
    torch.set_num_threads(1)
    config = DistributedConfig(tp_size=2, dp_replicate_size=2)
    target = AutoModelForCausalLM.from_pretrained(folder / "target", distributed_config=config)
    trainer = run("tp_of_four", folder, target=target, per_device_train_batch_size=2, ddp_backend="gloo")
    rank = trainer.accelerator.process_index
    assert number_targets(target, trainer.accelerator) == (rank // 2, 2)


def load_split(folder):
    """The target, of which each process has a part."""
    config = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder / "target", distributed_config=config)


def run_split(folder, two, sharded):
    """With a target that the processes share."""
    trainer = run("tp", folder, target=load_split(folder), **two)
    assert isinstance(trainer._source, SharedStates)
    weight = trainer.target_model.model.layers[0].self_attn.q_proj.weight
    assert weight.to_local().shape[0] == weight.shape[0] // 2
    run("tp_uneven", folder, target=load_split(folder), rows=make_uneven_rows(), **two, target_batch_tokens=40)
    run("tp_resumed", folder, target=load_split(folder), resume=str(folder / "one" / "checkpoint-2"), **two)
    run("tp_fsdp", folder, target=load_split(folder), fsdp_config=FSDP, **sharded)


if __name__ == "__main__":
    logging.set_verbosity_error()
    mains = {"gpu": main_on_gpus, "gpu again": go_on_on_a_gpu, "two targets": main_with_two_targets}
    mains["blocks"] = main_of_blocks
    main = mains.get(" ".join(sys.argv[2:]), main_on_cpus)
    main(Path(sys.argv[1]))
    torch.distributed.barrier()  # a group that one process leaves early may end the others
    torch.distributed.destroy_process_group()
