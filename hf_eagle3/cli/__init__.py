"""The command line: `hf-eagle3`, a module a command.

Answers and results go to stdout, progress and errors to stderr.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

import torch

from .. import __version__
from ..bench import add_bench_parser
from ..console.interrupts import INTERRUPTED, raise_again
from ..console.terminal import escape_streams, note
from ..smollm2 import TargetUnavailableError
from .demo import add_demo_parser
from .doctor import add_doctor_parser
from .env import add_env_parser
from .export import add_export_parser
from .inspect import add_inspect_parser
from .preview import add_data_parser
from .regenerate import add_regenerate_parser
from .states import add_states_parser
from .train import add_train_parser, run_train_command

# In the order of `hf-eagle3 --help`.
PARSERS = (
    add_demo_parser,
    add_inspect_parser,
    add_doctor_parser,
    add_export_parser,
    add_train_parser,
    add_bench_parser,
    add_data_parser,
    add_regenerate_parser,
    add_states_parser,
    add_env_parser,
)
ERRORS = (TargetUnavailableError, ValueError, FloatingPointError, OSError, ImportError, torch.OutOfMemoryError)


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="hf-eagle3", description="EAGLE-3 speculative decoding inside Hugging Face Transformers."
    )
    parser.add_argument("--version", action="version", version=f"hf-eagle3 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_parser in PARSERS:
        add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a failed comparison, 2 for an error."""
    raise_again()
    return guard(lambda: run(list(sys.argv[1:] if arguments is None else arguments)))


def guard(command: Callable[[], int]) -> int:
    """The exit status of `command`; an error that the user can mend is a line on stderr, and 2."""
    try:
        return command()
    except ERRORS as error:
        note(f"hf-eagle3: error: {error}")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def run(given: list[str]) -> int:
    """Parse and run one command."""
    is_training = given[:1] == ["train"]
    args = (
        argparse.Namespace(run=lambda _: run_train_command(given[1:]))
        if is_training
        else make_parser().parse_args(given)
    )
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    escape_streams()
    logging.getLogger("hf_eagle3.smollm2").setLevel(logging.INFO)
    return args.run(args)
