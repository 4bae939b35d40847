"""JSONL files of rows, also .gz: read with the line named that is wrong; written so that a run can stop anywhere."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from ...modeling.text_eagle3 import one_line, parse_json, refuse_surrogates, show


def open_rows(path: Path, mode: str) -> IO[str]:
    """Open a JSONL file as text, also .gz; `mode` is r, w or a."""
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, mode + "t", encoding="utf-8"))
    return path.open(mode, encoding="utf-8")


class DataError(ValueError):
    """Rows or settings that cannot be used. The message is one line, with file, line or row, and key."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be read as text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is named .gz, and is no gzip file, or a damaged one: {error}.") from error
    except EOFError as error:
        raise DataError(f"{path} is cut short: its compressed data has no end. Copy or download it again.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder. Give a JSONL file.") from error


class FileRow(dict[str, Any]):
    """A row and its place, for error messages."""

    place: str  # file and line


def read_rows(path: Path) -> Iterator[FileRow]:
    """The rows of a JSONL file.

    Raises:
        DataError: A line is no JSON object, has a key twice or no Unicode text, or the file is no text: the message names
            it.
    """
    with naming(path), open_rows(path, "r") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
                refuse_surrogates(row)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: expected a row of JSON, got {show(line[:60])} ({error})."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object, got {show(line[:60])}.")
            row = FileRow(row)
            row.place = f"{path}, line {number}"
            yield row


# Adds rows to a file, as `append_rows` does.
Append = Callable[[Path, Iterable[Mapping[str, Any]]], None]


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add `rows` to a JSONL file.

    Raises:
        OSError: They could not be written, or not all of them.
    """
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        with open_rows(path, "a") as file:
            file.write(lines)
    except OSError as error:
        raise OSError(
            f"{path} could not be written to: {error}. The rows before stay usable; make room, and run the same command "
            "again to go on after them."
        ) from error


def read_whole_lines(path: Path) -> Iterator[str]:
    """The lines of `path` up to where a stop cut it short, if one did. Nothing if there is no file."""
    if not path.exists():
        return
    if path.suffix == ".gz" and path.stat().st_size and _first_bytes(path) != b"\x1f\x8b":
        raise ValueError(f"{path} is named .gz, and is no gzip file. Give a new file.")
    with naming(path), open_rows(path, "r") as file:
        while True:
            try:
                line = file.readline()
            except (EOFError, zlib.error, gzip.BadGzipFile):  # cut in the middle of a compressed block
                return
            if not line.endswith("\n"):
                return
            yield line


def keep_lines(path: Path, num_lines: int) -> bool:
    """Cut `path` after `num_lines` whole lines; returns whether there was more."""
    if not path.exists() or (sum(1 for _ in read_whole_lines(path)) == num_lines and not _is_cut_short(path)):
        return False
    if path.suffix == ".gz":
        # A compressed file cannot be cut in place; the copy takes its place once it is whole.
        copy = path.with_name(path.name + ".part.gz")
        with open_rows(copy, "w") as file:
            file.writelines(line for _, line in zip(range(num_lines), read_whole_lines(path), strict=False))
        copy.replace(path)
    else:
        with path.open("rb") as lines:
            size = sum(len(line) for _, line in zip(range(num_lines), lines, strict=False))
        os.truncate(path, size)
    return True


def _is_cut_short(path: Path) -> bool:
    last = "\n"
    with open_rows(path, "r") as file:
        try:
            for line in file:
                last = line
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return True
    return not last.endswith("\n")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)
