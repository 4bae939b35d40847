"""A target answers prompts; what it wrote is kept, whatever interrupts it."""

import _thread
import contextlib
import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.chat import (
    CHANNELS,
    CHATML,
    OPENED,
    REASONING,
    TRIMMED,
    assistant,
    make_chain,
    make_tokenizer,
    show,
    user,
    write_rows,
)
from helpers.marks import slow_but
from helpers.paths import ROOT
from helpers.processes import worker_environment
from helpers.training import TINY
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_eagle3 import cli
from hf_eagle3.console.interrupts import INTERRUPTED
from hf_eagle3.data_parallel import Team
from hf_eagle3.training import ChatRenderer, TokenDataset, new_drafter
from hf_eagle3.training.data.answer_shards import find_shares, name_share
from hf_eagle3.training.data.answer_turns import TurnFile
from hf_eagle3.training.data.files import append_rows, keep_lines, read_rows, read_whole_lines
from hf_eagle3.training.data.prompts import (
    Prompt,
    exclude,
    find_user_slot,
    hash_text,
    limit_share,
    make_prompts,
    read_prompts,
)
from hf_eagle3.training.data.regenerate import Sampling, regenerate

pytestmark = pytest.mark.any_release

GREEDY = Sampling(temperatures=(0,), max_new_tokens=12, batch_size=2)


def ask(*turns):
    return Prompt([user(turns[0])], turns[1:])


TURN_FILE_ADD = TurnFile.add


def answers(target, tokenizer, prompts, path, sampling=GREEDY, **others):
    regenerate(target, ChatRenderer(tokenizer), prompts, path, sampling, **others)
    return list(read_rows(path))


def texts(tokenizer, rows):
    return [show(tokenizer, (row["input_ids"], row["loss_mask"])) for row in rows]


@pytest.fixture(scope="module")
def random_target():
    """Writes anything, ends now and then."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    config = {**TINY, "vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": None, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.3)).eval().requires_grad_(False)
    model.lm_head.weight[end] *= 3
    return model


@pytest.fixture
def said(caplog):
    """What the modules say, through the host's logger, which is quiet in tests."""
    loggers = [logging.get_logger(f"hf_eagle3.training.{name}") for name in ("prompts", "regenerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel("WARNING")
        logger.addHandler(caplog.handler)
    yield caplog
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)


# ---- answers ----


def test_each_row_is_what_the_target_writes_alone_in_the_order_of_the_prompts(random_target, tmp_path):
    tokenizer = make_tokenizer()
    prompts = [ask("a" * n) for n in (9, 1, 30, 4, 2, 17, 5)]
    rows = answers(random_target, tokenizer, prompts, tmp_path / "out.jsonl")
    assert [row["prompt_id"] for row in rows] == list(range(7))
    for prompt, row in zip(prompts, rows, strict=True):
        ids = tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        alone = random_target.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        assert row["input_ids"] == alone
        assert row["loss_mask"].index(1) == ids["input_ids"].shape[1]
        assert (row["finish"] == "stop") == (alone[-1] == tokenizer.eos_token_id)
    assert {row["finish"] for row in rows} == {"stop", "length"}  # both occur


def test_prompts_join_rounds_of_our_loop(random_target, tmp_path, monkeypatch):
    """Nobody calls `generate`, which would wait for the longest answer of a batch."""
    monkeypatch.setattr(random_target, "generate", None, raising=False)
    assert len(answers(random_target, make_tokenizer(), [ask("a"), ask("bc"), ask("d")], tmp_path / "out.jsonl")) == 3


def test_the_bar_moves_with_answers_that_wait_to_be_written(random_target, tmp_path, monkeypatch):
    """They are written in the order of the prompts."""
    path, seen = tmp_path / "out.jsonl", []

    update = tqdm.update

    def watch(self, n=1):
        seen.append((n, path.exists()))
        return update(self, n)

    monkeypatch.setattr(tqdm, "update", watch)
    prompts = [ask("a" * n) for n in (30, 1, 9, 4, 2)]
    rows = answers(random_target, make_tokenizer(), prompts, path)
    assert sum(n for n, _ in seen) == 5
    assert len(seen) > 2
    assert not seen[0][1]
    assert len(rows) == 5


def test_nothing_after_the_end_of_turn_is_kept(tmp_path):
    tokenizer = make_tokenizer()
    target = make_chain(tokenizer, "\nyes<end>")
    rows = answers(target, tokenizer, [ask("a"), ask("bcd")], tmp_path / "out.jsonl")
    assert texts(tokenizer, rows) == [
        f"<start>user\n{said}<end>\n<start>assistant\n[yes<end>]" for said in ("a", "bcd")
    ]
    assert len(TokenDataset(rows)) == 2  # rows for the trainer as they are


def test_a_drafter_changes_no_answer(random_target, tmp_path):
    tokenizer = make_tokenizer()
    prompts = [ask("a", "b"), ask("bcd")]
    torch.manual_seed(0)
    drafter = new_drafter(random_target, torch.arange(200)).eval()
    plain = answers(random_target, tokenizer, prompts, tmp_path / "plain.jsonl")
    assert answers(random_target, tokenizer, prompts, tmp_path / "drafted.jsonl", drafter=drafter) == plain


def test_several_temperatures_and_samples(random_target, tmp_path):
    sampling = Sampling(temperatures=(0, 1.5), num_return_sequences=2, max_new_tokens=12, batch_size=4, top_k=50)
    prompts = [ask("a"), Prompt([user("b")], source="web")]
    state = torch.get_rng_state()
    rows = answers(random_target, make_tokenizer(), prompts, tmp_path / "out.jsonl", sampling)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(r["prompt_id"], r["temperature"], r["sample"]) for r in rows] == [
        (i, t, k) for i in range(2) for t, k in ((0, 0), (1.5, 0), (1.5, 1))
    ]
    assert len({tuple(row["input_ids"]) for row in rows}) > 3  # neither the samples nor the temperatures agree
    assert [row.get("source") for row in rows] == [None] * 3 + ["web"] * 3
    record = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert record["temperatures"] == [0, 1.5]
    assert record["top_k"] == 50
    again = answers(random_target, make_tokenizer(), prompts, tmp_path / "again.jsonl", sampling)
    assert again == rows


# ---- dialogues ----


def test_turns_are_asked_one_after_the_other_in_one_row(tmp_path):
    tokenizer = make_tokenizer()
    target = make_chain(tokenizer, "\nyes<end>")
    [row, short] = answers(target, tokenizer, [ask("a", "b", "c"), ask("d")], tmp_path / "out.jsonl")
    assert texts(tokenizer, [row]) == [
        "".join(f"<start>user\n{said}<end>\n<start>assistant\n[yes<end>]" + "\n" * (said != "c") for said in "abc")
    ]
    assert (row["prompt_id"], short["prompt_id"]) == (0, 1)


def test_a_rewritten_history_gives_a_row_for_each_turn(tmp_path):
    tokenizer = make_tokenizer(REASONING)
    target = make_chain(tokenizer, "\n<think>m</think>y<end>")
    rows = answers(target, tokenizer, [ask("a", "b")], tmp_path / "out.jsonl")
    assert texts(tokenizer, rows) == [
        "<start>user\na<end>\n<start>assistant\n[<think>m</think>y<end>]",
        "<start>user\na<end>\n<start>assistant\ny<end>\n<start>user\nb<end>\n<start>assistant\n[<think>m</think>y<end>]",
    ]
    assert [row["num_rows"] for row in rows] == [2, 2]


def test_the_history_holds_what_the_last_channel_said(tmp_path):
    tokenizer = make_tokenizer(CHANNELS, "<return>")
    target = make_chain(tokenizer, "t<channel>f<message>k<return>", end="<return>")
    first, second = texts(tokenizer, answers(target, tokenizer, [ask("a", "b")], tmp_path / "out.jsonl"))
    assert first.endswith("<start>user<message>a<end><start>assistant[<channel>f<message>k<return>]")
    assert second.endswith(
        "<message>a<end><start>assistant<channel>final<message>k<end><start>user<message>b<end>"
        "<start>assistant[<channel>f<message>k<return>]"
    )


def test_sampled_tokens_stay_though_the_tokenizer_writes_others(tmp_path):
    tokenizer = make_tokenizer(merges=(("y", "e"),))
    target = make_chain(tokenizer)
    y, e, s, newline = (tokenizer.convert_tokens_to_ids(letter) for letter in ("y", "e", "s", "Ċ"))
    for token, follower in ((newline, y), (y, e), (e, s)):
        target.lm_head.weight[:, token] = 0
        target.lm_head.weight[follower, token] = 1
    assert y not in tokenizer("yes")["input_ids"]
    [row] = answers(target, tokenizer, [ask("a", "b")], tmp_path / "out.jsonl")
    generated = [token for token, keep in zip(row["input_ids"], row["loss_mask"], strict=True) if keep]
    assert generated == [y, e, s, tokenizer.eos_token_id] * 2


def test_an_answer_that_was_cut_is_not_gone_on_from(tmp_path):
    tokenizer = make_tokenizer()
    target = make_chain(tokenizer, "\nyes<end>")
    sampling = Sampling(temperatures=(0,), max_new_tokens=2)
    [row] = answers(target, tokenizer, [ask("a", "b")], tmp_path / "out.jsonl", sampling)
    assert texts(tokenizer, [row]) == ["<start>user\na<end>\n<start>assistant\n[ye]"]
    assert row["finish"] == "length"


# ---- interruptions ----


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_run_goes_on_where_it_stopped(random_target, tmp_path, suffix, said):
    tokenizer = make_tokenizer()
    prompts = [ask("a", "b"), ask("c"), ask("d", "e", "f"), ask("g"), ask("h")]
    whole = tmp_path / f"whole{suffix}"
    wanted = answers(random_target, tokenizer, prompts, whole)
    lines = [json.dumps(row) + "\n" for row in wanted]
    for kept in range(len(lines)):
        part = tmp_path / f"part{kept}{suffix}"
        cut = "".join(lines[:kept]) + lines[kept][:40]
        if suffix == ".jsonl":
            part.write_text(cut)
        else:  # a block for each prompt, as they are written, and one that is cut
            blocks = [gzip.compress(line.encode()) for line in lines]
            part.write_bytes(b"".join(blocks[:kept]) + blocks[kept][: len(blocks[kept]) // 2])
        shutil.copy(f"{whole}.meta.json", f"{part}.meta.json")  # written before any row
        assert answers(random_target, tokenizer, prompts, part) == wanted
    assert "ends in the middle of a prompt's rows" in said.text
    size = whole.stat().st_size
    said.clear()
    assert answers(random_target, tokenizer, prompts, whole) == wanted  # nothing is left to do
    assert whole.stat().st_size == size
    assert not said.text
    assert len(answers(random_target, tokenizer, [*prompts, ask("more")], whole)) == len(wanted) + 1


class Stop(KeyboardInterrupt):
    """Somebody has had enough."""


def stopping(monkeypatch, after):
    """Let a run stop after so many times that answers were kept. Returns the list of how many each time."""
    calls, add = [], TURN_FILE_ADD

    def spy(self, turns):
        if len(calls) == after:
            raise Stop
        turns = list(turns)
        calls.append(len(turns))
        add(self, turns)

    monkeypatch.setattr(TurnFile, "add", spy)
    return calls


@pytest.mark.parametrize("after", slow_but([5], [0, 1, 3, 5, 7]))
@pytest.mark.parametrize("team", slow_but([1], [1, 2]))
def test_a_stop_loses_one_batch(tmp_path, monkeypatch, after, team):
    """In the middle of a window, of dialogues, and of the temperatures of one prompt."""
    tokenizer = make_tokenizer()
    target = make_chain(tokenizer, "\nyes<end>")
    prompts = [ask("a" * n, *"bc"[: n % 3]) for n in (9, 1, 5, 2)]
    sampling = Sampling(temperatures=(0, 1e-6), max_new_tokens=6, batch_size=2)  # as good as greedy, and drawn
    calls = stopping(monkeypatch, after=-1)
    wanted = answers(target, tokenizer, prompts, tmp_path / "whole.jsonl", sampling)
    num_whole, path = sum(calls), tmp_path / "out.jsonl"
    calls = stopping(monkeypatch, after)
    with pytest.raises(Stop):
        answers(target, tokenizer, prompts, path, sampling)
    again = stopping(monkeypatch, after=-1)
    if team > 1:
        assert answer_together(team, target, tokenizer, prompts, path, sampling) == wanted
    else:
        assert answers(target, tokenizer, prompts, path, sampling) == wanted
    assert sum(calls) + sum(again) == num_whole
    assert {place.name for place in tmp_path.glob("out.jsonl*")} == {"out.jsonl", "out.jsonl.meta.json"}


@pytest.mark.slow
def test_a_run_that_stops_again_and_again_comes_to_its_end(random_target, tmp_path, monkeypatch):
    tokenizer, path = make_tokenizer(), tmp_path / "out.jsonl"
    prompts = [ask("a" * n, "b") for n in (9, 1, 30, 4, 2)]
    wanted = answers(random_target, tokenizer, prompts, tmp_path / "whole.jsonl")
    for _ in range(20):
        stopping(monkeypatch, after=1)
        try:
            assert answers(random_target, tokenizer, prompts, path) == wanted
            break
        except Stop:
            assert not (path.exists() and len(list(read_rows(path))) == len(wanted))
    else:
        pytest.fail("no end")
    assert not list(tmp_path.glob("out.jsonl.turns*"))


def test_a_file_of_turns_that_is_none_is_named(random_target, tmp_path, monkeypatch):
    tokenizer, path = make_tokenizer(), tmp_path / "out.jsonl"
    prompts = [ask("aa"), ask("b"), ask("c"), ask("d")]
    stopping(monkeypatch, after=1)
    with pytest.raises(Stop):
        answers(random_target, tokenizer, prompts, path)
    [turns] = tmp_path.glob("out.jsonl.turns*")
    kept = turns.read_text()
    with pytest.raises(ValueError, match="begun with max_new_tokens 12; now it is max_new_tokens 13"):
        answers(random_target, tokenizer, prompts, path, Sampling((0,), max_new_tokens=13))
    with pytest.raises(ValueError, match=r"turns0, line 1: no answer to one of these prompts\. .*or delete it"):
        answers(random_target, tokenizer, [ask("z")] * 4, path)
    for line in ("5", "{}", "x", kept.splitlines()[0].replace("0", '"0"', 1)):
        turns.write_text(line + "\n")
        with pytest.raises(ValueError, match="turns0, line 1: no answer"):
            answers(random_target, tokenizer, prompts, path)
    turns.write_text(kept + kept[:20])  # cut in a line
    stopping(monkeypatch, after=-1)
    assert len(answers(random_target, tokenizer, prompts, path)) == 4


def test_draws_of_a_run_that_goes_on_are_others(tmp_path, monkeypatch):
    """Where all prompts are one, a run that drew the numbers of the one before would give its answers again."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    target = make_chain(tokenizer)
    target.lm_head.weight.zero_()  # anything
    sampling, path = Sampling((1.0,), num_return_sequences=6, max_new_tokens=8, batch_size=2), tmp_path / "out.jsonl"
    for after in (1, 1, -1):
        stopping(monkeypatch, after)
        with contextlib.suppress(Stop):
            answers(target, tokenizer, [ask("a")], path, sampling)
    rows = list(read_rows(path))
    assert len({tuple(row["input_ids"]) for row in rows}) == len(rows) == 6


def test_a_prompt_of_several_rows_is_answered_whole_or_not_at_all(tmp_path):
    tokenizer = make_tokenizer(REASONING)
    target = make_chain(tokenizer, "\n<think>m</think>y<end>")
    prompts = [ask("a", "b"), ask("c", "d")]
    wanted = answers(target, tokenizer, prompts, tmp_path / "whole.jsonl")
    part = write_rows(tmp_path / "part.jsonl", wanted[:3])
    assert answers(target, tokenizer, prompts, part) == wanted


def test_a_file_that_was_begun_otherwise_is_not_gone_on_with(random_target, tmp_path):
    tokenizer, path = make_tokenizer(), tmp_path / "out.jsonl"
    answers(random_target, tokenizer, [ask("a")], path, target_name="one")
    with pytest.raises(ValueError, match=r"begun with max_new_tokens 12; now it is max_new_tokens 13\. Give the same"):
        answers(random_target, tokenizer, [ask("a")], path, Sampling((0,), max_new_tokens=13), target_name="one")
    with pytest.raises(ValueError, match="begun with target 'one'; now it is target 'two'"):
        answers(random_target, tokenizer, [ask("a")], path, target_name="two")
    with pytest.raises(ValueError, match="in line 1 to another prompt than number 0 of these"):
        answers(random_target, tokenizer, [ask("b")], path, target_name="one")
    foreign = write_rows(tmp_path / "foreign.jsonl", [{"input_ids": [1], "loss_mask": [1]}])
    with pytest.raises(ValueError, match="was not written by regenerate"):
        answers(random_target, tokenizer, [ask("b")], foreign)
    with pytest.raises(ValueError, match="no prompt is left"):
        answers(random_target, tokenizer, [], tmp_path / "none.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("one_line.jsonl", b'{"important": "my only copy"}'),
        ("no_object.jsonl", b"5\n"),
        ("no_json.jsonl", b"garbage\n"),
        ("no_gzip.jsonl.gz", b'{"a": 1}\n'),
    ],
)
@pytest.mark.parametrize("has_record", [False, True])
def test_a_file_of_somebody_elses_stays(random_target, tmp_path, name, content, has_record):
    answers(random_target, make_tokenizer(), [ask("a")], tmp_path / "own.jsonl")
    (path := tmp_path / name).write_bytes(content)
    if has_record and not name.startswith("one_line"):  # a line that is cut off may be ours
        (tmp_path / "own.jsonl.meta.json").rename(tmp_path / (name + ".meta.json"))
    with pytest.raises(ValueError, match=rf"{name} (was not written by regenerate|is named .gz)"):
        answers(random_target, make_tokenizer(), [ask("a")], path)
    assert path.read_bytes() == content


def test_a_full_disk_is_said():
    with pytest.raises(
        OSError, match=r"/dev/full could not be written to.*The rows before stay usable; make room"
    ) as told:
        append_rows(Path("/dev/full"), [{"a": 1}])
    assert told.value.__cause__.errno == errno.ENOSPC


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_what_was_written_before_the_disk_was_full_is_gone_on_with(random_target, tmp_path):
    tokenizer, prompts = make_tokenizer(), [ask("a"), ask("b"), ask("c")]
    wanted = answers(random_target, tokenizer, prompts, tmp_path / "whole.jsonl")
    path, num_calls = tmp_path / "out.jsonl", 0

    def fill_up(place, rows):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            place.write_text(place.read_text() + json.dumps(rows[0])[:30])  # as far as there was room
            place = Path("/dev/full")
        append_rows(place, rows)

    with pytest.raises(OSError, match="make room"):
        answers(random_target, tokenizer, prompts, path, append=fill_up)
    assert answers(random_target, tokenizer, prompts, path) == wanted


def test_lines_are_cut_only_where_something_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    assert not keep_lines(path, 0)
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert list(read_whole_lines(path)) == ['{"a": 1}\n', '{"a": 2}\n']
    assert keep_lines(path, 2)
    assert not keep_lines(path, 2)
    assert keep_lines(path, 1)
    assert path.read_text() == '{"a": 1}\n'


# ---- several processes ----


class Thread(Team):
    """One of several members of a team that are threads."""

    def __init__(self, rank, size, barrier, table):
        self.rank, self.size, self.device, self._state = rank, size, torch.device("cpu"), None
        self._barrier, self._table = barrier, table

    def wait(self):
        self._barrier.wait(timeout=60)

    def gather(self, item):
        self._table[self.rank] = item
        self.wait()
        items = [self._table[rank] for rank in range(self.size)]
        self.wait()
        return items


def together(size, work):
    """`work(team)` by all members of a team; when one fails, those that wait for it do too, as under a launcher."""
    barrier, table, errors = threading.Barrier(size), {}, []

    def run(rank):
        try:
            work(Thread(rank, size, barrier, table))
        except Exception as error:  # noqa: BLE001  whatever it is, it is raised below
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error


def answer_together(size, target, tokenizer, prompts, path, sampling=GREEDY, **options):
    together(
        size, lambda team: regenerate(target, ChatRenderer(tokenizer), prompts, path, sampling, team=team, **options)
    )
    return list(read_rows(path))


class DiedError(Exception):
    """What a process dies of."""


def dying(name, count):
    """Options of a run that dies in write number `count` to a file whose name ends in `name`."""
    num_calls = 0

    def append(place, rows):
        nonlocal num_calls
        num_calls += place.name.endswith(name)
        if place.name.endswith(name) and num_calls == count:
            place.write_text((place.read_text() if place.exists() else "") + json.dumps(next(iter(rows)))[:30])
            raise DiedError
        append_rows(place, rows)

    return {"append": append, "window": 1}  # a write for each batch


PROMPTS = [ask("a", "b"), *(ask(letter) for letter in "cdefgh"), ask("d", "e", "f"), *(ask(x * 3) for x in "ghijk")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("size", [2, 3, 20], ids="{} processes".format)
def test_several_processes_write_what_one_writes(random_target, tmp_path, suffix, size):
    tokenizer, path = make_tokenizer(), tmp_path / f"team{suffix}"
    wanted = answers(random_target, tokenizer, PROMPTS, tmp_path / "one.jsonl")
    assert answer_together(size, random_target, tokenizer, PROMPTS, path) == wanted
    assert not find_shares(path)
    more = [*PROMPTS, ask("more")]  # is gone on with, in another number
    assert answers(random_target, tokenizer, more, path)[:-1] == wanted


@pytest.mark.parametrize(
    ("name", "count"), [("share0.jsonl", 2), ("share1.jsonl", 1), ("share1.jsonl", 3), ("out.jsonl", 1)]
)
@pytest.mark.parametrize("then", slow_but([2], [1, 2, 3]), ids="then {}".format)
def test_when_a_process_dies_nothing_is_lost_and_nothing_doubled(
    random_target, tmp_path, monkeypatch, name, count, then
):
    tokenizer, path = make_tokenizer(), tmp_path / "out.jsonl"
    wanted = answers(random_target, tokenizer, PROMPTS, tmp_path / "one.jsonl")
    with pytest.raises(DiedError):
        answer_together(2, random_target, tokenizer, PROMPTS, path, **dying(name, count))
    kept = {json.loads(line)["prompt_id"] for share in find_shares(path) for line in read_whole_lines(share)}
    assert kept  # of both processes, in most of these
    asked_again = []
    original = random_target.generate
    monkeypatch.setattr(
        random_target, "generate", lambda **call: asked_again.append(len(call["input_ids"])) or original(**call)
    )
    assert answer_together(then, random_target, tokenizer, PROMPTS, path) == wanted
    assert not find_shares(path)
    turns = sum(1 + len(PROMPTS[i].later) for i in range(len(PROMPTS)) if i not in kept)
    assert sum(asked_again) <= turns  # an answer that is there is not asked for again


def test_sampled_answers_of_several_processes_are_several(tmp_path):
    """Where all prompts are one, processes that drew the same numbers would give the same answers."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    target = make_chain(tokenizer)
    target.lm_head.weight.zero_()  # anything
    sampling, path = Sampling((1.0,), max_new_tokens=8, batch_size=1), tmp_path / "out.jsonl"
    for num_prompts in (2, 4):  # the second run goes on
        rows = answer_together(2, target, tokenizer, [ask("a")] * num_prompts, path, sampling)
    assert len({tuple(row["input_ids"]) for row in rows}) == len(rows) == 4


def test_shares_of_other_prompts_or_settings_are_refused(random_target, tmp_path):
    tokenizer, path = make_tokenizer(), tmp_path / "out.jsonl"
    answers(random_target, tokenizer, [ask("a"), ask("b")], path)
    path.rename(name_share(path, 3))
    with pytest.raises(ValueError, match=r"share3\.jsonl has an answer in line 2 to another prompt than number 1"):
        answers(random_target, tokenizer, [ask("a"), ask("c")], path)
    path.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="begun with max_new_tokens 12; now it is max_new_tokens 13"):
        answers(random_target, tokenizer, [ask("a"), ask("b")], path, Sampling((0,), max_new_tokens=13))
    assert len(answers(random_target, tokenizer, [ask("a"), ask("b")], path)) == 2
    assert not find_shares(path)


def test_several_processes_make_up_prompts_together(random_target, tmp_path):
    renderer, path, made = ChatRenderer(make_tokenizer()), tmp_path / "made.jsonl", {}

    def work(team):
        made[team.rank] = make_prompts(random_target, renderer, 5, path, batch_size=2, seed=1, team=team)

    together(2, work)
    texts = [prompt.user_texts[0] for prompt in made[0]]
    assert made[0] == made[1]
    assert len(set(texts)) == 5
    assert [row["prompt"] for row in read_rows(path)] == texts


# ---- prompts ----


def test_prompts_of_every_kind(tmp_path):
    system = {"role": "system", "content": "s"}
    path = write_rows(
        tmp_path / "prompts.jsonl.gz",
        [
            {"prompt": "a", "source": "web"},
            {"turns": ["a", "b"]},
            {"messages": [system, user("a"), assistant("x"), user("b")]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]},
            {"messages": [system, user("a"), assistant("x"), user("b"), assistant("y")], "tools": '[{"name": "f"}]'},
        ],
    )
    assert read_prompts(read_rows(path)) == [
        Prompt([user("a")], source="web"),
        ask("a", "b"),
        Prompt([system, user("a"), assistant("x"), user("b")]),
        ask("a"),
        Prompt([system, user("a")], ("b",), tools=[{"name": "f"}]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "hi"}', r"row 1: expected messages, prompt or turns, got \['text'\]"),
        (
            '{"messages": [{"role": "assistant", "content": "hi"}]}',
            "row 1: the conversation must end with the user's turn",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}',
            r"must end with the user's turn.*\['user', 'tool'\]",
        ),
        ('{"turns": [1]}', r"row 1: turns must be a list of what the user says, got \[1\]"),
        ('{"messages": [{"role": "boss", "content": "hi"}]}', "row 1: Message 0 has the unknown role 'boss'"),
        ("{", "line 1: expected a row of JSON, got '{"),
        ("[1]", "line 1: expected a JSON object"),
    ],
)
def test_what_is_no_prompt_is_named(line, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_prompts(read_rows(path))


def test_eval_prompts_are_kept_out_however_they_are_written():
    prompts = [ask("What is 2+2?"), ask("Why?", "And then?"), ask("Hello"), ask("hello!"), ask("?!"), ask("?")]
    assert exclude(prompts, [ask("what  is 2 + 2"), ask("x", "AND THEN")]) == prompts[2:]
    assert exclude(prompts, [], dedupe=True) == [*prompts[:3], *prompts[4:]]
    assert hash_text("\uff21\u00a0b") == hash_text("a B")
    assert hash_text("你好。") == hash_text("你好") != hash_text("你")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": (-1.0,)}, "--temperature must be 0"),
        ({"temperatures": ()}, "--temperature must be 0"),
        ({"temperatures": (0.7, 0.7)}, "--temperature has a number twice"),
        ({"temperatures": (0,), "num_return_sequences": 2}, "every answer is the same; got num_return_sequences 2"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_sampling_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)


# ---- prompts of the target's own ----


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (CHATML, "<start>user\n", "<end>"),
        (TRIMMED, "<bos><start>user\n\n", "<end>"),
        (OPENED, "<bos><|user|>", ""),
        (CHANNELS, "<start>system<message>Today: 2026-01-01<end><start>user<message>", "<end>"),
    ],
    ids=["chatml", "trimmed", "opened", "channels"],
)
def test_the_users_place_in_the_template(template, before, after):
    assert find_user_slot(ChatRenderer(make_tokenizer(template))) == (before, after)


def test_a_template_without_a_place_for_the_user_is_refused():
    with pytest.raises(ValueError, match=r"writes a user's message 0 times.*--prompt-file"):
        find_user_slot(ChatRenderer(make_tokenizer("{{ messages[0].role }}")))


def test_the_target_makes_up_prompts_that_are_new(random_target, tmp_path):
    renderer, path = ChatRenderer(make_tokenizer()), tmp_path / "made.jsonl"
    made = make_prompts(random_target, renderer, 6, path, batch_size=4)
    said = [prompt.user_texts[0] for prompt in made]
    assert len({hash_text(text) for text in said}) == 6
    assert all(prompt.source == "self" for prompt in made)
    assert not any("<" in text and text.endswith(">") for text in said)
    with path.open("a") as file:  # interrupted while writing
        file.write('{"prompt": "hal')
    more = make_prompts(random_target, renderer, 8, path, batch_size=4)
    assert more[:6] == made
    assert len(more) == 8
    other = make_prompts(random_target, renderer, 6, tmp_path / "other.jsonl", batch_size=4, known=made[:3])
    assert not {hash_text(p.user_texts[0]) for p in other} & {hash_text(text) for text in said[:3]}
    with pytest.raises(ValueError, match="--self-temperature must be above 0"):
        make_prompts(random_target, renderer, 6, path, temperature=0)


def test_a_target_that_repeats_itself_is_said(tmp_path, said):
    tokenizer = make_tokenizer()
    target = make_chain(tokenizer, "\nyes<end>")
    made = make_prompts(target, ChatRenderer(tokenizer), 3, tmp_path / "made.jsonl", temperature=0.1, batch_size=2)
    assert [prompt.user_texts for prompt in made] == [["yes"]]
    assert "only 1 are new and complete (3 were asked for)" in said.text


@pytest.mark.slow
def test_the_end_of_the_users_turn_may_be_plain_text(tmp_path):
    tokenizer = make_tokenizer("[Q]{{ messages[0].content }}[A]")
    target = make_chain(tokenizer, "Qx", "]z[A]")
    [made] = make_prompts(target, ChatRenderer(tokenizer), 1, tmp_path / "made.jsonl", temperature=0.1, batch_size=1)
    assert made.user_texts == ["z"]


def test_the_share_of_made_up_prompts_is_capped():
    assert [limit_share(100, 20, share) for share in (0, 1 / 3, 0.5, 1)] == [0, 10, 20, 100]
    assert limit_share(5, 20, 0.5) == 5
    with pytest.raises(ValueError, match=r"--self-share must lie in 0\.\.1, got 2"):
        limit_share(5, 20, 2)


# ---- the commands ----


@pytest.fixture
def folder(random_target, tmp_path):
    random_target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "A"}, {"turns": ["b", "c"]}, {"prompt": "eval"}]
    )
    write_rows(tmp_path / "eval.jsonl", [{"prompt": "Eval."}])
    return tmp_path


def test_the_command_answers_files_and_what_the_target_makes_up(folder, capsys):
    out = folder / "out.jsonl"
    arguments = ["regenerate", "--target", str(folder / "target"), "--prompt_file", str(folder / "prompts.jsonl")]
    arguments += ["--output-file", str(out), "--temperature", "0", "0.8", "--max-new-tokens", "8", "--device", "cpu"]
    arguments += [
        "--exclude_file",
        str(folder / "eval.jsonl"),
        "--dedupe",
        "--self_prompts",
        "9",
        "--self_share",
        "0.5",
    ]
    assert cli.main(arguments) == 0
    err = capsys.readouterr().err
    assert "2 of 4 prompts are left out" in err
    assert "2 prompts are made up, a share of 0.5" in err
    rows = list(read_rows(out))
    assert {row["prompt_id"] for row in rows} == set(range(4))
    assert {row.get("source") for row in rows} == {None, "self"}
    assert json.loads(out.with_name("out.jsonl.meta.json").read_text())["target"] == str(folder / "target")
    size = out.stat().st_size
    assert cli.main(arguments) == 0
    assert out.stat().st_size == size
    assert cli.main([*arguments, "--max-new-tokens", "9"]) == 2
    assert "was begun with max_new_tokens 8" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(folder, capsys):
    out = folder / "out.jsonl"
    write_rows(folder / "many.jsonl", [{"prompt": "a" * (100 - i % 100)} for i in range(300)])
    arguments = ["regenerate", "--target", str(folder / "target"), "--prompt-file", str(folder / "many.jsonl")]
    arguments += ["--output-file", str(out), "--temperature", "0", "--max-new-tokens", "8", "--batch-size", "8"]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    has_ended = threading.Event()

    def press():
        while not list(folder.glob("out.jsonl.turns*")):
            time.sleep(0.001)
        _thread.interrupt_main()
        while not has_ended.wait(0.4):  # where the interrupt fell into what ignores errors, as a finalizer does
            _thread.interrupt_main()

    threading.Thread(target=press).start()
    try:
        assert cli.main(arguments) == INTERRUPTED
    finally:
        has_ended.set()
        signal.signal(signal.SIGINT, before)
    err = capsys.readouterr().err
    assert re.search("Interrupted. .*at most those of one batch are lost: run the same command again to go on", err)


def test_the_command_is_quick_to_see_that_there_is_no_prompt(folder, capsys):
    """Before the target is loaded, which here cannot be."""
    (folder / "target" / "model.safetensors").write_bytes(b"damaged")
    (folder / "empty.jsonl").write_text("\n")
    arguments = ["regenerate", "--target", str(folder / "target"), "--output-file", str(folder / "out.jsonl")]
    assert cli.main([*arguments, "--prompt-file", str(folder / "empty.jsonl")]) == 2
    assert "empty.jsonl: there is no row in it" in capsys.readouterr().err
    exclude_all = ["--exclude-file", str(folder / "prompts.jsonl")]
    assert cli.main([*arguments, "--prompt-file", str(folder / "prompts.jsonl"), *exclude_all]) == 2
    assert "of 4 prompts none is left" in capsys.readouterr().err
    assert cli.main([*arguments, "--prompt-file", str(folder / "prompts.jsonl")]) == 2  # it would have been


@pytest.mark.slow
def test_the_command_starts_processes_that_write_one_file(folder, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    arguments = ["regenerate", "--target", str(folder / "target"), "--prompt_file", str(folder / "prompts.jsonl")]
    arguments += ["--temperature", "0", "--max-new-tokens", "8", "--device", "cpu", "--dedupe"]
    arguments += ["--chat-template-kwargs", '{"a": "b c"}', "--exclude_file", str(folder / "eval.jsonl")]
    one, two = folder / "one.jsonl", folder / "two.jsonl"
    status = cli.main([*arguments, "--output-file", str(two), "--dp-size", "2"])
    said = capfd.readouterr().err
    assert status == 0, said
    assert said.count("2 of 4 prompts are left out") == 1  # by one of them
    assert "answers of process 1 of 2" in said
    assert cli.main([*arguments, "--output-file", str(one)]) == 0
    assert two.read_text() == one.read_text()
    assert not find_shares(two)
    assert os.environ.get("WORLD_SIZE") is None
    assert cli.main([*arguments, "--output-file", str(two), "--dp-size", "0"]) == 2
    assert "--dp-size is a number of processes, at least 1; got 0" in capfd.readouterr().err


@pytest.mark.slow
def test_when_a_process_is_killed_the_others_end_and_what_they_wrote_is_kept(folder, tmp_path):
    write_rows(prompts := tmp_path / "many.jsonl", [{"prompt": letter} for letter in "abcdefgh"])
    arguments = ["--target", str(folder / "target"), "--prompt_file", str(prompts), "--temperature", "0"]
    arguments = ["regenerate", *arguments, "--max-new-tokens", "8", "--batch-size", "1", "--device", "cpu"]
    out, one = tmp_path / "out.jsonl", tmp_path / "one.jsonl"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "helpers.regenerate_worker", *arguments, "--output-file", str(out)],
        capture_output=True,
        text=True,
        env=worker_environment(),
        timeout=300,
    )
    assert done.returncode != 0
    assert "exitcode  : 9" in done.stderr
    kept = [[row["prompt_id"] for row in read_rows(share)] for share in find_shares(out)]
    assert kept == [[0, 2], [1]]
    assert cli.main([*arguments, "--output-file", str(out)]) == 0
    assert cli.main([*arguments, "--output-file", str(one)]) == 0
    assert out.read_text() == one.read_text()
    assert not find_shares(out)


def test_the_command_needs_prompts(folder, capsys):
    arguments = ["regenerate", "--target", str(folder / "target"), "--output-file", str(folder / "out.jsonl")]
    assert cli.main(arguments) == 2
    assert "give --prompt-file, --dataset-name, or --self-prompts N" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments, "--chat-template-kwargs", "[1]"])
    assert "expected a JSON object, got '[1]'" in capsys.readouterr().err
