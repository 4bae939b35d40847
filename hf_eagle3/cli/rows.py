"""Options of commands that read rows: a file, or a dataset."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..console.paths import refuse_sources
from .arguments import Parser

if TYPE_CHECKING:
    from ..training.data.sources import RowSource


def add_rows(parser: Parser, option: str, help: str) -> None:
    """`option`, a file, and the dataset that may be given in its place."""
    parser.add(option, type=Path, metavar="JSONL", help=help)
    parser.add(
        "--dataset-name",
        metavar="REPO_OR_DIR",
        help=f"in place of {option}: a dataset, on the Hub or in a folder (needs the package datasets)",
    )
    parser.add("--dataset-config", metavar="NAME", help="its configuration, of several")
    parser.add("--dataset-train-split", default="train", metavar="SPLIT", help="its split")


def refuse_rows(args: argparse.Namespace, option: str) -> None:
    """Raise unless rows are given in one way, before anything heavy is imported.

    Raises:
        ValueError: They are given twice or not at all, or there is no such file.
    """
    refuse_sources(option, find_file(args, option), args.dataset_name)


def find_rows(args: argparse.Namespace, option: str) -> "RowSource":
    """Where the rows are."""
    from ..training.data.sources import RowSource

    file, config, split = find_file(args, option), args.dataset_config, args.dataset_train_split
    return RowSource(file, args.dataset_name, config, split, file_option=option)


def find_file(args: argparse.Namespace, option: str) -> Path | None:
    """The value of `option`."""
    return getattr(args, option.removeprefix("--").replace("-", "_"))
