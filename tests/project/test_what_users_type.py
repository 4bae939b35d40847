"""The first things that people type, in their order, as they type them.

Names are those of the Hub: the tests stand in a folder where tiny models lie under these names (`helpers/hub.py`). Each
row is a test of its own or says which one tests it.
"""

import importlib.util
import io
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.hub import copy_hub, make_hub
from helpers.texts import PLACEHOLDER
from helpers.training import TINY
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TextStreamer, pipeline

import hf_eagle3
from hf_eagle3 import Eagle3DrafterModel, cli

pytestmark = pytest.mark.any_release

TARGET, DRAFTER = "Qwen/Qwen3-8B", "AngelSlim/Qwen3-8B_eagle3"
QUICK_BENCH = "--batch-sizes 1 2 --max-new-tokens 8 --prompt-length 8 --repeats 1"  # what a test adds
README_BLOCK = """
import hf_eagle3
from transformers import AutoModelForCausalLM, AutoTokenizer, AutoModel
tok = AutoTokenizer.from_pretrained("Qwen/Qwen3-8B")
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B", dtype="auto", device_map="auto")
drafter = AutoModel.from_pretrained("AngelSlim/Qwen3-8B_eagle3", dtype="auto")
x = tok("Hello", return_tensors="pt").to(model.device)
print(tok.decode(model.generate(**x, assistant_model=drafter, max_new_tokens=100)[0]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def here(hub, monkeypatch):
    """Where people type, if what they type writes nothing."""
    monkeypatch.chdir(hub)


@pytest.fixture
def own(hub, tmp_path, monkeypatch):
    """Where people type what writes files."""
    monkeypatch.chdir(copy_hub(hub, tmp_path / "here"))


class Typed:
    """What a session has by its fourth line."""

    def __init__(self):
        self.tok = AutoTokenizer.from_pretrained(TARGET)
        self.model = AutoModelForCausalLM.from_pretrained(TARGET, dtype="auto", device_map="auto")
        self.drafter = AutoModel.from_pretrained(DRAFTER, dtype="auto")
        self.x = self.tok("Hello", return_tensors="pt").to(self.model.device)


@pytest.fixture(scope="module")
def session(hub):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(hub)
        return Typed()


def type_line(line: str) -> int:
    """The exit status of a line of `hf-eagle3`."""
    words = line.split()
    assert words[0] == "hf-eagle3"
    try:
        return cli.main(words[1:])
    except SystemExit as ended:
        return int(ended.code or 0)


# 1. `pip install hf-eagle3`: wheels are built and installed in test_packaging.py.


@pytest.mark.parametrize("line", ["hf-eagle3 --help", "hf-eagle3 env"])
def test_02_is_it_there(line, here, capsys):
    assert type_line(line) == 0
    assert "hf-eagle3" in capsys.readouterr().out


# `python -c "import hf_eagle3; ..."`: that importing says nothing is shown in test_imports.py.


def test_03_the_readmes_block(here, capsys):
    names: dict = {}
    exec(README_BLOCK, names)
    text = capsys.readouterr().out
    assert text == names["tok"].decode(names["model"].generate(**names["x"], max_new_tokens=100)[0]) + "\n"
    assert isinstance(names["drafter"], Eagle3DrafterModel)


def test_04_the_hubs_own_snippet(here):
    assert isinstance(AutoModelForCausalLM.from_pretrained("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"), Eagle3DrafterModel)


def test_05_is_it_faster(own, capsys):
    assert type_line("hf-eagle3 bench --model Qwen/Qwen3-8B --drafter AngelSlim/Qwen3-8B_eagle3 " + QUICK_BENCH) == 0
    out = capsys.readouterr().out
    assert "generate()" in out
    assert "acceptance" in out


def test_06_a_check_by_the_command_line(here, capsys):
    """Times on a busy machine mean nothing, so the text alone is looked at."""
    assert type_line("hf-eagle3 check Qwen/Qwen3-8B AngelSlim/Qwen3-8B_eagle3 --max-new-tokens 8") == 0
    assert "are the same, token for token" in capsys.readouterr().out


def test_06_is_it_the_same(session):
    a = session.model.generate(**session.x, do_sample=False, max_new_tokens=40)
    b = session.model.generate(**session.x, do_sample=False, max_new_tokens=40, assistant_model=session.drafter)
    assert torch.equal(a, b)


def test_07_a_chat(session):
    messages = [{"role": "user", "content": "hi"}]
    x = session.tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    plain = session.model.generate(**x, max_new_tokens=20)
    assert torch.equal(session.model.generate(**x, max_new_tokens=20, assistant_model=session.drafter), plain)


def test_07_a_chat_by_the_command_line(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/off\nhi\n/quit\n"))
    assert type_line("hf-eagle3 chat Qwen/Qwen3-8B --drafter AngelSlim/Qwen3-8B_eagle3 --max-new-tokens 8") == 0
    said = capsys.readouterr()
    assert "tok" in said.out + said.err  # tokens a second


def test_08_a_stream(session, capsys):
    out = session.model.generate(
        **session.x, assistant_model=session.drafter, max_new_tokens=20, streamer=TextStreamer(session.tok)
    )
    assert capsys.readouterr().out.strip() == session.tok.decode(out[0]).strip()


def test_09_a_sample(session):
    """That it has the target's distribution is shown in tests/speculation."""
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 20}
    out = session.model.generate(**session.x, assistant_model=session.drafter, **options)
    assert out.shape[1] > session.x["input_ids"].shape[1]


def test_10_a_batch(session):
    list_of_prompts = ["Hello", "a much longer prompt than that"]
    x = session.tok(list_of_prompts, padding=True, return_tensors="pt", padding_side="left")
    plain = session.model.generate(**x, max_new_tokens=20)
    assert torch.equal(session.model.generate(**x, max_new_tokens=20, assistant_model=session.drafter), plain)


def test_11_stop_strings(session):
    options = {"max_new_tokens": 60, "stop_strings": ["\n\n", "a", "e"], "tokenizer": session.tok}
    plain = session.model.generate(**session.x, **options)
    assert torch.equal(session.model.generate(**session.x, assistant_model=session.drafter, **options), plain)


# 12. JSON by a grammar, and 13. a target in 4 bits: test_extras.py.


def test_14_a_pipeline(here):
    made = pipeline("text-generation", model=TARGET, assistant_model=DRAFTER)
    plain = pipeline("text-generation", model=TARGET)
    assert made("Hello", max_new_tokens=20, do_sample=False) == plain("Hello", max_new_tokens=20, do_sample=False)


def test_15_a_static_cache(session):
    plain = session.model.generate(**session.x, max_new_tokens=20, cache_implementation="static")
    drafted = session.model.generate(
        **session.x, max_new_tokens=20, cache_implementation="static", assistant_model=session.drafter
    )
    assert torch.equal(drafted, plain)


def test_15_a_compiled_target_gets_a_line_of_advice(own, session):
    """Wherever it would be compiled again for each length of text, for minutes."""
    from hf_eagle3.training import ChatRenderer, Eagle3Trainer, store_states
    from hf_eagle3.training.data.prompts import Prompt
    from hf_eagle3.training.data.regenerate import Sampling, regenerate

    model = AutoModelForCausalLM.from_pretrained(TARGET)
    model.compile()
    drafter, rows = AutoModel.from_pretrained(DRAFTER), [{"input_ids": [3, 4, 5, 6], "loss_mask": [0, 1, 1, 1]}]
    prompts, renderer = [Prompt([{"role": "user", "content": "hi"}])], ChatRenderer(session.tok)
    calls = [
        lambda: model.generate(**session.x, assistant_model=drafter, max_new_tokens=5),
        lambda: hf_eagle3.doctor(model, drafter, tokenizer=session.tok),
        lambda: regenerate(model, renderer, prompts, Path("answers.jsonl"), Sampling((0,))),
        lambda: store_states(model, rows, "states"),
        lambda: Eagle3Trainer(target_model=model, train_dataset=rows),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"compiled at target.*target\._compiled_call_impl = None") as told:
            call()
        assert "\n" not in str(told.value)


def test_16_tuning(session):
    session.drafter.generation_config.num_assistant_tokens = 5
    out = session.model.generate(
        **session.x, assistant_model=session.drafter, max_new_tokens=20, return_dict_in_generate=True
    )
    assert len(out.speculation.acceptance_rate_by_depth) == 5


def test_17_why_so_slow(here, capsys):
    assert (
        type_line("hf-eagle3 doctor --model Qwen/Qwen3-8B --drafter AngelSlim/Qwen3-8B_eagle3 --max-new-tokens 8") == 0
    )
    assert "acceptance" in capsys.readouterr().out


def test_18_which_target_is_it_for(here, capsys):
    assert type_line("hf-eagle3 inspect AngelSlim/Qwen3-8B_eagle3") == 0
    assert re.search(
        r"^Target +Qwen3-8B, by the name Qwen3-8B_eagle3, a guess; ", capsys.readouterr().out, re.MULTILINE
    )


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_19_train_one(own, capsys):
    from datasets import load_dataset

    from hf_eagle3 import Eagle3Trainer

    trainer = Eagle3Trainer(
        target_model="Qwen/Qwen3-0.6B", train_dataset=load_dataset("trl-lib/Capybara", split="train")
    )
    trainer.train()
    logs = next(logs for logs in reversed(trainer.state.log_history) if "train_loss" in logs)
    assert logs["train_loss"] > 0


CAPYBARA = "--dataset_name trl-lib/Capybara --output_dir out"
SHORT = "--max_steps 2 --ttt_steps 2 --use_cpu --disable_tqdm True"  # what a test adds to what is typed


def test_20_train_by_the_command_line(own, capsys):
    line = f"hf-eagle3 train --target_model_name_or_path Qwen/Qwen3-8B {CAPYBARA} --bf16"
    assert type_line(f"{line} {SHORT} --save_steps 1") == 0
    said = capsys.readouterr()
    assert re.search(r" k trained weights, .* A device needs about .* MiB", said.err)  # a forecast in units that fit
    assert said.out.endswith("saved to out\n")
    # 22. Resume: the newest checkpoint.
    assert type_line(f"{line} {SHORT} --max_steps 3 --resume_from_checkpoint") == 0
    assert isinstance(AutoModel.from_pretrained("out"), Eagle3DrafterModel)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_20_what_four_bits_need_is_said_in_a_line(own, capsys):
    line = "hf-eagle3 train --target_model_name_or_path Qwen/Qwen3-8B --load_in_4bit"
    assert type_line(f"{line} {CAPYBARA} --bf16 {SHORT}") == 2
    assert re.search(r"error: .*bitsandbytes", capsys.readouterr().err)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_21_adapt_a_public_drafter_to_my_finetune(own):
    from peft import LoraConfig

    from hf_eagle3 import Eagle3Trainer, Eagle3TrainingArguments

    rows = [{"input_ids": list(range(30 + i, 50 + i)), "loss_mask": [0] * 4 + [1] * 16} for i in range(8)]
    args = Eagle3TrainingArguments(output_dir="out", max_steps=1, ttt_steps=2, use_cpu=True, disable_tqdm=True)
    trainer = Eagle3Trainer(
        model="public/drafter",
        target_model="me/finetune",
        peft_config=LoraConfig(),
        args=args,
        train_dataset=rows,
    )
    trainer.train()
    trainer.save_model()
    assert not PLACEHOLDER.search(Path("out/README.md").read_text())


def test_23_look_at_masks(here, capsys):
    assert type_line("hf-eagle3 data preview --dataset_name trl-lib/Capybara --tokenizer Qwen/Qwen3-8B") == 0
    assert "⟦yes\nno<end>⟧" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_24_serve_it_elsewhere(own, capsys, engine):
    assert type_line(f"hf-eagle3 export DRAFTER out --target Qwen/Qwen3-8B --to {engine}") == 0
    out = capsys.readouterr().out
    assert re.search(r"^(vllm serve|python -m sglang.launch_server --model-path) Qwen/Qwen3-8B ", out, re.MULTILINE)


@pytest.mark.parametrize("engine", ["trtllm", "gguf"])
def test_24_what_is_not_there_says_what_is(here, capsys, engine):
    assert type_line(f"hf-eagle3 export DRAFTER out --target Qwen/Qwen3-8B --to {engine}") == 2
    assert "speculators" in capsys.readouterr().err


def test_25_publish(own, monkeypatch):
    """Uploading itself is the host's."""
    from transformers import trainer as hosts

    from hf_eagle3 import Eagle3Trainer, Eagle3TrainingArguments

    uploaded = {}

    def upload(*, folder_path, repo_id, **_):
        uploaded.update(card=(Path(folder_path) / "README.md").read_text(), repo_id=repo_id)

    hub = types.SimpleNamespace(
        create_repo=lambda *_, **__: types.SimpleNamespace(repo_id="me/my-drafter"), upload_folder=upload
    )
    monkeypatch.setattr(hosts, "hf_api", lambda: hub)
    rows = [{"input_ids": list(range(30 + i, 50 + i)), "loss_mask": [0] * 4 + [1] * 16} for i in range(8)]
    args = Eagle3TrainingArguments(output_dir="my-drafter", max_steps=1, ttt_steps=2, use_cpu=True, disable_tqdm=True)
    target = AutoModelForCausalLM.from_pretrained(TARGET)
    target.config._name_or_path = "some-owner/some-target"  # as if it had come from the Hub
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    assert uploaded["repo_id"] == "me/my-drafter"
    assert "base_model: some-owner/some-target" in uploaded["card"]
    assert 'AutoModel.from_pretrained("me/my-drafter"' in uploaded["card"]
    assert not PLACEHOLDER.search(uploaded["card"])


# ---- 26. break it on purpose ----


def break_it(session, **changes):
    return session.model.generate(**{**session.x, "assistant_model": session.drafter, "max_new_tokens": 5, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_beams": 4}, ValueError, "num_beams"),
        (
            {"input_ids": torch.zeros(1, 0, dtype=torch.long), "attention_mask": torch.zeros(1, 0)},
            ValueError,
            "prompt is empty.*BOS",
        ),
        (
            {"input_ids": torch.tensor([[99999]]), "attention_mask": torch.ones(1, 1)},
            IndexError,
            "the token 99999, and LlamaForCausalLM has the tokens 0 to 267: make it with the target's own tokenizer",
        ),
    ],
    ids=["beams", "an empty prompt", "a wrong tokenizer"],
)
def test_26_what_cannot_be_is_said_in_a_line(session, changes, kind, message):
    with pytest.raises(kind, match=message) as told:
        break_it(session, **changes)
    assert "\n" not in str(told.value)


def test_26_a_wrong_target(session):
    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, "vocab_size": 300, "hidden_size": 48}))
    with pytest.raises(ValueError, match=r"target") as told:
        other.generate(**session.x, assistant_model=session.drafter, max_new_tokens=5)
    assert "\n" not in str(told.value)
