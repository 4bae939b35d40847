"""Types of arguments and values that several commands share."""

import argparse
import re
from typing import Any

from ..modeling.text_eagle3 import parse_json, show

Commands = Any  # argparse's own class for the commands of a parser is private
DTYPES = ["float32", "bfloat16", "float16"]
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # the host's, over several devices


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def byte_count(text: str) -> int:
    """A size like 1GB or 500MB, in powers of a thousand, for argparse."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) *([kKMGT]?)B?", text, re.ASCII)
    count = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a size like 1GB or 500MB, got {text!r}")
    return count


def json_object(text: str) -> dict[str, Any]:
    """An object in JSON, for argparse."""
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {show(text)}")
    return value
