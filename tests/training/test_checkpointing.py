"""Runs that are killed at any moment go on from a whole checkpoint, and say which."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.marks import slow_but
from helpers.training import TINY, make_args, make_drafter, progressions, weights_of
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from hf_eagle3 import Eagle3Trainer
from hf_eagle3.training.checkpointing import SEAL_FILE, STATE_FILE, find_damage, publish, tidy
from hf_eagle3.training.locks import FolderInUseError, only_writer
from hf_eagle3.training.recipe import FILE_NAME as RECIPE_FILE
from hf_eagle3.training.states.stored import StoredStates
from hf_eagle3.training.states.writer import StateWriter

FORK = multiprocessing.get_context("fork")
STEPS = 3
# Events of Python's that change files; others write from C++ and Rust, and are cut by a limit on their size.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows():
    return [{"input_ids": ids.tolist(), "loss_mask": [0] * 6 + [1] * 14} for ids in progressions(8, 20, seed=7)]


def make_trainer(target, rows, place, **changes):
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5}
    args = make_args(place, per_device_train_batch_size=2, **{**settings, **changes})
    drafter, eval_rows = make_drafter(target), rows[:2] if "eval_strategy" in changes else None
    return Eagle3Trainer(drafter, target, args, train_dataset=rows, eval_dataset=eval_rows)


@pytest.fixture(scope="module")
def trained(target, rows, tmp_path_factory):
    """An output folder with three checkpoints, and the weights at its end."""
    place = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(target, rows, place)
    trainer.train()
    trainer.save_model()
    return place / "out", weights_of(trainer.drafter)


@pytest.fixture
def copied(trained, tmp_path):
    """The same, to spoil."""
    shutil.copytree(trained[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def warnings_of_host(caplog):
    """What the host's loggers warn of."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield caplog
    logger.setLevel(before)
    logger.removeHandler(caplog.handler)


# ---- kills ----


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(event, folder, counter):
    """Kill this process at the `event`-th change of a file in `folder`; at none for None. `counter` counts them."""

    def hook(name, args):
        is_write = name == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_write or name in CHANGES) and str(args[0]).startswith(folder):
            counter.value += 1
            if counter.value == event:
                kill_self()

    sys.addaudithook(hook)


def run(target, rows, place, *, event=None, limit=None, **changes):
    """Train in a child that is killed, and return how many changes of files it made, and its exit code."""
    counter = FORK.Value("i", 0)

    def child():
        trainer = make_trainer(target, rows, place, **changes)
        die_at(event, str(place), counter)
        if limit is not None:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write beyond the limit kills in the middle of the file
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        trainer.train()
        trainer.save_model()

    process = FORK.Process(target=child)
    process.start()
    process.join()
    return counter.value, process.exitcode


def check_and_go_on(target, rows, place, weights):
    """What the killed run left is whole, by the host's choice too; going on from it ends where a run without kill does."""
    out = place / "out"
    last = get_last_checkpoint(out) if out.exists() else None
    if last is not None:
        assert find_damage(Path(last)) == []
    trainer = make_trainer(target, rows, place)
    trainer.train(resume_from_checkpoint=last is not None)
    for name, value in weights_of(trainer.drafter).items():
        assert torch.equal(value, weights[name]), name
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        f"checkpoint-{i + 1}" for i in range(STEPS)
    ]
    return last


@pytest.fixture(scope="module")
def num_changes(target, rows, tmp_path_factory):
    """How many changes of files a run makes that is not killed."""
    counted, code = run(target, rows, tmp_path_factory.mktemp("whole"))
    assert code == 0
    assert counted > 100
    return counted


@pytest.mark.parametrize("share", slow_but([0.55], [0.1, 0.55, 0.9]))
def test_a_run_that_is_killed_in_a_save_goes_on(target, rows, trained, num_changes, tmp_path, share):
    _, code = run(target, rows, tmp_path, event=round(share * num_changes))
    assert code == -signal.SIGKILL
    last = check_and_go_on(target, rows, tmp_path, trained[1])
    assert (last is not None) == (share > 0.1)


@pytest.mark.parametrize("limit", [60_000, pytest.param(3_000, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_within_a_file_goes_on(target, rows, trained, tmp_path, limit):
    _, code = run(target, rows, tmp_path, limit=limit)
    assert code == -signal.SIGXFSZ
    assert check_and_go_on(target, rows, tmp_path, trained[1]) is None
    shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_a_run_may_be_killed_at_any_change_of_a_file(target, rows, trained, num_changes, tmp_path, part):
    for event in range(7 * part + 1, num_changes + 1, 56):  # every seventh
        place = tmp_path / f"cut{event}"
        place.mkdir()
        assert run(target, rows, place, event=event)[1] == -signal.SIGKILL
        check_and_go_on(target, rows, place, trained[1])


@pytest.mark.slow
@pytest.mark.parametrize("event", range(1, 40, 3))
def test_a_run_that_writes_its_checkpoints_once_more_may_be_killed(target, rows, trained, tmp_path, event):
    """Places that are taken are freed by renaming, so at no moment there is less than before."""
    shutil.copytree(trained[0], tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        path.unlink() if path.is_file() else None
    run(target, rows, tmp_path, event=event)
    check_and_go_on(target, rows, tmp_path, trained[1])


@pytest.mark.parametrize("event", [5, 9, 12])
def test_a_drafter_that_is_saved_over_another_is_whole_at_any_moment(target, rows, trained, tmp_path, event):
    shutil.copytree(trained[0], tmp_path / "out")
    counter = FORK.Value("i", 0)

    def child():
        trainer = make_trainer(target, rows, tmp_path)
        die_at(event, str(tmp_path), counter)
        trainer.save_model()

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    AutoModel.from_pretrained(tmp_path / "out")


def test_what_makes_room_comes_back(copied):
    """Killed between freeing a place and taking it."""
    place = copied / "checkpoint-3"
    (copied / "_replaced").mkdir()
    place.rename(copied / "_replaced" / "checkpoint-3")
    (copied / "_saving" / "checkpoint-3").mkdir(parents=True)
    tidy(copied)
    assert find_damage(place) == []
    assert not list(copied.glob("_*"))


def test_a_place_that_is_taken_is_taken_over(copied):
    new = copied / "_saving" / "checkpoint-3"
    shutil.copytree(copied / "checkpoint-2", new)
    publish(new, copied / "checkpoint-3")
    assert (copied / "checkpoint-3" / STATE_FILE).read_text() == (copied / "checkpoint-2" / STATE_FILE).read_text()
    assert find_damage(copied / "checkpoint-3") == []


def test_the_best_checkpoint_is_known_by_its_place_and_old_ones_go(target, rows, tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    trainer = make_trainer(target, rows, tmp_path, **args, eval_generate_prompts=0)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "out"
    assert find_damage(best) == []
    left = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert len(left) == 2
    for folder in left:
        state = json.loads((folder / STATE_FILE).read_text())
        assert Path(state["best_model_checkpoint"]).parent == tmp_path / "out"


# ---- damage ----


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def garble(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


FILES = (
    "model.safetensors",
    "ema.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    STATE_FILE,
    RECIPE_FILE,
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [cut, garble, Path.unlink], ids=["cut", "garbled", "missing"])
def test_a_damaged_file_is_named(copied, file, harm):
    harm(copied / "checkpoint-3" / file)
    [damage] = find_damage(copied / "checkpoint-3")
    assert file in damage


@pytest.mark.parametrize("file", [*FILES, "config.json", "training_args.bin", "hf_eagle3_position.json"])
@pytest.mark.parametrize("harm", [cut, lambda path: os.truncate(path, 0)], ids=["cut", "emptied"])
def test_a_file_that_is_cut_short_is_named_without_a_seal_too(copied, file, harm):
    """As in checkpoints of earlier versions."""
    (copied / "checkpoint-3" / SEAL_FILE).unlink()
    assert find_damage(copied / "checkpoint-3") == []
    harm(copied / "checkpoint-3" / file)
    [damage] = find_damage(copied / "checkpoint-3")
    assert file in damage


@pytest.mark.parametrize("file", ["model.safetensors", STATE_FILE])
def test_a_checkpoint_without_weights_or_its_end_is_none(copied, file):
    folder = copied / "checkpoint-3"
    for name in (SEAL_FILE, "ema.safetensors", file):
        (folder / name).unlink()
    [damage] = find_damage(folder)
    assert "missing" in damage


def test_the_newest_whole_checkpoint_is_taken_and_said(target, rows, copied, tmp_path, warnings_of_host, trained):
    cut(copied / "checkpoint-3" / "optimizer.pt")
    (copied / "checkpoint-9").mkdir()
    (copied / "checkpoint-9" / "model.safetensors").write_bytes(b"")
    trainer = make_trainer(target, rows, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    for name, value in weights_of(trainer.drafter).items():
        assert torch.equal(value, trained[1][name]), name
    [said] = [r.getMessage() for r in warnings_of_host.records if "Going on from" in r.getMessage()]
    assert (
        "checkpoint-9 is damaged (trainer_state.json, which is written last, is missing; model.safetensors is" in said
    )
    assert "checkpoint-3 is damaged (optimizer.pt has" in said
    assert "Going on from " + str(copied / "checkpoint-2") in said


def test_what_cannot_be_resumed_from_is_refused_in_words(target, rows, copied, tmp_path):
    trainer = make_trainer(target, rows, tmp_path)
    cut(copied / "checkpoint-2" / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be resumed from: model.safetensors has \d+ bytes"):
        trainer.train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    with pytest.raises(
        ValueError, match=r"no folder .*checkpoint-7. Checkpoints in .*: checkpoint-1, checkpoint-2, checkp"
    ):
        trainer.train(resume_from_checkpoint=str(copied / "checkpoint-7"))
    for i in (1, 3):
        (copied / f"checkpoint-{i}" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=r"There is no whole checkpoint to resume from in .*checkpoint-3 is damaged"):
        trainer.train(resume_from_checkpoint=True)
    shutil.rmtree(copied)
    with pytest.raises(ValueError, match="There is no checkpoint to resume from in"):
        make_trainer(target, rows, tmp_path, save_strategy="no").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, f"has no {RECIPE_FILE}"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "target was not written down"),
    ],
    ids=["missing", "cut", "list", "empty"],
)
def test_a_recipe_that_says_nothing_stops_the_run(target, rows, copied, tmp_path, text, message):
    folder = copied / "checkpoint-2"
    (folder / SEAL_FILE).unlink()
    (folder / RECIPE_FILE).unlink() if text is None else (folder / RECIPE_FILE).write_text(text)
    trainer = make_trainer(target, rows, tmp_path, max_steps=2)
    if text != "{":  # which no checkpoint has that is whole
        with pytest.raises(ValueError, match=f"{message}.*ignore_recipe_mismatch=True"):
            trainer.train(resume_from_checkpoint=str(folder))
        trainer.args.ignore_recipe_mismatch = True
        trainer.train(resume_from_checkpoint=str(folder))
    else:
        with pytest.raises(ValueError, match=f"{RECIPE_FILE} is empty or cut short"):
            trainer.train(resume_from_checkpoint=str(folder))


# ---- two writers ----


def test_two_runs_do_not_write_to_one_folder(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path)
    ready, done = FORK.Event(), FORK.Event()

    def other():
        with only_writer(tmp_path / "out"):
            ready.set()
            done.wait()

    process = FORK.Process(target=other)
    process.start()
    ready.wait()
    with pytest.raises(FolderInUseError, match="out is being written to by another run"):
        trainer.train()
    os.kill(process.pid, signal.SIGKILL)  # the lock ends with its holder
    process.join()
    trainer.train()


def test_two_writers_of_one_folder_of_states_are_refused(target, rows, tmp_path):
    folder = tmp_path / "states"
    writer = StateWriter(target, rows, folder, [2, 4, 5])
    folder.mkdir()
    with only_writer(folder), pytest.raises(FolderInUseError, match="states is being written to by another run"):
        writer.run()
    assert not list(folder.iterdir())
    writer.run()
    assert len(StoredStates(folder).dataset) == len(rows)
