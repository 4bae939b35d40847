"""Rows from files and from datasets, for the four commands that read rows."""

import json
import sys
from pathlib import Path

import pytest
from helpers.chat import assistant, user, write_rows

from hf_eagle3.training.data.files import DataError
from hf_eagle3.training.data.prompts import read_prompts
from hf_eagle3.training.data.sources import RowSource

pytestmark = pytest.mark.any_release
datasets = pytest.importorskip("datasets")

ROWS = [{"messages": [user(letter), assistant("yes")]} for letter in "abc"]


@pytest.fixture
def folders(tmp_path):
    """One dataset as files, saved, and saved with its splits."""
    (tmp_path / "files").mkdir()
    write_rows(tmp_path / "files/train.jsonl", ROWS)
    write_rows(tmp_path / "files/test.jsonl", ROWS[:1])
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(tmp_path / "splits")
    return tmp_path


def firsts(rows):
    return [row["messages"][0]["content"] for row in rows]


@pytest.mark.parametrize("name", ["files", "saved", "splits"])
def test_folders_of_datasets_are_read(folders, name):
    assert firsts(RowSource(dataset=str(folders / name)).read()) == ["a", "b", "c"]
    if name != "saved":
        assert firsts(RowSource(dataset=str(folders / name), split="test").read()) == ["a"]


def test_rows_of_a_dataset_say_their_place(folders):
    source = RowSource(dataset=str(folders / "files"))
    assert [prompt.user_texts for prompt in read_prompts(source.read_placed())] == [["a"], ["b"], ["c"]]
    write_rows(folders / "files/train.jsonl", [{"messages": [user("d")]}, {"text": "no prompt"}])
    with pytest.raises(DataError, match=r"files, split train, row 5: expected messages"):
        read_prompts(source.read_placed())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--train-file and --dataset-name are not given"),
        ({"file": Path("a"), "dataset": "b"}, "--train-file and --dataset-name both say where rows are"),
        ({"file": Path("files")}, "--train-file files: a folder. A dataset, .* is given by --dataset-name files"),
        ({"dataset": ""}, "--dataset-name is empty"),
        ({"dataset": "damaged"}, "--dataset-name damaged: .*JSON parse error"),
        ({"dataset": "odd"}, "--dataset-name odd: "),
        ({"dataset": "no_lines"}, "--dataset-name no_lines: there is no row in it"),
        (
            {"file": Path("owner/name")},
            "no such file. A dataset, on the Hub or in a folder, is given by --dataset-name",
        ),
        ({"file": Path("rows.jsonl")}, "rows.jsonl: there is no such file"),
        ({"dataset": "files/train.jsonl"}, "a file. Give it by --train-file"),
        ({"dataset": "no/such-thing"}, "--dataset-name no/such-thing: "),
        ({"dataset": "files", "split": "tran"}, "--dataset-name files: .*tran"),
        ({"dataset": "splits", "split": "tran"}, "no split 'tran' in it; it has train, test"),
        ({"file": Path("empty.jsonl")}, "--train-file empty.jsonl: there is no row in it"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(folders, monkeypatch, given, message):
    monkeypatch.chdir(folders)
    Path("empty.jsonl").write_text("\n")
    for name, file, text in (
        ("damaged", "train.jsonl", "{\n"),
        ("odd", "dataset_dict.json", "{}"),
        ("no_lines", "train.jsonl", ""),
    ):
        Path(name).mkdir()
        Path(name, file).write_text(text)
    with pytest.raises((ValueError, OSError), match=message) as told:
        RowSource(**given).read()
    assert "\n" not in str(told.value)


def test_the_package_that_is_needed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the package datasets: pip install 'hf-eagle3\[train\]'"):
        RowSource(dataset="a/b").read()


def test_nulls_that_arrow_fills_in_are_no_content(folders):
    rows = [{"prompt": "a"}, {"turns": ["b", "c"]}]
    (folders / "mixed").mkdir()
    (folders / "mixed/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(RowSource(dataset=str(folders / "mixed")).read_placed())
    assert [prompt.user_texts for prompt in prompts] == [["a"], ["b", "c"]]
