"""Render training and eval prompts with the target's chat template, once, to token ids.

    python benchmarks/smollm2/prompts.py TARGET_FOLDER PROMPT_FOLDER OUT.npz

PROMPT_FOLDER holds `train.jsonl.gz` and `eval_*.jsonl`: one object a line with `category` and `turns`.
"""

import argparse
import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

EVAL_SETS = ("mt_bench", "gsm8k", "humaneval", "alpaca")


def pack(rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Rows of ids as one flat uint16 array and the offsets between them."""
    return {
        "ids": np.concatenate([np.asarray(r, dtype=np.uint16) for r in rows]) if rows else np.empty(0, np.uint16),
        "offsets": np.cumsum([0] + [len(r) for r in rows]).astype(np.int64),
    }


def unpack(arrays: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    """The rows that `pack` made, from a loaded npz."""
    ids, offsets = arrays[f"{name}_ids"], arrays[f"{name}_offsets"]
    return [ids[a:b] for a, b in pairwise(offsets)]


def first_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The prompt a user's first turn makes, system message of the template included."""
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    arrays: dict[str, np.ndarray] = {}

    def add(name: str, rows: list[list[int]]) -> None:
        arrays.update({f"{name}_{key}": value for key, value in pack(rows).items()})

    with gzip.open(args.prompts / "train.jsonl.gz", "rt", encoding="utf8") as lines:
        train = [json.loads(line) for line in lines]
    add("train", [first_turn(tokenizer, row["turns"][0]) for row in tqdm(train, desc="train")])
    for name in EVAL_SETS:
        rows = [json.loads(line) for line in (args.prompts / f"eval_{name}.jsonl").open(encoding="utf8")]
        add(name, [first_turn(tokenizer, row["turns"][0]) for row in rows])
        arrays[f"{name}_category"] = np.array([row["category"] for row in rows])
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out}: {len(train)} training prompts, {arrays['train_ids'].size} tokens")


if __name__ == "__main__":
    main()
