"""Let the target answer prompts, and keep the very tokens it wrote: the training data of its drafter.

    python examples/regenerate.py \
        --target_model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --prompt_file prompts.jsonl --output_file answers.jsonl.gz --temperature 0.7 --max_new_tokens 512

A prompt is a line of JSON with `messages` (ending with the user), `prompt`, or `turns` (the first is asked). A row of the
output has `input_ids` and `loss_mask`, 1 on what the target generated. `--num_return_sequences 2` answers each prompt twice.
Run it once more at `--temperature 0` (greedy) and train on both files' rows; eval rows should be greedy, from other prompts.
A run that was interrupted goes on where it stopped.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class ScriptArguments:
    """Which target, which prompts, how to answer."""

    target_model_name_or_path: str = field(metadata={"help": "The target."})
    prompt_file: str = field(metadata={"help": "JSONL, also .gz."})
    output_file: str = field(metadata={"help": "JSONL, also .gz; appended to when it exists."})
    temperature: float = field(default=0.7, metadata={"help": "0 is greedy."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus sampling; default: the target's own."})
    num_return_sequences: int = field(default=1, metadata={"help": "Answers to each prompt; needs sampling."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Prompts answered side by side."})
    dtype: str = field(default="auto", metadata={"help": "The target's dtype."})
    device: str = field(default="auto", metadata={"help": "cuda where there is one, else cpu."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})


def open_text(path: Path, mode: str):
    """Open a JSONL file, also .gz."""
    return gzip.open(path, mode + "t", encoding="utf-8") if path.suffix == ".gz" else path.open(mode, encoding="utf-8")


def read_messages(path: Path) -> list[list[dict[str, str]]]:
    """The conversations to answer."""
    conversations = []
    with open_text(path, "r") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if "messages" in row:
                messages = row["messages"]
            elif "prompt" in row or row.get("turns"):
                messages = [{"role": "user", "content": row["prompt"] if "prompt" in row else row["turns"][0]}]
            else:
                raise ValueError(f"{path}, line {number}: expected messages, prompt or turns, got {sorted(row)}.")
            if not messages or messages[-1]["role"] != "user":
                raise ValueError(f"{path}, line {number}: the conversation must end with the user's turn.")
            conversations.append(messages)
    return conversations


@torch.no_grad()
def answer(
    target: PreTrainedModel, tokenizer: Tokenizer, conversations: list[list[dict[str, str]]], args: ScriptArguments
) -> Iterator[dict[str, list[int]]]:
    """Rows of tokens, `num_return_sequences` for each conversation."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(target.device)
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": args.temperature,
            "num_return_sequences": args.num_return_sequences,
        }
        if args.top_p is not None:
            sampling["top_p"] = args.top_p
    out = target.generate(**inputs, max_new_tokens=args.max_new_tokens, **sampling)
    ends = target.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    width = inputs["input_ids"].shape[1]
    masks = inputs["attention_mask"].repeat_interleave(args.num_return_sequences, dim=0)
    for ids, mask in zip(out.tolist(), masks.tolist(), strict=True):
        prompt = [token for token, keep in zip(ids[:width], mask, strict=True) if keep]
        # Up to the first end of turn, which belongs to the answer; what follows is padding, often the same token.
        length = next((i + 1 for i, token in enumerate(ids[width:]) if token in ends), len(ids) - width)
        new = ids[width : width + length]
        yield {"input_ids": prompt + new, "loss_mask": [0] * len(prompt) + [1] * len(new)}


def count_answered(path: Path, answers_each: int) -> int:
    """How many prompts `path` holds all answers to. What an interrupted run left half-written is cut off."""
    lines, is_cut = [], False
    if path.exists():
        try:
            with open_text(path, "r") as file:
                for line in file:  # one by one, to keep what comes before the cut
                    lines.append(line)
        except EOFError:
            is_cut = True
            print(f"{path} ends in the middle of a row; going on before it.")
    whole = [line for line in lines if line.endswith("\n")]
    whole = whole[: len(whole) - len(whole) % answers_each]
    if is_cut or whole != lines:
        with open_text(path, "w") as file:
            file.writelines(whole)
    return len(whole) // answers_each


def main(arguments: list[str] | None = None) -> Path:
    """Answer what is not answered yet; returns the output file."""
    (args,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses(arguments)
    if args.temperature == 0 and args.num_return_sequences > 1:
        raise ValueError(
            f"At temperature 0 every answer is the same; got num_return_sequences {args.num_return_sequences}. "
            "Set --temperature above 0, or leave it out."
        )
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    conversations, out = read_messages(Path(args.prompt_file)), Path(args.output_file)
    done = count_answered(out, args.num_return_sequences)
    tokenizer = AutoTokenizer.from_pretrained(args.target_model_name_or_path)
    target = AutoModelForCausalLM.from_pretrained(args.target_model_name_or_path, dtype=args.dtype).to(device).eval()
    torch.manual_seed(args.seed + done)
    with tqdm(total=len(conversations), initial=done, desc="answers") as progress:
        for start in range(done, len(conversations), args.batch_size):
            batch = conversations[start : start + args.batch_size]
            rows = list(answer(target, tokenizer, batch, args))
            with open_text(out, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            progress.update(len(batch))
    return out


if __name__ == "__main__":
    main()
