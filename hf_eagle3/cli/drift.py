"""`hf-eagle3 drift`: what a drafter attends to and feeds back, depth by depth, and where acceptance goes."""

import argparse
from pathlib import Path

from ..console.paths import refuse_missing, refuse_used_folder
from ..console.progress import Progress
from ..console.terminal import say, say_json
from .arguments import Parser, add_depth, add_device, add_drafter, add_json, add_prompts, add_target, positive
from .starting import start

VARIED = ("noise", "window", "rendering")


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 drift`."""
    parser.description = (
        "The target answers; a chain is drafted behind each position of its answers. By depth: acceptance, size of the "
        "state fed back, attention to the first token, the prompt, the answer and the chain itself, entropy "
        "(arXiv:2605.09992). Then acceptance with noise, windows, longer contexts, and other renderings of the prompt."
    )
    add_target(parser, "the model it drafts for", in_order=True, required=True)
    add_drafter(parser, "the drafter, of any flavour that drafts step by step", in_order=True, required=True)
    add_prompts(parser, "six of ours")
    parser.add("--max-new-tokens", type=positive, default=64, metavar="N", help="tokens for each prompt")
    add_depth(parser, "draft depths to look at, best beyond those trained for", default=8)
    parser.add(
        "--vary", nargs="+", choices=(*VARIED, "nothing"), default=VARIED, help="what is varied besides (all of these)"
    )
    parser.add(
        "--noise",
        type=float,
        nargs="+",
        metavar="X",
        help="noise on the state fed back, as a share of its RMS (0.25 0.5 1)",
    )
    parser.add("--windows", type=positive, nargs="+", metavar="N", help="positions that are attended to (64 256 1024)")
    parser.add(
        "--contexts", type=positive, nargs="+", default=[], metavar="N", help="tokens that prompts are brought to, too"
    )
    add_device(parser, has_map=True)
    parser.add(
        "--out", type=Path, metavar="FOLDER", help="write drift.json and drift.png here (the latter: matplotlib)"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the measures; exit status 0."""
    refuse_missing("--target", args.target)
    refuse_missing("--drafter", args.drafter)
    if args.out is not None:
        refuse_used_folder(args.out, "--out")
    start()
    from ..console.tables import say_table
    from ..diagnosis.drift import NOISE, WINDOWS, Conditions, drift
    from ..diagnosis.drift_picture import write_drift
    from ..diagnosis.readings import PROMPTS
    from .loading import load_pair

    conditions = Conditions(
        noise=tuple(args.noise or NOISE) if "noise" in args.vary else (),
        windows=tuple(args.windows or WINDOWS) if "window" in args.vary else (),
        contexts=tuple(args.contexts),
        templates="rendering" in args.vary,
    )
    with Progress() as step:
        target, drafter, tokenizer = load_pair(args, step)
        found = drift(
            target,
            drafter,
            args.prompt or PROMPTS,
            tokenizer=tokenizer,
            max_new_tokens=args.max_new_tokens,
            depth=args.num_draft_tokens,
            conditions=conditions,
            on_step=step,
        )
    if args.json:
        say_json(found.to_dict())
    else:
        say_table(found.head, found.rows)
        say()
        say_table(found.curve_head, found.curve_rows)
    if args.out is not None:
        for path in write_drift(found, args.out, title=f"{args.drafter} for {args.target}"):
            if not args.json:
                say(f"Wrote {path}")
    return 0
