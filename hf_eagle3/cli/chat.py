"""`hf-eagle3 chat`: talk to a target, with its drafter or without."""

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from ..console.interrupts import noticing_interrupts
from ..console.paths import refuse_missing
from ..console.progress import Progress
from ..console.spelling import did_you_mean
from ..console.terminal import note, say
from .arguments import Parser, add_depth, add_device, add_drafter, add_target, positive
from .starting import start

if TYPE_CHECKING:
    from .conversation import Conversation
    from .loading import Pair

# What may be typed in place of a turn, and what it does.
COMMANDS = {
    "/off": "answer without the drafter",
    "/on": "answer with it again",
    "/clear": "forget what was said",
    "/quit": "end (or Ctrl-D); Ctrl-C stops an answer",
}


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 chat`."""
    listed = "; ".join(f"{name}: {what}" for name, what in COMMANDS.items())
    parser.description = f"Answers are streamed, and the prompt says how fast the last one was. {listed}."
    add_target(parser, "the model to talk to", in_order=True, required=True)
    add_drafter(parser, in_order=True, required=True)
    parser.add("--max-new-tokens", type=positive, default=512, metavar="N", help="longest answer, in tokens")
    parser.add("--temperature", type=temperature, default=0.0, metavar="T", help="0: greedy")
    add_depth(parser)
    add_device(parser, has_map=True)
    parser.set_defaults(run=run)


def temperature(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Talk until the user has no more to say; exit status 0."""
    refuse_missing("--target", args.target)
    refuse_missing("--drafter", args.drafter)
    start()
    from ..host.shapes import read_depth
    from .conversation import Conversation
    from .loading import load_pair

    with Progress() as step:
        pair = load_pair(args, step)
    if args.num_draft_tokens is not None:
        pair.drafter.generation_config.num_assistant_tokens = read_depth(args.num_draft_tokens).depth
    conversation = Conversation(pair, max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    for name, what in COMMANDS.items():
        note(f"{name:6}  {what}")
    talk(conversation, pair)
    return 0


def talk(conversation: "Conversation", pair: "Pair") -> None:
    """Read turns and answer them, to the end of stdin or `/quit`."""
    last = ""
    while (turn := read_turn(last)) not in (None, "/quit"):
        last = ""
        if turn == "/clear":
            conversation.clear()
        elif turn in ("/on", "/off"):
            conversation.is_drafting = turn == "/on"
        elif turn.startswith("/") and turn[1:].isalpha():
            note(f"{turn} is no command{did_you_mean(turn, COMMANDS)}: {', '.join(COMMANDS)}")
        elif turn:
            last = answer(conversation, pair, turn)


def read_turn(last: str) -> str | None:
    """The next line of stdin, without spaces around it; None at its end. `last` says what the last answer took."""
    if not sys.stdin.isatty():
        if last:
            note(f"[{last}]")
        line = sys.stdin.readline()
        return line.strip() if line else None
    with suppress(ImportError):
        import readline  # noqa: F401  which lets `input` edit lines, where there is one
    try:
        return input(f"[{last}] > " if last else "> ").strip()
    except EOFError:
        say()
        return None
    except KeyboardInterrupt:
        note("\n/quit or Ctrl-D ends.")
        return ""


def answer(conversation: "Conversation", pair: "Pair", turn: str) -> str:
    """Stream the answer to stdout; what it took, for the next prompt, or nothing if there is none."""
    from ..console.streaming import EscapingStreamer

    streamer = EscapingStreamer(pair.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with noticing_interrupts() as stop:
        try:
            reply = conversation.ask(turn, stop=stop, streamer=streamer)
        except ValueError as error:
            note(f"hf-eagle3: error: {error}")
            return ""
    if stop.is_set():
        say("[stopped]")
    return str(reply)
