"""Text of strangers: JSON read strictly, and whatever it says shown so that a terminal, a log or an error is only text.

Copied into every published drafter, so it imports the standard library only.
"""

import json
import logging
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

MOST_NESTED = 64  # tables and lists within one another; configs and training rows have ten
MOST_SHOWN = 2000  # characters of an error

# Categories of Unicode that move the cursor, colour, hide or reorder what is shown, or cannot be written at all.
UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")
SURROGATE = re.compile("[\ud800-\udfff]")
HARMLESS = "\n\t\u200c\u200d"  # joiners belong to Persian, Hindi and emoji


def escape_controls(text: str) -> str:
    r"""`text` with control characters, bidirectional overrides and lone surrogates written as `\x1b` or `\u202e`.

    Line breaks and tabs stay. For whatever a terminal shows of data, configs, names or decoded tokens.
    """
    if text.isprintable():
        return text
    return "".join(_escape(c) if unicodedata.category(c) in UNSHOWN and c not in HARMLESS else c for c in text)


def one_line(text: str) -> str:
    """`text` as one line of bounded length, with what `escape_controls` escapes: for errors, logs and cells of tables."""
    if len(text) > MOST_SHOWN:
        text = f"{text[: MOST_SHOWN - 300]} ... {text[-295:]}"
    return escape_controls(re.sub(r"\s*[\r\n]\s*", " ", text).replace("\t", " "))


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Shown(reprlib.Repr):
    """`reprlib.repr` for values of any size, which never fails."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxother, self.maxlevel, self.maxlong = 80, 80, 4, 40
        self.maxlist = self.maxdict = self.maxtuple = self.maxset = 8

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write numbers of thousands of digits."""
        if x.bit_length() > 1024:
            return f"<a whole number of {x.bit_length()} bits>"
        return super().repr_int(x, level)


def show(value: Any) -> str:
    """`value` as Python would write it, shortened, without control characters."""
    return one_line(_Shown().repr(value))


def escape_record(record: logging.LogRecord) -> bool:
    """A filter for loggers whose messages name what strangers wrote."""
    record.msg, record.args = one_line(record.getMessage()), None
    return True


class KeyTwiceError(ValueError):
    """A table in JSON has a key twice, and readers differ in which of the two they take."""


def parse_json(text: str) -> Any:
    """What `text` says, if it says one thing.

    Raises:
        KeyTwiceError: A table has a key twice.
        ValueError: It is no JSON, nested too deeply, or has a number of thousands of digits. The message is one line.
    """
    twice: list[str] = []

    def make_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return table

    try:
        value = json.loads(text, object_pairs_hook=make_table)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        raise ValueError("tables and lists are nested too deeply") from None
    except ValueError as error:  # Python's limit on the digits of a number
        raise ValueError("a number has thousands of digits") from error
    if twice:
        raise KeyTwiceError(f"the key {show(twice[0])} is there twice")
    if is_deep(value):
        raise ValueError(f"tables and lists are nested more than {MOST_NESTED} deep")
    return value


def is_deep(value: Any) -> bool:
    """Whether tables and lists are nested more than `MOST_NESTED` deep."""
    level = [value]
    for _ in range(MOST_NESTED):
        level = [inner for outer in level for inner in _list_inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def _list_inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def refuse_surrogates(value: Any, key: str = "") -> None:  # whatever JSON can hold
    """Raise if a text in `value` has half of a surrogate pair, which no encoding and no tokenizer takes.

    Raises:
        ValueError: One has; the message names the key.
    """
    if isinstance(value, str):
        if SURROGATE.search(value):
            raise ValueError(
                f"{key or 'the text'} has half of a surrogate pair: {show(value)}. Write whole characters."
            )
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_surrogates(name, f"a key in {key or 'the row'}")
            refuse_surrogates(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)) and not (value and isinstance(value[0], (int, float))):  # not of token ids
        for i, inner in enumerate(value):
            refuse_surrogates(inner, f"{key}[{i}]")
