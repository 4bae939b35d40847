"""What `benchmarks/` imports from us is there; `bench_alternatives.py` runs on toy sizes, each way for itself."""

import ast
import gc
import importlib
import json
import subprocess
import sys
import time

import pytest
import torch
from helpers.models import make_target
from helpers.paths import ROOT

pytestmark = pytest.mark.any_release

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: path.stem)
def test_what_is_imported_is_there(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ours = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith("hf_eagle3")]
    for node in ours:
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):  # then a module of its own
                importlib.import_module(f"{node.module}.{alias.name}")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_alternatives

    yield bench_alternatives
    gc.enable()


@pytest.fixture
def run(script, monkeypatch, tmp_path, capsys):
    """Runs the script on toy sizes; what it printed and its data."""

    def main(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["bench_alternatives.py", "--tiny", "--out", str(tmp_path), *arguments])
        assert script.main() == 0
        text = (tmp_path / "alternatives.md").read_text()
        assert capsys.readouterr().out == text
        return text, json.loads((tmp_path / "alternatives.json").read_text())

    return main


def rows_of(data: dict, title: str) -> dict[tuple[str, str], dict]:
    (rows,) = (rows for name, rows in data.items() if title in name)
    return {(row["B"], row["way"]): row for row in rows}


def test_every_way_has_a_row(script, run):
    text, data = run()
    attention, fusion = rows_of(data, "query heads"), rows_of(data, "decoder layers")
    assert {way for _, way in attention} >= set(script.ATTENTIONS)
    assert {way for _, way in fusion} == set(script.FUSIONS)
    for B in "13":
        took = attention[B, "sdpa with a mask"]["us"]
        assert 0 < took["fastest"] <= took["median"] <= took["slowest"]
    assert float(fusion["2", "stock"]["difference"]) == 0
    assert "| 2 | stock | " in text
    if not script.ON_GPU:
        assert attention["1", "flash-attn 2, with KV cache"]["runs as"] == "needs a GPU"
        assert attention["3", "FlexAttention, eager"]["us"]["median"] > 0
        assert fusion["2", "torch.compile, layer by layer"]["runs as"] == "needs a GPU"


@pytest.mark.slow
def test_ways_that_fail_say_so_and_the_others_go_on(script, run, monkeypatch):
    def make_broken(start, T, L, scaling):
        raise RuntimeError("of some | kernel\nor other")

    def make_wrong(start, T, L, scaling):
        right = script.make_sdpa(start, T, L, scaling)
        return lambda q, k, v: 1.01 * right(q, k, v)

    def make_slow(start, T, L, scaling):
        return lambda q, k, v: time.sleep(60)

    def make_blind(start, T, L, scaling):
        """Sees a slot too many."""
        return script.make_sdpa(start + 1, T, L, scaling)

    monkeypatch.setattr(script, "LONGEST", 1.0)
    ways = {"broken": make_broken, "wrong": make_wrong, "slow": make_slow, "blind": make_blind}
    monkeypatch.setattr(script, "ATTENTIONS", {**ways, "right": script.make_sdpa})
    _, data = run("--only", "attention")
    rows = rows_of(data, "query heads")
    assert rows["3", "broken"]["runs as"] == "RuntimeError: of some / kernel or other"
    assert rows["3", "wrong"]["runs as"].startswith("ValueError: error 1.0e-02, allowed ")
    assert rows["3", "blind"]["runs as"].startswith("ValueError: error ")
    assert rows["3", "slow"]["runs as"] == "TimeoutError: stopped after 1 s"
    assert rows["3", "right"]["us"]["median"] > 0


def test_ways_that_compile_stop_when_the_time_is_up(script):
    ways = {"FlexAttention, compiled": "a", "ours": "b"}
    ready, failed = script.prepare_all(ways, lambda way: script.Ready(lambda: way, "direct", 0.0), until=0.0)
    assert list(ready) == ["ours"]
    assert failed == {"FlexAttention, compiled": "TimeoutError: no time left: raise --seconds"}


def test_layers_attend_by_row_lengths(script, monkeypatch):
    model, seen = script.make_layers(is_tiny=True), []
    cache = script.StaticRows(2, 16)
    like = torch.zeros(1, 2, 1, 16, dtype=script.DTYPE, device=script.DEVICE)
    for layer in cache.layers:
        layer.lazy_initialization(like, like)
    monkeypatch.setattr(script.Rows, "start", torch.zeros(1, dtype=torch.long, device=script.DEVICE))
    monkeypatch.setattr(script.Rows, "write", staticmethod(script.write_rows_eager))

    def attend(query, keys, *args, **kwargs):
        seen.append(keys.shape[1])
        return script.attend_rows_eager(query, keys, *args, **kwargs)

    monkeypatch.setattr(script.Rows, "attend", staticmethod(attend))
    states = torch.randn(1, 4, 64).to(script.DEVICE, script.DTYPE)
    slots = torch.arange(4, device=script.DEVICE)[None]
    with torch.no_grad():
        model(inputs_embeds=states, position_ids=slots, use_cache=True, **{script.CACHE_NAME: cache})
    assert seen == [16, 16]


def test_the_hosts_module_is_put_back_after_liger(script, monkeypatch):
    class Liger:
        @staticmethod
        def apply_liger_kernel_to_llama(**options):
            assert options["model"] is not model
            script.modeling_llama.apply_rotary_pos_emb = None

    model, before = make_target("llama"), script.modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(script, "need", lambda name: Liger)
    with script.as_liger(model) as changed:
        assert type(changed) is type(model)
        assert script.modeling_llama.apply_rotary_pos_emb is None
    assert script.modeling_llama.apply_rotary_pos_emb is before


@pytest.mark.slow
def test_our_side_of_the_comparison_with_engines_runs(tmp_path):
    """In a process of its own, on a toy shape, with the tables of what is not there left empty."""
    command = [sys.executable, BENCHMARKS / "bench_engines.py", "speed", "--engine", "sglang", "--tiny"]
    command += ["--without-engine", "--repeats", "1", "--out", tmp_path / "b"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "b.json").read_text())
    assert not found["failures"]
    ways = [(row["way"], row["batch_size"]) for row in found["results"]]
    assert ways == [(way, size) for size in (1, 2) for way in ("our loop, no drafting", "our loop, drafting")]
    drafted = found["results"][1]
    assert 2 <= drafted["acceptance_length"] <= 3  # each round 2 or 3, drawn so that it is 2.41 in the long run
    assert "| SGLang, EAGLE-3 | - | - |" in (tmp_path / "b.md").read_text()


@pytest.mark.slow
def test_our_side_drafts_the_shapes_asked_for_by_the_rates_of_a_coverage(tmp_path):
    """Each further shape is a way of its own, accepted by rank."""
    coverage = tmp_path / "coverage.json"
    coverage.write_text(json.dumps({"acceptance_by_rank": [[0.6, 0.1], [0.6, 0.1], [0.6], [0.6]]}))
    command = [
        sys.executable,
        BENCHMARKS / "bench_engines.py",
        "speed",
        "--tiny",
        "--without-engine",
        "--repeats",
        "1",
    ]
    command += ["--coverage", coverage, "--draft-shapes", "auto", "5", "--out", tmp_path / "b"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "b.json").read_text())
    assert not found["failures"]
    assert {row["way"] for row in found["results"]} >= {"our loop, auto", "our loop, 5"}
    assert found["engines"]["ours"]["facts"]["shapes"]["5, BS 2"].keys() == {"chain of 5"}
