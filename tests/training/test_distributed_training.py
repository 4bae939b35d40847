"""Two processes train as one does: replicated, sharded, resumed in another number."""

import json

import pytest
import torch
from helpers.chat import make_tokenizer
from helpers.distributed_worker import (
    LONG,
    curve,
    make_block_drafter,
    make_drafter,
    make_rows,
    make_target,
    make_trainer,
    make_uneven_rows,
    run,
)
from helpers.processes import launch
from transformers import AutoModel
from transformers.distributed import DistributedConfig

from hf_eagle3.training.distributed import call_as_forward

ALONE = {"per_device_train_batch_size": 8}
SILENT = set(range(1, 40, 2))
AVERAGED = {
    "ema_decay": 0.5,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}


in_two_processes = pytest.mark.slow  # which take a minute, most of it to start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process makes, then what two make, which go on from some of it."""
    folder = tmp_path_factory.mktemp("runs")
    run("one", folder, **ALONE)
    run("small", folder, per_device_train_batch_size=4)
    make_target().save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    make_drafter(make_target()).save_pretrained(folder / "drafter")
    launch(2, folder)
    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def assert_same_run(ours, theirs, tolerance=1e-5):
    assert len(ours["curve"]) == len(theirs["curve"])
    for a, b in zip(ours["curve"], theirs["curve"], strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=tolerance, abs=tolerance)


def assert_same_weights(a, b):
    a, b = AutoModel.from_pretrained(a).state_dict(), AutoModel.from_pretrained(b).state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=2e-5, rtol=1e-4, msg=name)


@in_two_processes
@pytest.mark.parametrize(
    "name", ["ddp", "ddp_accumulated", "fsdp", "fsdp_by_layer", "fsdp_efficient", "tp", "tp_fsdp"]
)
def test_two_processes_train_as_one(folder, name):
    """Losses, gradients and metrics at each update, and the weights in the end, which any process can load."""
    assert_same_run(read(folder, name), read(folder, "one"))
    assert_same_weights(folder / name, folder / "one")
    names = {path.name for path in (folder / name / "checkpoint-4").iterdir()}
    assert {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "hf_eagle3_recipe.json"} <= names
    assert "pytorch_model_fsdp.bin" not in names


@in_two_processes
@pytest.mark.parametrize(("name", "argument"), [("target", "target_model"), ("drafter", "model")])
def test_models_that_only_the_first_process_loaded_are_refused(folder, name, argument):
    said = read(folder, f"refused_{name}")
    assert said.startswith(f"{argument} was loaded in the first process only (fsdp_cpu_ram_efficient_loading)")


@in_two_processes
@pytest.mark.parametrize("name", ["ddp_long", "fsdp_long"])
def test_twenty_updates_stay_together(folder, tmp_path, name):
    run("long", tmp_path, **ALONE, **LONG)
    assert len(read(folder, name)["curve"]) == 20
    assert_same_run(read(folder, name), read(tmp_path, "long"), 1e-3)


@in_two_processes
@pytest.mark.parametrize("name", ["ddp_resumed", "fsdp_resumed", "tp_resumed"])
def test_what_one_process_began_two_go_on_with(folder, name):
    assert_same_run(read(folder, name), read(folder, "one"))
    assert_same_weights(folder / name, folder / "one")


@in_two_processes
@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp"])
def test_what_two_processes_began_one_goes_on_with(folder, tmp_path, name):
    run("again", tmp_path, resume=str(folder / name / "checkpoint-2"), **ALONE)
    assert_same_run(read(tmp_path, "again"), read(folder, "one"))
    assert_same_weights(tmp_path / "again", folder / "one")


@in_two_processes
def test_resuming_with_larger_updates_goes_on_at_the_same_row(folder):
    """Two updates of four rows were one update of eight: three are left, with the rows and the rates they have there."""
    moved, one = read(folder, "ddp_moved"), read(folder, "one")
    assert moved["step"] == 4
    left = moved["curve"][2:]  # after those of the first run
    assert [log["learning_rate"] for log in left] == pytest.approx([log["learning_rate"] for log in one["curve"][1:]])
    trainer = make_trainer(folder / "unused", per_device_train_batch_size=8)
    epochs, batches = trainer._init_training_state(4, 5, 1, str(folder / "small" / "checkpoint-2"), None)
    assert (epochs, batches, trainer.state.global_step) == (0, 1, 1)


@in_two_processes
@pytest.mark.parametrize("name", ["ddp_silent", "fsdp_silent"])
def test_a_process_without_anything_to_learn_holds_up_no_other(folder, tmp_path, name):
    alone = run("silent", tmp_path, rows=make_rows(40, SILENT), per_device_train_batch_size=2, max_steps=2)
    ours = read(folder, name)["curve"]
    for a, b in zip(ours, curve(alone), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@in_two_processes
@pytest.mark.parametrize("name", ["ddp_average", "fsdp_average"])
def test_the_average_of_the_weights_is_one_over_all_processes(folder, tmp_path, name):
    run("average", tmp_path, **ALONE, **AVERAGED)
    assert_same_run(read(folder, name), read(tmp_path, "average"))
    assert_same_weights(folder / name, tmp_path / "average")


@in_two_processes
def test_processes_that_share_a_target_may_have_documents_of_other_lengths(folder, tmp_path):
    """Of one, each update has several forwards of the target, of the other a single one."""
    run("uneven", tmp_path, rows=make_uneven_rows(), **ALONE, target_batch_tokens=40)
    assert_same_run(read(folder, "tp_uneven"), read(tmp_path, "uneven"))


@pytest.mark.slow  # four processes on two cores: most of a minute, and one aborted once as it left
@pytest.mark.skipif(not hasattr(DistributedConfig(), "dp_replicate_size"), reason="Transformers has one axis only")
def test_processes_may_have_a_target_for_each_two(folder):
    launch(4, folder, "two targets")
    assert_same_run(read(folder, "tp_of_four"), read(folder, "one"))


@in_two_processes
def test_drafters_of_blocks_train_in_two_processes_as_in_one(tmp_path):
    """Replicated and sharded; and a process without blocks holds up no other."""
    launch(2, tmp_path, "blocks")
    run("one", tmp_path, drafter=make_block_drafter(make_target()), loss_type="ce_tv", **ALONE)
    silent = {"rows": make_rows(40, SILENT), "per_device_train_batch_size": 2, "max_steps": 2}
    alone = run("silent", tmp_path, drafter=make_block_drafter(make_target()), **silent)
    for way in ("ddp", "fsdp", "fsdp_by_layer"):
        assert_same_run(read(tmp_path, f"{way}_blocks"), read(tmp_path, "one"))
        assert_same_weights(tmp_path / f"{way}_blocks", tmp_path / "one")
        for a, b in zip(read(tmp_path, f"{way}_blocks_silent")["curve"], curve(alone), strict=True):
            assert a == pytest.approx(b, rel=1e-5)


@in_two_processes
def test_acceptance_that_steers_a_loss_is_that_of_all_processes(folder, tmp_path):
    run("hybrid", tmp_path, loss_type="lk_hybrid", **ALONE)
    assert_same_run(read(folder, "ddp_hybrid"), read(tmp_path, "hybrid"))


@in_two_processes
def test_adapters_train_in_two_processes_as_in_one(folder, tmp_path):
    pytest.importorskip("peft")
    run("adapted", tmp_path, lora=4, **ALONE)
    assert_same_run(read(folder, "ddp_adapted"), read(tmp_path, "adapted"))


@in_two_processes
def test_sharded_training_in_half_precision_arithmetic_comes_near(folder, tmp_path):
    """Sums stay in float32, of losses and of gradients."""
    alone = run("half", tmp_path, bf16=True, **ALONE)
    losses = [log["loss"] for log in read(folder, "fsdp_bf16")["curve"]]
    assert losses == pytest.approx([log["loss"] for log in curve(alone)], rel=2e-3)
    assert AutoModel.from_pretrained(folder / "fsdp_bf16").dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    """Replicated, sharded, with a target that they share, and resumed; evaluations with generated answers in between."""
    launch(1, tmp_path, "gpu")
    launch(2, tmp_path, "gpu")
    launch(1, tmp_path, "gpu", "again")
    one = read(tmp_path, "one")
    for name in ("ddp", "fsdp", "tp", "tp_fsdp", "ddp_resumed", "fsdp_resumed"):
        assert_same_run(read(tmp_path, name), one, 1e-3)
    for name in ("ddp", "fsdp", "tp"):
        assert_same_run(read(tmp_path, f"{name}_gone_on"), one, 1e-3)
    for name in ("ddp", "fsdp"):
        ours, theirs = read(tmp_path, f"{name}_bf16"), read(tmp_path, "one_bf16")
        assert [log["loss"] for log in ours["curve"]] == pytest.approx(
            [log["loss"] for log in theirs["curve"]], rel=0.02
        )


def test_what_wraps_the_drafter_finds_an_input_to_move():
    """DDP on a GPU takes the first of its inputs, once they are moved, and fails without any."""
    from torch.distributed.utils import _to_kwargs

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs, **kwargs):
            moved, moved_kwargs = _to_kwargs(inputs, kwargs, torch.device("cpu"), False)
            return self.module(*moved[0], **moved_kwargs[0])

    drafter = torch.nn.Linear(1, 1)
    assert call_as_forward(Wrapper(drafter), drafter, lambda: 7) == 7
