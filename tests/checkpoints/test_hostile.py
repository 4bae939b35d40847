"""Checkpoints and data of strangers: nothing runs, nothing leaks, nothing reaches a terminal raw, no error is a traceback."""

import ast
import gzip
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.chat import make_tokenizer
from helpers.layouts import as_speculators, bf16, make_config, make_weights, write
from helpers.models import drafter_config, make_drafter, make_target
from helpers.paths import ROOT
from helpers.stored import ROWS
from helpers.stored import make_target as make_states_target
from helpers.texts import CONTROLS
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as host_logging

from hf_eagle3 import cli
from hf_eagle3.bench.measure import Measured
from hf_eagle3.bench.report import to_markdown
from hf_eagle3.bench.ways import DRAFTED
from hf_eagle3.checkpoints.card import write_card
from hf_eagle3.checkpoints.engines import Target
from hf_eagle3.checkpoints.exporter import export, make_command
from hf_eagle3.console.quoting import (
    is_model_name,
    is_repository,
    quote_code,
    quote_markdown,
    quote_python,
    quote_shell,
)
from hf_eagle3.console.streaming import EscapingStreamer
from hf_eagle3.modeling import CheckpointError, Eagle3DrafterModel
from hf_eagle3.modeling.text_eagle3 import escape_controls, one_line, parse_json, show
from hf_eagle3.training import StoredStates, StoredStatesError, TokenDataset, store_states
from hf_eagle3.training.data.files import DataError, read_rows
from hf_eagle3.training.data.preview import format_row
from hf_eagle3.training.script import parse

pytestmark = pytest.mark.any_release

EVIL = (
    "a/b; touch x #",
    "a/b$(touch x)",
    "a/b`touch x`",
    "a/b\ntouch x",
    "--trust-remote-code",
    'a/b"); import os; os.system("touch x"); ("',
    "a/b](https://evil.example) <script>",
    "a/b\n---\nlicense: mit",
    f"a/b{CONTROLS}",
    "a/\ud800",
    "a/b/c",
    "b--c",
    "é/b",
)
PATHS = ("/models/my model; touch x", "./$(touch x)", "/a'b\"c")


# ---- what a user copies ----


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-8B", "a.b/c_d-e.f"])
def test_repository_names_are_the_hubs(name):
    assert is_repository(name)


@pytest.mark.parametrize("name", EVIL, ids=range(len(EVIL)))
def test_a_strangers_target_is_no_name(name, tmp_path, caplog):
    assert not is_model_name(name)
    config = as_speculators(speculators_config={"verifier": {"name_or_path": name}})
    with caplog.at_level(logging.WARNING, logger="hf_eagle3"):
        found = AutoConfig.from_pretrained(write(tmp_path, config, make_weights()))
    assert found.target_name_or_path is None
    assert "verifier.name_or_path" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize("name", [*EVIL, *PATHS], ids=range(len(EVIL + PATHS)))
@pytest.mark.parametrize("engine", ["sglang", "vllm", "speculators"])
def test_a_line_to_run_runs_what_it_says(name, engine, tmp_path):
    folder = tmp_path / "out; touch x $(touch y)"
    words = shlex.split(make_command(drafter_config(), folder, engine, Target(name=name), 3))
    options = {
        "sglang": {"--model-path": name, "--speculative-draft-model-path": str(folder)},
        "vllm": {"serve": name},
        "speculators": {"serve": str(folder)},
    }
    for option, value in options[engine].items():
        assert words[words.index(option) + 1].removeprefix("./") == value.removeprefix("./")
    if engine == "vllm":
        assert json.loads(words[-1])["model"] == str(folder)
    assert not {"touch", ";", "x", "#"} & set(words)


def test_a_name_that_a_stranger_wrote_into_our_own_layout_is_not_taken(tmp_path, caplog):
    drafter = make_drafter(make_target("qwen3"), aux_layer_ids=[1, 3, 5])
    drafter.config.target_name_or_path, drafter.config.target_model_type = "a/b; touch x #", "llama"
    drafter.bound_target_name = None
    with caplog.at_level(logging.WARNING, logger="hf_eagle3"):
        line = export(drafter, tmp_path / "out", to="vllm").command
    assert "serve TARGET" in line
    assert "target_name_or_path" in caplog.text


@pytest.mark.parametrize("name", [*EVIL, *PATHS, "-x"], ids=range(len(EVIL + PATHS) + 1))
def test_quotes_hold_in_each_language(name):
    assert shlex.split(f"run {quote_shell(name)}")[1].removeprefix("./") == name.removeprefix("./")
    assert not shlex.split(f"run {quote_shell(name)}")[1].startswith("-")
    assert ast.literal_eval(quote_python(name)) == name
    assert "\n" not in quote_python(name) + quote_markdown(name) + quote_code(name)
    assert not re.search(r"(?<!\\)[\[\]<>`|*_]", quote_markdown(name).replace("\\\\", ""))


@pytest.mark.parametrize("name", [*EVIL, *PATHS], ids=range(len(EVIL + PATHS)))
def test_a_card_is_a_card_whatever_the_names(name, tmp_path):
    drafter = make_drafter(make_target("qwen3"))
    metrics = {"Acceptance | length\n# x": 2.5}
    write_card(drafter, tmp_path, target=Target(name=name), metrics=metrics, name=f"me/{name}")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert card.data.license is None
    assert "https://huggingface.co/" not in card.text
    (code,) = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    given = [node.args[0].value for node in ast.walk(ast.parse(code)) if is_load(node)]
    assert given == [name, name, f"me/{name}"]
    assert [line for line in card.text.split("\n") if line.startswith("#")][1:] == [
        "## Use",
        "## The drafter",
        "## Measured",
    ]


def is_load(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"


@pytest.mark.parametrize("metrics", [[1], {"a": "b"}, {"a": [1]}, {"a": float("nan")}, {"a": True}, {1: 2.0}], ids=str)
def test_metrics_are_numbers(metrics, tmp_path):
    with pytest.raises(ValueError, match="metrics"):
        export(make_drafter(make_target("qwen3")), tmp_path / "out", to="hf", target="a/b", metrics=metrics)
    assert not (tmp_path / "out").exists()


def test_the_report_of_a_bench_is_a_table_whatever_the_categories():
    fields = dict.fromkeys(Measured.__dataclass_fields__, 1)
    fields |= {"kind": DRAFTED, "by_category": {f"a|b{CONTROLS}": {"acceptance_length": 2.0}}, "agreement": None}
    fields |= {"acceptance_rate_by_depth": [1.0], "seconds_in": {}, "graphs": ""}
    text = to_markdown([Measured(**fields)], title="x", notes=[])
    (line,) = [line for line in text.split("\n") if line.startswith(r"| a\|b")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert "\x1b" not in text


# ---- what a terminal shows ----


def test_control_characters_are_escaped_and_writing_is_not():
    assert escape_controls(CONTROLS) == r"\x1b[2J\u202e\x9b\x0d" + "\n"
    assert escape_controls("\ud800\u2066\u200e\ufeff\x00\x7f") == r"\ud800\u2066\u200e\ufeff\x00\x7f"
    for text in ("plain\ttext\n", "日本語\u3000です", "\u0646\u200c\u0647", "\U0001f468\u200d\U0001f469", "é\u00a0à"):
        assert escape_controls(text) == text
    assert one_line(f"a\n  b{CONTROLS}c") == r"a b\x1b[2J\u202e\x9b c"
    assert len(one_line("x" * 10**6)) < 2100
    assert show(10**5000).startswith("<a whole number")
    assert show("\x1b") == r"'\x1b'"


def test_errors_and_logs_name_strange_tensors_escaped(tmp_path):
    weights = {**make_weights(), f"fc{CONTROLS}": bf16(2)}
    with pytest.raises(CheckpointError, match=r"fc.x1b\[2J.u202e") as caught:
        AutoModel.from_pretrained(write(tmp_path, make_config(), weights))
    assert str(caught.value).isprintable()


def test_the_host_never_hears_of_strange_tensors(tmp_path, caplog, capsys):
    """Its own report of a load names tensors as they are."""
    write(tmp_path, make_config(), {**make_weights(), f"fc{CONTROLS}": bf16(2)})
    host_logging.set_verbosity_warning()
    try:
        with pytest.raises(CheckpointError):
            AutoModel.from_pretrained(tmp_path)
    finally:
        host_logging.set_verbosity_error()
    assert "\x1b[2J" not in "".join([caplog.text, *capsys.readouterr()])


def test_inspect_escapes_what_a_config_says(tmp_path, capsys):
    config = as_speculators(target_model_type=f"llama{CONTROLS}") | {"target_model_type": f"llama{CONTROLS}"}
    write(tmp_path, config, make_weights())
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert r"llama\x1b[2J\u202e" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("color", [False, True])
def test_preview_escapes_what_rows_say(color):
    tokenizer = make_tokenizer()
    rows = [{"messages": [{"role": "user", "content": CONTROLS}, {"role": "assistant", "content": f"yes{CONTROLS}"}]}]
    text = format_row(TokenDataset(rows, tokenizer)[0], tokenizer, color=color)
    assert text.count(r"\x1b[2J\u202e\x9b") == 2
    assert "\x1b" not in re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_preview_escapes_sources_and_errors(tmp_path, capsys):
    make_chat_target(tmp_path / "target")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"}], "source": CONTROLS}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    given = ["data", "preview", "--target", str(tmp_path / "target"), "--train-file", str(tmp_path / "rows.jsonl")]
    assert cli.main(given) == 0
    assert r"\x1b[2J\u202e" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": CONTROLS, "content": "a"}]}))
    assert cli.main(given) == 2
    assert "\x1b" not in (err := capsys.readouterr().err)
    assert "rows.jsonl, line 1: Row 0: Message 0 has the unknown role" in err


def test_answers_are_shown_escaped(capsys):
    EscapingStreamer(make_tokenizer()).on_finalized_text(f"hello{CONTROLS}", stream_end=True)
    assert capsys.readouterr().out == "hello\\x1b[2J\\u202e\\x9b\\x0d\n\n"


def test_logs_of_the_command_line_are_escaped(tmp_path, capsys):
    records = []
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    handler.emit = lambda record: records.append(handler.format(record))
    root.addHandler(handler)
    try:
        cli.main(["env"])
        logging.getLogger("someone").warning("said %s", CONTROLS)
    finally:
        root.removeHandler(handler)
    assert records[-1] == "said \\x1b[2J\\u202e\\x9b\\x0d\n"


# ---- files that lie elsewhere ----


def relink(folder: Path, name: str, outside: Path) -> None:
    """Move a file out of its folder, and leave a link."""
    outside.mkdir(exist_ok=True)
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)


@pytest.mark.parametrize("layout", ["theirs", "ours"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_link_out_of_the_folder_is_refused(layout, name, tmp_path):
    folder = write(tmp_path / "theirs", make_config(), make_weights())
    if layout == "ours":
        AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "ours")
        folder = tmp_path / "ours"
    elif not (folder / name).exists():
        (folder / name).write_text("{}")
    relink(folder, name, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{name}: a link to .*elsewhere.*outside"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["../elsewhere/model.safetensors", "{outside}/model.safetensors", "sub/../../x", "/dev/zero", 5]
)
def test_a_shard_out_of_the_folder_is_refused(name, tmp_path):
    folder = write(tmp_path / "drafter", make_config(), make_weights(), "sharded")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (folder / "model-00001-of-00002.safetensors").rename(outside / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name = name.format(outside=outside) if isinstance(name, str) else name
    table["weight_map"] = {key: name if "00001" in value else value for key, value in table["weight_map"].items()}
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"index.json.*weight_map"):
        AutoModel.from_pretrained(folder)


def test_the_cache_of_the_hub_is_made_of_links_that_are_right(tmp_path):
    repository = tmp_path / "hub" / "models--someone--drafter"
    snapshot = write(repository / "snapshots" / "0123abcd", make_config(), make_weights(), "sharded")
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / "blobs" / str(i))
        file.symlink_to(Path("..") / ".." / "blobs" / str(i))
    assert type(AutoModel.from_pretrained(snapshot)) is Eagle3DrafterModel
    blob = (snapshot / "config.json").resolve()
    blob.rename(tmp_path / "config.json")
    blob.symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="outside"):
        AutoModel.from_pretrained(snapshot)


def test_a_folder_may_itself_be_a_link(tmp_path):
    write(tmp_path / "real", make_config(), make_weights())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert type(AutoModel.from_pretrained(tmp_path / "link")) is Eagle3DrafterModel


def test_a_stock_model_may_lie_wherever_it_likes(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.draft_vocab_size = None  # an odd key, for which its weights are looked at
    LlamaForCausalLM(config).save_pretrained(tmp_path / "stock")
    for name in ("config.json", "model.safetensors"):
        relink(tmp_path / "stock", name, tmp_path / "elsewhere")
    assert AutoModel.from_pretrained(tmp_path / "stock").config.model_type == "llama"


# ---- read as what it is not ----


@pytest.mark.parametrize("layout", ["theirs", "ours"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_floats_of_8_bits_are_refused(dtype, layout, tmp_path):
    folder = write(tmp_path / "theirs", make_config(), make_weights())
    if layout == "ours":
        AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "ours")
        folder = tmp_path / "ours"
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("up_proj.weight"))
    save_file({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} has dtype {dtype}, expected a float of 16 bits"):
        AutoModel.from_pretrained(folder)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {**LLAMA3, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
LONG = {**LONG, "original_max_position_embeddings": 32}
NONSENSE: dict[str, tuple[dict, str]] = {
    "yarn factor": ({**YARN, "factor": -4.0}, "factor"),
    "yarn factor of nothing": ({**YARN, "factor": 0}, "factor"),
    "factor below 1": ({**YARN, "factor": 0.5}, "factor"),
    "factor true": ({**YARN, "factor": True}, "factor"),
    "linear factor": ({"rope_type": "linear", "factor": -2.0}, "factor"),
    "dynamic factor": ({"rope_type": "dynamic", "factor": -2.0}, "factor"),
    "infinite factor": ({**YARN, "factor": float("inf")}, "factor"),
    "huge factor": ({**YARN, "factor": 10**400}, "factor"),
    "text": ({**YARN, "factor": "4"}, "factor"),
    "original length": ({**YARN, "original_max_position_embeddings": -32}, "original_max_position_embeddings"),
    "attention factor": ({**YARN, "attention_factor": -1.0}, "attention_factor"),
    "betas": ({**YARN, "beta_fast": 1.0, "beta_slow": 32.0}, "beta_slow"),
    "beta": ({**YARN, "beta_fast": -1.0}, "beta_fast"),
    "mscale": ({**YARN, "mscale": -1.0, "mscale_all_dim": 1.0}, "mscale"),
    "bands": ({**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "low_freq_factor"),
    "band": ({**LLAMA3, "low_freq_factor": 0}, "low_freq_factor"),
    "theta": ({"rope_type": "default", "rope_theta": -10000.0}, "rope_theta"),
    "theta of nothing": ({"rope_type": "default", "rope_theta": 0}, "rope_theta"),
    "part": ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "rotary"),
    "kind": ({"rope_type": ["yarn"]}, "rope_type"),
    "two kinds": ({**YARN, "type": "linear"}, "type"),
    "few factors": ({**LONG, "long_factor": [2.0] * 3}, "long_factor"),
    "negative factors": ({**LONG, "short_factor": [-1.0] * 4}, "short_factor"),
}


@pytest.mark.parametrize("case", NONSENSE)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rotary_parameters_that_mean_nothing_are_refused(case, key, tmp_path):
    rope, name = NONSENSE[case]
    others = {"rope_parameters": ..., "rope_scaling": ...}
    theta = ... if "rope_theta" in rope else 5000.0
    write(tmp_path, make_config(**{**others, key: rope, "rope_theta": theta}), make_weights())
    with pytest.raises(CheckpointError, match=name) as caught:
        AutoModel.from_pretrained(tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("case", [case for case in NONSENSE if case not in ("two kinds", "part")])
def test_rotary_parameters_of_our_own_layout_too(case, tmp_path):
    rope, name = NONSENSE[case]
    folder = save_ours(tmp_path, rope_parameters={"rope_theta": 5000.0, **rope})
    with pytest.raises(CheckpointError, match=name):
        AutoModel.from_pretrained(folder)


def save_ours(tmp_path: Path, **keys: object) -> Path:
    """A drafter in our own layout, with other keys."""
    AutoModel.from_pretrained(write(tmp_path / "theirs", make_config(), make_weights())).save_pretrained(
        tmp_path / "ours"
    )
    file = tmp_path / "ours" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return tmp_path / "ours"


TWO_ROPES: dict[str, dict] = {
    "two thetas": make_config(
        rope_theta=5000.0, rope_scaling=..., rope_parameters={"rope_type": "default", "rope_theta": 7.0}
    ),
    "theta in rope_scaling": make_config(rope_theta=5000.0, rope_scaling={**YARN, "rope_theta": 700.0}),
    "two factors": make_config(rope_scaling=YARN, rope_parameters={**YARN, "factor": 8.0}),
    "two kinds": make_config(rope_scaling=YARN, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "theta in a table": as_speculators(rope_theta=700.0),
    "scaling in a table": as_speculators(rope_scaling=YARN)
    | {"transformer_layer_config": make_config(rope_scaling={**YARN, "factor": 8.0})},
}


@pytest.mark.parametrize("case", TWO_ROPES)
def test_two_values_for_one_thing_are_refused(case, tmp_path):
    write(tmp_path, TWO_ROPES[case], make_weights())
    with pytest.raises(CheckpointError, match=r"config.json.*rop"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("keys", [{"rope_theta": 7.0}, {"rope_scaling": YARN}], ids=str)
def test_two_values_in_our_own_layout_are_refused(keys, tmp_path):
    with pytest.raises(CheckpointError, match=next(iter(keys))):
        AutoModel.from_pretrained(save_ours(tmp_path, **keys))


@pytest.mark.parametrize("layout", ["theirs", "ours"])
@pytest.mark.parametrize("load", [AutoModel, AutoConfig, Eagle3DrafterModel], ids=lambda load: load.__name__)
def test_a_key_twice_is_refused(layout, load, tmp_path):
    folder = write(tmp_path / "theirs", make_config(), make_weights()) if layout == "theirs" else save_ours(tmp_path)
    if load is Eagle3DrafterModel and layout == "theirs":
        pytest.skip("the class alone reads its own layout")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps"', '"rms_norm_eps": 0.1, "rms_norm_eps"'))
    with pytest.raises(CheckpointError, match=r"config.json.*'rms_norm_eps' is there twice"):
        load.from_pretrained(folder)


def test_a_key_twice_in_a_stock_config_is_the_hosts_business(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"vocab_size"', '"vocab_size": 5, "vocab_size"'))
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 32


@pytest.mark.parametrize(
    "keys",
    [
        *({"hidden_size": 10**12}, {"intermediate_size": 10**12}, {"num_hidden_layers": 10**9}),
        *({"vocab_size": 10**12}, {"draft_vocab_size": 10**12}, {"num_aux_hidden_states": 10**9, "fc_norm": True}),
        *(
            {"max_position_embeddings": 10**30},
            {"head_dim": 10**8},
            {"vocab_size": 10**12, "draft_vocab_size": 10**12},
        ),
    ],
    ids=str,
)
def test_sizes_of_nobody_take_no_memory(keys, tmp_path):
    with pytest.raises(CheckpointError, match="|".join([*keys, "shape"])):
        AutoModel.from_pretrained(save_ours(tmp_path, **keys))


def test_a_vocabulary_of_nobody_takes_no_memory(tmp_path):
    """No tensor says how large it is where the head is the target's."""
    sizes = {"vocab_size": 10**12, "draft_vocab_size": None}
    weights = {n: t for n, t in make_weights().items() if n not in ("lm_head.weight", "d2t", "t2d")}
    with pytest.raises(CheckpointError, match="vocab_size must be at most"):
        AutoModel.from_pretrained(write(tmp_path, make_config(**sizes), weights))


# ---- no tracebacks: checkpoints ----

DEEP = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize("layout", ["theirs", "ours"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("{", '{"deep": ' + DEEP + ",", 1),
        lambda text: DEEP,
        lambda text: text.replace("{", '{"long": ' + "9" * 5000 + ",", 1),
        lambda text: text.replace("{", '{"nested": ' + "[" * 80 + "]" * 80 + ",", 1),
        lambda text: text[:-20],
        lambda text: "\ufeff" + text,
        lambda text: "",
    ],
    ids=["deep", "only deep", "digits", "nested", "cut", "bom", "empty"],
)
def test_a_config_that_is_no_json_is_named(spoil, layout, tmp_path):
    folder = write(tmp_path / "theirs", make_config(), make_weights()) if layout == "theirs" else save_ours(tmp_path)
    file = folder / "config.json"
    file.write_text(spoil(file.read_text()))
    for load in (AutoModel, AutoConfig):
        with pytest.raises(CheckpointError, match=r"config.json: not JSON"):
            load.from_pretrained(folder)
    assert cli.main(["inspect", str(folder)]) == 2


@pytest.mark.parametrize("text", ["[]", DEEP, '{"num_assistant_tokens": ' + "9" * 5000 + "}", "{", '{"a": 1, "a": 2}'])
def test_a_generation_config_that_is_none_is_named(text, tmp_path):
    folder = save_ours(tmp_path)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config.json"):
        AutoModel.from_pretrained(folder)


ODD = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.float().to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t.float(), t[:1].float()]),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "repeated": lambda t: t[:1].expand(10**9, -1),
    "complex": lambda t: t.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_in_a_pickle_are_named(kind, tmp_path):
    weights = make_weights()
    weights["midlayer.mlp.up_proj.weight"] = ODD[kind](weights["midlayer.mlp.up_proj.weight"])
    folder = write(tmp_path, make_config(), {})
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: midlayer.mlp.up_proj.weight"):
        AutoModel.from_pretrained(folder)


# ---- no tracebacks: data ----


def write_lines(path: Path, *lines: str) -> Path:
    text = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


GOOD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"}]})
BAD_LINES = {
    "surrogate": (
        json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}),
        r"messages\[0\].content has half",
    ),
    "deep": (DEEP, "nested too deeply"),
    "digits": ('{"input_ids": [' + "9" * 5000 + "]}", "thousands of digits"),
    "twice": ('{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
    "nested": ('{"a": ' + "[" * 80 + "]" * 80 + "}", "nested more than"),
    "list": ("[1]", "JSON object"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_row_is_named(case, tmp_path):
    line, reason = BAD_LINES[case]
    path = write_lines(tmp_path / "rows.jsonl", GOOD, line)
    with pytest.raises(DataError, match=rf"rows.jsonl, line 2: .*{reason}"):
        list(read_rows(path))


BAD_ROWS = {
    "table": ({"messages": [{"role": "user", "content": {"a": 1}}]}, "Message 0: content"),
    "number": ({"messages": [{"role": "user", "content": 5}]}, "Message 0: content"),
    "role": ({"messages": [{"role": ["user"], "content": "a"}]}, "Message 0 has the unknown role"),
    "from": ({"conversations": [{"from": {}, "value": "a"}]}, "Message 0 has the unknown role"),
    "calls": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"a": 1}]}]},
        "Message 1.*tool.call",
    ),
    "thoughts": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": [1]}]},
        "Message 1: thinking",
    ),
    "tools": ({"messages": json.loads(GOOD)["messages"], "tools": "{["}, "tools"),
    "tools of text": ({"messages": json.loads(GOOD)["messages"], "tools": ["a"]}, "tools"),
    "options": ({"messages": json.loads(GOOD)["messages"], "chat_template_kwargs": [1]}, "chat_template_kwargs"),
    "source": ({**json.loads(GOOD), "source": {"a": 1}}, "source"),
    "completion alone": ({"completion": "a"}, "it must have messages"),
    "ids": ({"input_ids": [1, 10**30, 2], "loss_mask": [0, 1, 1]}, "input_ids"),
    "mask": ({"input_ids": [1, 2, 3], "loss_mask": {"a": 1}}, "loss_mask"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_says_nothing_is_named(case, tmp_path):
    row, reason = BAD_ROWS[case]
    path = write_lines(tmp_path / "rows.jsonl", GOOD, json.dumps(row))
    with pytest.raises(DataError, match=rf"rows.jsonl, line 2: Row 1: {reason}"):
        TokenDataset(read_rows(path), make_tokenizer())


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_gz_cut_short_is_named(keep, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl.gz", *[GOOD] * 50)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DataError, match=r"rows.jsonl.gz is cut short"):
        list(read_rows(path))


YAMLS = {
    "tag": ("learning_rate: !!python/object:os.system {}", "could not determine a constructor"),
    "unknown tag": ("learning_rate: !mine 3", "could not determine a constructor"),
    "syntax": ("a: [1, 2", "not YAML"),
    "tab": ("a:\n\t- b", "not YAML"),
    "twice": ("seed: 1\nseed: 2", "'seed' is there twice"),
    "alias": ("a: &x [1]\nb: *x", "an alias"),
    "digits": ("seed: " + "9" * 5000, "not YAML"),
    "deep": ("seed: " + "[" * 100_000, "not YAML"),
    "long": ("# " + "x" * 10**6 + "\nseed: 1", "not YAML"),
    "text": ("just text", "must be lines of"),
    "list for a number": ("learning_rate: [1, 2]", "learning_rate cannot be"),
    "text for a number": ("learning_rate: fast", "learning_rate cannot be 'fast'"),
    "table for a number": ("seed: {a: 1}", "seed cannot be"),
    "number for an option": ("5: 1", "5 is no option"),
    "choice": ("loss_type: nobodys", "loss_type"),
    "schedule": ("lr_scheduler_type: nobodys", "lr_scheduler_type"),
    "bytes": ("seed: \udcff", "not YAML"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_settings_that_are_none_are_named(case, tmp_path):
    text, reason = YAMLS[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=rf"recipe.yaml.*{reason}"):
        parse(["--config", str(path), "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("name", ["lr_scheduler_kwargs", "target_model_init_kwargs", "chat_template_kwargs"])
@pytest.mark.parametrize("text", ["[", "{", "5", "[1]", '{"a": 1, "a": 2}'])
def test_options_that_are_tables_are_tables(name, text, tmp_path):
    with pytest.raises(DataError, match=rf"--{name} must be a table"):
        parse([f"--{name}", text, "--output_dir", str(tmp_path)])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({name: text}))
    with pytest.raises(DataError, match=rf"recipe.yaml: {name} (must be a table|cannot be)"):
        parse(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path)])


def test_recipes_that_come_with_the_examples_are_read():
    for path in sorted((ROOT / "examples" / "configs").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        if "learning_rate" in settings:
            *_, args = parse(["--config", str(path), "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"])
            assert args.learning_rate == float(settings["learning_rate"])


MANIFESTS = {
    "no files": (lambda m: m.pop("files"), "files is missing"),
    "files a list": (lambda m: m.update(files=[]), "files is"),
    "no target": (lambda m: m.pop("target"), "target is missing"),
    "no config": (lambda m: m["target"].pop("config"), "target.config is missing"),
    "strange model": (lambda m: m["target"]["config"].update(hidden_size="x"), "target.config"),
    "dtype": (lambda m: m.update(dtype="system"), "dtype is 'system'"),
    "shards": (lambda m: m.update(num_shards=10**12), "num_shards"),
    "outside": (lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "a"}}), "files has"),
    "bytes": (lambda m: next(iter(m["files"].values())).update(bytes="many"), r"files.*bytes must be"),
    "layers": (lambda m: m.update(aux_layer_ids=["a"]), "aux_layer_ids"),
    "deep layers": (
        lambda m: m["target"]["config"].update(num_hidden_layers=10**9),
        "target.config.num_hidden_layers",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_none_is_named(case, stored, tmp_path):
    folder = Path(shutil.copytree(stored, tmp_path / "states"))
    spoil, reason = MANIFESTS[case]
    table = json.loads((folder / "manifest.json").read_text())
    spoil(table)
    (folder / "manifest.json").write_text(json.dumps(table))
    with pytest.raises(StoredStatesError, match=rf"manifest.json is damaged: {reason}"):
        StoredStates(folder)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return store_states(make_states_target(), ROWS, tmp_path_factory.mktemp("states") / "stored", shard_size=6000)


# ---- no tracebacks: commands ----


def make_chat_target(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A target, a drafter, rows, and what is none of them."""
    folder = tmp_path_factory.mktemp("places")
    make_chat_target(folder / "target")
    write(folder / "drafter", make_config(), make_weights())
    (folder / "empty").mkdir()
    write_lines(folder / "rows.jsonl", GOOD)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("[1]")
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").write_text(DEEP)
    return {path.name: path for path in folder.iterdir()} | {"nowhere": folder / "no" / "where"}


COMMANDS = {
    "doctor": ["doctor", "--target", "{target}", "--drafter", "{drafter}"],
    "export": ["export", "{drafter}", "{out}", "--to", "vllm", "--target", "{target}"],
    "bench": ["bench", "--target", "{target}", "--drafter", "{drafter}", "--device", "cpu", "--out", "{out}"],
    "preview": ["data", "preview", "--target", "{target}", "--train-file", "{rows}"],
    "regenerate": ["regenerate", "--target", "{target}", "--drafter", "{drafter}", "--prompt-file", "{rows}"],
    "states": ["states", "--target_model_name_or_path", "{target}", "--train_file", "{rows}", "--output_dir", "{out}"],
    "train": ["train", "--target_model_name_or_path", "{target}", "--train_file", "{rows}", "--output_dir", "{out}"],
    "demo": ["demo", "--drafter", "{drafter}"],
    "inspect": ["inspect", "{drafter}"],
}
COMMANDS["regenerate"] += ["--output-file", "{out}.jsonl"]
COMMANDS["train"] += ["--drafter_name_or_path", "{drafter}"]


def run_command(command: str, places: dict[str, Path], out: Path, *more: str, **others: str) -> int:
    named = {"target": "target", "drafter": "drafter", "rows": "rows.jsonl", **others}
    values = {what: places[name] for what, name in named.items()} | {"out": out}
    return cli.main([word.format(**values) for word in COMMANDS[command]] + list(more))


PLACED = [
    (command, what) for command, words in COMMANDS.items() for what in ("target", "drafter") if f"{{{what}}}" in words
]


@pytest.mark.parametrize(("command", "what"), PLACED)
@pytest.mark.parametrize("place", ["nowhere", "empty", "broken", "deep", "rows.jsonl"])
def test_a_folder_that_is_none_is_named(command, what, place, places, tmp_path, capsys):
    is_enough = (command, what) == ("export", "target") and place in ("broken", "deep")
    assert run_command(command, places, tmp_path / "out", **{what: place}) == (0 if is_enough else 2)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if is_enough:  # vLLM's layout needs no more of the target than its name
        return
    assert str(places[place]) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "what"), PLACED)
def test_target_and_drafter_swapped_are_told(command, what, places, tmp_path, capsys):
    other = {"target": "drafter", "drafter": "target"}[what]
    assert run_command(command, places, tmp_path / "out", **{what: other}) == 2
    err = capsys.readouterr().err
    assert re.search("EAGLE-3 drafter", err), err
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("command", ["doctor", "bench", "regenerate", "states", "demo"])
def test_a_device_that_is_not_there_is_named(command, places, tmp_path, capsys):
    assert run_command(command, places, tmp_path / "out", "--device", "cuda") == 2
    assert "--device cuda is not there" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["preview", "regenerate", "states"])
@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_rows_that_are_none_are_named(command, place, places, tmp_path, capsys):
    assert run_command(command, places, tmp_path / "out", rows=place) == 2
    err = capsys.readouterr().err
    assert re.search(rf"-file {places[place]}: (there is no such file|a folder)|_file {places[place]}", err), err


@pytest.mark.parametrize("text", ["[1]", "{", DEEP, '{"a": "b"}', '{"a": 1, "a": 2}'])
def test_metrics_that_are_none_are_named(text, places, tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(text)
    assert run_command("export", places, tmp_path / "out", "--metrics", str(tmp_path / "metrics.json")) == 2
    assert f"--metrics {tmp_path / 'metrics.json'}: " in capsys.readouterr().err


def test_a_repository_of_nobody_is_refused(places, tmp_path, capsys):
    assert run_command("export", places, tmp_path / "out", "--repo-id", "a/b; touch x") == 2
    assert "--repo-id" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("module", [True, False])
def test_ctrl_c_during_the_import_is_quiet(module, tmp_path):
    """As soon as the package is being imported, which its first submodule says."""
    probe = tmp_path / "sitecustomize.py"
    probe.write_text(
        "import sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            sys.stdout.write('importing'); sys.stdout.flush()\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    script = tmp_path / "hf-eagle3"
    script.write_text("import sys\nfrom hf_eagle3.cli import main\nsys.exit(main())\n")
    root = str(ROOT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    start = ["-m", "hf_eagle3.cli"] if module else [str(script)]
    process = subprocess.Popen(
        [sys.executable, *start, "env"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(9) == "importing"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err


def test_json_says_one_thing():
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert parse_json("[" * 60 + "]" * 60)
    for text in ("[" * 70 + "]" * 70, '{"a": 1, "a": 1}', DEEP, "9" * 5000, "", "{"):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            parse_json(text)
