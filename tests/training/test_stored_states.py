"""Stored hidden states: what is written, that training from them is training online, and what is refused."""

import json
import os
import pickle
import re
import shutil
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.chat import CHATML, REASONING, assistant, make_tokenizer, user
from helpers.marks import slow_rows_but
from helpers.stored import ROWS, STEPS, TARGETS, TINY, V, batch_of, make_rows, make_target
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from hf_eagle3 import Eagle3Trainer, Eagle3TrainingArguments, cli
from hf_eagle3.recorder import StateRecorder
from hf_eagle3.training import StateWriter, StoredStates, StoredStatesError, TokenDataset, new_drafter, store_states
from hf_eagle3.training.data.eval_rows import ProcessRows
from hf_eagle3.training.states.documents import Documents
from hf_eagle3.training.states.folder import DOCUMENTS, HEAD, MANIFEST, read_manifest, shard_name, stored_positions
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.states.plan import plan_shards
from hf_eagle3.training.states.writer import default_aux_layer_ids
from hf_eagle3.training.step.batch import Collator, States
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary
from hf_eagle3.training.step.ttt import ttt

pytestmark = pytest.mark.any_release


@pytest.fixture(scope="module")
def target():
    return make_target()


SMALL = 6000  # bytes a shard: several of them


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    return store_states(target, ROWS, tmp_path_factory.mktemp("states") / "stored", shard_size=SMALL)


@pytest.fixture
def copied(folder, tmp_path):
    """Stored states that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def make_drafter(target, **overrides):
    torch.manual_seed(5)
    return new_drafter(target, torch.arange(2, 42), **overrides)


def step_of(drafter, batch, source, steps=STEPS):
    """Loss, sums and gradients of `batch`, with the states of `source`."""
    drafter.zero_grad()
    vocabulary = DraftVocabulary(drafter.draft_to_target_ids, V)
    scale = torch.tensor([0.8**t for t in range(steps)], device=batch.rows.device) / len(batch.rows)
    states = source.states(batch)
    loss, sums = ttt(drafter, batch, states, source.head, vocabulary, Method(LOSSES["forward_kl"], scale, scale * 0))
    loss.backward()
    return loss, sums, {name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None}


# ---- what is stored ----


def test_what_is_read_is_what_the_target_computes(target, folder):
    """All ids and masks; aux states of all tokens up to the last slot that trains; last states where they are taught."""
    stored = StoredStates(folder, verify=True)
    assert len(stored.dataset) == len(ROWS)
    assert stored.aux_layer_ids == (2, 4, 5)
    assert stored.manifest["num_shards"] > 2
    for i, row in enumerate(ROWS):
        assert stored.dataset[i]["input_ids"].tolist() == row["input_ids"]
        assert stored.dataset[i]["loss_mask"].tolist() == [bool(m) for m in row["loss_mask"]]
        states = stored.states(batch_of(stored.dataset, [i]))
        with torch.no_grad(), StateRecorder(target, (2, 4, 5)) as recorder:
            last = target.model(torch.tensor([row["input_ids"]])).last_hidden_state[0]
            aux = recorder.take("cpu")[0]
        mask = row["loss_mask"]
        taught = [p for p in range(1, len(mask) - 1) if mask[p] and mask[p + 1]]
        torch.testing.assert_close(states.last_hidden_states[taught], last[taught], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(states.aux_hidden_states[: max(taught)], aux[: max(taught)], atol=1e-5, rtol=1e-5)
        untaught = sorted(set(range(len(mask))) - set(taught))
        assert not states.last_hidden_states[untaught].any()
        assert not states.aux_hidden_states[max(taught) :].any()


def test_the_manifest_says_what_and_of_whom(target, folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["schema"] == 1
    assert manifest["target"]["name"] is None  # of no repository
    assert manifest["target"]["dtype"] == manifest["dtype"] == "float32"
    assert manifest["target"]["quantization"] is None
    assert manifest["last_hidden_states"] == "after the final norm"
    assert "hidden_states[i]" in manifest["boundaries"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert str(folder) not in (folder / MANIFEST).read_text()


def test_the_size_is_said_beforehand_and_is_that_of_the_folder(target, tmp_path):
    writer = StateWriter(target, ROWS, tmp_path / "states", dtype=torch.bfloat16)
    size = writer.size
    assert not (tmp_path / "states").exists()
    assert (size.aux_bytes, size.last_bytes) == (3 * 32 * 2, 32 * 2)
    assert size.num_tokens == sum(len(row["input_ids"]) for row in ROWS)
    assert size.num_last < size.num_aux < size.num_tokens
    assert re.match(
        rf"12 documents of {size.num_tokens} tokens take \d+\.\d kB: aux states of {size.num_aux} tokens", str(size)
    )
    written = {path.name: load_file(path) for path in writer.run().glob("*.safetensors")}
    assert size.total_bytes == sum(t.numel() * t.element_size() for file in written.values() for t in file.values())
    assert {t.dtype for t in written[shard_name(0, 1)].values()} == {torch.bfloat16}


def test_shards_are_filled_up_to_their_size():
    dataset = TokenDataset(ROWS)
    plan = plan_shards(dataset, aux_bytes=100, last_bytes=10, shard_size=3000)
    sizes = plan.num_aux * 100 + plan.num_last * 10
    by_shard = [sizes[plan.members(i)].sum() for i in range(plan.num_shards)]
    assert sum(by_shard) == sizes.sum()
    for shard in range(plan.num_shards):
        assert by_shard[shard] <= 3000 or len(plan.members(shard)) == 1
        if shard + 1 < plan.num_shards:
            assert by_shard[shard] + sizes[plan.members(shard + 1)[0]] > 3000
    assert plan.starts(plan.num_aux)[plan.members(1)[0]] == 0
    assert plan_shards(dataset, 100, 10, shard_size=1).num_shards == len(ROWS)


def test_without_boundaries_it_stores_what_a_new_drafter_reads(target):
    assert default_aux_layer_ids(target) == make_drafter(target).bound_aux_layer_ids
    with pytest.raises(ValueError, match=r"4 layers the usual boundaries.*\[1, 2\], not three"):
        default_aux_layer_ids(LlamaForCausalLM(LlamaConfig(**{**TINY, "num_hidden_layers": 4})))


# ---- training from it ----


@pytest.mark.parametrize("family", TARGETS)
def test_training_from_stored_states_is_training_online(family, tmp_path):
    """T-25: the same loss, accuracies and gradients, to rounding; the target's cap, factor and tied head are kept."""
    target = make_target(family)
    stored = StoredStates(store_states(target, ROWS, tmp_path / "states", shard_size=SMALL))
    drafter = make_drafter(target)
    online = OnlineStates(target, drafter.bound_aux_layer_ids)
    batch = batch_of(stored.dataset, range(len(ROWS)))
    loss, sums, grads = step_of(drafter, batch, online)
    stored.check(drafter)
    offline_loss, offline_sums, offline_grads = step_of(drafter, batch, stored)
    torch.testing.assert_close(offline_loss, loss, rtol=1e-5, atol=0)
    assert torch.equal(offline_sums.correct, sums.correct)
    assert torch.equal(offline_sums.num_live, sums.num_live)
    assert loss > 0
    for name, grad in grads.items():
        torch.testing.assert_close(offline_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_states_that_no_loss_reads_are_rightly_left_out(target, folder):
    """Negative control: one position fewer, and training differs."""
    stored = StoredStates(folder)
    drafter = make_drafter(target)
    batch = batch_of(stored.dataset, range(len(ROWS)))
    read = stored.states(batch)
    loss, _, _ = step_of(drafter, batch, stored)
    rows = batch.rows
    ends = rows[:-1][rows.diff() != 1]  # the last slot of each answer: the aux states at it, the last state after it
    for i in (0, 1):
        spoilt = [x.clone() for x in read]
        spoilt[i][ends + i] = 0
        source = types.SimpleNamespace(head=stored.head, states=lambda _, spoilt=spoilt: States(*spoilt))
        assert step_of(drafter, batch, source)[0] != loss


def test_bfloat16_states_train_alike(tmp_path):
    target = make_target(dtype=torch.bfloat16)
    stored = StoredStates(store_states(target, ROWS, tmp_path / "states"))
    assert stored.dtype == torch.bfloat16
    drafter = make_drafter(target)
    batch = batch_of(stored.dataset, range(len(ROWS)))
    online, _, _ = step_of(drafter, batch, OnlineStates(target, drafter.bound_aux_layer_ids))
    stored.check(drafter)
    offline, _, _ = step_of(drafter, batch, stored)
    torch.testing.assert_close(offline, online, rtol=1e-2, atol=0)


def test_a_drafter_of_several_layers_trains_from_stored_states(target, folder):
    """It runs all slots, those without states too; they must not spoil the others."""
    stored = StoredStates(folder)
    drafter = make_drafter(target, num_hidden_layers=2)
    batch = batch_of(stored.dataset, range(len(ROWS)), every_slot=True)
    loss, _, grads = step_of(drafter, batch, OnlineStates(target, drafter.bound_aux_layer_ids))
    stored.check(drafter)
    offline_loss, _, offline_grads = step_of(drafter, batch, stored)
    torch.testing.assert_close(offline_loss, loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(offline_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_may_be_cut_and_packed(target, folder):
    """T-06 and the shorter rows of another `max_length`, as online."""
    stored = StoredStates(folder, max_length=12)
    assert max(len(row["input_ids"]) for row in stored.dataset) == 12
    rows = [stored.dataset[i] for i in range(len(stored.dataset))]
    packs = [
        {
            "input_ids": np.concatenate([row["input_ids"] for row in pack]),
            "loss_mask": np.concatenate([row["loss_mask"] for row in pack]),
            "lengths": [len(row["input_ids"]) for row in pack],
            "documents": [document for row in pack for document in row["documents"]],
        }
        for pack in (rows[5:2:-1], rows[:3])
    ]
    batch = Collator(STEPS)(packs)
    assert batch.documents == [row["documents"][0] for row in (*rows[5:2:-1], *rows[:3])]
    drafter = make_drafter(target)
    loss, _, _ = step_of(drafter, batch, OnlineStates(target, drafter.bound_aux_layer_ids))
    torch.testing.assert_close(step_of(drafter, batch, stored)[0], loss, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_long_documents_train_from_stored_states(target, tmp_path):
    """Nothing of T x T: a document of 4096 tokens whose answer has 64."""
    rng = np.random.default_rng(0)
    long = {"input_ids": rng.integers(2, V, 4096).tolist(), "loss_mask": [0] * 4032 + [1] * 64}
    stored = StoredStates(store_states(target, [long, ROWS[0]], tmp_path / "states", batch_tokens=512))
    batch = batch_of(stored.dataset, [0, 1])
    drafter = make_drafter(target)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        loss, sums, _ = step_of(drafter, batch, stored)
    assert loss.isfinite()
    assert sums.num_live[0] > 60
    assert largest < 4096 * 1024


def make_args(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 50,
        "ttt_steps": STEPS,
        "draft_vocab_size": 44,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return Eagle3TrainingArguments(**{**settings, **changes})


@pytest.mark.parametrize(("num_steps", "workers"), slow_rows_but([(12, 0)], [(12, 0), (50, 0), (6, 2)]))
def test_a_training_run_from_stored_states_is_the_online_one(target, folder, tmp_path, num_steps, workers):
    """The same losses, with a target that is only a head; dataloader workers read the same file."""
    losses, metrics = [], []
    for source in (None, StoredStates(folder)):
        torch.manual_seed(0)
        trainer = Eagle3Trainer(
            target_model=target if source is None else None,
            states=source,
            args=make_args(tmp_path, dataloader_num_workers=workers, max_steps=num_steps),
            train_dataset=ROWS if source is None else source.dataset,
            eval_dataset=ROWS[3:7] if source is None else source.dataset.select(range(3, 7)),
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        metrics.append(trainer.evaluate())
    assert len(losses[0]) == num_steps
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-3)
    assert metrics[1]["eval_walked_acceptance_length"] == metrics[0]["eval_walked_acceptance_length"]
    assert num_steps < 50 or losses[0][-1] < 0.8 * losses[0][0]


def test_a_row_that_fills_up_has_no_stored_document(folder):
    """Where rows do not divide by the processes: it adds a token and teaches nothing, alone or beside others."""
    stored = StoredStates(folder)
    filler = ProcessRows(stored.dataset, 1, 2 * len(ROWS))[len(stored.dataset)]
    states = stored.states(Collator(STEPS)([stored.dataset[3], filler, stored.dataset[0]]))
    expected = stored.states(batch_of(stored.dataset, [3, 0]))
    at = len(ROWS[3]["input_ids"])
    for ours, theirs in zip(states, expected, strict=True):
        assert torch.equal(torch.cat([ours[:at], ours[at + 1 :]]), theirs)
        assert not ours[at].any()
    alone = stored.states(Collator(STEPS)([filler]))
    assert [list(x.shape) for x in alone] == [[1, 3 * 32], [1, 32]]
    longer = {"input_ids": [0, 0, 0, 0], "loss_mask": [0, 1, 1, 1], "documents": filler["documents"]}
    with pytest.raises(StoredStatesError, match="has 4 tokens in the batch, and 1 in"):
        stored.states(Collator(STEPS)([longer]))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_evaluation_divides_rows_that_do_not_divide(target, folder, tmp_path, batch_size):
    """Process 1 of 2 has the second of three rows and one that fills up."""
    stored = StoredStates(folder)
    trainer = Eagle3Trainer(
        model=make_drafter(target),
        states=stored,
        args=make_args(tmp_path, per_device_eval_batch_size=batch_size),
        train_dataset=stored.dataset,
        eval_dataset=stored.dataset.select([3, 8, 4]),
    )
    expected = trainer.evaluate(stored.dataset.select([8]))
    share = ProcessRows(trainer.eval_dataset, 1, 2)
    loader = DataLoader(share, batch_size=batch_size, collate_fn=trainer.data_collator)
    metrics = trainer.evaluation_loop(loader, "Evaluation").metrics
    measured = {name for name in expected if "loss" in name or "acc" in name or name == "eval_oov_rate"}
    assert len(measured) > STEPS
    assert {name: metrics[name] for name in measured} == pytest.approx(
        {name: expected[name] for name in measured}, rel=1e-5
    )


def test_a_new_drafter_needs_no_target(target, folder):
    """The stand-in gives what the target would: sizes, rotary positions, special tokens, rows of the head."""
    ours, theirs = make_drafter(StoredStates(folder).target), make_drafter(target)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.bound_aux_layer_ids == theirs.bound_aux_layer_ids
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    ids = torch.arange(9)[None]
    assert torch.equal(ours.embed(ids), theirs.embed(ids))
    with pytest.raises(RuntimeError, match="cannot run"):
        StoredStates(folder).target(ids)


def test_the_name_of_the_target_is_kept(target, tmp_path):
    named = make_target()
    named.config.name_or_path = "some-owner/some-target"
    stored = StoredStates(store_states(named, ROWS, tmp_path / "states"))
    assert stored.manifest["target"]["name"] == "some-owner/some-target"
    drafter = make_drafter(stored.target)
    assert drafter.config.target_name_or_path == "some-owner/some-target"
    stored.check(drafter)
    drafter.config.target_name_or_path = "some-owner/another"
    with pytest.raises(StoredStatesError, match=r"states of some-owner/some-target.*made for some-owner/another"):
        stored.check(drafter)


def test_another_target_of_the_same_shape_is_refused(target, folder):
    """Local folders have no name that could differ, but weights do."""
    stored = StoredStates(folder)
    stored.check_target(target)
    stored.check_target(make_target())
    torch.manual_seed(1)
    other = TARGETS["llama"]()
    other.config.name_or_path = "some-owner/another"
    message = (
        r"states of a target without a name \(llama, float32, weights (\w{8})\).* is some-owner/another \(llama, float32, "
        r"weights (?!\1)\w{8}\).*write states anew"
    )
    with pytest.raises(StoredStatesError, match=message):
        stored.check_target(other)
    half = make_target(dtype=torch.bfloat16)
    with pytest.raises(StoredStatesError, match=r"llama, float32, .*llama, bfloat16, "):
        stored.check_target(half)


def test_a_target_that_processes_share_is_known_by_its_whole_weights(folder):
    """As by tensor parallelism, which makes DTensors of weights."""
    target, stored = make_target(), StoredStates(folder)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in target.model.layers:
            for part, dim in ((layer.mlp.up_proj, 0), (layer.mlp.down_proj, 1)):
                part.weight = torch.nn.Parameter(distribute_tensor(part.weight, mesh, [Shard(dim)]))
        stored.check_target(target)
        target.model.layers[0].mlp.up_proj.weight.data += 0.01
        with pytest.raises(StoredStatesError, match="states of a target without a name"):
            stored.check_target(target)
    finally:
        torch.distributed.destroy_process_group()


def test_states_have_a_fingerprint(target, folder, tmp_path):
    """Short; the same for the same states, in whatever files; another for other ones."""
    other = make_target()
    other.model.layers[3].mlp.up_proj.weight.data += 0.001
    same = StoredStates(store_states(target, ROWS, tmp_path / "same")).fingerprint
    assert re.fullmatch(r"[0-9a-f]{16}", same)
    assert same == StoredStates(folder).fingerprint == StoredStates(folder, max_length=12).fingerprint
    changes = {
        "target": {"target": other},
        "layers": {"drafter_or_aux_layer_ids": [1, 4, 6]},
        "dtype": {"dtype": torch.bfloat16},
        "data": {"dataset": ROWS[:-1]},
    }
    others = {
        StoredStates(
            store_states(**{"target": target, "dataset": ROWS, "folder": tmp_path / name, **change})
        ).fingerprint
        for name, change in changes.items()
    }
    assert len(others - {same}) == len(changes)


def test_the_config_of_remote_code_can_be_read(copied):
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["target"]["config"]["model_type"] = "of_remote_code"
    (copied / MANIFEST).write_text(json.dumps(manifest))
    config = StoredStates(copied).target.config
    assert type(config) is PreTrainedConfig
    assert (config.model_type, config.hidden_size) == ("of_remote_code", 32)


def test_the_dataset_travels_without_its_tokens(folder):
    dataset = StoredStates(folder).dataset.select([5, 2])
    assert len(dataset) == 2
    sent = pickle.dumps(dataset)
    assert not any(row["input_ids"].tobytes() in sent for row in dataset)
    for ours, theirs in zip(pickle.loads(sent), dataset, strict=True):
        assert ours["documents"] == theirs["documents"]
        assert np.array_equal(ours["input_ids"], theirs["input_ids"])
    assert [row["documents"] for row in dataset] == [[5], [2]]


@pytest.mark.gpu
def test_states_go_to_the_device_of_the_batch_and_the_head_with_them(tmp_path):
    target = make_target(dtype=torch.bfloat16).cuda()
    stored = StoredStates(store_states(target, ROWS, tmp_path / "states"))
    batch = batch_of(stored.dataset, range(len(ROWS)))
    on_host = stored.states(batch)
    drafter = make_drafter(stored.target).cuda()
    there = batch.to("cuda")
    on_device = stored.states(there)
    assert stored.head.weight.is_cuda
    assert all(b.is_cuda and torch.equal(a, b.cpu()) for a, b in zip(on_host, on_device, strict=True))
    online = OnlineStates(target, drafter.bound_aux_layer_ids)
    with torch.autocast("cuda", torch.bfloat16):
        expected, offline = (step_of(drafter, there, source)[0] for source in (online, stored))
    torch.testing.assert_close(offline, expected, rtol=1e-2, atol=0)


# ---- rows of messages ----


@pytest.fixture
def chat_target():
    """A target for `make_tokenizer`, whose turns end with `#` too, which its tokenizer does not know."""
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": 268})).eval()
    target.generation_config.eos_token_id = make_tokenizer().convert_tokens_to_ids(["<end>", "#"])
    return target


TALK = [{"messages": [user("hi"), assistant("hello"), user("and"), assistant("so on")]}]


def test_messages_become_the_rows_that_the_trainer_makes_of_them(chat_target, tmp_path):
    """Turns end where the target ends them, by its generation config."""
    chat_tokenizer = make_tokenizer(CHATML.replace("<end>", "#"))
    folder = store_states(chat_target, TALK, tmp_path / "states", tokenizer=chat_tokenizer)
    stored = StoredStates(folder, verify=True).dataset
    trainer = Eagle3Trainer(
        target_model=chat_target, args=make_args(tmp_path), train_dataset=TALK, processing_class=chat_tokenizer
    )
    [ours], [theirs] = ([rows[i] for i in range(len(rows))] for rows in (stored, trainer.train_dataset))
    for name in ("input_ids", "loss_mask"):
        assert ours[name].tolist() == theirs[name].tolist(), name
    assert chat_tokenizer.decode(ours["input_ids"][ours["loss_mask"]]) == "hello#so on#"


def test_the_chat_template_is_told_what_it_is_told_in_training(chat_target, tmp_path):
    """And a folder is gone on with only if it was told the same."""
    silent, chat_tokenizer = {"enable_thinking": False}, make_tokenizer(REASONING)
    talk = [{"messages": [user("hi"), assistant("hello")]}]
    options = {"tokenizer": chat_tokenizer, "chat_template_kwargs": silent}
    folder = store_states(chat_target, talk, tmp_path / "states", **options)
    stored = StoredStates(folder)
    [expected] = TokenDataset(talk, chat_tokenizer, chat_template_kwargs=silent)
    assert stored.dataset[0]["input_ids"].tolist() == expected["input_ids"].tolist()
    assert stored.dataset[0]["loss_mask"].tolist() == expected["loss_mask"].tolist()
    assert stored.manifest["chat_template_kwargs"] == silent
    store_states(chat_target, talk, folder, **options)  # goes on: nothing to do
    options["chat_template_kwargs"] = {**silent, "of_no_effect": 1}
    with pytest.raises(
        StoredStatesError, match=r"chat_template_kwargs \{'enable_thinking': False\} there, .*'of_no_effect': 1\} now"
    ):
        store_states(chat_target, talk, folder, **options)
    with pytest.raises(ValueError, match=r"chat_template_kwargs .*TokenDataset, whose rows are tokens already"):
        StateWriter(chat_target, TokenDataset(ROWS), tmp_path / "other", chat_template_kwargs=silent)


def test_folders_begun_without_chat_template_kwargs_are_gone_on_with(target, copied):
    """Of versions that did not write them."""
    manifest = json.loads((copied / MANIFEST).read_text())
    assert manifest.pop("chat_template_kwargs") is None
    (copied / MANIFEST).write_text(json.dumps(manifest))
    store_states(target, ROWS, copied, shard_size=SMALL)


# ---- interrupted ----


class InterruptedRunError(Exception):
    """Somebody pulled the plug."""


def interrupt(target, folder, document):
    """Let `target` fail at the tokens of `document`, once it stores states in `folder`."""
    ids = torch.tensor(ROWS[document]["input_ids"])

    def fail(_module, _args, kwargs):
        rows = kwargs["input_ids"][:, : len(ids)]
        if (folder / HEAD).exists() and rows.shape[1] == len(ids) and (rows == ids).all(-1).any():
            raise InterruptedRunError

    return target.model.register_forward_pre_hook(fail, with_kwargs=True)


def test_an_interrupted_run_goes_on_where_it_stopped(target, folder, tmp_path):
    other = tmp_path / "states"
    shards = load_file(folder / DOCUMENTS)["shard"].tolist()
    hook = interrupt(target, other, shards.index(2))
    with pytest.raises(InterruptedRunError):
        store_states(target, ROWS, other, shard_size=SMALL)
    hook.remove()
    there = sorted(path.name for path in other.glob("states-*"))
    assert len(there) == 2
    with pytest.raises(StoredStatesError, match=r"incomplete: 4 of \d+ files.*allow_incomplete=True"):
        StoredStates(other)
    partial = StoredStates(other, allow_incomplete=True, verify=True)
    assert 0 < len(partial.dataset) < len(ROWS)
    partial.states(batch_of(partial.dataset, range(len(partial.dataset))))

    written = {name: (other / name).stat().st_mtime_ns for name in there}
    (other / "states-00009-of-00099.safetensors.tmp").write_bytes(b"half")
    store_states(target, ROWS, other, shard_size=SMALL)
    assert {name: (other / name).stat().st_mtime_ns for name in there} == written
    assert {path.name for path in other.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.glob("*.safetensors"):
        ours, theirs = load_file(other / path.name), load_file(path)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    # And what is complete is left alone.
    before = (other / MANIFEST).stat().st_mtime_ns
    store_states(target, ROWS, other, shard_size=SMALL)
    assert (other / MANIFEST).stat().st_mtime_ns == before


def test_a_damaged_or_missing_shard_is_written_anew(target, copied):
    names = sorted(path.name for path in copied.glob("states-*"))
    whole = {name: (copied / name).read_bytes() for name in names}
    (copied / names[0]).unlink()
    (copied / names[1]).write_bytes(whole[names[1]][:-10])
    (copied / HEAD).unlink()
    store_states(target, ROWS, copied, shard_size=SMALL)
    assert {name: (copied / name).read_bytes() for name in names} == whole
    StoredStates(copied, verify=True)


def test_a_full_disk_is_said_and_leaves_what_is_whole(target, tmp_path):
    """Files may not grow beyond 40 kB here: documents and manifest fit, a shard does not."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"states-00001-of-00001\.safetensors could not be written.*1 files are still to come"
        ):
            store_states(target, ROWS, tmp_path / "states")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "states").iterdir()} == {MANIFEST, DOCUMENTS, HEAD}
    store_states(target, ROWS, tmp_path / "states")
    StoredStates(tmp_path / "states", verify=True)


def test_what_does_not_fit_is_refused_before_anything_is_written(target, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    with pytest.raises(OSError, match=r"12 documents.*still to be written to .*50\.0 kB are free"):
        store_states(target, ROWS, tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_the_disk_works_while_the_target_runs(target, tmp_path, monkeypatch):
    """The target goes on with the next shard while one is written, and no further."""
    threads, real = set(), os.fsync

    def watch(file):
        is_shard = any((tmp_path / "states").glob("states-*.tmp"))
        threads.add((is_shard, threading.get_ident()))
        real(file)

    monkeypatch.setattr(os, "fsync", watch)
    store_states(target, ROWS, tmp_path / "states", shard_size=SMALL)
    assert (False, threading.get_ident()) in threads
    assert (True, threading.get_ident()) not in threads


# ---- other targets, other data ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": make_rows(seed=1)}, "data"),
        ({"drafter_or_aux_layer_ids": [1, 4, 6]}, r"aux_layer_ids \[2, 4, 5\] there, \[1, 4, 6\] now"),
        ({"dtype": torch.bfloat16}, "dtype float32 there, bfloat16 now"),
        ({"shard_size": 10**9}, r"shard_size 6000 there, 1000000000 now"),
        (
            {"target": make_target(dtype=torch.bfloat16), "dtype": torch.float32},
            "target dtype float32 there, bfloat16 now",
        ),
        ({"name": "some-owner/another"}, "target name None there, some-owner/another now"),
        ({"weights": 0.001}, "target weights"),
    ],
    ids=["data", "layers", "dtype", "shards", "target dtype", "name", "weights"],
)
def test_going_on_with_something_else_is_refused(folder, change, message):
    change = dict(change)
    target, rows = change.pop("target", make_target()), change.pop("rows", ROWS)
    target.config.name_or_path = change.pop("name", "")
    target.model.layers[3].mlp.up_proj.weight.data += change.pop("weights", 0)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StoredStatesError, match=f"states of something else: .*{message}"):
        store_states(target, rows, folder, **{"shard_size": SMALL, **change})
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_other_things_is_left_alone(target, tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match=r"no manifest\.json"):
        store_states(target, ROWS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_target_whose_head_is_more_than_a_layer_is_refused(tmp_path):
    """Known at once, or only when its logits are compared: either way before anything is written."""

    class Shouting(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            if kwargs.get("writes_only"):
                return out
            out.logits = out.logits.roll(1, dims=-1)
            return out

    torch.manual_seed(0)
    shouting = Shouting(LlamaConfig(**TINY)).eval()
    wrapped = make_target()
    wrapped.lm_head = torch.nn.Sequential(wrapped.lm_head)
    for target in (shouting, wrapped):
        with pytest.raises(ValueError, match=r"more than a plain linear layer.*\(64 a token\).*Train with the target"):
            store_states(target, ROWS, tmp_path / "states")
        assert not (tmp_path / "states").exists()


def test_states_on_which_the_head_gives_other_logits_are_refused(tmp_path):
    """T-24: a target whose head works otherwise at single positions is found by the sample alone."""

    class Fickle(LlamaForCausalLM):
        def forward(self, *args, logits_to_keep=0, **kwargs):
            out = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
            if kwargs.get("writes_only"):
                return out
            if isinstance(logits_to_keep, torch.Tensor):
                out.logits = out.logits.roll(1, dims=-1)
            return out

    torch.manual_seed(0)
    target = Fickle(LlamaConfig(**TINY)).eval()
    with pytest.raises(
        ValueError, match=r"says what the target says at \d+ of \d+ sampled positions, expected 99\.9%"
    ):
        store_states(target, ROWS, tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_states_that_are_not_finite_are_named(tmp_path, monkeypatch):
    """Residual streams outgrow half precision: the document and the boundary are said."""
    target = make_target()
    target.model.layers[3].mlp.down_proj.weight.data *= 1e8
    target.model.layers[3].mlp.down_proj.weight.data[1:] = 0
    with pytest.raises(
        ValueError,
        match=r"of 12 documents .*not finite in torch.float16, document \d+ at boundaries \[4, 5\]; up to 1%.*Store bfloat16",
    ):
        store_states(target, ROWS, tmp_path / "states", dtype=torch.float16)
    StoredStates(store_states(target, ROWS, tmp_path / "other"))


@pytest.mark.slow
def test_a_few_documents_that_are_not_finite_are_left_out(tmp_path):
    """T-30: of 240 documents the two that read token 63 overflow; the run goes on without them, and says so."""
    target = make_target()
    target.model.embed_tokens.weight.data[63] = torch.inf
    rows = [{**row, "input_ids": [min(i, 62) for i in row["input_ids"]]} for row in make_rows(240)]
    for i in (17, 70):
        rows[i]["input_ids"][0] = 63
    stored = StoredStates(store_states(target, rows, tmp_path / "states", shard_size=SMALL), verify=True)
    assert sorted({*range(240)} - {row["documents"][0] for row in stored.dataset}) == [17, 70]
    states = stored.states(batch_of(stored.dataset, range(238)))
    assert all(x.isfinite().all() for x in states)
    writer = StateWriter(target, [*rows, *rows[17:18]], tmp_path / "more")
    with pytest.raises(ValueError, match="3 of 241 documents"):
        writer.run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter_or_aux_layer_ids": [4, 2]}, r"ascending boundaries from 0 to 8.*got \[4, 2\]"),
        ({"drafter_or_aux_layer_ids": [4, 11]}, r"got \[4, 11\]"),
        ({"drafter_or_aux_layer_ids": []}, r"got \[\]"),
        ({"dtype": torch.int8}, "float32, bfloat16 or float16, got dtype torch.int8"),
        ({"shard_size": 0}, "shard_size and batch_tokens must be at least 1, got 0 and"),
    ],
)
def test_arguments_are_checked(target, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        StateWriter(target, ROWS, tmp_path / "states", **options)


def test_tokens_of_another_tokenizer_are_refused(target, tmp_path):
    with pytest.raises(ValueError, match="vocabulary is 0 to 63"):
        StateWriter(target, [{"input_ids": [1, 2, 3, V], "loss_mask": [0, 0, 1, 1]}], tmp_path / "states")


def test_a_drafter_says_what_is_stored(target, tmp_path):
    drafter = make_drafter(target, aux_layer_ids=[1, 6], num_aux_hidden_states=2)
    stored = StoredStates(store_states(target, ROWS, tmp_path / "states", drafter))
    assert stored.aux_layer_ids == (1, 6)
    stored.check(drafter)
    batch = batch_of(stored.dataset, range(len(ROWS)))
    loss, _, _ = step_of(drafter, batch, OnlineStates(target, (1, 6)))
    torch.testing.assert_close(step_of(drafter, batch, stored)[0], loss, rtol=1e-5, atol=0)


# ---- reading what is damaged, or not meant ----


def damage_manifest(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_a_folder_without_states_is_named(tmp_path):
    with pytest.raises(StoredStatesError, match=r"no stored hidden states in .*hf-eagle3 states"):
        StoredStates(tmp_path)


def test_a_manifest_of_another_version_or_cut_short_is_named(copied):
    damage_manifest(copied, schema=2)
    with pytest.raises(StoredStatesError, match=r"schema 2, and this version of hf-eagle3 reads 1"):
        StoredStates(copied)
    (copied / MANIFEST).write_text('{"schema": 1, "tar')
    with pytest.raises(StoredStatesError, match=r"manifest\.json is damaged .*Delete the folder and write"):
        StoredStates(copied)


@pytest.mark.parametrize("name", [shard_name(1, 5), DOCUMENTS, HEAD])
def test_missing_and_cut_files_are_named(copied, name):
    if name.startswith("states-"):
        name = sorted(path.name for path in copied.glob("states-*"))[1]
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[:-1])
    with pytest.raises(
        StoredStatesError, match=rf"{name} is damaged: the manifest says {len(data)} bytes, and it has {len(data) - 1}"
    ):
        StoredStates(copied)
    (copied / name).unlink()
    with pytest.raises(StoredStatesError, match=f"{name} is missing"):
        StoredStates(copied)


def test_a_flipped_bit_is_found_when_asked_for(copied):
    path = sorted(copied.glob("states-*"))[0]
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    StoredStates(copied)
    with pytest.raises(StoredStatesError, match=rf"{path.name} is damaged: the manifest says SHA-256"):
        StoredStates(copied, verify=True)


def test_a_damaged_header_is_named(copied):
    path = sorted(copied.glob("states-*"))[0]
    data = bytearray(path.read_bytes())
    data[:8] = b"\xff" * 8
    path.write_bytes(data)
    stored = StoredStates(copied)
    with pytest.raises(StoredStatesError, match=rf"{path.name} cannot be read .*Delete it"):
        stored.states(batch_of(stored.dataset, [0]))


def test_a_shard_of_another_dtype_or_size_is_named(copied):
    path = sorted(copied.glob("states-*"))[0]
    tensors = load_file(path)
    for spoilt, message in (
        ({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, "of F32, and it has .* of F16"),
        ({name: tensor[1:].contiguous() for name, tensor in tensors.items()}, r"aux_hidden_states \[\d+, 96\] of F32"),
        ({"last_hidden_states": tensors["last_hidden_states"]}, "cannot be read"),
    ):
        save_file(spoilt, path)
        manifest = json.loads((copied / MANIFEST).read_text())
        manifest["files"][path.name]["bytes"] = path.stat().st_size
        (copied / MANIFEST).write_text(json.dumps(manifest))
        stored = StoredStates(copied)
        with pytest.raises(StoredStatesError, match=message):
            stored.states(batch_of(stored.dataset, [0]))


def test_states_that_are_no_longer_finite_are_named(copied):
    path = sorted(copied.glob("states-*"))[0]
    tensors = load_file(path)
    tensors["aux_hidden_states"][0, 3] = torch.nan
    save_file(tensors, path)
    stored = StoredStates(copied)
    stored.states(batch_of(stored.dataset, [len(ROWS) - 1]))
    with pytest.raises(
        StoredStatesError, match=r"Document 0: aux_hidden_states are not finite at position 0.*Delete it"
    ):
        stored.states(batch_of(stored.dataset, [1, 0]))


def test_batches_of_other_rows_are_refused(target, folder):
    stored = StoredStates(folder)
    with pytest.raises(StoredStatesError, match=r"names 0 stored documents for 2 rows.*`dataset`"):
        stored.states(Collator(STEPS)(ROWS[:2]))
    row = {name: list(value) for name, value in stored.dataset[2].items()}
    with pytest.raises(StoredStatesError, match=r"has document 12, and .* documents 0 to 11"):
        stored.states(Collator(STEPS)([{**row, "documents": [12]}]))
    longer = {"input_ids": [*row["input_ids"], 5], "loss_mask": [*row["loss_mask"], 0], "documents": [2]}
    with pytest.raises(StoredStatesError, match=rf"Document 2 has {len(row['input_ids']) + 1} tokens in the batch"):
        stored.states(Collator(STEPS)([longer]))
    changed = list(row["input_ids"])
    changed[3] = 2 + changed[3] % 50
    with pytest.raises(
        StoredStatesError, match=rf"Document 2 has token {row['input_ids'][3]} at position 3 .* and {changed[3]} in"
    ):
        stored.states(Collator(STEPS)([stored.dataset[0], {**row, "input_ids": changed}]))
    everything = {**row, "loss_mask": [1] * len(row["loss_mask"])}
    with pytest.raises(StoredStatesError, match=r"trains where .* has no states: its loss_mask"):
        stored.states(Collator(STEPS)([everything]))


def test_drafters_of_other_layers_and_targets_are_refused(target, folder):
    stored = StoredStates(folder)
    with pytest.raises(
        StoredStatesError, match=r"boundaries \[2, 4, 5\], and this drafter reads \[1, 4, 6\].*--aux_layer_ids 1 4 6"
    ):
        stored.check(make_drafter(target, aux_layer_ids=[1, 4, 6]))
    for sizes, message in (({"vocab_size": 80}, "vocabulary size 80"), ({"hidden_size": 16}, "hidden size 16")):
        other = LlamaForCausalLM(LlamaConfig(**{**TINY, **sizes}))
        with pytest.raises(ValueError, match=message):
            stored.check(make_drafter(other))


def test_many_shards_are_not_all_kept_open(folder):
    documents, expected = (Documents(folder, read_manifest(folder), **options) for options in ({"most_open": 2}, {}))
    for i in range(len(ROWS)):
        assert all(torch.equal(a, b) for a, b in zip(documents.states(i), expected.states(i), strict=True))
    assert len(documents._open) == 2 < len(expected._open)


def test_nothing_is_left_to_train_on(folder):
    with pytest.raises(ValueError, match=r"no stored document is left.*max_length 2"):
        StoredStates(folder, max_length=2)


def test_positions_are_those_that_the_trainer_reads():
    """Every slot that trains reads the position after it, and no other position is read."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(int(rng.integers(3, 30))) < 0.6
        batch = Collator(4)([{"input_ids": mask.astype(int), "loss_mask": mask}])
        assert (batch.rows + 1).tolist() == stored_positions(mask).tolist()


# ---- the command ----


@pytest.fixture
def command(tokenizer, tmp_path):
    """Runs `hf-eagle3 states` on a tiny target of bytes, in `tmp_path`."""
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": 256})).eval()
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, *ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def run(*arguments):
        paths = {"--target_model_name_or_path": "target", "--train_file": "rows.jsonl", "--output_dir": "states"}
        given = [part for name, path in paths.items() for part in (name, str(tmp_path / path))]
        return cli.main(["states", *given, "--device", "cpu", *arguments])

    return run


def test_the_command_stores_what_python_stores(command, tmp_path, capsys):
    assert command("--dtype", "bfloat16", "--shard_size", "20kB", "--max_length", "16") == 0
    said = capsys.readouterr().out
    assert re.search(r"13 documents of \d+ tokens take \d+\.\d kB.* are free there\.", said)
    stored = StoredStates(tmp_path / "states", verify=True)
    assert stored.aux_layer_ids == (2, 4, 5)
    assert stored.manifest["dtype"] == "bfloat16"
    assert stored.manifest["num_shards"] > 1
    assert stored.manifest["tokenizer"]
    assert stored.manifest["chat_template"]
    assert len(stored.dataset[0]["input_ids"]) == len("hihello")
    assert max(len(row["input_ids"]) for row in stored.dataset) == 16
    assert str(tmp_path) not in (tmp_path / "states" / MANIFEST).read_text()
    assert command("--dtype", "bfloat16", "--shard_size", "20kB", "--max_length", "16") == 0  # goes on: nothing to do


def test_the_command_asks_before_writing_much(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.states, "ASK_FROM", 1000)
    assert command("--aux_layer_ids", "1", "4") == 2
    assert "nobody to ask. Give --yes" in capsys.readouterr().err
    assert not (tmp_path / "states").exists()
    asked = []
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "no")
    assert command("--aux_layer_ids", "1", "4") == 1
    assert not (tmp_path / "states").exists()
    assert re.fullmatch(r"Write \d+\.\d kB to .*states\? \[y/N\] ", asked[0])
    monkeypatch.setattr("builtins.input", lambda _: "Y")
    assert command("--aux_layer_ids", "1", "4") == 0
    assert StoredStates(tmp_path / "states").aux_layer_ids == (1, 4)
    assert command("--aux_layer_ids", "1", "4", "--yes") == 0
    assert len(asked) == 1


def test_the_command_takes_the_boundaries_of_a_drafter(command, target, tmp_path):
    torch.manual_seed(5)
    wide = LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": 256}))
    new_drafter(wide, torch.arange(2, 42), aux_layer_ids=[1, 4, 6]).save_pretrained(tmp_path / "drafter")
    assert command("--drafter_name_or_path", str(tmp_path / "drafter"), "--yes") == 0
    assert StoredStates(tmp_path / "states").aux_layer_ids == (1, 4, 6)


def test_the_command_names_what_is_wrong(command, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [1], "loss_mask": [1]}\n{"input')
    assert command() == 2
    assert "rows.jsonl, line 2: expected a row of JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("--shard_size", "much")
    assert "expected a size like 1GB or 500MB, got 'much'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"), [("1GB", 10**9), ("500MB", 5 * 10**8), ("1.5 kB", 1500), ("2T", 2 * 10**12), ("7", 7)]
)
def test_sizes_are_read(text, count):
    assert cli.arguments.byte_count(text) == count
