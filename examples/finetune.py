"""Train an EAGLE-3.1 drafter for a target, from scratch or from a drafter you have.

    python examples/finetune.py \
        --target_model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --train_file answers.jsonl.gz --eval_file eval.jsonl \
        --output_dir my-drafter --draft_vocab_size 12288 --ttt_steps 6 \
        --per_device_train_batch_size 16 --learning_rate 1e-3 --num_train_epochs 3 --bf16

Go on from a published drafter with `--drafter_name_or_path REPO_OR_FOLDER`; it keeps its draft vocabulary. Let the target
write the answers first (`examples/regenerate.py`): a drafter must learn what its target says. Every argument of
`Eagle3TrainingArguments`, which are the host's `TrainingArguments` and a few more, can be given.
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_eagle3 import Eagle3Trainer, Eagle3TrainingArguments


@dataclass
class ScriptArguments:
    """Which models, which data."""

    target_model_name_or_path: str = field(metadata={"help": "The model whose output the drafter learns to propose."})
    train_file: str = field(
        metadata={
            "help": "JSONL, also .gz: rows with `messages`, or with `input_ids` and `loss_mask`. Or the name of a "
            "dataset on the Hub with such columns (needs the `datasets` package)."
        }
    )
    eval_file: str | None = field(default=None, metadata={"help": "The same, for evaluation; greedy answers."})
    drafter_name_or_path: str | None = field(default=None, metadata={"help": "Go on from this drafter."})
    target_dtype: str = field(default="auto", metadata={"help": "The target's dtype: auto, float32, bfloat16, ..."})


def read_rows(name: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a JSONL file, or of a dataset on the Hub."""
    path = Path(name)
    if path.exists():
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{name} is not a file. If it is a dataset on the Hub, install datasets: pip install datasets."
        ) from error
    return load_dataset(name, split="train")


def main(arguments: list[str] | None = None) -> Eagle3Trainer:
    """Train, evaluate, save; returns the trainer."""
    script, args = HfArgumentParser((ScriptArguments, Eagle3TrainingArguments)).parse_args_into_dataclasses(arguments)
    tokenizer = AutoTokenizer.from_pretrained(script.target_model_name_or_path)
    target = AutoModelForCausalLM.from_pretrained(script.target_model_name_or_path, dtype=script.target_dtype)
    drafter = None
    if script.drafter_name_or_path is not None:
        drafter = AutoModel.from_pretrained(script.drafter_name_or_path, dtype=torch.float32)

    trainer = Eagle3Trainer(
        model=drafter,
        target_model=target,
        args=args,
        train_dataset=read_rows(script.train_file),
        eval_dataset=read_rows(script.eval_file) if script.eval_file else None,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if script.eval_file:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        print(f"acceptance length at depth {args.eval_depth}: {metrics['eval_acceptance_length']:.2f}")
    print(f"saved to {args.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
