"""Our loop without a drafter: the text of stock `generate`, where it is worth having."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from helpers.batches import GREEDY, pad, prompts_of
from helpers.capture import capture_on_cpus
from helpers.models import FAMILIES, OLD, make_drafter, make_target

from hf_eagle3.host.undrafted import decode_plainly


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", [*OLD, *FAMILIES])
def test_same_text_by_our_loop(family):
    target, batch = make_target(family), pad(prompts_of(9, 4, 30))
    plain = target.generate(**batch, max_new_tokens=20, **GREEDY)
    out = target.generate(**batch, max_new_tokens=20, return_dict_in_generate=True, **GREEDY, **decode_plainly(target))
    assert out.sequences.tolist() == plain.tolist()
    assert (out.speculation.loop, out.speculation.depth) == ("own decode loop", 0)


def test_captured_rounds_without_a_drafter(target, monkeypatch):
    counts = capture_on_cpus(monkeypatch)
    batch = pad(prompts_of(9, 4, 30))
    plain = target.generate(**batch, max_new_tokens=20, **GREEDY)
    out = target.generate(**batch, max_new_tokens=20, decode_loop="own", return_dict_in_generate=True, **GREEDY)
    assert out.sequences.tolist() == plain.tolist()
    assert out.speculation.graphs.startswith("captured")
    assert counts.captured == 2  # to verify, to accept
    assert counts.replayed > 30


@pytest.mark.parametrize("further", [{}, {"repetition_penalty": 1.3}])
def test_sampling_draws_as_with_a_drafter_that_drafts_nothing(target, further):
    drafter, batch = make_drafter(target), pad(prompts_of(9, 4))
    options = {"max_new_tokens": 20, "do_sample": True, "top_k": 20, "decode_loop": "eager", **further}
    torch.manual_seed(3)
    expected = target.generate(**batch, assistant_model=drafter, num_assistant_tokens=0, **options)
    torch.manual_seed(3)
    assert torch.equal(target.generate(**batch, **options), expected)


def test_stock_where_our_loop_does_not_fit(target, monkeypatch):
    monkeypatch.setattr(target.config, "attention_chunk_size", 8, raising=False)
    assert decode_plainly(target) == {}
    with pytest.raises(ValueError, match=r"attends in chunks\. Leave out decode_loop"):
        target.generate(**pad(prompts_of(4)), decode_loop="own", **GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_loop": "host"}, 'decode_loop is .host.: without assistant_model, expected "own", "eager"'),
        ({"decode_loop": ["own"]}, "without assistant_model"),
        ({"decode_loop": "own", "num_beams": 2}, "Leave out num_beams, or decode_loop"),
        ({"decode_loop": "own", "custom_generate": len}, "leave out custom_generate or decode_loop"),
        ({"decode_loop": "own", "cache_implementation": "static"}, "Leave out decode_loop or that"),
    ],
)
def test_what_our_loop_does_not_do_is_refused(target, options, message):
    with pytest.raises(ValueError, match=message):
        target.generate(**pad(prompts_of(4)), max_new_tokens=4, **options)


def test_a_loop_of_none_is_the_hosts(target):
    batch = pad(prompts_of(4))
    plain = target.generate(**batch, max_new_tokens=4, **GREEDY)
    assert torch.equal(target.generate(**batch, max_new_tokens=4, decode_loop=None, **GREEDY), plain)


def test_stock_where_weights_are_elsewhere(target):
    offloaded = copy.deepcopy(target)
    cpu_offload(offloaded, execution_device="cpu")
    assert decode_plainly(offloaded) == {}
