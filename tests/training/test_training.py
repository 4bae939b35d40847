"""Data, draft vocabulary and the trainer, on a tiny target that was taught some structure."""

import copy
import json
import types

import pytest
import torch
from helpers.texts import PLACEHOLDER, blocks_of
from helpers.training import (
    EOS,
    NEW,
    PROMPT,
    TINY,
    V,
    make_args,
    make_drafter,
    make_tokenizer,
    progressions,
    weights_of,
)
from huggingface_hub import ModelCard
from torch import nn
from transformers import (
    AutoModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_eagle3 import Eagle3DrafterModel, Eagle3Trainer


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):  # fewer leave near ties, where decoding and walking count differently
        ids = progressions(32, PROMPT + NEW, seed=step)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows(target):
    """The target's own greedy answers, token-native."""
    prompts = progressions(72, PROMPT, seed=1000)
    out = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False)
    lengths = [PROMPT + NEW - i % 7 for i in range(len(out))]  # ragged
    return [
        {"input_ids": ids[:n].tolist(), "loss_mask": [0] * PROMPT + [1] * (n - PROMPT)}
        for ids, n in zip(out, lengths, strict=True)
    ]


# ---- the trainer ----


@pytest.mark.slow
def test_it_learns_to_draft_and_its_acceptance_length_is_the_real_one(target, rows, tmp_path):
    """Trained on the target's answers, the drafter is accepted; `eval_acceptance_length` is what decoding gives."""
    before = {name: value.clone() for name, value in target.state_dict().items()}
    long = {"eval_generate_prompts": 16, "eval_max_new_tokens": NEW + 8}
    args = make_args(tmp_path, max_steps=120, per_device_train_batch_size=32, learning_rate=5e-3, **long)
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows[:64], eval_dataset=rows[64:])
    untrained = trainer.evaluate()["eval_acceptance_length"]
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_acceptance_length"] > untrained + 1
    assert metrics["eval_acceptance_length"] > 2.5
    assert metrics["eval_accuracy_0"] > 0.7

    def decode(row, max_new_tokens):
        prompt = torch.tensor([row["input_ids"][:PROMPT]])
        return target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            assistant_model=drafter,
            return_dict_in_generate=True,
        )

    drafter = trainer.model.eval()
    drafter.generation_config.num_assistant_tokens = args.eval_depth
    outs = [decode(row, len(row["input_ids"]) - PROMPT) for row in rows[64:]]
    assert [out.sequences[0].tolist() for out in outs] == [row["input_ids"] for row in rows[64:]]
    for name, spoken in (
        ("eval_walked_acceptance_length", outs),
        ("eval_acceptance_length", [decode(row, args.eval_max_new_tokens) for row in rows[64:]]),
    ):
        rounds = sum(out.speculation.rounds for out in spoken)
        accepted = sum(out.speculation.num_accepted for out in spoken)
        assert 1 + accepted / rounds == pytest.approx(metrics[name], abs=1e-9)
    # The target is as it was.
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 4), (4, 2), (1, 8)])
def test_accumulation_changes_nothing(target, rows, tmp_path, batch, accumulation):
    """Every supervised token weighs the same, however the rows of an update are split."""
    results = []
    for size, steps in ((8, 1), (batch, accumulation)):
        args = make_args(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            train_sampling_strategy="sequential",
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            warmup_steps=0,
        )
        trainer = Eagle3Trainer(
            model=make_drafter(target), target_model=target, args=args, train_dataset=copy.deepcopy(rows[:16])
        )
        trainer.train()
        results.append(weights_of(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=2e-5, rtol=0, msg=name)


def test_a_window_that_the_data_does_not_fill_counts_only_what_is_in_it(target, rows, tmp_path):
    """Ten rows, eight an update: the second update is the mean over two rows, not a quarter of it."""
    results = []
    for size, steps in ((8, 1), (2, 4)):
        args = make_args(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=-1,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            optim="sgd",  # Adam forgives a wrong scale
            learning_rate=0.1,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=0,
        )
        trainer = Eagle3Trainer(model=make_drafter(target), target_model=target, args=args, train_dataset=rows[:10])
        trainer.train()
        assert trainer.state.global_step == 2
        results.append(weights_of(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=0, msg=name)


def test_the_optimizer_holds_the_drafter_only(target, rows, tmp_path):
    trainer = Eagle3Trainer(target_model=target, args=make_args(tmp_path), train_dataset=rows[:8])
    held = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    assert not held & {id(p) for p in target.parameters()}


def test_training_leaves_the_configs_as_they_were(target, rows, tmp_path):
    """The host's Trainer would write its `use_cache`, and the tokenizer's special tokens, into what is saved."""
    other = copy.deepcopy(target)
    other.config.eos_token_id = [EOS, 3]
    drafter = make_drafter(other)
    trainer = Eagle3Trainer(
        model=drafter,
        target_model=other,
        args=make_args(tmp_path),
        train_dataset=rows,
        processing_class=make_tokenizer(),
    )
    drafter.generation_config.num_assistant_tokens = 4
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "use_cache" not in saved
    assert (saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]) == (0, [EOS, 3], EOS)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation.keys() == {"num_assistant_tokens", "transformers_version"}


def test_several_eval_sets_are_reported_by_name(target, rows, tmp_path):
    sets = {"easy": rows[:4], "hard": rows[4:8]}
    trainer = Eagle3Trainer(target_model=target, args=make_args(tmp_path), train_dataset=rows, eval_dataset=sets)
    assert {"eval_easy_acceptance_length", "eval_hard_acceptance_length"} <= trainer.evaluate().keys()


def test_loss_is_the_weighted_mean_over_supervised_slots(target, rows, tmp_path):
    trainer = Eagle3Trainer(
        model=make_drafter(target), target_model=target, args=make_args(tmp_path), train_dataset=rows[:8]
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    loss, sums = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    expected = sum(0.8**t * sums.loss[t] / sums.num_live[t] for t in range(3))
    torch.testing.assert_close(loss, expected)


def test_checkpoints_hold_the_drafter_only_and_load(target, rows, tmp_path):
    args = make_args(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows, processing_class=make_tokenizer())
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_eagle3.py", "tokenizer.json"} <= names
    loaded = AutoModel.from_pretrained(folder)
    assert isinstance(loaded, Eagle3DrafterModel)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not any("embed_tokens" in name for name in loaded.state_dict())
    assert loaded.config.eos_token_id == EOS


def read_card(folder):
    text = (folder / "README.md").read_text()
    assert not PLACEHOLDER.search(text), PLACEHOLDER.search(text)
    (snippet,) = (block.code for block in blocks_of(folder / "README.md") if block.language == "python")
    compile(snippet, "README.md", "exec")
    return ModelCard(text)


def test_every_save_leaves_a_filled_card(target, rows, tmp_path):
    args = make_args(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows[:8], eval_dataset=rows[:2])
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2", "elsewhere"):
        card = read_card(tmp_path / folder)
        assert card.data.base_model is None  # the target was made here
        assert f"# {folder.rpartition('/')[2]}\n" in card.text
        assert "An EAGLE-3.1 drafter for a llama model of 8 layers" in card.text
        assert "| Acceptance length | " in card.text
        assert f'AutoModel.from_pretrained("{tmp_path / folder}"' in card.text


def test_a_card_names_the_target_that_was_trained_for(target, rows, tmp_path, monkeypatch):
    """By its repository; never by a folder, though it may read like one, nor by the target of the drafter before."""
    monkeypatch.chdir(tmp_path)
    for name in ("some/target", "some/other"):
        target.save_pretrained(name)
    drafter = make_drafter(target)
    drafter.config.target_name_or_path = "Qwen/Qwen3-8B"
    known, other = map(LlamaForCausalLM.from_pretrained, ("some/target", "some/other"))
    trainer = Eagle3Trainer(model=drafter, target_model=known, args=make_args(tmp_path), train_dataset=rows[:8])
    assert trainer.model.config.target_name_or_path == "Qwen/Qwen3-8B"  # it may be a copy of that
    known.config._name_or_path = "me/finetune"
    trainer = Eagle3Trainer(model=drafter, target_model=known, args=make_args(tmp_path), train_dataset=rows[:8])
    trainer.save_model()
    assert read_card(tmp_path / "out").data.base_model == "me/finetune"
    trainer = Eagle3Trainer(target_model=other, args=make_args(tmp_path), train_dataset=rows[:8])
    trainer.save_model()
    card = read_card(tmp_path / "out")
    assert card.data.base_model is None
    assert "huggingface.co/some" not in card.text
    assert 'AutoModelForCausalLM.from_pretrained("some/other"' in card.text


def test_the_card_of_a_trained_drafter_is_whole(target, rows, tmp_path):
    args = make_args(tmp_path)
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    measured = trainer.evaluate()["eval_acceptance_length"]
    with pytest.raises(ValueError, match=r"set trainer\.model\.config\.target_name_or_path"):
        trainer.create_model_card()
    with pytest.raises(ValueError, match="has no dataset"):
        trainer.create_model_card(dataset="mine")
    trainer.model.config.target_name_or_path = "some-owner/some-target"
    trainer.hub_model_id = "me/drafter"
    trainer.create_model_card(license="apache-2.0")
    card = read_card(tmp_path / "out")
    assert card.data.base_model == "some-owner/some-target"
    assert card.data.license == "apache-2.0"
    assert f"| Acceptance length | {measured:g} |" in card.text
    assert 'AutoModel.from_pretrained("me/drafter"' in card.text


def test_resuming_ends_where_an_uninterrupted_run_ends(target, rows, tmp_path):
    whole = Eagle3Trainer(
        model=make_drafter(target), target_model=target, args=make_args(tmp_path, max_steps=6), train_dataset=rows
    )
    whole.train()
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    first = Eagle3Trainer(
        model=make_drafter(target), target_model=target, args=make_args(tmp_path, **settings), train_dataset=rows
    )
    first.train()
    again = Eagle3Trainer(
        model=make_drafter(target), target_model=target, args=make_args(tmp_path, **settings), train_dataset=rows
    )
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_best_checkpoint_is_chosen_by_acceptance(target, rows, tmp_path):
    args = make_args(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_acceptance_length",
        greater_is_better=True,
    )
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows[:64], eval_dataset=rows[64:])
    trainer.train()
    seen = [log["eval_acceptance_length"] for log in trainer.state.log_history if "eval_acceptance_length" in log]
    assert trainer.state.best_metric == max(seen)
    best = AutoModel.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(best[name], value) for name, value in trainer.model.state_dict().items())


def test_a_given_drafter_keeps_its_vocabulary_and_starts_where_it_was(target, rows, tmp_path):
    first = Eagle3Trainer(
        model=make_drafter(target),
        target_model=target,
        args=make_args(tmp_path, max_steps=20),
        train_dataset=rows,
        eval_dataset=rows[:16],
    )
    untrained = first.evaluate()
    first.train()
    first.save_model()
    learnt = first.evaluate()
    assert learnt["eval_accuracy_0"] > untrained["eval_accuracy_0"]

    source = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = source.draft_to_target_ids
    args = make_args(tmp_path, draft_vocab_size=7)
    again = Eagle3Trainer(model=source, target_model=target, args=args, train_dataset=rows, eval_dataset=rows[:16])
    metrics = again.evaluate()
    names = [name for name in learnt if "accuracy" in name or "acceptance" in name]
    assert {name: metrics[name] for name in names} == {name: learnt[name] for name in names}
    again.train()
    assert torch.equal(again.model.draft_to_target_ids, ids)
    assert again.model.config.draft_vocab_size == 40


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "qwen3", "bf16", "eager"])
def test_other_targets_and_settings_train(target, rows, tmp_path, family):
    torch.manual_seed(0)
    changes, attention = {}, "sdpa"
    if family == "gemma3":
        config = Gemma3TextConfig(**TINY, sliding_window=4, query_pre_attn_scalar=8, final_logit_softcapping=30.0)
        target = Gemma3ForCausalLM(config).eval()
    elif family == "gpt_oss":
        target = GptOssForCausalLM(
            GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
        ).eval()
    elif family == "qwen3":
        target = Qwen3ForCausalLM(Qwen3Config(**TINY)).eval()
    elif family == "bf16":
        changes["bf16"] = True
    else:
        attention = "eager"
    drafter = make_drafter(target)
    drafter.set_attn_implementation(attention)
    trainer = Eagle3Trainer(
        model=drafter, target_model=target, args=make_args(tmp_path, **changes), train_dataset=rows[:16]
    )
    before = weights_of(drafter)
    trainer.train()
    assert all(value.isfinite().all() for value in drafter.state_dict().values())
    assert all(p.dtype == torch.float32 for p in drafter.parameters())
    assert not torch.equal(before["fc.weight"], drafter.fc.weight)
    assert all(parameter.grad is None for parameter in target.parameters())


def test_eager_and_sdpa_give_one_loss(target, rows, tmp_path):
    losses = []
    for attention in ("eager", "sdpa"):
        drafter = make_drafter(target)
        drafter.set_attn_implementation(attention)
        trainer = Eagle3Trainer(
            model=drafter, target_model=target, args=make_args(tmp_path), train_dataset=rows[:8], eval_dataset=rows[:8]
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_evaluate_takes_rows_as_the_constructor_does(target, rows, tmp_path):
    trainer = Eagle3Trainer(
        model=make_drafter(target),
        target_model=target,
        args=make_args(tmp_path),
        train_dataset=rows,
        eval_dataset=rows[:4],
    )
    assert trainer.evaluate(eval_dataset=rows[:4])["eval_loss"] == trainer.evaluate()["eval_loss"]


# ---- bad input ----


def test_bad_input_is_refused(target, rows, tmp_path):
    args = make_args(tmp_path)
    with pytest.raises(ValueError, match="needs target_model"):
        Eagle3Trainer(args=args, train_dataset=rows)
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        Eagle3Trainer(
            model=make_drafter(target).to(torch.bfloat16), target_model=target, args=args, train_dataset=rows
        )
    other = LlamaForCausalLM(LlamaConfig(**{**TINY, "hidden_size": 16, "head_dim": 4}))
    with pytest.raises(ValueError, match="hidden size 16, and this one has 32"):
        Eagle3Trainer(model=make_drafter(other), target_model=target, args=args, train_dataset=rows)
    with pytest.raises(ValueError, match="train_dataset"):
        Eagle3Trainer(target_model=target, args=args)
    drafter = make_drafter(target)
    drafter.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        Eagle3Trainer(model=drafter, target_model=target, args=args, train_dataset=rows)
    # Nothing of this spoils the target or the data.
    Eagle3Trainer(target_model=target, args=args, train_dataset=rows).train()


def test_several_gpus_in_one_process_are_refused_with_what_to_type(target, rows, tmp_path):
    several = types.SimpleNamespace(**{**vars(make_args(tmp_path)), "n_gpu": 2})
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*accelerate launch --num_processes 2"):
        Eagle3Trainer(target_model=target, args=several, train_dataset=rows)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("ttt_steps", 0, "ttt_steps"), ("ttt_decay", 0.0, "ttt_decay"), ("eval_depth", 0, "eval_depth")],
)
def test_arguments_are_checked(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **{field: value})


def test_tokens_of_another_tokenizer_are_refused(target, rows, tmp_path):
    for token, says in (
        (V, "vocabulary is 0 to 47"),
        (-1, "0 or more, got -1 to 7. Make the rows with the target's own"),
    ):
        bad = {"input_ids": [5, 6, 7, token], "loss_mask": [0, 0, 1, 1]}
        with pytest.raises(ValueError, match=says):
            Eagle3Trainer(target_model=target, args=make_args(tmp_path), train_dataset=[*rows, bad])


# ---- a tokenizer with a chat template ----


# ---- new drafters ----


def test_a_new_drafter_takes_after_its_target(target):
    drafter = make_drafter(target)
    config = drafter.config
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (32, 8, 2)
    assert config.fc_norm
    assert config.norm_output
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, EOS, EOS)
    assert drafter.dtype == torch.float32
    assert torch.equal(drafter.lm_head.weight, target.lm_head.weight[torch.arange(2, 42)])
    assert isinstance(drafter.fc, nn.Linear)
    json.dumps(config.to_dict())
