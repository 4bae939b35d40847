"""Checks of the values in a row, before a template, which would write tables as Python does."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...modeling.text_eagle3 import parse_json, refuse_surrogates, show
from .conversations import ROLES
from .rendering import REASONING_KEYS

DIALOGUES = ("messages", "conversations", "prompt", "completion")


def check_row(row: Any) -> None:  # Any: whatever a file or a data set has in the place of a row
    """Raise unless a row is a table whose messages, tools and options are of their kinds, in whole characters.

    Raises:
        ValueError: It is not; the message names the key.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"it must be a table of keys and values, got {show(row)}.")
    for key in DIALOGUES:
        if isinstance(row.get(key), (list, tuple)):
            check_messages(row[key])
    if (turns := row.get("turns")) and not (isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)):
        raise ValueError(f"turns must be a list of what the user says, got {show(turns)}.")
    check_tools(row.get("tools"))
    if not isinstance(options := row.get("chat_template_kwargs") or {}, Mapping):
        raise ValueError(f"chat_template_kwargs must be a table of options, got {show(options)}.")
    if (source := row.get("source")) is not None and not isinstance(source, str):
        raise ValueError(f"source must be a text, got {show(source)}.")
    refuse_surrogates({key: value for key, value in row.items() if key not in ("input_ids", "loss_mask")})


def check_messages(entries: Sequence[Any]) -> None:
    """Raise unless each of `entries` has a known role and text.

    Raises:
        ValueError: One has not, or does not.
    """
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not ("role" in entry or "from" in entry):
            return  # the reader of the row raises for it
        role = first_of(entry, "role", "from")
        if not isinstance(role, str):
            raise ValueError(f"Message {number} has the unknown role {show(role)}; known are {', '.join(ROLES)}.")
        content = first_of(entry, "content", "value")
        if not isinstance(content, (str, list, tuple, type(None))):
            raise ValueError(f"Message {number}: content must be a text, or a list of parts, got {show(content)}.")
        for key in REASONING_KEYS:
            if entry.get(key) is not None and not isinstance(entry[key], str):
                raise ValueError(f"Message {number}: {key} must be a text, got {show(entry[key])}.")


def first_of(entry: Mapping[str, Any], *keys: str) -> Any:  # whatever stands there
    """The first of `keys` that is not null, as data sets fill absent columns."""
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def check_tools(tools: Any) -> None:  # Any: whatever stands in the row
    """Raise unless `tools` are a list of tables, any of it in JSON, as data sets store values without fixed columns.

    Raises:
        ValueError: They are not.
    """
    tools = read_text(tools, "tools")
    if tools and not isinstance(tools, list):
        raise ValueError(f"tools must be a list of tables, got {show(tools)}.")
    for i, tool in enumerate(tools or ()):
        if not isinstance(read_text(tool, f"tools[{i}]"), Mapping):
            raise ValueError(f"tools[{i}] must be a table, got {show(tool)}.")


def read_text(value: Any, name: str) -> Any:  # any value, or the value of its JSON
    """`value`, or the value of its JSON text.

    Raises:
        ValueError: It is text and no JSON.
    """
    try:
        return parse_json(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise ValueError(f"{name} is a text, and no JSON ({error}): {show(value)}. Give a table.") from error
