"""What commands say of their progress, and their tables: in a terminal and elsewhere."""

import io
import re
import sys

import pytest

from hf_eagle3.console import progress
from hf_eagle3.console.interrupts import is_command_line
from hf_eagle3.console.progress import Progress
from hf_eagle3.console.tables import say_table

pytestmark = pytest.mark.any_release


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_steps_are_lines_where_there_is_no_terminal(capsys):
    with Progress() as step:
        step("Loading x\x1b[2J")
        for i in range(3):
            step("Answering", i, 3)
        step("Comparing")
    assert capsys.readouterr().err == "Loading x\\x1b[2J ...\nAnswering ...\nComparing ...\n"


def test_long_steps_are_said_again(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SELDOM", -1.0)
    with Progress() as step:
        for i in range(3):
            step("Answering", i, 3)
    assert capsys.readouterr().err == "Answering ...\nAnswering (1 of 3) ...\nAnswering (2 of 3) ...\n"


def test_one_of_several_processes_speaks(capsys):
    with Progress(is_silent=True) as step:
        step("Answering", 1, 3)
    assert capsys.readouterr().err == ""


def test_line_moves_in_a_terminal_and_is_gone_in_the_end(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as step:
        step("Loading [bold]x[/bold]")
        step._bar.refresh()
        step("Answering", 2, 3)
        step._bar.refresh()
    text = terminal.getvalue()
    assert "Loading [bold]x[/bold]" in text
    assert "2/3" in text
    assert "\x1b[2K" in text.rpartition("Answering")[2]  # the line is erased


def test_line_makes_room_for_bars_of_others(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress() as step:
        step("Warming up")
        with step.aside("Loading"):
            assert sys.stderr is terminal  # not the bar's
            before = terminal.tell()
            sys.stderr.write("42 %\r")
        assert terminal.getvalue()[:before].endswith("Loading ...\n")
        step("Comparing")
        step._bar.refresh()
    assert "Comparing" in terminal.getvalue()


def test_bar_ends_with_the_command_that_fails(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    step = Progress()
    with pytest.raises(ZeroDivisionError), step:
        step("Loading", 1 // 0)
    assert step._bar is None


ROWS = [["a", "1.0"], ["[b]long name[/b]\n\x1b[2J", "10.0"]]


def test_table_is_aligned_and_says_what_it_is_given(capsys):
    say_table(["name", "speed"], ROWS)
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("name ")
    assert set(rule) == {"─"}
    assert rows[0].startswith("a ")
    assert rows[1].startswith("[b]long name[/b] \\x1b[2J")
    assert {len(line) for line in (head, rule, *rows)} == {len(rule)}


def test_table_is_as_wide_as_the_terminal_at_most(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    say_table(["name", "speed"], [["word " * 20, "1.0"], ["b", "NO"]])
    plain = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert max(map(len, plain.splitlines())) <= 40
    assert re.search(r"\x1b\[1;31m *NO", terminal.getvalue())


@pytest.mark.parametrize(
    ("argv", "original", "is_ours"),
    [
        (["/usr/bin/hf-eagle3", "demo"], [], True),
        (["C:/Scripts/hf-eagle3.exe"], [], True),
        (["hf-eagle3.py"], [], False),  # a user's own
        (["-m", "x"], ["python", "-m", "hf_eagle3.cli", "x"], True),
        (["-m", "-m", "hf_eagle3.cli"], ["python", "-m", "torch.distributed.run", "-m", "hf_eagle3.cli"], False),
        (["-m"], ["python"], False),
        (["pytest"], ["python", "-m", "pytest"], False),
        ([], [], False),
    ],
)
def test_processes_of_the_command_line_are_known(argv, original, is_ours, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert is_command_line() == is_ours
