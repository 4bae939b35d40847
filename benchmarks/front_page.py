"""Writes README.md's table of speeds and its picture, from the results they quote.

python benchmarks/front_page.py
"""

import json
import statistics
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "assets" / "speed.svg"
BEGIN, END = "<!-- numbers: python benchmarks/front_page.py -->\n", "<!-- /numbers -->"
BATCH_SIZES = (1, 8, 64)


class Row(NamedTuple):
    """A row of the table."""

    label: str
    result: str  # file in results/, without its suffix
    way: str  # as the data calls it
    field: str = "tokens_per_second"
    form: str = ".0f"


SHAPE, ENGINES = "llama8b_shape_all_h200_202611", "vllm_speed_h200_202611"
STOCK, PLAIN, DRAFTED = "generate()", "our loop, no drafting", "our loop, drafting"
STATIC, VLLM = 'generate(cache_implementation="static")', "vLLM, EAGLE-3"
GAINED = "tokens_gained_per_round"
ROWS = (
    Row("`generate()`", SHAPE, STOCK),
    Row('`generate(cache_implementation="static")`, compiled', SHAPE, STATIC),
    Row("our loop without drafting", SHAPE, PLAIN),
    Row("**our loop with drafting**", SHAPE, DRAFTED),
    Row("its tokens a round", SHAPE, DRAFTED, "acceptance_length", ".2f"),
    Row("by turns with vLLM: **our loop with drafting**", ENGINES, DRAFTED),
    Row("its tokens a round", ENGINES, DRAFTED, GAINED, ".2f"),
    Row("vLLM 0.25.1 with EAGLE-3", ENGINES, VLLM),
    Row("its tokens a round", ENGINES, VLLM, GAINED, ".2f"),
)
BARS = (  # of the picture; the last one stands out
    Row("generate()", SHAPE, STOCK),
    Row("generate(), static cache, compiled", SHAPE, STATIC),
    Row("our loop without drafting", SHAPE, PLAIN),
    Row("our loop with drafting", SHAPE, DRAFTED),
)
CAPTION = (
    "Tokens a second by batch size, each on a scale of its own. Llama-3.1-8B shape, random weights, bf16, one H200;"
)
CAPTION_END = "draft depth 3, acceptance simulated at 2.41 tokens a round."


def read_numbers(row: Row) -> list[float]:
    """What `row` says at each of `BATCH_SIZES`; of several runs the median."""
    path = ROOT / "benchmarks" / "results" / f"{row.result}.json"
    found = {
        result["batch_size"]: result[row.field]
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]
        if result.get("kind", result.get("way")) == row.way
    }
    several = [found[size] if isinstance(found[size], list) else [found[size]] for size in BATCH_SIZES]
    return [statistics.median(runs) for runs in several]


def table() -> str:
    """The table of README.md."""
    lines = [f"| | {' | '.join(f'BS {size}' for size in BATCH_SIZES)} | result |", "|---|---:|---:|---:|---|"]
    for row in ROWS:
        cells = [format(number, row.form) for number in read_numbers(row)]
        lines.append(f"| {row.label} | {' | '.join(cells)} | [table](benchmarks/results/{row.result}.md) |")
    return "\n".join(lines) + "\n"


def picture() -> str:
    """The picture, in SVG: a column of bars for each batch size."""
    left, width, top, step = 250, 190, 52, 30
    full, height = left + width * len(BATCH_SIZES), top + step * len(BARS) + 48
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full} {height}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f"<title>{escape(CAPTION)} {escape(CAPTION_END)}</title>",
        f'<rect width="{full}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for column, size in enumerate(BATCH_SIZES):
        lines.append(f'<text x="{left + width * column}" y="32" fill="#1f2328">batch size {size}</text>')
    numbers = [read_numbers(row) for row in BARS]
    longest = [max(column) for column in zip(*numbers, strict=True)]
    for i, row in enumerate(BARS):
        y, is_last = top + step * i, row is BARS[-1]
        lines.append(f'<text x="{left - 12}" y="{y + 15}" text-anchor="end" fill="#1f2328">{escape(row.label)}</text>')
        for column, number in enumerate(numbers[i]):
            x, bar = left + width * column, max(2, round((width - 70) * number / longest[column]))
            lines.append(
                f'<rect x="{x}" y="{y}" width="{bar}" height="20" rx="2" fill="{"#0b7a75" if is_last else "#b8c0c8"}"/>'
            )
            weight = ' font-weight="bold"' if is_last else ""
            lines.append(f'<text x="{x + bar + 6}" y="{y + 15}" fill="#1f2328"{weight}>{number:,.0f}</text>')
    for i, text in enumerate((CAPTION, CAPTION_END)):
        lines.append(f'<text x="16" y="{height - 30 + 16 * i}" font-size="12" fill="#59636e">{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def write(page: Path, place: Path) -> None:
    """Replace the table in `page`, and write the picture to `place`."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
    place.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    write(ROOT / "README.md", PICTURE)
