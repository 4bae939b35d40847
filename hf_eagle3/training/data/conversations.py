"""The row formats that training data comes in, as one: messages by role, as serving engines hand them to a template.

A request reaches an engine as JSON, so absent keys are absent there, and the engine reads the arguments of tool calls,
which are JSON text, before it renders them. Data sets keep that text, and those in Arrow have null for every key that
another row has.

Roles are mapped by a table. An unknown one is an error: taken for the assistant's, it would train the drafter on
text that the target never generates, such as a tool's output.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]  # `role`, and keys of the chat template: content, reasoning_content, tool_calls, ...

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
    """The arguments of the chat template for one row."""

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
    kwargs = without_nulls(row.get("chat_template_kwargs")) or {}
    return Conversation(messages, first_supervised, read_tools(row.get("tools")), kwargs)


def read_tools(tools: Any) -> list[Any] | None:
    """The tools that a row offers, each an object or JSON text, or all of them JSON text; None if there are none.

    Raises:
        ValueError: They are neither.
    """
    tools = read_json_text(tools, "tools")  # as data sets store values without fixed columns
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools must be a list of tools or JSON text of one, got {_shorten(tools)}.")
    return [without_nulls(read_json_text(tool, f"tools[{i}]")) for i, tool in enumerate(tools)]


def read_messages(entries: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages with `role` and `content`, or ShareGPT's `from` and `value`, with the roles that templates know.

    Other keys are kept for the template; a key whose value is None is left out, at any depth, as data sets fill absent
    columns. Arguments of tool calls become objects; a null in their JSON text stays, since the target wrote it.

    Raises:
        ValueError: No messages, none of the two forms, an unknown role, or a tool call that cannot be read.
    """
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ValueError(f"Expected a list of messages, got {_shorten(entries)}.")
    messages = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not ("role" in entry or "from" in entry):
            raise ValueError(
                f"Message {number} must have role and content, or from and value (ShareGPT), got {_shorten(entry)}."
            )
        message = {
            key: without_nulls(value)
            for key, value in entry.items()
            if value is not None and key not in ("from", "value", "tool_calls")
        }
        if "from" in entry:
            message = {"role": entry["from"], "content": without_nulls(entry.get("value")), **message}
        if message["role"] not in ROLES:
            raise ValueError(
                f"Message {number} has the unknown role {message['role']!r}; known are {', '.join(ROLES)}. Rename it to "
                "the one it plays: only what the target itself wrote is assistant."
            )
        message["role"] = ROLES[message["role"]]
        if calls := read_tool_calls(entry.get("tool_calls"), f"Message {number}"):
            message["tool_calls"] = calls
        if message.get("content") is None:  # as beside a tool call
            message["content"] = ""
        messages.append(message)
    return messages


def read_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as a request has them, `{"type": "function", "function": ...}`, with arguments as objects.

    Raises:
        ValueError: They are no calls; the message begins with `where`.
    """
    calls = read_json_text(calls, f"{where}: tool_calls") or []
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{where}: tool_calls must be a list of calls, got {_shorten(calls)}.")
    return [_read_tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls)]


def _read_tool_call(call: Any, where: str) -> dict[str, Any]:
    call = read_json_text(call, where)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must have a function with name and arguments, got {_shorten(call)}.")
    arguments = function.get("arguments")
    is_text = isinstance(arguments, str)
    arguments = read_json_text(arguments or {}, f"{where}: arguments")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: arguments must be an object or its JSON text, got {_shorten(arguments)}.")
    further = {key: value for key, value in without_nulls(function).items() if key != "arguments"}
    function = {**further, "arguments": dict(arguments) if is_text else without_nulls(arguments)}
    if "function" not in call:
        return {"type": "function", "function": function}
    return {"type": "function", **without_nulls(call), "function": function}


def read_json_text(value: Any, what: str) -> Any:
    """`value`, read if it is JSON text.

    Raises:
        ValueError: It is text and no JSON; the message begins with `what`.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is text that is no JSON ({error}): {_shorten(value)}.") from error


def content_text(content: Any) -> str:
    """The text of a message's content: a text, or parts that have one each, line by line as vLLM joins them.

    Raises:
        ValueError: A part is no text.
    """
    if isinstance(content, str) or content is None:
        return content or ""
    return "\n".join(part_texts(content))


def part_texts(parts: Sequence[Any]) -> list[str]:
    """The text of each part of a message's content.

    Raises:
        ValueError: One is no text.
    """
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise ValueError(
                f"the content has a part that is no text, {_shorten(part)}. A drafter is trained on text alone: leave the "
                "row out, or what the text does not need."
            )
        texts.append(text)
    return texts


def without_nulls(value: Any) -> Any:
    """`value` without the keys of its objects, at any depth, that have None."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _as_messages(text_or_messages: Any, role: str) -> Any:
    return [{"role": role, "content": text_or_messages}] if isinstance(text_or_messages, str) else text_or_messages


def _shorten(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
