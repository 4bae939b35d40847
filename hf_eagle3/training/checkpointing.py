"""Checkpoints that are there whole or not at all, whenever a run is killed, and finding the newest one that is.

A checkpoint is written beside its place and renamed once it is complete, so a folder `checkpoint-N` never holds half of
one. Later damage by a disk or a copy is found by the sizes and digests that are written with it.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .states.folder import digest

logger = logging.get_logger(__name__)

# The host uploads nothing from an output folder that begins with an underscore.
SAVING, REPLACED = "_saving", "_replaced"  # a checkpoint that is being written, and one that it replaces
SEAL_FILE = "hf_eagle3_files.json"  # sizes and digests of a checkpoint's files
STATE_FILE = "trainer_state.json"  # the host's; it writes it last
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


# ---- writing ----


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A new folder, whose files replace those in `folder` when the block ends, each in one step."""
    beside = folder / SAVING
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in beside.iterdir():
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def publish(folder: Path, place: Path) -> None:
    """Seal the finished checkpoint in `folder` and rename it to `place`, replacing one that is there."""
    seal(folder)
    if place.exists():
        replaced = place.parent / REPLACED / place.name
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.parent.mkdir(exist_ok=True)
        place.replace(replaced)
    folder.replace(place)
    shutil.rmtree(place.parent / REPLACED, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write down the size and digest of each file in `folder`, and have the disk keep all of them."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL_FILE]
    facts = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in paths}
    (folder / SEAL_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for path in [*paths, folder / SEAL_FILE]:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def tidy(output_dir: Path) -> None:
    """Clean up after a run that was killed in a save: delete the unfinished checkpoint, restore the one it was to replace."""
    shutil.rmtree(output_dir / SAVING, ignore_errors=True)
    for replaced in (output_dir / REPLACED).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (output_dir / replaced.name).exists():
            replaced.replace(output_dir / replaced.name)
    shutil.rmtree(output_dir / REPLACED, ignore_errors=True)


# ---- reading ----


def find_whole_checkpoint(output_dir: Path) -> Path:
    """The newest whole checkpoint in `output_dir`; newer ones that are damaged are named in a warning.

    Raises:
        ValueError: There is none.
    """
    found = sorted(find_checkpoints(output_dir), key=_step_of, reverse=True)
    damages: list[str] = []
    for folder in found:
        if not (damage := find_damage(folder)):
            if damages:
                logger.warning(f"{'; '.join(damages)}. Going on from {folder}, the newest whole checkpoint.")
            return folder
        damages.append(f"{folder} is damaged ({'; '.join(damage)})")
    detail = f": {'; '.join(damages)}" if damages else ""
    raise ValueError(
        f"There is no {'whole ' if damages else ''}checkpoint to resume from in {output_dir}{detail}. Start anew, by "
        "leaving out resume_from_checkpoint, or name a folder."
    )


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The folders in `output_dir` that are named as checkpoints."""
    if not output_dir.is_dir():
        return []
    return [path for path in output_dir.iterdir() if path.is_dir() and NAME.fullmatch(path.name)]


def check_whole(folder: Path) -> None:
    """Raise ValueError if `folder` is no whole checkpoint; the message names the files that are damaged."""
    if not folder.is_dir():
        others = ", ".join(path.name for path in sorted(find_checkpoints(folder.parent), key=_step_of)) or "none"
        raise ValueError(
            f"resume_from_checkpoint: there is no folder {folder}. Checkpoints in {folder.parent}: {others}. True takes "
            "the newest in output_dir."
        )
    if damage := find_damage(folder):
        raise ValueError(
            f"{folder} cannot be resumed from: {'; '.join(damage)}. Name another checkpoint, or True for the newest "
            f"whole one in output_dir. If you changed a file yourself, delete {SEAL_FILE} there."
        )


def find_damage(folder: Path) -> list[str]:
    """The damages of a checkpoint's files, one line each; empty if it is whole."""
    seal_path = folder / SEAL_FILE
    if not seal_path.exists():
        return _find_unreadable(folder)
    facts = _read_json(seal_path)
    if not isinstance(facts, dict):
        return [f"{SEAL_FILE} cannot be read"]
    wrong = [_compare(folder / name, name, known) for name, known in facts.items()]
    return [line for line in wrong if line is not None]


def _compare(path: Path, name: str, known: Any) -> str | None:
    """The damage of a sealed file; None if it is whole."""
    if not path.is_file():
        return f"{name} is missing"
    if not isinstance(known, dict):
        return f"{SEAL_FILE} cannot be read"
    if (size := path.stat().st_size) != known.get("bytes"):
        return f"{name} has {size} bytes and was written with {known.get('bytes')}"
    return None if digest(path) == known.get("sha256") else f"{name} is not as it was written"


def _find_unreadable(folder: Path) -> list[str]:
    """The damages of a checkpoint without a seal, written by the host or an earlier version: each file is opened."""
    wrong = [] if (folder / STATE_FILE).exists() else [f"{STATE_FILE}, which is written last, is missing"]
    if not any(path.suffix in (".safetensors", ".bin") and "model" in path.name for path in folder.rglob("*")):
        wrong.append("the weights are missing")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        is_whole = READERS.get(path.suffix)
        if is_whole is not None and not is_whole(path):
            wrong.append(f"{path.relative_to(folder)} is empty or cut short")
    return wrong


def _is_json(path: Path) -> bool:
    return _read_json(path) is not None


def _read_json(path: Path) -> Any:  # any JSON; None where it cannot be read
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


# Checks that a file is whole, by suffix: safetensors knows its length, and torch.save ends its files with a table.
READERS = {
    ".json": _is_json,
    ".safetensors": _is_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), zipfile.is_zipfile),
}


def _step_of(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1
