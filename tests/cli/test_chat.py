"""`hf-eagle3 chat`: a conversation on tiny models, with the drafter or without."""

import io
import signal
import sys
import threading

import pytest
import torch
from helpers.marks import slow_but
from helpers.models import make_drafter, make_target
from helpers.tokenizers import tokenizer as make_words
from transformers.generation.streamers import BaseStreamer

from hf_eagle3 import cli
from hf_eagle3.cli.conversation import Conversation
from hf_eagle3.cli.loading import Pair
from hf_eagle3.console.interrupts import noticing_interrupts

pytestmark = pytest.mark.any_release


@pytest.fixture
def chat(folders, monkeypatch, capsys):
    """Types lines into `hf-eagle3 chat`; what stdout and stderr say."""

    def type_in(*lines: str, options=("--max-new-tokens", "12")) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert cli.main(["chat", str(folders / "target"), "--drafter", str(folders / "drafter"), *options]) == 0
        return capsys.readouterr()

    return type_in


class Counter(BaseStreamer):
    """Sets an event once so many tokens have come."""

    def __init__(self, num_tokens: int, event: threading.Event):
        self.left, self.event = num_tokens + 1, event  # the prompt is put first

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            self.event.set()

    def end(self) -> None:
        pass


def make_conversation(family: str = "llama", max_new_tokens: int = 10) -> Conversation:
    """With a target of a family, and a tokenizer of words."""
    target, words = make_target(family), make_words()
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return Conversation(Pair(target, make_drafter(target), words), max_new_tokens=max_new_tokens)


def ask(conversation: Conversation, text: str, **options):
    return conversation.ask(text, stop=threading.Event(), **options)


def answer_anew(conversation: Conversation, messages: list[str]) -> str:
    """What the target says by itself, of the whole conversation at once."""
    target, _, words = conversation._pair
    turns = [{"role": "user", "content": text} for text in messages]
    ids = words.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    return words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# ---- the command ----


def test_texts_are_the_same_with_and_without_the_drafter(chat):
    turns = ("abc", "what?", "and then?")
    drafted, err = chat(*turns)
    plain, plain_err = chat("/off", *turns)
    mixed, mixed_err = chat(turns[0], "/off", turns[1], "/on", turns[2], "/quit", "not read")
    assert drafted == plain == mixed
    assert len(drafted) > 12
    assert err.count(" tok/s, ") == 3
    assert "tokens a round]" in err
    assert plain_err.count("drafting off]") == 3
    assert mixed_err.count("drafting off]") == 1


def test_clear_forgets_what_was_said(chat):
    once, _ = chat("abc")
    assert chat("abc", "/clear", "abc")[0] == 2 * once
    assert chat("abc", "abc")[0] != 2 * once


def test_lines_that_are_no_turn(chat):
    out, err = chat("", "   ", "/of", "/etc/passwd?", options=("--max-new-tokens", "2"))
    assert "/of is no command (did you mean /off or /on?): /off, /on, /clear, /quit" in err
    assert err.count(" tok/s, ") == 1
    assert out


def test_target_without_a_chat_template_is_refused(chat, folders, tokenizer, capsys, monkeypatch):
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    (folders / "target" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folders / "target")
    tokenizer.chat_template = kept
    assert cli.main(["chat", str(folders / "target"), str(folders / "drafter")]) == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "cpu", "--device-map", "auto"], "--device cpu and --device-map auto both say where"),
        (["--num-draft-tokens", "65"], "up to 64, 0 for none; got 65"),
        (["--device", "banana"], "--device banana is no device that PyTorch knows"),
    ],
    ids=["two-places", "too-deep", "no-device"],
)
def test_what_cannot_be_meant_is_refused(folders, options, says, capsys):
    assert cli.main(["chat", str(folders / "target"), str(folders / "drafter"), *options]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "warm"])
def test_temperature_is_a_number_of_at_least_0(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["chat", "t", "d", f"--temperature={value}"])
    assert f"expected a number of at least 0, got '{value}'" in capsys.readouterr().err


# ---- its cache ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", slow_but(["llama", "gpt_oss"], ["llama", "qwen3", "gpt_oss", "gemma3"]))
@pytest.mark.parametrize("drafts", ["both", "first", "second", "none"])
def test_turns_go_on_from_the_cache(family, drafts):
    conversation, said = make_conversation(family), ["w5 w9 w13"]
    conversation.is_drafting = drafts in ("both", "first")
    first = ask(conversation, said[0])
    assert (first.num_cached, first.num_tokens) == (0, 10)
    assert first.text == answer_anew(conversation, said)
    said += [first.text, "w7 w3"]
    conversation.is_drafting = drafts in ("both", "second")
    second = ask(conversation, said[-1])
    assert second.text == answer_anew(conversation, said)
    assert (second.acceptance_length is None) == (drafts in ("first", "none"))
    if family == "llama":
        assert second.num_cached == 12  # but the last token, which nobody has read yet


@pytest.mark.parametrize("family", slow_but(["llama"], ["llama", "gpt_oss", "gemma3"]))
def test_history_that_a_template_rewrites_is_read_again(family):
    conversation = make_conversation(family)
    first = ask(conversation, "w5 w9 w13 w11")
    conversation._messages[-1]["content"] = "w2 w2"  # as templates do that leave thinking out
    second = ask(conversation, "w7")
    assert second.text == answer_anew(conversation, ["w5 w9 w13 w11", "w2 w2", "w7"])
    assert first.text != second.text
    assert second.num_cached == (4 if family == "llama" else second.num_cached)


@pytest.mark.parametrize("is_drafting", [True, False])
def test_stopped_answer_stays_said_and_the_conversation_goes_on(is_drafting):
    conversation, stop = make_conversation(), threading.Event()
    conversation.is_drafting = is_drafting
    first = conversation.ask("w5 w9 w13", stop=stop, streamer=Counter(3, stop))
    assert 3 <= first.num_tokens < 10
    whole = answer_anew(conversation, ["w5 w9 w13"])
    assert whole.startswith(first.text)
    second = ask(conversation, "w7 w3")
    assert second.text == answer_anew(conversation, ["w5 w9 w13", first.text, "w7 w3"])


def test_turn_that_cannot_be_answered_was_not_asked():
    conversation = make_conversation()
    first = ask(conversation, "w5")
    conversation._options["max_new_tokens"], kept = 0, conversation._options["max_new_tokens"]
    with pytest.raises(ValueError):  # noqa: PT011  the host's own words
        ask(conversation, "w7")
    conversation._options["max_new_tokens"] = kept
    assert ask(conversation, "w8").text == answer_anew(conversation, ["w5", first.text, "w8"])


# ---- Ctrl-C ----


def test_first_interrupt_is_noticed_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with noticing_interrupts() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
