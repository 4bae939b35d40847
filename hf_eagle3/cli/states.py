"""`hf-eagle3 states`: stores a target's hidden states, to train drafters without it."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..console.interrupts import saying_on_interrupt
from ..console.paths import refuse_missing
from ..console.terminal import note, say
from .arguments import DTYPES, Parser, add_device, add_drafter, add_target, byte_count, json_object, positive
from .rows import add_rows, find_rows, refuse_rows
from .starting import start

if TYPE_CHECKING:
    from ..training.states.writer import StateWriter

ASK_FROM = 10 * 10**9  # bytes


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 states`."""
    parser.description = (
        "Runs the target once over the training rows and writes what a drafter's training reads of it. Says how much that "
        "is first. An interrupted run goes on where it stopped."
    )
    add_target(parser, "the model that reads the rows", required=True)
    add_rows(parser, "--train-file", "also .gz: rows with input_ids and loss_mask, or with messages")
    parser.add("--output-dir", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on with")
    add_drafter(parser, "store what this drafter reads")
    parser.add(
        "--aux-layer-ids",
        type=int,
        nargs="+",
        metavar="I",
        help="boundaries to store, as in the drafter's config (those of a new drafter: 2, the middle, 3 before the last)",
    )
    parser.add("--max-length", type=positive, default=2048, metavar="N", help="longer rows are cut on the right")
    parser.add(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="what the chat template is given for every row, such as '{\"enable_thinking\": false}'",
    )
    add_device(parser, has_map=True)
    parser.add("--states-dtype", choices=DTYPES, metavar="DTYPE", help="of the states (the target's)")
    parser.add("--shard-size", type=byte_count, default="1GB", metavar="SIZE", help="of a file")
    parser.add("--batch-tokens", type=positive, default=16384, metavar="N", help="tokens of one forward of the target")
    parser.add("--yes", action="store_true", help="do not ask before writing more than 10 GB")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the states; exit status 0, or 1 if the user does not want so much written."""
    refuse_rows(args, "--train-file")
    refuse_missing("--target", args.target)
    if args.drafter is not None:
        refuse_missing("--drafter", args.drafter)
    if args.drafter is not None and args.aux_layer_ids is not None:
        raise ValueError("--drafter and --aux-layer-ids both say what to store: give one of them.")
    start()
    from ..training.states.writer import format_bytes, free_bytes

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
    kept = f"Whole files stay in {args.output_dir}: run the same command again to go on."
    with saying_on_interrupt(lambda: kept):
        folder = writer.run()
    say(f"The states are in {folder}.")
    return 0


def make_writer(args: argparse.Namespace) -> "StateWriter":
    """Check the arguments, load target and drafter, and say how much there is to write."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as host_logging

    from ..console.devices import choose_device, choose_dtype
    from ..console.opening import opening, refuse_drafter, refuse_target
    from ..training.states.writer import StateWriter

    host_logging.disable_progress_bar()
    device = choose_device(args.device, args.device_map)
    refuse_target("--target", args.target)
    if args.drafter is not None:
        refuse_drafter("--drafter", args.drafter)
    rows = find_rows(args, "--train-file").read()
    note(f"Loading {args.target} ...")
    with opening("--target", args.target):
        tokenizer = AutoTokenizer.from_pretrained(args.target)
        target = AutoModelForCausalLM.from_pretrained(
            args.target, dtype=choose_dtype(args.dtype, device), device_map=args.device_map or device
        )
    drafter = None
    if args.drafter is not None:
        with opening("--drafter", args.drafter):
            drafter = AutoModel.from_pretrained(args.drafter)
    return StateWriter(
        target,
        rows,
        args.output_dir,
        drafter or args.aux_layer_ids,
        tokenizer=tokenizer,
        max_length=args.max_length,
        chat_template_kwargs=args.chat_template_kwargs,
        dtype=None if args.states_dtype is None else getattr(torch, args.states_dtype),
        shard_size=args.shard_size,
        batch_tokens=args.batch_tokens,
    )
