"""The gated delta rule over blocks: twins against the host token by token, kernels against their twins.

Tests marked `gpu` need kernels to run; `test_kernels.py` runs them in Triton's interpreter where there is no GPU.
"""

import copy

import pytest
import torch
from helpers.hybrids import make_target
from helpers.kernels import DEVICE, ON_GPU, assert_as_good, in_double, random
from helpers.marks import slow_but

from hf_eagle3.kernels.delta_rule import (
    MAX_UNROLLED,
    DeltaMemory,
    Gates,
    convolve_rows,
    convolve_rows_eager,
    delta_rule_rows,
    delta_rule_rows_eager,
    settle_rows,
    settle_rows_eager,
)
from hf_eagle3.kernels.fusion import fused
from hf_eagle3.kernels.norms import GATED_VARIANTS, gated_rms_norm, gated_rms_norm_eager
from hf_eagle3.rows.attention import UnfitError
from hf_eagle3.rows.delta_nets import DELTA_NETS
from hf_eagle3.rows.recurrent import find_mixers
from hf_eagle3.rows.recurrent_trial import measure_error, refuse_unequal

NETS = ("lara_mini", "olmo_hybrid", "qwen3_5_moe", "qwen3_5_text", "qwen3_next")
# The interpreter has no bfloat16 arithmetic.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_memory(B, H, K, V, C, *, W=4, n=4, dtype=torch.float32):
    """Random states behind a block that is random, too."""
    memory = DeltaMemory.make(random(B, H, K, V), torch.empty(B, C, W, dtype=dtype, device=DEVICE), n)
    memory.window.normal_()
    keys = random(B, n, H, 1, K, dtype=dtype)
    memory.keys.copy_(keys.expand_as(memory.keys))
    memory.deltas.normal_()
    memory.decays.copy_(torch.rand(B, n, H, 1).expand_as(memory.decays))
    return memory


def make_block(B, T, H, H_k, K, V, dtype):
    """Queries, keys and values, and gates."""
    mixed = random(B, T, 2 * H_k * K + H * V, dtype=dtype)
    gates = Gates(*(random(B, T, H, dtype=dtype) for _ in range(2)), random(H), random(H, dtype=dtype), strength=2.0)
    return mixed, gates


def copy_of(memory: DeltaMemory) -> DeltaMemory:
    return DeltaMemory(*(x.clone() for x in memory))


# ---- twins ----


@pytest.mark.parametrize("name", slow_but(["qwen3_5_text", "olmo_hybrid"], NETS))
def test_blocks_say_what_the_host_says_token_by_token(name):
    target = make_target(name)
    with torch.no_grad():
        assert measure_error(target, list(find_mixers(target).values())[-1]) < 1e-5
    refuse_unequal(target)


@pytest.mark.any_release
def test_every_gated_delta_net_is_tried():
    names = {type(next(iter(find_mixers(make_target(name)).values()))).__name__ for name in NETS}
    assert names == set(DELTA_NETS)


def test_a_layer_that_computes_something_else_is_refused():
    target = copy.deepcopy(make_target("qwen3_5_text"))
    for mixer in find_mixers(target).values():
        mixer.activation = "gelu"
    with pytest.raises(UnfitError, match="Qwen3_5GatedDeltaNet does not compute its recurrence"):
        refuse_unequal(target)


@pytest.mark.any_release
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_what_was_rejected_never_happened(kept):
    """A block behind `kept` tokens of the last one is that block behind a last one of only these."""
    B, H, H_k, K, V, T = 2, 4, 2, 8, 6, 3
    start = make_memory(B, H, K, V, 2 * H_k * K + H * V).state
    (first, gates), (second, more) = (make_block(B, T, H, H_k, K, V, torch.float32) for _ in range(2))
    none, conv_state = torch.zeros(B, dtype=torch.long, device=DEVICE), torch.zeros(B, 0, 4, device=DEVICE)
    memories = [DeltaMemory.make(start.clone(), conv_state, 4) for _ in range(2)]
    delta_rule_rows_eager(first, gates, memories[0], none, num_key_heads=H_k)
    if kept:
        shorter = Gates(gates.a[:, :kept], gates.b[:, :kept], *gates[2:])
        delta_rule_rows_eager(first[:, :kept], shorter, memories[1], none, num_key_heads=H_k)
    outs = [delta_rule_rows_eager(second, more, m, none + kept, num_key_heads=H_k) for m in memories]
    torch.testing.assert_close(*outs)
    for memory in memories:
        settle_rows_eager(memory, none + T)
    torch.testing.assert_close(memories[0].state, memories[1].state)


@pytest.mark.any_release
def test_a_convolution_goes_on_from_what_counts():
    B, C, W = 3, 5, 4
    x, weight = torch.randn(B, 12, C), torch.randn(C, W)
    whole = torch.nn.functional.silu(
        torch.nn.functional.conv1d(x.mT, weight[:, None], groups=C, padding=W - 1)[..., :12]
    ).mT
    window = torch.zeros(B, W + 4, C)
    window[:, :W] = x[:, :W]
    kept = torch.zeros(B, dtype=torch.long)
    at = torch.full((B,), W)
    for counts in ([4, 1, 2], [3, 2, 1]):
        block = torch.stack([x[b, at[b] : at[b] + 4] for b in range(B)])
        out = convolve_rows_eager(block, weight, None, window, kept)
        kept = torch.tensor(counts)
        for b in range(B):
            torch.testing.assert_close(out[b, : counts[b]], whole[b, at[b] : at[b] + counts[b]], rtol=1e-5, atol=1e-5)
        at = at + kept


# ---- kernels ----

# B, T, H, H_k, K, V, n
SHAPES = {
    "one token": (2, 1, 4, 2, 16, 16, 4),
    "a block, groups of heads": (3, 4, 4, 2, 16, 32, 5),
    "odd sizes": (1, 3, 3, 1, 24, 20, 3),
    "no heads in groups": (2, 2, 2, 2, 8, 48, 2),
    "longer than is unrolled": (1, MAX_UNROLLED + 1, 2, 1, 8, 16, MAX_UNROLLED + 1),
}


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_the_delta_rule_equals_its_twin(shape, dtype):
    B, T, H, H_k, K, V, n = SHAPES[shape]
    memory = make_memory(B, H, K, V, 1, n=n, dtype=dtype)
    kept = torch.randint(0, n + 1, (B,), device=DEVICE)
    mixed, gates = make_block(B, T, H, H_k, K, V, dtype)
    twins, truths = copy_of(memory), DeltaMemory(*in_double(*copy_of(memory)))
    out = delta_rule_rows(mixed, gates, memory, kept, num_key_heads=H_k)
    twin = delta_rule_rows_eager(mixed, gates, twins, kept, num_key_heads=H_k)
    mixed64, *gates64 = in_double(mixed, *gates[:4])
    # The strength is rounded to the dtype of its input, which counts as part of what is computed.
    gates64[1] = torch.logit(gates.b.sigmoid().double())
    truth = delta_rule_rows_eager(mixed64, Gates(*gates64, gates.strength), truths, kept, num_key_heads=H_k)
    assert_as_good(out, twin, truth)
    for ours, its, true in zip(memory, twins, truths, strict=True):
        assert_as_good(ours, its, true)


@pytest.mark.gpu
@by_dtype
def test_settling_equals_its_twin_and_a_block_that_goes_on(dtype):
    B, H, H_k, K, V, n = 3, 4, 2, 16, 24, 4
    memory = make_memory(B, H, K, V, 1, n=n, dtype=dtype)
    kept = torch.tensor([0, 4, 2], device=DEVICE)
    twin, before, going_on = copy_of(memory), memory.state.clone(), copy_of(memory)
    settle_rows(memory, kept)
    settle_rows_eager(twin, kept)
    torch.testing.assert_close(memory.state, twin.state)
    assert torch.equal(memory.state[0], before[0])
    mixed, gates = make_block(B, 2, H, H_k, K, V, dtype)
    delta_rule_rows(mixed, gates, going_on, kept, num_key_heads=H_k)
    assert torch.equal(going_on.state, memory.state)


@pytest.mark.gpu
def test_a_row_depends_on_nothing_else():
    B, T, H, H_k, K, V = 3, 3, 4, 2, 16, 32
    memory, (mixed, gates) = make_memory(B, H, K, V, 1), make_block(B, T, H, H_k, K, V, torch.float32)
    kept = torch.tensor([1, 0, 3], device=DEVICE)
    alone = DeltaMemory(*(x[1:2].clone() for x in memory))
    others = Gates(gates.a[1:2], gates.b[1:2], *gates[2:])
    out = delta_rule_rows(mixed, gates, memory, kept, num_key_heads=H_k)
    assert torch.equal(out[1:2], delta_rule_rows(mixed[1:2], others, alone, kept[1:2], num_key_heads=H_k))
    for ours, its in zip(memory, alone, strict=True):
        assert torch.equal(ours[1:2], its)


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("T", [1, 4, MAX_UNROLLED + 1])
@pytest.mark.parametrize("has_bias", [False, True], ids=["bare", "bias"])
def test_the_convolution_equals_its_twin(T, has_bias, dtype):
    B, C, W, n = 3, 150, 4, max(T, 4)
    window, x, weight = random(B, W + n, C, dtype=dtype), random(B, T, C, dtype=dtype), random(C, W, dtype=dtype)
    bias = random(C, dtype=dtype) if has_bias else None
    kept = torch.tensor([0, n, 2], device=DEVICE)
    twins, truths = window.clone(), window.double()
    out = convolve_rows(x, weight, bias, window, kept)
    twin = convolve_rows_eager(x, weight, bias, twins, kept)
    assert torch.equal(window, twins)
    x64, weight64, bias64 = in_double(x, weight, bias)
    assert_as_good(out, twin, convolve_rows_eager(x64, weight64, bias64, truths, kept))


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("variant", GATED_VARIANTS)
def test_the_gated_norm_equals_its_twin(variant, dtype):
    x, gate, weight = random(7, 40, dtype=dtype), random(7, 40, dtype=dtype), random(40, dtype=dtype)
    out = gated_rms_norm(x, gate, weight, eps=1e-6, variant=variant)
    twin = gated_rms_norm_eager(x, gate, weight, eps=1e-6, variant=variant)
    x64, gate64, weight64 = in_double(x, gate, weight)
    scaled = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + 1e-6) * weight64
    assert_as_good(out, twin, scaled * torch.nn.functional.silu(gate64))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "variant"), [("qwen3_5_text", "llama"), ("lara_mini", "wide")])
def test_gated_norms_and_projections_of_a_net_become_kernels(name, variant):
    target = copy.deepcopy(make_target(name)).to(DEVICE, torch.bfloat16 if ON_GPU else torch.float16)
    net = next(iter(find_mixers(target).values()))
    x = random(2, net.hidden_size, dtype=target.dtype)
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b")
    with torch.no_grad(), fused(target) as swaps:
        assert swaps.norms[type(net.norm).__name__] == variant
        assert swaps.num_groups == len(target.model.layers)
        outs = [getattr(net, name)(x) for name in names]
    for name, out in zip(names, outs, strict=True):
        torch.testing.assert_close(out, getattr(net, name)(x), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_blocks_that_do_not_fit_are_refused():
    memory, (mixed, gates) = make_memory(1, 4, 8, 8, 1, n=2), make_block(1, 3, 4, 2, 8, 8, torch.float32)
    kept = torch.zeros(1, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match=r"mixed must be \[B, up to 2, 64\]"):
        delta_rule_rows(mixed, gates, memory, kept, num_key_heads=2)
    with pytest.raises(ValueError, match=r"window of at least 4 \+ T places"):
        convolve_rows(random(1, 3, 6), random(6, 4), None, random(1, 6, 6), kept)
