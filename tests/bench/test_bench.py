"""`hf-eagle3 bench`: small runs of everything, what it asserts, and what it refuses."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.blocks import make_block_drafter
from helpers.marks import slow_but
from helpers.models import DRAFTERS, TEXT, make_drafter, make_prompt, make_target
from helpers.paths import ROOT
from transformers import AutoModelForCausalLM

from hf_eagle3 import cli
from hf_eagle3 import data_parallel as processes
from hf_eagle3.bench import dflash, equality, measure, names, reads, report, results, ways
from hf_eagle3.bench.attempts import Attempts
from hf_eagle3.bench.dflash import load_dflash
from hf_eagle3.bench.equality import Agreement, OutputDiffersError, Text, compare
from hf_eagle3.bench.prompts import Prompts, read_questions
from hf_eagle3.bench.shapes import make_random_drafter
from hf_eagle3.cli import bench as command
from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.data_parallel import Team
from hf_eagle3.kernels.qkv import PROJECTIONS, view_as_one
from hf_eagle3.speculation.stats import Speculation

pytestmark = pytest.mark.any_release

ON_CPU = ("--dtype", "float32", "--device", "cpu", "--repeats", "1")
TINY = ["bench", "--shape", "tiny", "--prompt-length", "9", *ON_CPU]
SIMULATED = [*TINY, "--simulate-acceptance-length", "2"]
SMALL = ["--batch-sizes", "1", "2", "--max-new-tokens", "16"]
RATIOS = ["drafting against generate()", "drafting against our loop without"]
KINDS = ["generate()", "our loop, no drafting", "our loop, drafting"]


def read(out: Path) -> tuple[str, dict]:
    data = json.loads(Path(f"{out}.json").read_text(), parse_constant=pytest.fail)  # of NaN and Infinity
    return Path(f"{out}.md").read_text(encoding="utf-8"), data


def run_bench(arguments: list[str], **steps) -> int:
    """`cli.main`, with some of the command's steps replaced."""
    args = cli.make_parser().parse_args(arguments)
    return cli.guard(lambda: command.run(args, **steps))


def fail_to_load(*_, **__):
    pytest.fail("the target was loaded")


def fail_to_launch(*_, **__):
    pytest.fail("processes were started")


def test_tables_of_a_shape(tmp_path, capsys):
    out = tmp_path / "tables-3.1"  # what follows the dot is no suffix
    assert cli.main([*TINY, *SMALL, "--simulate-acceptance-length", "2.5", "--out", str(out)]) == 0
    text, data = read(out)
    head, _, *rows, _, advice, _, where = capsys.readouterr().out.splitlines()
    assert head.split() == ["tokens", "a", "second", "BS", "1", "BS", "2"]
    assert [row.rsplit(maxsplit=2)[0] for row in rows] == [*KINDS, *RATIOS, "acceptance length"]
    assert advice.startswith("Drafting ")
    assert where == f"The long tables are in {out}.md, the same as data in {out}.json."
    assert "acceptance length simulated at 2.5" in text
    assert "Compared with" not in text  # what a simulated draft says means nothing
    results = data["results"]
    assert [(r["kind"], r["batch_size"]) for r in results] == [(kind, size) for size in (1, 2) for kind in KINDS]
    for result in results:
        assert result["slowest"] <= result["tokens_per_second"] <= result["fastest"]
        assert f"{result['tokens_per_second']:.1f} (" in text
        row = rows[KINDS.index(result["kind"])]
        assert row.split()[-2:][result["batch_size"] - 1] == f"{result['tokens_per_second']:.1f}"
        if result["kind"] == KINDS[1]:  # nothing is simulated without a draft
            assert result["num_identical"] == result["num_rows"] == result["batch_size"]
        if result["kind"] == KINDS[2]:
            assert result["num_identical"] is None
    assert 1.5 < results[-1]["acceptance_length"] < 3.5
    rates = [r["acceptance_rate_by_depth"] for r in results]
    assert rates[:2] == [[], []]
    assert [rate[0] for rate in rates[2::3]] == [1, 1]  # one draft token always, a second half of the time
    shown = [" / ".join("-" if rate is None else f"{rate:.2f}" for rate in found) for found in rates[2::3]]
    assert f"| acceptance rate by depth | {shown[0]} | {shown[1]} |" in text


def write_coverage(tmp_path, **more):
    path = tmp_path / "coverage.json"
    path.write_text(json.dumps({"acceptance_by_rank": [[1.0], [0.0, 1.0], [1.0]], **more}))
    return str(path)


def test_shapes_are_swept_beside_drafting(tmp_path):
    """Of a coverage that a chain of one token fulfils always, a longer one never, and a tree to its end."""
    out = tmp_path / "swept"
    shapes = ["--draft-shapes", "1", "5", "tree-8", "auto", "--simulate-coverage", write_coverage(tmp_path)]
    assert cli.main([*TINY, *shapes, "--batch-sizes", "2", "--max-new-tokens", "17", "--out", str(out)]) == 0
    text, data = read(out)
    found = {r["kind"]: r for r in data["results"]}
    swept = ["our loop, chain of 1", "our loop, chain of 5", "our loop, tree of 7, depth 4", names.CHOSEN]
    assert list(found) == [*KINDS, *swept]
    lengths = [found[kind]["acceptance_length"] for kind in (KINDS[2], *swept[:2])]
    assert lengths == [2, 2, 2]
    assert found[swept[2]]["acceptance_length"] >= 3
    assert found[swept[1]]["shapes"] == {"chain of 5": 8}
    assert sum(found[names.CHOSEN]["shapes"].values()) >= 3
    assert len([line for line in text.splitlines() if line.startswith("| our loop") and "| 2 |" in line]) >= 5
    assert "acceptance simulated by rates of each depth and rank" in text


def test_swept_shapes_are_compared_with_generate(folders, tmp_path):
    pair = [
        "--target",
        str(folders / "target"),
        "--drafter",
        str(folders / "drafter"),
        "--prompt-length",
        "9",
        *ON_CPU,
    ]
    out = tmp_path / "out"
    shapes = ["--draft-shapes", "2", "tree-8", "--batch-sizes", "2", "--max-new-tokens", "8"]
    assert cli.main(["bench", *pair, *shapes, "--out", str(out)]) == 0
    for result in read(out)[1]["results"][1:]:
        assert result["num_identical"] == 2
        assert result["agreement"] is not None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "expected JSON with acceptance_by_rank"),
        ({"acceptance_by_rank": [[2.0]]}, "numbers from 0 to 1"),
        ({"acceptance_by_rank": 3}, "expected JSON with acceptance_by_rank"),
        ([], "expected JSON with acceptance_by_rank"),
        ({"acceptance_by_rank": [[0.5]], "drafter": "another"}, "it is of 'another', and --drafter is drafter"),
    ],
    ids=["empty", "no_rates", "number", "list", "of_another"],
)
def test_a_coverage_that_is_none_is_refused(content, says, folders, tmp_path, capsys):
    path = tmp_path / "coverage.json"
    path.write_text(json.dumps(content))
    pair = ["--target", str(folders / "target"), "--drafter", str(folders / "drafter"), *ON_CPU]
    assert cli.main(["bench", *pair, "--simulate-coverage", str(path), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_bench_as_json(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*SIMULATED, "--batch-sizes", "1", "--max-new-tokens", "8", "--json", "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert json.loads(printed) == read(out)[1]
    assert "Loading the models ..." in err
    assert "Batch size 1 ..." in err
    assert "--json" not in read(out)[0]


def test_rates_add_up_over_processes():
    counts = [([4, 2], [2, 1]), ([4, 2, 0], [3, 0, 0]), ([], [])]
    assert results.rates_by_depth(counts) == [5 / 8, 1 / 4, None]


def test_what_was_not_measured_is_a_dash_and_null():
    result = results.Measured(ways.DRAFTED, 1, float("nan"), 1.0, float("inf"), acceptance_rate_by_depth=[0.5, None])
    text = report.to_markdown([result], title="t", notes=[])
    assert "| acceptance length | - |" in text
    assert "| acceptance rate by depth | 0.50 / - |" in text
    assert "| a round, ms | - |" in text
    data = json.loads(report.to_json([result], notes=[]), parse_constant=pytest.fail)["results"][0]
    assert (data["tokens_per_second"], data["fastest"], data["acceptance_rate_by_depth"]) == (None, None, [0.5, None])
    assert results.mean_gain([(0, 0, "all")]) is None


@pytest.mark.parametrize(
    ("speeds", "says"),
    [
        ({1: (10, 25), 8: (50, 60)}, "Drafting is up to 2.50 times as fast as generate(), at batch sizes 1, 8."),
        ({1: (10, 25), 64: (90, 60)}, "2.50 times as fast as generate(), at batch sizes 1; leave it out at 64."),
        ({64: (90, 60)}, "Drafting does not pay here: at no batch size is it faster than generate()."),
        ({1: (None, 25)}, ""),
    ],
    ids=["all", "some", "none", "alone"],
)
def test_advice_is_by_batch_size(speeds, says):
    pairs = [
        (kind, size, v)
        for size, both in speeds.items()
        for kind, v in zip((ways.STOCK, ways.DRAFTED), both, strict=True)
    ]
    grid = report.Grid([results.Measured(kind, size, v, v, v) for kind, size, v in pairs if v is not None], [])
    assert report.advise(grid).endswith(says)
    assert bool(report.advise(grid)) == bool(says)


# ---- out of memory ----


def run_out(kind, *, in_call, at_least=2):
    """Ways of which one kind runs out of memory in a call, counted from 1, over so many rows."""

    def make_ways(*args, **kwargs):
        made = ways.make_ways(*args, **kwargs)
        honest, count = made[kind], itertools.count(1)

        def decode(prompts, limit):
            if len(prompts.numbers) >= at_least and next(count) == in_call:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 1 GiB free. Process 7 has 5 GiB in use."
                )
            return honest(prompts, limit)

        return {**made, kind: decode}

    return make_ways


@pytest.mark.slow
@pytest.mark.parametrize("in_call", [1, 2], ids=["warm-up", "timed"])
@pytest.mark.parametrize("i", [0, 2], ids=["stock", "drafted"])
def test_no_room_for_one_kind_leaves_the_others(tmp_path, i, in_call):
    make_ways = run_out(KINDS[i], in_call=in_call)
    assert run_bench([*SIMULATED, *SMALL, "--out", str(tmp_path / "out")], make_ways=make_ways) == 0
    text, data = read(tmp_path / "out")
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 1 GiB free"
    assert data["skipped"] == [{"kind": KINDS[i], "batch_size": 2, "reason": reason}]
    left = [(kind, size) for size in (1, 2) for kind in KINDS if (kind, size) != (KINDS[i], 2)]
    assert [(r["kind"], r["batch_size"]) for r in data["results"]] == left
    assert f"[^1]: {reason}." in text


@pytest.mark.parametrize("asked", slow_but([["--join-projections"]], [[], ["--join-projections"]]))
def test_projections_are_joined_where_asked(asked, tmp_path):
    models = []

    def make_ways(target, drafter, **options):
        models.extend([target, drafter])
        return ways.make_ways(target, drafter, **options)

    assert run_bench([*SIMULATED, *SMALL, *asked, "--out", str(tmp_path / "out")], make_ways=make_ways) == 0
    for model in models:
        attention = next(m for m in model.modules() if hasattr(m, "q_proj"))
        are_joined = view_as_one([getattr(attention, name).weight for name in PROJECTIONS]) is not None
        assert are_joined == bool(asked)
    assert ("--join-projections" in (tmp_path / "out.md").read_text()) == bool(asked)


def test_no_room_for_anything_is_an_error(tmp_path, capsys):
    make_ways = run_out(ways.DRAFTED, in_call=1, at_least=1)
    arguments = ["--kinds", "drafted", "--batch-sizes", "1", "--out", str(tmp_path / "out")]
    assert run_bench([*SIMULATED, *arguments], make_ways=make_ways) == 1
    assert "nothing could be measured; the tables say why" in capsys.readouterr().err
    assert len(read(tmp_path / "out")[1]["skipped"]) == 1


def test_ours_is_compared_over_few_rows_where_stock_has_no_room_for_all(real, tmp_path):
    make_ways = run_out(ways.STOCK, in_call=1, at_least=5)
    assert run_bench([*real, "--batch-sizes", "5", "--out", str(tmp_path / "out")], make_ways=make_ways) == 0
    _, data = read(tmp_path / "out")
    assert [s["kind"] for s in data["skipped"]] == [ways.STOCK]
    assert [r["agreement"]["num_identical"] for r in data["results"]] == [4, 4]
    assert [r["num_rows"] for r in data["results"]] == [5, 5]


def test_what_cannot_be_compared_is_not_timed(real, tmp_path):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def make_ways(*models, temperature, **options):
        """There is no room for the greedy texts that sampling ways are judged by."""
        made = ways.make_ways(*models, temperature=temperature, **options)
        return made if temperature else dict.fromkeys(made, run_out)

    arguments = [*real, "--batch-sizes", "2", "--temperature", "0.8", "--out", str(tmp_path / "out")]
    assert run_bench(arguments, make_ways=make_ways) == 0
    _, data = read(tmp_path / "out")
    assert [r["kind"] for r in data["results"]] == [ways.STOCK]
    reason = "could not be compared with generate(): OutOfMemoryError: CUDA out of memory"
    assert [(s["kind"], s["reason"]) for s in data["skipped"]] == [(kind, reason) for kind in KINDS[1:]]


def test_no_room_in_one_process_skips_the_kind_in_all():
    class Two(Team):
        def gather(self, item):
            return [item, "OutOfMemoryError: there"] if item == "" else [item]

    attempts = Attempts(make_target("llama"), Two(torch.device("cpu")), 8)
    assert attempts.run([ways.PLAIN], lambda: 1) is None
    assert attempts.skipped == [results.Skipped(ways.PLAIN, 8, "OutOfMemoryError: there")]


def test_no_room_where_processes_share_the_target_ends_all():
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    class Shard:
        """A parameter as tensor parallelism leaves it."""

        full_tensor = None
        device_mesh = SimpleNamespace(ndim=1, get_group=object)

    target = SimpleNamespace(tp_size=2, parameters=lambda: [Shard()])
    with pytest.raises(torch.OutOfMemoryError):
        Attempts(target, Team(torch.device("cpu")), 8).run([ways.PLAIN], work)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench"], "Give one of --target and --shape"),
        (["bench", "--shape", "tiny", "--target", "x"], "Give one of --target and --shape"),
        (["bench", "--shape", "tiny"], "give --simulate-acceptance-length too"),
        (["bench", "--shape", "tiny", "--prompts", "x.jsonl"], "--prompts needs a tokenizer"),
        ([*TINY, "--simulate-acceptance-length", "2", "--dp-size", "0"], "at least 1; got 0"),
        ([*SIMULATED, "--max-new-tokens", "1"], "--max-new-tokens must be at least 2; got 1"),
        ([*SIMULATED, "--temperature", "-1"], "--temperature must be at least 0; got -1.0"),
        ([*SIMULATED, "--temperature", "nan"], "--temperature must be at least 0; got nan"),
        ([*SIMULATED, "--read-bandwidth", "0"], "--read-bandwidth must be above 0"),
        ([*SIMULATED, "--device", "banana"], "--device banana is no device that PyTorch knows"),
        ([*SIMULATED, "--device", "cuda:99"], "--device cuda:99 is not there: PyTorch sees "),
        ([*SIMULATED, "--device", "meta"], "--device meta cannot be used here"),
        ([*SIMULATED, "--out", "/nowhere/at/all"], "the folder /nowhere/at does not exist"),
        ([*SIMULATED, "--out", "."], "--out is the name of the files"),
        ([*TINY, "--simulate-acceptance-length", "4.5"], "between 1 and 4, the draft depth plus 1; got 4.5"),
        ([*TINY, "--simulate-acceptance-length", "0.5"], "between 1 and 4, the draft depth plus 1; got 0.5"),
        ([*TINY, "--simulate-acceptance-length", "nan"], "between 1 and 4, the draft depth plus 1; got nan"),
        ([*SIMULATED, "--num-draft-tokens", "1", "--simulate-acceptance-length", "2.1"], "between 1 and 2, "),
        (
            ["bench", "--target", "x", "--drafter", "y", "--simulate-acceptance-length", "inf"],
            "at least 1, the target's",
        ),
        (["bench", "--target", "x", "--drafter", "y", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_refusals_say_what_to_give(arguments, says, capsys):
    assert run_bench(arguments, load_target=fail_to_load, launch=fail_to_launch) == 2
    assert says in capsys.readouterr().err


# ---- equal output ----


@pytest.fixture
def real(folders):
    """The command over models in folders, with prompts."""
    lines = [{"prompt": "abc"[: i % 3 + 1] * (i + 1), "category": ["even", "odd"][i % 2]} for i in range(5)]
    (folders / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    models = ["--target", str(folders / "target"), "--drafter", str(folders / "drafter")]
    return ["bench", *models, *ON_CPU, "--prompts", str(folders / "prompts.jsonl"), "--max-new-tokens", "12"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "hi"}', "expected `turns` or `prompt`, got '{\\\"text"),
        ('{"turns": []}', "expected `turns` or `prompt`"),
        ("[1]", "expected `turns` or `prompt`"),
        ("{", "expected a JSON object, got '{'"),
        ('{"turns": "hello there"}', "expected `turns` to be a list of texts, none of them empty, got 'hello there'"),
        ('{"turns": [3]}', r"expected `turns` to be a list of texts, none of them empty, got '\[3\]'"),
        ('{"turns": [""]}', "expected `turns` to be a list of texts"),
        ('{"prompt": {"a": 1}}', "expected `prompt` to be a text"),
        ('{"prompt": "a", "category": ["x"]}', "expected `category` to be a text"),
    ],
)
def test_what_is_no_prompt_is_said(line, says, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="questions.jsonl, line 3: " + says):
        read_questions(tmp_path / "questions.jsonl", limit=None)
    assert len(read_questions(tmp_path / "questions.jsonl", limit=1)) == 1


def test_files_that_are_no_prompts_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"p\.jsonl is not UTF-8 text"):
        read_questions(tmp_path / "p.jsonl", limit=None)
    with pytest.raises(ValueError, match=r"p\.jsonl\.gz is compressed"):
        read_questions(tmp_path / "p.jsonl.gz", limit=None)
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"p\.jsonl has 0 prompts for 2 processes"):
        read_questions(tmp_path / "p.jsonl", limit=None, at_least=2)


def test_lines_end_where_json_lines_end(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n{"prompt": "c", "category": null}\n', encoding="utf-8")
    found = read_questions(tmp_path / "p.jsonl", limit=None)
    assert [(q.text, q.category) for q in found] == [("a\u2028b", "all"), ("c", "all")]


def test_bad_prompts_are_refused_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["bench", "--target", "x", "--drafter", "y", *ON_CPU, "--prompts", str(tmp_path / "p.jsonl")]
    assert run_bench([*arguments, "--dp-size", "2"], launch=fail_to_launch) == 2
    assert "p.jsonl has 1 prompts for 2 processes" in capsys.readouterr().err


def test_the_report_says_that_first_turns_alone_are_asked(real, folders):
    path = folders / "prompts.jsonl"
    lines = [{"turns": ["ab", "c"]}, {"turns": ["a"]}, {"prompt": "abc"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    out = folders / "out"
    assert cli.main([*real, "--batch-sizes", "3", "--kinds", "drafted", "--out", str(out)]) == 0
    text, data = read(out)
    assert "1 of 3 prompts have several turns: the first alone is asked." in text
    assert any("several turns" in note for note in data["notes"])


def test_depth_of_the_drafter_bounds_what_is_simulated(real, folders, drafter, capsys):
    for depth, length, says in (
        (2, "3.5", "between 1 and 3, the draft depth plus 1"),
        (0, "1", "num_assistant_tokens=0"),
    ):
        drafter.generation_config.num_assistant_tokens = depth
        drafter.save_pretrained(folders / "drafter")
        assert run_bench([*real, "--simulate-acceptance-length", length], load_target=fail_to_load) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(("size", "name"), [("3", "num_attention_heads, 4"), ("4", "num_key_value_heads, 2")])
def test_shares_of_the_target_are_whole_heads(real, capsys, size, name):
    assert run_bench([*real, "--tp-size", size], launch=fail_to_launch) == 2
    assert f"--tp-size {size} does not divide the target's {name}" in capsys.readouterr().err


def test_a_model_that_is_no_drafter_is_refused(folders, capsys):
    model = str(folders / "target")
    assert cli.main(["bench", "--target", model, "--drafter", model, "--device", "cpu", "--batch-sizes", "1"]) == 2
    assert "is a LlamaModel, and no EAGLE-3 drafter" in capsys.readouterr().err
    (folders / "p.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["--target", model, "--drafter", model, "--prompt-file", str(folders / "p.jsonl"), "--device", "cpu"]
    assert cli.main(["regenerate", *arguments, "--output-file", str(folders / "out.jsonl")]) == 2
    assert "is a LlamaModel, and no EAGLE-3 drafter" in capsys.readouterr().err
    assert not (folders / "out.jsonl").exists()


@pytest.mark.parametrize("temperature", slow_but(["0"], ["0", "0.8"]))
def test_output_is_compared_also_without_stock(real, tmp_path, temperature):
    further = ["--batch-sizes", "2", "--kinds", "plain", "drafted", "--temperature", temperature]
    assert cli.main([*real, *further, "--out", str(tmp_path / "out")]) == 0
    text, data = read(tmp_path / "out")
    for kind, result in zip(KINDS[1:], data["results"], strict=True):
        assert f"- {kind}, BS 2: 4 of 4 rows identical.\n" in text
        assert result["agreement"] == {"num_rows": 4, "num_identical": 4, "largest_gap": 0.0}
        assert result["num_rows"] == 5
    assert "None of" not in text
    assert "| even |" in text


def test_output_that_differs_ends_the_bench(real, tmp_path, capsys):
    def make_ways(*args, **kwargs):
        made = ways.make_ways(*args, **kwargs)
        honest = made[ways.DRAFTED]

        def decode(prompts, limit):
            call = honest(prompts, limit)
            if 4 in prompts.numbers:
                row = call.rows[prompts.numbers.index(4)]
                row[7] = (row[7] + 1) % 256
            return call

        return {**made, ways.DRAFTED: decode}

    assert run_bench([*real, "--batch-sizes", "3", "--out", str(tmp_path / "out")], make_ways=make_ways) == 1
    said = capsys.readouterr().err
    assert "our loop, drafting: prompt 4 differs from generate() at new token 7" in said
    assert "In float32 no difference is allowed" in said
    assert not (tmp_path / "out.md").exists()


def test_a_loop_that_accepts_whatever_is_drafted_is_caught(real, folders, drafter, tmp_path, capsys):
    drafter.generation_config.simulated_acceptance_length = 4.0
    drafter.save_pretrained(folders / "drafter")
    assert cli.main([*real, "--batch-sizes", "2", "--out", str(tmp_path / "out")]) == 1
    assert "our loop, drafting: prompt 1 differs from generate() at new token 1: " in capsys.readouterr().err


def test_a_penalty_of_the_models_own_is_off(target, drafter):
    ids = make_prompt(6)
    prompts = Prompts({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ["all"], [1])
    texts = []
    for penalty in (1.0, 3.0):
        target.generation_config.repetition_penalty = penalty
        made = ways.make_ways(target, drafter.bind(target), temperature=0.0)
        texts += [made[kind](prompts, 12).rows for kind in (ways.STOCK, ways.DRAFTED)]
    assert all(text == texts[0] for text in texts)
    assert target.generate(ids, max_new_tokens=12, do_sample=False)[0, 6:].tolist() != texts[0][0]


def greedy_text(model, length: int = 9, max_new_tokens: int = 10) -> tuple[torch.Tensor, list[int]]:
    prompt = make_prompt(length)
    return prompt[0], model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)[0, length:].tolist()


@pytest.mark.parametrize("is_quantised", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_may_differ_at_ties_only(dtype, is_quantised):
    model = copy.deepcopy(make_target("llama")).to(dtype)
    prompt, plain = greedy_text(model)
    t = 6
    twin = next(token for token in range(3, 64) if token not in plain)
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[plain[t]]
    if is_quantised:
        model.hf_quantizer = object()
    at_tie = Text("prompt 1", prompt, plain, [*plain[:t], twin, 5, 5, 5])
    total = compare(model, [at_tie, at_tie._replace(ours=plain)], kind="ours")
    assert (total.num_rows, total.num_identical) == (2, 1)
    assert str(total).startswith("1 of 2 rows identical; the others differ first at a tie (largest gap 0")

    worst = int(model(torch.cat([prompt, torch.tensor(plain[:t])])[None]).logits[0, -1].argmin())
    with pytest.raises(OutputDiffersError, match=r"prompt 1 differs from generate\(\) at new token 6: .* is no tie"):
        compare(model, [at_tie._replace(ours=[*plain[:t], worst])], kind="ours")
    with pytest.raises(OutputDiffersError, match="where one ends: 6 tokens against 10"):
        compare(model, [at_tie._replace(ours=plain[:t])], kind="ours")


def test_float32_allows_no_tie():
    model = copy.deepcopy(make_target("llama"))
    prompt, plain = greedy_text(model)
    twin = next(token for token in range(3, 64) if token not in plain)
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[plain[2]]
    with pytest.raises(OutputDiffersError, match=f"new token 2: {twin} instead of {plain[2]}"):
        compare(model, [Text("prompt 1", prompt, plain, [*plain[:2], twin])], kind="ours")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_forward_in_float32_leaves_the_weights_as_they_are(family):
    model = copy.deepcopy(make_target(family)).to(torch.bfloat16)
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    ids = make_prompt(12)
    wide = copy.deepcopy(model).float()
    with torch.no_grad(), equality.in_float32(model):
        torch.testing.assert_close(
            equality.forward(model, ids, keep=4), equality.forward(wide, ids, keep=4), rtol=1e-4, atol=1e-4
        )
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    with pytest.raises(IndexError), equality.in_float32(model):
        model(torch.tensor([[10**6]]))
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_logits_one_by_one_are_those_of_one_forward():
    model, ids = make_target("llama"), make_prompt(9)
    for keep in (1, 4, 9):
        with torch.no_grad():
            one, all_ = equality.forward_singly(model, ids, keep=keep), equality.forward(model, ids, keep=keep)
        torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-4)


def test_agreements_add_up():
    total = sum([Agreement(2, 2), Agreement(3, 1, 0.25), Agreement(1, 0, 0.5)], Agreement())
    assert str(total) == "3 of 6 rows identical; the others differ first at a tie (largest gap 0.5)"


# ---- D-Flash ----

STAND_IN = '''
import torch
from transformers import LlamaConfig, PreTrainedModel


class StandInConfig(LlamaConfig):
    model_type = "dflash_stand_in"


class StandIn(PreTrainedModel):
    """Says what z-lab's drafters say, and how many tokens its forwards verify; its drafts are the text of an earlier run."""

    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.norm = torch.nn.LayerNorm(4)
        self.post_init()

    def spec_generate(self, target, input_ids, max_new_tokens, stop_token_ids, temperature):
        assert temperature == 0.0 and input_ids.shape[0] == 1 and stop_token_ids is None
        text = target.generate.__wrapped__(target, input_ids, max_new_tokens=max_new_tokens + 4, do_sample=False)
        n, ids = input_ids.shape[1], input_ids
        while ids.shape[1] - n < max_new_tokens:
            if ids.shape[1] == n:
                ids = torch.cat([ids, target(ids).logits[:, -1:].argmax(-1)], dim=1)
                continue
            block = torch.cat([ids, text[:, ids.shape[1] : ids.shape[1] + 2]], dim=1)
            ids = torch.cat([block, target(block).logits[:, -1:].argmax(-1)], dim=1)
        return ids[:, : n + max_new_tokens]
'''


def write_stand_in(folder: Path) -> Path:
    folder.mkdir()
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "dflash_stand_in",
                "auto_map": {"AutoConfig": "stand_in.StandInConfig", "AutoModel": "stand_in.StandIn"},
            }
        )
    )
    from safetensors.torch import save_file

    weights = {"norm.weight": torch.ones(4), "norm.bias": torch.zeros(4)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_dflash_column_of_a_drafter_with_code_of_its_own(real, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    stand_in = write_stand_in(tmp_path / "stand_in")
    further = ["--batch-sizes", "1", "2", "--dflash-drafter", str(stand_in), "--out", str(tmp_path / "out")]
    assert cli.main([*real, *further, "--max-new-tokens", "13"]) == 0
    text, data = read(tmp_path / "out")
    (found,) = (r for r in data["results"] if r["kind"] == "D-Flash")
    assert (found["batch_size"], found["num_identical"], found["num_rows"]) == (1, 5, 5)
    (row,) = (line for line in text.splitlines() if line.startswith("| D-Flash |"))
    assert (
        row
        == f"| D-Flash | {found['tokens_per_second']:.1f} ({found['slowest']:.1f} to {found['fastest']:.1f}) | - [^1] |"
    )
    assert "[^1]: D-Flash drafters decode one row at a time, by their own code and by the host's." in text
    assert "| drafting against D-Flash | " in text
    assert data["skipped"] == [{"kind": "D-Flash", "batch_size": 2, "reason": dflash.ONE_ROW}]


def test_rounds_of_dflash_are_counted_by_forwards_of_the_target(target, drafter):
    class StandIn(torch.nn.Module):
        def spec_generate(self, target, input_ids, max_new_tokens, stop_token_ids, temperature):
            for _ in range(1 + 4):  # the prompt's, and four rounds of 3 tokens
                target(input_ids)
            return torch.cat([input_ids, input_ids.new_full((1, 1 + 4 * 3), 7)], dim=1)

    made = ways.make_ways(target, drafter.bind(target), temperature=0.0, dflash_drafter=StandIn())
    prompts = Prompts({"input_ids": make_prompt(5)}, ["all"], [1])
    call = made[ways.DFLASH](prompts, 13)
    result = results.Measured(ways.DFLASH, 1, 1.0, 1.0, 1.0)
    with Team(torch.device("cpu")) as team:
        results.add_acceptance(result, [call], [call], [prompts], team)
    assert result.acceptance_length == 3
    assert call.rows == [[7] * 13]


def test_dflash_that_fails_is_a_dash_with_its_reason(real, tmp_path):
    class Broken(torch.nn.Module):
        def spec_generate(self, target, input_ids, max_new_tokens, stop_token_ids, temperature):
            raise TypeError("crop() takes no such length")

    further = ["--batch-sizes", "1", "--limit", "1", "--dflash-drafter", "x", "--kinds", "drafted"]
    arguments = [*real, *further, "--out", str(tmp_path / "out")]
    assert run_bench(arguments, load_dflash=lambda *_, **__: Broken()) == 0
    text, _ = read(tmp_path / "out")
    assert "| D-Flash | - [^1] |" in text
    assert "[^1]: TypeError: crop() takes no such length." in text


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_random_block_drafters_of_a_shape(kind, tmp_path):
    arguments = ["bench", "--shape", "tiny", *ON_CPU, "--random-drafter", kind, "--simulate-acceptance-length", "2.4"]
    arguments += ["--batch-sizes", "1", "2", "--max-new-tokens", "16", "--prompt-length", "12", "--repeats", "1"]
    assert run_bench([*arguments, "--kinds", "plain", "drafted", "--out", str(tmp_path)]) == 0
    _, data = read(tmp_path)
    assert [r["batch_size"] for r in data["results"] if r["kind"] == ways.DRAFTED] == [1, 2]


def test_reads_of_a_block_are_those_of_one_forward():
    target = make_target("llama")
    drafter = make_block_drafter(target, "dspark")
    one, four = (reads.find_weights(target, drafter, depth).num_drafting for depth in (1, 4))
    assert four - one == 3 * drafter.markov_head.markov_w2.weight.nbytes
    layers = sum(p.nbytes for p in drafter.layers.parameters())
    head = target.lm_head.weight.nbytes
    others = sum(p.nbytes for part in (drafter.norm, drafter.hidden_norm, drafter.fc) for p in part.parameters())
    assert one == layers + head + others + drafter.markov_head.markov_w2.weight.nbytes


def test_dflash_drafters_that_we_read_run_in_our_loop(real, tmp_path):
    target = AutoModelForCausalLM.from_pretrained(real[real.index("--target") + 1])
    text = target.config
    drafter = make_block_drafter(
        target,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        draft_vocab_size=text.vocab_size,
        aux_layer_ids=[1, 2, text.num_hidden_layers - 1],
        mask_token_id=1,
        block_size=5,
    )
    drafter.save_pretrained(tmp_path / "drafter")
    further = [
        "--batch-sizes",
        "1",
        "2",
        "--dflash-drafter",
        str(tmp_path / "drafter"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert run_bench([*real, *further, "--limit", "2"]) == 0
    _, data = read(tmp_path / "out")
    found = [r for r in data["results"] if r["kind"] == "D-Flash"]
    assert [(r["batch_size"], r["num_identical"], r["num_rows"]) for r in found] == [(1, 2, 2), (2, 2, 2)]
    assert all(1 <= r["acceptance_length"] <= 5 and len(r["acceptance_rate_by_depth"]) == 4 for r in found)


@pytest.mark.skipif(not hasattr(transformers, "MuseGlimmerAssistantModel"), reason="Transformers has no D-Flash")
def test_dflash_drafters_of_the_hosts_own(tmp_path, drafter):
    model = make_target("llama")
    config = transformers.MuseGlimmerAssistantConfig(
        **{name: value for name, value in TEXT.items() if "token_id" not in name and name != "vocab_size"}
        | {"num_hidden_layers": 1, "block_size": 4, "mask_token_id": 60, "target_layer_ids": [1, 3]},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.MuseGlimmerAssistantModel(config).save_pretrained(tmp_path)
    loaded = load_dflash(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    made = ways.make_ways(model, drafter, temperature=0.0, dflash_drafter=loaded)
    ids = make_prompt(9)
    prompts = Prompts({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ["all"], [1])
    assert made[ways.DFLASH](prompts, 10).rows == made[ways.STOCK](prompts, 10).rows
    both = Prompts({"input_ids": ids.repeat(2, 1)}, ["all"] * 2, [1, 2])
    with pytest.raises(ValueError, match="one row at a time"):
        made[ways.DFLASH](both, 10)


@pytest.mark.slow
def test_the_hosts_own_assisted_decoding_is_a_row_where_it_runs(real, tmp_path):
    further = ["--batch-sizes", "1", "2", "--kinds", "stock", "lookup", "drafted", "--out", str(tmp_path / "out")]
    assert cli.main([*real, *further]) == 0
    text, data = read(tmp_path / "out")
    skipped = {(s["kind"], s["batch_size"]): s["reason"] for s in data["skipped"]}
    assert skipped.pop((ways.LOOKUP, 2)) == "the host's assisted decoding takes one row at a time"
    found = [r for r in data["results"] if r["kind"] == ways.LOOKUP]
    if CACHE_NAME == "cache":  # from Transformers 5.24 on
        assert [(r["batch_size"], r["num_identical"], r["num_rows"]) for r in found] == [(1, 5, 5)]
        assert "| drafting against prompt lookup | " in text
        assert skipped == {}
    else:
        assert "assisted generate is not supported with Static cache classes" in skipped[ways.LOOKUP, 1]
        assert not found


def test_what_is_no_dflash_drafter_is_refused(folders):
    for name, says in (("nowhere", "cannot be loaded"), ("target", "LlamaModel is no D-Flash drafter")):
        with pytest.raises(ValueError, match=says) as caught:
            load_dflash(str(folders / name), dtype=torch.float32, device=torch.device("cpu"))
        assert "a repository or folder whose own code gives AutoModel a class with spec_generate" in str(caught.value)


# ---- several processes ----


@pytest.mark.slow
def test_two_processes_share_the_prompts(real, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    further = ["--batch-sizes", "2", "--kinds", "stock", "drafted"]
    status = cli.main([*real, *further, "--dp-size", "2", "--out", str(tmp_path / "two")])
    said, errors = capfd.readouterr()
    assert status == 0, errors
    assert cli.main([*real, *further, "--out", str(tmp_path / "one")]) == 0
    text, two = read(tmp_path / "two")
    _, one = read(tmp_path / "one")
    assert said.count("tokens a second  ") == 1  # by one of them
    assert "2 processes, each with its share" in text
    for a, b in zip(one["results"], two["results"], strict=True):
        for name in ("kind", "num_rows", "num_identical", "acceptance_length", "by_category", "agreement"):
            assert a[name] == b[name], name
    assert two["results"][1]["agreement"] == {"num_rows": 5, "num_identical": 5, "largest_gap": 0.0}


@pytest.mark.slow
def test_two_processes_share_the_target(real, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    further = ["--batch-sizes", "2", "--kinds", "stock", "drafted", "--out"]
    status = cli.main([*real, "--tp-size", "2", *further, str(tmp_path / "two")])
    said, errors = capfd.readouterr()
    assert status == 0, errors
    assert cli.main([*real, "--device-map", "cpu", *further, str(tmp_path / "one")]) == 0
    two, one = read(tmp_path / "two"), read(tmp_path / "one")
    assert said.count("tokens a second  ") == 1
    assert "2 processes share the target by tensor parallelism" in two[0]
    assert "The target is spread over cpu" in one[0]
    for a, b in zip(one[1]["results"], two[1]["results"], strict=True):
        for name in ("kind", "num_rows", "num_identical", "acceptance_length", "agreement"):
            assert a[name] == b[name], name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--tp-size", "2"], "--tp-size needs a target that can be loaded in parts: give --target"),
        (["--device-map", "auto"], "--device-map needs a target that can be loaded in parts"),
        (["--tp-size", "2", "--dp-size", "2"], "Give one of --dp-size and --tp-size"),
    ],
)
def test_a_target_in_parts_is_loaded(given, says, capsys):
    assert cli.main([*TINY, "--simulate-acceptance-length", "2", *given]) == 2
    assert says in capsys.readouterr().err


def test_who_ends_the_command_ends_its_processes(monkeypatch):
    started = []

    def start(command: list[str]) -> subprocess.Popen:
        assert command[-2:] == ["bench", "--x"]
        started.append(real_popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[0]

    real_popen, before = subprocess.Popen, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(processes.subprocess, "Popen", start)
    assert processes.launch(2, ["bench", "--x"]) == -signal.SIGTERM
    assert started[0].poll() == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_speed_of_a_team_is_all_tokens_over_the_slowest_time():
    class Two(Team):
        def gather(self, item):
            return [item, (70, 20.0)] if isinstance(item, tuple) else [item]

    def decode(_prompts, _limit):
        return ways.Call(10.0, [[1] * 30], None, None)

    prompts = Prompts({"input_ids": make_prompt(5)}, ["all"], [1])
    with Two(torch.device("cpu")) as team:
        (found,), _ = measure.measure(
            *(make_target("llama"), {ways.PLAIN: decode}, [prompts], measure.Plan(1, 30, 2)), team=team
        )
    assert found.slowest == found.tokens_per_second == (30 + 70) / 20.0


def test_a_round_takes_what_decoding_takes():
    """Of calls of 2 s for 10 rounds and 7 s for 30, prompts and all, a round takes 0.25 s."""

    def told(seconds, rounds):
        speculation = Speculation("own", "", 2, seconds=seconds, draft_seconds=seconds / 10)
        for _ in range(rounds):
            speculation.count(2, 1)
        return ways.Call(seconds, [[1]], speculation, None)

    result = results.Measured(ways.DRAFTED, 1, 1.0, 1.0, 1.0, acceptance_length=2.0)
    results.add_times(result, [told(7.0, 30)], [told(2.0, 10)], Team(torch.device("cpu")))
    text = report.to_markdown([result], title="t", notes=[])
    assert "| a round, ms | 250.00 |" in text
    assert "| of which draft, ms | 25.00 |" in text
    assert "| of which verify and all else, ms | 225.00 |" in text
    results.add_times(result, [told(7.0, 28)], [], Team(torch.device("cpu")))
    assert "| a round, ms | 250.00 |" in report.to_markdown([result], title="t", notes=[])


def test_dp_size_must_be_what_was_launched(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main([*TINY, "--simulate-acceptance-length", "2", "--dp-size", "3"]) == 2
    assert "--dp-size 3, but 1 processes were launched" in capsys.readouterr().err


# ---- what weights cost to read ----


@pytest.mark.parametrize(("E", "k", "M"), [(4, 2, 1), (4, 2, 3), (5, 1, 4), (5, 3, 2), (3, 3, 2)])
def test_distinct_experts_by_counting_all_choices(E, k, M):
    choices = list(itertools.combinations(range(E), k))
    counts = [len(set().union(*tokens)) for tokens in itertools.product(choices, repeat=M)]
    assert reads.expect_distinct(E, k, M) == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_experts_are_found_among_the_weights(family):
    model = make_target(family)
    found = reads.find_experts(model)
    assert reads.has_experts(model) == (family == "gpt_oss")
    if family == "llama":
        assert found is None
        return
    config = model.config
    H, width, E = config.hidden_size, config.intermediate_size, config.num_local_experts
    one = 4 * (H * 2 * width + 2 * width + width * H + H)  # with biases, in float32
    assert found == reads.Experts(
        E, config.num_experts_per_tok, config.num_hidden_layers, config.num_hidden_layers * E * one
    )


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"share_lm_head": True, "draft_vocab_size": 64}, DRAFTERS["peagle"]])
def test_weights_that_a_round_reads(overrides, is_tied):
    """The target's but for the rows of its embedding; of the drafter the fusion once, all else each step."""
    model = copy.deepcopy(make_target("llama"))
    if is_tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    small = make_drafter(model, **overrides)
    found = reads.find_weights(model, small, 3)
    V, H = model.get_input_embeddings().weight.shape
    layers = sum(p.numel() for p in model.model.layers.parameters()) + model.model.norm.weight.numel()
    assert found.num_always == 4 * (layers + V * H)  # the head
    fusion = sum(p.numel() for name, p in small.named_parameters() if name.split(".")[0] in ("fc", "fc_norm"))
    fusion += small.mask_hidden.numel() if small.config.is_parallel else 0
    head = V * H if small.config.share_lm_head else small.lm_head.weight.numel()
    step = sum(p.numel() for p in small.layers.parameters()) + small.norm.weight.numel() + head
    assert found.num_drafting == 4 * (fusion + (1 if small.config.is_parallel else 3) * step)
    assert reads.find_weights(model, small, 0).num_drafting == 0


def test_what_sees_images_is_no_part_of_a_round():
    model = make_target("gemma3_vlm")
    text = sum(p.nbytes for p in model.get_decoder().parameters())  # the head is the embedding
    assert (
        reads.find_weights(model, make_drafter(model), 2).num_always
        == text
        < sum(p.nbytes for p in model.parameters())
    )


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("bandwidth", [["--read-bandwidth", "2"], []], ids=["given", "measured"])
def test_account_of_what_weights_cost_to_read(family, tmp_path, bandwidth):
    make_target(family).save_pretrained(tmp_path / "target")
    words = ["bench", "--target", str(tmp_path / "target"), *ON_CPU, "--prompt-length", "9", "--batch-sizes", "2"]
    words += ["--max-new-tokens", "8", "--simulate-acceptance-length", "2", "--num-draft-tokens", "2"]
    assert cli.main([*words, "--kinds", "plain", "drafted", *bandwidth, "--out", str(tmp_path / "out")]) == 0
    text, data = read(tmp_path / "out")
    plain, drafted = data["reads"]
    assert (plain["num_tokens"], drafted["num_tokens"]) == (2, 6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    found = reads.find_weights(model, make_random_drafter(model), 2)
    for row, num_drafting in ((plain, 0), (drafted, found.num_drafting)):
        num_bytes, wanted = found.num_always + num_drafting, None
        if family == "gpt_oss":
            wanted = reads.expect_distinct(found.experts.num_experts, found.experts.num_chosen, row["num_tokens"])
            num_bytes += found.experts.num_bytes * wanted / found.experts.num_experts
        assert row["num_experts"] == wanted
        assert row["num_bytes"] == pytest.approx(num_bytes)
    if bandwidth:
        assert drafted["milliseconds"] == pytest.approx(1e3 * drafted["num_bytes"] / 2e12)
        assert "Read bandwidth 2.00 TB/s, given." in text
    else:
        assert "TB/s, measured." in text
    speed, length = data["results"][1]["tokens_per_second"], data["results"][1]["acceptance_length"]
    assert drafted["measured_milliseconds"] == pytest.approx(1e3 * 2 * length / speed)
    shown = "-" if wanted is None else f"{wanted:.1f}"
    assert f"| our loop, drafting | 2 | 6 | {shown} |" in text
