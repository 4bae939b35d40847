"""A target that two processes share by tensor parallelism: the same text as in one, and the same in both."""

import copy
import json

import pytest
import torch
from helpers.batches import make_oracle, pad, prompts_of
from helpers.models import DRAFTERS, make_drafter, make_target
from helpers.processes import launch
from helpers.tensor_parallel_worker import BATCH, EXPERTS, GREEDY, sampled, save_targets
from transformers import AutoModelForCausalLM

from hf_eagle3 import tensor_parallel as peers

FAMILIES = ["llama", "qwen3", "gemma3", "gpt_oss", EXPERTS]


def two_gpus(test):
    """A test that needs them."""
    return pytest.mark.gpu(pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")(test))


def halves(target):
    """A device map: the embeddings and first half of the layers on one GPU, the rest, norm and head on the other."""
    places = {name: 1 for name, _ in target.named_modules() if name in ("model.norm", "lm_head")}
    places |= {"model.embed_tokens": 0, "model.rotary_emb": 0}
    n = target.config.num_hidden_layers
    return places | {f"model.layers.{i}": int(2 * i >= n) for i in range(n)}


in_two_processes = pytest.mark.slow  # which take a minute, most of it to start


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes says."""
    folder = tmp_path_factory.mktemp("tp")
    save_targets(folder, FAMILIES)
    launch(2, folder, *FAMILIES, worker="helpers.tensor_parallel_worker")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@in_two_processes
@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_batch_is_what_one_process_says(both, family):
    one, other = (result[f"greedy {family}"] for result in both)
    assert one == other
    assert one["sequences"] == one["plain"]
    assert one["loop"] == "own decode loop"
    assert 1.5 < one["acceptance_length"] < 4
    whole = make_target(family.split(",")[0]).generate(**pad(prompts_of(*BATCH)), max_new_tokens=24, **GREEDY)
    assert one["sequences"] == whole.sequences.tolist()


@in_two_processes
def test_experts_are_spread_where_that_is_asked_for(both):
    assert all(result["has experts"] for result in both)


@in_two_processes
@pytest.mark.parametrize("name", ["no_fc", "two_layers", "peagle", "in order"])
def test_every_drafter_and_processors_that_look_at_the_text(both, name):
    one, other = (result[f"greedy {name}"] for result in both)
    assert one == other
    assert one["sequences"] == one["plain"]
    assert 1.5 < one["acceptance_length"] < 4


@in_two_processes
def test_what_a_drafter_borrows_is_whole_in_each_process(both, target):
    drafter = make_drafter(target, **DRAFTERS["no_fc"])
    wanted = [drafter._borrowed[name].tolist() for name in ("embed_tokens", "lm_head")]
    for result in both:
        assert result["is_split"]
        assert result["borrowed"] == wanted
        assert result["gathered once"]


@in_two_processes
def test_processes_with_one_seed_sample_one_text(both, target):
    one, other = (result["sampled, one seed"] for result in both)
    assert one == other
    assert one["sequences"] != both[0]["sampled, another seed"]["sequences"]
    batch = pad(prompts_of(*BATCH))
    oracle = make_oracle(target, target.generate(**batch, max_new_tokens=24, do_sample=False), batch)
    assert sampled(target, oracle, batch, 5) == {**one, "graphs": "none (the models are on cpu)"}


@in_two_processes
@pytest.mark.parametrize("name", ["sampled, a seed for each", "sampled in order"])
def test_processes_with_seeds_of_their_own_sample_one_text_all_the_same(both, name):
    one, other = (result[name] for result in both)
    assert one["sequences"] == other["sequences"]
    assert one["next_random"] != other["next_random"]  # they did draw other numbers
    if name == "sampled, a seed for each":
        assert one["sequences"] == both[0]["sampled, one seed"]["sequences"]  # the first one's


@in_two_processes
@pytest.mark.parametrize("loop", ["own", "host"])
def test_where_the_first_process_stops_all_do(both, loop):
    for result in both:
        assert len(result[f"criterion, {loop}"]["sequences"][0]) == 20
        assert 9 < len(result[f"time, {loop}"]["sequences"][0]) < 9 + 250
    for name in (f"criterion, {loop}", f"time, {loop}", f"streamer, {loop}"):
        assert both[0][name] == both[1][name]
    assert both[0][f"streamed, {loop}"] == both[0][f"streamer, {loop}"]["sequences"][0][9:]


@in_two_processes
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_rounds_say_the_same(both, family):
    """With the stand-in for graphs of `test_graphs`."""
    one, other = (result[f"captured {family}"] for result in both)
    assert all(told["graphs"].startswith("captured") for told in (one, other))
    assert one["sequences"] == other["sequences"] == one["plain"]
    assert 1.5 < one["acceptance_length"] < 4
    assert both[0]["replays"] == both[1]["replays"] > 50
    sampled, others = (result["captured and sampled"]["sequences"] for result in both)
    assert sampled == others


@in_two_processes
def test_where_one_process_cannot_capture_none_does(both):
    one, other = (result["captured by one"] for result in both)
    assert one["graphs"] == "none (another process could not capture them)"
    assert other["graphs"] == "none (RuntimeError: no graphs here)"
    assert one["sequences"] == other["sequences"] == one["plain"]


@in_two_processes
def test_rounds_on_cpus_are_not_captured(both):
    assert both[0]["greedy llama"]["graphs"] == "none (the models are on cpu)"


def test_a_target_of_one_process_has_no_peers(target):
    assert peers.find_peers(target) is None
    assert not peers.is_spread(target)
    values = torch.arange(3)
    assert peers.make_agree(target)(values) is values


def on_one_gpu(family):
    """Greedily, on one GPU, in float32."""
    batch = {name: value.cuda() for name, value in pad(prompts_of(*BATCH)).items()}
    target = copy.deepcopy(make_target(family.split(",")[0])).cuda()
    return target.generate(**batch, max_new_tokens=24, **GREEDY).sequences.tolist()


@two_gpus
def test_two_gpus_share_a_target(tmp_path):
    save_targets(tmp_path, FAMILIES)
    launch(2, tmp_path, "gpu", *FAMILIES, worker="helpers.tensor_parallel_worker")
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for name in one.keys() - {"version"}:
        assert one[name]["sequences"] == other[name]["sequences"], name
    for family in FAMILIES:
        for name in ("oracle", "first", "second"):
            assert one[f"{name} {family}"]["sequences"] == on_one_gpu(family), (name, family)
        assert 1.5 < one[f"oracle {family}"]["acceptance_length"] < 4
    assert one["first llama"]["graphs"].startswith("captured")
    assert one["second llama"]["graphs"] == "replayed"
    assert one["sampled llama"]["graphs"].startswith("captured")


@two_gpus
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_a_target_spread_over_two_gpus(family, tmp_path):
    make_target(family).save_pretrained(tmp_path)
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=halves(make_target(family)))
    assert len({p.device for p in spread.parameters()}) == 2
    batch = {name: value.cuda() for name, value in pad(prompts_of(*BATCH)).items()}
    options = {"max_new_tokens": 24, **GREEDY}
    plain = spread.generate(**batch, **options)
    oracle = make_oracle(spread, plain.sequences, batch).cuda()
    out = spread.generate(**batch, assistant_model=oracle, **options)
    assert out.sequences.tolist() == plain.sequences.tolist() == on_one_gpu(family)
    assert out.speculation.loop == "own decode loop"
    assert 1.5 < out.speculation.acceptance_length < 4
