"""Names of strangers in what a user copies, runs or publishes: checked, and quoted for each language."""

import re
import shlex

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..modeling.text_eagle3 import escape_controls, one_line
from .paths import PATH_STARTS

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-]*(_[A-Za-z0-9.\-]+)*")
MARKS = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$:@])")  # that mean something in Markdown, wherever they stand


def is_repository(name: str) -> bool:
    """Whether `name` can be a repository on the Hub, by the Hub's own rule."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and name.isascii()  # older versions of huggingface_hub take letters of any alphabet


def is_model_name(name: str) -> bool:
    """Whether `name` can be a repository on the Hub or, by how it begins, a folder."""
    return is_repository(name) or (name.startswith(PATH_STARTS) and escape_controls(name) == name and "\n" not in name)


def quote_shell(word: str) -> str:
    """`word` as one word of a POSIX shell, which no command takes for an option."""
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def quote_python(text: str) -> str:
    """`text` as a string of Python, in double quotes where it has none of its own."""
    return repr(text) if "'" in text or '"' in text else f'"{repr(text)[1:-1]}"'


def quote_markdown(text: str) -> str:
    """`text` as one line of Markdown that means nothing but itself, in a table too."""
    return text if PLAIN.fullmatch(text) else MARKS.sub(r"\\\1", one_line(text))


def quote_code(text: str) -> str:
    """`text` as a span of code in Markdown."""
    text = one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"
