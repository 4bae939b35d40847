"""`hf-eagle3 inspect`: what a drafter is, by its config and the headers of its weights."""

import argparse

from ..console.paths import refuse_missing
from ..console.terminal import say, say_json
from .arguments import Parser, add_drafter, add_json


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 inspect`."""
    parser.description = "Reads config.json and the headers of the weights; nothing is loaded."
    add_drafter(parser, "a repository on the Hub, or a folder", in_order=True, required=True)
    parser.add("--revision", help="branch, tag or commit of the repository")
    parser.add("--subfolder", help="folder inside the repository")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the description; exit status 0."""
    refuse_missing("DRAFTER", args.drafter)
    from ..checkpoints.describe import describe_drafter
    from ..console.opening import opening

    with opening("DRAFTER", args.drafter):
        found = describe_drafter(args.drafter, revision=args.revision, subfolder=args.subfolder or "")
    if args.json:
        say_json(found.to_dict())
        return 0
    from ..console.tables import say_table

    say("\n".join(found.head) + "\n")
    say_table(("field", "value", "from"), found.rows, left=3)
    say()
    say_table(("engine", "serves it", "how"), found.engines, left=3)
    return 0
