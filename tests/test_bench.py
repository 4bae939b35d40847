"""`hf-eagle3 bench`: a small run of everything, and what it refuses."""

import json

import pytest

from hf_eagle3 import cli

TINY = [
    *("bench", "--shape", "tiny", "--dtype", "float32", "--device", "cpu", "--prompt-length", "9"),
    "--repeats",
    "1",
]
SMALL = ["--batch-sizes", "1", "2", "--max-new-tokens", "16"]


def test_tables_of_a_shape(tmp_path, capsys):
    out = tmp_path / "tables"
    assert cli.main([*TINY, *SMALL, "--simulate-acceptance-length", "2.5", "--out", str(out)]) == 0
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out.rstrip("\n") + "\n"
    assert "acceptance length simulated at 2.5" in text
    results = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["results"]
    kinds = ["generate()", "our loop, no drafting", "our loop, drafting"]
    assert [(r["kind"], r["batch_size"]) for r in results] == [(kind, size) for size in (1, 2) for kind in kinds]
    for result in results:
        assert result["slowest"] <= result["tokens_per_second"] <= result["fastest"]
        assert f"{result['tokens_per_second']:.1f} (" in text
        if result["kind"] == kinds[1]:  # nothing is simulated without a draft
            assert result["num_identical"] == result["num_rows"] == result["batch_size"]
    assert 1.5 < results[-1]["acceptance_length"] < 3.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench"], "Give one of --target and --shape"),
        (["bench", "--shape", "tiny", "--target", "x"], "Give one of --target and --shape"),
        (["bench", "--shape", "tiny"], "give --simulate-acceptance-length too"),
        (["bench", "--shape", "tiny", "--prompts", "x.jsonl"], "--prompts needs a tokenizer"),
    ],
)
def test_refusals_say_what_to_give(arguments, says, capsys):
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err
