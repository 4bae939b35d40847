"""`hf-eagle3 inspect`: what a drafter is, by its config and the headers of its weights."""

import argparse

from ..checkpoints import describe_drafter
from ..console.opening import opening, refuse_missing
from ..console.terminal import say
from .arguments import Commands


def add_inspect_parser(commands: Commands) -> None:
    """The options of `hf-eagle3 inspect`."""
    parser = commands.add_parser(
        "inspect",
        help="say what a drafter is: flavour, fields and where they come from, sizes, engines",
        description="Reads config.json and the headers of the weights; nothing is loaded.",
    )
    parser.add_argument("drafter", metavar="REPO_OR_DIR", help="a repository on the Hub, or a folder")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--subfolder", help="folder inside the repository")
    parser.set_defaults(run=run_inspect_command)


def run_inspect_command(args: argparse.Namespace) -> int:
    """Print the description; exit status 0."""
    refuse_missing("DRAFTER", args.drafter)
    with opening("DRAFTER", args.drafter):
        found = describe_drafter(args.drafter, revision=args.revision, subfolder=args.subfolder or "")
    say(str(found))
    return 0
