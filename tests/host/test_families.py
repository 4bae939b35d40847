"""Every family of the installed host: plain decoding's text with a drafter, or a refusal in words."""

import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers import families
from helpers.families import CALLS, PASSES, Family, Outcome
from helpers.marks import slow_but
from helpers.models import make_drafter, make_prompt
from helpers.paths import ROOT

import hf_eagle3

PAGE = ROOT / "docs" / "targets.md"
# A line of JSON for each family goes to the end of this file: several processes may write, and a run may be cut off.
RESULTS = os.environ.get("FAMILIES_RESULTS")
# "2/8": of eight parts of the families the second, for several processes.
PART = os.environ.get("FAMILIES_PART", "1/1")
ALL = families.families()
SAMPLE = [
    *(Family(name, "causal") for name in ("llama", "gpt_oss", "gemma2", "cohere2", "deepseek_v3", "gpt2", "bert")),
    *(
        Family(name, "causal")
        for name in ("bloom", "opt", "longcat_flash", "openai-gpt", "mamba", "qwen3_next", "llama4")
    ),
    *(Family(name, "image-text") for name in ("qwen2_5_vl", "exaone4_5", "mllama", "kosmos-2.5", "paligemma")),
    Family("paligemma", "image-text", "Gemma 2"),
    Family("phi3", "causal", "longrope"),
]
# One each of what our loop takes, of windows, mixtures, MLA, images and positions of its own, and of refusals.
EVERYDAY = [
    family
    for family in SAMPLE
    if family.name in ("llama", "gpt_oss", "deepseek_v3", "gpt2", "mamba", "qwen2_5_vl", "phi3")
]


def part_of(found: list[Family]) -> list[Family]:
    number, of = map(int, PART.split("/"))
    return found[number - 1 :: of]


def assert_right_or_refused(family: Family, outcomes: dict[str, Outcome], **further: str) -> None:
    if RESULTS:
        families.record(Path(RESULTS), family, outcomes, **further)
    if all(outcome.verdict == "untried" for outcome in outcomes.values()):
        pytest.skip(next(iter(outcomes.values())).why)
    assert {call: o for call, o in outcomes.items() if o.verdict not in PASSES} == {}


@pytest.mark.parametrize("family", slow_but(EVERYDAY, SAMPLE), ids=str)
def test_text_is_plain_decodings_or_refused_in_words(family):
    outcomes = families.sweep(family)
    assert_right_or_refused(family, outcomes)
    if is_pages_host():
        assert families.row_of(family.name, family.class_name, outcomes) in PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in part_of(ALL) if f not in SAMPLE], ids=str)
def test_every_family(family):
    assert_right_or_refused(family, families.sweep(family))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", part_of(ALL), ids=str)
def test_every_family_captured(family, dtype):
    calls = {call: CALLS[call] for call in ("one row", "three rows")}
    outcomes = families.sweep(family, device="cuda", dtype=dtype, calls=calls)
    hf_eagle3.release_graphs()
    assert_right_or_refused(family, outcomes, device=torch.cuda.get_device_name(), dtype=str(dtype)[6:])


def is_pages_host() -> bool:
    """Whether the table was made with the installed host."""
    return f"Transformers {transformers.__version__}" in PAGE.read_text()


def test_table_has_every_family():
    if not is_pages_host():
        pytest.skip("The table was made with another Transformers.")
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted((family.name, family.class_name) for family in ALL)


def test_refusals_are_told_from_accidents(target):
    def outcome_of(**options):
        with pytest.raises((ValueError, TypeError, AttributeError)) as caught:
            target.generate(make_prompt(5), assistant_model=make_drafter(target), max_new_tokens=4, **options)
        return families.refusal_or_raw(caught.value)

    assert outcome_of(num_beams=2)[:2] == ("refused", "hf-eagle3")
    assert outcome_of(unknown_argument=1)[:2] == ("refused", "the host")
    assert outcome_of(position_ids="none").verdict == "raw"


def test_only_rounding_is_a_tie(target):
    plain, ours = torch.tensor([5, 7]), torch.tensor([5, 9])
    logits = [torch.zeros(64), torch.zeros(64).index_fill(0, torch.tensor([7]), 10.0)]
    for below, is_tie in ((1e-4, True), (0.1, False)):
        logits[1][9] = 10.0 - below
        assert families.is_near_tie(target, [3, 4], ours, plain, logits) == is_tie
    assert list(families.first_differences(torch.tensor([[5, 7], [1, 2]]), torch.tensor([[5, 9], [1, 2]]))) == [(0, 1)]
