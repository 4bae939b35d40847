"""The examples, as typed, on a tiny model: the target answers, a drafter is trained, and it drafts."""

import gzip
import importlib.util
import json
import sys

import pytest
import torch
from helpers.paths import ROOT
from helpers.training import TINY, make_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.any_release

EXAMPLES = ROOT / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny target with a tokenizer, and prompts."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("target")
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    prompts = [
        {"prompt": "hi"},
        {"turns": ["yes no", "kind"]},
        {"messages": [{"role": "user", "content": "be kind"}]},
    ]
    (place / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts * 3))
    return place


def regenerate(folder, out, **options):
    arguments = ["--target_model_name_or_path", str(folder), "--prompt_file", str(folder / "prompts.jsonl")]
    arguments += ["--output_file", str(out), "--device", "cpu", "--max_new_tokens", "12", "--batch_size", "4"]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    load_example("regenerate").main(arguments)
    with gzip.open(out, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_regenerate_then_finetune(folder, tmp_path):
    rows = regenerate(folder, tmp_path / "answers.jsonl.gz", temperature=0)
    assert {row["prompt_id"] for row in rows} == set(range(9))
    assert rows[0].keys() >= {"input_ids", "loss_mask", "temperature", "finish"}
    target = AutoModelForCausalLM.from_pretrained(folder)
    for row in rows:  # the last answer of each row is what the target says by itself, without padding
        end = len(row["input_ids"])
        start = end - row["loss_mask"][::-1].index(0)
        ids = torch.tensor([row["input_ids"][:start]])
        alone = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert alone[0].tolist() == row["input_ids"]

    arguments = ["--target_model_name_or_path", str(folder), "--train_file", str(tmp_path / "answers.jsonl.gz")]
    arguments += ["--eval_file", str(tmp_path / "answers.jsonl.gz"), "--output_dir", str(tmp_path / "drafter")]
    arguments += ["--draft_vocab_size", "32", "--ttt_steps", "2", "--max_steps", "2", "--report_to", "none"]
    arguments += ["--per_device_train_batch_size", "4", "--save_strategy", "no", "--use_cpu", "--disable_tqdm", "True"]
    arguments += ["--eval_max_new_tokens", "8"]
    load_example("finetune").main(arguments)
    drafter = AutoModel.from_pretrained(tmp_path / "drafter")
    assert drafter.config.draft_vocab_size == 32
    assert (tmp_path / "drafter" / "tokenizer.json").exists()
    ids = torch.tensor([rows[0]["input_ids"][:5]])
    plain = target.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=drafter))

    again = [*arguments, "--drafter_name_or_path", str(tmp_path / "drafter"), "--draft_vocab_size", "7"]
    trainer = load_example("finetune").main(again)
    assert torch.equal(trainer.model.draft_to_target_ids, drafter.draft_to_target_ids)


def test_regenerate_goes_on_where_it_stopped(folder, tmp_path):
    whole = regenerate(folder, tmp_path / "whole.jsonl.gz", temperature=0)
    part = tmp_path / "part.jsonl.gz"
    with gzip.open(part, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in whole[:4])
    assert regenerate(folder, part, temperature=0) == whole


def test_regenerate_goes_on_after_a_cut_in_the_middle_of_a_row(folder, tmp_path):
    whole = regenerate(folder, tmp_path / "whole.jsonl.gz", temperature=0)
    part = tmp_path / "part.jsonl.gz"
    with gzip.open(part, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in whole[:4])
    second = gzip.compress("".join(json.dumps(row) + "\n" for row in whole[4:8]).encode())
    part.write_bytes(part.read_bytes() + second[: len(second) // 2])
    assert regenerate(folder, part, temperature=0) == whole


def test_regenerate_samples_several_answers(folder, tmp_path):
    out = tmp_path / "rows.jsonl.gz"
    rows = regenerate(folder, out, temperature=1.0, top_p=0.9, num_return_sequences=2)
    wanted = [
        (i, k) for i in range(9) for k in range(2)
    ]  # a dialogue that tokens sampled anew rewrite has several rows
    assert list(dict.fromkeys((row["prompt_id"], row["sample"]) for row in rows)) == wanted
    answered = [[row["input_ids"] for row in rows if row["sample"] == k] for k in range(2)]
    assert answered[0] != answered[1]
    kept = [row for row in rows if row["prompt_id"] < 4]
    with gzip.open(out, "wt") as file:  # interrupted between two answers to one prompt
        file.writelines(json.dumps(row) + "\n" for row in rows[: len(kept) + 1])
    again = regenerate(folder, out, temperature=1.0, top_p=0.9, num_return_sequences=2)
    assert again[: len(kept)] == kept
    assert list(dict.fromkeys((row["prompt_id"], row["sample"]) for row in again)) == wanted
    with pytest.raises(ValueError, match="num_return_sequences 2"):
        regenerate(folder, tmp_path / "greedy.jsonl.gz", temperature=0, num_return_sequences=2)
