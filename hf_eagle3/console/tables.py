"""Tables on stdout: in a terminal as wide as it is, elsewhere as wide as they are."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..modeling.text_eagle3 import one_line

AS_WIDE_AS_IT_IS = 10_000
STYLES = {"yes": "green", "NO": "bold red"}  # cells that are a verdict


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print a table whose first `left` columns begin on the left, and whose others end on the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for i, name in enumerate(head):
        table.add_column(Text(one_line(name)), justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*(Text(one_line(cell), style=STYLES.get(cell, "")) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else AS_WIDE_AS_IT_IS)
    with console.capture() as captured:
        console.print(table)
    sys.stdout.write("\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()) + "\n")
    sys.stdout.flush()
