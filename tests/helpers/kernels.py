"""Inputs for kernels, and how exact a kernel must be."""

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def assert_as_good(out, reference, truth, *, parts=1):
    """At most twice the error of an independent computation in the same dtype, both against float64.

    In float32 by PyTorch's own default, since a long sum may be added up in another order. A result merged from several
    `parts` may have as much of each.
    """
    assert out.dtype == reference.dtype
    scale = truth.double().norm()
    error, theirs = ((x.double() - truth.double()).norm() / scale for x in (out, reference))
    # Two roundings of the result: sums of few products may be exact in the reference.
    least = 1.3e-6 if out.dtype == torch.float32 else 2 * torch.finfo(out.dtype).eps
    budget = parts * max(2 * theirs, least)
    assert error <= budget, f"{error:.2e}, budget {budget:.2e}"


def make_rows(B, H, H_kv, T, D, L, dtype=torch.float32, *, D_v=None):
    """Rows of lengths of their own, from the shortest to the longest, NaN behind each; keys and values strided."""
    query = random(B, T, H, D, dtype=dtype).transpose(1, 2)
    keys, values = random(B, L, H_kv, D + (D_v or D), dtype=dtype).tensor_split([D], dim=-1)
    start = torch.randint(0, L - T + 1, (B,), device=DEVICE)
    start[0], start[-1] = L - T, 0
    is_junk = torch.arange(L, device=DEVICE) >= start[:, None] + T  # [B, L]
    for x in (keys, values):
        x.masked_fill_(is_junk[..., None, None], float("nan"))
    return query, keys, values, start


def in_double(*tensors):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in tensors]
