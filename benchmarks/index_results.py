"""Writes README.md's table of results from the heads of the files in `results/`.

    python benchmarks/index_results.py

A result is THEME_GPU_YYYYMM.md, with its data beside it under the same name. Its head is what stands before the first
table, code block or section: a title, the machine, the command, the commit.
"""

import re
from pathlib import Path
from typing import NamedTuple

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
BEGIN, END = "<!-- results: python benchmarks/index_results.py -->\n", "<!-- /results -->"
NAME = r"[a-z0-9_]+_(h100|h200|cpu)_\d{6}"
DATA = (".json", ".jsonl")
NO_COMMIT = "commit not recorded"


class Head(NamedTuple):
    """What a result file says before its first table."""

    title: str
    machine: str  # of the file's name
    commits: list[str]
    text: str


def read_head(path: Path) -> Head:
    """The head of one result file.

    Raises:
        ValueError: The name, the title or the commit is not as it should be.
    """
    named = re.fullmatch(NAME, path.stem)
    if named is None:
        raise ValueError(f"{path.name}: expected THEME_GPU_YYYYMM.md with a GPU of h100, h200 or cpu.")
    title, _, rest = path.read_text(encoding="utf-8").partition("\n")
    if not title.startswith("# "):
        raise ValueError(f"{path.name}: expected a title, `# what was measured`, in the first line, got {title!r}.")
    text = re.split(r"^(?:\||```|## )", rest, maxsplit=1, flags=re.MULTILINE)[0]
    commits = re.findall(r"`([0-9a-f]{7})`", text)
    if not commits and NO_COMMIT not in text.lower():
        raise ValueError(f"{path.name}: expected `COMMIT`, in backticks, before the first table, or {NO_COMMIT!r}.")
    return Head(title.removeprefix("# "), named[1], commits, text)


def table() -> str:
    """A row for each result file, in the order of their names."""
    rows = ["| result | machine | what | commits |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.md")):
        head = read_head(path)
        data = "".join(
            f", [data](results/{path.stem}{suffix})" for suffix in DATA if path.with_suffix(suffix).exists()
        )
        commits = ", ".join(f"`{commit}`" for commit in head.commits) or "-"
        theme = path.stem.rsplit("_", 2)[0]
        rows.append(f"| [`{theme}`](results/{path.name}){data} | {head.machine} | {head.title} | {commits} |")
    return "\n".join(rows) + "\n"


def write_table(page: Path) -> None:
    """Replace the table in `page`."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    write_table(BENCHMARKS / "README.md")
