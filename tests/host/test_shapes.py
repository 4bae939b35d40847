"""What a call drafts each round, as its settings say."""

import json
import logging

import pytest
import torch
from helpers.batches import GREEDY, pad, prompts_of
from helpers.models import make_drafter, make_prompt, make_target
from transformers import AutoModel, GenerationConfig

from hf_eagle3.host import loop_choice
from hf_eagle3.host.shapes import list_candidates, read_shape
from hf_eagle3.speculation.shape import NONE, DraftShape, Shapes, chain

pytestmark = pytest.mark.any_release

TREE = [0, 0, 1, 1]
TRIPLE = {"steps": 3, "topk": 2, "draft_tokens": 7}


def decode(target, drafter, **options):
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY, **options}
    return target.generate(**pad(prompts_of(9, 4)), assistant_model=drafter, **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"draft_shape": TREE}, "tree of 4, depth 2"),
        ({"draft_shape": (0, 1, 2)}, "chain of 3"),
        ({"draft_shape": TRIPLE}, "tree of 6, depth 3"),
        ({"draft_shape": {"steps": 2, "topk": 1, "draft_tokens": 3}}, "chain of 2"),
        ({"draft_shape": "off"}, "none"),
        ({"num_assistant_tokens": 4}, "chain of 4"),
        ({"num_assistant_tokens": 0}, "none"),
        ({"draft_shape": chain(2)}, "chain of 2"),
        ({"draft_shape": TREE, "num_assistant_tokens": None}, "tree of 4, depth 2"),
    ],
    ids=str,
)
def test_a_call_fixes_what_is_drafted(target, asked, name):
    plain = target.generate(**pad(prompts_of(9, 4)), max_new_tokens=12, **GREEDY)
    out = decode(target, make_drafter(target), **asked)
    assert out.sequences.tolist() == plain.tolist()
    assert list(out.speculation.shapes) == [name]
    assert not out.speculation.changes


def test_the_call_goes_before_configs_and_those_before_the_drafters(target):
    drafter = make_drafter(target)
    drafter.generation_config.draft_shape = TREE
    assert list(decode(target, drafter).speculation.shapes) == ["tree of 4, depth 2"]  # before its number of tokens
    given = GenerationConfig(draft_shape=[0, 0], max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    out = target.generate(**pad(prompts_of(9, 4)), assistant_model=drafter, generation_config=given)
    assert list(out.speculation.shapes) == ["tree of 2, depth 1"]
    assert list(decode(target, drafter, num_assistant_tokens=2).speculation.shapes) == ["chain of 2"]
    assert decode(target, drafter, draft_shape="auto").speculation.depth == Shapes(list_candidates(drafter)).depth


def test_a_drafter_keeps_its_shape_and_rates(target, tmp_path):
    drafter = make_drafter(target)
    drafter.generation_config.num_assistant_tokens = None
    drafter.generation_config.draft_shape = TREE
    drafter.generation_config.acceptance_by_rank = [[0.2, 0.19, 0.18, 0.17, 0.16]]
    drafter.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["draft_shape"] == TREE
    loaded = AutoModel.from_pretrained(tmp_path)
    assert list(decode(target, loaded).speculation.shapes) == ["tree of 4, depth 2"]
    widest = max(list_candidates(loaded), key=lambda shape: shape.parents.count(0))
    assert widest.parents.count(0) >= 5  # its tokens are as good as each other, so the tree is broad


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"draft_shape": "tree"}, 'draft_shape is \'tree\', expected "auto", "off", the parent of each draft token'),
        ({"draft_shape": 3}, r"A chain of K is num_assistant_tokens=K\."),
        ({"draft_shape": [0, 2]}, r"Each draft token follows an earlier one, or 0, the root; got parents \(0, 2\)\."),
        ({"draft_shape": [0, True]}, "draft_shape is"),
        ({"draft_shape": [0] * 64}, "A draft tree has at most 63 tokens, got 64"),
        ({"draft_shape": list(range(70))}, "at most 64 one after the other"),
        ({"draft_shape": {"steps": 3}}, "steps, topk, draft_tokens"),
        ({"draft_shape": {**TRIPLE, "topk": 0}}, "counts in whole numbers above 0"),
        ({"draft_shape": {**TRIPLE, "draft_tokens": 3}}, "more draft_tokens than steps"),
        ({"draft_shape": {**TRIPLE, "topk": 1}}, "with topk 1 one more"),
        ({"draft_shape": TREE, "num_assistant_tokens": 3}, "both say what to draft each round: give one of them"),
        ({"draft_shape": [0] * 9}, r"draft_shape has 9 tokens after one, of a draft vocabulary of 5\."),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_shape_is_refused_before_work(target, asked, says, monkeypatch):
    drafter = make_drafter(target, draft_vocab_size=5)
    monkeypatch.setattr(target, "forward", None)
    with pytest.raises(ValueError, match=says):
        decode(target, drafter, **asked)


def test_the_hosts_loop_takes_chains_and_says_so_once(target, caplog):
    loop_choice.warn_of_chains.cache_clear()
    drafter, prompt = make_drafter(target), make_prompt(9)
    options = {"max_new_tokens": 12, "decode_loop": "host", "return_dict_in_generate": True, **GREEDY}
    plain = target.generate(prompt, max_new_tokens=12, **GREEDY)
    with caplog.at_level(logging.WARNING, logger="hf_eagle3"):
        for shape in (TREE, TREE, "auto"):
            out = target.generate(prompt, assistant_model=drafter, draft_shape=shape, **options)
            assert torch.equal(out.sequences, plain)
            assert out.speculation.depth == (3 if shape == "auto" else 2)
    assert [record.message for record in caplog.records] == [
        "The host's loop takes chains: instead of a tree of 4, depth 2 it drafts a chain of 2."
    ]


def test_ranks_of_a_call_are_told(target):
    told = decode(make_target("llama"), make_drafter(target), draft_shape=TREE).speculation
    assert [len(row) for row in told.acceptance_by_rank][:1] == [2]
    assert all(0 <= rate <= 1 for row in told.acceptance_by_rank for rate in row if rate == rate)


def test_names_of_shapes():
    assert read_shape("auto") is None
    assert read_shape("off") == NONE
    assert [shape.name for shape in (NONE, chain(2), DraftShape((0, 0)))] == [
        "none",
        "chain of 2",
        "tree of 2, depth 1",
    ]
