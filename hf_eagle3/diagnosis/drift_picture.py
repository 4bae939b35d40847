"""Measured drift as JSON and a picture."""

import importlib.util
from pathlib import Path

from transformers.utils import logging

from ..console.terminal import to_json
from ..modeling.text_eagle3 import one_line
from .chains import SETS
from .drift import Drift

logger = logging.get_logger(__name__)
LABELS = {"sink": "first token", "prompt": "prompt", "generated": "answer", "own": "the chain itself"}


def write_drift(found: Drift, folder: Path, *, title: str) -> list[Path]:
    """Write `drift.json`, and `drift.png` where matplotlib is there; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "drift.json").write_text(to_json(found.to_dict()) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("No picture: it needs matplotlib (pip install matplotlib).")
        return [folder / "drift.json"]
    draw(found, folder / "drift.png", title=title)
    return [folder / "drift.json", folder / "drift.png"]


def draw(found: Drift, path: Path, *, title: str) -> None:
    """Three panels by depth: what is attended to, what is fed in, what is accepted under each condition."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    attention, size, acceptance = figure.subplots(1, 3)
    depths = list(range(1, len(found.depths) + 1))
    attention.stackplot(
        depths, *([row.mass[name] for row in found.depths] for name in SETS), labels=[LABELS[name] for name in SETS]
    )
    attention.plot(
        depths, [1 - row.uniform for row in found.depths], "k--", linewidth=1, label="the chain, if uniform"
    )
    attention.set(title="attention", xlabel="draft depth", ylim=(0, 1), xlim=(1, len(depths)))
    size.plot(depths, [row.rms for row in found.depths], marker="o")
    size.set(title="RMS of the state fed in", xlabel="draft depth", ylim=(0, None))
    acceptance.errorbar(
        depths,
        [row.acceptance for row in found.depths],
        [row.error for row in found.depths],
        color="k",
        label="as it is",
    )
    named = [(f"{kind}: {curve.name}", curve) for kind, curves in found.curves.items() for curve in curves]
    for i, (name, curve) in enumerate(named):
        acceptance.plot(depths, curve.rates, linewidth=1, color=colormaps["tab20"](i % 20), label=name)
    acceptance.set(title="accepted, if all before were", xlabel="draft depth", ylim=(0, 1))
    attention.legend(fontsize=7, loc="lower left")
    acceptance.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.suptitle(one_line(title).replace("$", r"\$"))  # matplotlib would read a formula
    figure.savefig(path, dpi=120)
