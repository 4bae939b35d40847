"""The command line as it is typed: help texts, spellings, mistakes, and what each of them may import.

Help texts are files in `tests/cli/help`. After a change on purpose: RECORD=1 pytest tests/cli/test_help.py -k frozen
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.layouts import make_config, make_weights, write
from helpers.processes import worker_environment

from hf_eagle3 import cli
from hf_eagle3.cli.arguments import positive
from hf_eagle3.console.spelling import SPELLINGS
from hf_eagle3.smollm2 import DRAFTER_FOLDER

pytestmark = pytest.mark.any_release

HELP = Path(__file__).parent / "help"
COMMANDS = [name for name in (*cli.COMMANDS, "data preview") if name not in ("train", "data")]  # with options of ours
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "rich")


def find_parser(command: str):
    """The parser of a command, or of one in it."""
    parser = cli.make_parser()
    for word in command.split():
        parser = parser.commands[word]
    return parser


def options_of(command: str) -> list[argparse.Action]:
    return [action for action in find_parser(command)._actions if action.dest != "help"]


def run(words) -> int:
    """The exit status of the command line in this process."""
    try:
        return cli.main(words)
    except SystemExit as ended:
        return ended.code


# ---- help ----


@pytest.mark.parametrize("command", ["", "data", *COMMANDS])
def test_help_is_frozen(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert run([*command.split(), "--help"]) == 0
    text, file = capsys.readouterr().out, HELP / f"{command.replace(' ', '-') or 'hf-eagle3'}.txt"
    if os.environ.get("RECORD"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_every_help_file_is_of_a_command():
    assert {path.stem for path in HELP.iterdir()} == {"hf-eagle3", "data", *(c.replace(" ", "-") for c in COMMANDS)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(command):
    assert all(action.help for action in options_of(command))


# ---- imports ----


def test_what_needs_no_model_imports_nothing_heavy():
    """In one process: what any of them imported would be seen."""
    words = [["--version"], ["--help"], ["--verson"], ["dmeo"], ["data"], ["bench"], ["train", "--hepl"]]
    words += [[*command.split(), option] for command in COMMANDS for option in ("--help", "--hepl")]
    words += [
        ["demo", "--drafter", "/nowhere"],
        ["doctor", "/nowhere", "x"],
        ["export", "/nowhere", "--to", "hf", "o"],
    ]
    assert run_commands(words, HEAVY)[-1] == "[]"


def test_inspect_of_a_folder_imports_neither_torch_nor_the_host(tmp_path):
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stretched = make_config(rope_scaling=llama3 | {"original_max_position_embeddings": 32})
    folders = [DRAFTER_FOLDER, *(tmp_path / name for name in ("plain", "stretched"))]
    for folder, config in zip(folders[1:], (make_config(), stretched), strict=True):
        write(folder, config, make_weights())
    *said, imported = run_commands([["inspect", str(folder)] for folder in folders], ("torch", "transformers"))
    assert sum(": an EAGLE-3 drafter, flavour " in line for line in said) == 3
    assert imported == "[]"


def run_commands(commands: list[list[str]], names: tuple[str, ...]) -> list[str]:
    """Lines of a process that runs `commands`, one after the other; the last says which modules of `names` it imported."""
    code = f"""
import sys
sys.argv = ["hf-eagle3"]
from hf_eagle3 import cli
for words in {commands}:
    try:
        cli.main(words)
    except SystemExit:
        pass
print([name for name in {names} if name in sys.modules])
"""
    options = {"capture_output": True, "text": True, "env": worker_environment(), "check": True}
    return subprocess.run([sys.executable, "-c", code], **options).stdout.splitlines()


# ---- spellings ----


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_taken_in_every_spelling(command):
    """Dashes, underscores, and what others call the same."""
    parser = find_parser(command)
    for action in parser._actions:
        for option in action.option_strings[-1:]:
            for other in (option, *SPELLINGS.get(option, ())):
                for spelling in {other, f"--{other[2:].replace('-', '_')}", f"{other}=x"}:
                    (found,) = parser._respell([spelling])
                    assert found.partition("=")[0] == option


def test_values_may_stand_alone_or_with_their_option():
    ways = [
        "doctor T D",
        "doctor --target T --drafter D",
        "doctor --model T D",
        "doctor T --json D",
        "doctor D --target=T",
    ]
    for way in ways:
        args = cli.make_parser().parse_args(way.split())
        assert (args.target, args.drafter) == ("T", "D")


def test_text_that_begins_with_a_dash_is_a_value():
    args = cli.make_parser().parse_args(
        ["doctor", "T", "D", "--prompt", "- a list of two", "--prompt=--seed is what?"]
    )
    assert args.prompt == ["- a list of two", "--seed is what?"]


# ---- mistakes ----


@pytest.fixture
def correct(folders, tmp_path) -> dict[str, list[str]]:
    """A command line that is right, of each command."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "abc"}))
    target, drafter, rows, out = (str(folders / name) for name in ("target", "drafter", "rows.jsonl", "out"))
    pair = ["--target", target, "--drafter", drafter]
    return {
        "demo": ["--drafter", drafter],
        "inspect": ["--drafter", drafter],
        "doctor": pair,
        "drift": pair,
        "chat": pair,
        "check": pair,
        "serve": pair,
        "export": ["--drafter", drafter, "--to", "hf", "--out", out],
        "bench": pair,
        "data preview": ["--target", target, "--train-file", rows],
        "regenerate": [*pair, "--prompt-file", rows, "--output-file", out],
        "states": [*pair, "--train-file", rows, "--output-dir", out],
        "env": [],
    }


def misspell(option: str) -> Iterator[str]:
    yield option[:-1]
    yield option[:4] + option[3:]
    yield f"{option}s"


def mistakes_in(action: argparse.Action) -> Iterator[list[str]]:
    """Words that are wrong, each once, about one option."""
    option, takes_value = action.option_strings[-1], action.nargs != 0
    for word in misspell(option):
        yield [word, *(["1"] if takes_value else [])]
    if not takes_value:
        yield [f"{option}=yes"]
        return
    yield [option]
    if action.choices is not None:
        yield [option, "vllmm"]
    elif action.type is positive:
        yield from ([option, value] for value in ("0", "-3", "many", "1.5", ""))
    elif action.type in (int, float):
        yield from ([option, value] for value in ("many", "1,5"))
    elif action.type is not None and action.type is not Path:
        yield from ([option, value] for value in ("{", "-1", ""))


def mistakes_in_words(right: list[str]) -> Iterator[list[str]]:
    """A right command line, with one word wrong: something left out, too many, or not there."""
    yield [*right, "surplus"]
    yield [*right, "-7"]
    for i in range(0, len(right), 2):
        option = right[i]
        if option not in ("--to", "--output-file", "--output-dir", "--out"):
            yield [*right[: i + 1], "/nowhere/at/all", *right[i + 2 :]]
        if option in ("--target", "--drafter"):
            yield [*right[: i + 1], "", *right[i + 2 :]]
    yield [*right, "--device", "banana"] if "--device" in right else [*right, "--divice", "cpu"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_single_mistake_is_named(command, correct, capsys):
    right = correct[command]
    wrong = [[*right, *words] for action in options_of(command) for words in mistakes_in(action)]
    wrong += mistakes_in_words(right)
    for words in wrong:
        assert run([*command.split(), *words]) == 2, words
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("hf-eagle3"), words
        assert "error: " in line
        assert len(line) < 500
        pairs = itertools.zip_longest(words, right)
        said = {word.partition("=")[0].lstrip("-") or "empty" for word, meant in pairs if word != meant}
        assert any(word in line for word in said), (words, line)


def test_those_are_200_mistakes(correct):
    counts = [
        sum(1 for a in options_of(c) for _ in mistakes_in(a)) + len([*mistakes_in_words(correct[c])]) for c in COMMANDS
    ]
    assert sum(counts) > 200
