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

import pytest
import torch
import transformers
from conftest import TEXT, make_prompt, make_target
from test_cli import drafter, folders, target, tokenizer  # noqa: F401  fixtures
from transformers import AutoModelForCausalLM

from hf_eagle3 import cli, decode, processes
from hf_eagle3.accept import Verdict
from hf_eagle3.bench import command, dflash, equality, experts, measure, report, ways
from hf_eagle3.bench.dflash import load_dflash
from hf_eagle3.bench.equality import Agreement, OutputDiffersError, Text, compare
from hf_eagle3.bench.prompts import Prompts, read_prompts
from hf_eagle3.processes import Team
from hf_eagle3.stats import Speculation

ROOT = Path(__file__).parent.parent
ON_CPU = ("--dtype", "float32", "--device", "cpu", "--repeats", "1")
TINY = ["bench", "--shape", "tiny", "--prompt-length", "9", *ON_CPU]
SMALL = ["--batch-sizes", "1", "2", "--max-new-tokens", "16"]
KINDS = ["generate()", "our loop, no drafting", "our loop, drafting"]


def read(out: Path) -> tuple[str, dict]:
    return out.with_suffix(".md").read_text(encoding="utf-8"), json.loads(out.with_suffix(".json").read_text())


def test_tables_of_a_shape(tmp_path, capsys):
    out = tmp_path / "tables"
    assert cli.main([*TINY, *SMALL, "--simulate-acceptance-length", "2.5", "--out", str(out)]) == 0
    text, data = read(out)
    assert text == capsys.readouterr().out.rstrip("\n") + "\n"
    assert "acceptance length simulated at 2.5" in text
    assert "Compared with" not in text  # what a simulated draft says means nothing
    results = data["results"]
    assert [(r["kind"], r["batch_size"]) for r in results] == [(kind, size) for size in (1, 2) for kind in KINDS]
    for result in results:
        assert result["slowest"] <= result["tokens_per_second"] <= result["fastest"]
        assert f"{result['tokens_per_second']:.1f} (" in text
        if result["kind"] == KINDS[1]:  # nothing is simulated without a draft
            assert result["num_identical"] == result["num_rows"] == result["batch_size"]
        if result["kind"] == KINDS[2]:
            assert result["num_identical"] is None
    assert 1.5 < results[-1]["acceptance_length"] < 3.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench"], "Give one of --target and --shape"),
        (["bench", "--shape", "tiny", "--target", "x"], "Give one of --target and --shape"),
        (["bench", "--shape", "tiny"], "give --simulate-acceptance-length too"),
        (["bench", "--shape", "tiny", "--prompts", "x.jsonl"], "--prompts needs a tokenizer"),
        ([*TINY, "--simulate-acceptance-length", "2", "--dp-size", "0"], "at least 1; got 0"),
        ([*TINY, "--simulate-acceptance-length", "2", "--batch-sizes", "1", "0"], "--batch-sizes must be at least 1"),
    ],
)
def test_refusals_say_what_to_give(arguments, says, capsys):
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err


# ---- equal output ----


@pytest.fixture
def real(folders):  # noqa: F811  the fixture
    """The command over models in folders, with prompts."""
    lines = [{"prompt": "abc"[: i % 3 + 1] * (i + 1), "category": ["even", "odd"][i % 2]} for i in range(5)]
    (folders / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    models = ["--target", str(folders / "target"), "--drafter", str(folders / "drafter")]
    return ["bench", *models, *ON_CPU, "--prompts", str(folders / "prompts.jsonl"), "--max-new-tokens", "12"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "hi"}', r"questions.jsonl, prompt 2: expected `turns` or `prompt`"),
        ('{"turns": []}', r"questions.jsonl, prompt 2: expected `turns` or `prompt`"),
        ("[1]", r"questions.jsonl, prompt 2: expected `turns` or `prompt`"),
        ("{", r"questions.jsonl: expected a JSON object in each line"),
    ],
)
def test_what_is_no_prompt_is_said(line, message, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    device = torch.device("cpu")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "questions.jsonl", None, 1, device, Team(device), limit=None)


def test_a_model_that_is_no_drafter_is_refused(folders, capsys):  # noqa: F811  a fixture
    model = str(folders / "target")
    assert cli.main(["bench", "--target", model, "--drafter", model, "--device", "cpu", "--batch-sizes", "1"]) == 2
    assert "is a LlamaModel, and no EAGLE-3 drafter" in capsys.readouterr().err
    (folders / "p.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["--target", model, "--drafter", model, "--prompt-file", str(folders / "p.jsonl"), "--device", "cpu"]
    assert cli.main(["regenerate", *arguments, "--output-file", str(folders / "out.jsonl")]) == 2
    assert "is a LlamaModel, and no EAGLE-3 drafter" in capsys.readouterr().err
    assert not (folders / "out.jsonl").exists()


@pytest.mark.parametrize("temperature", ["0", "0.8"])
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


def test_output_that_differs_ends_the_bench(real, tmp_path, monkeypatch, capsys):
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

    monkeypatch.setattr(command, "make_ways", make_ways)
    assert cli.main([*real, "--batch-sizes", "3", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "our loop, drafting: prompt 4 differs from generate() at new token 7" in said
    assert "In float32 no difference is allowed" in said
    assert not (tmp_path / "out.md").exists()


def test_a_loop_that_accepts_whatever_is_drafted_is_caught(real, tmp_path, monkeypatch, capsys):
    def accept_all(draft_tokens, target_logits):
        K = draft_tokens.shape[1]
        return Verdict(torch.full((len(draft_tokens),), K), target_logits[:, K].argmax(-1))

    monkeypatch.setattr(decode, "accept_greedy", accept_all)
    assert cli.main([*real, "--batch-sizes", "2", "--out", str(tmp_path / "out")]) == 1
    assert "our loop, drafting: prompt 1 differs from generate() at new token 1: " in capsys.readouterr().err


def test_a_penalty_of_the_models_own_is_off(target, drafter):  # noqa: F811
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


def test_rounds_of_dflash_are_counted_by_forwards_of_the_target(target, drafter):  # noqa: F811
    class StandIn(torch.nn.Module):
        def spec_generate(self, target, input_ids, max_new_tokens, stop_token_ids, temperature):  # noqa: ARG002
            for _ in range(1 + 4):  # the prompt's, and four rounds of 3 tokens
                target(input_ids)
            return torch.cat([input_ids, input_ids.new_full((1, 1 + 4 * 3), 7)], dim=1)

    made = ways.make_ways(target, drafter.bind(target), temperature=0.0, dflash_drafter=StandIn())
    prompts = Prompts({"input_ids": make_prompt(5)}, ["all"], [1])
    call = made[ways.DFLASH](prompts, 13)
    result = measure.Measured(ways.DFLASH, 1, 1.0, 1.0, 1.0)
    with Team(torch.device("cpu")) as team:
        measure.add_acceptance(result, [call], [call], [prompts], team)
    assert result.acceptance_length == 3
    assert call.rows == [[7] * 13]


def test_dflash_that_fails_is_a_dash_with_its_reason(real, tmp_path, monkeypatch):
    class Broken(torch.nn.Module):
        def spec_generate(self, target, input_ids, max_new_tokens, stop_token_ids, temperature):  # noqa: ARG002, F811
            raise TypeError("crop() takes no such length")

    monkeypatch.setattr(command, "load_dflash", lambda *_, **__: Broken())
    further = ["--batch-sizes", "1", "--limit", "1", "--dflash-drafter", "x", "--kinds", "drafted"]
    assert cli.main([*real, *further, "--out", str(tmp_path / "out")]) == 0
    text, _ = read(tmp_path / "out")
    assert "| D-Flash | - [^1] |" in text
    assert "[^1]: TypeError: crop() takes no such length." in text


@pytest.mark.skipif(not hasattr(transformers, "MuseGlimmerAssistantModel"), reason="Transformers has no D-Flash")
def test_dflash_drafters_of_the_hosts_own(tmp_path, drafter):  # noqa: F811
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


def test_what_is_no_dflash_drafter_is_refused(folders):  # noqa: F811
    for name, says in (("nowhere", "cannot be loaded"), ("target", "LlamaModel is no D-Flash drafter")):
        with pytest.raises(ValueError, match=says) as caught:
            load_dflash(str(folders / name), dtype=torch.float32, device=torch.device("cpu"))
        assert "Expected: a repository or folder whose own code gives AutoModel a class with spec_generate" in str(
            caught.value
        )


# ---- several processes ----


@pytest.mark.any_release
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
    assert said.count("Tokens a second") == 1  # by one of them
    assert "2 processes, each with its share" in text
    for a, b in zip(one["results"], two["results"], strict=True):
        for name in ("kind", "num_rows", "num_identical", "acceptance_length", "by_category", "agreement"):
            assert a[name] == b[name], name
    assert two["results"][1]["agreement"] == {"num_rows": 5, "num_identical": 5, "largest_gap": 0.0}


@pytest.mark.any_release
def test_two_processes_share_the_target(real, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    further = ["--batch-sizes", "2", "--kinds", "stock", "drafted", "--out"]
    status = cli.main([*real, "--tp-size", "2", *further, str(tmp_path / "two")])
    said, errors = capfd.readouterr()
    assert status == 0, errors
    assert cli.main([*real, "--device-map", "cpu", *further, str(tmp_path / "one")]) == 0
    two, one = read(tmp_path / "two"), read(tmp_path / "one")
    assert said.count("Tokens a second") == 1
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
            *(make_target("llama"), {ways.PLAIN: decode}, [prompts]),
            batch_size=1,
            max_new_tokens=30,
            repeats=2,
            team=team,
        )
    assert found.slowest == found.tokens_per_second == (30 + 70) / 20.0


def test_a_round_takes_what_decoding_takes():
    """Of calls of 2 s for 10 rounds and 7 s for 30, prompts and all, a round takes 0.25 s."""

    def told(seconds, rounds):
        speculation = Speculation("own", "", 2, seconds=seconds, draft_seconds=seconds / 10)
        for _ in range(rounds):
            speculation.count(2, 1)
        return ways.Call(seconds, [[1]], speculation, None)

    result = measure.Measured(ways.DRAFTED, 1, 1.0, 1.0, 1.0, acceptance_length=2.0)
    measure.add_times(result, [told(7.0, 30)], [told(2.0, 10)], Team(torch.device("cpu")))
    text = report.to_markdown([result], title="t", notes=[])
    assert "| a round, ms | 250.00 |" in text
    assert "| of which draft, ms | 25.00 |" in text
    measure.add_times(result, [told(7.0, 28)], [], Team(torch.device("cpu")))
    assert "| a round, ms | 250.00 |" in report.to_markdown([result], title="t", notes=[])


def test_dp_size_must_be_what_was_launched(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main([*TINY, "--simulate-acceptance-length", "2", "--dp-size", "3"]) == 2
    assert "--dp-size 3, but 1 processes were launched" in capsys.readouterr().err


# ---- experts ----


@pytest.mark.parametrize(("E", "k", "M"), [(4, 2, 1), (4, 2, 3), (5, 1, 4), (5, 3, 2), (3, 3, 2)])
def test_distinct_experts_by_counting_all_choices(E, k, M):
    choices = list(itertools.combinations(range(E), k))
    counts = [len(set().union(*tokens)) for tokens in itertools.product(choices, repeat=M)]
    assert experts.expect_distinct(E, k, M) == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_experts_are_found_among_the_weights(family):
    model = make_target(family)
    found = experts.find_experts(model)
    assert experts.has_experts(model) == (family == "gpt_oss")
    if family == "llama":
        assert found is None
        return
    config = model.config
    H, width, E = config.hidden_size, config.intermediate_size, config.num_local_experts
    one = 4 * (H * 2 * width + 2 * width + width * H + H)  # with biases, in float32
    assert found == experts.Experts(
        E, config.num_experts_per_tok, config.num_hidden_layers, config.num_hidden_layers * E * one
    )


@pytest.mark.parametrize("bandwidth", [["--read-bandwidth", "2"], []], ids=["given", "measured"])
def test_account_of_expert_reads(tmp_path, bandwidth):
    make_target("gpt_oss").save_pretrained(tmp_path / "target")
    words = ["bench", "--target", str(tmp_path / "target"), *ON_CPU, "--prompt-length", "9", "--batch-sizes", "2"]
    words += ["--max-new-tokens", "8", "--simulate-acceptance-length", "2", "--num-draft-tokens", "2"]
    assert cli.main([*words, "--kinds", "plain", "drafted", *bandwidth, "--out", str(tmp_path / "out")]) == 0
    text, data = read(tmp_path / "out")
    plain, drafted = data["expert_reads"]
    assert (plain["num_tokens"], drafted["num_tokens"]) == (2, 6)
    found = experts.find_experts(AutoModelForCausalLM.from_pretrained(tmp_path / "target"))
    wanted = experts.expect_distinct(found.num_experts, found.num_chosen, 6)
    assert drafted["num_experts"] == wanted
    assert drafted["num_bytes"] == pytest.approx(found.num_bytes * wanted / found.num_experts)
    if bandwidth:
        assert drafted["milliseconds"] == pytest.approx(1e3 * drafted["num_bytes"] / 2e12)
        assert "Read bandwidth 2.00 TB/s, given." in text
    else:
        assert "TB/s, measured." in text
    speed, length = data["results"][1]["tokens_per_second"], data["results"][1]["acceptance_length"]
    assert drafted["measured_milliseconds"] == pytest.approx(1e3 * 2 * length / speed)
    assert f"| our loop, drafting | 2 | 6 | {wanted:.1f} |" in text
