"""What all tests run under, and the fixtures of more than one folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers, and processes that tests start, share the cores

import gc
import sys
import warnings
import zlib
from collections.abc import Iterator
from types import FrameType

import pytest
import torch
from helpers.capture import capture_on_cpus
from helpers.models import make_target
from transformers import PreTrainedModel

import hf_eagle3
from hf_eagle3.host.install import WRAPS

MAX_WORKERS = 8  # each holds a gigabyte
WRAPPED = {name for _, name, _ in WRAPS}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread a run of the whole suite over the cores; a few files, what -k finds and what needs a GPU run in one process.

    As -n says, where it is given. A worker takes seconds to start, and builds each fixture for itself: so each gets a
    stretch of the suite and, once done, some of another's.
    """
    is_worker = hasattr(config, "workerinput")
    if is_worker or not config.pluginmanager.hasplugin("xdist") or config.option.numprocesses is not None:
        return
    is_whole = config.args_source is config.ArgsSource.TESTPATHS and not config.option.keyword
    if is_whole and "not gpu" in config.option.markexpr:
        config.option.numprocesses, config.option.dist = "logical", "worksteal"
        config.option.maxprocesses = config.option.maxprocesses or MAX_WORKERS


def pytest_addoption(parser: pytest.Parser) -> None:
    """--part."""
    parser.addoption("--part", type=read_part, default=(0, 1), metavar="I/N", help="of each test's cases every Nth")


def read_part(text: str) -> tuple[int, int]:
    """Read "I/N", where I counts from 0, and from 0 again at N."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(parts)):
        raise pytest.UsageError(f"--part is {text!r}, expected I/N, such as 0/4.")
    return int(number) % int(parts), int(parts)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to the slow tests what `sampled` leaves to them, and take the part of all cases that --part asks for."""
    cases: dict[str, list[pytest.Item]] = {}  # of each test, shuffled so that a sample has something of each parameter
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    part, parts = config.option.part
    left = set()
    for test, of_test in cases.items():
        begin = zlib.crc32(test.encode())  # tests of one case are spread over the parts
        left |= {item for number, item in enumerate(of_test, begin) if number % parts != part}
        everyday = [item for item in of_test if item.get_closest_marker("slow") is None]
        for number, item in enumerate(everyday):
            if (mark := item.get_closest_marker("sampled")) is not None and number % mark.args[0]:
                item.add_marker("slow")
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> None:
    """Leave what lives by now out of later collections: the host's trainer collects in each run, a second over all."""
    gc.collect()
    gc.freeze()


def is_ours(frame: FrameType | None) -> bool:
    """Whether a warning of the host, given in `frame`, is about a call of ours: not a caller's, nor another package's."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        is_wrap = name.startswith("hf_eagle3.host.") and frame.f_code.co_name in WRAPPED
        if not is_wrap and name.partition(".")[0] not in ("transformers", "torch", "functools", "contextlib"):
            return name.partition(".")[0] == "hf_eagle3"
        frame = frame.f_back
    return False


@pytest.fixture(autouse=True)
def _our_calls_are_not_deprecated(monkeypatch) -> None:
    """What the host deprecates is an error where a call of ours asks for it."""
    show = warnings.showwarning

    def check(message, category, *args):
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == "warnings":
            frame = frame.f_back
        is_hosts = frame.f_globals.get("__name__", "").partition(".")[0] == "transformers"
        if is_hosts and issubclass(category, FutureWarning | DeprecationWarning) and is_ours(frame):
            raise message
        show(message, category, *args)

    monkeypatch.setattr(warnings, "showwarning", check)


@pytest.fixture
def target() -> PreTrainedModel:
    """The tiny Llama."""
    return make_target("llama")


@pytest.fixture
def plain_host() -> Iterator[None]:
    """The host as it is without hf-eagle3, for the length of a test."""
    hf_eagle3.uninstall()
    yield
    hf_eagle3.install()


@pytest.fixture
def counts(monkeypatch):
    """Of rounds captured on a CPU."""
    yield capture_on_cpus(monkeypatch)
    hf_eagle3.release_graphs()
