"""Our loop without a drafter: the text of stock `generate`, where it is worth having."""

import copy

import pytest
from accelerate import cpu_offload
from helpers.batches import GREEDY, pad, prompts_of
from helpers.models import FAMILIES, OLD, make_target

from hf_eagle3.host.undrafted import decode_plainly


@pytest.mark.parametrize("family", [*OLD, *FAMILIES])
def test_same_text_by_our_loop(family):
    target, batch = make_target(family), pad(prompts_of(9, 4, 30))
    helped = decode_plainly(target)
    plain = target.generate(**batch, max_new_tokens=20, **GREEDY)
    out = target.generate(**batch, max_new_tokens=20, return_dict_in_generate=True, **GREEDY, **helped)
    assert out.sequences.tolist() == plain.tolist()
    assert (out.speculation.loop, out.speculation.depth) == ("own decode loop", 0)
    assert (
        sum(p.numel() for p in helped["assistant_model"].parameters())
        < 50 * target.config.get_text_config().hidden_size
    )


def test_stock_where_our_loop_does_not_fit(target, monkeypatch):
    monkeypatch.setattr(target.config, "attention_chunk_size", 8, raising=False)
    assert decode_plainly(target) == {}


def test_stock_where_weights_are_elsewhere(target):
    offloaded = copy.deepcopy(target)
    cpu_offload(offloaded, execution_device="cpu")
    assert decode_plainly(offloaded) == {}
