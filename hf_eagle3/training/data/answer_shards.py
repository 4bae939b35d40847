"""Answers that several processes write side by side: a file for each, until they are one, in the order of the prompts."""

import glob
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...modeling.text_eagle3 import parse_json
from .files import Append, append_rows, read_whole_lines
from .prompts import Prompt

AT_ONCE = 256  # prompts whose rows are written together

WRITTEN = {"prompt_id": int, "prompt_fingerprint": str, "num_rows": int}  # in every row

Answer = list[dict[str, Any]]  # the rows of one prompt


def read_answers(path: Path, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    """The answers to `prompts` that are whole in `path`, in its order.

    Raises:
        ValueError: They answer other prompts, or another program wrote them.
    """
    rows: Answer = []
    for number, line in enumerate(read_whole_lines(path), start=1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(type(row.get(key)) is kind for key, kind in WRITTEN.items()):
            raise ValueError(f"{path} was not written by regenerate, so it cannot be gone on with. Give a new file.")
        prompt_id = row["prompt_id"]
        if not 0 <= prompt_id < len(prompts) or row["prompt_fingerprint"] != prompts[prompt_id].fingerprint:
            raise ValueError(
                f"{path} has an answer in line {number} to another prompt than number {prompt_id} of these. Give the prompts "
                "it was begun with (more may follow them), or a new file."
            )
        rows.append(row)
        if len(rows) == row["num_rows"]:
            yield rows
            rows = []


def count_answered(path: Path, prompts: Sequence[Prompt]) -> tuple[int, int]:
    """How many lines of `path` are whole answers, and to how many of `prompts`.

    Raises:
        ValueError: They answer other prompts, or another program wrote them.
    """
    num_lines = num_done = 0
    for rows in read_answers(path, prompts):
        if rows[0]["prompt_id"] != num_done:
            raise ValueError(
                f"{path} answers prompt number {rows[0]['prompt_id']} in line {num_lines + 1}, where number {num_done} "
                "should be. Give a new file."
            )
        num_lines, num_done = num_lines + len(rows), num_done + 1
    return num_lines, num_done


def find_shares(path: Path) -> list[Path]:
    """The files that processes wrote, or write, beside `path`."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.share*{glob.escape(path.suffix)}"))


def name_share(path: Path, number: int) -> Path:
    """Where share `number` of `path` is."""
    return path.with_name(f"{path.name}.share{number}{path.suffix}")


def next_share(path: Path) -> int:
    """The first number that no share of `path` has, nor any behind it."""
    prefix = len(f"{path.name}.share")
    return 1 + max((int(share.name[prefix:].split(".")[0]) for share in find_shares(path)), default=-1)


def gather_shares(path: Path, prompts: Sequence[Prompt], num_done: int, append: Append = append_rows) -> list[int]:
    """Move answers from the shares of `path` to `path`, which answers the first `num_done` of `prompts`, in order.

    Each share is in order by itself. Shares of which nothing is left are deleted; all stay while something is.

    Returns:
        The prompts that neither `path` nor a share answers.
    """
    shares = find_shares(path)
    answers = heapq.merge(*(read_answers(share, prompts) for share in shares), key=lambda rows: rows[0]["prompt_id"])
    ahead: list[int] = []

    def next_in_order() -> Iterator[Answer]:
        number = num_done
        for rows in answers:
            if rows[0]["prompt_id"] == number:
                yield rows
                number += 1
            elif rows[0]["prompt_id"] > number:  # else it is moved already
                ahead.append(rows[0]["prompt_id"])

    ready: Iterable[Answer] = next_in_order()
    while chunk := list(itertools.islice(ready, AT_ONCE)):
        append(path, itertools.chain.from_iterable(chunk))
        num_done += len(chunk)
    if not ahead:
        for share in shares:
            share.unlink()
    return sorted(set(range(num_done, len(prompts))) - set(ahead))
