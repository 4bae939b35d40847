"""`hf-eagle3 export`: a drafter as SGLang or vLLM serves it, or for the Hub."""

import argparse
from pathlib import Path

from transformers import AutoModel
from transformers.utils import logging as host_logging

from ..checkpoints import ENGINES, export
from ..checkpoints.card import check_metrics
from ..console.opening import opening, refuse_drafter, refuse_file, refuse_target
from ..console.quoting import is_repository
from ..console.terminal import say
from ..modeling.text_eagle3 import parse_json
from .arguments import Commands


def add_export_parser(commands: Commands) -> None:
    """The options of `hf-eagle3 export`."""
    parser = commands.add_parser(
        "export",
        help="write a drafter as SGLang or vLLM serves it, or for the Hub",
        description="Writes a folder, loads it back, compares weights and drafts, and prints the line that serves it.",
    )
    parser.add_argument("drafter", metavar="REPO_OR_DIR", help="the drafter, of any flavour")
    parser.add_argument(
        "--to",
        required=True,
        choices=list(ENGINES),
        help="sglang and vllm: one folder for both where both can serve it; speculators: vLLM's own layout; hf: with code and model card",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="an empty or new folder")
    parser.add_argument("--target", metavar="REPO_OR_DIR", help="the model it drafts for")
    parser.add_argument("--metrics", type=Path, metavar="JSON", help="a table from name to number, for the card")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="where it will be published, for the card")
    parser.set_defaults(run=run_export_command)


def run_export_command(args: argparse.Namespace) -> int:
    """Write the folder and print how it is served; exit status 0."""
    host_logging.disable_progress_bar()
    metrics = read_metrics(args.metrics) if args.metrics is not None else None
    if args.repo_id is not None and not is_repository(args.repo_id):
        raise ValueError(
            f"--repo-id {args.repo_id}: the Hub has no such names. Give OWNER/NAME, of letters, digits, - _ ."
        )
    refuse_drafter("DRAFTER", args.drafter)
    if args.target is not None:
        refuse_target("--target", args.target)
    with opening("DRAFTER", args.drafter):
        drafter = AutoModel.from_pretrained(args.drafter)
    say(str(export(drafter, args.out, to=args.to, target=args.target, metrics=metrics, repo_id=args.repo_id)))
    return 0


def read_metrics(path: Path) -> dict[str, float]:
    """The numbers for a model card.

    Raises:
        ValueError: The file is no table from name to number.
    """
    refuse_file("--metrics", path)
    try:
        metrics = parse_json(path.read_text(encoding="utf-8"))
        check_metrics(metrics)
    except ValueError as error:
        raise ValueError(f"--metrics {path}: {error}") from error
    return metrics
