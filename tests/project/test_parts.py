"""Which cases a run of the suite takes: parts of it, and samples of long parameter lists."""

import subprocess
import sys

import pytest
from helpers.paths import TESTS
from helpers.processes import worker_environment

pytestmark = [pytest.mark.any_release, pytest.mark.slow]

FILE = "tests/cli/test_chat.py"  # has a test that is sampled, and some of one case


def collect(*options: str) -> set[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        *options,
        FILE,
    ]
    settings = {"capture_output": True, "text": True, "env": worker_environment(), "cwd": TESTS.parent}
    done = subprocess.run(command, **settings, check=True)
    return {line for line in done.stdout.splitlines() if line.startswith(FILE)}


def test_no_case_is_lost():
    every, everyday = collect("-m", "not gpu"), collect()
    of_one = {case for case in every if "test_turns_go_on_from_the_cache" in case}
    assert everyday < every
    assert of_one & everyday
    assert of_one - everyday
    parts = [collect("-m", "not gpu", "--part", f"{i}/2") for i in (0, 3)]
    assert all(parts)
    assert sorted(case for part in parts for case in part) == sorted(every)
