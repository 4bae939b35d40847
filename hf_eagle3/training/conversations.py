"""The row formats that training data comes in, as one: messages by role.

Roles are mapped by a table. An unknown one is an error: taken for the assistant's, it would teach the drafter to propose
what the target never says, such as a tool's output.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]  # `role`, and what the chat template knows: content, reasoning_content, tool_calls, ...

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "ipython": "ipython",  # a tool's output, in the templates that have this role
}


class Conversation(NamedTuple):
    """What the chat template is given for one row."""

    messages: list[Message]
    first_supervised: int = 0  # assistant turns before this message are history only
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = {}


def find_conversation(row: Mapping[str, Any]) -> Conversation | None:
    """The conversation in `row`: `messages`, `conversations`, or `prompt` and `completion`; None if it has neither.

    Raises:
        ValueError: It has one that cannot be read.
    """
    first_supervised = 0
    if row.get("messages") is not None:
        messages = read_messages(row["messages"])
    elif row.get("conversations") is not None:
        messages = read_messages(row["conversations"])
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt = read_messages(_as_messages(row["prompt"], "user"))
        messages = prompt + read_messages(_as_messages(row["completion"], "assistant"))
        first_supervised = len(prompt)
    else:
        return None
    tools = row.get("tools")
    if isinstance(tools, str):  # as data sets store what has no fixed columns
        tools = json.loads(tools)
    return Conversation(messages, first_supervised, tools or None, row.get("chat_template_kwargs") or {})


def read_messages(entries: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages with `role` and `content`, or ShareGPT's `from` and `value`, with the roles that templates know.

    Other keys are kept for the template; a key whose value is None is left out, as data sets fill absent columns.

    Raises:
        ValueError: No messages, none of the two forms, or an unknown role.
    """
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ValueError(f"Expected a list of messages, got {_shorten(entries)}.")
    messages = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not ("role" in entry or "from" in entry):
            raise ValueError(
                f"Message {number} must have role and content, or from and value (ShareGPT), got {_shorten(entry)}."
            )
        message = {key: value for key, value in entry.items() if value is not None and key not in ("from", "value")}
        if "from" in entry:
            message = {"role": entry["from"], "content": entry.get("value", entry.get("content")), **message}
        if message["role"] not in ROLES:
            raise ValueError(
                f"Message {number} has the unknown role {message['role']!r}; known are {', '.join(ROLES)}. Rename it to "
                "the one it plays: only what the target itself wrote is assistant."
            )
        message["role"] = ROLES[message["role"]]
        messages.append(message)
    return messages


def _as_messages(text_or_messages: Any, role: str) -> Any:
    return [{"role": role, "content": text_or_messages}] if isinstance(text_or_messages, str) else text_or_messages


def _shorten(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
