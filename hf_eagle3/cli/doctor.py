"""`hf-eagle3 doctor`: which reading of a drafter's config agrees best with its target."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as host_logging

from ..console.opening import opening, refuse_device, refuse_drafter, refuse_target, refuse_used_folder
from ..console.terminal import note, say
from ..diagnosis.readings import PROMPTS, doctor
from .arguments import DEVICE_MAPS, DTYPES, Commands, positive


def add_doctor_parser(commands: Commands) -> None:
    """The options of `hf-eagle3 doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="measure which reading of a drafter's config agrees best with its target",
        description="The target writes a few hundred tokens; the drafter is read in every plausible way (captured layers, "
        "recurrence, residual, rope, embeddings, d2t), and what each drafts is compared with that text. Exit status 1 if "
        "what is declared is not the best.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", required=True, metavar="REPO_OR_DIR", help="the model it drafts for")
    parser.add_argument("--drafter", required=True, metavar="REPO_OR_DIR", help="the drafter, of any flavour")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to ask; may be given several times (six of ours)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="tokens for each prompt")
    parser.add_argument("--depth", type=positive, default=4, metavar="K", help="draft depths to compare")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, auto (the target over all GPUs), ...")
    parser.add_argument("--pin", type=Path, metavar="OUT", help="write the drafter here as it is best read")
    parser.set_defaults(run=run_doctor_command)


def run_doctor_command(args: argparse.Namespace) -> int:
    """Print the diagnosis; exit status 0, or 1 if the reading that the checkpoint declares is not the best."""
    host_logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    if args.pin is not None:
        refuse_used_folder(args.pin, "--pin")
    if args.device not in DEVICE_MAPS:
        refuse_device(args.device)
    refuse_drafter("--drafter", args.drafter)
    refuse_target("--target", args.target)
    note(f"Loading {args.target} and {args.drafter} ...")
    with opening("--target", args.target):
        tokenizer = AutoTokenizer.from_pretrained(args.target)
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype, device_map=args.device).eval()
    with opening("--drafter", args.drafter):
        drafter = AutoModel.from_pretrained(args.drafter, dtype=dtype, device_map={"": target.device})
    note("Measuring ...")
    found = doctor(
        target,
        drafter,
        args.prompt or PROMPTS,
        tokenizer=tokenizer,
        max_new_tokens=args.max_new_tokens,
        depth=args.depth,
    )
    say(str(found))
    if args.pin is not None:
        found.drafter.save_pretrained(args.pin)
        say(f"The drafter is in {args.pin}, with a config that says how it is best read.")
    return 0 if found.is_declared_best else 1
