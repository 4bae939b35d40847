"""Which tokens of a conversation the target would have generated, found by rendering it with the chat template.

There is no list of templates. The template itself gives a turn's prompt (`add_generation_prompt=True`). The target's
answer is the text that the rendering gains with the turn. Turns share a row as long as the template renders earlier
ones as they were generated. Reasoning templates that drop earlier thinking rewrite them: then each turn gets a row of
its own, with the history as it was served.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .conversations import Conversation, Message, content_text, part_texts, read_messages

# Short conversations to try a template with.
USER: Message = {"role": "user", "content": "x"}
CALL_ID = "abcdefghi"  # nine letters, as Mistral's templates ask for
CALL_ARGUMENTS = {"x": "y"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": CALL_ID, "function": {"name": "f", "arguments": CALL_ARGUMENTS}}],
}
RESULT = {"tool_call_id": CALL_ID, "name": "f"}
# By role: messages before one of it, its other keys, and messages after.
PROBES: Mapping[str, tuple[list[Message], Mapping[str, Any], list[Message]]] = {
    "system": ([], {}, [USER]),
    "developer": ([], {}, [USER]),
    "assistant": ([USER], {}, []),
    "tool": ([USER, CALL], RESULT, []),
    "ipython": ([USER, CALL], RESULT, []),
}
DATE = datetime.date(2026, 1, 1)  # today's date for templates: the same in every run
MARKER = "\ue000turn\ue001"  # private use: no template and no scaffold begins like it
THOUGHT = "\ue002thought\ue003"  # the same, for reasoning
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
OPEN_TAG = re.compile(r"<([^<>/\s]+)>\s*$")


class TokenRow(NamedTuple):
    """One sequence; `loss_mask` is 1 on tokens the target generated, end of turn included."""

    input_ids: list[int]
    loss_mask: list[int]


class Turn(NamedTuple):
    """One assistant turn after its prompt: the target generates `input_ids[start:end]`."""

    input_ids: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class ChatRenderer:
    """A tokenizer's chat template, the same today and tomorrow.

    Args:
        tokenizer: The target's.
        eos_token_ids: What ends a turn, beside the tokenizer's own: the target's `generation_config.eos_token_id`.
        template_kwargs: For the template, such as `{"enable_thinking": False}`.
        date: What `strftime_now` gives in the template.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: Iterable[int] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date = DATE

    @property
    def terminators(self) -> frozenset[int]:
        """Ids that end a turn."""
        own = self.tokenizer.eos_token_id
        return frozenset(self.eos_token_ids) | (frozenset() if own is None else {own})

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of `messages`.

        Raises:
            ValueError: The template refuses them, or there is no template.
        """
        try:
            return self._apply(
                [self._as_served(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **{**self.template_kwargs, **(template_kwargs or {})},
            )
        except (TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            roles = [message["role"] for message in messages]
            raise ValueError(f"The chat template cannot render the roles {roles}: {error}") from error

    def _apply(self, messages: Sequence[Message], *, tools: list[Any] | None = None, **kwargs: Any) -> str:
        """The rendering of `messages` as they are."""
        template = self.tokenizer.get_chat_template(None, tools=tools)
        if "strftime_now" in template:
            template = _date_macro(self.date) + template
        return self.tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=template, tokenize=False, **kwargs
        )

    # ---- the template's conventions ----

    def _as_served(self, message: Message) -> Message:
        """`message` as engines give it to this template: content in parts as one text where it wants text.

        Engines give arguments of tool calls as objects. A template that adds them to text would fail at them, or write
        them as Python does; it gets JSON text, which is what the target writes.

        Raises:
            ValueError: The content has a part that is no text.
        """
        served = dict(message)
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = [{"type": "text", "text": text} for text in part_texts(content)]
            served["content"] = parts if self._takes_parts(message["role"]) else content_text(content)
        if message.get("tool_calls") and self._wants_json_text:
            served["tool_calls"] = [_with_json_text(call) for call in message["tool_calls"]]
        return served

    def _takes_parts(self, role: str) -> bool:
        """Whether content in parts comes out of the template as the same content in one text does."""
        if role not in self._parts_by_role:
            before, about, after = PROBES.get(role, ([], {}, []))
            as_text, as_parts = (
                self._try([*before, {"role": role, "content": content, **about}, *after])
                for content in (MARKER, [{"type": "text", "text": MARKER}])
            )
            is_text_known = as_text is not None and MARKER in as_text
            self._parts_by_role[role] = as_parts == as_text if is_text_known else as_parts is not None
        return self._parts_by_role[role]

    @cached_property
    def _parts_by_role(self) -> dict[str, bool]:
        return {}

    @cached_property
    def _wants_json_text(self) -> bool:
        """Whether the template cannot write the arguments of a tool call from an object."""
        as_object = self._try([USER, CALL])
        if as_object is not None and str(CALL_ARGUMENTS) not in as_object:  # as Python would write them
            return False
        as_text = self._try([USER, {**CALL, "tool_calls": list(map(_with_json_text, CALL["tool_calls"]))}])
        return as_text is not None and as_text != as_object

    def _try(self, messages: Sequence[Message]) -> str | None:
        """The rendering of `messages`; None if the template raises."""
        try:
            return self._apply(messages, **self.template_kwargs)
        except (TemplateError, TypeError):
            return None

    def encode(self, text: str) -> list[int]:
        """The tokens of rendered `text`, which has its special tokens already."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def find_turn(self, conversation: Conversation, number: int) -> Turn:
        """The text that the target generates as message `number` of `conversation`, an assistant's.

        Raises:
            ValueError: The renderings without and with the message do not show where its prompt ends.
        """
        conversation = conversation._replace(messages=list(map(self._as_served, conversation.messages)))
        before = self._render_part(conversation, number, add_generation_prompt=True)
        through = self._render_part(conversation, number + 1)
        if not through.startswith(before):
            through = before + self._after_scaffold(conversation, number, before, through)
        prompt_ids, ids = self.encode(before), self.encode(through)
        start = len(prompt_ids)
        if ids[:start] != prompt_ids:
            # The tokenizer joins the prompt's end with the answer's beginning. The target reads the prompt alone.
            joined, ids = ids, prompt_ids + self.encode(through[len(before) :])
            if self.tokenizer.decode(ids) != self.tokenizer.decode(joined):
                raise ValueError(
                    f"Turn {number}: the tokenizer writes the prompt's end {before[-20:]!r} and what follows, "
                    f"{through[len(before) :][:20]!r}, differently together than apart. Give rows of input_ids and loss_mask "
                    "(hf-eagle3 regenerate writes them)."
                )
        end = find_end(ids, start, self.terminators)
        if end is None and (closing := self._find_closing(conversation, number, through)) is not None:
            ids, end = [*ids, closing], len(ids) + 1
        if end is None:
            end = self._end_of_unterminated(ids, start)
        self._check_answer(conversation.messages[number], number, through[len(before) :])
        return Turn(ids, start, end)

    def is_terminated(self, turn: Turn) -> bool:
        """Whether `turn` ends with a token that ends the target's turns."""
        return turn.input_ids[turn.end - 1] in self.terminators

    def _render_part(self, conversation: Conversation, length: int, add_generation_prompt: bool = False) -> str:
        return self.render(
            conversation.messages[:length],
            tools=conversation.tools,
            template_kwargs=conversation.template_kwargs,
            add_generation_prompt=add_generation_prompt,
        )

    def _after_scaffold(self, conversation: Conversation, number: int, before: str, through: str) -> str:
        """The target's text after `before`, whose end (such as `<think>`) the rendering `through` does not repeat."""
        message = conversation.messages[number]
        thoughts = {key: THOUGHT for key in REASONING_KEYS if message.get(key)}
        with_markers = {**message, **_like(message, MARKER), **thoughts}
        marked = self._render_part(
            conversation._replace(messages=[*conversation.messages[:number], with_markers]), number + 1
        )
        # The markers keep an answer that begins like the scaffold from being taken for it.
        common = _num_common(before, through, marked)
        history = _num_common(before, self._render_part(conversation, number))
        scaffold = before[common:]
        own = min((i for i in (marked.find(MARKER), marked.find(THOUGHT)) if i >= 0), default=common)
        is_header_other = marked[common:own].strip() != ""
        is_thought_excluded = scaffold.strip() != "" and marked.startswith(THOUGHT, own)
        if common < history or is_header_other or is_thought_excluded:
            raise ValueError(
                f"The chat template renders the conversation up to turn {number} differently once the answer follows: "
                f"{_around(before, common)!r} before, {_around(through, common)!r} with it. So what the target generates "
                "cannot be found. If it is about thinking, give it as the template expects (reasoning_content), or say that "
                "there is none by chat_template_kwargs; else give rows of input_ids and loss_mask (hf-eagle3 regenerate "
                "writes them)."
            )
        opened = OPEN_TAG.search(scaffold)
        if opened is None:
            return through[common:]
        tag, content = opened[1], message.get("content")
        if not isinstance(content, str) or f"</{tag}>" not in content:
            raise ValueError(
                f"Turn {number}: the prompt ends with {scaffold!r}, and the template leaves that out once the answer follows "
                f"({_around(through, common)!r}). The target would close <{tag}> first, so this answer is not its own. Give "
                f"the whole text as content ('... </{tag}> ...'), turn it off with chat_template_kwargs if the template "
                "can, or let the target answer again (hf-eagle3 regenerate)."
            )
        generated = content.lstrip().removeprefix(opened[0].rstrip())
        if scaffold.endswith("\n"):
            generated = generated.lstrip("\n")
        return generated + marked[marked.rindex(MARKER) + len(MARKER) :]

    def _find_closing(self, conversation: Conversation, number: int, through: str) -> int | None:
        """The token that ends turn `number` and begins the next one, in templates without an end of their own (GLM)."""
        messages = conversation.messages
        if [message["role"] for message in messages[number + 1 : number + 2]] == ["tool"]:
            longer = self._render_part(conversation, number + 2)
            rest = longer[len(through) :] if longer.startswith(through) else ""
        else:  # without thoughts, which the template may leave out of history
            exchange = [{"role": role, **_like(messages[number], MARKER)} for role in ("assistant", "user")]
            parts = self._render_part(
                conversation._replace(messages=[*messages[:number], *exchange]), number + 2
            ).split(MARKER)
            rest = parts[1] if len(parts) == 3 else ""
        ids = self.encode(rest)
        return ids[0] if ids and ids[0] in self.terminators else None

    @staticmethod
    def _check_answer(message: Message, number: int, text: str) -> None:
        """Raise ValueError if `text` lacks a part of the assistant's message."""
        content = content_text(message.get("content"))
        parts = [content.strip().split("\n")[-1]]
        parts += [str(message[key]).strip().split("\n")[-1] for key in REASONING_KEYS if message.get(key)]
        parts += [call.get("function", call)["name"] for call in message.get("tool_calls") or []]
        if missing := [part for part in parts if part not in text]:
            raise ValueError(
                f"Turn {number}: the chat template leaves out {missing[0]!r:.80} of the answer; it writes {text!r:.80}. So this "
                "is not what the target said. The template may know no thinking or no tools, or not as they are given here, or "
                "content only in parts ([{'type': 'text', 'text': ...}])."
            )
        if not any(parts):
            raise ValueError(f"Turn {number}: the answer is empty. Leave it out.")

    def _end_of_unterminated(self, ids: Sequence[int], start: int) -> int:
        """Where a turn ends that has no known terminator: after its last special token, if only blanks follow."""
        special, end = set(self.tokenizer.all_special_ids), len(ids)
        while end > start and not self.tokenizer.decode([ids[end - 1]]).strip():
            end -= 1
        return end if end > start and ids[end - 1] in special else len(ids)


def find_end(ids: Sequence[int], start: int, terminators: Iterable[int]) -> int | None:
    """The index after the first of `terminators` in `ids[start:]`: generation stops there. None without one."""
    wanted = set(terminators)
    return next((i + 1 for i in range(start, len(ids)) if ids[i] in wanted), None)


def find_turns(conversation: Conversation, renderer: ChatRenderer) -> list[Turn]:
    """Each assistant turn of `conversation` that is supervised.

    A turn that opens the conversation answers nothing, and is history only.

    Raises:
        ValueError: There is none, or one that cannot be found.
    """
    numbers = [
        number
        for number, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and number >= max(conversation.first_supervised, 1)
    ]
    if not numbers:
        raise ValueError(
            "A training conversation needs an assistant turn after a prompt, got roles "
            f"{[message['role'] for message in conversation.messages]}. Let the target answer first (hf-eagle3 regenerate)."
        )
    return [renderer.find_turn(conversation, number) for number in numbers]


def merge_turns(turns: Iterable[Turn]) -> list[TokenRow]:
    """Rows with as many of `turns` each as share their tokens: a turn whose history was rewritten begins a new one."""
    rows: list[TokenRow] = []
    covered = 0  # tokens of the last row, up to its last span's end
    for ids, start, end in turns:
        span = [0] * start + [1] * (end - start) + [0] * (len(ids) - end)
        if rows and covered <= start and rows[-1].input_ids[:covered] == ids[:covered]:
            rows[-1] = TokenRow(list(ids), rows[-1].loss_mask[:covered] + span[covered:])
        else:
            rows.append(TokenRow(list(ids), span))
        covered = end
    return rows


def tokenize_conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, eos_token_ids: Iterable[int] = ()
) -> list[TokenRow]:
    """Render `messages` by the chat template and mark each assistant turn with its terminator.

    A turn's tokens are those that the target would have generated after the rendering of all before it with a
    generation prompt. One row where the template repeats earlier turns as they were, else one for each rewritten history.

    Raises:
        ValueError: No assistant turn, or a template that does not show what it adds for one.
    """
    return merge_turns(find_turns(Conversation(read_messages(list(messages))), ChatRenderer(tokenizer, eos_token_ids)))


def _with_json_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as JSON text."""
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        return dict(call)
    return {**call, "function": {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}


def _like(message: Message, text: str) -> dict[str, Any]:
    """`text` as content, in parts if that of `message` is."""
    return {"content": [{"type": "text", "text": text}] if isinstance(message.get("content"), (list, tuple)) else text}


def _num_common(*texts: str) -> int:
    """How many characters `texts` have in common at their beginnings."""
    return next(
        (i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), min(map(len, texts))
    )


def _around(text: str, position: int, width: int = 24) -> str:
    return text[max(position - width, 0) : position + width]


def _date_macro(date: datetime.date) -> str:
    """A `strftime_now` to put before a template. The host hands no functions on to templates."""
    noon = datetime.datetime.combine(date, datetime.time(12))
    values = {letter: noon.strftime(f"%{letter}") for letter in "dHIjmMSyYfUWw"}
    day, month = DAYS[date.weekday()], MONTHS[date.month - 1]  # in English whatever the locale, as templates are
    values |= {"a": day[:3], "A": day, "b": month[:3], "B": month, "p": "PM"}
    replaced = "".join(f" | replace('%{letter}', '{value}')" for letter, value in values.items())
    # The host trims one newline after a block, so the template itself is untouched.
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro %}\n"
