"""`hf-eagle3 bench`: what a drafter brings, measured."""

import argparse
from pathlib import Path
from typing import Any

from ..bench.arguments import refuse_arguments
from ..bench.names import KINDS, RANDOM_DRAFTERS, SHAPES
from ..modeling.text_eagle3 import show
from .arguments import Parser, add_depth, add_device, add_drafter, add_json, add_target, positive
from .starting import start

TREES = ("tree-8", "tree-16", "tree-32")  # fitted to the drafter's rates; tokens verified, the root's too


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 bench`."""
    parser.description = (
        "Stock generate(), our loop without drafting and our loop with it, in turn in one process. Prints a short table, and "
        "writes long ones as Markdown, the same as JSON, and a picture where matplotlib is installed."
    )
    add_model_options(parser)
    add_run_options(parser)
    add_queue_options(parser)
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, **steps: Any) -> int:  # Any: as `bench.loading.Steps` has them
    """Measure, print and write; exit status 0, or 1 if a text differs from that of `generate`, or nothing was measured."""
    refuse_arguments(args)
    start()
    from ..bench.command import run_bench
    from ..bench.loading import STEPS
    from ..bench.open_loop import run_open_loop

    if args.open_loop:
        return run_open_loop(args, STEPS._replace(**steps))
    return run_bench(args, STEPS._replace(**steps))


def add_model_options(parser: Parser) -> None:
    """Which models decode which prompts."""
    add_target(parser)
    add_drafter(parser, "its drafter; random weights if left out")
    parser.add(
        "--shape",
        choices=list(SHAPES),
        metavar="SHAPE",
        help=f"instead of --target, random weights: {', '.join(SHAPES)}",
    )
    parser.add(
        "--simulate-acceptance-length",
        type=float,
        metavar="AL",
        help="accept as if drafts were that good, whatever they are; for weights that were never trained",
    )
    parser.add(
        "--random-drafter",
        choices=RANDOM_DRAFTERS,
        default="eagle3",
        help="kind of the drafter of random weights, where --drafter is left out",
    )
    parser.add(
        "--simulate-coverage",
        type=Path,
        metavar="JSON",
        help="likewise, by the rates of each depth and rank that a drafter had (acceptance_by_rank)",
    )
    parser.add("--prompts", type=Path, metavar="JSONL", help="lines with `turns` or `prompt`, and `category`")
    parser.add("--limit", type=positive, metavar="N", help="first N prompts only")
    parser.add("--prompt-length", type=positive, default=512, metavar="T", help="of random prompts")


def add_run_options(parser: Parser) -> None:
    """How much is decoded, and by which kinds."""
    parser.add("--batch-sizes", type=positive, nargs="+", default=[1, 8, 64], metavar="B", help="rows at once")
    parser.add("--max-new-tokens", type=positive, default=256, metavar="N", help="of each row")
    add_depth(parser)
    parser.add("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    parser.add("--repeats", type=positive, default=3, metavar="N", help="timed runs of each kind")
    parser.add(
        "--kinds",
        nargs="+",
        choices=list(KINDS),
        default=["stock", "plain", "drafted"],
        metavar="KIND",
        help=f"what to compare, of {', '.join(KINDS)}",
    )
    parser.add(
        "--draft-shapes",
        type=shape_name,
        nargs="+",
        default=[],
        metavar="SHAPE",
        help=f"further kinds of ours: auto (chosen by cost), tokens of a chain, or {', '.join(TREES)}",
    )
    parser.add(
        "--dflash-drafter",
        metavar="REPO_OR_DIR",
        help="a D-Flash drafter for the same target, for a column beside ours; if its layout is unknown, code in its repository is run",
    )


def add_queue_options(parser: Parser) -> None:
    """How requests come, where they come and go."""
    parser.add(
        "--open-loop",
        action="store_true",
        help="requests that come and go, with --batch-sizes places: tokens a second, times to the first token and for each "
        "further one; stock is then the host's generate_batch",
    )
    parser.add("--requests", type=positive, default=128, metavar="N", help="of --open-loop")
    parser.add(
        "--request-rates", type=float, nargs="+", metavar="R", help="requests a second, by chance (all come at once)"
    )
    parser.add(
        "--mean-new-tokens",
        type=float,
        metavar="N",
        help="lengths of answers are drawn, log-normal with that mean (as texts end)",
    )


def shape_name(text: str) -> str:
    """A value of --draft-shapes.

    Raises:
        ArgumentTypeError: It names no shape.
    """
    if not (text in ("auto", *TREES) or (text.isascii() and text.isdigit() and len(text) < 3 and 0 < int(text) <= 64)):
        raise argparse.ArgumentTypeError(f"expected auto, 1 to 64, or {', '.join(TREES)}, got {show(text)}")
    return text


def add_device_options(parser: Parser) -> None:
    """Where it runs, and where the tables go."""
    parser.add(
        "--dp-size",
        type=int,
        metavar="N",
        help="processes, each with its share of the prompts on a device of its own; not needed under accelerate launch "
        "and torchrun (1, or what they started)",
    )
    parser.add(
        "--tp-size",
        type=int,
        metavar="N",
        help="processes that share one target by tensor parallelism, each with a device of its own",
    )
    add_device(parser, has_map=True)
    parser.add(
        "--read-bandwidth",
        type=float,
        metavar="TB/s",
        help="of the device, for the account of what weights cost to read (measured)",
    )
    parser.add(
        "--join-projections",
        action="store_true",
        help="run query, key and value projections as one product (hf_eagle3.join_projections): for large batches",
    )
    parser.add("--out", type=Path, default=Path("bench"), metavar="PATH", help="of the files, without suffix")
    add_json(parser)
