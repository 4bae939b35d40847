"""Eager twins against loops and the host; kernels against their twins, on a GPU or in Triton's interpreter.

Tests marked `gpu` need kernels to run. Where there is no GPU, `test_kernels_in_the_interpreter` runs them all in a
process of its own, on CPU tensors.
"""

import copy
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers.batches import pad, prompts_of
from helpers.capture import capture_on_cpus
from helpers.kernels import DEVICE, ON_GPU, assert_as_good, in_double, make_rows, random
from helpers.models import TEXT, make_drafter, make_target
from torch import nn
from torch.nn import functional as F
from transformers import Gemma2Config, LlamaConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hf_eagle3 import release_graphs
from hf_eagle3.kernels import attention, language
from hf_eagle3.kernels.argmax import BLOCK, argmax_rows, argmax_rows_eager
from hf_eagle3.kernels.attention import attend_rows, attend_rows_eager, choose_num_splits, write_rows, write_rows_eager
from hf_eagle3.kernels.deferred import Deferred
from hf_eagle3.kernels.experts import expert_linear, expert_linear_eager
from hf_eagle3.kernels.fusion import Swaps, functions, fused, has_forward_hooks, modules
from hf_eagle3.kernels.fusion import experts as expert_swaps
from hf_eagle3.kernels.fusion import projections as projection_swaps
from hf_eagle3.kernels.fusion.trials import swap_in
from hf_eagle3.kernels.linear import (
    MAX_ROWS,
    ROWS,
    TABLE,
    Blocks,
    choose_blocks,
    choose_gated_blocks,
    is_worth_it,
    linear_gated,
    linear_gated_eager,
    linear_group,
    linear_group_eager,
    linear_small,
    linear_small_eager,
)
from hf_eagle3.kernels.mlp import gate, gate_eager
from hf_eagle3.kernels.norms import VARIANTS, add_rms_norm, add_rms_norm_eager, rms_norm, rms_norm_eager
from hf_eagle3.kernels.qkv import join_projections, view_as_one
from hf_eagle3.kernels.rotary import (
    Rotation,
    apply_rotary,
    apply_rotary_eager,
    rotary_angles,
    rotary_angles_eager,
    rotate_and_write,
)
from hf_eagle3.modeling import attention_eagle3

pytestmark = pytest.mark.any_release

# The interpreter has no bfloat16 arithmetic.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
HALF = torch.bfloat16 if ON_GPU else torch.float16

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- twins ----


@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [(None, None, False), (3, None, False), (None, 2.0, False), (4, 1.5, True)],
    ids=["full", "window", "softcap", "all"],
)
def test_attention_twin_is_softmax_over_what_a_token_sees(window, softcap, has_sinks):
    B, H, H_kv, T, D, L = 3, 4, 2, 3, 8, 11
    query, keys, values, start = in_double(*(x.cpu() for x in make_rows(B, H, H_kv, T, D, L)))
    sinks = torch.randn(H, dtype=torch.float64) if has_sinks else None
    out = attend_rows_eager(query, keys, values, start, scaling=0.3, window=window, softcap=softcap, sinks=sinks)
    assert out.shape == (B, T, H, D)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                last = int(start[b]) + t
                first = 0 if window is None else max(0, last - window + 1)
                weights, total = [], math.exp(sinks[h]) if has_sinks else 0.0
                for slot in range(first, last + 1):
                    score = 0.3 * float(query[b, h, t] @ keys[b, slot, h // 2])
                    score = softcap * math.tanh(score / softcap) if softcap else score
                    weights.append(math.exp(score))
                total += sum(weights)
                expected = sum(w * values[b, first + i, h // 2] for i, w in enumerate(weights)) / total
                torch.testing.assert_close(out[b, t, h], expected)


def test_writing_twin_writes_its_slots_only():
    keys, values = torch.zeros(2, 6, 1, 3), torch.zeros(2, 6, 1, 3)
    new_keys, new_values = torch.randn(2, 1, 2, 3), torch.randn(2, 1, 2, 3)
    write_rows_eager(keys, values, new_keys, new_values, torch.tensor([0, 4]))
    for cache, new in ((keys, new_keys), (values, new_values)):
        assert torch.equal(cache[0, :2, 0], new[0, 0])
        assert torch.equal(cache[1, 4:, 0], new[1, 0])
        assert not cache[0, 2:].any()
        assert not cache[1, :4].any()


@pytest.mark.parametrize(
    ("kind", "variant"),
    [(LlamaRMSNorm, "llama"), (GptOssRMSNorm, "wide"), (Gemma2RMSNorm, "shifted")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_norm_twin_is_the_hosts(kind, variant):
    norm = kind(40, eps=1e-5).bfloat16()
    nn.init.normal_(norm.weight)
    x = torch.randn(7, 40).bfloat16()
    results = {v: rms_norm_eager(x, norm.weight, eps=1e-5, variant=v) for v in VARIANTS}
    assert torch.equal(results[variant], norm(x))
    assert all(not torch.equal(results[v], norm(x)) for v in VARIANTS if v != variant)


def test_rotary_twin_is_the_hosts():
    q, k = torch.randn(2, 4, 3, 16).bfloat16(), torch.randn(2, 2, 3, 16).bfloat16()
    for width, host in ((16, modeling_llama), (8, modeling_gpt_oss)):
        cos, sin = torch.randn(2, 3, width).bfloat16(), torch.randn(2, 3, width).bfloat16()
        expected = host.apply_rotary_pos_emb(q, k, cos, sin)
        assert all(map(torch.equal, apply_rotary_eager(q, k, cos, sin), expected))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_twins_are_the_hosts(activation):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
    mlp = LlamaMLP(LlamaConfig(**sizes)) if activation == "silu" else Gemma2MLP(Gemma2Config(**sizes))
    x = torch.randn(3, 16)
    middle = gate_eager(mlp.gate_proj(x), mlp.up_proj(x), activation=activation)
    torch.testing.assert_close(mlp.down_proj(middle), mlp(x))
    together = linear_gated_eager(x, mlp.gate_proj.weight, mlp.up_proj.weight, activation=activation)
    torch.testing.assert_close(together, middle)


def test_linear_twin_is_linear():
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(5, 16), torch.randn(5)
    torch.testing.assert_close(linear_small_eager(x, weight, bias), F.linear(x, weight, bias))
    first, second = linear_group_eager(x, [weight, weight[:2]], [None, bias[:2]])
    torch.testing.assert_close(first, F.linear(x, weight))
    torch.testing.assert_close(second, F.linear(x, weight[:2], bias[:2]))


def test_splits_fill_the_device_and_no_split_is_without_slots():
    assert choose_num_splits(512, 10_000, 64) == 1
    assert choose_num_splits(8, 10_000, 64) == 16
    assert choose_num_splits(8, 130, 64) == 3
    assert choose_num_splits(1, 10**6, 64) == 64


def test_a_table_says_how_linear_layers_are_cut():
    assert all(len(cuts) == len(ROWS) for cuts in TABLE.values())
    for M in range(1, 65):
        for N in (1, 192, 576, 2112, 4096, 12288, 151936):
            for K in (16, 576, 2880, 4096):
                blocks = choose_blocks(N, K, M)
                assert blocks.kind == "dot" or M <= 4
                assert blocks.split_k == 1 or 1024 * blocks.split_k <= K
            assert choose_gated_blocks(N, M).kind == "dot"
    assert choose_blocks(4096, 4096, 1).block_k == 2048
    assert choose_blocks(4096, 2880, 1).block_k == 1024
    assert choose_blocks(32000, 4096, 9) == choose_blocks(32000, 4096, 16) != choose_blocks(32000, 4096, 17)
    assert is_worth_it(4096, 16)
    assert not is_worth_it(4096, 17)
    assert is_worth_it(128256, 64)
    assert not is_worth_it(128256, 65)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])  # without and with biases
def test_joining_projections_moves_weights_and_changes_nothing(kind, tmp_path):
    model = copy.deepcopy(make_target(kind))
    ids = torch.randint(2, 64, (2, 5))
    expected, parameters = model(ids).logits, dict(model.named_parameters())
    values = {name: value.detach().clone() for name, value in parameters.items()}
    assert join_projections(model) == len(model.model.layers) == join_projections(model)  # again: nothing to do
    assert torch.equal(model(ids).logits, expected)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    for layer in model.model.layers:
        parts = [getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        joined = view_as_one([part.weight for part in parts])
        assert torch.equal(joined, torch.cat([part.weight for part in parts]))
        with torch.no_grad():
            parts[1].weight.mul_(2)
        assert torch.equal(joined, torch.cat([part.weight for part in parts]))
        with torch.no_grad():
            parts[1].weight.mul_(0.5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, values[name]) for name, value in again.named_parameters())
    moved = model.to(torch.float64)
    assert (
        view_as_one([moved.model.layers[0].self_attn.q_proj.weight, moved.model.layers[0].self_attn.k_proj.weight])
        is None
    )


def test_only_plain_projections_are_joined():
    class Attention(nn.Module):
        def __init__(self, q, k, v):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = q, k, v

    class Other(nn.Linear):
        pass

    plain = nn.Linear(16, 8)
    others = [Other(16, 8), nn.Linear(16, 8).half(), nn.Linear(12, 8), nn.Linear(16, 8, device="meta"), nn.Identity()]
    models = [Attention(nn.Linear(16, 8), plain, other) for other in others]
    before = [[(name, p.data_ptr()) for name, p in model.named_parameters()] for model in models]
    assert join_projections(*models) == 0
    assert before == [[(name, p.data_ptr()) for name, p in model.named_parameters()] for model in models]
    mixed = Attention(nn.Linear(16, 8), nn.Linear(16, 4, bias=False), nn.Linear(16, 8))
    assert join_projections(mixed) == 1  # some without bias: weights alone
    assert view_as_one([mixed.q_proj.weight, mixed.k_proj.weight, mixed.v_proj.weight]).shape == (20, 16)


def test_tensors_are_one_only_where_they_follow_each_other():
    whole = torch.randn(6, 4)
    assert view_as_one([whole[:2], whole[2:3], whole[3:]]).data_ptr() == whole.data_ptr()
    assert view_as_one([whole[1:2], whole[2:5]]).shape == (4, 4)
    for parts in (
        [whole[:2], whole[3:]],
        [whole[2:], whole[:2]],
        [whole[:, :2], whole[:, 2:]],
        [whole[:2], torch.randn(1, 4)],
    ):
        assert view_as_one(parts) is None


@pytest.mark.skipif(language.is_available(torch.device(DEVICE)), reason="kernels can run here")
def test_without_kernels_nothing_is_replaced_and_they_say_why():
    model = modeling_llama.LlamaForCausalLM(LlamaConfig(**TINY)).half()
    rotate = modeling_llama.apply_rotary_pos_emb
    with fused(model) as swaps:
        assert swaps == Swaps()
        assert not any("forward" in vars(module) for module in model.modules())
        assert modeling_llama.apply_rotary_pos_emb is rotate
    with pytest.raises((ImportError, ValueError), match=r"Triton|CUDA tensors"):
        linear_small(torch.randn(1, 16), torch.randn(4, 16))


@pytest.mark.skipif(ON_GPU, reason="the GPU runs them")
@pytest.mark.parametrize("which", ["gpu and not slow", pytest.param("gpu and slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(which):
    pytest.importorskip("triton")
    files = [
        __file__,
        *(
            str(Path(__file__).with_name(f"test_{name}.py"))
            for name in ("kernel_shapes", "noise", "delta_rule", "state_space", "tree_attention")
        ),
    ]
    command = [sys.executable, "-m", "pytest", *files, "-m", which, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


# ---- kernels ----


ATTENTION = {
    "packed heads": ((3, 8, 2, 4, 32), {}),
    "one token": ((2, 4, 4, 1, 64), {}),
    "odd group, window": ((2, 3, 1, 4, 64), {"window": 5}),
    "sinks and window": ((2, 16, 2, 4, 64), {"window": 20, "sinks": True}),
    "sinks": ((2, 8, 1, 1, 128), {"sinks": True}),
    "softcap, head of 96": ((2, 4, 2, 3, 96), {"softcap": 5.0}),
    "head of 256, scores far below the softcap": ((1, 2, 1, 2, 256), {"window": 33, "softcap": 50.0}),
    "several tiles": ((2, 4, 1, 20, 32), {"window": 7}),
    "narrow values": ((3, 4, 4, 4, 48), {"D_v": 32}),
    "wide values, sinks and window": ((2, 8, 2, 3, 24), {"D_v": 64, "window": 9, "sinks": True}),
}


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("num_splits", [None, 1, 3], ids=lambda n: f"splits-{n}")
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_equals_its_twin(shape, num_splits, dtype):
    (B, H, H_kv, T, D), options = ATTENTION[shape]
    options = dict(options)
    rows = make_rows(B, H, H_kv, T, D, 70, dtype, D_v=options.pop("D_v", None))
    sinks = random(H, dtype=dtype) if options.pop("sinks", False) else None
    out = attend_rows(*rows, scaling=D**-0.5, sinks=sinks, num_splits=num_splits, blocks=(16, 4, 2), **options)
    twin = attend_rows_eager(*rows, scaling=D**-0.5, sinks=sinks, **options)
    *rows64, sinks64 = in_double(*rows, sinks)
    truth = attend_rows_eager(*rows64, scaling=D**-0.5, sinks=sinks64, **options)
    assert_as_good(out, twin, truth)


@pytest.mark.gpu
def test_attention_of_a_row_depends_on_nothing_else():
    query, keys, values, start = make_rows(3, 4, 2, 4, 32, 40, HALF)
    out = attend_rows(query, keys, values, start, scaling=0.2, num_splits=2)
    assert torch.equal(out, attend_rows(query, keys, values, start, scaling=0.2, num_splits=2))
    others = [x.clone() for x in (query, keys, values)]
    for x in others:
        x[0].normal_()
    assert torch.equal(out[1:], attend_rows(*others, start, scaling=0.2, num_splits=2)[1:])
    longer = [F.pad(x, (0, 0, 0, 0, 0, 9), value=float("nan")) for x in (keys, values)]  # more capacity
    assert torch.equal(out, attend_rows(query, *longer, start, scaling=0.2, num_splits=2))


@pytest.mark.gpu
def test_attention_refuses_what_it_cannot_read():
    query, keys, values, start = make_rows(2, 4, 2, 4, 32, 40)
    with pytest.raises(ValueError, match=r"H_kv dividing H"):
        attend_rows(query, keys[:1], values, start, scaling=1.0)
    with pytest.raises(ValueError, match=r"contiguous in their last dimension"):
        attend_rows(query.transpose(2, 3).contiguous().transpose(2, 3), keys, values, start, scaling=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "D_v"), [(48, 48), (48, 20), (20, 48), (192, 128)])
def test_writing_equals_its_twin(D, D_v):
    rows, new = random(3, 20, 3, D + D_v), random(3, 4, 3, D + D_v)
    start = torch.tensor([0, 16, 7], device=DEVICE)
    expected = rows.clone()
    new_keys, new_values = (x.transpose(1, 2) for x in new.tensor_split([D], dim=-1))
    write_rows_eager(*expected.tensor_split([D], dim=-1), new_keys, new_values, start)
    write_rows(*rows.tensor_split([D], dim=-1), new_keys, new_values, start)
    assert torch.equal(rows, expected)
    with pytest.raises(ValueError, match=r"keys must be \[B, L, H_kv, D\]"):
        write_rows(*rows.tensor_split([D + 1], dim=-1), new_keys, new_values, start)


@pytest.mark.gpu
def test_writing_into_a_wider_cache():
    """Autocast makes values narrower than what the host keeps them in."""
    rows, new = torch.zeros(2, 9, 1, 16, device=DEVICE), random(2, 1, 4, 16)
    start = torch.tensor([0, 5], device=DEVICE)
    expected = (rows.clone(), rows.clone())
    write_rows_eager(*expected, new, new.to(HALF), start)
    found = (rows.clone(), rows.clone())
    write_rows(*found, new, new.to(HALF), start)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(found[1][1, 5:, 0], new.to(HALF).float()[1, 0])


@pytest.mark.gpu
@pytest.mark.slow  # in the interpreter
def test_values_narrower_than_keys_in_whole_rounds(monkeypatch):
    """DeepSeek-V3's attention, written and read by kernels: captured on a GPU, recorded and run again elsewhere."""
    target = make_target("deepseek_v3")
    if ON_GPU:
        target = copy.deepcopy(target).cuda()
    else:
        capture_on_cpus(monkeypatch)
    drafter = make_drafter(target).to(DEVICE)
    batch = {name: value.to(DEVICE) for name, value in pad(prompts_of(7, 4)).items()}
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    plain = target.generate(**batch, **options)
    for told in ("captured", "replayed"):
        out = target.generate(**batch, assistant_model=drafter, **options)
        assert out.sequences.tolist() == plain.sequences.tolist()
        assert out.speculation.graphs.startswith(told), out.speculation.graphs
    release_graphs()


LINEAR = {
    "by size": None,
    "dot": Blocks("dot", 32, 32, 1, 4, 3),
    "dot, split": Blocks("dot", 16, 16, 3, 4, 3),
    "fma": Blocks("fma", 8, 32, 1, 4, 1),
    "fma, staged": Blocks("fma", 4, 32, 1, 4, 3),
}


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("K", [96, 100])
@pytest.mark.parametrize("M", [1, 3, 4, 17, 64])
@pytest.mark.parametrize("blocks", LINEAR)
def test_linear_equals_its_twin(blocks, M, K, dtype):
    blocks = LINEAR[blocks]
    if blocks is not None and blocks.kind == "fma" and M > 4:
        pytest.skip("fma is for up to four rows")
    x, bias = random(1, M, K, dtype=dtype), random(50, dtype=dtype)
    weights = [random(N, K, dtype=dtype) / K**0.5 for N in (50, 33, 16)]
    biases = [bias, None, bias[:16]]
    for n in (1, 3):
        group = linear_group(x, weights[:n], biases[:n], blocks=blocks)
        for out, weight, b in zip(group, weights, biases, strict=False):
            truth = linear_small_eager(*in_double(x, weight, b))
            assert_as_good(out, linear_small_eager(x, weight, b), truth)


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("M", [1, 4, 33])
def test_gated_linear_equals_its_twin(M, activation, dtype):
    x, weights = random(M, 100, dtype=dtype), [random(40, 100, dtype=dtype) / 10 for _ in range(2)]
    out = linear_gated(x, *weights, activation=activation, blocks=Blocks("dot", 16, 32, 1, 4, 3))
    twin = linear_gated_eager(x, *weights, activation=activation)
    assert_as_good(out, twin, linear_gated_eager(*in_double(x, *weights), activation=activation))


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", LINEAR)
def test_a_rows_linear_result_depends_on_no_other(blocks):
    x, weight = random(3, 96, dtype=HALF), random(50, 96, dtype=HALF)
    out = linear_small(x, weight, blocks=LINEAR[blocks])
    assert torch.equal(out, linear_small(x, weight, blocks=LINEAR[blocks]))
    others = random(3, 96, dtype=HALF)
    others[1] = x[1]
    assert torch.equal(out[1], linear_small(others, weight, blocks=LINEAR[blocks])[1])


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("is_transposed", [False, True], ids=["N, K", "K, N"])
@pytest.mark.parametrize(("R", "each", "E"), [(1, 4, 4), (4, 2, 7), (60, 4, 5), (33, 1, 2)])
def test_experts_equal_their_twin(R, each, E, is_transposed, dtype):
    K, N = 100, 70
    x, bias = random(R, K, dtype=dtype), random(E, N, dtype=dtype)
    weight = random(*((E, K, N) if is_transposed else (E, N, K)), dtype=dtype) / 10
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(E, generator=generator)[:each] for _ in range(R)]).flatten().to(x.device)
    for b, choices in ((None, chosen), (bias, chosen), (bias, torch.full_like(chosen, E - 1))):
        out = expert_linear(x, weight, b, choices, is_transposed=is_transposed)
        twin = expert_linear_eager(x, weight, b, choices, is_transposed=is_transposed)
        truth = expert_linear_eager(*in_double(x, weight, b), choices, is_transposed=is_transposed)
        assert_as_good(out, twin, truth)


@pytest.mark.gpu
def test_second_linear_layer_of_experts_has_a_row_for_each_choice():
    y, weight = random(6, 32, dtype=HALF), random(3, 32, 16, dtype=HALF)
    chosen = torch.tensor([2, 0, 1, 2, 2, 0], device=y.device)
    out = expert_linear(y, weight, None, chosen, is_transposed=True)
    alone = torch.cat(
        [expert_linear(y[i : i + 1], weight, None, chosen[i : i + 1], is_transposed=True) for i in range(6)]
    )
    assert torch.equal(out, alone)  # and no row's result depends on the others
    with pytest.raises(ValueError, match="1 to 1024 choices"):
        expert_linear(y, weight, None, chosen[:4], is_transposed=True)


@pytest.mark.gpu
def test_experts_that_do_something_else_are_left_alone():
    model = copy.deepcopy(make_target("gpt_oss")).to(DEVICE, HALF).eval()

    class LargerExperts(type(model.model.layers[0].mlp.experts)):
        def forward(self, *args):
            return 1.1 * super().forward(*args)

    for layer in model.model.layers:
        layer.mlp.experts.__class__ = LargerExperts
    with torch.no_grad(), fused(model) as swaps:
        assert swaps.experts == []


@pytest.mark.gpu
def test_linear_refuses_what_it_is_not_for():
    weight = random(4, 16)
    with pytest.raises(ValueError, match=r"1 to 64 rows, got 65"):
        linear_small(random(65, 16), weight)
    with pytest.raises(ValueError, match=r"\[N, 16\], contiguous"):
        linear_small(random(1, 16), random(16, 4).T)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("D", [48, 1000])
def test_norm_rounds_where_its_twin_does(D, variant):
    x, weight = random(2, 9, D, dtype=HALF), random(D, dtype=HALF)
    out, twin = rms_norm(x, weight, eps=1e-5, variant=variant), rms_norm_eager(x, weight, eps=1e-5, variant=variant)
    assert (out == twin).float().mean() > 0.99
    torch.testing.assert_close(out, twin, rtol=2 * torch.finfo(HALF).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("D", [48, 1000])
def test_norm_of_a_sum_is_the_norm_of_pytorchs_sum(D, variant):
    x, y, weight = random(2, 9, D, dtype=HALF), random(2, 9, D, dtype=HALF), random(D, dtype=HALF)
    total, out = add_rms_norm(x, y, weight, eps=1e-5, variant=variant)
    assert torch.equal(total, add_rms_norm_eager(x, y, weight, eps=1e-5, variant=variant)[0])
    assert torch.equal(out, rms_norm(total, weight, eps=1e-5, variant=variant))
    place = torch.full_like(x, torch.nan)
    assert add_rms_norm(x, y, weight, eps=1e-5, variant=variant, total=place)[0] is place
    assert torch.equal(place, total)


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, BLOCK + 1), (2, 3, 5 * BLOCK), (1, 40 * BLOCK), (25, 70)])
def test_argmax_is_the_first_of_the_largest(shape, dtype):
    x = random(*shape, dtype=dtype)
    assert torch.equal(argmax_rows(x, num_programs=24), argmax_rows_eager(x))
    ties = (x * 2).round() / 2  # many zeros of either sign, too
    assert torch.equal(argmax_rows(ties, num_programs=24), argmax_rows_eager(ties))
    zeros = torch.zeros_like(x)
    assert torch.equal(argmax_rows(zeros.neg(), num_programs=24), argmax_rows_eager(zeros))


@pytest.mark.gpu
@by_dtype
def test_argmax_of_values_that_are_no_numbers(dtype):
    V = 2 * BLOCK + 5
    x = random(6, V, dtype=dtype)
    x[0, 1500:] = torch.inf
    x[1] = -torch.inf
    x[2, :] = -torch.inf
    x[2, -1] = torch.finfo(dtype).min
    x[3, 7], x[3, 1000], x[3, 3] = torch.nan, -torch.nan, torch.inf
    x[4, -1] = torch.nan
    x[5] = torch.nan
    assert argmax_rows(x).tolist() == [1500, 0, V - 1, 7, V - 1, 0] == argmax_rows_eager(x).tolist()


@pytest.mark.gpu
def test_argmax_of_rows_that_lie_apart():
    x = random(3, 4, 3 * BLOCK, dtype=HALF)
    for part in (x[:, -1], x[1], x[:, 1:3], x.transpose(0, 1), x[..., ::2], x[:1].expand(2, -1, -1)):
        assert torch.equal(argmax_rows(part), argmax_rows_eager(part))


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("is_shared", [False, True], ids=["full", "shared"])
@pytest.mark.parametrize("rows", [1, 2], ids=["one-row-of-angles", "per-row"])
def test_rotary_equals_its_twin(rows, is_shared, dtype):
    q, k = (random(2, 3, heads, 48, dtype=dtype).transpose(1, 2) for heads in (9, 2))
    cos, sin = (random(rows, 3, 24 if is_shared else 48, dtype=dtype) for _ in range(2))
    for out, twin in zip(apply_rotary(q, k, cos, sin), apply_rotary_eager(q, k, cos, sin), strict=True):
        assert torch.equal(out, twin)


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize(("H", "H_kv", "D"), [(9, 2, 48), (4, 4, 32), (16, 1, 64)])
def test_rotating_and_writing_equals_both_twins(H, H_kv, D, dtype):
    # Heads of one product, as joined projections give them.
    both = random(2, 3, (H + 2 * H_kv) * D, dtype=dtype)
    q, k, v = (x.unflatten(-1, (-1, D)).transpose(1, 2) for x in both.split([H * D, H_kv * D, H_kv * D], dim=-1))
    cos, sin = (random(2, 3, D, dtype=dtype) for _ in range(2))
    start = torch.tensor([0, 6], device=DEVICE)
    rotation = Rotation(q, k, cos, sin, *(torch.full(x.shape, torch.nan).to(x) for x in (q, k)))
    caches, twins = ([torch.zeros(2, 9, H_kv, D).to(q) for _ in range(2)] for _ in range(2))
    rotate_and_write(rotation, v, *caches, start)
    turned = apply_rotary_eager(q, k, cos, sin)
    write_rows_eager(*twins, turned[1], v, start)
    assert all(map(torch.equal, [rotation.out_q, rotation.out_k, *caches], [*turned, *twins]))


@pytest.mark.gpu
@pytest.mark.parametrize("use", ["write", "read", "write other values", "write other keys", "rotate again"])
def test_a_rotation_is_there_for_whoever_reads_it(use, monkeypatch):
    target = make_target("llama")
    home = sys.modules[type(target).__module__]
    q, k, v = (random(2, 3, 4, 16, dtype=HALF).transpose(1, 2) for _ in range(3))
    cos, sin = (random(2, 3, 16, dtype=HALF) for _ in range(2))
    wide = random(2, 3, 4, 32, dtype=HALF).transpose(1, 2)
    start = torch.tensor([1, 0], device=DEVICE)
    fused_calls = []
    monkeypatch.setattr(attention, "rotate_and_write", lambda *a: fused_calls.append(1) or rotate_and_write(*a))

    def run():
        keys, values = (
            torch.zeros(2, 5, 4, D, device=DEVICE, dtype=HALF) for D in (16, 32 if "values" in use else 16)
        )
        turned_q, turned_k = home.apply_rotary_pos_emb(q, k, cos, sin)
        given = [turned_k, v]
        if use == "read":
            turned_k = turned_k + 0
        elif use == "write other values":
            given[1] = wide
        elif use == "write other keys":
            given[0] = k
        elif use == "rotate again":
            turned_q, turned_k = home.apply_rotary_pos_emb(turned_q, turned_k, cos, sin)
        write_rows(keys, values, *given, start)
        return turned_q, turned_k, keys, values

    expected = run()
    model = copy.deepcopy(target).to(DEVICE, HALF)
    with fused(model):
        out = run()
    assert all(map(torch.equal, out, expected))
    assert fused_calls == ([1] if use == "write" else [])


def test_at_most_one_operation_is_deferred():
    deferred, done = Deferred(), []
    first, second = torch.zeros(1), torch.zeros(1)
    deferred.finish()
    deferred.defer("a", first, (1,), lambda: done.append("a"))
    assert deferred.take("b", first) is deferred.take("a", second) is None
    deferred.defer("b", second, (2,), lambda: done.append("b"))
    assert done == ["a"]
    assert deferred.take("b", second) == (2,)
    deferred.finish()
    assert done == ["a"]
    assert deferred.take("b", second) is None


@pytest.mark.gpu
@pytest.mark.parametrize("is_shared", [False, True], ids=["full", "shared"])
@pytest.mark.parametrize("half", [8, 24])
def test_angles_are_their_twins(half, is_shared):
    positions = torch.tensor([[0, 1, 2, 77], [4095, 131071, 1_000_000, 5]], device=DEVICE)[:, ::2]  # lying apart
    inverse = 1 / 500_000 ** (torch.arange(half, device=DEVICE) / half)
    options = {"scaling": 1.3, "dtype": HALF, "is_shared": is_shared}
    for out, twin in zip(
        rotary_angles(positions, inverse, **options), rotary_angles_eager(positions, inverse, **options), strict=True
    ):
        assert out.shape == twin.shape == (2, 2, half if is_shared else 2 * half)
        assert (out == twin).float().mean() > 0.98
        torch.testing.assert_close(out, twin, rtol=2 * torch.finfo(HALF).eps, atol=1e-5)


class OddRotaryEmbedding(modeling_llama.LlamaRotaryEmbedding):
    """Counts from one."""

    def forward(self, x, position_ids):
        return super().forward(x, position_ids + 1)


@pytest.mark.gpu
def test_angles_that_are_more_than_positions_are_left_alone():
    usual = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**TINY))
    odd = OddRotaryEmbedding(LlamaConfig(**TINY))
    grows = modeling_llama.LlamaRotaryEmbedding(
        LlamaConfig(**TINY, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    )
    yarn = modeling_llama.LlamaRotaryEmbedding(
        LlamaConfig(
            **TINY,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 16,
            },
        )
    )
    assert yarn.attention_scaling != 1
    axes = copy.deepcopy(make_target("qwen_vlm").get_decoder().rotary_emb)  # positions have three axes
    model = nn.ModuleList([nn.Linear(4, 4, dtype=HALF), usual, odd, grows, yarn, axes]).to(DEVICE)
    x, positions = random(2, 3, 4, dtype=HALF), torch.tensor([[0, 1, 2], [30, 31, 32]], device=DEVICE)
    others = [(x.float(), positions), (x, positions.int())]
    with fused(model) as swaps:
        assert ["forward" in vars(module) for module in model][:5] == [False, True, False, False, True]
        during = [module(x, positions) for module in (usual, yarn)]
        by_axes = axes(x, positions.expand(3, 2, 3))
        rest = [usual(*given) for given in others]
    assert all(map(torch.equal, by_axes, axes(x, positions.expand(3, 2, 3))))
    assert swaps.angles[:2] == ["LlamaRotaryEmbedding"] * 2
    for module, out in zip((usual, yarn), during, strict=True):
        for ours, theirs in zip(out, module(x, positions), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(HALF).eps, atol=1e-5)
    for given, out in zip(others, rest, strict=True):
        assert all(map(torch.equal, out, usual(*given)))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_rounds_where_its_twin_does(activation):
    a, b = random(3, 777, dtype=HALF), random(3, 777, dtype=HALF)
    out, twin = gate(a, b, activation=activation), gate_eager(a, b, activation=activation)
    assert (out == twin).float().mean() > 0.99
    torch.testing.assert_close(out, twin, rtol=4 * torch.finfo(HALF).eps, atol=1e-5)


# ---- fusion ----


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}


def make_mixtral():
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def is_untouched(model):
    return not any("forward" in vars(module) for module in model.modules())


def is_close(a, b):
    return float((a - b).float().norm()) <= 0.02 * float(b.float().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_oss", "mixtral"])
def test_fused_targets_compute_the_same_and_are_restored(kind):
    model = (make_mixtral() if kind == "mixtral" else make_target(kind)).to(DEVICE, HALF).eval()
    home = sys.modules[type(model).__module__]
    rotate = home.apply_rotary_pos_emb
    ids = torch.randint(2, 64, (2, 4), device=DEVICE)
    with torch.no_grad():
        before = model(ids).logits
        with fused(model) as swaps:
            assert not is_untouched(model)
            assert home.apply_rotary_pos_emb is not rotate
            during = model(ids).logits
        after = model(ids).logits
    assert set(swaps.norms.values()) == {{"gpt_oss": "wide", "gemma3": "shifted"}.get(kind, "llama")}
    assert list(swaps.mlps.values()) == {"gpt_oss": [], "mixtral": [], "gemma3": ["gelu_tanh"]}.get(kind, ["silu"])
    assert swaps.experts == {"gpt_oss": ["GptOssExperts"], "mixtral": ["MixtralExperts"]}.get(kind, [])
    assert swaps.rotaries == [home.__name__]
    angles = {"llama": "Llama", "qwen3": "Qwen3", "gpt_oss": "GptOss", "mixtral": "Mixtral"}  # Gemma 3 has two kinds
    assert swaps.angles == ([f"{angles[kind]}RotaryEmbedding"] if kind in angles else [])
    assert swaps.num_groups == len(model.model.layers)
    assert is_close(during, before)
    assert torch.equal(after, before)
    assert is_untouched(model)
    assert home.apply_rotary_pos_emb is rotate


def in_a_thread(function):
    """What `function` returns in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize("first_out", [0, 1])
def test_threads_that_leave_in_any_order_leave_nothing_behind(first_out):
    """Two threads record rounds of models of one family, whose code has one name for its rotation."""
    namespace, instance = {"rotate": len}, {}
    stacks, pools = [ExitStack(), ExitStack()], [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
    for stack, pool, ours in zip(stacks, pools, (min, max), strict=True):
        pool.submit(swap_in, stack, namespace, "rotate", ours, len).result()
        pool.submit(swap_in, stack, instance, "forward", ours, len).result()
    for place, name in ((namespace, "rotate"), (instance, "forward")):
        assert [pool.submit(lambda n=name, p=place: p[n]([7, 3, 5])).result() for pool in pools] == [3, 7]
        assert place[name]([7, 3, 5]) == 3  # this thread's: how many there are
    for i in (first_out, 1 - first_out):
        assert "forward" in instance
        pools[i].submit(stacks[i].close).result()
        assert namespace["rotate"]([7, 5, 1, 1]) == 4
    assert namespace == {"rotate": len}
    assert instance == {}
    for pool in pools:
        pool.shutdown()


def test_what_somebody_puts_there_meanwhile_stays():
    namespace, stack = {"rotate": len}, ExitStack()
    swap_in(stack, namespace, "rotate", max, len)
    namespace["rotate"] = sum
    stack.close()
    assert namespace == {"rotate": sum}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_other_threads_run_none_of_our_kernels(kind, monkeypatch):
    """Neither another model of the family nor the same one, while rounds are recorded."""
    model = make_target(kind).to(DEVICE, HALF).eval()
    other = copy.deepcopy(model)
    ids, seen = torch.randint(2, 64, (2, 4), device=DEVICE), []
    homes = dict.fromkeys(("apply_rotary", "rms_norm", "add_rms_norm", "linear_gated"), modules)
    homes |= {"linear_group": projection_swaps, "expert_linear": expert_swaps}
    for name, home in homes.items():
        kernel = getattr(home, name)

        def record(*args, kernel=kernel, **kwargs):
            seen.append(threading.get_ident())
            return kernel(*args, **kwargs)

        monkeypatch.setattr(home, name, record)
    with torch.no_grad():
        expected = model(ids).logits
    with fused(model), torch.no_grad():
        seen.clear()
        for someone in (model, other):
            assert torch.equal(in_a_thread(lambda m=someone: torch.no_grad()(m)(ids).logits), expected)
        assert not seen
        model(ids)
        assert set(seen) == {threading.get_ident()}
    assert is_untouched(model)


@pytest.mark.gpu
def test_the_drafter_is_fused_too():
    drafter = make_drafter(make_target("llama")).to(DEVICE, HALF).eval()
    rotate = attention_eagle3.apply_rotary_pos_emb
    ids = torch.randint(2, 64, (2, 3), device=DEVICE)
    states = random(2, 3, drafter.config.num_captured_states * drafter.config.target_hidden_size, dtype=HALF)
    with torch.no_grad():
        before = drafter(ids, aux_hidden_states=states)
        with fused(drafter) as swaps:
            during = drafter(ids, aux_hidden_states=states)
    assert swaps.norms == {"LlamaRMSNorm": "llama"}
    assert attention_eagle3.__name__ in swaps.rotaries
    assert swaps.angles == ["LlamaRotaryEmbedding"]
    assert swaps.num_groups == len(drafter.layers)
    assert is_close(during.logits, before.logits)
    assert is_close(during.feedback, before.feedback)
    assert attention_eagle3.apply_rotary_pos_emb is rotate
    assert is_untouched(drafter)


@pytest.mark.gpu
def test_all_is_restored_after_an_exception():
    model = modeling_llama.LlamaForCausalLM(LlamaConfig(**TINY)).to(DEVICE, HALF)
    rotate = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(RuntimeError, match="on purpose"), fused(model):
        raise RuntimeError("on purpose")
    assert is_untouched(model)
    assert modeling_llama.apply_rotary_pos_emb is rotate


class CentredRMSNorm(LlamaRMSNorm):
    """Looks like one, and is not."""

    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class SwappedMLP(LlamaMLP):
    """Activates the wrong half."""

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """Turns the other way; here because this module's classes would call it by this name."""
    return apply_rotary_eager(q, k, cos, -sin)


@pytest.mark.gpu
def test_what_only_looks_like_a_known_layer_is_left_alone():
    model = nn.ModuleList([CentredRMSNorm(16), SwappedMLP(LlamaConfig(**TINY)), nn.LayerNorm(16)]).to(DEVICE, HALF)
    ours = apply_rotary_pos_emb
    with fused(model) as swaps:
        assert is_untouched(model)
        assert apply_rotary_pos_emb is ours
    assert swaps == Swaps()


@pytest.mark.gpu
def test_hooked_layers_are_left_alone():
    model = nn.ModuleList([LlamaRMSNorm(16), LlamaMLP(LlamaConfig(**TINY))]).to(DEVICE, HALF)
    model[0].register_forward_hook(lambda *_: None)
    model[1].gate_proj.register_forward_pre_hook(lambda *_: None)
    with fused(model) as swaps:
        assert is_untouched(model)
    assert not swaps.norms
    assert not swaps.mlps


def test_hooks_that_the_host_leaves_behind_do_not_count():
    model = copy.deepcopy(make_target("llama"))
    model(torch.tensor([[3, 4]]), output_hidden_states=True)
    hooked = [module for module in model.modules() if module._forward_hooks]
    assert hooked  # else the host does it in another way now
    assert not any(map(has_forward_hooks, model.modules()))
    hooked[0].register_forward_hook(lambda *_: None)
    model.lm_head.register_forward_pre_hook(lambda *_: None)
    assert [m for m in model.modules() if has_forward_hooks(m)] == [hooked[0], model.lm_head]


@pytest.mark.gpu
def test_linear_layers_over_few_rows_are_ours_and_others_the_hosts():
    called = []

    def linear(x, weight, bias=None):
        called.append(x.shape)
        return linear_small(x, weight, bias)

    weight, bias = random(8, 16, dtype=HALF), random(8, dtype=HALF)

    class Quantized(torch.Tensor):
        pass

    with functions.FunctionSwaps(set(), linear=linear):
        F.linear(random(3, 16, dtype=HALF), weight, bias)
        F.linear(random(1, 3, 16, dtype=HALF), weight, bias=bias)
        assert called == [(3, 16), (1, 3, 16)]
        F.linear(random(100, 16, dtype=HALF), weight)  # many rows
        F.linear(random(3, 16), weight.float())  # float32
        F.linear(random(3, 16, dtype=HALF), weight.as_subclass(Quantized))
        F.linear(random(3, 16, dtype=HALF).requires_grad_(), weight).sum().backward()
        F.linear(random(3, 8, dtype=HALF), weight.T)  # not contiguous
        F.linear(random(3, 16, dtype=HALF), weight[0])  # a vector
        F.linear(random(0, 16, dtype=HALF), weight)  # nothing
    F.linear(random(3, 16, dtype=HALF), weight, bias)  # outside
    assert len(called) == 2


class Stream(nn.Module):
    """A residual stream of one norm."""

    def __init__(self, use):
        super().__init__()
        self.norm, self.use = LlamaRMSNorm(16), use

    def forward(self, x, y):
        return self.use(x + y, self.norm, x)


def write_between(total, norm, x):
    x.mul_(3)  # a part of the sum, after it
    return total, norm(total), x


def norm_another(total, norm, x):
    return norm(x), total


def view_and_norm(total, norm, x):
    flat = total.view(-1, 16)
    return norm(total), flat, norm(flat)


# What follows a sum, and how many norms can take it.
USES = {
    "a norm": (lambda total, norm, _: (norm(total), total), 1),
    "two norms": (lambda total, norm, _: (norm(total), norm(total), total), 1),
    "properties, and a norm": (lambda total, norm, _: (norm(total) if total.dtype == HALF else None, total), 1),
    "nothing": (lambda total, *_: (total,), 0),
    "another reader": (lambda total, norm, _: (total * 2, norm(total)), 0),
    "another sum": (lambda total, norm, x: (norm(total + x), total), 1),
    "a writer": (write_between, 0),
    "a norm of something else": (norm_another, 0),
    "a view": (view_and_norm, 0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("use", USES)
def test_a_sum_is_there_for_whoever_reads_it(use, monkeypatch):
    taken = []
    monkeypatch.setattr(modules, "add_rms_norm", lambda *a, **k: taken.append(1) or add_rms_norm(*a, **k))
    function, num_taken = USES[use]
    model = Stream(function).to(DEVICE, HALF).requires_grad_(False)
    x, y = random(2, 3, 16, dtype=HALF), random(2, 3, 16, dtype=HALF)
    expected = model(x.clone(), y)
    with fused(model):
        out = model(x.clone(), y)
    assert all(map(torch.equal, out, expected))
    assert len(taken) == num_taken


@pytest.mark.gpu
def test_sums_and_choices_that_are_not_for_kernels_are_torchs():
    norm = LlamaRMSNorm(16).to(DEVICE, HALF).requires_grad_(False)
    x, many = random(3, 16, dtype=HALF), random(2, functions.MANY_VALUES, dtype=HALF)
    pairs = [
        (x, 1),
        (x, random(16, dtype=HALF)),
        (x.T, x.T),
        (x.float(), x.float()),
        (x[:, 0], x[:, 0]),
        (x, x.float()),
    ]
    with fused(norm), functions.FunctionSwaps({16}, argmax=lambda _: pytest.fail("a kernel ran")):
        sums = [a + b for a, b in pairs]
        assert torch.equal(torch.add(x, x, alpha=2), x * 3)
        assert many.argmax().dim() == 0
        assert many.argmax(0).shape == (functions.MANY_VALUES,)
        assert many[:, :-1].argmax(-1).shape == (2,)
        assert many[0].argmax(-1).dim() == 0
        assert many.argmax(-1, keepdim=True).shape == (2, 1)
        assert many.double().argmax(-1).shape == (2,)
        trained = x.clone().requires_grad_()
        norm(trained + x).sum().backward()
    assert all(torch.equal(total, a + b) for total, (a, b) in zip(sums, pairs, strict=True))
    assert trained.grad is not None


@pytest.mark.gpu
def test_a_choice_among_many_is_ours():
    called = []
    x = random(2, 3, functions.MANY_VALUES, dtype=HALF)
    with functions.FunctionSwaps(set(), argmax=lambda x: called.append(x.shape) or argmax_rows(x)):
        found, last = x.argmax(-1), x[:, -1].float().argmax(-1)
    assert torch.equal(found, argmax_rows_eager(x))
    assert torch.equal(last, found[:, -1])
    assert called == [(2, 3, functions.MANY_VALUES), (2, functions.MANY_VALUES)]


@pytest.mark.gpu
def test_projections_of_different_inputs_are_computed_apart():
    attention = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        attention.add_module(name, nn.Linear(16, 8, bias=name == "k_proj"))
    attention.to(DEVICE, HALF).requires_grad_(False)
    x, other = random(2, 16, dtype=HALF), random(2, 16, dtype=HALF)

    def run(change):
        q, k = attention.q_proj(x), attention.k_proj(other)
        y = x.clone()
        q_again = attention.q_proj(y)
        if change:
            y.mul_(2)
        return q, k, q_again, attention.k_proj(y), attention.v_proj(y), attention.v_proj(x)

    for change in (False, True):
        expected = run(change)
        with fused(attention) as swaps:
            assert swaps.num_groups == 1
            assert all(map(is_close, run(change), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [(), ("k_proj",), ("q_proj", "k_proj", "v_proj")], ids=len)
@pytest.mark.parametrize("are_joined", [False, True])
def test_joined_projections_of_many_rows_are_one_product(are_joined, biased, monkeypatch):
    attention = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        attention.add_module(name, nn.Linear(16, 32 if name == "q_proj" else 8, bias=name in biased))
    attention.to(DEVICE, HALF).requires_grad_(False)
    if are_joined:
        join_projections(attention)
    x = random(2, MAX_ROWS, 16, dtype=HALF)
    called = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: called.append(len(w)) or linear(x, w, b))
    with fused(attention):
        out = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    assert called == ([48] if are_joined and len(biased) != 1 else [32, 8, 8])
    monkeypatch.undo()
    for result, name in zip(out, ("q_proj", "k_proj", "v_proj"), strict=True):
        assert is_close(result, getattr(attention, name)(x))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA graph")
def test_a_captured_fused_model_replays_the_same():
    model = modeling_llama.LlamaForCausalLM(LlamaConfig(**TINY)).to(DEVICE, HALF).eval()
    ids = torch.randint(0, 64, (2, 4), device=DEVICE)
    with torch.no_grad(), fused(model):
        eager = model(ids, use_cache=False).logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(ids, use_cache=False).logits
        for _ in range(20):
            out.zero_()
            graph.replay()
            assert torch.equal(out, eager)
