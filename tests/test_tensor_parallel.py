"""A target that two processes share by tensor parallelism: the same text as in one, and the same in both."""

import json

import pytest
import torch
from conftest import DRAFTERS, make_drafter, make_target
from tensor_parallel_worker import BATCH, GREEDY, sampled, save_targets
from test_decode import make_oracle, pad, prompts_of
from test_distributed_training import launch

from hf_eagle3 import peers

FAMILIES = ["llama", "qwen3", "gemma3", "gpt_oss"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes says."""
    folder = tmp_path_factory.mktemp("tp")
    save_targets(folder, FAMILIES)
    launch(2, folder, *FAMILIES, worker="tensor_parallel_worker.py")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_batch_is_what_one_process_says(both, family):
    one, other = (result[f"greedy {family}"] for result in both)
    assert one == other
    assert one["sequences"] == one["plain"]
    assert one["loop"] == "own decode loop"
    assert 1.5 < one["acceptance_length"] < 4
    whole = make_target(family).generate(**pad(prompts_of(*BATCH)), max_new_tokens=24, **GREEDY)
    assert one["sequences"] == whole.sequences.tolist()


@pytest.mark.parametrize("name", ["no_fc", "two_layers", "peagle", "in order"])
def test_every_drafter_and_processors_that_look_at_the_text(both, name):
    one, other = (result[f"greedy {name}"] for result in both)
    assert one == other
    assert one["sequences"] == one["plain"]
    assert 1.5 < one["acceptance_length"] < 4


def test_what_a_drafter_borrows_is_whole_in_each_process(both, target):
    drafter = make_drafter(target, **DRAFTERS["no_fc"])
    wanted = [drafter._borrowed[name].tolist() for name in ("embed_tokens", "lm_head")]
    for result in both:
        assert result["is_split"]
        assert result["borrowed"] == wanted
        assert result["gathered once"]


def test_processes_with_one_seed_sample_one_text(both, target):
    one, other = (result["sampled, one seed"] for result in both)
    assert one == other
    assert one["sequences"] != both[0]["sampled, another seed"]["sequences"]
    batch = pad(prompts_of(*BATCH))
    oracle = make_oracle(target, target.generate(**batch, max_new_tokens=24, do_sample=False), batch)
    assert sampled(target, oracle, batch, 5) == {**one, "graphs": "none (the models are on cpu)"}


@pytest.mark.parametrize("name", ["sampled, a seed for each", "sampled in order"])
def test_processes_with_seeds_of_their_own_sample_one_text_all_the_same(both, name):
    one, other = (result[name] for result in both)
    assert one["sequences"] == other["sequences"]
    assert one["next_random"] != other["next_random"]  # they did draw other numbers
    if name == "sampled, a seed for each":
        assert one["sequences"] == both[0]["sampled, one seed"]["sequences"]  # the first one's


@pytest.mark.parametrize("loop", ["own", "host"])
def test_where_the_first_process_stops_all_do(both, loop):
    for result in both:
        assert len(result[f"criterion, {loop}"]["sequences"][0]) == 20
        assert 9 < len(result[f"time, {loop}"]["sequences"][0]) < 9 + 250
    for name in (f"criterion, {loop}", f"time, {loop}", f"streamer, {loop}"):
        assert both[0][name] == both[1][name]
    assert both[0][f"streamed, {loop}"] == both[0][f"streamer, {loop}"]["sequences"][0][9:]


def test_rounds_of_a_split_target_are_not_captured(both):
    assert both[0]["greedy llama"]["graphs"] == "none (processes have shards of the target)"


def test_a_target_of_one_process_has_no_peers(target):
    assert peers.find_peers(target) is None
    assert not peers.is_spread(target)
    values = torch.arange(3)
    assert peers.make_agree(target)(values) is values
