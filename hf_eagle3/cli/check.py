"""`hf-eagle3 check`: whether a drafter leaves the text as it is, how fast it makes it, and what would help."""

import argparse

from ..console.paths import refuse_missing
from ..console.progress import Progress
from ..console.terminal import say, say_json
from .arguments import Parser, add_depth, add_device, add_drafter, add_json, add_prompts, add_target, positive
from .starting import start

NUM_PROMPTS = 3  # of the doctor's


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 check`."""
    parser.description = (
        "The target answers a few prompts greedily without and with the drafter, by turns: twenty seconds for a small one. "
        "Says whether the texts are equal, how fast both are, and in a sentence what would help. Exit status 1 if texts "
        "differ, other than at a tie in 16 bits."
    )
    add_target(parser, in_order=True, required=True)
    add_drafter(parser, in_order=True, required=True)
    add_prompts(parser, "up to three of ours, as they fit in a few seconds")
    parser.add("--max-new-tokens", type=positive, default=32, metavar="N", help="longest answer, in tokens")
    add_depth(parser)
    add_device(parser, has_map=True)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the verdict; exit status 0, or 1 if texts differ."""
    refuse_missing("--target", args.target)
    refuse_missing("--drafter", args.drafter)
    start()
    from ..bench.check import check
    from ..bench.side_by_side import read_load
    from ..diagnosis.readings import PROMPTS
    from .loading import load_pair

    load = read_load()
    with Progress() as step:
        pair = load_pair(args, step)
        found = check(
            *pair,
            args.prompt or PROMPTS[:NUM_PROMPTS],
            load=load,
            least=None if args.prompt else 1,
            max_new_tokens=args.max_new_tokens,
            depth=args.num_draft_tokens,
            on_step=step,
        )
    if args.json:
        say_json(found.to_dict())
    else:
        say(str(found))
    return 0 if found.is_equal else 1
