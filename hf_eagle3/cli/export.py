"""`hf-eagle3 export`: a drafter as SGLang or vLLM serves it, or for the Hub."""

import argparse
from pathlib import Path

from ..checkpoints.engines import ENGINES
from ..console.paths import refuse_file, refuse_missing, refuse_used_folder
from ..console.progress import Progress
from ..console.terminal import say
from ..modeling.text_eagle3 import parse_json
from .arguments import Parser, add_drafter, add_target
from .starting import start


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 export`."""
    parser.description = (
        "Writes a folder, loads it back, compares weights and drafts, and prints the line that serves it."
    )
    add_drafter(parser, "the drafter, of any flavour", in_order=True, required=True)
    parser.add(
        "--to",
        required=True,
        choices=list(ENGINES),
        metavar="ENGINE",
        help="sglang and vllm: one folder for both where both can serve it; speculators: vLLM's own layout; hf: with code "
        "and model card",
    )
    parser.add("--out", type=Path, metavar="OUT", help="an empty or new folder", in_order=True, required=True)
    add_target(parser, "the model it drafts for")
    parser.add("--metrics", type=Path, metavar="JSON", help="a table from name to number, for the card")
    parser.add("--repo-id", metavar="OWNER/NAME", help="where it will be published, for the card")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder and print how it is served; exit status 0."""
    refuse_missing("DRAFTER", args.drafter)
    refuse_used_folder(args.out)
    if args.target is not None:
        refuse_missing("--target", args.target)
    if args.metrics is not None:
        refuse_file("--metrics", args.metrics)
    start()
    from transformers import AutoModel
    from transformers.utils import logging as host_logging

    from ..checkpoints.exporter import export
    from ..console.opening import opening, refuse_drafter, refuse_target
    from ..console.quoting import is_repository

    host_logging.disable_progress_bar()
    metrics = read_metrics(args.metrics) if args.metrics is not None else None
    if args.repo_id is not None and not is_repository(args.repo_id):
        raise ValueError(
            f"--repo-id {args.repo_id}: the Hub has no such names. Give OWNER/NAME, of letters, digits, - _ ."
        )
    refuse_drafter("DRAFTER", args.drafter)
    if args.target is not None:
        refuse_target("--target", args.target)
    with Progress() as step:
        with step.aside("Loading the drafter"), opening("DRAFTER", args.drafter):
            drafter = AutoModel.from_pretrained(args.drafter)
        step("Writing, loading back and comparing")
        found = export(drafter, args.out, to=args.to, target=args.target, metrics=metrics, repo_id=args.repo_id)
    say(str(found))
    return 0


def read_metrics(path: Path) -> dict[str, float]:
    """The numbers for a model card.

    Raises:
        ValueError: The file is no table from name to number.
    """
    from ..checkpoints.card import check_metrics

    try:
        metrics = parse_json(path.read_text(encoding="utf-8"))
        check_metrics(metrics)
    except ValueError as error:
        raise ValueError(f"--metrics {path}: {error}") from error
    return metrics
