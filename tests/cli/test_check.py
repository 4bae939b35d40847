"""`hf-eagle3 check`, on tiny models."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers.models import make_target
from helpers.tokenizers import tokenizer as make_words

from hf_eagle3 import cli
from hf_eagle3.bench.check import Check, Difference, find_differences
from hf_eagle3.bench.side_by_side import Comparison, Run, answer, encode
from hf_eagle3.host.loop_choice import OWN_LOOP
from hf_eagle3.speculation.stats import Speculation

pytestmark = pytest.mark.any_release


@pytest.fixture
def check(folders, capsys):
    def run(*options: str) -> tuple[int, str, str]:
        pair = [str(folders / "target"), str(folders / "drafter"), "--max-new-tokens", "8"]
        status = cli.main(["check", *pair, "--prompt", "abc", "--prompt", "x", *options])
        return status, *capsys.readouterr()

    return run


def test_verdict_in_six_lines(check):
    status, out, err = check()
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["Texts", "Speed", "Drafts", "Rounds", "Advice"]
    assert "2 of 2 are the same, token for token" in out
    for step in ("Loading", "Warming up", "Answering without and with the drafter, by turns", "Comparing the texts"):
        assert step in err


def test_verdict_as_json(check):
    status, out, _ = check("--json", "--num-draft-tokens", "2")
    found = json.loads(out)
    assert status == 0
    assert (found["is_equal"], found["num_prompts"], found["depth"], found["loop"]) == (True, 2, 2, OWN_LOOP)
    assert found["speed_up"] > 0
    assert found["acceptance_length"] >= 1
    assert found["advice"]
    assert found["chosen_times_as_fast"] > 0


def test_texts_that_differ_are_named_and_fail(check, drafter, folders):
    drafter.generation_config.simulated_acceptance_length = 4.0  # so that wrong drafts are accepted too
    drafter.save_pretrained(folders / "drafter")
    status, out, _ = check()
    assert status == 1
    assert "0 of 2 are the same" in out
    assert "'abc' differs at new token 1, " in out
    assert "no tie" in out
    assert "Advice  Texts differ where they must not: please report it" in out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tie_is_named_in_16_bits(dtype):
    target, words = copy.deepcopy(make_target("llama")).to(dtype), make_words()
    inputs = encode(words, "w5 w9 w11", target)
    run = answer(target, inputs, None, 8)
    twin = next(token for token in range(3, 64) if token not in run.tokens)
    with torch.no_grad():
        target.lm_head.weight[twin] = target.lm_head.weight[run.tokens[5]]
    other = run._replace(tokens=(*run.tokens[:5], twin, 1, 1))
    found = Comparison(["w5 w9 w11"], [[run]], [[other]])
    (difference,) = find_differences(target, words, found)
    assert difference.position == 5
    assert difference.is_tie == (dtype == torch.bfloat16)
    assert (": a tie, " in str(difference)) == difference.is_tie


def make_check(*, plain=10.0, drafted=5.0, accepted=2, loop=OWN_LOOP, chosen=None, **options) -> Check:
    speculation = Speculation(loop, "for a reason", 3, shapes=options.get("shapes", {}))
    for _ in range(10 if accepted is not None else 0):
        speculation.count(3, accepted)
    tokens = tuple(range(30))
    found = Comparison(["a"], [[Run(tokens, plain, None)] * 2], [[Run(tokens, drafted, speculation)] * 2])
    return Check(found, [], chosen, is_half=options.get("is_half", False), on_gpu=options.get("on_gpu", False))


TIE = Difference("a", 3, ("b", "c"), 0.01, 0.02)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (make_check(), "Keep it as it is: 2.00 times as fast, with 3 draft tokens a round."),
        (make_check(shapes={"chain of 3": 10}), "2.00 times as fast, with 3 draft tokens a round."),
        (
            make_check(shapes={"chain of 2": 8, "none": 3}),
            "2.00 times as fast, with rounds that choose what they draft, most often chain of 2.",
        ),
        (replace(make_check(), differences=[TIE]), "Keep it as it is"),
        (replace(make_check(), differences=[replace(TIE, gap=0.03)]), "Texts differ where they must not"),
        (make_check(accepted=None), "No draft was verified (for a reason)"),
        (make_check(accepted=0), "`hf-eagle3 doctor` measures whether"),
        (
            make_check(chosen=1.2),
            "Let rounds choose what they draft (num_assistant_tokens=None): 1.20 times as fast as 3",
        ),
        (make_check(chosen=1.01), "Keep it as it is"),
        (
            make_check(drafted=20.0),
            "Leave the drafter out here: a round takes as long as 6.0 plain steps and brings 3.00",
        ),
        (
            make_check(loop="assisted"),
            "Our own loop would be faster than the host's, which decoded here: for a reason.",
        ),
        (make_check(on_gpu=True), "Load both in bfloat16"),
        (make_check(on_gpu=True, is_half=True), "Keep it as it is"),
    ],
    ids=[
        *("fast", "fast-chain", "fast-chosen", "tie", "differs", "undrafted", "poor", "chosen", "hardly-chosen"),
        *("slow", "host", "gpu", "gpu-half"),
    ],
)
def test_advice(found, says):
    assert says in found.advice
    assert found.advice.count(". ") == 0
    assert f"Advice  {found.advice}" in str(found)


def test_busy_machine_is_the_advice():
    found = make_check()
    found.found.load = 2.0
    assert found.advice.startswith("Check again when the machine is quiet: 2.0 processes wanted each core")
