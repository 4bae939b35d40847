"""README.md's words, table and picture, and the numbers of others that pages quote."""

import json
import re
import statistics
import xml.etree.ElementTree as ElementTree

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.any_release

BENCHMARKS = ROOT / "benchmarks"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_WORDS = 900
MOST_BYTES = 20_000  # of the picture


@pytest.fixture
def front(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import front_page

    return front_page


def test_the_readme_is_short():
    assert len(README.split()) < MOST_WORDS


def test_the_table_and_the_picture_are_what_the_script_writes(front, tmp_path):
    """After a change of results: python benchmarks/front_page.py."""
    (page := tmp_path / "README.md").write_text(README, encoding="utf-8")
    front.write(page, tmp_path / "speed.svg")
    assert page.read_text(encoding="utf-8") == README
    assert (tmp_path / "speed.svg").read_text() == front.PICTURE.read_text()


def read_cells() -> list[tuple[str, str, str, str]]:
    """Label, cell, its column, and the result it quotes, of the table in README.md."""
    lines = [line.strip("| \n").split(" | ") for line in README.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line[-1] == "result")
    rows = [line for line in lines if len(line) == 5 and line[-1].startswith("[table](")]
    return [(row[0], cell, column, row[-1][8:-1]) for row in rows for cell, column in zip(row[1:], head, strict=True)]


def test_each_number_of_the_table_is_that_of_its_result(front):
    """Read here once more, from the data beside the linked file, by batch size and way."""
    cells = read_cells()
    cells = [cell for cell in cells if re.fullmatch(r"[\d.]+", cell[1])]
    assert len(cells) == len(front.ROWS) * len(front.BATCH_SIZES)
    for label, cell, column, file in cells:
        data = json.loads((ROOT / file).with_suffix(".json").read_text())["results"]
        of_size = [row for row in data if f"BS {row['batch_size']}" == column]
        values = [row.get(name) for row in of_size for name in ("tokens_per_second", "acceptance_length")]
        values += [row.get("tokens_gained_per_round") for row in of_size]
        medians = [statistics.median(value if isinstance(value, list) else [value]) for value in values if value]
        digits = len(cell.partition(".")[2])
        assert float(cell) in [round(value, digits) for value in medians], (label, column)


def test_the_picture_is_small_and_says_what_it_shows(front):
    assert front.PICTURE.stat().st_size < MOST_BYTES
    root = ElementTree.fromstring(front.PICTURE.read_text())
    said = " ".join(root.itertext())
    assert "random weights" in said
    assert "simulated at 2.41" in said
    bars = [float(bar.get("width")) for bar in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    numbers = [front.read_numbers(row) for row in front.BARS]
    longest = [max(column) for column in zip(*numbers, strict=True)]
    expected = [number / most for row in numbers for number, most in zip(row, longest, strict=True)]
    assert len(bars) == len(expected)
    for bar, share in zip(bars, expected, strict=True):
        assert bar / max(bars) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_commits_that_a_page_names_are_in_a_result(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`([0-9a-f]{7})`", text))
    known = {
        commit
        for path in (BENCHMARKS / "results").glob("*.md")
        for commit in re.findall(r"[0-9a-f]{7}", path.read_text())
    }
    assert named <= known
