"""What is looked for in pages, cards and terminals."""

import re
from pathlib import Path
from typing import NamedTuple

PLACEHOLDER = re.compile(
    r"\bTODO\b|\bTBD\b|\bFIXME\b|[Mm]ore [Ii]nformation|\{\w*\}|<[a-z_]+>|\bNone\b|\bTARGET\b|\?\?|\[.*[Nn]eeded\]"
)
CONTROLS = "\x1b[2J\u202e\x9b\r\n"
BLOCK = re.compile(
    r"(?:^<!-- skip: (?P<skip>.*?) -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int  # of its first line of code, from 1
    language: str
    code: str
    skip: str | None  # why it does not run here


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["skip"])
        for found in BLOCK.finditer(text)
    ]
