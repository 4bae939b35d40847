"""`hf-eagle3 doctor`: which reading of a drafter's config agrees best with its target."""

import argparse
from pathlib import Path

from ..console.paths import refuse_missing, refuse_used_folder
from ..console.progress import Progress
from ..console.terminal import say, say_json
from .arguments import Parser, add_depth, add_device, add_drafter, add_json, add_prompts, add_target, positive
from .starting import start


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 doctor`."""
    parser.description = (
        "The target writes a few hundred tokens; the drafter is read in every plausible way (captured layers, recurrence, "
        "residual, rope, embeddings, d2t; of a block drafter its mask token, the size of blocks, what their places propose and "
        "see), and what each drafts is compared with that text. Exit status 1 if what is "
        "declared is not the best."
    )
    add_target(parser, "the model it drafts for", in_order=True, required=True)
    add_drafter(parser, "the drafter, of any flavour", in_order=True, required=True)
    add_prompts(parser, "six of ours")
    parser.add("--max-new-tokens", type=positive, default=64, metavar="N", help="tokens for each prompt")
    add_depth(parser, "draft depths to compare", default=4)
    add_device(parser, has_map=True)
    parser.add("--pin", type=Path, metavar="OUT", help="write the drafter here as it is best read")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; exit status 0, or 1 if the reading that the checkpoint declares is not the best."""
    refuse_missing("--target", args.target)
    refuse_missing("--drafter", args.drafter)
    if args.pin is not None:
        refuse_used_folder(args.pin, "--pin")
    start()
    from ..console.tables import say_table
    from ..diagnosis.readings import PROMPTS, doctor
    from .loading import load_pair

    with Progress() as step:
        target, drafter, tokenizer = load_pair(args, step)
        found = doctor(
            target,
            drafter,
            args.prompt or PROMPTS,
            tokenizer=tokenizer,
            max_new_tokens=args.max_new_tokens,
            depth=args.num_draft_tokens,
            on_step=step,
        )
    if args.json:
        say_json(found.to_dict())
    else:
        say_table(found.head, found.rows)
        say(f"\n{found.verdict}")
    if args.pin is not None:
        found.drafter.save_pretrained(args.pin)
        if not args.json:
            say(f"The drafter is in {args.pin}, with a config that says how it is best read.")
    return 0 if found.is_declared_best else 1
