"""`hf-eagle3 data preview`: which tokens of training rows are supervised.

Importing training takes seconds, so it happens when the command runs.
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from ..console.opening import opening, refuse_file, refuse_target
from ..console.terminal import say
from .arguments import Commands, json_object


def add_data_parser(commands: Commands) -> None:
    """`hf-eagle3 data`, and the options of `hf-eagle3 data preview`."""
    data = commands.add_parser("data", help="look at training data")
    data_commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    parser = data_commands.add_parser(
        "preview",
        help="show which tokens of training rows are supervised, and the numbers of the data",
        description="Loads the target's tokenizer only. Supervised text is coloured in a terminal, in ⟦brackets⟧ elsewhere.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", required=True, metavar="REPO_OR_DIR", help="whose tokenizer and chat template")
    parser.add_argument(
        "--train-file", "--train_file", type=Path, required=True, metavar="JSONL", help="rows of any format, also .gz"
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show; 0: numbers only")
    parser.add_argument("--max-length", "--max_length", type=int, metavar="L", help="cut longer rows, as in training")
    parser.add_argument(
        "--chat-template-kwargs",
        "--chat_template_kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument(
        "--color", choices=["auto", "always", "never"], default="auto", help="auto: when stdout is a terminal"
    )
    parser.set_defaults(run=run_preview_command)


def run_preview_command(args: argparse.Namespace) -> int:
    """Show rows and numbers; exit status 0."""
    from ..training.data.files import read_rows
    from ..training.data.preview import describe_dataset, describe_row, format_row
    from ..training.data.token_rows import TokenDataset, check_token_ids

    for name in ("rows", "max_length"):
        if (given := getattr(args, name)) is not None and given < (least := name == "max_length"):
            raise ValueError(f"--{name.replace('_', '-')} must be at least {int(least)}; got {given}.")
    refuse_file("--train-file", args.train_file)
    refuse_target("--target", args.target)
    with opening("--target", args.target):
        tokenizer = AutoTokenizer.from_pretrained(args.target)
    rows = tqdm(read_rows(args.train_file), desc="Tokenizing", unit=" rows", file=sys.stderr, leave=False)
    with opening("--target", args.target):
        ends, vocab_size = find_eos_token_ids(args.target), find_vocab_size(args.target, len(tokenizer))
    dataset = TokenDataset(
        rows, tokenizer, args.max_length, eos_token_ids=ends, chat_template_kwargs=args.chat_template_kwargs
    )
    check_token_ids(dataset, vocab_size)
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for i in range(min(args.rows, len(dataset))):
        say(f"--- row {i + 1} of {len(dataset)}: {describe_row(dataset[i])}")
        sys.stdout.write(format_row(dataset[i], tokenizer, color=color) + "\n\n")  # escaped but for our own colours
    say(describe_dataset(dataset, vocab_size))
    return 0


def find_eos_token_ids(target: str) -> list[int]:
    """The tokens that end the target's turns, by its generation config; none where it has no such file."""
    try:
        ends = GenerationConfig.from_pretrained(target).eos_token_id
    except OSError:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def find_vocab_size(target: str, num_tokens: int) -> int:
    """The size in the target's config; where there is a tokenizer only, the number of its tokens."""
    if not PreTrainedConfig.get_config_dict(target)[0]:
        return num_tokens
    return AutoConfig.from_pretrained(target).get_text_config().vocab_size
