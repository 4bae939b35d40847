"""Rows by name: of a JSONL file, or of a dataset on the Hub or in a folder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...console.paths import refuse_sources
from .files import DataError, FileRow, read_rows

SAVED = ("dataset_dict.json", "state.json")  # that `save_to_disk` of the library writes into a folder


@dataclass(frozen=True)
class RowSource:
    """Where rows are, as it was typed: a file, or a dataset with its configuration and split.

    Raises:
        ValueError: Neither is given or both are, or there is no such file.
    """

    file: Path | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    file_option: str = "--train-file"

    def __post_init__(self) -> None:
        refuse_sources(self.file_option, self.file, self.dataset)

    def __str__(self) -> str:
        return f"{self.file_option} {self.file}" if self.file is not None else f"--dataset-name {self.dataset}"

    def read(self) -> list[Mapping[str, Any]] | Any:  # Any: of the library
        """All rows; those of a dataset stay on the disk until they are used.

        Raises:
            DataError: There are none, or a line of a file is no row.
            ValueError: There is no such dataset.
        """
        rows = list(read_rows(self.file)) if self.file is not None else self._load()
        if not len(rows):
            raise DataError(f"{self}: there is no row in it.")
        return rows

    def read_placed(self) -> Iterator[FileRow]:
        """The same one after the other, each with its place for error messages."""
        for row in self.read():
            if not isinstance(row, FileRow):
                row = FileRow(row)
                row.place = f"{self.dataset}, split {self.split}"
            yield row

    def _load(self) -> Any:  # of the library
        try:
            from datasets import load_dataset, load_from_disk
        except ImportError as error:
            raise ImportError(f"{self} needs the package datasets: pip install 'hf-eagle3[train]'.") from error
        assert self.dataset is not None  # or there is a file
        folder = Path(self.dataset)
        if folder.is_file():
            raise DataError(f"{self}: a file. Give it by {self.file_option}.")
        try:
            if not any((folder / name).exists() for name in SAVED):
                return load_dataset(self.dataset, self.config, split=self.split)
            saved = load_from_disk(self.dataset)
        except StopIteration:  # as the library says of files without a line
            return []
        except Exception as error:  # whatever damaged files make the library raise
            cause = error.__cause__ or error  # of a generated dataset the error itself says nothing
            raise DataError(f"{self}: {type(cause).__name__}: {cause}") from error
        if not isinstance(saved, dict):
            return saved
        if self.split not in saved:
            raise DataError(f"{self}: there is no split {self.split!r} in it; it has {', '.join(saved)}.")
        return saved[self.split]
