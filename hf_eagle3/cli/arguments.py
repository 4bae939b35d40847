"""The command line's one parser: spellings, near misses, and the types and options that commands share.

Imports nothing heavy: `--help` and a mistyped option need neither PyTorch nor Transformers.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..console.spelling import CANONICAL, did_you_mean, respell
from ..modeling.text_eagle3 import one_line, parse_json, show

DTYPES = ("float32", "bfloat16", "float16")
NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf|-nan", re.IGNORECASE)
WIDEST = 100  # columns of a help text


class HelpFormatter(argparse.HelpFormatter):
    """Says defaults that say something, in lines that can be read."""

    def __init__(self, prog: str, **options: Any):  # Any: further ones differ between versions of Python
        width = min(shutil.get_terminal_size().columns - 2, WIDEST)
        super().__init__(prog, **{"max_help_position": 34, "width": width, **options})

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if not text or default is None or default is False or default in (argparse.SUPPRESS, [], {}):
            return text
        words = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else "%(default)s"
        return f"{text} (default: {words})"


class CommandsFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """For a parser of commands, which are listed line by line in its description."""


class Parser(argparse.ArgumentParser):
    """argparse's, with other spellings of options, near misses, and values that may be given without their option."""

    def __init__(self, **options: Any):  # Any: argparse's own
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})
        self.commands: dict[str, Parser] = {}
        self._in_order: list[argparse.Action] = []
        self._needed: list[argparse.Action] = []

    def add(
        self, name: str, *, in_order: bool = False, required: bool = False, **options: Any
    ) -> None:  # Any: argparse's
        """Add an option.

        Args:
            name: With its dashes.
            in_order: The value may also stand alone, in the order in which such options were added.
            required: The command needs it.
            options: Those of `add_argument`.
        """
        action = self.add_argument(name, **options)
        if in_order:
            self._in_order.append(action)
        if required:
            self._needed.append(action)

    def add_commands(self, lines: Mapping[str, str], dest: str) -> None:
        """A parser for each command, in `commands`; `lines` say what they do."""
        width = max(map(len, lines))
        listed = "\n".join(f"  {name:{width}}  {line}" for name, line in lines.items())
        self.description = f"{self.description}\n\ncommands:\n{listed}"
        self.formatter_class = CommandsFormatter
        commands = self.add_subparsers(dest=dest, required=True, metavar="COMMAND", help=argparse.SUPPRESS)
        self.commands = {name: commands.add_parser(name) for name in lines}

    def format_usage(self) -> str:
        """The line above a help text."""
        self._shorten_usage()
        return super().format_usage()

    def format_help(self) -> str:
        """The help text."""
        self._shorten_usage()
        return super().format_help()

    def parse_known_args(  # type: ignore[override]  # argparse has an overload for each kind of namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """The values given, and nothing that is left over."""
        words = self._respell(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(words, namespace)
        self._fill(found, [word for word in rest if word != "--"])
        return found, []

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in a line, and end with status 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}. `{self.prog} --help` lists what there is.\n")

    def _fill(self, found: Any, left: list[str]) -> None:  # Any: argparse's namespace
        """Give words that stand alone to the options that are given in order, and refuse what is too much or missing."""
        for action in self._in_order:
            if left and getattr(found, action.dest, None) is action.default:
                setattr(found, action.dest, action.type(left.pop(0)) if callable(action.type) else left.pop(0))
        if left:
            self.error(f"{show(left[0])} is not expected here")
        missing = [action for action in self._needed if getattr(found, action.dest) is action.default]
        if missing:
            names = [action.dest.upper() if action in self._in_order else name_of(action) for action in missing]
            self.error(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing")

    def _shorten_usage(self) -> None:
        if self._subparsers is not None:
            self.usage = f"{self.prog} COMMAND [OPTIONS]"
        elif self.usage is None:
            needed = [action for action in self._needed if action not in self._in_order]
            words = [*(str(action.dest).upper() for action in self._in_order), *map(name_of, needed)]
            self.usage = " ".join([self.prog, *words, "[OPTIONS]"]).replace("%", "%%")

    def _respell(self, words: Sequence[str]) -> list[str]:
        """The words with options as they are spelt here; those of a command's own parser are left to it."""
        options, out, typed, is_over = self._option_string_actions, list[str](), dict[str, str](), False
        for i, word in enumerate(words):
            is_over = is_over or word == "--"
            if is_over or not is_option(word):
                if self._subparsers is not None:
                    return [*out, *words[i:]]
                out.append(word)
                continue
            written, equals, value = word.partition("=")
            name = respell(written, options)
            if name not in options and " " in word:  # a text that begins with a dash
                out.append(word)
                continue
            if name not in options:
                others = [other for other, option in CANONICAL.items() if option in options]
                self.error(f"{name} is no option{did_you_mean(name, [*options, *others])}")
            if typed.setdefault(name, written) != written:
                self.error(f"{typed[name]} and {written} are one option")
            out.append(name + equals + value)
        return out

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # Any: as its type makes it
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = did_you_mean(str(value), choices)
            raise argparse.ArgumentError(action, f"expected one of {', '.join(choices)}, got {show(value)}{near}")


def is_option(word: str) -> bool:
    """Whether argparse would take a word for an option, and for no number."""
    return word.startswith("-") and word != "-" and not NUMBER.fullmatch(word)


def name_of(action: argparse.Action) -> str:
    """An option with its value, as it is typed."""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return f"{action.option_strings[-1]} {metavar}"


# ---- types of values ----


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {show(text)}")
    return int(text)


def byte_count(text: str) -> int:
    """A size like 1GB or 500MB, in powers of a thousand."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) *([kKMGT]?)B?", text, re.ASCII)
    count = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a size like 1GB or 500MB, got {show(text)}")
    return count


def json_object(text: str) -> dict[str, Any]:
    """An object in JSON."""
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {show(text)}")
    return value


# ---- options that several commands have ----


def add_target(parser: Parser, help: str = "the model that generates", **options: Any) -> None:  # Any: as `Parser.add`
    """`--target`."""
    parser.add("--target", metavar="REPO_OR_DIR", help=help, **options)


def add_drafter(parser: Parser, help: str = "its drafter", **options: Any) -> None:  # Any: as `Parser.add`
    """`--drafter`."""
    parser.add("--drafter", metavar="REPO_OR_DIR", help=help, **options)


def add_depth(
    parser: Parser, help: str = "draft tokens a round (the drafter's own number)", *, default: int | None = None
) -> None:
    """`--num-draft-tokens`."""
    parser.add("--num-draft-tokens", type=positive, default=default, metavar="K", help=help)


def add_device(parser: Parser, *, dtype: str | None = None, has_map: bool = False) -> None:
    """`--device` and `--dtype`, and for commands whose target may need several devices `--device-map`.

    Args:
        parser: The command's.
        dtype: What both models are loaded in by default; None: as they are stored, and in float32 on a CPU.
        has_map: Add `--device-map`.
    """
    parser.add(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one"
    )
    if has_map:
        parser.add("--device-map", metavar="MAP", help="spread the target over the devices: auto, balanced, ...")
    said = "" if dtype is not None else " (as stored; float32 on a CPU)"
    parser.add(
        "--dtype", choices=DTYPES, default=dtype, help=f"of the models: {', '.join(DTYPES)}{said}", metavar="DTYPE"
    )


def add_json(parser: Parser) -> None:
    """`--json`."""
    parser.add("--json", action="store_true", help="print the result as JSON")


def add_prompts(parser: Parser, ours: str) -> None:
    """`--prompt`, any number of times; `ours` says what is asked without it."""
    parser.add("--prompt", action="append", metavar="TEXT", help=f"what to ask, as often as you like ({ours})")
