"""The command line: `hf-eagle3`, a module a command.

Answers and results go to stdout, progress and errors to stderr. PyTorch and Transformers take seconds to import, so a
command's module imports them, and all that needs them, when the command runs: `start()`, then imports in functions.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module

from .. import __version__
from ..console.interrupts import INTERRUPTED
from ..console.terminal import escape_streams, note
from .arguments import Parser

# Command -> its line in `hf-eagle3 --help`. Each has a module of its name, with `add_options(parser)`, which also sets `run`.
COMMANDS = {
    "demo": "let a small model answer without and with its drafter, and compare",
    "chat": "talk to a target, with its drafter or without",
    "serve": "answer over HTTP as `transformers serve` does, with a drafter",
    "check": "say in twenty seconds whether texts are equal, how fast they come, and what would help",
    "inspect": "say what a drafter is: flavour, fields and where they come from, sizes, engines",
    "doctor": "measure which reading of a drafter's config agrees best with its target",
    "drift": "measure what a drafter attends to and feeds back, depth by depth",
    "export": "write a drafter as SGLang or vLLM serves it, or for the Hub",
    "train": "train a drafter",
    "bench": "measure what a drafter brings, by batch size and prompt category",
    "data": "look at training data",
    "regenerate": "let a target answer prompts, and keep the very tokens it wrote: training data",
    "states": "store a target's hidden states, to train drafters without it",
    "env": "print versions, for bug reports",
}
PASSED_ON = ("serve", "train")  # whose options are the host's and ours; the host's take seconds to import
# Errors that a user can mend, beside those of modules that may not be imported.
ERRORS = (ValueError, FloatingPointError, OSError, ImportError)
ERRORS_OF = (("torch", "OutOfMemoryError"), ("hf_eagle3.smollm2", "TargetUnavailableError"))
EPILOG = """Options may be written with underscores. --model is accepted for --target, and TRL's long names
(--target_model_name_or_path, --drafter_name_or_path) for --target and --drafter."""


def make_parser(names: Collection[str] = COMMANDS) -> Parser:
    """The commands, those in `names` with their options."""
    parser = Parser(
        prog="hf-eagle3",
        description="EAGLE-3 speculative decoding inside Hugging Face Transformers.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"hf-eagle3 {__version__}")
    parser.add_commands(COMMANDS, dest="command")
    for name, command in parser.commands.items():
        if name in names and name != "train":
            import_module(f".{name}", __name__).add_options(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a failed comparison, 2 for an error."""
    return guard(lambda: run(list(sys.argv[1:] if arguments is None else arguments)))


def guard(command: Callable[[], int]) -> int:
    """The exit status of `command`; an error that the user can mend is a line on stderr, and 2."""
    try:
        return command()
    except Exception as error:
        imported = [getattr(sys.modules.get(module), name, None) for module, name in ERRORS_OF]
        if not isinstance(error, (*ERRORS, *filter(None, imported))):
            raise
        note(f"hf-eagle3: error: {error}")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def run(given: list[str]) -> int:
    """Parse and run one command."""
    if given and given[0] in PASSED_ON:
        command = import_module(f".{given[0]}", __name__).run
        args = argparse.Namespace(arguments=given[1:])
    else:
        args = make_parser(given).parse_args(given)
        command = args.run
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    escape_streams()
    logging.getLogger("hf_eagle3.smollm2").setLevel(logging.INFO)
    return command(args)
