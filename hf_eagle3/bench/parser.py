"""The options of `hf-eagle3 bench`."""

import argparse
from pathlib import Path
from typing import Any

import torch

from .command import run_bench_command
from .shapes import SHAPES
from .ways import KINDS


def add_bench_parser(commands: Any) -> None:  # Any: argparse's own private class
    """The options of `hf-eagle3 bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure what a drafter brings, by batch size and prompt category",
        description="Stock generate(), our loop without drafting and our loop with it, in turn in one process. Writes "
        "tables as Markdown, the same as JSON, and a picture where matplotlib is installed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_arguments(parser)
    add_run_arguments(parser)
    add_device_arguments(parser)
    parser.set_defaults(run=run_bench_command)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models decode which prompts."""
    parser.add_argument("--target", metavar="REPO_OR_DIR", help="the model to generate with")
    parser.add_argument("--drafter", metavar="REPO_OR_DIR", help="its drafter; random weights if left out")
    parser.add_argument("--shape", choices=list(SHAPES), help="instead of --target: a known shape, random weights")
    parser.add_argument(
        "--simulate-acceptance-length",
        type=float,
        metavar="AL",
        help="accept as if drafts were that good, whatever they are; for weights that were never trained",
    )
    parser.add_argument("--prompts", type=Path, metavar="JSONL", help="lines with `turns` or `prompt`, and `category`")
    parser.add_argument("--limit", type=int, metavar="N", help="first N prompts only")
    parser.add_argument("--prompt-length", type=int, default=512, metavar="T", help="of random prompts")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How much is decoded, and by which kinds."""
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64], metavar="B", help="rows at once")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of each row")
    parser.add_argument("--num-draft-tokens", type=int, metavar="K", help="draft depth (the drafter's own)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each kind")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=["stock", "plain", "drafted"], help="what to compare"
    )
    parser.add_argument(
        "--dflash-drafter",
        metavar="REPO_OR_DIR",
        help="a D-Flash drafter for the same target, for a column beside ours; code in its repository is run",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it runs, and where the tables go."""
    parser.add_argument(
        "--dp-size",
        type=int,
        metavar="N",
        help="processes, each with its share of the prompts on a device of its own; not needed under accelerate launch "
        "and torchrun (1, or what they started)",
    )
    parser.add_argument(
        "--tp-size",
        type=int,
        metavar="N",
        help="processes that share one target by tensor parallelism, each with a device of its own",
    )
    parser.add_argument(
        "--device-map", metavar="MAP", help="spread the target over the devices of one process: auto, ..."
    )
    parser.add_argument(
        "--read-bandwidth",
        type=float,
        metavar="TB/s",
        help="of the device, for the account of what weights cost to read (measured)",
    )
    parser.add_argument(
        "--join-projections",
        action="store_true",
        help="run query, key and value projections as one product (hf_eagle3.join_projections): for large batches",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="PATH", help="without suffix")
