"""Which target a drafter was made for, by its config, its card and its names."""

import pytest
from helpers.layouts import as_speculators, make_config, make_weights, write
from helpers.models import drafter_config

from hf_eagle3 import CheckpointError
from hf_eagle3.checkpoints.describe import describe_drafter
from hf_eagle3.checkpoints.target_name import NamedTarget, find_target, guess_target, read_base_model


def describe(folder, config, card=None):
    write(folder, config, make_weights())
    if card is not None:
        (folder / "README.md").write_text(card)
    return describe_drafter(folder)


def test_the_config_counts_more_than_the_card_and_the_card_more_than_the_name(tmp_path):
    card = "---\nlibrary_name: transformers\nbase_model: card/Target-8B\n---\n"
    by_config = describe(tmp_path / "Name-8B-eagle3", as_speculators(), card)
    assert by_config.target == ("some-owner/some-target", "config.json: speculators_config.verifier.name_or_path")
    by_card = describe(tmp_path / "Name-8B_eagle3", make_config(), card)
    assert by_card.target == ("card/Target-8B", "README.md: base_model")
    assert "Target   card/Target-8B, by README.md: base_model; hidden size 16, 50 tokens" in by_card.head
    by_name = describe(tmp_path / "Other-8B_eagle3", make_config())
    assert by_name.target == ("Other-8B", "the name Other-8B_eagle3, a guess")
    assert by_name.to_dict()["target"] == {"name": "Other-8B", "from": "the name Other-8B_eagle3, a guess"}
    assert (
        "Target   not named; hidden size 16, 50 tokens" in (unnamed := describe(tmp_path / "run", make_config())).head
    )
    assert unnamed.to_dict()["target"] is None


def test_names_of_weight_files_are_looked_at_last():
    names = ["run", "model-00001-of-00002", "qwen3-8b-eagle3"]
    assert find_target(drafter_config(), {}, None, names) == NamedTarget(
        "qwen3-8b", "the name qwen3-8b-eagle3, a guess"
    )


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("base_model: a/b", "a/b"),
        ("base_model:\n- a/b\n- c/d", "a/b"),
        ("base_model:\n  - 'a/b'", "a/b"),
        ('base_model: ["a/b", c/d]', "a/b"),
        ("base_model: gpt2  # small", "gpt2"),
        ("base_model: /home/me/models/x", None),
        ("base_model: ../x", None),
        ("base_model:", None),
        ("library_name: base_model\nx: {base_model: a/b}", None),
        ("base_model: a/b; touch x", None),
    ],
)
def test_cards_heads(head, name, tmp_path):
    (card := tmp_path / "README.md").write_text(f"---\nlicense: mit\n{head}\n---\nbase_model: no/head\n")
    assert read_base_model(card) == name


@pytest.mark.parametrize("text", ["", "base_model: a/b\n", "---\nbase_model: a/b\n", "\xff\xfe", "---\n" * 99999])
def test_what_is_no_head_names_nothing(text, tmp_path):
    (card := tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert read_base_model(card) is None


def test_a_card_that_is_a_link_out_of_the_folder_is_not_read(tmp_path):
    (secret := tmp_path / "secret").write_text("---\nbase_model: a/b\n---\n")
    (folder := tmp_path / "drafter").mkdir()
    (folder / "README.md").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link to"):
        describe(folder, make_config())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("Qwen3-8B_eagle3", "Qwen3-8B"),
        ("EAGLE3-LLaMA3.1-Instruct-8B", "LLaMA3.1-Instruct-8B"),
        ("specdrift-gpt-oss-120b-eagle3", "gpt-oss-120b"),
        ("Qwen3-8B-speculator.eagle3", "Qwen3-8B"),
        ("kimi-k2.5-mla-eagle-3.1", "kimi-k2.5"),
        ("gpt-oss-120b-P-EAGLE", "gpt-oss-120b"),
        ("smollm2-135m-instruct-eagle3", "smollm2-135m-instruct"),
        ("my-drafter", None),
        ("eagle3", None),
        ("checkpoint-500", None),
        ("out", None),
        ("model-00001-of-00002", None),
        ("run2", None),
        ("", None),
    ],
)
def test_names_of_drafters(name, target):
    assert guess_target(name) == target
