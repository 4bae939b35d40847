"""What can be asked of the trainer: adapters, averages, packing, other targets, guards, and what it forecasts."""

import copy
import importlib.util
import json
import random
import re
import sys
import types

import numpy as np
import pytest
import torch
from helpers.marks import slow_but
from helpers.paths import ROOT
from helpers.texts import PLACEHOLDER
from helpers.training import TINY, V, make_args, make_drafter, make_tokenizer, progressions, weights_of
from huggingface_hub import ModelCard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    TrainingArguments,
)
from transformers.integrations import liger

from hf_eagle3 import Eagle3Trainer
from hf_eagle3.kernels.fusion import FusedElements
from hf_eagle3.tensor_parallel import find_peers
from hf_eagle3.training import new_drafter
from hf_eagle3.training.data.packing import pack
from hf_eagle3.training.distributed import served_copy
from hf_eagle3.training.forecast import (
    DrafterShape,
    TargetShape,
    activation_bytes,
    backward_flops,
    borrowed_bytes,
    drafter_flops,
    forward_flops,
    make_forecast,
    target_flops,
)
from hf_eagle3.training.loading import place_target
from hf_eagle3.training.recipe import read_recipe
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.step.batch import Collator

pytestmark = pytest.mark.any_release

PROMPT = 6
RECOMPUTE = "activation_checkpointing"  # Transformers 5.22 and before: gradient_checkpointing
if RECOMPUTE not in TrainingArguments.__dataclass_fields__:
    RECOMPUTE = "gradient_checkpointing"


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows():
    ids = progressions(24, 30, seed=7)
    return [
        {"input_ids": row[: 20 + i % 9].tolist(), "loss_mask": [0] * PROMPT + [1] * (14 + i % 9)}
        for i, row in enumerate(ids)
    ]


def train(target, rows, tmp_path, drafter=None, **changes):
    options = {name: changes.pop(name) for name in ("peft_config", "states", "compute_metrics") if name in changes}
    trainer = Eagle3Trainer(
        model=make_drafter(target) if drafter is None else drafter,
        target_model=target,
        args=make_args(tmp_path, **changes),
        train_dataset=rows,
        eval_dataset=rows[:5],
        **options,
    )
    trainer.train()
    return trainer


def losses_of(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# ---- adapters ----

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


@needs_peft
@pytest.mark.parametrize("modules", slow_but([None], [None, ["q_proj", "lm_head"]]), ids=["default", "with_head"])
def test_only_adapters_train_and_are_saved_and_merge(target, rows, tmp_path, modules):
    from peft import LoraConfig, PeftModel

    base = make_drafter(target)
    base.save_pretrained(tmp_path / "base")
    before = weights_of(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules)
    trainer = train(target, rows, tmp_path, base, peft_config=config, max_steps=4, save_strategy="steps", save_steps=2)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    after = {name: trainer.drafter.get_submodule(name.rpartition(".")[0]) for name in before}
    for name, module in after.items():
        module = getattr(module, "base_layer", module)
        assert torch.equal(getattr(module, name.rpartition(".")[2]), before[name]), name

    trainer.save_model()
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        check_adapters_card(folder, base.config.hidden_size)
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "out")
    merged = loaded.merge_and_unload()
    served = served_copy(trainer.model, torch.float32, target.device)
    assert not torch.equal(served.layers[0].self_attn.q_proj.weight, before["layers.0.self_attn.q_proj.weight"])
    for name, value in served.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, msg=name)

    # What was taught with adapters beside the weights is what the merged weights say.
    ours = trainer.evaluate()
    theirs = Eagle3Trainer(
        model=served, target_model=target, args=trainer.args, train_dataset=rows, eval_dataset=rows[:5]
    ).evaluate()
    for name in ours.keys() & theirs.keys():
        if "per_second" not in name and "runtime" not in name and name != "epoch":
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


def check_adapters_card(folder, width):
    """Ours, not the template of PEFT: filled in, with a snippet, and no folder for a base model."""
    text = (folder / "README.md").read_text()
    assert not PLACEHOLDER.search(text), PLACEHOLDER.search(text)
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert card.data.base_model is None
    assert "Adapters (LORA) of an EAGLE-3.1 drafter for a llama model of 8 layers" in text
    assert re.search(r"\| Adapters \| \d\.\d\d million parameters \|", text)
    assert f"| Layers, width | 1, {width} |" in text
    assert f'PeftModel.from_pretrained(drafter, "{folder}").merge_and_unload()' in text


@needs_peft
def test_adapters_resume(target, rows, tmp_path):
    from peft import LoraConfig

    def make(folder):
        args = make_args(folder, max_steps=4, save_strategy="steps", save_steps=2)
        config = LoraConfig(r=4, init_lora_weights=True)
        torch.manual_seed(2)
        return Eagle3Trainer(
            model=make_drafter(target), target_model=target, args=args, train_dataset=rows, peft_config=config
        )

    whole = make(tmp_path)
    whole.train()
    again = make(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_peft_that_is_not_there_is_named(target, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-eagle3\[peft\]'"):
        train(target, rows, tmp_path, peft_config=object())


# ---- models ----


def test_models_are_given_by_name(target, rows, tmp_path):
    target.save_pretrained(tmp_path / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    args = make_args(tmp_path, target_model_init_kwargs='{"dtype": "bfloat16", "attn_implementation": "eager"}')
    trainer = Eagle3Trainer(
        model=str(tmp_path / "drafter"),
        target_model=str(tmp_path / "target"),
        args=args,
        train_dataset=rows,
        processing_class=make_tokenizer(),
    )
    assert trainer.target_model.dtype == torch.bfloat16
    assert trainer.target_model.config._attn_implementation == "eager"
    assert trainer.model.dtype == torch.float32
    trainer.train()
    with pytest.raises(ValueError, match=r"target_model_init_kwargs .* loaded already"):
        train(target, rows, tmp_path, target_model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"model_init_kwargs .* which is None"):
        Eagle3Trainer(target_model=target, args=make_args(tmp_path, model_init_kwargs={"a": 1}), train_dataset=rows)


@pytest.mark.parametrize(
    ("axes", "placements", "message"),
    [
        (("dp_replicate", "fsdp"), (Replicate(), Shard(0)), "otherwise than by tensor parallelism"),
        (("fsdp", "tp"), (Shard(0), Shard(1)), "otherwise than by tensor parallelism"),
        (("fsdp", "tp"), (Replicate(), Shard(0)), None),  # a target for each two processes
    ],
)
def test_only_by_tensor_parallelism_processes_may_share_a_target(target, axes, placements, message):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        spread = copy.deepcopy(target)
        spread._tp_size = 2 if "tp" in axes else None
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
        weight = spread.model.layers[0].mlp.up_proj.weight
        shard = distribute_tensor(weight.detach(), mesh, placements, src_data_rank=None)
        spread.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(shard)
        args = types.SimpleNamespace(world_size=4, device=torch.device("cpu"))
        if message is None:
            place_target(spread, args)
            assert torch.distributed.get_process_group_ranks(find_peers(spread)) == [0, 1]
        else:
            with pytest.raises(ValueError, match=message):
                place_target(spread, args)
    finally:
        torch.distributed.destroy_process_group()


def test_a_target_on_devices_that_each_process_would_use_is_refused(target):
    spread = copy.deepcopy(target)
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    args = types.SimpleNamespace(world_size=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"devices \['0', '1'\], and each of 2 processes"):
        place_target(spread, args)


def test_a_target_that_was_placed_stays_where_it_is(target):
    placed = copy.deepcopy(target)
    placed.hf_device_map = {"": "cpu"}
    place_target(placed, types.SimpleNamespace(world_size=1, device=torch.device("meta")))
    assert placed.device.type == "cpu"


def test_a_stream_is_no_data_set(target, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(ValueError, match="not a stream"):
        Eagle3Trainer(target_model=target, args=make_args(tmp_path), train_dataset=Stream())


@pytest.mark.parametrize("asked", [True, False])
def test_liger_kernels_are_for_the_target_in_place_of_ours(target, rows, tmp_path, monkeypatch, asked):
    given = []
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda *args: given.append(args))
    options = {"use_liger_kernel": asked, "liger_kernel_config": {"rope": False}}
    trainer = Eagle3Trainer(make_drafter(target), target, args=make_args(tmp_path, **options), train_dataset=rows)
    assert [(model is target, config) for model, config in given] == [(True, {"rope": False})] * asked
    assert isinstance(trainer._source._kernels, FusedElements) != asked


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_a_quantised_target_trains_a_drafter(target, rows, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    target.save_pretrained(tmp_path / "target")
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    assert type(small.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")
    drafter = make_drafter(target)
    near = train(small, rows, tmp_path, copy.deepcopy(drafter), logging_steps=1)
    exact = train(target, rows, tmp_path, copy.deepcopy(drafter), logging_steps=1)
    assert losses_of(near) != losses_of(exact)  # so its weights are others
    assert losses_of(near) == pytest.approx(losses_of(exact), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"fc_norm": True, "norm_output": True, "num_hidden_layers": 1}),
        ({"drafter_version": "3"}, {"fc_norm": False, "norm_output": False}),
        ({"fc_norm": False, "norm_before_fc": True}, {"fc_norm": False, "norm_before_fc": True, "norm_output": True}),
        (
            {"num_hidden_layers": 2, "intermediate_size": 48, "aux_layer_ids": [1, 4]},
            {"num_hidden_layers": 2, "intermediate_size": 48, "aux_layer_ids": [1, 4], "num_aux_hidden_states": 2},
        ),
    ],
    ids=["3.1", "3", "norm_before", "larger"],
)
def test_a_new_drafter_is_what_the_arguments_say(target, rows, tmp_path, changes, expected):
    trainer = Eagle3Trainer(target_model=target, args=make_args(tmp_path, **changes), train_dataset=rows)
    config = trainer.model.config
    assert {name: getattr(config, name) for name in expected} == expected
    trainer.train()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_a_vocabulary_that_covers_too_little_is_refused(target, rows, tmp_path):
    args = make_args(tmp_path, draft_vocab_size=4, min_coverage=0.9)
    with pytest.raises(ValueError, match=r"4 tokens covers only .* lower min_coverage \(0.9\)"):
        Eagle3Trainer(target_model=target, args=args, train_dataset=rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "kl"}, "loss_type must be one of forward_kl, .*got 'kl'"),
        ({"drafter_version": "4"}, "drafter_version must be one of 3, 3.1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"eval_generate_prompts": -1}, "eval_generate_prompts"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_settings_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **changes)


def test_the_best_checkpoint_is_by_default_the_best_accepted(tmp_path):
    args = make_args(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    assert args.metric_for_best_model == "eval_acceptance_length"
    assert args.greater_is_better


def test_compiling_the_whole_is_left_out(tmp_path):
    args = make_args(tmp_path, torch_compile=True)
    assert not args.torch_compile
    assert args.torch_compile_backend is None


# ---- data ----


def test_packing_keeps_documents_whole_and_wastes_little():
    lengths = [random.Random(0).randint(1, 60) for _ in range(300)]
    lengths = [random.Random(i).randint(1, 60) for i in range(300)]
    bins = pack(lengths, 64)
    assert sorted(i for b in bins for i in b) == list(range(300))
    assert all(sum(lengths[i] for i in b) <= 64 for b in bins)
    assert len(bins) * 64 < 1.05 * sum(lengths)
    assert pack([5, 100, 3], 8) == [[0, 2], [1]]


def test_packed_rows_train_as_the_same_rows_apart(target, rows, tmp_path):
    """One update over all rows, however they are laid out."""
    results = []
    for packing in (False, True):
        changes = {"packing": packing, "max_length": 64, "per_device_train_batch_size": 24, "max_steps": 1}
        trainer = train(target, rows, tmp_path, **changes, optim="sgd", learning_rate=1.0, warmup_steps=0)
        assert (len(trainer.train_dataset) < 12) == packing
        results.append(weights_of(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


class Stored(Dataset):
    """Rows of documents that lie elsewhere."""

    def __init__(self, rows):
        self.rows = [
            {"input_ids": np.array(r["input_ids"]), "loss_mask": np.array(r["loss_mask"], bool), "documents": [i]}
            for i, r in enumerate(rows)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class RecordedStates:
    """States computed before training, asked for by document."""

    def __init__(self, target, boundaries, rows):
        source = OnlineStates(target, boundaries)
        self.head, self.target = source.head, target
        self._kept = [source.states(Collator(3)([r])) for r in rows]
        self.asked = []

    def states(self, batch):
        self.asked += batch.documents
        assert len(batch.documents) == len(batch.lengths)
        parts = [self._kept[i] for i in batch.documents]
        return type(parts[0])(*(torch.cat(x) for x in zip(*parts, strict=True)))


@pytest.mark.parametrize("packing", slow_but([True], [False, True]))
def test_states_come_from_wherever_they_are_asked(target, rows, tmp_path, packing):
    """Without any target at all, the same losses."""
    changes = {"logging_steps": 1, "packing": packing, "max_length": 64, "per_device_train_batch_size": 3}
    online = train(target, rows, tmp_path, **changes)
    drafter = make_drafter(target)
    source = RecordedStates(target, drafter.bound_aux_layer_ids, rows)
    trainer = Eagle3Trainer(
        model=drafter,
        states=source,
        args=make_args(tmp_path, **changes),
        train_dataset=Stored(rows),
        eval_dataset=Stored(rows[:5]),
    )
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses_of(online), abs=1e-5)
    assert set(source.asked) <= set(range(24))
    assert trainer.target_model is None
    metrics = trainer.evaluate()
    rates = [metrics[f"eval_accept_depth_{k}"] for k in (1, 2, 3) if f"eval_accept_depth_{k}" in metrics]
    assert 1 + sum(np.cumprod(rates)) == pytest.approx(metrics["eval_acceptance_length"])
    assert metrics["eval_acceptance_length"] == metrics["eval_walked_acceptance_length"]


# ---- evaluation ----


@pytest.mark.slow
def test_evaluation_leaves_training_as_it_was(target, rows, tmp_path):
    """With or without evaluations in between, the same weights; the drafter's mode and settings stay."""
    results = []
    for steps in (1, 100):
        trainer = train(target, rows, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=steps)
        results.append(weights_of(trainer.model))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
    drafter = trainer.model.train()
    drafter.generation_config.num_assistant_tokens = 9
    state = torch.random.get_rng_state()
    trainer.evaluate()
    assert drafter.training
    assert drafter.generation_config.num_assistant_tokens == 9
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not target.training


def test_metrics_of_ones_own_see_the_sums(target, rows, tmp_path):
    trainer = train(
        target, rows, tmp_path, compute_metrics=lambda sums: {"alpha_0": float(sums.alpha[0] / sums.num_live[0])}
    )
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_alpha_0"] < 1
    assert metrics["eval_simulated_acceptance_length"] > 1
    assert 0 <= metrics["eval_oov_rate"] < 1


def test_without_prompts_the_answers_are_walked(target, rows, tmp_path):
    metrics = train(target, rows, tmp_path, eval_generate_prompts=0).evaluate()
    assert metrics["eval_acceptance_length"] == metrics["eval_walked_acceptance_length"]


def test_simulated_acceptance_is_of_slots_with_all_steps(target, rows, tmp_path):
    """By hand, from the drafter's probabilities, of one row and depth 1."""
    trainer = train(target, rows, tmp_path, eval_depth=1, ttt_steps=1)
    simulated = trainer.evaluate(eval_dataset=rows[:1])["eval_simulated_acceptance_length"]
    ids = torch.tensor([rows[0]["input_ids"]])
    out = target(ids, output_hidden_states=True)
    boundaries = trainer.model.bound_aux_layer_ids
    aux = torch.cat([out.hidden_states[i] for i in boundaries], dim=-1)
    shifted = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    with torch.no_grad():
        q = trainer.model.eval()(input_ids=shifted, aux_hidden_states=aux).logits.softmax(-1)[0]
    p = out.logits.softmax(-1)[0]
    to_draft = {int(t): d for d, t in enumerate(trainer.model.draft_to_target_ids)}
    ratios = []
    for i in range(PROMPT - 1, ids.shape[1] - 2):  # slot i proposes token i + 2
        token = int(ids[0, i + 2])
        ratios.append(min(1.0, float(q[i, to_draft[token]] / p[i + 1, token])) if token in to_draft else 0.0)
    assert simulated == pytest.approx(1 + sum(ratios) / len(ratios), abs=1e-4)


def test_what_lies_beyond_the_training_length_is_told_apart(target, rows, tmp_path):
    """Of rows twice as long: as rows that were cut, and as rows that are taught from there on alone."""
    longest = 12
    long_rows = [
        {name: [*rows[i][name], *rows[i + 1][name]] for name in ("input_ids", "loss_mask")} for i in range(0, 8, 2)
    ]
    late = [{**row, "loss_mask": [0] * longest + row["loss_mask"][longest:]} for row in long_rows]
    drafter, found = make_drafter(target), {}
    for name, given, lengths in (
        ("all", long_rows, {"max_length": longest, "eval_max_length": 64}),
        ("cut", long_rows, {"max_length": longest}),
        ("late", late, {"max_length": 64}),
    ):
        args = make_args(tmp_path, eval_generate_prompts=0, **lengths)
        trainer = Eagle3Trainer(model=drafter, target_model=target, args=args, train_dataset=rows, eval_dataset=given)
        found[name] = trainer.evaluate()
    for name in ("loss", "accuracy_0", "accuracy_2", "walked_acceptance_length", "simulated_acceptance_length"):
        assert found["all"][f"eval_{name}"] == pytest.approx(found["cut"][f"eval_{name}"], nan_ok=True)
        assert found["all"][f"eval_long_{name}"] == pytest.approx(found["late"][f"eval_{name}"], nan_ok=True)
        assert f"eval_long_{name}" not in found["cut"]
    assert found["all"]["eval_loss"] != found["all"]["eval_long_loss"]


# ---- guards ----


def test_a_loss_that_is_no_number_stops_with_its_batch(target, rows, tmp_path):
    broken = copy.deepcopy(target)
    with torch.no_grad():
        broken.model.embed_tokens.weight[5] = torch.nan
    marked = copy.deepcopy(rows)
    marked = [r for r in marked if 5 not in r["input_ids"]]
    marked.append({"input_ids": [5, *marked[0]["input_ids"]], "loss_mask": [0, *marked[0]["loss_mask"]]})
    changes = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1, "max_steps": len(marked)}
    with pytest.raises(FloatingPointError, match=rf"loss of update {len(marked)} is NaN.*nan_batch_step{len(marked)}"):
        train(broken, marked, tmp_path, make_drafter(target), **changes)
    (kept,) = torch.load(tmp_path / "out" / f"nan_batch_step{len(marked)}.pt")
    assert kept["input_ids"].tolist() == marked[-1]["input_ids"]
    assert kept["loss_mask"].tolist() == [bool(x) for x in marked[-1]["loss_mask"]]


def test_an_update_without_finite_gradients_is_left_out(target, rows, tmp_path):
    drafter = make_drafter(target)
    before = weights_of(drafter)
    spoil = [True]

    def hook(grad):
        return grad * torch.inf if spoil[0] else grad

    drafter.fc.weight.register_hook(hook)
    trainer = train(target, rows, tmp_path, drafter, max_steps=2)
    assert all(torch.equal(before[name], value) for name, value in drafter.state_dict().items())
    trainer.args.max_steps = 40
    with pytest.raises(FloatingPointError, match="20 updates in a row"):
        trainer.train()
    spoil[0] = False
    trainer.args.max_steps = 2
    trainer.train()
    assert not torch.equal(before["fc.weight"], drafter.fc.weight)


def test_a_drafter_without_weights_to_train_is_refused(target, rows, tmp_path):
    with pytest.raises(ValueError, match="No weight of this drafter trains"):
        train(target, rows, tmp_path / "again", make_drafter(target).requires_grad_(False))


@pytest.mark.parametrize(("mask", "what"), [(0, "none"), (1, "all")])
def test_masks_that_cannot_be_are_refused_in_datasets_too(target, rows, tmp_path, mask, what):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            ids = np.array(rows[index]["input_ids"])
            return {"input_ids": ids, "loss_mask": np.full(len(ids), mask, dtype=bool)}

    with pytest.raises(ValueError, match=f"There is nothing to learn: of {len(rows)} rows, each marks {what}"):
        Eagle3Trainer(target_model=target, args=make_args(tmp_path), train_dataset=Rows())


def test_a_target_of_few_layers_needs_boundaries(rows, tmp_path):
    shallow = LlamaForCausalLM(LlamaConfig(**{**TINY, "num_hidden_layers": 4})).eval()
    shallower = LlamaForCausalLM(LlamaConfig(**{**TINY, "num_hidden_layers": 2})).eval()
    for model, n in ((shallow, 4), (shallower, 2)):
        with pytest.raises(ValueError, match=rf"The target has {n} layers.*--aux_layer_ids"):
            Eagle3Trainer(target_model=model, args=make_args(tmp_path), train_dataset=rows)
    args = make_args(tmp_path, aux_layer_ids=[1, 2, 3], max_steps=1)
    Eagle3Trainer(target_model=shallow, args=args, train_dataset=rows).train()


def test_resuming_another_recipe_is_refused(target, rows, tmp_path):
    train(target, rows, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert read_recipe(checkpoint)["ttt_steps"] == 3

    def resume(drafter=None, data=None, other=None, **changes):
        Eagle3Trainer(
            model=make_drafter(target) if drafter is None else drafter,
            target_model=target if other is None else other,
            args=make_args(tmp_path, max_steps=3, **changes),
            train_dataset=rows if data is None else data,
        ).train(resume_from_checkpoint=str(checkpoint))

    with pytest.raises(ValueError, match=r"ttt_steps was 3, and is 2; loss_type was 'forward_kl'"):
        resume(ttt_steps=2, loss_type="cross_entropy")
    with pytest.raises(ValueError, match="data was '24 rows, "):
        resume(data=rows[:20])
    other_texts = [{**row, "input_ids": row["input_ids"][::-1]} for row in rows]
    with pytest.raises(ValueError, match="data was '24 rows, "):
        resume(data=other_texts)
    other_target = copy.deepcopy(target)
    with torch.no_grad():
        other_target.lm_head.weight.mul_(1.1)
    with pytest.raises(ValueError, match="teacher was"):
        resume(other=other_target)
    with pytest.raises(ValueError, match="draft_vocabulary was"):
        resume(drafter=new_drafter(target, torch.arange(1, 41)))
    resume(loss_type="cross_entropy", ignore_recipe_mismatch=True)
    resume()


# ---- the rest ----


def test_the_average_is_evaluated_saved_and_resumed(target, rows, tmp_path):
    """By hand: an average over the weights after each update, which is what evaluation sees and what is left."""
    drafter = make_drafter(target)
    average = {name: p.detach().clone() for name, p in drafter.named_parameters()}
    changes = {"ema_decay": 0.7, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = Eagle3Trainer(
        model=drafter, target_model=target, args=make_args(tmp_path, **changes), train_dataset=rows
    )
    after = trainer.after_update

    def after_update():
        after()
        for name, p in drafter.named_parameters():
            average[name].mul_(0.7).add_(p.detach(), alpha=0.3)

    trainer.after_update = after_update
    trainer.train()
    for name, p in drafter.named_parameters():
        torch.testing.assert_close(p, average[name], msg=name)
    again = Eagle3Trainer(
        model=make_drafter(target), target_model=target, args=make_args(tmp_path, **changes), train_dataset=rows
    )
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name, p in again.model.named_parameters():
        torch.testing.assert_close(p, average[name], msg=name)
    raw = AutoModel.from_pretrained(tmp_path / "out" / "checkpoint-4")
    assert not torch.equal(raw.fc.weight, drafter.fc.weight)


@pytest.mark.parametrize("loss", slow_but(["lk_hybrid"], ["lk_hybrid", "expected_acceptance"]))
def test_losses_that_steer_themselves_resume_exactly(target, rows, tmp_path, loss):
    changes = {"loss_type": loss, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(target, rows, tmp_path, **changes)
    again = Eagle3Trainer(
        model=make_drafter(target), target_model=target, args=make_args(tmp_path, **changes), train_dataset=rows
    )
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    if loss == "lk_hybrid":
        assert (whole._mean_alpha > 0).all()


def test_recomputing_activations_changes_nothing(target, rows, tmp_path):
    results, calls = [], {}
    for recomputed in (False, True):
        drafter, calls[recomputed] = make_drafter(target), 0

        def count(*_, recomputed=recomputed):
            calls[recomputed] += 1

        drafter.layers[0].self_attn.o_proj.register_forward_hook(count)
        trainer = train(target, rows, tmp_path, drafter, **{RECOMPUTE: recomputed})
        results.append(weights_of(trainer.model))
    assert calls[True] == 2 * calls[False] > 0
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_logs_say_how_fast(target, rows, tmp_path):
    trainer = train(target, rows, tmp_path, logging_steps=1)
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["tokens_per_second"] > log["supervised_tokens_per_second"] > 0
    assert trainer.state.total_flos > 0


# ---- the forecast ----

LLAMA = DrafterShape(
    fc=3 * 4096 * 4096,
    qkv=8192 * (4096 + 2048),
    qkv_embeddings=4096 * (4096 + 2048),
    kv=8192 * 2048,
    rest=4096 * 4096 + 3 * 4096 * 14336,
    head=4096 * 32000,
    width=4096,
    heads_width=4096,
    kv_width=1024,
    mlp_width=14336,
    aux_width=3 * 4096,
    target_width=4096,
    vocab_size=128256,
)
GPT_OSS = DrafterShape(
    fc=3 * 2880 * 2880,
    qkv=5760 * (4096 + 1024),
    qkv_embeddings=2880 * (4096 + 1024),
    kv=5760 * 1024,
    rest=4096 * 2880 + 3 * 2880 * 17280,
    head=2880 * 32000,
    width=2880,
    heads_width=4096,
    kv_width=512,
    mlp_width=17280,
    aux_width=3 * 2880,
    target_width=2880,
    vocab_size=201088,
)


@pytest.mark.parametrize(
    ("shape", "k", "forward", "backward"),
    [
        (LLAMA, 3, 2.45, 4.69),
        (LLAMA, 4, 3.23, 6.22),
        (LLAMA, 7, 5.58, 10.82),
        (GPT_OSS, 3, 1.85, 3.61),
        (GPT_OSS, 4, 2.45, 4.79),
        (GPT_OSS, 7, 4.24, 8.35),
    ],
)
def test_arithmetic_of_a_drafter_is_as_counted_by_hand(shape, k, forward, backward):
    assert forward_flops(shape, 4096, k) / 1e9 == pytest.approx(forward, abs=0.006)
    assert backward_flops(shape, 4096, k) / 1e9 == pytest.approx(backward, abs=0.006)


@pytest.mark.parametrize(("share", "total"), [(1, 16.4), (0.5, 8.3), (0.25, 4.3), (0.08, 1.6)])
def test_slots_that_do_not_train_cost_little(share, total):
    assert drafter_flops(LLAMA, 4096, 7, share) / 1e9 == pytest.approx(total, abs=0.06)


def test_arithmetic_of_targets_is_as_counted_by_hand():
    llama = TargetShape(7.50e9, ((4096, None),) * 32)
    gpt_oss = TargetShape(5.13e9, ((4096, None), (4096, 128)) * 18)
    assert target_flops(llama, 4096) / 1e9 == pytest.approx(16.08, abs=0.02)
    assert target_flops(gpt_oss, 4096) / 1e9 == pytest.approx(10.90, abs=0.02)


RESULTS = ROOT / "benchmarks" / "results"
LLAMA_BYTES = 2 * (7_504_924_672 + 128256 * 4096)  # the target of the benchmark: without embeddings, and these
ONLINE = {
    "TTT 4, 1 x 4096": (4, 1, 4096, 1.0),
    "TTT 7, 2 x 2048": (7, 2, 2048, 1.0),
    "TTT 7, 2 x 2048, a quarter supervised": (7, 2, 2048, 0.25),
}
STORED = {
    f"Llama-3.1-8B: TTT 4, 1 x {length}, stored states": (4, 1, length, 1.0) for length in (4096, 8192, 16384, 32768)
}
MEASURED = [
    *(("training_8b_shape_squares_h200_202611", work) for work in ONLINE),
    *(("training_8b_shape_h100_202611", work) for work in ONLINE),
    *(("training_memory_h200_202611", work) for work in STORED),
]


@pytest.mark.parametrize(("name", "work"), MEASURED)
def test_forecasts_are_what_was_measured(name, work):
    """Speed of the 8B shape within a fifth, memory within 15 %."""
    report = json.loads((RESULTS / f"{name}.json").read_text())
    measured = next(row for row in report["results"] if row["work"] == work)
    steps, documents, length, share = {**ONLINE, **STORED}[work]
    is_stored = work in STORED
    forecast = make_forecast(
        LLAMA,
        None if is_stored else TargetShape(7_504_924_672, ((4096, None),) * 32),
        trained=LLAMA.parameters,
        target_bytes=0 if is_stored else LLAMA_BYTES,
        lengths=[length],
        rows_at_once=documents,
        num_rows=documents,
        share=share,
        ttt_steps=steps,
        recomputed=False,
        has_average=False,
        num_devices=1,
        device_name=report["gpu"],
    )
    assert forecast.memory == pytest.approx(measured["peak_gib"] * 2**30, rel=0.15)
    assert forecast.tokens_per_second == pytest.approx(measured["tokens_per_second"], rel=0.2)


def test_each_part_of_the_memory_is_counted():
    """By hand, in numbers of a slot, at a shape whose widths tell what they are of."""
    shape = DrafterShape(
        fc=0, qkv=0, qkv_embeddings=0, kv=0, rest=0, head=0, width=1, heads_width=10**2, kv_width=10**4,
        mlp_width=10**6, aux_width=10**8, target_width=10**10, vocab_size=5,
    )  # fmt: skip
    every = 2 * 10**8 + 10**10 + 2 + 2 * 10**4
    step = (2 + 100 + 20_000) + (100 + 10_000 + 100) + (2 + 3 * 10**6) + 2
    back = 3 * 10**6
    assert activation_bytes(shape, 1, 2, size=1) == every + 2 * step + (100 + 20_000) + back
    idle = 1 + 3 * 10**4
    assert activation_bytes(shape, 1, 2, 0.0, size=1) == every + idle
    kept = 2 + 3 * 10**6  # computed once more, for one step
    assert activation_bytes(shape, 1, 2, size=1, recomputed=True) == activation_bytes(shape, 1, 2, size=1) - kept
    assert borrowed_bytes(shape) == 2 * 2 * 5 * 10**10


def test_shapes_are_read_off_models(target, rows, tmp_path):
    drafter = make_drafter(target)
    shape = DrafterShape.of(drafter.config)
    matrices = sum(p.numel() for p in drafter.parameters() if p.dim() > 1)
    assert shape.parameters == matrices
    read = TargetShape.of(target)
    assert read.active == sum(p.numel() for p in target.parameters()) - target.model.embed_tokens.weight.numel()
    assert read.attending == ((32, None),) * 8
    trainer = train(target, rows, tmp_path, max_steps=2)
    forecast = trainer.forecast()
    assert forecast.trained == sum(p.numel() for p in drafter.parameters())
    assert forecast.tokens == round(16 * sum(len(r["input_ids"]) for r in rows) / 24)
    assert forecast.tokens_per_second is None
    assert " trained weights" in str(forecast)
    assert json.dumps(forecast.share)
    assert V == 48
