"""A saved drafter runs from its folder alone, where hf-eagle3 is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.marks import slow_but
from helpers.paths import ROOT
from safetensors.torch import load_file, save_file

from hf_eagle3.modeling import Eagle3DrafterConfig, Eagle3DrafterModel, modeling_dflash
from hf_eagle3.modeling.modeling_eagle3 import REMOTE_CODE_FILES
from hf_eagle3.smollm2 import DRAFTER_FOLDER

MODELING = ROOT / "modeling"
V = 64
ALLOWED = {"torch", "safetensors", "huggingface_hub", "transformers", *sys.stdlib_module_names}
SCRIPT = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class NoLogitsToKeep(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **kwargs)


try:
    import hf_eagle3
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_eagle3 can be imported here, so this proves nothing")
folder, auto = sys.argv[1], {"AutoModel": AutoModel, "AutoModelForCausalLM": AutoModelForCausalLM}[sys.argv[2]]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "eagle3"
drafter = auto.from_pretrained(folder, trust_remote_code=True)
inputs = load_file(f"{folder}/../inputs.safetensors")
with torch.no_grad():
    out = drafter(inputs["ids"], aux_hidden_states=inputs["states"])
assert torch.equal(out.logits, inputs["logits"]), (out.logits - inputs["logits"]).abs().max()
assert torch.equal(drafter.draft_to_target_ids, inputs["draft_to_target_ids"])
assert drafter.generation_config.num_assistant_tokens == 5

drafter.save_pretrained(f"{folder}/../again")
again = auto.from_pretrained(f"{folder}/../again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(inputs["ids"], aux_hidden_states=inputs["states"]).logits, inputs["logits"])

weights = load_file(f"{folder}/model.safetensors")
save_file({name: t for name, t in weights.items() if name != "fc.weight"}, f"{folder}/../again/model.safetensors")
try:
    auto.from_pretrained(f"{folder}/../again", trust_remote_code=True)
except ValueError as error:  # of a module made for that folder
    assert type(error).__name__ == "CheckpointError" and "fc.weight is missing" in str(error)
else:
    raise SystemExit("a missing tensor went unnoticed")

def refused(call):
    try:
        call()
    except ImportError as error:
        assert "pip install hf-eagle3" in str(error) and "import hf_eagle3" in str(error), error
    else:
        raise SystemExit("drafting without hf_eagle3 went unnoticed")


sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 8}
forwards = []
for target in (LlamaForCausalLM(LlamaConfig(**sizes)), NoLogitsToKeep(LlamaConfig(**sizes))):
    target.register_forward_pre_hook(lambda *_: forwards.append(1))
    for options in ({}, {"do_sample": True}):
        refused(lambda: target.generate(inputs["ids"], assistant_model=drafter, max_new_tokens=4, **options))
refused(lambda: LlamaForCausalLM(LlamaConfig(**sizes)).generate(inputs["ids"].repeat(2, 1), assistant_model=drafter))
refused(lambda: drafter.generate(inputs["ids"]))
assert not forwards
print("all is well", type(drafter).__module__.split(".")[0])
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved drafter, and beside it inputs and the logits they give here."""
    config = Eagle3DrafterConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=V,
        draft_vocab_size=40,
        has_own_embeddings=True,
        fc_norm=True,
        norm_output=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    )
    drafter = Eagle3DrafterModel(config).eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_(0.5, 0.5)
    drafter.set_draft_to_target_ids(torch.randperm(V)[:40].sort().values)
    drafter.generation_config.num_assistant_tokens = 5
    drafter.save_pretrained(tmp_path / "drafter")
    ids, states = torch.randint(V, (1, 6)), torch.randn(1, 6, 96)
    with torch.no_grad():
        logits = drafter(ids, aux_hidden_states=states).logits
    tensors = {"ids": ids, "states": states, "logits": logits, "draft_to_target_ids": drafter.draft_to_target_ids}
    save_file(tensors, tmp_path / "inputs.safetensors")
    return tmp_path / "drafter"


def run_without_hf_eagle3(tmp_path: Path, script: str, *arguments: str) -> str:
    """What `script` prints where Python finds torch and Transformers, but not this repository, however installed."""
    paths = [p for p in sys.path if p and not (Path(p) / "hf_eagle3").exists() and "hf_eagle3" not in p]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    block = tmp_path / "site" / "hf_eagle3.py"
    block.parent.mkdir()
    block.write_text("raise ModuleNotFoundError('not installed in this test')")
    env["PYTHONPATH"] = os.pathsep.join([str(block.parent), *paths])
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    run = subprocess.run(
        [*command, "-c", script, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("auto", slow_but(["AutoModel"], ["AutoModel", "AutoModelForCausalLM"]))
def test_loads_in_a_fresh_process_without_hf_eagle3(auto, folder, tmp_path):
    assert "all is well transformers_modules" in run_without_hf_eagle3(tmp_path, SCRIPT, str(folder), auto)


@pytest.mark.slow
def test_the_shipped_drafter_loads_from_the_clone_and_saves_files(tmp_path):
    """There its code is links, which neither the host nor `save_pretrained` may pass on."""
    script = """
import sys
from pathlib import Path
from transformers import AutoModel

folder, saved = Path(sys.argv[1]), Path(sys.argv[2])
drafter = AutoModel.from_pretrained(folder, trust_remote_code=True)
drafter.save_pretrained(saved)
assert not [path for path in saved.iterdir() if path.is_symlink()]
again = AutoModel.from_pretrained(saved, trust_remote_code=True)
states = again.state_dict()
assert all(tensor.equal(states[name]) for name, tensor in drafter.state_dict().items())
print("all is well", type(again).__module__.split(".")[0])
"""
    out = run_without_hf_eagle3(tmp_path, script, str(DRAFTER_FOLDER), str(tmp_path / "saved"))
    assert "all is well transformers_modules" in out
    for name in REMOTE_CODE_FILES:
        assert (tmp_path / "saved" / name).read_bytes() == (MODELING / name).read_bytes()


def test_the_folder_holds_the_code_as_it_is_here(folder):
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        *REMOTE_CODE_FILES,
    }
    all_files = {f.name for f in MODELING.glob("*.py")} - {"__init__.py"}
    assert {*REMOTE_CODE_FILES, *modeling_dflash.REMOTE_CODE_FILES} == all_files
    for name in REMOTE_CODE_FILES:
        assert (folder / name).read_bytes() == (MODELING / name).read_bytes()


def test_config_json_points_at_classes_that_exist(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "eagle3"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        tree = ast.parse((folder / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("name", sorted({*REMOTE_CODE_FILES, *modeling_dflash.REMOTE_CODE_FILES, "__init__.py"}))
def test_modeling_imports_nothing_but_what_every_user_has(name):
    siblings = {f.stem for f in MODELING.glob("*.py")}
    for node in ast.walk(ast.parse((MODELING / name).read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED
        elif isinstance(node, ast.ImportFrom):
            # The host finds siblings by `from .name import`.
            assert node.level == 1
            assert node.module in siblings


def test_weights_are_saved_under_our_names(folder):
    names = load_file(folder / "model.safetensors").keys()
    assert "layers.0.hidden_norm.weight" in names
    assert {name.split(".")[0] for name in names} == {
        *("d2t", "embed_tokens", "fc", "fc_norm", "layers", "lm_head", "norm"),
    }
