"""State spaces over blocks: the twin against the host token by token, the kernel against its twin.

Tests marked `gpu` need kernels to run; `test_kernels.py` runs them in Triton's interpreter where there is no GPU.
"""

import copy

import pytest
import torch
from helpers.hybrids import make_target
from helpers.kernels import DEVICE, ON_GPU, assert_as_good, random
from helpers.marks import slow_but

from hf_eagle3.kernels.delta_rule import DeltaMemory, settle_rows, settle_rows_eager
from hf_eagle3.kernels.state_space import Steps, scan_rows, scan_rows_eager
from hf_eagle3.rows.attention import UnfitError
from hf_eagle3.rows.recurrent import find_mixers
from hf_eagle3.rows.recurrent_trial import measure_error, refuse_unequal
from hf_eagle3.rows.state_spaces import STATE_SPACES

SPACES = ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_memory(B, H, K, V, C, *, n=4, dtype=torch.float32):
    """Random states behind a block that is random, too."""
    memory = DeltaMemory.make(random(B, H, K, V), torch.empty(B, C, 4, dtype=dtype, device=DEVICE), n)
    memory.keys.copy_(random(B, n, H, 1, K, dtype=dtype).expand_as(memory.keys))
    memory.deltas.normal_()
    memory.decays.copy_(torch.rand(B, n, H, 1).expand_as(memory.decays))
    return memory


def make_block(B, T, H, G, K, V, dtype):
    mixed = random(B, T, H * K + 2 * G * V, dtype=dtype)
    return mixed, Steps(random(B, T, H, dtype=dtype), *(random(H, dtype=dtype) for _ in range(3)))


def copy_of(memory, dtype=None):
    return DeltaMemory(*(x.clone() if dtype is None else x.to(dtype) for x in memory))


@pytest.mark.parametrize("name", slow_but(["bamba", "falcon_h1"], SPACES))
def test_blocks_say_what_the_host_says_token_by_token(name):
    target = make_target(name)
    with torch.no_grad():
        assert measure_error(target, list(find_mixers(target).values())[-1]) < 1e-5
    refuse_unequal(target)


@pytest.mark.any_release
def test_every_state_space_is_tried():
    names = {type(next(iter(find_mixers(make_target(name)).values()))).__name__ for name in SPACES}
    assert names == set(STATE_SPACES)


def test_a_layer_that_computes_something_else_is_refused():
    target = copy.deepcopy(make_target("bamba"))
    for mixer in find_mixers(target).values():
        mixer.activation = "gelu"
    with pytest.raises(UnfitError, match="BambaMixer does not compute its recurrence"):
        refuse_unequal(target)


def test_the_twin_is_the_recurrence():
    """A block behind what counts of the one before, against the definition step by step in float64."""
    B, H, G, K, V, n = 3, 4, 2, 5, 6, 4
    first, one = make_block(B, n, H, G, K, V, torch.float64)
    second, two = make_block(B, 3, H, G, K, V, torch.float64)
    kept = torch.tensor([0, 2, 4])
    start = torch.randn(B, H, K, V, dtype=torch.float64)
    memory = DeltaMemory.make(start.clone(), torch.empty(B, H * K + 2 * G * V, 4, dtype=torch.float64), n)
    ours = [
        scan_rows_eager(first, one, memory, torch.zeros(B, dtype=torch.long), num_groups=G),
        scan_rows_eager(second, two, memory, kept, num_groups=G),
    ]
    for b in range(B):
        state = start[b].clone()
        for mixed, steps, count, said in ((first, one, int(kept[b]), ours[0]), (second, two, 3, ours[1])):
            after = state.clone()
            for t in range(mixed.shape[1]):
                for h in range(H):
                    x = mixed[b, t, h * K : (h + 1) * K]
                    g = h // (H // G)
                    into = mixed[b, t, H * K + g * V : H * K + (g + 1) * V]
                    out_of = mixed[b, t, H * K + (G + g) * V : H * K + (G + g + 1) * V]
                    step = torch.log1p(torch.exp(steps.step[b, t, h] + steps.bias[h]))
                    after[h] = after[h] * torch.exp(-steps.log_rate[h].exp() * step) + step * torch.outer(x, into)
                    wanted = after[h] @ out_of + steps.skip[h] * x
                    torch.testing.assert_close(said[b, t, h], wanted, rtol=1e-9, atol=1e-9)
                if t + 1 == count:
                    state = after.clone()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 1, 16, 32), (3, 6, 2, 24, 20), (1, 3, 3, 64, 128)], ids=str)
@pytest.mark.parametrize("T", [1, 4])
def test_the_kernel_equals_its_twin(T, shape, dtype):
    B, H, G, K, V = shape
    kept = torch.tensor([2, 0, 4])[:B].to(DEVICE)
    memory = make_memory(B, H, K, V, H * K + 2 * G * V, dtype=dtype)
    mixed, steps = make_block(B, T, H, G, K, V, dtype)
    ours, twin, truth = copy_of(memory), copy_of(memory), copy_of(memory, torch.float64)
    exact = Steps(*(x.double() for x in steps))
    said = scan_rows(mixed, steps, ours, kept, num_groups=G)
    reference = scan_rows_eager(mixed, steps, twin, kept, num_groups=G)
    wanted = scan_rows_eager(mixed.double(), exact, truth, kept, num_groups=G)
    assert_as_good(said, reference, wanted)
    torch.testing.assert_close(ours.state, twin.state, rtol=1e-4, atol=1e-4)
    for name in ("keys", "deltas", "decays"):
        a, b = (getattr(m, name)[:, :T] for m in (ours, twin))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_block_is_settled_as_the_next_one_would():
    """To the bit, and as the twin does."""
    B, H, G, K, V = 2, 4, 2, 16, 40
    memory, kept = make_memory(B, H, K, V, 8), torch.tensor([3, 1], device=DEVICE)
    mixed, steps = make_block(B, 2, H, G, K, V, torch.float32)
    settled, went_on, twin = copy_of(memory), copy_of(memory), copy_of(memory)
    settle_rows(settled, kept)
    scan_rows(mixed, steps, went_on, kept, num_groups=G)
    assert torch.equal(settled.state, went_on.state)
    settle_rows_eager(twin, kept)
    torch.testing.assert_close(settled.state, twin.state, rtol=1e-5, atol=1e-5)


def test_inputs_of_another_width_are_named():
    if not ON_GPU:
        pytest.skip("kernels say so before they run, on a GPU")
    memory = make_memory(1, 4, 8, 8, 8)
    mixed, steps = make_block(1, 2, 4, 1, 8, 8, torch.float32)
    with pytest.raises(ValueError, match=r"mixed must be \[B, up to 4, 96\] for 4 heads and 4 groups"):
        scan_rows(mixed, steps, memory, torch.zeros(1, dtype=torch.long, device=DEVICE), num_groups=4)
