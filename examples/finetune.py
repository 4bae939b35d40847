# /// script
# dependencies = ["hf-eagle3[train,peft]"]
# ///
"""Train a drafter for a target, EAGLE-3.1 unless --drafter_version says otherwise, from scratch or from a drafter you have.

    python examples/finetune.py \
        --target HuggingFaceTB/SmolLM2-135M-Instruct \
        --train_file answers.jsonl.gz --eval_file eval.jsonl \
        --output_dir my-drafter --draft_vocab_size 12288 --ttt_steps 6 \
        --per_device_train_batch_size 16 --learning_rate 1e-3 --num_train_epochs 3 --bf16

    # a recipe, with one thing changed, on eight GPUs
    accelerate launch --config_file examples/configs/ddp.yaml --num_processes 8 examples/finetune.py \
        --config examples/configs/gpt_oss_120b.yaml --train_file answers.jsonl.gz --output_dir my-drafter

    # a DSpark drafter, which drafts in blocks
    python examples/finetune.py --config examples/configs/smollm2_dspark.yaml \
        --train_file answers.jsonl.gz --output_dir my-block-drafter

    # only low-rank adapters of a drafter you have, for a target in 4 bits
    python examples/finetune.py --target TARGET --load_in_4bit \
        --drafter DRAFTER --use_peft --lora_r 32 --train_file answers.jsonl.gz --output_dir my-adapter

Going on from a published drafter (`--drafter REPO_OR_FOLDER`) keeps its draft vocabulary. Let the target
write the answers first (`examples/regenerate.py`): a drafter must learn what its target says. Every argument of
`Eagle3TrainingArguments`, which are the host's `TrainingArguments` and a few more, can be given. `hf-eagle3 train` is the
same.
"""

import sys

from hf_eagle3 import cli
from hf_eagle3.training.script import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
