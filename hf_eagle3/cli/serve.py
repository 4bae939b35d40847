"""`hf-eagle3 serve`: Transformers' OpenAI-compatible server, with a drafter. Its options are `transformers serve`'s and ours."""

import argparse
from typing import Any

from ..console.paths import refuse_missing
from .arguments import Parser, add_depth, add_drafter, add_target
from .starting import start

COMPILED = ("--compile", "a drafter's target cannot be compiled")


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 serve` that are ours."""
    parser.description = (
        "Transformers' server (`transformers serve`), its routes, streams and errors, with the drafter attached to TARGET; "
        "with --continuous-batching requests join running rounds, each with its own sampling settings. Further options are "
        "those of `transformers serve`, whose packages `pip install transformers[serving]` installs."
    )
    add_target(parser, "the model to serve", in_order=True, required=True)
    add_drafter(parser, in_order=True, required=True)
    add_depth(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted; exit status 0."""
    own, theirs = split(args.arguments)
    parser = Parser(prog="hf-eagle3 serve")
    add_options(parser)
    found = parser.parse_args(own)
    if COMPILED[0] in theirs:
        raise ValueError(f"{COMPILED[0]}: {COMPILED[1]}: leave it out, or --drafter.")
    refuse_missing("--target", found.target)
    refuse_missing("--drafter", found.drafter)
    start()
    from click import Abort, ClickException
    from transformers.cli.transformers import app

    from ..host.serving import drafting

    settings: dict[str, Any] = {}
    if found.num_draft_tokens is not None:
        settings["num_assistant_tokens"] = found.num_draft_tokens
    try:
        with drafting(found.drafter, **settings):
            app(["serve", found.target, *theirs], standalone_mode=False)
    except ClickException as error:
        raise ValueError(error.format_message().partition("\n")[0]) from None  # a table of options follows
    except Abort:
        raise KeyboardInterrupt from None
    return 0


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Words that are ours, and the host's. What stands alone before any option is ours; an option's value follows it."""
    ours = ("--target", "--model", "--drafter", "--num-draft-tokens", "--help", "-h")
    own: list[str] = []
    theirs: list[str] = []
    to = own
    for word in words:
        if word.startswith("-"):
            to = own if word.partition("=")[0].replace("_", "-") in ours else theirs
        to.append(word)
    return own, theirs
