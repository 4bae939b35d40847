"""Rows and numbers of training data, for people."""

import re

import numpy as np
import pytest
from helpers.chat import REASONING, assistant, make_tokenizer, user, write_rows
from transformers import GenerationConfig, LlamaConfig

from hf_eagle3 import cli
from hf_eagle3.training import TokenDataset
from hf_eagle3.training.data.preview import describe_dataset, format_row, num_spans

pytestmark = pytest.mark.any_release

ROW = {"messages": [user("hi"), assistant("yes\nno")]}


def test_supervised_text_is_in_brackets_or_in_colour():
    tokenizer = make_tokenizer()
    row = TokenDataset([ROW], tokenizer)[0]
    plain = format_row(row, tokenizer, color=False)
    assert plain == "<start>user\nhi<end>\n<start>assistant\n⟦yes\nno<end>⟧\n"
    colored = format_row(row, tokenizer, color=True)
    assert "\033[1;30;42myes\033[0m\n\033[1;30;42mno<end>\033[0m" in colored
    assert re.sub(r"\033\[[0-9;]*m", "", colored) == plain.replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize(("mask", "spans"), [("0110", 1), ("1011", 2), ("01", 1), ("010101", 3)])
def test_spans_are_counted(mask, spans):
    assert num_spans(np.array([letter == "1" for letter in mask])) == spans


def test_numbers_of_a_data_set():
    tokenizer = make_tokenizer(REASONING)
    rows = [
        {"messages": [user("a"), assistant("A"), user("b"), assistant("B")], "source": "chat"},
        {"input_ids": list(range(40)), "loss_mask": [0] * 4 + [1] * 36, "source": "list"},
        {"input_ids": list(range(80)), "loss_mask": [0] * 78 + [1] * 2},
    ]
    text = describe_dataset(TokenDataset(rows, tokenizer, max_length=60), len(tokenizer))
    assert re.search(r"^rows +3 kept of 4, made of 3 in the file$", text, re.MULTILINE)
    assert re.search(r"^cut +1 rows, 20 tokens$", text, re.MULTILINE)
    assert re.search(r"^left out +1 rows", text, re.MULTILINE)
    assert re.search(r"^supervised +\d+, [\d.]+% of the tokens, in 3 spans$", text, re.MULTILINE)
    assert re.search(r"^ *tokens +covers +chat +list$", text, re.MULTILINE)
    assert re.search(rf"^ *{len(tokenizer)} +100.00% +100.00% +100.00%$", text, re.MULTILINE)
    assert "tokens are few to choose a draft vocabulary by" in text


def test_coverage_that_is_low_is_marked():
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": [0, *rng.integers(0, 20000, 4000).tolist()], "loss_mask": [0] + [1] * 4000} for _ in range(5)
    ]
    text = describe_dataset(TokenDataset(rows), 20000)
    assert re.search(r"^ *8000 +\d\d\.\d\d% !$", text, re.MULTILINE)
    assert re.search(r"^ *20000 +100\.00%$", text, re.MULTILINE)
    assert "! is below 98%" in text


# ---- the command ----


@pytest.fixture
def folder(tmp_path):
    """A tokenizer and configs, no weights."""
    tokenizer = make_tokenizer(eos="<eos>")
    tokenizer.save_pretrained(tmp_path / "target")
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path / "target")
    GenerationConfig(eos_token_id=[*tokenizer.convert_tokens_to_ids(["<eos>", "<end>"])]).save_pretrained(
        tmp_path / "target"
    )
    write_rows(tmp_path / "rows.jsonl", [ROW] * 5)
    return tmp_path


def preview(folder, *arguments):
    return cli.main(
        ["data", "preview", "--target", str(folder / "target"), "--train_file", str(folder / "rows.jsonl"), *arguments]
    )


def test_the_command_shows_rows_and_numbers_without_weights(folder, capsys):
    assert preview(folder, "--rows", "2") == 0
    out = capsys.readouterr().out
    assert out.count("⟦yes\nno<end>⟧\n") == 2  # the end is in the generation config only
    assert "--- row 1 of 5: 29 tokens, 7 supervised in 1 spans" in out
    assert re.search(r"^ *300 +100.00%$", out, re.MULTILINE)
    assert preview(folder, "--rows", "0", "--color", "always", "--max_length", "25") == 0
    assert "\033" not in (out := capsys.readouterr().out)
    assert re.search(r"^cut +5 rows, 20 tokens$", out, re.MULTILINE)
    assert preview(folder, "--rows", "1", "--color", "always") == 0
    assert "\033[1;30;42myes\033[0m" in capsys.readouterr().out


def test_the_command_with_a_tokenizer_only(folder, capsys):
    for name in ("config.json", "generation_config.json"):
        (folder / "target" / name).unlink()
    assert preview(folder) == 0
    assert f"{len(make_tokenizer())}  100.00%" in capsys.readouterr().out


def test_the_command_names_what_it_cannot_read(folder, capsys):
    write_rows(folder / "rows.jsonl", [{"messages": [user("hi")]}])
    assert preview(folder) == 2
    assert "Row 5: A training conversation needs an assistant turn" in capsys.readouterr().err
    (folder / "rows.jsonl").unlink()
    assert preview(folder) == 2
    assert "rows.jsonl" in capsys.readouterr().err
    write_rows(folder / "rows.jsonl", [{"input_ids": [1, 2, 300], "loss_mask": [0, 1, 1]}])
    assert preview(folder) == 2
    assert "vocabulary is 0 to 299" in capsys.readouterr().err
