"""Answers that wait for others: prompts are written in order, and each when all its answers are there.

So that a stop loses one batch, each answer is kept as it comes, in a file beside the one it will be in: `PATH.turnsN`, a
line an answer, until it is written there. A run adds to a file of its own and reads those of earlier runs.
"""

import glob
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...modeling.text_eagle3 import parse_json
from .files import DataError, append_rows, read_whole_lines
from .prompts import Prompt

WRITTEN = {  # in each line
    "prompt_id": (int,),
    "prompt_fingerprint": (str,),
    "temperature": (int, float),
    "sample": (int,),
    "new_ids": (list,),
    "is_ended": (bool,),
}


class Key(NamedTuple):
    """A dialogue: a prompt, answered once at one temperature."""

    prompt_id: int
    temperature: float
    sample: int


class Turn(NamedTuple):
    """One answer of a dialogue."""

    new_ids: list[int]
    is_ended: bool  # by an end of turn, which is among the ids


Turns = dict[Key, list[Turn]]  # in the order of the dialogue


class TurnFile:
    """The file of one process of one run."""

    def __init__(self, path: Path, number: int, prompts: Sequence[Prompt]):
        self._path, self._prompts = path.with_name(f"{path.name}.turns{number}"), prompts

    def add(self, turns: Iterable[tuple[Key, Turn]]) -> None:
        """Keep what was just answered."""
        rows = (
            {**key._asdict(), "prompt_fingerprint": self._prompts[key.prompt_id].fingerprint, **turn._asdict()}
            for key, turn in turns
        )
        append_rows(self._path, rows)

    def clear(self) -> None:
        """Forget it all: it is written."""
        self._path.unlink(missing_ok=True)


def find_turns(path: Path) -> list[tuple[int, Path]]:
    """The files of turns beside `path`, with their numbers, the oldest first."""
    found = path.parent.glob(f"{glob.escape(path.name)}.turns*")
    numbers = {place.name.rpartition(".turns")[2]: place for place in found}
    return sorted((int(number), place) for number, place in numbers.items() if number.isdigit())


def read_turns(path: Path, prompts: Sequence[Prompt], left: Collection[int]) -> Turns:
    """The answers beside `path` to those of `prompts` that are `left`.

    Raises:
        DataError: They answer other prompts, or another program wrote them.
    """
    turns: Turns = {}
    for _, place in find_turns(path):
        for number, line in enumerate(read_whole_lines(place), start=1):
            row = read_turn(line, prompts)
            if row is None:
                raise DataError(
                    f"{place}, line {number}: no answer to one of these prompts. Give the prompts that {path} was begun "
                    "with (more may follow them), or delete it, to answer those prompts again."
                )
            if row["prompt_id"] in left:
                key = Key(row["prompt_id"], row["temperature"], row["sample"])
                turns.setdefault(key, []).append(Turn(row["new_ids"], row["is_ended"]))
    return turns


def read_turn(line: str, prompts: Sequence[Prompt]) -> dict[str, Any] | None:
    """What a line of such a file says; None if it is no answer to one of `prompts`."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not all(type(row.get(key)) in kinds for key, kinds in WRITTEN.items()):
        return None
    is_one = 0 <= row["prompt_id"] < len(prompts)
    return row if is_one and row["prompt_fingerprint"] == prompts[row["prompt_id"]].fingerprint else None
