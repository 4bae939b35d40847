"""`hf-eagle3 states`: stores a target's hidden states, to train drafters without it.

Importing training takes seconds, so it happens when the command runs.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as host_logging

from ..console.opening import opening, refuse_device, refuse_drafter, refuse_file, refuse_target
from ..console.terminal import note, say
from .arguments import DEVICE_MAPS, DTYPES, Commands, byte_count, json_object, positive

if TYPE_CHECKING:
    from ..training.states.writer import StateWriter

ASK_FROM = 10 * 10**9  # bytes


def add_states_parser(commands: Commands) -> None:
    """The options of `hf-eagle3 states`."""
    parser = commands.add_parser(
        "states",
        help="store a target's hidden states, to train drafters without it",
        description="Runs the target once over the training rows and writes what a drafter's training reads of it. Says how "
        "much that is first. An interrupted run goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target_model_name_or_path", required=True, metavar="REPO_OR_DIR", help="the target")
    parser.add_argument(
        "--train_file",
        type=Path,
        required=True,
        metavar="JSONL",
        help="also .gz: rows with input_ids and loss_mask, or with messages",
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on with"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--drafter_name_or_path", metavar="REPO_OR_DIR", help="store what this drafter reads")
    which.add_argument(
        "--aux_layer_ids",
        type=int,
        nargs="+",
        metavar="I",
        help="boundaries to store, as in the drafter's config (those of a new drafter: 2, the middle, 3 before the last)",
    )
    parser.add_argument(
        "--max_length", type=positive, default=2048, metavar="N", help="longer rows are cut on the right"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        type=json_object,
        metavar="JSON",
        help="what the chat template is given for every row, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the states (the target's)")
    parser.add_argument("--target_dtype", default="auto", metavar="DTYPE", help="of the target: auto, bfloat16, ...")
    parser.add_argument("--device", default="auto", help="cpu, cuda, auto (over all GPUs), ...")
    parser.add_argument("--shard_size", type=byte_count, default="1GB", metavar="SIZE", help="of a file")
    parser.add_argument(
        "--batch_tokens", type=positive, default=16384, metavar="N", help="tokens of one forward of the target"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before writing more than 10 GB")
    parser.set_defaults(run=run_states_command)


def run_states_command(args: argparse.Namespace) -> int:
    """Write the states; exit status 0, or 1 if the user does not want so much written."""
    from ..training.states.writer import format_bytes, free_bytes

    host_logging.disable_progress_bar()
    writer = make_writer(args)
    say(f"{writer.size}. {format_bytes(free_bytes(args.output_dir))} are free there.")
    if writer.size.total_bytes > ASK_FROM and not args.yes:
        if not sys.stdin.isatty():
            raise ValueError(
                f"That is more than {format_bytes(ASK_FROM)}, and there is nobody to ask. Give --yes to write it."
            )
        if input(f"Write {format_bytes(writer.size.total_bytes)} to {args.output_dir}? [y/N] ").lower() not in (
            "y",
            "yes",
        ):
            return 1
    say(f"The states are in {writer.run()}.")
    return 0


def make_writer(args: argparse.Namespace) -> "StateWriter":
    """Check the arguments, load target and drafter, and say how much there is to write."""
    from ..training.data.files import read_rows
    from ..training.states.writer import StateWriter

    refuse_file("--train_file", args.train_file)
    if args.device not in DEVICE_MAPS:
        refuse_device(args.device)
    name = args.target_model_name_or_path
    refuse_target("--target_model_name_or_path", name)
    if args.drafter_name_or_path is not None:
        refuse_drafter("--drafter_name_or_path", args.drafter_name_or_path)
    rows = list(read_rows(args.train_file))
    note(f"Loading {name} ...")
    with opening("--target_model_name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        target = AutoModelForCausalLM.from_pretrained(name, dtype=args.target_dtype, device_map=args.device)
    drafter = None
    if args.drafter_name_or_path is not None:
        with opening("--drafter_name_or_path", args.drafter_name_or_path):
            drafter = AutoModel.from_pretrained(args.drafter_name_or_path)
    return StateWriter(
        target,
        rows,
        args.output_dir,
        drafter or args.aux_layer_ids,
        tokenizer=tokenizer,
        max_length=args.max_length,
        chat_template_kwargs=args.chat_template_kwargs,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        shard_size=args.shard_size,
        batch_tokens=args.batch_tokens,
    )
