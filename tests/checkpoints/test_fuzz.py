"""Damage of every kind: what is left loads as it says, or is refused in our own error that names file and key.

Seeds are fixed. A few of each kind run by default, 700 damaged drafters and 300 files of data in the slow part.
"""

import gzip
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.chat import make_tokenizer
from helpers.layouts import ALSO, FUZZED, LAYOUTS, write
from helpers.stored import ROWS, batch_of, make_target
from helpers.texts import CONTROLS
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from hf_eagle3.bench.prompts import read_questions
from hf_eagle3.checkpoints.exporter import borrowing, sample_drafts
from hf_eagle3.checkpoints.flavours import FLAVOURS
from hf_eagle3.checkpoints.load import is_drafters
from hf_eagle3.modeling import CheckpointError, Eagle3DrafterConfig, Eagle3DrafterModel
from hf_eagle3.modeling.fields_eagle3 import Eagle3Fields
from hf_eagle3.training import StoredStates, StoredStatesError, TokenDataset, store_states
from hf_eagle3.training.data.files import DataError, read_rows
from hf_eagle3.training.data.prompts import read_prompts
from hf_eagle3.training.script import parse

pytestmark = pytest.mark.any_release

EXTREMES: tuple[Any, ...] = (
    *(0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, -(10**18), 0.5, -2.5, 1e-300, 1e300, float("nan"), float("inf")),
    *("", "1", "text", CONTROLS, "../../etc/passwd", "x" * 5000, "\ud800", True, False, None),
    *([], [[]], [1, 2], [1, 1, 2], ["a"], [None], {}, {"a": 1}, {"rope_type": "yarn"}, [{}], [[[[[[[[]]]]]]]]),
)


def outcome(call: Callable[[], Any], *kinds: type[Exception]) -> tuple[Any, Exception | None]:
    """What a call returns, or its error of one of `kinds`."""
    try:
        return call(), None
    except kinds as error:
        return None, error


def check_message(error: Exception, *wanted: str) -> None:
    """It is one line that can be shown as it is, and has one of `wanted` in it."""
    message = str(error)
    assert message.isprintable(), message
    assert len(message) < 3000, message
    assert any(re.search(part, message) for part in wanted), message


# ---- text ----


def cut(rng: random.Random, text: bytes) -> bytes:
    return text[: rng.randrange(len(text))]


def drop(rng: random.Random, text: bytes) -> bytes:
    i = rng.randrange(len(text))
    return text[:i] + text[i + rng.choice([1, 1, 2, 5]) :]


def insert(rng: random.Random, text: bytes) -> bytes:
    i = rng.randrange(len(text))
    return text[:i] + rng.choice(INSERTED) + text[i:]


def flip(rng: random.Random, text: bytes) -> bytes:
    i = rng.randrange(len(text))
    return text[:i] + bytes([text[i] ^ (1 << rng.randrange(8))]) + text[i + 1 :]


def repeat_line(rng: random.Random, text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    return b"".join([*lines[: i + 1], *lines[i:]])


INSERTED = (
    *(
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"{",
        b"]",
        b'"',
        b",",
        b":",
        b"\\ud800",
        b"\\u001b[2J",
        b"\xe2\x80\xae",
        b"\n",
    ),
    *(b"[" * 10_000, b'{"a":' * 10_000, b"9" * 5000, b"1e999", b"NaN", b"-", b"&a ", b"*a ", b"!!python/none "),
)
TEXT_DAMAGES = (cut, drop, insert, insert, flip, repeat_line)


def deepen(value: Any, depth: int) -> Any:
    """`value` in so many lists."""
    for _ in range(depth):
        value = [value]
    return value


def list_places(table: Any, path: tuple = ()) -> list[tuple]:
    """Every key and index in nested tables and lists, as a path."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    return [place for key, value in items for place in ((*path, key), *list_places(value, (*path, key)))]


def change_value(rng: random.Random, table: Any) -> str:
    """Remove, retype or stretch a value anywhere in `table`; the key."""
    path = rng.choice(list_places(table))
    owner = table
    for part in path[:-1]:
        owner = owner[part]
    kind = rng.choice(["remove", "value", "value", "value", "deep", "strange key"])
    if kind == "remove":
        del owner[path[-1]]
    elif kind == "deep":
        owner[path[-1]] = deepen(owner[path[-1]], rng.choice([1, 70, 3000]))
    elif kind == "strange key" and isinstance(owner, dict):
        path = ()
        owner[rng.choice([CONTROLS, "\ud800", "x" * 5000, "../x", "", "a_key_of_nobody"])] = rng.choice(EXTREMES)
    else:
        owner[path[-1]] = rng.choice(EXTREMES)
    return str(next((part for part in reversed(path) if isinstance(part, str)), ""))


def dump(table: Any) -> bytes:
    """JSON of whatever depth."""
    try:
        return json.dumps(table, indent=1).encode()
    except (RecursionError, ValueError):  # of a depth, or of a number, that Python will not write
        return b'{"deep": ' + b"[" * 3000 + b"]" * 3000 + b"}"


# ---- drafters ----

ODD_TENSORS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t[:-1].clone(),
    lambda t: torch.cat([t, t[:1]]),
    lambda t: t[None].clone(),
    lambda t: t.flatten()[0].clone(),
    lambda t: t[:0].clone(),
    lambda t: t.flip(0).repeat(2, *[1] * (t.dim() - 1)),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.float().to(torch.float8_e5m2),
    lambda t: t.to(torch.int8),
    lambda t: t.to(torch.float64),
    lambda t: t.to(torch.bool),
    lambda t: t.float().index_fill(0, torch.tensor([0]), float("nan")),
    lambda t: t.float().index_fill(0, torch.tensor([0]), float("inf")),
    lambda t: torch.full_like(t, 10**6 if t.dtype == torch.int64 else 1),
)
# Only in a pickle.
ODD_PICKLES: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.dim() > 1 else t.to("meta"),
    lambda t: torch.nested.nested_tensor([t.float(), t[:1].float()]),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t[:1].expand(10**9, *t.shape[1:]),
    lambda t: t.to(torch.complex64),
    lambda t: {"inner": t},
    lambda t: [t],
    lambda t: None,
    lambda t: 3,
    lambda t: "text",
)
STRANGE_NAMES = (
    "mystery",
    "layers.9.mlp.up_proj.weight",
    f"fc{CONTROLS}.weight",
    "fc.weight_scale",
    "\u202efc",
    "x" * 300,
)


class Damaged:
    """A drafter's folder, and what was done to it."""

    def __init__(self, folder: Path, what: str, config: Any, damaged_key: str | None):
        self.folder, self.what, self.config, self.key = folder, what, config, damaged_key


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """A drafter in our own layout."""
    folder = tmp_path_factory.mktemp("ours")
    published, weights, _ = LAYOUTS["specforge"]
    AutoModel.from_pretrained(write(folder / "theirs", published, weights)).save_pretrained(folder / "ours")
    return folder / "ours"


def damage_drafter(rng: random.Random, ours: Path, folder: Path) -> Damaged:
    """One damage to a drafter of any flavour, in files of any kind."""
    layout = rng.choice(FUZZED)
    if layout == "ours":
        config, weights = json.loads((ours / "config.json").read_text()), load_file(ours / "model.safetensors")
    else:
        published, tensors, _ = LAYOUTS[layout]
        config, weights = json.loads(json.dumps(published)), dict(tensors)
    files = rng.choice(["safetensors", "sharded", "bin"])
    kind = rng.choice(
        ["config", "config", "config", "text", "tensor", "tensor", "bytes", "index", "pickle", "name", "link"]
    )
    what, key, raw = f"{layout}, {files}, {kind}", None, None
    if kind == "config":
        key = change_value(rng, config)
        raw = dump(config)
    elif kind == "tensor":
        key = rng.choice(sorted(weights))
        weights[key] = rng.choice(ODD_TENSORS)(weights[key])
    elif kind == "pickle":
        key, files = rng.choice(sorted(weights)), "bin"
        weights[key] = rng.choice(ODD_PICKLES)(weights[key])
    elif kind == "name":
        key = rng.choice(sorted(weights))
        weights[rng.choice(STRANGE_NAMES)] = weights.pop(key) if rng.random() < 0.5 else weights[key].clone()
        key = None
    elif kind == "index":
        files = rng.choice(["sharded", "sharded_bin"])
    if kind == "pickle":
        write(folder, config, {})
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        write(folder, config if raw is None else {}, weights, files)
    if layout == "ours":
        shutil.copy(ours / "generation_config.json", folder)
    if raw is not None:
        (folder / "config.json").write_bytes(raw)
    if kind == "index":
        index = next(folder.glob("*.index.json"))
        table = json.loads(index.read_text())
        if rng.random() < 0.7:
            name = rng.choice(sorted(table["weight_map"]))
            strange = [
                "../x.safetensors",
                "/etc/passwd",
                "no.safetensors",
                "config.json",
                CONTROLS,
                5,
                None,
                ["a"],
                "",
                ".",
            ]
            table["weight_map"][name] = rng.choice(strange)
        else:
            change_value(rng, table)
        index.write_bytes(dump(table))
    elif kind in ("text", "bytes", "link"):
        named = [f for f in sorted(folder.iterdir()) if f.suffix == ".json"]
        if kind != "text":
            named = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin", ".json")]
        file = rng.choice(named)
        what += f" {file.name}"
        if kind == "link":
            outside = file.rename(folder.parent / f"outside-{file.name}")
            file.symlink_to(outside)
            key = "link" if is_drafters(config) else None
        else:
            content = file.read_bytes()
            file.write_bytes(rng.choice(TEXT_DAMAGES)(rng, content))
    try:
        left = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        left = None
    return Damaged(folder, what, left, key)


FIELDS = [field.name for field in fields(Eagle3Fields)]


def spellings(key: str) -> list[str]:
    """What an error may call a key, or a tensor: by its name, or by what it decides and contradicts then."""
    part = key.removesuffix(".weight").split(".")[-1]
    also = {**ALSO, "eagle_aux_hidden_state_layer_ids": "aux_layer_ids"}
    return [re.escape(part), *([also[part]] if part in also else [])]


def check_drafter(damaged: Damaged) -> None:
    """Load it: finite, running and with fields of its config, or refused in a line that names the folder and the key."""
    drafter, error = outcome(lambda: AutoModel.from_pretrained(damaged.folder), CheckpointError, OSError, ValueError)
    if isinstance(error, CheckpointError):
        check_message(error, re.escape(str(damaged.folder)))
        if damaged.key:
            check_message(error, *spellings(damaged.key), "not JSON that says one thing")
        return
    if error is not None:  # the host's, of what says by no key that it is a drafter
        assert damaged.config is None or not is_drafters(damaged.config), repr(error)
        return
    if type(drafter) is not Eagle3DrafterModel:
        assert not is_drafters(damaged.config), type(drafter)
        return
    assert all(p.isfinite().all() for p in drafter.parameters())
    assert damaged.key != "link", "followed a link"
    with borrowing(drafter):
        tokens = sample_drafts(drafter, num_positions=4, depth=2)
    assert ((tokens >= 0) & (tokens < drafter.config.vocab_size)).all()
    check_fields(damaged, drafter.config)


def check_fields(damaged: Damaged, config: Eagle3DrafterConfig) -> None:
    """No field has a value that config.json says otherwise."""
    tables = [damaged.config, *(damaged.config.get(t) for t in ("transformer_layer_config", "model", "eagle_config"))]
    for table in tables:
        for key in FIELDS if isinstance(table, dict) else ():
            said, read = table.get(key), getattr(config, key)
            if said is None or key in SETTLED or any(key in flavour.ignored for flavour in FLAVOURS):
                continue
            assert said == read or (isinstance(said, list) and said == list(read)), (key, said, read)


# What the tensors settle, another key, or a table of the target's.
SETTLED = frozenset(
    {
        *("num_hidden_layers", "attention_bias", "mlp_bias", "norm_before_fc", "aux_layer_ids", "rope_parameters"),
        *(
            "tie_word_embeddings",
            "mask_token_id",
            "head_dim",
            "draft_vocab_size",
            "intermediate_size",
            "target_model_type",
        ),
    }
)


def run_drafter(seed: int, ours: Path, tmp_path: Path) -> None:
    damaged = damage_drafter(random.Random(seed), ours, tmp_path / "drafter")
    print(damaged.what, damaged.key)  # noqa: T201  shown if it fails
    check_drafter(damaged)


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_drafter_is_right_or_refused(seed, ours, tmp_path):
    run_drafter(seed, ours, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24, 700))
def test_each_of_700_damaged_drafters_is_right_or_refused(seed, ours, tmp_path):
    run_drafter(seed, ours, tmp_path)


# ---- rows ----

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, wörld \U0001f600"},
    {"role": "assistant", "content": "Good morning.", "reasoning_content": None},
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
VALID_ROWS: tuple[dict[str, Any], ...] = (
    {"messages": MESSAGES, "source": "a"},
    {"messages": MESSAGES, "tools": json.dumps([TOOL]), "chat_template_kwargs": {"enable_thinking": False}},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    {"prompt": "Hi", "completion": "Hello."},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]},
    {"input_ids": [1, 2, 3, 4, 5], "loss_mask": [0, 0, 1, 1, 1]},
    {"turns": ["One?", "Two?"], "category": "b"},
)


def damage_rows(rng: random.Random, folder: Path) -> Path:
    """A file of rows with one damage."""
    rows = json.loads(json.dumps(rng.sample(VALID_ROWS, 3)))
    is_text = rng.random() < 0.4
    if not is_text:
        change_value(rng, rows[rng.randrange(3)])
    try:
        lines = "\n".join(json.dumps(row) for row in rows).encode()
    except (RecursionError, ValueError):
        lines = dump(rows)
    path = folder / rng.choice(["rows.jsonl", "rows.jsonl.gz"])
    if is_text and path.suffix != ".gz":
        lines = rng.choice(TEXT_DAMAGES)(rng, lines)
    if path.suffix == ".gz":
        lines = gzip.compress(lines)
        lines = rng.choice([cut, flip, drop])(rng, lines) if is_text else lines
    path.write_bytes(lines)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def check_rows(path: Path, tokenizer: Any) -> None:
    """Every reader of rows: what it makes of them is tokens and text, or it names file and line."""

    def tokenise() -> None:
        dataset = TokenDataset(read_rows(path), tokenizer, 64)
        for i in range(len(dataset)):
            assert dataset[i]["loss_mask"].any()

    def ask() -> None:
        for prompt in read_prompts(read_rows(path)):
            assert all(isinstance(text, str) for text in prompt.user_texts)
            assert prompt.fingerprint

    def question() -> None:
        for found in read_questions(path, limit=None):
            found.text.encode()
            found.category.encode()

    for read, kind in ((tokenise, DataError), (ask, DataError), (question, ValueError)):
        _, error = outcome(read, kind)
        if error is not None:
            assert type(error) in (DataError, ValueError)
            check_message(error, re.escape(path.name), "The training data is empty")


def run_rows(seed: int, tokenizer: Any, tmp_path: Path) -> None:
    check_rows(damage_rows(random.Random(seed), tmp_path), tokenizer)


@pytest.mark.parametrize("seed", range(10))
def test_damaged_rows_are_right_or_refused(seed, tokenizer, tmp_path):
    run_rows(seed, tokenizer, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 130))
def test_each_of_130_damaged_files_of_rows_is_right_or_refused(seed, tokenizer, tmp_path):
    run_rows(seed, tokenizer, tmp_path)


# ---- settings ----

SETTINGS = {
    "target_model_name_or_path": "some/target",
    "train_file": "rows.jsonl",
    "output_dir": "out",
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "bf16": False,
    "ttt_steps": 5,
    "loss_type": "forward_kl",
    "aux_layer_ids": [1, 2, 3],
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "seed": 3,
}


def damage_settings(rng: random.Random, folder: Path) -> tuple[Path, str | None]:
    """A YAML file with one damage, and the option if it is one option's."""
    settings, key = dict(SETTINGS), None
    path = folder / "recipe.yaml"
    if rng.random() < 0.6:
        key = rng.choice(sorted(settings))
        settings[key] = rng.choice([*EXTREMES, deepen(1, 70)])
        if rng.random() < 0.2:
            settings[rng.choice([CONTROLS, "learning_rat", "", 5, None, True])] = settings.pop(key)
            key = None
        text = yaml.safe_dump(settings, allow_unicode=True).encode(errors="surrogatepass")
    else:
        text = rng.choice(TEXT_DAMAGES)(rng, yaml.safe_dump(settings).encode())
    path.write_bytes(text)
    return path, key


def run_settings(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, key = damage_settings(random.Random(seed), tmp_path)
    print(path.read_bytes()[:3000])  # noqa: T201  shown if it fails
    _, error = outcome(lambda: parse(["--config", str(path), "--output_dir", str(tmp_path / "out")]), DataError)
    if error is not None:
        check_message(error, re.escape(path.name))
        check_message(error, key or "", "not YAML")


@pytest.mark.parametrize("seed", range(6))
def test_damaged_settings_are_right_or_refused(seed, tmp_path, monkeypatch):
    run_settings(seed, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 80))
def test_each_of_80_damaged_yaml_files_is_right_or_refused(seed, tmp_path, monkeypatch):
    run_settings(seed, tmp_path, monkeypatch)


# ---- stored states ----


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return store_states(make_target(), ROWS, tmp_path_factory.mktemp("states") / "stored", shard_size=6000)


def damage_states(rng: random.Random, folder: Path) -> str | None:
    """One damage to a folder of stored states, of which the manifest need know nothing; the key, if it is one."""
    kind = rng.choice(["manifest", "manifest", "manifest", "text", "bytes", "tensor", "tensor", "gone", "link"])
    manifest = folder / "manifest.json"
    if kind == "manifest":
        table = json.loads(manifest.read_text())
        key = change_value(rng, table)
        manifest.write_bytes(dump(table))
        return key
    if kind == "text":
        manifest.write_bytes(rng.choice(TEXT_DAMAGES)(rng, manifest.read_bytes()))
        return None
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    if kind == "gone":
        file.unlink()
    elif kind == "link":
        file.symlink_to(file.rename(folder.parent / file.name))
    else:
        if kind == "bytes":
            content = file.read_bytes()
            file.write_bytes(rng.choice([flip, cut, drop])(rng, content[:400]) + content[400:])
        else:
            tensors = load_file(file)
            name = rng.choice(sorted(tensors))
            damages = [*ODD_TENSORS, lambda t: t * -1, lambda t: t + 1, lambda t: t.flip(0)]
            spoilt = tensors[name]
            if tensors[name].dtype != torch.bool:
                spoilt = rng.choice(damages)(tensors[name])
            tensors[name] = spoilt.contiguous()
            if rng.random() < 0.2:
                del tensors[name]
            save_file(tensors, file)
        table = json.loads(manifest.read_text())
        table["files"][file.name]["bytes"] = file.stat().st_size
        manifest.write_text(json.dumps(table))
    return None


def run_states(seed: int, stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "states"))
    rng = random.Random(seed)
    key = damage_states(rng, folder)

    def read() -> None:
        states = StoredStates(folder, allow_incomplete=rng.random() < 0.5)
        for i in range(len(states.dataset)):
            found = states.states(batch_of(states.dataset, [i]))
            assert all(part.isfinite().all() for part in found)
        assert states.fingerprint
        assert states.head.weight is not None

    _, error = outcome(read, StoredStatesError)
    if error is not None:
        check_message(error, re.escape(str(folder)), "The training data is empty")
        check_message(error, key or "", "not JSON", "damaged")


@pytest.mark.parametrize("seed", range(8))
def test_damaged_states_are_right_or_refused(seed, stored, tmp_path):
    run_states(seed, stored, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 90))
def test_each_of_90_damaged_folders_of_states_is_right_or_refused(seed, stored, tmp_path):
    run_states(seed, stored, tmp_path)
