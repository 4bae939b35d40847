"""Results in `benchmarks/results/`: the table of them is made from their heads, and what quotes them says the same."""

import re

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.any_release

BENCHMARKS = ROOT / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.md"))
FILE = r"[a-z0-9_]+_(?:h100|h200|cpu)_\d{6}\.(?:md|jsonl?|png)"
COMMAND = re.compile(r"`[^`]*\b(?:python|hf-eagle3|torchrun|pytest) [^`]+`|with the scripts as they ran")
MACHINE = {"h100": "H100", "h200": "H200", "cpu": "CPU|AMD|Intel"}
PAGES = [ROOT / "README.md", BENCHMARKS / "README.md", *sorted((ROOT / "docs").glob("*.md")), *RESULTS]


@pytest.fixture
def index(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import index_results

    return index_results


def test_the_table_in_the_readme_is_the_one_of_the_files_heads(index):
    """After a change in `results/`: python benchmarks/index_results.py."""
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert text.count(index.BEGIN) == text.count(index.END) == 1
    assert text.partition(index.BEGIN)[2].partition(index.END)[0] == index.table()


def test_writing_the_table_changes_nothing_else(index, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{index.BEGIN}an old table\n{index.END}\nafter\n")
    index.write_table(page)
    assert page.read_text() == f"before\n{index.BEGIN}{index.table()}{index.END}\nafter\n"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_head_says_what_ran_where_and_how(path, index):
    head = index.read_head(path)
    assert COMMAND.search(head.text), "no command before the first table"
    assert re.search(MACHINE[head.machine], head.text), f"the name says {head.machine}, the head does not"


def test_titles_tell_results_apart(index):
    heads = [index.read_head(path) for path in RESULTS]
    assert len({(head.title, head.machine) for head in heads}) == len(heads)


def test_every_file_is_a_result_or_its_data(index):
    for path in (BENCHMARKS / "results").iterdir():
        assert path.suffix in (".md", *index.DATA), path.name
        assert path.with_suffix(".md") in RESULTS, f"{path.name} has no .md of its name"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("speed_a100_202611.md", "# Speed\n\nCommit `0123abc`.\n", "a GPU of h100, h200 or cpu"),
        ("speed_h200_202611.md", "NVIDIA H200, commit `0123abc`.\n", "in the first line"),
        ("speed_h200_202611.md", "# Speed\n\nNVIDIA H200.\n\n| commit |\n|---|\n| `0123abc` |\n", "expected `COMMIT`"),
    ],
    ids=["another machine", "no title", "no commit"],
)
def test_a_head_that_does_not_say_is_refused(name, text, why, index, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=why):
        index.read_head(tmp_path / name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_results_that_a_page_names_are_there_or_have_their_commit(page):
    text = re.sub(rf"git show [0-9a-f]{{7}}:benchmarks/results/{FILE}", "", page.read_text(encoding="utf-8"))
    missing = {name for name in re.findall(rf"\b{FILE}", text) if not (BENCHMARKS / "results" / name).exists()}
    assert not missing, "write git show COMMIT:benchmarks/results/FILE"


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d)[ ,](?=\d{3}\b)", "", text))]


@pytest.mark.parametrize("page", PAGES[:2], ids=["README", "benchmarks"])
def test_numbers_beside_a_result_are_in_it(page):
    """Each cell of a row that ends with a link to a result, as rounded there, or the middle of `a to b`."""
    rows = 0
    for line in page.read_text(encoding="utf-8").splitlines():
        row = re.fullmatch(r"\| (.+) \| \[[^|]+\]\(([^|)]*results/[^|)]+\.md)\) \|", line)
        if row is None:
            continue
        text = (page.parent / row[2]).read_text(encoding="utf-8")
        spans = re.findall(r"(\d[\d.]*) to (\d[\d.]*)", text)
        known = numbers_in(text) + [(float(low.rstrip(".")) + float(high.rstrip("."))) / 2 for low, high in spans]
        for cell in row[1].split(" | ")[1:]:
            for number in re.findall(r"^\**(\d[\d.]*)\**$", cell):
                digits = len(number.partition(".")[2])
                step = 0.5 * 10**-digits + 1e-9
                assert any(abs(float(number) - one) <= step for one in known), f"{number} is not in {row[2]}: {line}"
        rows += 1
    assert rows >= 6
