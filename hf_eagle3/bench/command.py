"""`hf-eagle3 bench`."""

import argparse
import itertools
from dataclasses import replace
from functools import partial

import torch

from ..console.devices import choose_device
from ..console.progress import Progress
from ..console.terminal import note
from ..data_parallel import Team, list_arguments, must_launch
from .arguments import spell
from .equality import OutputDiffersError
from .loading import STEPS, Steps, load_setting, make_batches, refuse_models
from .measure import measure
from .reads import account_for, make_account
from .tables import Tables, describe_setting


def run_bench(args: argparse.Namespace, steps: Steps = STEPS) -> int:
    """Measure, print and write.

    Returns:
        0, or 1 if a text differs from that of `generate`, or nothing was measured.
    """
    args.device = choose_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")  # few CPUs have fast half precision
    refuse_models(args)
    for name in ("dp_size", "tp_size"):
        if must_launch(getattr(args, name), spell(name)):
            return steps.launch(getattr(args, name), ["bench", *list_arguments(args)])
    with Team(torch.device(args.device), is_one=args.tp_size is not None) as team:
        try:
            has_results, problem = measure_all(args, team, steps), "nothing could be measured; the tables say why."
        except OutputDiffersError as error:
            has_results, problem = False, str(error)
        if not has_results and team.rank == 0:
            note(f"hf-eagle3: error: {problem}")
    return 0 if has_results else 1


def measure_all(args: argparse.Namespace, team: Team, steps: Steps) -> bool:
    """Every batch size, and the files after each of them; whether anything was measured.

    Raises:
        OutputDiffersError: A text differs from that of `generate`.
    """
    with Progress(is_silent=team.rank > 0) as step:
        tables = measure_sizes(args, team, steps, step)
    if team.rank == 0:
        tables.finish(as_json=args.json)
    return bool(tables.results)


def measure_sizes(args: argparse.Namespace, team: Team, steps: Steps, step: Progress) -> Tables:
    """Every batch size, one after the other."""
    with step.aside("Loading the models"):
        setting = load_setting(args, team, steps)
    step("Measuring how fast weights are read")
    account = make_account(setting.target, setting.drafter, setting.depth, args.read_bandwidth)
    tables = Tables(args, describe_setting(args, setting, account, num_processes=team.size))
    num_passes = len(args.batch_sizes) * len(setting.ways) * (args.repeats + 1)
    passes = itertools.count()
    for size in args.batch_sizes:
        on_run = partial(lambda size: step(f"Batch size {size}", next(passes), num_passes), size)
        found, missing = measure(
            *(setting.target, setting.ways, make_batches(setting, args, size, team)),
            replace(setting.plan, batch_size=size),
            team=team,
            judged=setting.judged,
            on_run=on_run,
        )
        reads = account_for(found, account, depth=setting.depth, num_processes=team.size) if account else []
        tables.add(found, missing, reads)
        if team.rank == 0:  # after each batch size, so that results are kept if a later one fails
            tables.write()
    return tables
