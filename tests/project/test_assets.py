"""The drafter that comes with the package: complete, small, in step with the code, and its card says what was measured."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import hf_eagle3
from hf_eagle3.modeling.modeling_eagle3 import REMOTE_CODE_FILES

pytestmark = pytest.mark.any_release

ASSET = ROOT / "hf_eagle3" / "assets" / "smollm2-135m-instruct-eagle3"
RESULTS = ROOT / "benchmarks" / "results" / "smollm2_cpu_202611.json"


@pytest.fixture(scope="module")
def drafter():
    return AutoModel.from_pretrained(ASSET, dtype=torch.float32)


def test_size():
    sizes = {path.name: path.stat().st_size for path in ASSET.iterdir()}
    assert sum(sizes.values()) < 25_000_000
    assert all(size < 15_000_000 for size in sizes.values())


@pytest.mark.parametrize("name", REMOTE_CODE_FILES)
def test_remote_code_is_a_link_to_that_of_the_repository(name):
    """The folder loads where hf-eagle3 is not installed. Wheels and sdists hold files here: test_packaging.py."""
    assert (ASSET / name).is_symlink()
    assert (ASSET / name).readlink() == Path("../../../modeling") / name
    assert (ASSET / name).is_file()


def test_it_has_no_code_of_its_own():
    assert {path.name for path in ASSET.glob("*.py")} == set(REMOTE_CODE_FILES)


def test_it_is_an_eagle_3_1_drafter_for_smollm2(drafter):
    assert isinstance(drafter, hf_eagle3.Eagle3DrafterModel)
    assert drafter.config.fc_norm
    assert drafter.config.norm_output
    assert drafter.generation_config.num_assistant_tokens is None  # rounds choose
    ids = drafter.draft_to_target_ids
    assert 2 in ids  # end of turn
    assert all(p.isfinite().all() and p.abs().max() > 0 for p in drafter.parameters())


@pytest.mark.slow
def test_it_binds_to_a_target_of_smollm2s_shape_and_drafts(drafter):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    target = LlamaForCausalLM(config).eval()
    ids = torch.tensor([[1, 500, 600, 700]])
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)
    drafted = target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(plain, drafted)


def test_card_states_what_was_measured():
    card = (ASSET / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"TODO|TBD|\[More Information|\{\{", card)
    sets = json.loads(RESULTS.read_text())["sets"]
    for name, title in (
        ("mt_bench", "MT-Bench"),
        ("gsm8k", "GSM8K"),
        ("humaneval", "HumanEval"),
        ("alpaca", "Alpaca"),
    ):
        row = next(line for line in card.splitlines() if line.startswith(f"| {title} |"))
        for group in ("all", "not ending in a loop"):
            assert f"{sets[name][group]['acceptance_length']:.2f}" in row
    assert sets["mt_bench"]["all"]["acceptance_length"] >= 2.25
    same = sets["mt_bench"]["against plain"]
    assert same["identical"] == same["of"] >= 40
