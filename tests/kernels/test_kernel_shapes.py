"""Kernels against float64 at the shapes of real models, beside an eager computation in the same dtype.

All of it runs on a GPU, in float32 and bfloat16. In Triton's interpreter a sample runs by default, in float32, and the
rest with `slow`.
"""

import pytest
import torch
from helpers.kernels import DEVICE, ON_GPU, assert_as_good, in_double, make_rows, random
from helpers.spans import inputs, run
from torch.nn import functional as F

from hf_eagle3.kernels.argmax import argmax_rows
from hf_eagle3.kernels.attention import attend_rows, attend_rows_eager, write_rows, write_rows_eager
from hf_eagle3.kernels.experts import expert_linear
from hf_eagle3.kernels.linear import linear_gated, linear_group, linear_small
from hf_eagle3.kernels.norms import add_rms_norm, rms_norm, rms_norm_eager
from hf_eagle3.kernels.rotary import Rotation, apply_rotary_eager, rotary_angles, rotary_angles_eager, rotate_and_write
from hf_eagle3.training.step.attention import attend, attend_eagerly

DTYPES = [torch.float32, *([torch.bfloat16] if ON_GPU else [])]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.gpu


def table(*rows, sample=()):
    """Parameters with ids; all but those at `sample` are slow in the interpreter."""
    return [
        pytest.param(*row, id="-".join(map(str, row)), marks=() if i in sample else pytest.mark.slow)
        for i, row in enumerate(rows)
    ]


# ---- attention of rounds ----

WIDTHS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]  # keys, values
NARROW = [(64, 48), (128, 64), (96, 128), (256, 192)]
GROUPS = [(1, 1), (3, 1), (4, 2), (5, 1), (7, 1), (8, 1), (12, 2), (16, 1), (32, 2)]  # query heads, KV heads


def check_attention(rows, dtype, **options):
    """The kernel's result is as good as the twin's, both against float64."""
    cuts = {name: options.pop(name) for name in ("num_splits", "blocks") if name in options}
    options["scaling"] = rows[0].shape[-1] ** -0.5
    truth = attend_rows_eager(*in_double(*rows), **options)
    twin = attend_rows_eager(*rows, **options)
    out = attend_rows(*rows, **options, **cuts)
    assert out.shape == truth.shape
    assert_as_good(out, twin, truth)


@by_dtype
@pytest.mark.parametrize("window", [None, 3], ids=["full", "window"])
@pytest.mark.parametrize(("D", "D_v"), table(*WIDTHS, *NARROW, sample=(4,)))
def test_attention_of_head_sizes_with_cuts_of_its_own_choice(D, D_v, window, dtype):
    check_attention(make_rows(2, 4, 2, 4, D, 150, dtype, D_v=D_v), dtype, window=window)


@by_dtype
@pytest.mark.parametrize(("D", "D_v"), table(*WIDTHS))
def test_attention_of_head_sizes_with_chosen_cuts(D, D_v, dtype):
    check_attention(make_rows(2, 4, 2, 4, D, 70, dtype, D_v=D_v), dtype, num_splits=3, blocks=(16, 4, 2))


@by_dtype
@pytest.mark.parametrize(("H", "H_kv"), table(*GROUPS, sample=(2, 4)))
def test_attention_of_groups(H, H_kv, dtype):
    check_attention(make_rows(2, H, H_kv, 4, 64, 70, dtype), dtype)


@by_dtype
@pytest.mark.parametrize(("window", "T"), table((1, 1), (1, 4), (5, 4), (20, 4), (127, 4), (33, 8), sample=(0, 3)))
def test_attention_of_windows_shorter_than_a_block(window, T, dtype):
    check_attention(make_rows(2, 4, 2, T, 64, 150, dtype), dtype, window=window)


@by_dtype
@pytest.mark.parametrize(
    ("D", "window"), table((64, None), (128, None), (64, 4096), (64, 128), sample=(3,))
)  # a window reads no more than itself
def test_attention_at_131072_positions(D, window, dtype):
    L = 131_072
    query, keys, values = random(1, 2, 4, D, dtype=dtype), *random(1, L, 1, 2 * D, dtype=dtype).tensor_split(2, dim=-1)
    start = torch.tensor([L - 4], device=DEVICE)
    check_attention((query, keys, values, start), dtype, window=window)


@by_dtype
@pytest.mark.parametrize(("D", "D_v"), table(*WIDTHS, (512, 64), (64, 512), sample=(4, 7)))
def test_writing_of_head_sizes(D, D_v, dtype):
    rows = random(2, 40, 3, D + D_v, dtype=dtype)
    expected, new = rows.clone(), random(2, 4, 3, D + D_v, dtype=dtype)
    new = [x.transpose(1, 2) for x in new.tensor_split([D], dim=-1)]
    start = torch.tensor([36, 5], device=DEVICE)
    write_rows_eager(*expected.tensor_split([D], dim=-1), *new, start)
    write_rows(*rows.tensor_split([D], dim=-1), *new, start)
    assert torch.equal(rows, expected)


# ---- rotation ----


@by_dtype
@pytest.mark.parametrize(
    "D", [pytest.param(D, marks=() if D == 80 else pytest.mark.slow) for D in (64, 80, 96, 128, 256)]
)
def test_rotation_of_head_sizes(D, dtype):
    q, k, v = (random(2, H, 4, D, dtype=dtype) for H in (9, 3, 3))
    cos, sin = (f(random(2, 4, D)).to(dtype) for f in (torch.cos, torch.sin))
    keys, values = random(2, 20, 3, 2 * D, dtype=dtype).tensor_split(2, dim=-1)
    out_q, out_k, start = torch.empty_like(q), torch.empty_like(k), torch.tensor([16, 3], device=DEVICE)
    rotate_and_write(Rotation(q, k, cos, sin, out_q, out_k), v, keys, values, start)
    twins, truths = apply_rotary_eager(q, k, cos, sin), apply_rotary_eager(*in_double(q, k, cos, sin))
    for out, twin, truth in zip((out_q, out_k), twins, truths, strict=True):
        assert_as_good(out, twin, truth)
    assert torch.equal(keys[0, 16:20].transpose(0, 1), out_k[0])
    assert torch.equal(values[1, 3:7].transpose(0, 1), v[1])


@pytest.mark.parametrize("D", table((64,), (128,), (256,), sample=(0,)))
def test_angles_at_131072_positions(D):
    positions = torch.tensor([[0, 1, 4095, 131_071]], device=DEVICE)
    inverse = (10_000.0 ** -(torch.arange(0, D, 2) / D)).to(DEVICE)
    ours = rotary_angles(positions, inverse, scaling=1.0, dtype=torch.float32)
    twins = rotary_angles_eager(positions, inverse, scaling=1.0, dtype=torch.float32)
    angles = (positions[..., None].float() * inverse).double()  # rounded as the host rounds it
    for out, twin, truth in zip(ours, twins, (angles.cos(), angles.sin()), strict=True):
        assert_as_good(out, twin, torch.cat([truth, truth], dim=-1))


# ---- linear layers ----


@by_dtype
@pytest.mark.parametrize(
    ("M", "K", "N"),
    table(
        *((1, 577, 2112), (3, 577, 2112), (16, 577, 2112), (64, 1001, 2112), (4, 1025, 4099), (16, 2880, 5120)),
        *((1, 2049, 12_288), (33, 385, 16_896), (8, 257, 32_001), (16, 129, 201_088)),
        sample=(2,),
    ),
)
def test_linear_layers(M, K, N, dtype):
    x, weight, bias = random(M, K, dtype=dtype), random(N, K, dtype=dtype) / K**0.5, random(N, dtype=dtype)
    truth = F.linear(*in_double(x, weight, bias))
    assert_as_good(linear_small(x, weight, bias), F.linear(x, weight, bias), truth)


@by_dtype
@pytest.mark.parametrize(("M", "K", "N"), table((4, 577, 2112), (16, 1001, 4864), (33, 257, 17_408)))
def test_gated_linear_layers(M, K, N, dtype):
    x, (gate, up) = random(M, K, dtype=dtype), (random(N, K, dtype=dtype) / K**0.5 for _ in "ab")
    truth, reference = (F.silu(F.linear(a, b)) * F.linear(a, c) for a, b, c in (in_double(x, gate, up), (x, gate, up)))
    assert_as_good(linear_gated(x, gate, up), reference, truth)


@by_dtype
@pytest.mark.parametrize(("M", "K", "sizes"), table((4, 577, (2112, 576, 65)), (16, 385, (4096, 1024, 1024))))
def test_grouped_linear_layers(M, K, sizes, dtype):
    x, weights = random(M, K, dtype=dtype), [random(N, K, dtype=dtype) / K**0.5 for N in sizes]
    for out, weight in zip(linear_group(x, weights, [None] * 3), weights, strict=True):
        assert_as_good(out, F.linear(x, weight), F.linear(*in_double(x, weight)))


@by_dtype
@pytest.mark.parametrize(
    ("R", "each", "is_transposed"),
    table((128, 8, False), (128, 8, True), (256, 4, True), (1, 8, False), (7, 4, True), sample=(3,)),
)
def test_128_experts(R, each, is_transposed, dtype):
    E, K, N = 128, 72, 40
    x, bias = random(R, K, dtype=dtype), random(E, N, dtype=dtype)
    weight = random(E, *((K, N) if is_transposed else (N, K)), dtype=dtype) / K**0.5
    chosen = torch.randint(E, (R * each,)).to(DEVICE)

    def one_by_one(x, weight, bias):
        rows = x.repeat_interleave(each, dim=0)
        matrices = weight if is_transposed else weight.mT
        return torch.stack([row @ matrices[e] + bias[e] for row, e in zip(rows, chosen.tolist(), strict=True)])

    out = expert_linear(x, weight, bias, chosen, is_transposed=is_transposed)
    assert_as_good(out, one_by_one(x, weight, bias), one_by_one(*in_double(x, weight, bias)))


# ---- norms and choices ----


@by_dtype
@pytest.mark.parametrize("variant", ["llama", "wide", "shifted"])
@pytest.mark.parametrize("D", table((2880,), (5120,), (7168,), sample=(2,)))
def test_norms(D, variant, dtype):
    x, y, weight = random(3, D, dtype=dtype), random(3, D, dtype=dtype), random(D, dtype=dtype)

    def exact(x):
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return scaled * (weight.double() + (variant == "shifted"))

    options = {"eps": 1e-6, "variant": variant}
    assert_as_good(rms_norm(x, weight, **options), rms_norm_eager(x, weight, **options), exact(x.double()))
    total, normed = add_rms_norm(x, y, weight, **options)
    assert torch.equal(total, x + y)
    assert_as_good(normed, rms_norm_eager(total, weight, **options), exact(total.double()))


@by_dtype
@pytest.mark.parametrize("V", table((32_000,), (128_256,), (151_936,), (201_088,)))
def test_choices_among_vocabularies(V, dtype):
    x = random(4, V, dtype=dtype)
    for row, places in enumerate([(V - 1,), (0, V - 1), (V // 2, V // 2 + 1)]):
        x[row, list(places)] = 50.0
    assert torch.equal(argmax_rows(x).cpu(), x.cpu().float().argmax(-1))
    assert argmax_rows(x)[:3].tolist() == [V - 1, 0, V // 2]


# ---- attention of training ----


def in_float64(query, slots, own, spans):
    """The inputs of a training step as they are, widened."""

    def widen(x):
        return x.detach().double().requires_grad_()

    return widen(query), tuple(map(widen, slots)), [tuple(map(widen, pair)) for pair in own], spans


@by_dtype
@pytest.mark.parametrize("window", [None, 3], ids=["full", "window"])
@pytest.mark.parametrize("D", table((64,), (80,), (96,), (128,), (192,), (256,), sample=(1,)))
def test_attention_of_training(D, window, dtype):
    tensors = inputs(2, dtype, DEVICE, head_dim=D)
    truth, true_grads = run(attend_eagerly, *in_float64(*tensors), window)
    reference, reference_grads = run(attend_eagerly, *tensors, window)
    out, grads = run(attend, *tensors, window)
    for ours, theirs, exact in zip((out, *grads), (reference, *reference_grads), (truth, *true_grads), strict=True):
        assert_as_good(ours, theirs, exact, parts=2)  # the block, and a row's own tokens
