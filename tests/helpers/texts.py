"""What is looked for in pages, cards and terminals."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

PLACEHOLDER = re.compile(
    r"\bTODO\b|\bTBD\b|\bFIXME\b|[Mm]ore [Ii]nformation|\{\w*\}|<[a-z_]+>|\bNone\b|\bTARGET\b|\?\?|\[.*[Nn]eeded\]"
)
CONTROLS = "\x1b[2J\u202e\x9b\r\n"
BLOCK = re.compile(
    r"(?:^<!-- (?:skip: (?P<skip>.*?)|(?P<name>\w+)-command) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int  # of its first line of code, from 1
    language: str
    code: str
    skip: str | None  # why it does not run here
    name: str | None = None  # of a command that .ci/run reads from the page


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, *found.group("language", "code", "skip", "name"))
        for found in BLOCK.finditer(text)
    ]


def commands_in(code: str) -> list[list[str]]:
    """The commands of a block for a shell, each as its words; lines that end in a backslash go on, comments are left out."""
    lines = code.replace("\\\n", " ").splitlines()
    commands = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [words for words in commands if words]
