"""`hf-eagle3 train` and `examples/finetune.py`: options from a file and from the command line."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import yaml
from helpers.paths import ROOT
from helpers.training import TINY, make_tokenizer
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from hf_eagle3 import cli
from hf_eagle3.cli.train import find_options
from hf_eagle3.console.interrupts import INTERRUPTED
from hf_eagle3.data_parallel import launch
from hf_eagle3.training.script import lora, main, make_parser, parse, target_options

pytestmark = pytest.mark.any_release

CONFIGS = ROOT / "examples" / "configs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny target with a tokenizer, and rows to train on."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("target")
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    rows = [
        {"input_ids": [*range(2, 8), *range(9 + i % 5, 21 + i % 5)], "loss_mask": [0] * 6 + [1] * 12}
        for i in range(12)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def recipe(folder, tmp_path):
    """A file of options, and the drafter's folder that it names."""
    settings = {
        "target_model_name_or_path": str(folder),
        "train_file": str(folder / "rows.jsonl"),
        "eval_file": str(folder / "rows.jsonl"),
        "output_dir": str(tmp_path / "drafter"),
        "draft_vocab_size": 32,
        "ttt_steps": 2,
        "max_steps": 2,
        "learning_rate": "1e-3",  # as YAML reads what has no point
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "eval_generate_prompts": 2,
        "eval_max_new_tokens": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "target_model_init_kwargs": {"dtype": "float32"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_command_trains_by_a_recipe_and_what_is_typed_counts_more(recipe, tmp_path, capsys):
    assert cli.main(["train", "--config", str(recipe), "--ttt_steps", "3", "--aux_layer_ids", "1", "3", "5"]) == 0
    said = capsys.readouterr()
    assert "acceptance length at depth 3: " in said.out
    assert " trained weights" in said.err
    stored = json.loads((tmp_path / "drafter" / "hf_eagle3_recipe.json").read_text())
    assert stored["ttt_steps"] == 3
    assert stored["aux_layer_ids"] == [1, 3, 5]
    assert AutoModel.from_pretrained(tmp_path / "drafter").config.draft_vocab_size == 32
    assert parse(["--config", str(recipe)])[2].learning_rate == 1e-3


def test_the_command_trains_a_drafter_of_blocks(recipe, tmp_path, capsys):
    """The drafter's shape by options; evaluation at the depth of a whole block."""
    options = ["--drafter_version", "dspark", "--block_size", "5", "--markov_rank", "4", "--num_hidden_layers", "1"]
    assert cli.main(["train", "--config", str(recipe), *options, "--loss_type", "ce_tv", "--num_anchors", "9"]) == 0
    assert "acceptance length at depth 5: " in capsys.readouterr().out
    drafter = AutoModel.from_pretrained(tmp_path / "drafter")
    assert (drafter.config.block_size, drafter.config.markov_rank, drafter.config.draft_vocab_size) == (5, 4, 32)
    assert drafter.config.has_confidence_head
    stored = json.loads((tmp_path / "drafter" / "hf_eagle3_recipe.json").read_text())
    assert (stored["ttt_steps"], stored["block_size"], stored["loss_type"]) == (5, 5, "ce_tv")


@pytest.mark.slow
def test_processes_share_a_target_by_a_recipe(recipe, tmp_path, monkeypatch, capfd):
    """From one drafter, two processes with half the rows each come to where one comes."""
    main(["--config", str(recipe)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    more = ["--config", str(recipe), "--drafter_name_or_path", str(tmp_path / "drafter"), "--adam_epsilon", "1e-2"]
    trainer = main([*more, "--output_dir", str(tmp_path / "one")])
    two = ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2", "--ddp_backend", "gloo"]
    assert launch(2, ["train", *more, *two, "--target_tp"]) == 0, capfd.readouterr().err
    assert trainer.evaluate()["eval_loss"] == pytest.approx(read_loss(tmp_path / "two"), rel=1e-5)
    before = AutoModel.from_pretrained(tmp_path / "drafter").state_dict()
    ours, theirs = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one"))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=1e-4, msg=name)
    assert any(not torch.equal(weight, before[name]) for name, weight in ours.items())


def read_loss(folder):
    return json.loads((folder / "eval_results.json").read_text())["eval_loss"]


def test_adapters_are_trained_from_the_command_line(recipe, tmp_path):
    pytest.importorskip("peft")
    main(["--config", str(recipe)])
    base = str(tmp_path / "drafter")
    more = ["--model_name_or_path", base, "--use_peft", "--lora_r", "4", "--output_dir", str(tmp_path / "adapter")]
    trainer = main([f"--config={recipe}", *more])
    assert trainer.model.peft_config["default"].r == 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tt_steps", "3"], r"--tt_steps is no option \(did you mean ttt_steps"),
        (["--config"], "--config needs a value"),
        (["--load_in_4bit", "--load_in_8bit"], "two ways to load one target"),
    ],
)
def test_what_cannot_be_meant_is_refused(recipe, more, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(recipe), *more] if more != ["--config"] else more)


def test_stored_states_train_from_the_command_line(folder, recipe, tmp_path, capsys):
    """Written by one command, read by the other; without a target, with it, and with another."""
    stored = ["states", "--target_model_name_or_path", str(folder), "--train_file", str(folder / "rows.jsonl")]
    options = ["--output_dir", str(tmp_path / "states"), "--device", "cpu", "--target_dtype", "float32"]
    assert cli.main([*stored, *options]) == 0
    settings = yaml.safe_load(recipe.read_text())
    del settings["train_file"], settings["eval_file"], settings["target_model_name_or_path"]
    settings |= {"states_dir": str(tmp_path / "states"), "states_eval_rows": 3, "target_model_init_kwargs": None}
    recipe.write_text(yaml.safe_dump(settings))
    assert cli.main(["train", "--config", str(recipe)]) == 0
    assert "acceptance length at depth 3: " in capsys.readouterr().out
    with_target = ["--target_model_init_kwargs", '{"dtype": "float32"}', "--target_model_name_or_path"]
    assert cli.main(["train", "--config", str(recipe), *with_target, str(folder)]) == 0
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert cli.main(["train", "--config", str(recipe), *with_target, str(tmp_path / "other")]) == 2
    assert "Give the target that the states were made by" in capsys.readouterr().err
    assert cli.main(["train", "--config", str(recipe), "--train_file", str(folder / "rows.jsonl")]) == 2
    assert "the rows are those that were stored" in capsys.readouterr().err
    assert cli.main(["train", "--config", str(recipe), "--states_eval_rows", "99"]) == 2
    assert "states_eval_rows must lie in 0..11" in capsys.readouterr().err


@contextmanager
def ctrl_c_at(forward: int) -> Iterator[None]:
    """Ctrl-C in so many forwards of any Llama from now."""
    count = itertools.count(1)

    def press(module, _inputs):
        if isinstance(module, LlamaModel) and next(count) == forward:
            raise KeyboardInterrupt

    hook = register_module_forward_pre_hook(press)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("save_steps", "says", "resume"),
    [
        (1, "Interrupted. Checkpoints stay in ", ["--resume_from_checkpoint", "true"]),
        (3, "Interrupted. No checkpoint was written yet, so training begins anew", []),
    ],
)
def test_interrupted_training_says_how_to_go_on(save_steps, says, resume, recipe, capsys):
    command = ["train", "--config", str(recipe), "--save_strategy", "steps", "--save_steps", str(save_steps)]
    with ctrl_c_at(6):
        assert cli.main([*command, "--max_steps", "4"]) == INTERRUPTED
    assert says in capsys.readouterr().err
    assert cli.main([*command, "--max_steps", "4", *resume]) == 0


def test_an_interrupted_run_of_states_says_how_to_go_on(folder, tmp_path, capsys):
    command = ["states", "--target", str(folder), "--train-file", str(folder / "rows.jsonl"), "--device", "cpu"]
    command += ["--output-dir", str(tmp_path / "states"), "--shard-size", "1", "--batch-tokens", "20"]
    with ctrl_c_at(4):
        assert cli.main(command) == INTERRUPTED
    err = capsys.readouterr().err
    assert f"Interrupted. Whole files stay in {tmp_path / 'states'}: run the same command again to go on." in err
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").glob("states-*")}
    assert cli.main(command) == 0
    assert there.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "states").glob("states-*")}.items()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--drafter_name_or_path", "TARGET"], "no EAGLE-3 drafter"),
        (["--target_model_name_or_path", "DRAFTER"], "is an EAGLE-3 drafter. Give the model that it is to draft for"),
        (["--train_file", "nothing.jsonl"], "--train-file nothing.jsonl: there is no such file"),
        (["--learning_rate", "1e30", "--max_steps", "9"], "NaN|infinite|not finite"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(recipe, folder, tmp_path, capsys, more, says):
    if "DRAFTER" in more:
        main(["--config", str(recipe)])
    places = {"TARGET": str(folder), "DRAFTER": str(tmp_path / "drafter")}
    more = [places.get(x, x) for x in more]
    capsys.readouterr()
    assert cli.main(["train", "--config", str(recipe), *more]) == 2
    said = capsys.readouterr().err
    assert re.search(says, said)
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_runs_with_one_seed_are_one(recipe, tmp_path):
    """Also a new drafter's first weights, in processes of their own."""
    found = []
    for name in ("one", "two"):
        command = [sys.executable, str(CONFIGS.parent / "finetune.py"), "--config", str(recipe)]
        subprocess.run([*command, "--output_dir", str(tmp_path / name)], check=True, capture_output=True)
        found.append(AutoModel.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_options_of_a_file_are_checked(recipe):
    recipe.write_text(recipe.read_text() + "learning_rat: 1\nxyzzy: 2\n")
    with pytest.raises(
        ValueError, match=r"learning_rat is no option \(did you mean learning_rate.*; .*xyzzy is no option"
    ):
        parse(["--config", str(recipe)])
    recipe.write_text("- ttt_steps\n")
    with pytest.raises(ValueError, match="lines of `option: value`, got list"):
        parse(["--config", str(recipe)])


def test_what_is_missing_is_named(recipe, folder, capsys):
    given = ["--output_dir", "out", "--use_cpu"]
    assert cli.main(["train", *given]) == 2
    assert "Give --target, or --states_dir" in capsys.readouterr().err
    assert cli.main(["train", *given, "--target_model_name_or_path", str(folder)]) == 2
    assert "Give --train_file, --dataset_name or --states_dir" in capsys.readouterr().err
    both = ["--config", str(recipe), "--drafter_name_or_path", "a", "--model_name_or_path", "b"]
    with pytest.raises(ValueError, match="--drafter_name_or_path and --model_name_or_path are one option"):
        main(both)
    recipe.write_text("target: a\ntarget_model_name_or_path: b\n")
    with pytest.raises(ValueError, match="target and target_model_name_or_path are one option"):
        main(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("typed", "field", "value"),
    [
        ("--target a", "target", "a"),
        ("--model=a", "target", "a"),
        ("--target-model-name-or-path a", "target", "a"),
        ("--drafter b", "drafter", "b"),
        ("--drafter_name_or_path=b", "drafter", "b"),
        ("--model_name_or_path b", "drafter", "b"),  # as TRL calls what is trained
        ("--assistant-model b", "drafter", "b"),
    ],
)
def test_models_are_taken_in_every_spelling(typed, field, value, tmp_path):
    script, _, _ = parse(["--output_dir", str(tmp_path), "--use_cpu", *typed.split()])
    assert getattr(script, field) == value
    name, _, _ = typed[2:].replace("=", " ").partition(" ")
    (tmp_path / "recipe.yaml").write_text(f"{name}: {value}\nuse_cpu: true\noutput_dir: {tmp_path}\n")
    script, model, _ = parse(["--config", str(tmp_path / "recipe.yaml"), "--dtype", "bfloat16"])
    assert (getattr(script, field), model.target_dtype) == (value, "bfloat16")


def test_the_target_is_loaded_as_asked(recipe):
    _, model, args = parse(["--config", str(recipe), "--load_in_4bit", "--attn_implementation", "eager"])
    options = target_options(model, args)
    assert options["quantization_config"].load_in_4bit
    assert options["attn_implementation"] == "eager"
    assert options["dtype"] == "float32"  # of target_model_init_kwargs
    assert lora(model) is None
    _, model, args = parse(["--config", str(recipe), "--target_tp", "True"])
    assert target_options(model, args)["tp_plan"] == "auto"


@pytest.mark.parametrize("name", ["gpt_oss_120b", "smollm2", "smollm2_dspark"])
def test_shipped_recipes_hold(name, tmp_path):
    script, _, args = parse(["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(tmp_path), "--use_cpu"])
    assert script.target
    if name == "gpt_oss_120b":
        assert (args.learning_rate, args.warmup_steps, args.lr_scheduler_type) == (1e-4, 0.2, "cosine")
        assert (args.num_train_epochs, args.per_device_train_batch_size, args.max_length, args.ttt_steps) == (
            2,
            2,
            4096,
            4,
        )


def test_shipped_launch_files_are_those_that_the_trainer_takes():
    from accelerate.commands.config.config_args import ClusterConfig

    for name in ("ddp", "fsdp2"):
        config = ClusterConfig.from_yaml_file(str(CONFIGS / f"{name}.yaml"))
        assert config.num_processes == 8
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


def test_options_read_from_the_sources_are_those_of_the_parser():
    """So that a mistyped one is named before anything heavy is imported, and none else is refused."""
    wanted = {f"--{action.dest}" for action in make_parser()._actions} - {"--help", "--config"}
    found = set(find_options())
    assert wanted <= found
    assert all(name.startswith("--_") for name in found - wanted)


def test_help_lists_what_there_is_to_set(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    ours = (
        "--target",
        "--drafter",
        "--train_file",
        "--output_dir",
        "--use_peft",
        "--ttt_steps",
        "--learning_rate",
        "--config",
    )
    hosts = ("options of the host's TrainingArguments", "--per_device_train_batch_size", "--save_steps", "--bf16")
    places = [
        [said.index(f"\n  {name}" if name.startswith("--") else name) for name in names] for names in (ours, hosts)
    ]
    assert max(places[0]) < min(places[1])
    assert said.startswith("usage: hf-eagle3 train --target TARGET --train_file JSONL --output_dir DIR [OPTIONS]\n\n")
