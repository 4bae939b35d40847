"""The example of reinforcement learning, on tiny models, where TRL is installed."""

import importlib.util
import json
import sys

import pytest
import torch
from helpers.models import count_hooks
from helpers.paths import ROOT
from helpers.training import TINY, make_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_eagle3
from hf_eagle3.decoding import phases
from hf_eagle3.host.attaching import find_attached
from hf_eagle3.training import new_drafter

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_grpo", ROOT / "examples" / "grpo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path):
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**TINY))
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    new_drafter(target, torch.arange(48)).save_pretrained(tmp_path / "drafter")
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in ("hi", "be kind", "yes no", "no")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    options = {
        "target": tmp_path / "target",
        "drafter": tmp_path / "drafter",
        "prompt_file": tmp_path / "prompts.jsonl",
        "output_dir": tmp_path / "out",
        "refresh_every": 2,
        "drafter_learning_rate": 1e-2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_roll_outs_are_drafted_and_the_drafter_learns_from_them(example, arguments, tmp_path, monkeypatch):
    drafted = []
    propose = phases.Phases.draft
    monkeypatch.setattr(phases.Phases, "draft", lambda self: drafted.append(self.shape.num_nodes) or propose(self))
    trainer = example.main(arguments)
    assert any(drafted)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    attached = find_attached(policy, {}).drafter
    begun = AutoModel.from_pretrained(tmp_path / "drafter")
    learnt = AutoModel.from_pretrained(tmp_path / "out" / "drafter")
    changed = [not torch.equal(a, b) for a, b in zip(begun.parameters(), learnt.parameters(), strict=True)]
    assert any(changed)
    for served, saved in zip(attached.parameters(), learnt.parameters(), strict=True):
        assert torch.equal(served, saved)
    assert len(trainer.rollouts) == 12
    assert all(p.requires_grad for p in policy.parameters())  # the drafter's trainer freezes its target
    assert policy.training
    assert count_hooks(policy) == 0
    assert not any("drafter" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict())
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "target").state_dict()
    assert any(not torch.equal(value, moved[name]) for name, value in policy.state_dict().items())


def test_log_probabilities_are_those_without_a_drafter(example, arguments):
    trainer = example.main(arguments)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    given = (trainer.model, ids, torch.ones_like(ids), 4)
    drafted = trainer._get_per_token_logps_and_entropies(*given)[0]
    hf_eagle3.detach(trainer.accelerator.unwrap_model(trainer.model))
    assert torch.equal(trainer._get_per_token_logps_and_entropies(*given)[0], drafted)
