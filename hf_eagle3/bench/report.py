"""Results as Markdown, JSON and a picture."""

import importlib.util
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from .. import __version__
from ..console import terminal
from ..console.quoting import quote_markdown
from ..modeling.text_eagle3 import one_line
from .names import DFLASH, DRAFTED, LOOKUP, PLAIN, STOCK, is_drafting
from .reads import Reads
from .results import Measured, Skipped
from .ways import OF_OTHERS

logger = logging.getLogger(__name__)


def describe_machine(target: PreTrainedModel) -> str:
    """Device and versions."""
    device = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else platform.machine() + " CPU"
    triton = ""
    if target.device.type == "cuda":
        import triton as triton_module

        triton = f", triton {triton_module.__version__}"
    versions = f"torch {torch.__version__}{triton}, transformers {transformers.__version__}, hf-eagle3 {__version__}"
    return f"{device}, {versions}, Python {platform.python_version()}"


def to_markdown(
    results: Sequence[Measured],
    *,
    title: str,
    notes: Sequence[str],
    skipped: Sequence[Skipped] = (),
    reads: Sequence[Reads] = (),
) -> str:
    """The tables: by batch size, by category where there are some, and what weights cost to read."""
    grid = Grid(results, skipped)
    lines = [
        *(f"# {quote_markdown(title)}", "", *notes, "", "Tokens a second, median (slowest to fastest):", ""),
        *grid.head("| |"),
        *speed_rows(grid),
        *ratio_rows(grid),
        *detail_rows(grid),
        *(f"\n[^{i}]: {reason}." for i, reason in enumerate(grid.reasons, 1)),
        *agreement_lines(results),
        *category_lines(grid),
        *shape_lines(grid),
        *read_lines(reads),
    ]
    return "\n".join(lines) + "\n"


class Grid:
    """Results by kind and batch size; a column is a batch size."""

    def __init__(self, results: Sequence[Measured], skipped: Sequence[Skipped]):
        every: list[Measured | Skipped] = [*results, *skipped]
        self.results = results
        self.kinds = list(dict.fromkeys(r.kind for r in every))
        self.sizes = sorted({r.batch_size for r in every})
        self.reasons = list(dict.fromkeys(s.reason for s in skipped))
        self._by_key = {(r.kind, r.batch_size): r for r in results}
        self._notes = {(s.kind, s.batch_size): self.reasons.index(s.reason) + 1 for s in skipped}

    def head(self, corner: str) -> list[str]:
        """The first two lines of a table."""
        return [
            corner + " " + " | ".join(f"BS {size}" for size in self.sizes) + " |",
            "|---|" + "---:|" * len(self.sizes),
        ]

    def row(self, kind: str) -> list[Measured | None]:
        """The results of a kind, by batch size."""
        return [self._by_key.get((kind, size)) for size in self.sizes]

    def marks(self, kind: str, mark: str = "- [^{}]") -> list[str]:
        """Cells for missing results: a dash, with the number of a footnote where a run failed."""
        notes = [self._notes.get((kind, size)) for size in self.sizes]
        return ["-" if note is None else mark.format(note) for note in notes]


def join_cells(name: str, cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {name} | " + " | ".join(cells) + " |"


def short_rows(grid: Grid) -> list[list[str]]:
    """What a terminal shows: the name of a row, and its cells."""
    speeds = [
        [kind, *(f"{r.tokens_per_second:.1f}" if r else mark for r, mark in zip(grid.row(kind), marks, strict=True))]
        for kind, marks in ((kind, grid.marks(kind, "- [{}]")) for kind in grid.kinds)
    ]
    acceptance = [show_number(r.acceptance_length) if r else "-" for r in grid.row(DRAFTED)]
    return [*speeds, *ratios(grid), ["acceptance length", *acceptance]]


def advise(grid: Grid) -> str:
    """At which batch sizes drafting pays, in a sentence; nothing where it was not measured beside something else."""
    baseline = STOCK if any(grid.row(STOCK)) else PLAIN
    ratios_by_size = {
        size: ours.tokens_per_second / other.tokens_per_second
        for size, ours, other in zip(grid.sizes, grid.row(DRAFTED), grid.row(baseline), strict=True)
        if ours is not None and other is not None
    }
    pays = [str(size) for size, ratio in ratios_by_size.items() if ratio > 1]
    costs = [str(size) for size, ratio in ratios_by_size.items() if ratio <= 1]
    if not ratios_by_size:
        return ""
    if not pays:
        return f"Drafting does not pay here: at no batch size is it faster than {baseline}."
    most = f"Drafting is up to {max(ratios_by_size.values()):.2f} times as fast as {baseline}"
    return f"{most}, at batch sizes {', '.join(pays)}{'; leave it out at ' + ', '.join(costs) if costs else ''}."


def speed_rows(grid: Grid) -> list[str]:
    """Tokens a second."""
    return [
        join_cells(
            kind,
            [
                mark if r is None else f"{r.tokens_per_second:.1f} ({r.slowest:.1f} to {r.fastest:.1f})"
                for r, mark in zip(grid.row(kind), grid.marks(kind), strict=True)
            ],
        )
        for kind in grid.kinds
    ]


def ratio_rows(grid: Grid) -> list[str]:
    """Drafting against other kinds, as lines of a table."""
    return [join_cells(name, cells) for name, *cells in ratios(grid)]


def ratios(grid: Grid) -> list[list[str]]:
    """Drafting against other kinds; those of other people only where they ran."""
    rows = []
    for name, kind in RATIOS.items():
        cells = [
            "-" if ours is None or other is None else f"{ours.tokens_per_second / other.tokens_per_second:.2f}x"
            for ours, other in zip(grid.row(DRAFTED), grid.row(kind), strict=True)
        ]
        if kind not in OF_OTHERS or set(cells) != {"-"}:
            rows.append([name, *cells])
    return rows


def detail_rows(grid: Grid) -> list[str]:
    """Acceptance, memory and the time of a round; rows of D-Flash only where it ran."""
    return [
        join_cells(name, [(show(r) if r is not None else "") or "-" for r in grid.row(kind)])
        for name, kind, show in DETAILS
        if kind == DRAFTED or any(grid.row(kind))
    ]


def category_lines(grid: Grid) -> list[str]:
    """Acceptance length by category of prompts."""
    names = dict.fromkeys(c for r in grid.results for c in r.by_category if c not in ("random", "all"))
    lines = []
    for title, kind in (("Acceptance length by category", DRAFTED), ("The same of D-Flash", DFLASH)):
        found = grid.row(kind)
        if not names or not any(found):
            continue
        lines += ["", f"{title}:", "", *grid.head("| category |")]
        for name in names:
            cells = [
                show_number(r.by_category[name]["acceptance_length"]) if r and name in r.by_category else "-"
                for r in found
            ]
            lines.append(join_cells(quote_markdown(name), cells))
    return lines


def shape_lines(grid: Grid) -> list[str]:
    """Drafting by shape, where several were measured: against the kind above, and what rounds drafted."""
    results = [r for r in grid.results if is_drafting(r.kind)]
    if not any(r.kind != DRAFTED for r in results):
        return []
    lines = [
        *("", "By what a round drafts:", ""),
        "| | BS | tokens a second | times drafting | acceptance length | rounds by shape |",
        "|---|---:|---:|---:|---:|---|",
    ]
    fixed = {r.batch_size: r.tokens_per_second for r in results if r.kind == DRAFTED}
    return lines + [
        f"| {r.kind} | {r.batch_size} | {r.tokens_per_second:.1f} | "
        f"{show_number(r.tokens_per_second / fixed[r.batch_size] if r.batch_size in fixed else None)} | "
        f"{show_number(r.acceptance_length)} | {', '.join(f'{name} {count}' for name, count in r.shapes.items())} |"
        for r in results
    ]


def show_number(number: float | None) -> str:
    """Two digits after the point; a dash for none."""
    return "-" if number is None else f"{number:.2f}"


def show_identical(result: Measured) -> str:
    """Rows whose text is that of generate()."""
    return "-" if result.num_identical is None else f"{result.num_identical} of {result.num_rows}"


def show_round(result: Measured, name: str) -> str:
    """Milliseconds of a round."""
    rounds = result.seconds_in.get("rounds", 0)
    return f"{1000 * result.seconds_in[name] / rounds:.2f}" if rounds > 0 else "-"


RATIOS = {
    "drafting against generate()": STOCK,
    "drafting against our loop without": PLAIN,
    "drafting against prompt lookup": LOOKUP,
    "drafting against D-Flash": DFLASH,
}
# The name of a row, the kind it is about, and its cell.
DETAILS: list[tuple[str, str, Callable[[Measured], str]]] = [
    ("acceptance length", DRAFTED, lambda r: show_number(r.acceptance_length)),
    ("acceptance rate by depth", DRAFTED, lambda r: " / ".join(map(show_number, r.acceptance_rate_by_depth))),
    ("acceptance length of D-Flash", DFLASH, lambda r: show_number(r.acceptance_length)),
    ("rows identical to generate()", DRAFTED, show_identical),
    ("rows of D-Flash identical to generate()", DFLASH, show_identical),
    ("memory beyond weights, GiB", DRAFTED, lambda r: show_number(r.peak_gib)),
    ("of which keys and values, GiB", DRAFTED, lambda r: show_number(r.cache_gib)),
    ("a round, ms", DRAFTED, lambda r: show_round(r, "seconds")),
    ("of which draft, ms", DRAFTED, lambda r: show_round(r, "draft_seconds")),
    ("of which verify and all else, ms", DRAFTED, lambda r: show_round(r, "verify_seconds")),
    ("of which accept, ms", DRAFTED, lambda r: show_round(r, "accept_seconds")),
    ("of which processors and streamers, ms", DRAFTED, lambda r: show_round(r, "host_seconds")),
    ("graphs, first call", DRAFTED, lambda r: r.graphs),
]


def agreement_lines(results: Sequence[Measured]) -> list[str]:
    """The comparison with greedy `generate`, made before anything was timed."""
    compared = [r for r in results if r.agreement is not None]
    if not compared:
        return []
    lines = ["", "Compared with greedy `generate()` before anything was timed:", ""]
    return lines + [f"- {r.kind}, BS {r.batch_size}: {r.agreement}." for r in compared]


def read_lines(reads: Sequence[Reads]) -> list[str]:
    """The cost of reading weights, beside the time of a round."""
    if not reads:
        return []
    lines = [
        "",
        "Weights that a round reads (of a mixture, the experts a layer that its tokens are expected to choose if routing "
        "is uniform), the time that takes at the read bandwidth, and a round at the speed above:",
        "",
        "| | BS | tokens | experts | weights, GiB | read in, ms | a round, ms | times |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    return lines + [
        f"| {r.kind} | {r.batch_size} | {r.num_tokens} | {'-' if r.num_experts is None else f'{r.num_experts:.1f}'} | "
        f"{r.num_bytes / 2**30:.2f} | {r.milliseconds:.2f} | {r.measured_milliseconds:.2f} | "
        f"{r.measured_milliseconds / r.milliseconds:.2f} |"
        for r in reads
    ]


def to_json(
    results: Sequence[Measured],
    *,
    notes: Sequence[str],
    skipped: Sequence[Skipped] = (),
    reads: Sequence[Reads] = (),
) -> str:
    """The same as data."""
    found = {
        "notes": list(notes),
        "results": [asdict(r) for r in results],
        "skipped": [s._asdict() for s in skipped],
        "reads": [asdict(r) for r in reads],
    }
    return terminal.to_json(found)


def draw(results: list[Measured], path: Path, *, title: str) -> None:
    """A bar chart of speed by batch size, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("No picture: it needs matplotlib (pip install matplotlib).")
        return
    from matplotlib.figure import Figure

    sizes = sorted({r.batch_size for r in results})
    kinds = list(dict.fromkeys(r.kind for r in results))
    figure = Figure(figsize=(3 * len(sizes) + 1, 3.2), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for i, kind in enumerate(kinds):
            found = [r for r in results if (r.kind, r.batch_size) == (kind, size)]
            for r in found:
                span = [[r.tokens_per_second - r.slowest], [r.fastest - r.tokens_per_second]]
                axes.bar(i, r.tokens_per_second, yerr=span, capsize=3, label=kind, color=f"C{i}")
        axes.set_title(f"batch {size}")
        axes.set_xticks([])
        axes.set_ylabel("tokens/s")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(kinds))
    figure.suptitle(one_line(title).replace("$", r"\$"))  # matplotlib would read a formula
    figure.savefig(path, dpi=120)
