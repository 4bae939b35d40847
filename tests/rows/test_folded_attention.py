"""Attention in rounds on a CPU gives what the host's gives, over fewer copies and no more slots than needed."""

import pytest
import torch
from helpers.models import make_target
from torch import nn
from transformers import AttentionInterface

from hf_eagle3.rows.attention import FOLDED, folded_attention, over_masks
from hf_eagle3.rows.block import Block
from hf_eagle3.rows.cache import RowCache

pytestmark = pytest.mark.any_release


@pytest.mark.parametrize(("B", "H", "H_kv", "T"), [(1, 4, 2, 1), (3, 9, 3, 2), (2, 8, 1, 5), (2, 4, 4, 3)])
@pytest.mark.parametrize("is_float", [False, True])
def test_folded_attention_is_the_hosts(B, H, H_kv, T, is_float):
    module = nn.Module()
    module.num_key_value_groups = H // H_kv
    S, D = 21, 8
    query, key, value = torch.randn(B, H, T, D), torch.randn(B, H_kv, S, D), torch.randn(B, H_kv, S, D)
    mask = torch.rand(B, 1, T, S) < 0.6
    mask[..., 0] = True
    if is_float:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    ours, _ = folded_attention(module, query, key, value, mask, scaling=0.3)
    theirs, _ = AttentionInterface()["sdpa"](module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs)
    wrong, _ = folded_attention(module, query, key, value, mask.roll(1, -1), scaling=0.3)
    assert not torch.allclose(wrong, theirs)


def test_masks_of_each_head_and_soft_caps_are_the_hosts(monkeypatch):
    module = nn.Module()
    module.num_key_value_groups = 2
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.rand(2, 4, 3, 9) < 0.8
    mask[..., 0] = True
    ours, _ = folded_attention(module, query, key, value, mask)
    theirs, _ = AttentionInterface()["sdpa"](module, query, key, value, mask)
    assert torch.equal(ours, theirs)
    monkeypatch.setattr("hf_eagle3.rows.attention.sdpa_attention_forward", lambda *_, **kwargs: kwargs["softcap"])
    assert folded_attention(module, query, key, value, mask[:, :1], softcap=5.0) == 5.0


def test_leaving_restores_the_name_whoever_has_entered():
    target = make_target("llama")
    one, other = over_masks(target), over_masks(target)
    with one:
        assert target.config._attn_implementation == FOLDED
        with other:
            within = over_masks(target)
    with within:
        pass
    assert target.config._attn_implementation == "sdpa"


def test_a_forward_attends_to_what_the_longest_row_has():
    cache = RowCache(1, 448)
    for start, num_visible in ((torch.tensor([5, 70]), 128), (torch.tensor([440, 3]), 448)):
        with cache.writing(Block(start, 1)):
            new = torch.randn(2, 3, 1, 8)
            keys, values = cache.update(new, new, 0)
            assert cache.num_visible == keys.shape[2] == values.shape[2] == num_visible
            assert torch.equal(keys[1, :, start[1]], new[1, :, 0])
