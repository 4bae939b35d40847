"""What was measured, as Markdown, JSON and a picture."""

import importlib.util
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from .. import __version__
from .measure import DRAFTED, PLAIN, STOCK, Measured

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


def to_markdown(results: list[Measured], *, title: str, notes: Sequence[str]) -> str:
    """The tables: by batch size, and by category where there are some."""
    sizes = sorted({r.batch_size for r in results})
    by_key = {(r.kind, r.batch_size): r for r in results}
    lines = [f"# {title}", "", *notes, "", "Tokens a second, median (slowest to fastest):", ""]
    lines.append("| | " + " | ".join(f"BS {size}" for size in sizes) + " |")
    lines.append("|---|" + "---:|" * len(sizes))
    for kind in dict.fromkeys(r.kind for r in results):
        cells = []
        for size in sizes:
            r = by_key.get((kind, size))
            cells.append("-" if r is None else f"{r.tokens_per_second:.1f} ({r.slowest:.1f} to {r.fastest:.1f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    for name, kind in (("drafting against generate()", STOCK), ("drafting against our loop without", PLAIN)):
        pairs = [(by_key.get((DRAFTED, size)), by_key.get((kind, size))) for size in sizes]
        cells = [
            "-" if a is None or b is None else f"{a.tokens_per_second / b.tokens_per_second:.2f}x" for a, b in pairs
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    drafted = [by_key.get((DRAFTED, size)) for size in sizes]
    for name, show in (
        ("acceptance length", lambda r: f"{r.acceptance_length:.2f}"),
        ("rows identical to generate()", lambda r: f"{r.num_identical} of {r.num_rows}"),
        ("memory beyond weights, GiB", lambda r: "-" if r.peak_gib is None else f"{r.peak_gib:.2f}"),
        ("a round, ms", lambda r: f"{1000 * r.seconds_in['seconds'] / max(r.seconds_in['rounds'], 1):.2f}"),
        (
            "of which draft, ms",
            lambda r: f"{1000 * r.seconds_in['draft_seconds'] / max(r.seconds_in['rounds'], 1):.2f}",
        ),
        ("graphs, first call", lambda r: r.graphs),
    ):
        lines.append(
            f"| {name} | "
            + " | ".join("-" if r is None or r.acceptance_length is None else show(r) for r in drafted)
            + " |"
        )
    categories = {c for r in results for c in r.by_category} - {"random", "all"}
    if categories:
        lines += [
            "",
            "Acceptance length by category:",
            "",
            "| category | " + " | ".join(f"BS {s}" for s in sizes) + " |",
        ]
        lines.append("|---|" + "---:|" * len(sizes))
        order = dict.fromkeys(c for r in results for c in r.by_category)
        for category in order:
            cells = [
                f"{r.by_category[category]['acceptance_length']:.2f}" if r and category in r.by_category else "-"
                for r in drafted
            ]
            lines.append(f"| {category} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_json(results: list[Measured], *, notes: Sequence[str]) -> str:
    """The same as data."""
    return json.dumps({"notes": list(notes), "results": [asdict(r) for r in results]}, indent=1) + "\n"


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
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
