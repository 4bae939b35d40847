"""Messages reach a chat template as serving engines hand them over, whatever form the data has them in.

The templates are stand-ins: the lines of published ones that write contents and tool calls, without the rest.
"""

import importlib.util
from pathlib import Path

import pytest
from helpers.chat import assistant, make_tokenizer, user

from hf_eagle3.training import TokenDataset
from hf_eagle3.training.data.conversations import find_conversation, read_messages
from hf_eagle3.training.data.files import read_rows
from hf_eagle3.training.data.prompts import read_prompts
from hf_eagle3.training.data.rendering import ChatRenderer

EACH = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
NEXT = "{% endfor %}{% if add_generation_prompt %}<|ai|>{% endif %}"
# openai/gpt-oss: one call, tojson; contents are looked through for channels.
GPT_OSS = (
    EACH + "{% elif m.role == 'tool' %}<start>functions<message>{{ m.content | tojson }}<end>"
    "{% elif 'tool_calls' in m %}{% set call = m.tool_calls[0].function %}"
    "<|ai|> to=functions.{{ call.name }}<channel>commentary json<message>{{ call.arguments | tojson }}<call>"
    "{% else %}{% if '<|channel|>' in m.content %}{{ raise_exception('channels in content') }}{% endif %}"
    "<|ai|><channel>final<message>{{ m.content }}<return>{% endif %}" + NEXT
)
# meta-llama/Llama-3.1: the name and tojson; a tool's output once more through tojson.
LLAMA = (
    EACH + "{% elif m.role == 'ipython' or m.role == 'tool' %}<start>ipython\n"
    "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}<end>"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '<|ai|>{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "<end>{% else %}<|ai|>{{ m['content'] | trim }}<end>{% endif %}" + NEXT
)
# Qwen/Qwen2.5: contents added to text, calls one behind the other.
QWEN = (
    EACH + "{% elif m.role == 'tool' %}<start>user\n<tool_response>\n{{ m.content }}\n</tool_response><end>"
    "{% elif m.tool_calls %}<|ai|>{% if m.content %}{{ m.content + '\\n' }}{% endif %}{% for call in m.tool_calls %}"
    "{% if call.function is defined %}{% set call = call.function %}{% endif %}"
    '<tool_call>\n{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n</tool_call>{% endfor %}<end>'
    "{% else %}{{ '<|ai|>' + m.content + '<end>' }}{% endif %}" + NEXT
)
# Qwen/Qwen3.5: arguments one by one; contents may be parts.
XML = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|ai|>{{ text(m.content) }}"
    "{% for call in m.tool_calls or [] %}<function={{ call.function.name }}>"
    "{% for name, value in call.function.arguments | items %}<parameter={{ name }}>{{ value }}</parameter>{% endfor %}"
    "</function>{% endfor %}<end>{% else %}<|user|>{{ text(m.content) }}{% endif %}" + NEXT
)
# deepseek-ai/DeepSeek-V3.1: arguments added to text, so it wants them as JSON text.
DEEPSEEK = (
    EACH + "{% elif m.role == 'tool' %}{{ '<start>' + m.content + '<end>' }}"
    "{% elif m.tool_calls is defined %}<|ai|>{% for call in m.tool_calls %}"
    "{{ m.content + '<channel>' + call.function.name + '<message>' + call.function.arguments + '<call>' }}{% endfor %}<end>"
    "{% else %}{{ '<|ai|>' + m.content + '<end>' }}{% endif %}" + NEXT
)
# Older ones print what they get, which of an object is Python's way of writing it.
PRINTS = DEEPSEEK.replace(
    "{{ m.content + '<channel>' + call.function.name + '<message>' + call.function.arguments + '<call>' }}",
    "{{ m.content }}<channel>{{ call.function.name }}<message>{{ call.function.arguments }}<call>",
)
TEMPLATES = {
    "gpt_oss": (GPT_OSS, ' to=functions.weather<channel>commentary json<message>{"city": "K\u00f6ln"}<call>'),
    "llama": (LLAMA, '{"name": "weather", "parameters": {"city": "K\u00f6ln"}}<end>'),
    "qwen": (QWEN, '<tool_call>\n{"name": "weather", "arguments": {"city": "K\u00f6ln"}}\n</tool_call><end>'),
    "xml": (XML, "<function=weather><parameter=city>K\u00f6ln</parameter></function><end>"),
    "deepseek": (DEEPSEEK, '<channel>weather<message>{"city": "K\u00f6ln"}<call><end>'),
    "prints": (PRINTS, '<channel>weather<message>{"city": "K\u00f6ln"}<call><end>'),
}
FUNCTION = {"name": "weather", "arguments": {"city": "K\u00f6ln"}}
# The same call, as it is found in data.
CALLS = {
    "object": [{"id": "c1", "type": "function", "function": FUNCTION}],
    "json_text": [{"id": "c1", "type": "function", "function": {**FUNCTION, "arguments": '{"city": "K\u00f6ln"}'}}],
    "escaped": [{"function": {**FUNCTION, "arguments": '{ "city":"K\\u00f6ln" }'}}],
    "nulls": [
        {"id": None, "type": "function", "function": {**FUNCTION, "arguments": {"city": "K\u00f6ln", "zip": None}}}
    ],
    "bare": [FUNCTION],
    "all_text": '[{"function": {"name": "weather", "arguments": "{\\"city\\": \\"K\u00f6ln\\"}"}}]',
}


def answer_of(messages, template, **row):
    """What is supervised of the last message."""
    tokenizer = make_tokenizer(template, eos="<eos>")
    ends = tokenizer.convert_tokens_to_ids(
        ["<end>"] if template in (DEEPSEEK, PRINTS) else ["<end>", "<call>", "<return>"]
    )
    turn = ChatRenderer(tokenizer, ends).find_turn(find_conversation({"messages": messages, **row}), len(messages) - 1)
    return tokenizer.decode(turn.input_ids[: turn.start]), tokenizer.decode(turn.input_ids[turn.start : turn.end])


@pytest.mark.parametrize("form", CALLS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_tool_call_in_any_form_is_taught_alike(name, form):
    template, expected = TEMPLATES[name]
    _, answer = answer_of([user("w?"), assistant(None, tool_calls=CALLS[form])], template)
    assert answer == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_history_has_its_calls_and_outputs_as_they_are_served(name):
    template, call = TEMPLATES[name]
    output = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain", "image": None}]}
    messages = [user("w?"), assistant("", tool_calls=CALLS["json_text"]), output, assistant("Rain.")]
    prompt, answer = answer_of(messages, template)
    assert call in prompt
    assert "rain" in prompt
    assert "type" not in prompt
    assert "Rain." in answer


PARTS = [{"type": "text", "text": "one", "image_url": None}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_in_parts_is_text_where_the_template_wants_text(name):
    template, _ = TEMPLATES[name]
    between = "" if name == "xml" else "\n"  # a template that takes parts joins them itself
    prompt, answer = answer_of([user(PARTS), assistant(PARTS)], template)
    assert f"<|user|>one{between}two" in prompt
    assert f"one{between}two<" in answer
    as_text = answer_of([user(f"one{between}two"), assistant(f"one{between}two")], template)
    assert (prompt, answer) == as_text


def test_a_null_that_the_target_wrote_stays():
    call = {"function": {"name": "weather", "arguments": '{"city": "Bonn", "zip": null}'}}
    _, answer = answer_of([user("w?"), assistant(None, tool_calls=[call])], QWEN)
    assert '"arguments": {"city": "Bonn", "zip": null}' in answer


def test_nulls_go_at_any_depth_and_lists_keep_theirs():
    nested = {"a": {"b": None, "c": [{"d": None, "e": 1}, None]}, "f": None}
    [message] = read_messages([{"role": "user", "content": "x", "name": None, "meta": nested}])
    assert message == {"role": "user", "content": "x", "meta": {"a": {"c": [{"e": 1}, None]}}}
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "zip": None}}
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": schema}}
    row = {"messages": [user("x"), assistant("y")], "tools": [tool], "chat_template_kwargs": {"enable_thinking": None}}
    conversation = find_conversation(row)
    assert conversation.tools == [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {**schema, "properties": {"city": {"type": "string"}}}},
        }
    ]
    assert conversation.template_kwargs == {}


def test_tools_may_each_be_json_text():
    row = {"messages": [user("x"), assistant("y")], "tools": ['{"name": "f"}', {"name": "g"}]}
    assert find_conversation(row).tools == [{"name": "f"}, {"name": "g"}]


def test_rows_from_arrow_are_taught_as_rows_from_json():
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [user("w?"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": arguments}}])]}
        for arguments in ({"city": "Bonn"}, {"zip": "53111", "days": 2})
    ]
    tokenizer = make_tokenizer(QWEN, eos="<end>")
    ours, theirs = TokenDataset(rows, tokenizer), TokenDataset(datasets.Dataset.from_list(rows), tokenizer)
    assert "zip" in datasets.Dataset.from_list(rows)[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    for a, b in zip(ours, theirs, strict=True):
        assert a["input_ids"].tolist() == b["input_ids"].tolist()
        assert "null" not in tokenizer.decode(a["input_ids"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"function": {"name": "f", "arguments": "{city: Bonn}"}}], "Message 1, tool call 0: arguments is text that is no JSON"),
        ([{"function": {"name": "f", "arguments": "[1]"}}], r"arguments must be an object or its JSON text, got \[1\]"),
        ([{"function": {"arguments": "{}"}}], "Message 1, tool call 0 must have a function with name and arguments"),
        ([7], "tool call 0 must have a function"),
        ({"function": {}}, "tool_calls must be a list of calls"),
        ("{", "tool_calls is text that is no JSON"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_read_are_named(messages, message):
    row = {"messages": [user("w?"), assistant(None, tool_calls=messages)]}
    with pytest.raises(ValueError, match=f"Row 0: .*{message}"):
        TokenDataset([row], make_tokenizer(QWEN))


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "image"}, {"type": "text"}, 3], ids=str
)
def test_a_part_that_is_no_text_is_refused(part):
    for template in (QWEN, XML):
        with pytest.raises(ValueError, match="Row 0: the content has a part that is no text"):
            TokenDataset(
                [{"messages": [user([part, {"type": "text", "text": "x"}]), assistant("y")]}], make_tokenizer(template)
            )


def test_prompts_in_parts_are_compared_and_asked_again(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}, '
        '{"role": "user", "content": [{"type": "text", "text": "c"}]}, {"role": "assistant", "content": "d"}]}\n'
    )
    [prompt] = read_prompts(read_rows(path))
    assert prompt.user_texts == ["a", "c"]
    assert prompt.later == ("c",)


PUBLISHED = importlib.util.find_spec("trl")
PUBLISHED_TEMPLATES = (
    sorted((Path(PUBLISHED.submodule_search_locations[0]) / "chat_templates").glob("*.jinja")) if PUBLISHED else []
)


@pytest.mark.skipif(not PUBLISHED_TEMPLATES, reason="needs trl, which carries published templates")
@pytest.mark.parametrize("path", PUBLISHED_TEMPLATES, ids=lambda path: path.stem)
def test_published_templates_are_given_what_they_write_alike(path):
    """Whatever form a call has in the data, the same is taught, or refused, and it is never JSON within JSON."""
    found = []
    for calls in CALLS.values():
        calls = (
            [{**call, "id": "abcdefghi"} if "function" in call else call for call in calls]
            if isinstance(calls, list)
            else calls
        )
        try:
            found.append(answer_of([user("w?"), assistant(None, tool_calls=calls)], path.read_text())[1])
        except ValueError as error:
            found.append(str(error))
    assert len(set(found)) == 1
    assert "zip" not in found[0]
    assert '\\"' not in found[0]
