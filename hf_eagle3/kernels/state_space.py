"""Selective state spaces (Mamba-2, arXiv:2405.21060) over the tokens of a block, behind what counts of the last one.

A head's state is a matrix S [K, V]: K numbers of the head's value by V of its memory. A token with value x [K], input and
output vectors B and C [V], and step d makes of it

    S' = exp(-rate d) S + d x B^T,    and says S' C + D x

which is the gated delta rule without its correction. So a block leaves what that of a delta net leaves, in the same memory
(`delta_rule.DeltaMemory`): x as keys, and as deltas what of B is left beside x over its length. The next block first applies
the tokens that count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .delta_rule import L2_EPS, DeltaMemory, load_kept, normalise, settle_rows_eager, softplus, unit
from .language import jit, require, round_up_to_power, tl


class Steps(NamedTuple):
    """What steps and decays of the heads are made of, as the host's layers have it."""

    step: Tensor  # [B, T, H]; the step is softplus(step + bias)
    log_rate: Tensor  # [H]; the decay is exp(-exp(log_rate) step)
    bias: Tensor  # [H]
    skip: Tensor  # [H], D


# ---- eager twin ----


def scan_rows_eager(mixed: Tensor, steps: Steps, memory: DeltaMemory, kept: Tensor, *, num_groups: int) -> Tensor:
    """What the tokens of a block say.

    Args:
        mixed: [B, T, H*K + 2*G*V], the values of H heads, and input and output vectors of G groups of them.
        steps: Of the same tokens.
        memory: Of the last block, and then of this one.
        kept: [B] int64, tokens of the last block that count.
        num_groups: G.

    Returns:
        [B, T, H, K], in the dtype of `mixed`.
    """
    settle_rows_eager(memory, kept)
    state = memory.state
    wide = torch.promote_types(state.dtype, torch.float32)
    _, H, K, V = state.shape
    B, T, _ = mixed.shape
    value, into, out_of = mixed.split([H * K, num_groups * V, num_groups * V], dim=-1)
    into, out_of = (
        x.reshape(B, T, num_groups, V).repeat_interleave(H // num_groups, dim=2).to(wide) for x in (into, out_of)
    )  # [B, T, H, V]
    value = value.reshape(B, T, H, K)
    memory.keys[:, :T] = value[:, :, :, None]
    x = value.to(wide)
    step = F.softplus(steps.step.to(wide) + steps.bias.to(wide))  # [B, T, H]
    decay = torch.exp(-steps.log_rate.to(wide).exp() * step)
    # Of x over its length, which is what is kept of a key.
    length = (x.square().sum(-1) + L2_EPS).sqrt()
    deltas = (step * length)[..., None] * into  # [B, T, H, V]
    memory.deltas[:, :T], memory.decays[:, :T] = deltas, decay[..., None]
    keys, state, out = normalise(x), state.to(wide), []
    for t in range(T):
        state = state * decay[:, t, :, None, None] + keys[:, t, :, :, None] * deltas[:, t, :, None]
        out.append((state * out_of[:, t, :, None]).sum(-1))
    said = torch.stack(out, dim=1) + steps.skip.to(wide)[:, None] * x
    return said.to(mixed.dtype)


# ---- kernel ----


@jit()
def _load_inputs(
    mixed, step, token, head, k, v, WIDTH, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr
):
    """Value [BLOCK_K], input and output vectors [BLOCK_V] of a token's head, and the input of its step, as they are."""
    base = mixed + token * WIDTH
    group = head // (H // G)
    value = tl.load(base + head * K + k, mask=k < K, other=0.0)
    into = tl.load(base + H * K + group * V + v, mask=v < V, other=0.0)
    out_of = tl.load(base + H * K + (G + group) * V + v, mask=v < V, other=0.0)
    return value, into, out_of, tl.load(step + token * H + head)


@jit("N", "WIDTH")
def _scan(
    mixed,
    step,
    log_rate,
    bias,
    state,
    keys,
    deltas,
    decays,
    kept,
    parts,
    N,
    WIDTH,
    T: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    part = tl.program_id(0) % P
    head = tl.program_id(0) // P
    row = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (k < K)[:, None] & (v < V)[None, :]
    at = ((row * H + head) * K + k[:, None]) * V + v[None, :]
    S = tl.load(state + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_K, BLOCK_V]
    num_kept = tl.load(kept + row)
    # Every program has keys and decays of its own, so none overwrites what another has yet to read.
    for t in range(num_kept):
        raw, delta, decay = load_kept(keys, deltas, decays, (row * N + t) * H + head, part, k, v, K, V, P)
        S = tl.fma(unit(raw.to(tl.float32), EPS)[:, None], delta.to(tl.float32)[None, :], S * decay)
    tl.debug_barrier()  # all threads have read what is overwritten from here on
    if num_kept > 0:
        tl.store(state + at, S.to(state.dtype.element_ty), mask=mask)
    rate = tl.exp(tl.load(log_rate + head).to(tl.float32))
    shift = tl.load(bias + head).to(tl.float32)
    for t in range(T):
        token = row * T + t
        raw, into, out_of, x = _load_inputs(mixed, step, token, head, k, v, WIDTH, H, G, K, V)
        value = raw.to(tl.float32)
        length = softplus(x.to(tl.float32) + shift)
        decay = tl.exp(-rate * length)
        delta = into.to(tl.float32) * (length * tl.sqrt(tl.sum(value * value, 0) + EPS))
        S = tl.fma(unit(value, EPS)[:, None], delta[None, :], S * decay)
        said = tl.sum(S * out_of.to(tl.float32)[None, :], 1)
        tl.store(parts + ((token * H + head) * P + part) * K + k, said, mask=k < K)
        place = (row * N + t) * H + head
        tl.store(keys + (place * P + part) * K + k, raw, mask=k < K)
        tl.store(deltas + place * V + v, delta, mask=v < V)
        tl.store(decays + place * P + part, decay)


def scan_rows(
    mixed: Tensor, steps: Steps, memory: DeltaMemory, kept: Tensor, *, num_groups: int, num_warps: int = 1
) -> Tensor:
    """The kernel of `scan_rows_eager`; same arguments, but that `mixed` has 16 or 32 bits.

    Programs share a head's memory, and what they say is added up behind them; sums are taken in another order.
    """
    require(mixed.device)
    B, H, K, V = memory.state.shape
    T, width = mixed.shape[1:]
    expected = H * K + 2 * num_groups * V
    if width != expected or memory.num_tokens < T:
        raise ValueError(
            f"mixed must be [B, up to {memory.num_tokens}, {expected}] for {H} heads and {num_groups} groups, got "
            f"{tuple(mixed.shape)}."
        )
    mixed, step = mixed.contiguous(), steps.step.contiguous()
    P = memory.keys.shape[3]
    parts = torch.empty(B, T, H, P, K, dtype=torch.float32, device=mixed.device)
    with torch.cuda.device_of(mixed):
        _scan[(H * P, B)](
            mixed,
            step,
            steps.log_rate,
            steps.bias,
            memory.state,
            memory.keys,
            memory.deltas,
            memory.decays,
            kept,
            parts,
            memory.num_tokens,
            width,
            T=T,
            H=H,
            G=num_groups,
            K=K,
            V=V,
            P=P,
            EPS=L2_EPS,
            BLOCK_K=round_up_to_power(K),
            BLOCK_V=round_up_to_power(-(-V // P)),
            num_warps=num_warps,
        )
    value = mixed[..., : H * K].reshape(B, T, H, K)
    return (parts.sum(3) + steps.skip.float()[:, None] * value.float()).to(mixed.dtype)
