"""What training must keep to and no other file asks: positions, processes, scale, the Hub, and learning rows by heart."""

import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from helpers.chat import CHANNELS, CHATML, TRIMMED, assistant, make_tokenizer, user
from helpers.reference_drafter import DoubleRotary
from helpers.texts import PLACEHOLDER
from helpers.training import NEW, PROMPT, TINY, make_args, make_drafter, progressions
from helpers.unrolling import VARIANTS, batch_of, make, make_target, several_rows
from transformers import LlamaConfig, LlamaForCausalLM

from hf_eagle3 import Eagle3Trainer, Eagle3TrainingArguments
from hf_eagle3.training import TokenDataset
from hf_eagle3.training.loading import make_drafter as choose_and_make
from hf_eagle3.training.states.folder import fingerprint_data
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.step.batch import Collator
from hf_eagle3.training.step.unroll_rows import unroll_rows

pytestmark = pytest.mark.any_release

STEPS = 4


@pytest.fixture(scope="module")
def double_target():
    return make_target()


@pytest.fixture(scope="module")
def target():
    """Taught for three seconds, so that it is sure of what it says."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        ids = progressions(32, PROMPT + NEW, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows(target):
    """Its own greedy answers."""
    prompts = progressions(8, PROMPT, seed=1000)
    out = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False)
    return [{"input_ids": ids.tolist(), "loss_mask": [0] * PROMPT + [1] * (len(ids) - PROMPT)} for ids in out]


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_distances_between_positions_count(double_target, variant):
    """T-05: all positions of a batch moved by a constant, the same outputs of every step."""
    drafter = make(double_target, **VARIANTS[variant])
    batch = batch_of(*several_rows(), steps=STEPS, every_slot=drafter.config.num_hidden_layers > 1)
    drafter.rotary_emb = DoubleRotary(drafter.config)  # the host's own rounds angles to float32
    aux = torch.randn(len(batch.input_ids), 96, dtype=torch.float64)
    with torch.no_grad():
        outputs, moved, stretched = (
            unroll_rows(drafter, replace(batch, position_ids=positions), aux, STEPS)
            for positions in (batch.position_ids, batch.position_ids + 1000, batch.position_ids * 2)
        )
    torch.testing.assert_close(moved, outputs, atol=1e-10, rtol=0)
    assert ((stretched - outputs).abs().amax((1, 2)) > 1e-4).all()  # they are read at every step


def choose_vocabulary():
    """Of texts with many special tokens and ties, by all that a trainer does for a new drafter; and what the texts are."""
    tokenizer = make_tokenizer(CHANNELS)
    answers = [{**assistant(f"It is {i * i:b}."), "thinking": "Hm."} for i in range(40)]
    rows = [{"messages": [user(f"{i}?"), answer]} for i, answer in enumerate(answers)]
    ends = tokenizer.convert_tokens_to_ids(["<return>", "<call>"])
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": len(tokenizer), "eos_token_id": ends}))
    args = Eagle3TrainingArguments(draft_vocab_size=24, min_coverage=0.5, use_cpu=True, report_to=[])
    dataset = TokenDataset(rows, tokenizer)
    drafter = choose_and_make(model, args, dataset, tokenizer)
    return fingerprint_data(dataset), drafter.draft_to_target_ids.tolist()


@pytest.mark.parametrize(
    ("template", "beginning"),
    [(CHATML, ""), pytest.param(TRIMMED, "<bos>", marks=pytest.mark.slow)],
    ids=["chatml", "trimmed"],
)
def test_a_thousand_dialogues_are_what_an_engine_is_given(template, beginning):
    """T-21: ids of whole dialogues, and of the prompt before each answer, as a server renders and tokenises them."""
    tokenizer, generator = make_tokenizer(template), random.Random(0)
    letters = "abc xyz.,!?\n\t 'é日🙂{}<>"

    def text():
        return "".join(generator.choices(letters, k=generator.randint(1, 30))).strip() or "a"

    dialogues = []
    for i in range(1000):
        system = [{"role": "system", "content": text()}] if i % 3 == 0 and not beginning else []
        turns = [turn for _ in range(generator.randint(1, 3)) for turn in (user(text()), assistant(text()))]
        dialogues.append([*system, *turns])
    dataset = TokenDataset([{"messages": dialogue} for dialogue in dialogues], tokenizer, None)
    assert len(dataset) == 1000
    for dialogue, row in zip(dialogues, dataset, strict=True):
        served = tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=False)
        ids = row["input_ids"].tolist()
        assert ids == served[: len(ids)]
        assert not tokenizer.decode(served[len(ids) :]).strip()  # what nobody generates
        prompt = tokenizer.apply_chat_template(dialogue[:-1], add_generation_prompt=True, return_dict=False)
        assert ids[: len(prompt)] == prompt
        assert not row["loss_mask"][len(prompt) - 1]
        supervised = row["loss_mask"][len(prompt) :]
        assert supervised[: supervised.sum()].all()
        assert not tokenizer.decode(ids[len(prompt) + supervised.sum() :]).strip()


@pytest.mark.slow
def test_workers_may_be_spawned(rows):
    """T-37: what they need can be pickled, and gives the same batches there."""
    dataset, collator = (pickle.loads(pickle.dumps(x)) for x in (TokenDataset(rows, None, None), Collator(3)))
    ours, theirs = Collator(3)([*TokenDataset(rows, None, None)]), collator([*dataset])
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.depth, theirs.depth)


@pytest.mark.slow
def test_processes_choose_one_draft_vocabulary():
    """T-17, T-22: whatever order their sets have, which a process draws when it starts; and one rendering."""
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", f"import {__name__} as m; print(hash('order'), m.choose_vocabulary(), sep=';')"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": other},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    their_hash, theirs = done.stdout.strip().split(";")
    assert int(their_hash) != hash("order")
    assert theirs == str(choose_vocabulary())


class LopsidedStates(OnlineStates):
    """The states of the second boundary are ten thousand times those of the others."""

    def states(self, batch):
        states = super().states(batch)
        aux = states.aux_hidden_states.clone()
        aux.unflatten(-1, (3, -1))[:, 1] *= 1e4
        return states._replace(aux_hidden_states=aux)


@pytest.mark.slow
@pytest.mark.parametrize("norms", [{}, {"fc_norm": False, "norm_before_fc": True}], ids=["each", "together"])
def test_a_boundary_of_huge_states_does_not_stop_learning(target, rows, tmp_path, norms):
    """T-31: with norms before `fc`, losses stay finite and fall."""
    drafter = make_drafter(target, **norms)
    args = make_args(tmp_path, max_steps=40, logging_steps=1, lr_scheduler_type="constant")
    trainer = Eagle3Trainer(
        model=drafter, states=LopsidedStates(target, drafter.bound_aux_layer_ids), args=args, train_dataset=rows
    )
    trainer.train()
    losses = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses) == 40
    assert losses.isfinite().all()
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()


@pytest.mark.slow
def test_rows_are_learnt_by_heart(target, rows, tmp_path):
    """T-50: the first step is right, and the simulated acceptance length is nearly what it can be."""
    args = make_args(tmp_path, max_steps=80, learning_rate=1e-2, draft_vocab_size=44, eval_generate_prompts=0)
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    best = args.eval_depth + 1
    assert before["eval_accuracy_0"] < 0.5
    assert before["eval_simulated_acceptance_length"] < 0.5 * best
    assert metrics["eval_accuracy_0"] > 0.95
    assert 0.95 * best < metrics["eval_simulated_acceptance_length"] <= best


@pytest.mark.slow
def test_pushing_uploads_the_drafter_and_its_card(target, rows, tmp_path, monkeypatch):
    """T-44: a dry run; the Hub's calls are answered here."""
    created, uploaded = [], {}

    class Made:
        repo_id = "me/drafter"

    def create(*args, **_):
        created.append(args[-1])
        return Made

    def upload(*_, folder_path, **kwargs):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        uploaded.update(kwargs, files=files)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)

    args = make_args(tmp_path, hub_model_id="me/drafter", max_steps=1, save_strategy="steps", save_steps=1)
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    measured = trainer.evaluate()["eval_acceptance_length"]
    trainer.model.config.target_name_or_path = "some-owner/some-target"
    trainer.push_to_hub(commit_message="first", license="apache-2.0", language="en")

    assert created == ["me/drafter"]
    assert uploaded["repo_id"] == "me/drafter"
    assert uploaded["commit_message"] == "first"
    assert any("checkpoint-" in pattern for pattern in uploaded["ignore_patterns"])
    files = uploaded["files"]
    assert {"README.md", "config.json", "model.safetensors", "modeling_eagle3.py"} <= files.keys()
    assert len(files["model.safetensors"]) < 1.1 * sum(x.nbytes for x in trainer.model.state_dict().values()) + 4096
    card = files["README.md"].decode()
    assert not PLACEHOLDER.search(card)
    _, head, text = card.split("---\n", 2)
    fields = yaml.safe_load(head)
    assert fields["base_model"] == "some-owner/some-target"
    assert fields["library_name"] == "transformers"
    assert fields["pipeline_tag"] == "text-generation"
    assert fields["tags"] == ["eagle3", "eagle3.1", "speculative-decoding", "assisted-generation", "hf-eagle3"]
    assert (fields["license"], fields["language"]) == ("apache-2.0", "en")
    (result,) = fields["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(measured)
    assert f"| Acceptance length | {measured:g} |" in text
    assert 'AutoModel.from_pretrained("me/drafter"' in text
