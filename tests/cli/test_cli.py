"""The command line, on tiny models."""

import importlib.util
import json
import re
from dataclasses import fields

import pytest
import torch
from helpers.layouts import LAYOUTS, write
from transformers import AutoConfig, AutoModel

from hf_eagle3 import Eagle3DrafterModel, __version__, cli
from hf_eagle3.checkpoints.describe import describe_drafter
from hf_eagle3.cli.env import OPTIONAL_PACKAGES
from hf_eagle3.console.installed import installed_version
from hf_eagle3.modeling.fields_eagle3 import Eagle3Fields

pytestmark = pytest.mark.any_release


# ---- checkpoints ----


def test_inspect_our_own_layout(folders, capsys):
    assert cli.main(["inspect", str(folders / "drafter")]) == 0
    out = capsys.readouterr().out
    assert "an EAGLE-3 drafter, flavour hf-eagle3" in out
    assert re.search(r"^hidden_size +32 +config.json: hidden_size$", out, re.MULTILINE)
    assert re.search(r"^SGLang +yes +hf-eagle3 export --to sglang$", out, re.MULTILINE)


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
        r"SGLang +NO +norm_before_residual=True: its residual is never normed",
        r"vLLM +yes +hf-eagle3 export --to vllm",
    ):
        assert re.search(rf"^{line}", out, re.MULTILINE), line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_agrees_with_loading(layout, tmp_path):
    published, weights, _ = LAYOUTS[layout]
    description = describe_drafter(write(tmp_path, published, weights))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {
        name: getattr(description.config, name) for name in tuple(field.name for field in fields(Eagle3Fields))
    } == {name: getattr(loaded, name) for name in tuple(field.name for field in fields(Eagle3Fields))}
    assert description.sources.keys() >= {"hidden_size", "num_attention_heads", "vocab_size", "rope_parameters"}


def test_inspect_as_json(folders, capsys):
    assert cli.main(["inspect", str(folders / "drafter"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flavour"] == "hf-eagle3"
    assert found["fields"]["hidden_size"] == {"value": 32, "from": "config.json: hidden_size"}
    assert found["tensors"]["norm.weight"] == [32]
    assert found["refusals"]["sglang"] == []


def test_inspect_what_is_no_drafter(folders, capsys):
    assert cli.main(["inspect", str(folders / "target")]) == 2
    assert "not an EAGLE-3 drafter, by its keys (model_type 'llama')" in capsys.readouterr().err
    (folders / "nothing").mkdir()
    assert cli.main(["inspect", str(folders / "nothing")]) == 2
    assert "there is no config.json" in capsys.readouterr().err


def test_doctor_and_its_pin(folders, capsys):
    arguments = ["doctor", "--target", str(folders / "target"), "--drafter", str(folders / "drafter")]
    status = cli.main(
        [
            *arguments,
            "--max-new-tokens",
            "12",
            "--num-draft-tokens",
            "2",
            "--prompt",
            "abc",
            "--pin",
            str(folders / "pin"),
        ]
    )
    out = capsys.readouterr().out
    assert re.search(r"^reading +acceptance length +agrees at 1 +agrees at 2$", out, re.MULTILINE)
    assert status == ("NOT the best" in out)
    assert f"The drafter is in {folders / 'pin'}" in out
    assert type(AutoModel.from_pretrained(folders / "pin")) is Eagle3DrafterModel
    assert cli.main([*arguments, "--pin", str(folders / "drafter")]) == 2  # its weights are mapped from there
    assert "is not empty" in capsys.readouterr().err


def test_doctor_as_json(folders, capsys):
    arguments = ["doctor", str(folders / "target"), str(folders / "drafter"), "--prompt", "abc", "--json"]
    status = cli.main([*arguments, "--max-new-tokens", "12", "--num-draft-tokens", "2"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert status == (not found["is_declared_best"])
    assert found["declared"]["acceptance_length"] >= 1
    assert len(found["readings"][0]["rates_by_depth"]) == 2
    assert "The target answers ..." in err
    assert "Reading the drafter in other ways ..." in err


def test_drift_as_tables_and_as_files(folders, capsys):
    arguments = ["drift", str(folders / "target"), str(folders / "drafter"), "--prompt", "abc", "--noise", "0.5"]
    arguments += ["--windows", "4", "--num-draft-tokens", "3", "--max-new-tokens", "12"]
    assert cli.main([*arguments, "--out", str(folders / "drift")]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^depth +accepted +RMS fed in +to sink +to prompt +to generated +to own", out, re.MULTILINE)
    assert re.search(r"^noise: 0.5 of the RMS +\d+ +\d\.\d{3}", out, re.MULTILINE)
    assert re.search(r"^window: 4 positions +\d+", out, re.MULTILINE)
    assert "Drafting behind every position" in err
    written = json.loads((folders / "drift" / "drift.json").read_text())
    if importlib.util.find_spec("matplotlib") is not None:
        assert (folders / "drift" / "drift.png").stat().st_size > 10_000
    assert cli.main([*arguments, "--json", "--vary", "noise", "window", "--contexts", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["depths"] == written["depths"]
    assert [len(found[kind]) for kind in ("noise", "window", "context")] == [1, 1, 1]
    assert "rendering" not in found
    assert cli.main([*arguments, "--out", str(folders / "drift")]) == 2
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


def test_env_as_json(capsys):
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert all((facts[name] is None) == (installed_version(name) is None) for name in OPTIONAL_PACKAGES)


def test_package_that_is_not_there_is_said(capsys):
    assert installed_version("no-such-package-at-all") is None
    assert cli.main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert all((lines[name] == "not installed") == (installed_version(name) is None) for name in OPTIONAL_PACKAGES)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"hf-eagle3 {__version__}\n"
