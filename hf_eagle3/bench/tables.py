"""The tables of a run as they grow, the notes above them, and the files they go to."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..console.quoting import quote_code
from ..console.tables import say_table
from ..console.terminal import say
from ..data_parallel import list_arguments
from .loading import Setting
from .prompts import describe_turns
from .reads import Account, Reads
from .report import Grid, advise, describe_machine, draw, short_rows, to_json, to_markdown
from .results import Measured, Skipped


class Tables:
    """The results of all batch sizes so far, and the files they go to."""

    def __init__(self, args: argparse.Namespace, notes: list[str]):
        self.out, self.name, self.notes = args.out, args.shape or Path(args.target).name, notes
        self.results: list[Measured] = []
        self.skipped: list[Skipped] = []
        self.reads: list[Reads] = []
        self.json = ""

    def add(self, results: list[Measured], skipped: list[Skipped], reads: list[Reads]) -> None:
        """Add the results of one batch size."""
        self.results += results
        self.skipped += skipped
        self.reads += reads

    def write(self) -> None:
        """Write Markdown and JSON."""
        both: dict[str, Any] = {"notes": self.notes, "skipped": self.skipped, "reads": self.reads}
        text = to_markdown(self.results, title=f"{self.name}, with and without drafting", **both)
        self.json = to_json(self.results, **both)
        beside(self.out, ".md").write_text(text, encoding="utf-8")
        beside(self.out, ".json").write_text(self.json, encoding="utf-8")

    def finish(self, *, as_json: bool) -> None:
        """Write the picture, and print a short table, or all as JSON."""
        if self.results:
            draw(self.results, beside(self.out, ".png"), title=self.name)
        if as_json:
            say(self.json.rstrip())
            return
        grid = Grid(self.results, self.skipped)
        say_table(["tokens a second", *(f"BS {size}" for size in grid.sizes)], short_rows(grid))
        for number, reason in enumerate(grid.reasons, 1):
            say(f"[{number}] {reason}.")
        if advice := advise(grid):
            say(f"\n{advice}")
        say(f"\nThe long tables are in {beside(self.out, '.md')}, the same as data in {beside(self.out, '.json')}.")


def beside(out: Path, suffix: str) -> Path:
    """`out` with `suffix`; dots in its name stay."""
    return out.with_name(out.name + suffix)


def describe_setting(
    args: argparse.Namespace, setting: Setting, account: Account | None, *, num_processes: int
) -> list[str]:
    """The notes above the tables."""
    simulated = args.simulate_acceptance_length
    first = [
        describe_machine(setting.target) + ".",
        f"{args.dtype}, draft depth {setting.depth}, "
        f"{'greedy' if args.temperature == 0 else f'temperature {args.temperature}'}, "
        f"{args.max_new_tokens} new tokens, {args.repeats} repeats"
        + (f", acceptance length simulated at {simulated}" if simulated is not None else "")
        + (", acceptance simulated by rates of each depth and rank" if args.simulate_coverage is not None else "")
        + (
            "; speed of decoding alone, from two lengths." if setting.plan.subtract else "; speed over the whole call."
        ),
    ]
    if account is None:
        further = ["What weights cost to read is left out: some are no whole parameters of the target."]
    else:
        further = [f"Read bandwidth {account.bandwidth / 1e12:.2f} TB/s, {account.how}."]
    if setting.questions is not None and (cut := describe_turns(setting.questions)):
        further.append(cut)
    if args.device_map is not None:
        device_map = getattr(setting.target, "hf_device_map", {"": setting.target.device})
        places = sorted(map(str, set(device_map.values())))
        further.append(f"The target is spread over {', '.join(places)}; memory is that of the first.")
    if args.tp_size is not None:
        further.append(
            f"{args.tp_size} processes share the target by tensor parallelism; memory is that of the first."
        )
    if num_processes > 1:
        further.append(
            f"{num_processes} processes, each with its share of the prompts on its own device, in batches of the size "
            "given; tokens of all over the time of the slowest."
        )
    return [*first, *further, quote_code(shlex.join(["hf-eagle3", "bench", *list_arguments(for_report(args))]))]


def for_report(args: argparse.Namespace) -> argparse.Namespace:
    """The command's arguments without --out and --json, and of paths the last part."""
    paths, left_out = ("target", "drafter", "prompts", "dflash_drafter", "simulate_coverage"), ("out", "json")
    shown = {n: Path(v).name if n in paths and v is not None else v for n, v in vars(args).items()}
    return argparse.Namespace(**{name: value for name, value in shown.items() if name not in left_out})
