"""Checks of the options of `hf-eagle3 bench`, made before anything is loaded."""

import argparse
import math
import os
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from ..console.opening import refuse_device, refuse_drafter, refuse_target
from ..host.generate import DEFAULT_DEPTH, resolve_depth
from .prompts import read_questions

PLACES = ("dp_size", "tp_size", "device_map")  # ways to use several devices
LEAST = {
    "batch_sizes": 1,
    "repeats": 1,
    "max_new_tokens": 2,
    "prompt_length": 1,
    "limit": 1,
    "num_draft_tokens": 1,
    "temperature": 0,
}
HINTS = {
    "max_new_tokens": " The first one comes from the prompt's forward, and no draft has part in it.",
    "num_draft_tokens": " Decoding without drafts is --kinds plain.",
}


def spell(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def refuse_arguments(args: argparse.Namespace) -> None:
    """Raise if the command cannot run with these options.

    Raises:
        ValueError: Names the option, what was expected, and what came.
    """
    refuse_combinations(args)
    refuse_numbers(args)
    refuse_device(args.device)
    refuse_out(args.out)
    if args.prompts is not None:
        read_questions(args.prompts, limit=args.limit, at_least=args.dp_size or 1)
    if args.target is not None:
        refuse_target("--target", args.target)
    if args.drafter is not None:
        refuse_drafter("--drafter", args.drafter)
    if args.tp_size is not None and args.tp_size > 1:
        refuse_uneven_shares(args.target, args.tp_size)


def refuse_combinations(args: argparse.Namespace) -> None:
    """Raise if options are missing, or exclude each other."""
    if (args.target is None) == (args.shape is None):
        raise ValueError("Give one of --target and --shape.")
    if args.shape and args.prompts:
        raise ValueError("--prompts needs a tokenizer: give --target, not --shape.")
    if args.drafter is None and args.simulate_acceptance_length is None:
        raise ValueError("Without --drafter there are only random weights: give --simulate-acceptance-length too.")
    placed = [spell(name) for name in PLACES if getattr(args, name) is not None]
    if len(placed) > 1:
        raise ValueError(f"Give one of {' and '.join(placed)}.")
    if args.shape and placed and placed != ["--dp-size"]:
        raise ValueError(f"{placed[0]} needs a target that can be loaded in parts: give --target, not --shape.")


def refuse_numbers(args: argparse.Namespace) -> None:
    """Raise if a number is out of its range; the acceptance length as far as the draft depth is known."""
    for name, least in LEAST.items():
        given = getattr(args, name)
        values = given if isinstance(given, list) else [] if given is None else [given]
        if not all(least <= value < math.inf for value in values):
            raise ValueError(f"{spell(name)} must be at least {least}; got {given}.{HINTS.get(name, '')}")
    if args.read_bandwidth is not None and not 0 < args.read_bandwidth < math.inf:
        raise ValueError(f"--read-bandwidth must be above 0, in TB/s; got {args.read_bandwidth}.")
    is_known = args.num_draft_tokens is not None or args.drafter is None
    depth = (args.num_draft_tokens or DEFAULT_DEPTH) if is_known else None
    refuse_acceptance_length(args.simulate_acceptance_length, depth)


def refuse_acceptance_length(length: float | None, depth: int | None) -> None:
    """Raise if no draft of `depth` tokens can have this acceptance length; a depth of None is not known yet."""
    most = math.inf if depth is None else depth + 1
    if length is None or (1 <= length <= most and length < math.inf):
        return
    wanted = "at least 1, the target's own token" if depth is None else f"between 1 and {most}, the draft depth plus 1"
    hint = "" if depth is None or not length > most else " Or draft deeper: --num-draft-tokens."
    raise ValueError(f"--simulate-acceptance-length must be {wanted}; got {length}.{hint}")


def choose_depth(drafter: PreTrainedModel, given: int | None) -> int:
    """K: the option, or else the drafter's own depth."""
    depth = resolve_depth(given, drafter)
    if depth < 1:
        raise ValueError(
            "The drafter's generation config has num_assistant_tokens=0, no drafts: give --num-draft-tokens."
        )
    return depth


def refuse_out(out: Path) -> None:
    """Raise if no file can be written there."""
    if not out.name:
        raise ValueError(f"--out is the name of the files, without suffix; got {str(out)!r}.")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist. Make it first.")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: the folder {out.parent} cannot be written to. Give another.")


def refuse_uneven_shares(target: str, tp_size: int) -> None:
    """Raise if processes would share a head of the target's attention."""
    config = AutoConfig.from_pretrained(target).get_text_config(decoder=True)
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count % tp_size:
            raise ValueError(
                f"--tp-size {tp_size} does not divide the target's {name}, {count}: give one that does, so that each "
                "process has whole heads."
            )
