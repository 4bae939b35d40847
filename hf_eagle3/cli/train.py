"""`hf-eagle3 train`: trains a drafter. Its options are the host's training arguments and ours."""

import argparse
import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ..console.spelling import CANONICAL, did_you_mean
from .starting import start

TRAINING = Path(__file__).parent.parent / "training"
SOURCES = ((TRAINING / "script.py", "Arguments"), (TRAINING / "arguments.py", "TrainingArguments"))  # files, classes


def run(args: argparse.Namespace) -> int:
    """Train; exit status 0."""
    refuse_unknown(args.arguments)
    start()
    from ..training.script import main as train

    train(args.arguments)
    return 0


def refuse_unknown(words: list[str]) -> None:
    """Raise if a word is an option that training does not have, before anything heavy is imported.

    Raises:
        ValueError: Names the option, and the nearest that there are.
    """
    options = {*find_options(), "--config", "--help", "--dtype"}
    known = {*options, *(f"--{name[2:].replace('-', '_')}" for name in CANONICAL)}
    for word in words:
        typed = word.partition("=")[0]
        name = f"--{typed[2:].replace('-', '_')}"
        if word.startswith("--") and not {name, name.replace("--no_", "--")} & known:
            raise ValueError(f"{typed} is no option{did_you_mean(typed, options)}. --help lists them all.")


def find_options() -> Iterator[str]:
    """The fields of the dataclasses that declare the options, read from their sources: importing them takes seconds."""
    host = importlib.util.find_spec("transformers")
    places = host.submodule_search_locations if host is not None else None
    hosts = [(Path(place) / "training_args.py", "TrainingArguments") for place in places or ()]
    for path, ending in (*SOURCES, *hosts):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(ending):
                targets = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
                yield from (f"--{target.id}" for target in targets if isinstance(target, ast.Name))
