"""Checks of the options of `hf-eagle3 bench` that need nothing heavy, made before anything is imported."""

import argparse
import math
import os
from pathlib import Path

from ..console.paths import refuse_file, refuse_missing

SIMULATIONS = ("simulate_acceptance_length", "simulate_coverage")
PLACES = ("dp_size", "tp_size", "device_map")  # ways to use several devices


def spell(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def refuse_arguments(args: argparse.Namespace) -> None:
    """Raise if the command cannot run with these options.

    Raises:
        ValueError: Names the option, what was expected, and what came.
    """
    refuse_combinations(args)
    refuse_queue(args)
    refuse_numbers(args)
    refuse_out(args.out)
    for name in ("prompts", "simulate_coverage"):
        if getattr(args, name) is not None:
            refuse_file(spell(name), getattr(args, name))
    for name in ("target", "drafter", "dflash_drafter"):
        if getattr(args, name) is not None:
            refuse_missing(spell(name), getattr(args, name))


def refuse_combinations(args: argparse.Namespace) -> None:
    """Raise if options are missing, or exclude each other."""
    if (args.target is None) == (args.shape is None):
        raise ValueError("Give one of --target and --shape.")
    if args.shape and args.prompts:
        raise ValueError("--prompts needs a tokenizer: give --target, not --shape.")
    simulated = [name for name in SIMULATIONS if getattr(args, name) is not None]
    if args.drafter is None and not simulated:
        raise ValueError("Without --drafter there are only random weights: give --simulate-acceptance-length too.")
    if len(simulated) > 1:
        raise ValueError(f"Give one of {' and '.join(map(spell, simulated))}.")
    others = [name for name in args.draft_shapes if not name.isdigit()]
    if others and args.simulate_acceptance_length is not None:
        raise ValueError(
            f"--draft-shapes {' '.join(others)} needs rates by depth and rank, which an acceptance length does not say: give "
            "--simulate-coverage in the place of --simulate-acceptance-length."
        )
    placed = [spell(name) for name in PLACES if getattr(args, name) is not None]
    if len(placed) > 1:
        raise ValueError(f"Give one of {' and '.join(placed)}.")
    if args.shape and placed and placed != ["--dp-size"]:
        raise ValueError(f"{placed[0]} needs a target that can be loaded in parts: give --target, not --shape.")


def refuse_queue(args: argparse.Namespace) -> None:
    """Raise if requests that come and go cannot be measured so, or their options come without them."""
    if not args.open_loop:
        if given := [name for name in ("request_rates", "mean_new_tokens") if getattr(args, name) is not None]:
            raise ValueError(f"{spell(given[0])} is about requests that come and go: give --open-loop, too.")
        return
    for name in (*PLACES, "dflash_drafter"):
        if getattr(args, name) is not None:
            raise ValueError(f"--open-loop does not go with {spell(name)}: leave one of them out.")
    kinds = ("stock", "plain", "drafted")
    if args.draft_shapes or not set(args.kinds) <= set(kinds):
        raise ValueError(f"--open-loop compares {', '.join(kinds)}: leave out other --kinds, and --draft-shapes.")
    for name in ("request_rates", "mean_new_tokens"):
        value_or_values = getattr(args, name)
        for value in value_or_values if isinstance(value_or_values, list) else [value_or_values]:
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{spell(name)} must be above 0; got {value}.")


def refuse_numbers(args: argparse.Namespace) -> None:
    """Raise if a number is out of its range."""
    if args.max_new_tokens < 2:
        raise ValueError(
            f"--max-new-tokens must be at least 2; got {args.max_new_tokens}. The first one comes from the prompt's forward, "
            "and no draft has part in it."
        )
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature must be at least 0; got {args.temperature}.")
    if args.read_bandwidth is not None and not 0 < args.read_bandwidth < math.inf:
        raise ValueError(f"--read-bandwidth must be above 0, in TB/s; got {args.read_bandwidth}.")


def refuse_out(out: Path) -> None:
    """Raise if no file can be written there."""
    if not out.name:
        raise ValueError(f"--out is the name of the files, without suffix; got {str(out)!r}.")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist. Make it first.")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: the folder {out.parent} cannot be written to. Give another.")
