"""Rows of every format, and which of their tokens are supervised."""

import datetime

import numpy as np
import pytest
import torch
from helpers.chat import CHANNELS, CHATML, CLOSED, OPENED, REASONING, TRIMMED, assistant, make_tokenizer, show, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from hf_eagle3.training import ChatRenderer, TokenDataset, tokenize_conversation
from hf_eagle3.training.data.conversations import ROLES, Conversation, find_conversation
from hf_eagle3.training.data.rendering import find_turns, merge_turns
from hf_eagle3.training.data.token_rows import trains_something

pytestmark = pytest.mark.any_release

TWO_TURNS = [user("hi"), assistant("yes, no"), user("and?"), assistant("no")]
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"in": "Bonn"}}}


def shown(messages, template, eos="<end>", eos_token_ids=(), **others):
    tokenizer = make_tokenizer(template, eos)
    conversation = find_conversation({"messages": messages, **others})
    rows = merge_turns(find_turns(conversation, ChatRenderer(tokenizer, eos_token_ids)))
    return [show(tokenizer, row) for row in rows]


def ids_of(*tokens):
    return make_tokenizer().convert_tokens_to_ids(list(tokens))


@pytest.fixture
def data_warnings(caplog):
    """What the data module warns of, through the host's logger, which is quiet in tests."""
    logger = logging.get_logger("hf_eagle3.training.data.token_rows")
    level = logger.level
    logger.setLevel("WARNING")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


# ---- what is supervised ----


def test_each_turn_is_supervised_with_its_end_and_no_more():
    assert shown(TWO_TURNS, CHATML) == [
        "<start>user\nhi<end>\n<start>assistant\n[yes, no<end>]\n<start>user\nand?<end>\n<start>assistant\n[no<end>]\n"
    ]


def test_a_row_is_what_the_template_renders():
    tokenizer = make_tokenizer(TRIMMED)
    messages = [{"role": "system", "content": "be kind"}, user(" hi "), assistant(" yes "), user("a"), assistant("b")]
    [(ids, _)] = tokenize_conversation(messages, tokenizer)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert shown(messages, TRIMMED)[0].endswith(
        "<start>assistant\n\n[yes<end>]<start>user\n\na<end><start>assistant\n\n[b<end>]"
    )


def test_the_mask_is_where_generation_would_go_on():
    """The supervision table: what is read, what is asked, turn by turn, against the host's generation prompt."""
    tokenizer = make_tokenizer()
    [(ids, mask)] = tokenize_conversation(TWO_TURNS, tokenizer)
    spans = np.flatnonzero(np.diff([0, *mask, 0])).reshape(-1, 2)
    for turn, (start, end) in zip((1, 3), spans, strict=True):
        prompt = tokenizer.apply_chat_template(TWO_TURNS[:turn], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert ids[:start] == prompt
        assert tokenizer.decode(ids[start:end]) == TWO_TURNS[turn]["content"] + "<end>"


def test_generation_markers_agree_with_the_difference():
    marked = CHATML.replace(
        "{{ m.content }}<end>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}"
        "{% else %}{{ m.content }}<end>{% endif %}",
    )
    tokenizer = make_tokenizer(marked)
    out = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenize_conversation(TWO_TURNS, tokenizer) == [(out["input_ids"], out["assistant_masks"])]


def test_reasoning_templates_give_a_row_for_each_user_turn():
    messages = [
        user("a"),
        assistant("A", reasoning_content="because"),
        user("b"),
        assistant("B", reasoning_content="why not"),
    ]
    assert shown(messages, REASONING) == [
        "<start>user\na<end>\n<start>assistant\n[<think>\nbecause\n</think>\n\nA<end>]\n",
        "<start>user\na<end>\n<start>assistant\nA<end>\n<start>user\nb<end>\n<start>assistant\n"
        "[<think>\nwhy not\n</think>\n\nB<end>]\n",
    ]
    # Each is the prompt as served, and what was generated.
    tokenizer = make_tokenizer(REASONING)
    for turn, row in zip((1, 3), tokenize_conversation(messages, tokenizer), strict=True):
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert row.input_ids[: row.loss_mask.index(1)] == prompt


def test_turns_between_tool_calls_share_a_row_and_tool_output_is_not_supervised():
    messages = [
        user("w?"),
        assistant(None, reasoning_content="look", tool_calls=[WEATHER]),
        {"role": "tool", "content": "rain"},
        assistant("Rain.", reasoning_content="so"),
    ]
    [row] = shown(messages, REASONING)
    assert row == (
        '<start>user\nw?<end>\n<start>assistant\n[<think>\nlook\n</think>\n\n{"name": "weather", "arguments": {"in": "Bonn"}}<end>]'
        "\n<start>tool\nrain<end>\n<start>assistant\n[<think>\nso\n</think>\n\nRain.<end>]\n"
    )


def test_tools_and_template_arguments_reach_the_template():
    [row] = shown([user("a"), assistant("b")], TRIMMED, tools='[{"name": "f"}]')
    assert '<start>system\n[{"name": "f"}]<end>' in row.replace("[[", "[")
    [row] = shown([user("a"), assistant("b")], REASONING, chat_template_kwargs={"enable_thinking": False})
    assert row == "<start>user\na<end>\n<start>assistant\n<think>\n\n</think>\n\n[b<end>]\n"
    rows = [{"messages": [user("a"), assistant("bc")]}]
    tokenizer = make_tokenizer(REASONING)
    dataset = TokenDataset(rows, tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(dataset[0]["input_ids"][dataset[0]["loss_mask"]]) == "bc<end>"


def test_a_scaffold_that_closes_itself_stays_in_the_prompt():
    assert shown(TWO_TURNS, CLOSED, eos="<eos>") == [
        "<bos><|user|>hi<|ai|><think>\n\n</think>\n\n[yes, no<eos>]",
        "<bos><|user|>hi<|ai|>yes, no<eos><|user|>and?<|ai|><think>\n\n</think>\n\n[no<eos>]",
    ]
    # An answer that begins as the scaffold does is not taken for it.
    assert shown([user("hi"), assistant("<thing>")], CLOSED, eos="<eos>") == [
        "<bos><|user|>hi<|ai|><think>\n\n</think>\n\n[<thing><eos>]"
    ]


@pytest.mark.parametrize("answer", ["<think>\nwell\n</think>\n\nyes", "well\n</think>\n\nyes"])
def test_an_opened_scaffold_is_followed_by_the_thinking(answer):
    messages = [user("a"), assistant(answer), user("b"), assistant("hm\n</think>\n\nno")]
    assert shown(messages, OPENED, eos="<eos>") == [
        "<bos><|user|>a<|ai|><think>\n[well\n</think>\n\nyes<eos>]",
        "<bos><|user|>a<|ai|>\n\nyes<eos><|user|>b<|ai|><think>\n[hm\n</think>\n\nno<eos>]",
    ]


def test_an_answer_without_the_thinking_that_its_prompt_opened_is_refused():
    for message in (assistant("yes"), assistant("yes", reasoning_content="well")):
        with pytest.raises(
            ValueError, match=r"Turn 1: the prompt ends with '<think>\\n'.*close <think> first.*regenerate"
        ):
            shown([user("a"), message], OPENED, eos="<eos>")


def test_a_scaffold_with_other_blanks_keeps_the_prompts():
    template = (
        "{% for m in messages %}<start>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n<think>\n{% endif %}"
    )
    assert shown([user("a"), assistant("b", reasoning_content="c")], template) == [
        "<start>user\na<end><start>assistant\n<think>\n[c</think>b<end>]"
    ]


def test_all_channels_are_supervised_and_earlier_thinking_is_gone():
    messages = [user("a"), assistant("A", thinking="hm"), user("b"), assistant("B", thinking="so")]
    opening = "<start>system<message>Today: 2026-01-01<end><start>user<message>a<end>"
    assert shown(messages, CHANNELS, eos="<return>") == [
        f"{opening}<start>assistant[<channel>analysis<message>hm<end><start>assistant<channel>final<message>A<return>]",
        f"{opening}<start>assistant<channel>final<message>A<end><start>user<message>b<end>"
        "<start>assistant[<channel>analysis<message>so<end><start>assistant<channel>final<message>B<return>]",
    ]


def test_a_call_ends_a_turn_where_the_target_says_so():
    messages = [
        user("w?"),
        assistant(None, thinking="look", tool_calls=[WEATHER]),
        {"role": "tool", "content": "rain"},
        assistant("Rain."),
    ]
    [row] = shown(messages, CHANNELS, eos="<return>", eos_token_ids=ids_of("<call>"))
    assert row.endswith(
        'assistant[<channel>analysis<message>look<end><start>assistant to=weather<channel>commentary<message>{"in": "Bonn"}<call>]'
        "<start>tool<message>rain<end><start>assistant[<channel>final<message>Rain.<return>]"
    )


def test_generation_stops_at_the_first_end():
    assert shown([user("a"), assistant("b<end>c")], CHATML)[0].endswith("assistant\n[b<end>]c<end>\n")


def test_an_unknown_end_is_kept_without_the_blanks_after_it(data_warnings):
    [row] = shown([user("a"), assistant("bc")], CHATML, eos="<eos>")
    assert row.endswith("[bc<end>]\n")
    TokenDataset([{"messages": [user("a"), assistant("bc")]}] * 2, make_tokenizer(CHATML, "<eos>"))
    assert "2 of 2 assistant turns end without a token that is known to end the target's turns" in data_warnings.text
    data_warnings.clear()
    TokenDataset(
        [{"messages": [user("a"), assistant("bc")]}], make_tokenizer(CHATML, "<eos>"), eos_token_ids=ids_of("<end>")
    )
    assert not data_warnings.text


def test_the_next_turns_header_may_be_the_end():
    """Such a target ends its turn by the token that begins the user's, or a tool's."""
    template = (
        "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|ai|>', 'tool': '<call>'}[m.role] }}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}({{ call.function.name }}){% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<|ai|>{% endif %}"
    )
    assert shown(TWO_TURNS, template, eos="<|user|>") == ["<|user|>hi<|ai|>[yes, no<|user|>]and?<|ai|>[no<|user|>]"]
    messages = [user("a"), assistant("b", tool_calls=[WEATHER]), {"role": "tool", "content": "c"}, assistant("d")]
    assert shown(messages, template, eos="<|user|>", eos_token_ids=ids_of("<call>")) == [
        "<|user|>a<|ai|>[b(weather)<call>]c<|ai|>[d<|user|>]"
    ]


def test_an_opening_answer_is_history():
    assert shown([assistant("welcome"), user("a"), assistant("b")], CHATML) == [
        "<start>assistant\nwelcome<end>\n<start>user\na<end>\n<start>assistant\n[b<end>]\n"
    ]
    with pytest.raises(ValueError, match=r"needs an assistant turn after a prompt, got roles \['assistant'\]"):
        shown([assistant("welcome")], CHATML)


def test_a_tokenizer_that_drops_blanks_supervises_no_more_than_the_turn():
    """The host's own mask reaches the end of the sequence there (huggingface/transformers#47325)."""
    words = ["<unk>", "<end>", "user", "assistant", "yes", "no", ":"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} <end> \n {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    [(ids, mask)] = tokenize_conversation([user("no"), assistant("yes "), user("no"), assistant("no ")], tokenizer)
    assert [words[i] for i, keep in zip(ids, mask, strict=True) if keep] == ["yes", "<end>", "no", "<end>"]


def make_joining_tokenizer(decoder):
    """Writes the prompt's last token and the answer's first as one."""
    backend = Tokenizer(models.BPE({"a": 0, ":": 1, "b": 2, ":b": 3, "<end>": 4}, [(":", "b")]))
    backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'a:' + m.content + '<end>' if m.role == 'assistant' else m.content }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


def test_tokens_are_those_of_the_prompt_alone_where_the_tokenizer_would_join_them():
    tokenizer = make_joining_tokenizer(decoders.Fuse())
    assert tokenizer("ba:b<end>")["input_ids"] == [2, 0, 3, 4]
    assert tokenize_conversation([user("b"), assistant("b")], tokenizer) == [([2, 0, 1, 2, 4], [0, 0, 0, 1, 1])]
    rows = tokenize_conversation([user("b"), assistant("b"), user("b"), assistant("a")], tokenizer)
    assert rows == [  # the second prompt is read as the target would read it, first answer included
        ([2, 0, 1, 2, 4], [0, 0, 0, 1, 1]),
        ([2, 0, 3, 4, 2, 0, 1, 0, 4], [0] * 7 + [1, 1]),
    ]


def test_a_tokenizer_that_says_something_else_in_parts_is_refused():
    with pytest.raises(
        ValueError, match=r"Turn 1: the tokenizer writes the prompt's end 'ba:'.*'b<end>', differently"
    ):
        tokenize_conversation([user("b"), assistant("b")], make_joining_tokenizer(None))


# ---- what cannot be found ----


def test_a_template_that_rewrites_history_is_refused():
    only_last = "{% for m in messages %}{% if loop.last %}{{ m.content }}<end>{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match=r"up to turn 1 differently.*'hi<end>' before, 'yes<end>' with it.*input_ids"):
        shown([user("hi"), assistant("yes")], only_last)


def test_a_prompt_with_another_header_than_the_answers_is_refused():
    template = CHATML.replace("<start>assistant\n{% endif %}", "<start>model\n{% endif %}")
    with pytest.raises(ValueError, match=r"up to turn 1 differently.*model.*assistant"):
        shown([user("hi"), assistant("yes")], template)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (assistant("well\nyes", reasoning_content="hm"), "Turn 1: the chat template leaves out 'hm'.*no thinking"),
        (assistant("yes", tool_calls=[WEATHER]), "leaves out 'weather' of the answer; it writes 'yes<end>.*no tools"),
        (assistant(""), "Turn 1: the answer is empty"),
    ],
    ids=["reasoning", "tools", "nothing"],
)
def test_an_answer_that_the_template_leaves_out_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        shown([user("hi"), answer], CHATML)


def test_a_template_that_knows_parts_only_is_given_parts():
    template = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    with pytest.raises(ValueError, match=r"Turn 1: the chat template leaves out 'yes'.*content only in parts"):
        shown([user("hi"), assistant("yes")], template)
    messages = [user([{"type": "text", "text": "hi"}]), assistant([{"type": "text", "text": "yes"}])]
    for eos in ("<end>", "<eos>"):  # known, and not
        assert shown(messages, template, eos) == ["<start>user\nhi<end>\n<start>assistant\n[yes<end>]\n"]


def test_thinking_after_a_prompt_that_says_there_is_none_is_refused():
    with pytest.raises(ValueError, match=r"up to turn 1 differently.*If it is about thinking.*chat_template_kwargs"):
        shown(
            [user("a"), assistant("b", reasoning_content="c")],
            REASONING,
            chat_template_kwargs={"enable_thinking": False},
        )


def test_a_template_that_raises_is_named():
    template = "{{ raise_exception('Roles must alternate.') }}"
    with pytest.raises(ValueError, match=r"cannot render the roles \['user'\]: Roles must alternate"):
        shown([user("hi"), assistant("yes")], template)
    with pytest.raises(ValueError, match="chat_template is not set"):
        shown([user("hi"), assistant("yes")], None)


# ---- the date ----


def test_the_date_is_the_same_every_day():
    tokenizer = make_tokenizer(
        "{% if strftime_now is defined %}{{ strftime_now('%A, %d %B %Y, %a %b %y %H:%M') }}{% endif %}!"
    )
    assert ChatRenderer(tokenizer).render([user("a")]) == "Thursday, 01 January 2026, Thu Jan 26 12:00!"
    other = ChatRenderer(tokenizer, date=datetime.date(2024, 2, 29))
    assert other.render([user("a")]) == "Thursday, 29 February 2024, Thu Feb 24 12:00!"


def test_the_date_leaves_the_template_alone():
    template = "\n {% set day = strftime_now('%d') %}\n x"
    plain = make_tokenizer(template).apply_chat_template([user("a")], tokenize=False)
    assert ChatRenderer(make_tokenizer(template)).render([user("a")]) == plain


# ---- formats ----

MESSAGES = [{"role": "system", "content": "s"}, user("hi"), assistant("yes")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"messages": None, "conversations": MESSAGES},
        {
            "conversations": [
                {"from": "system", "value": "s", "role": None},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "yes"},
            ]
        },
        {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
        {"prompt": MESSAGES[:2], "completion": "yes"},
    ],
    ids=["messages", "conversations", "sharegpt", "trl", "trl-mixed"],
)
def test_formats_mean_the_same(row):
    tokenizer = make_tokenizer()
    dataset = TokenDataset([row], tokenizer)
    wanted = TokenDataset([{"messages": MESSAGES}], tokenizer)
    assert np.array_equal(dataset[0]["input_ids"], wanted[0]["input_ids"])
    assert np.array_equal(dataset[0]["loss_mask"], wanted[0]["loss_mask"])


def test_prompt_and_completion_as_text():
    row = {"prompt": "hi", "completion": "yes"}
    chat, plain = make_tokenizer(), make_tokenizer(None)
    (ids, mask) = TokenDataset([row], chat)[0].values()
    assert show(chat, (ids, mask)) == "<start>user\nhi<end>\n<start>assistant\n[yes<end>]\n"
    (ids, mask) = TokenDataset([row], plain)[0].values()
    assert show(plain, (ids, mask)) == "hi[yes<end>]"


def test_only_the_completion_is_supervised():
    row = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}
    tokenizer = make_tokenizer()
    (ids, mask) = TokenDataset([row], tokenizer)[0].values()
    assert tokenizer.decode(ids[mask]) == "no<end>"


def test_every_known_role_is_mapped_to_one_that_templates_know():
    assert set(ROLES.values()) == {"system", "developer", "user", "assistant", "tool", "ipython"}
    assert find_conversation({"text": "a"}) is None
    assert find_conversation({"prompt": "a", "completion": "b"}) == Conversation([user("a"), assistant("b")], 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 0, 0]}, "Row 1: it has nothing to learn from.*none of its 4"),
        ({"input_ids": [1, 2, 3, 4], "loss_mask": [1, 1, 1, 1]}, "Row 1: it has no prompt.*all of its 4 tokens"),
        (
            {"input_ids": [1, 2, 3, 4], "loss_mask": [-100, 2, 1, 1]},
            r"Row 1: loss_mask must be 1.*got \[-100, 2\] too",
        ),
        ({"input_ids": [1, 2, 3], "loss_mask": [0, 1]}, "Row 1: 3 input_ids but 2"),
        ({"input_ids": [1, None, 3], "loss_mask": [0, 1, 1]}, "Row 1: input_ids must be.*got None at place 1"),
        ({"input_ids": [1, 2, 3], "loss_mask": [0, 1, None]}, "Row 1: loss_mask must be.*got None at place 2"),
        (
            {"input_ids": [[1, 2, 3]], "loss_mask": [[0, 1, 1]]},
            r"Row 1: input_ids must be a flat list.*\[\[1, 2, 3\]\]",
        ),
        ({"input_ids": [1, [2, 3]], "loss_mask": [0, 1]}, r"Row 1: input_ids must be a flat list.*\[1, \[2, 3\]\]"),
        ({"input_ids": "123", "loss_mask": [0, 1, 1]}, "Row 1: input_ids must be a flat list.*got '123'"),
        ({"input_ids": ["1", "2", "3"], "loss_mask": [0, 1, 1]}, "Row 1: input_ids must be.*got '1' at place 0"),
        ({"input_ids": 7, "loss_mask": 1}, "Row 1: input_ids must be a flat list.*got 7"),
        ({"input_ids": [1, 2.5, 3], "loss_mask": [0, 1, 1]}, r"Row 1: input_ids must be.*whole.*got 2\.5 at place 1"),
        ({"input_ids": [True, True], "loss_mask": [0, 1]}, "Row 1: input_ids must be.*got True at place 0"),
        ({"input_ids": [1, 2**40, 3], "loss_mask": [0, 1, 1]}, "Row 1: input_ids must be.*got 1 to 1099511627776"),
        ({"input_ids": [1, -100, 3], "loss_mask": [0, 1, 1]}, "Row 1: input_ids must be.*got -100 to 3"),
        ({"input_ids": [1, 2, 3, 4, 5], "loss_mask": "01111"}, "Row 1: loss_mask must be a flat list.*got '01111'"),
        ({"input_ids": [1, 2, 3], "loss_mask": [0, 0.5, 1]}, r"Row 1: loss_mask must be 1.*got \[0\.5\] too"),
        ({"input_ids": [], "loss_mask": []}, "Row 1: it has nothing to learn from.*none of its 0"),
        ({"text": "hello", "source": None}, r"Row 1: it must have messages.*\['text'\]"),
        ({"prompt": "hello"}, r"Row 1: it must have messages.*\['prompt'\]"),
        ({"messages": [user("hi")]}, "Row 1: A training conversation needs an assistant turn"),
        ({"messages": []}, r"Row 1: Expected a list of messages, got \[\]"),
        ({"messages": "hi"}, "Row 1: Expected a list of messages, got 'hi'"),
        ({"messages": [{"content": "hi"}]}, "Row 1: Message 0 must have role and content, or from and value"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "bard", "value": "no"}]},
            "Row 1: Message 1 has the unknown role 'bard'; known are system.*gpt.*only what the target itself wrote",
        ),
    ],
)
def test_rows_that_cannot_teach_are_named(row, message):
    good = {"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1]}
    with pytest.raises(ValueError, match=message):
        TokenDataset([good, row], make_tokenizer())


@pytest.mark.parametrize(
    "of",
    [list, tuple, np.array, torch.tensor, lambda x: np.array(x, dtype=object), lambda x: np.array(x, dtype=np.uint16)],
    ids=["list", "tuple", "array", "tensor", "objects", "small"],
)
def test_ids_and_masks_may_be_any_sequence_of_whole_numbers(of):
    ids, mask = [1, 2, 3, 40000], [0, 0, 1, 1]
    for row_mask in (of(mask), [False, False, True, True], [0.0, 0.0, 1.0, 1.0]):
        row = TokenDataset([{"input_ids": of(ids), "loss_mask": row_mask}])[0]
        assert (row["input_ids"].tolist(), row["loss_mask"].tolist()) == (ids, [False, False, True, True])
        assert (row["input_ids"].dtype, row["loss_mask"].dtype) == (np.int32, bool)


def test_text_needs_a_tokenizer_and_data_must_not_be_empty():
    with pytest.raises(ValueError, match="Row 0: it is text; give processing_class"):
        TokenDataset([{"messages": MESSAGES}])
    with pytest.raises(ValueError, match="empty"):
        TokenDataset([])


# ---- lengths ----


def test_answers_of_one_token_are_left_out(data_warnings):
    rows = [
        {"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 0, 1]},
        {"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1], "source": "web"},
    ]
    dataset = TokenDataset(rows)
    assert len(dataset) == 1
    assert dataset.sources == ["web"]
    assert "1 of 2 rows are left out" in data_warnings.text


def test_long_rows_are_cut_and_left_out_when_nothing_remains():
    long = {"input_ids": list(range(20)), "loss_mask": [0] * 12 + [1] * 8}
    short = {"input_ids": list(range(8)), "loss_mask": [0] * 2 + [1] * 6}
    dataset = TokenDataset([long, short], max_length=6)
    assert len(dataset) == 1
    assert dataset[0]["input_ids"].tolist() == list(range(6))
    counts = dataset.counts
    assert (counts.num_read, counts.num_cut, counts.num_cut_tokens, counts.num_left_out) == (2, 2, 16, 1)
    with pytest.raises(ValueError, match="no row is left"):
        TokenDataset([long], max_length=6)


def test_a_cut_span_is_supervised_up_to_the_cut():
    tokenizer = make_tokenizer()
    row = {"messages": [user("hi"), assistant("abcdef")]}
    whole = TokenDataset([row], tokenizer)[0]["loss_mask"]
    first = int(whole.argmax())
    cut = TokenDataset([row], tokenizer, max_length=first + 3)[0]["loss_mask"]
    assert cut.tolist() == [False] * first + [True] * 3


def test_rows_of_one_conversation_are_counted():
    messages = [user("a"), assistant("A", reasoning_content="x"), user("b"), assistant("B", reasoning_content="y")]
    counts = TokenDataset([{"messages": messages}], make_tokenizer(REASONING)).counts
    assert (counts.num_read, counts.num_made, counts.num_turns, counts.num_unterminated) == (1, 2, 2, 0)


def test_a_first_token_and_one_alone_train_nothing():
    assert not trains_something(np.array([True, True, False, True]))


def test_dialogues_need_a_chat_template():
    tokenizer = make_tokenizer(None)
    with pytest.raises(ValueError, match="Row 0: it is a dialogue, and the tokenizer has no chat template"):
        TokenDataset([{"messages": [user("a"), assistant("b")]}], tokenizer)
    assert len(TokenDataset([{"prompt": "a", "completion": "bc"}], tokenizer)) == 1
