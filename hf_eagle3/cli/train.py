"""`hf-eagle3 train`: trains a drafter."""

from collections.abc import Sequence

from .arguments import Commands


def add_train_parser(commands: Commands) -> None:
    """A name for `--help` alone.

    The options are those of training, which takes seconds to import: `run` hands them over before they are parsed.
    """
    commands.add_parser("train", help="train a drafter; `hf-eagle3 train --help` lists the options", add_help=False)


def run_train_command(arguments: Sequence[str]) -> int:
    """Train; exit status 0."""
    from ..training.script import main as train

    train(arguments)
    return 0
