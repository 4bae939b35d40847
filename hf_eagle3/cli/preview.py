"""`hf-eagle3 data preview`: which tokens of training rows are supervised."""

import argparse
import os
import sys

from ..console.paths import refuse_missing
from ..console.terminal import say
from .arguments import Parser, add_target, json_object
from .rows import add_rows, find_rows, refuse_rows
from .starting import start


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 data preview`."""
    parser.description = (
        "Loads the target's tokenizer only. Supervised text is coloured in a terminal, in ⟦brackets⟧ elsewhere."
    )
    add_target(parser, "whose tokenizer and chat template", required=True)
    add_rows(parser, "--train-file", "rows of any format, also .gz")
    parser.add("--rows", type=int, default=3, metavar="N", help="rows to show; 0: numbers only")
    parser.add("--max-length", type=int, metavar="L", help="cut longer rows, as in training")
    parser.add(
        "--chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="such as '{\"enable_thinking\": false}'",
    )
    parser.add("--color", choices=["auto", "always", "never"], default="auto", help="auto: when stdout is a terminal")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show rows and numbers; exit status 0."""
    for name in ("rows", "max_length"):
        if (given := getattr(args, name)) is not None and given < (least := name == "max_length"):
            raise ValueError(f"--{name.replace('_', '-')} must be at least {int(least)}; got {given}.")
    refuse_rows(args, "--train-file")
    refuse_missing("--target", args.target)
    start()
    from tqdm.auto import tqdm
    from transformers import AutoTokenizer

    from ..console.opening import opening, refuse_target
    from ..training.data.preview import describe_dataset, describe_row, format_row
    from ..training.data.token_rows import TokenDataset, check_token_ids

    refuse_target("--target", args.target)
    with opening("--target", args.target):
        tokenizer = AutoTokenizer.from_pretrained(args.target)
    rows = tqdm(find_rows(args, "--train-file").read(), desc="Tokenizing", unit=" rows", file=sys.stderr, leave=False)
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
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(target).eos_token_id
    except OSError:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def find_vocab_size(target: str, num_tokens: int) -> int:
    """The size in the target's config; where there is a tokenizer only, the number of its tokens."""
    from transformers import AutoConfig, PreTrainedConfig

    if not PreTrainedConfig.get_config_dict(target)[0]:
        return num_tokens
    return AutoConfig.from_pretrained(target).get_text_config().vocab_size
