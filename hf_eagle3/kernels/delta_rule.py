"""The gated delta rule over the tokens of a block, and the causal convolution before it.

A head's state is a matrix S [K, V], float32. A token with query q, key k, value v, decay a and strength b makes of it

    S' = a S + k d^T,    d = b (v - (a S)^T k),    and says S'^T q

(Gated Delta Networks, arXiv:2412.06464, equation 10; q and k of length one, q over sqrt(K)). How many tokens of a block
count is known after it, on the device alone. So a block leaves S as it was before it, and keeps k, d and a of each of its
tokens; the next block first applies those that count. That reads and writes S once, as a single token does, whatever the
length of the block. The convolution keeps its inputs likewise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .language import jit, require, round_up_to_power, tl

BLOCK_V = 16  # values of a head that one program updates
BLOCK_C = 128  # channels of a convolution likewise
MAX_UNROLLED = 8  # tokens up to which a loop over them is unrolled
L2_EPS = 1e-6  # the host's, in squares of lengths (Transformers 5.24, l2norm)


class DeltaMemory(NamedTuple):
    """What one layer keeps from block to block, of up to n tokens each. Every tensor is written in place."""

    state: Tensor  # [B, H, K, V] float32, before the last block
    window: Tensor  # [B, S + n, C], the S inputs of the convolution before the last block, and its own
    keys: Tensor  # [B, n, H, P, K], of the last block, before they are normalised; P programs have a copy each
    deltas: Tensor  # [B, n, H, V] float32, its d
    decays: Tensor  # [B, n, H, P] float32, its a

    @property
    def num_tokens(self) -> int:
        """n: tokens that a block may have."""
        return self.deltas.shape[1]

    @classmethod
    def make(cls, state: Tensor, conv_state: Tensor, num_tokens: int) -> DeltaMemory:
        """Memory around `state`, for blocks of up to `num_tokens`; `conv_state` [B, C, S] says sizes and dtype alone."""
        B, H, K, V = state.shape
        _, C, S = conv_state.shape
        P = -(-V // BLOCK_V)
        return cls(
            state,
            conv_state.new_zeros(B, S + num_tokens, C),
            conv_state.new_zeros(B, num_tokens, H, P, K),
            state.new_zeros(B, num_tokens, H, V),
            state.new_zeros(B, num_tokens, H, P),
        )

    def of_rows(self, rows: slice) -> DeltaMemory:
        """The memory of some rows."""
        return DeltaMemory(*(x[rows] for x in self))


class Gates(NamedTuple):
    """What decays and strengths of the heads are made of, as the host's layers have it."""

    a: Tensor  # [B, T, H]; the decay is exp(-exp(log_rate) softplus(a + bias))
    b: Tensor  # [B, T, H]; the strength is sigmoid(b), rounded to its dtype, times `strength`
    log_rate: Tensor  # [H]
    bias: Tensor  # [H]
    strength: float = 1.0


# ---- eager twins ----


def normalise(x: Tensor) -> Tensor:
    """`x` [..., K] over its length."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS)


def settle_rows_eager(memory: DeltaMemory, kept: Tensor) -> None:
    """Let the state be that behind the first `kept` [B] int64 tokens of the last block. What it keeps of that is stale then."""
    state = memory.state
    keys = normalise(memory.keys[:, :, :, 0].to(state.dtype))  # [B, n, H, K]
    for t in range(memory.num_tokens):
        update = keys[:, t, :, :, None] * memory.deltas[:, t, :, None]  # [B, H, K, V]
        moved = state * memory.decays[:, t, :, :1, None] + update
        state = torch.where((t < kept)[:, None, None, None], moved, state)
    memory.state.copy_(state)


def delta_rule_rows_eager(
    mixed: Tensor, gates: Gates, memory: DeltaMemory, kept: Tensor, *, num_key_heads: int
) -> Tensor:
    """What the tokens of a block say.

    Args:
        mixed: [B, T, 2*H_k*K + H*V], queries, keys and values of the heads; H_k of keys, each for H/H_k of values.
        gates: Of the same tokens.
        memory: Of the last block, and then of this one.
        kept: [B] int64, tokens of the last block that count.
        num_key_heads: H_k.

    Returns:
        [B, T, H, V], in the dtype of `mixed`.
    """
    settle_rows_eager(memory, kept)
    state = memory.state
    _, H, K, V = state.shape
    B, T, _ = mixed.shape
    width = num_key_heads * K
    query, key, value = mixed.split([width, width, H * V], dim=-1)
    query, key = (
        x.reshape(B, T, num_key_heads, K).repeat_interleave(H // num_key_heads, dim=2) for x in (query, key)
    )  # [B, T, H, K]
    memory.keys[:, :T] = key[:, :, :, None]
    q, k = (normalise(x.to(state.dtype)) for x in (query, key))
    q, v = q / K**0.5, value.reshape(B, T, H, V).to(state.dtype)
    rate = gates.log_rate.to(state.dtype).exp()
    decay = torch.exp(-rate * F.softplus(gates.a.to(state.dtype) + gates.bias))  # [B, T, H]
    strength = gates.b.sigmoid().to(state.dtype) * gates.strength
    memory.decays[:, :T] = decay[..., None]
    out = []
    for t in range(T):
        state = state * decay[:, t, :, None, None]
        delta = (v[:, t] - (state * k[:, t, :, :, None]).sum(-2)) * strength[:, t, :, None]  # [B, H, V]
        state = state + k[:, t, :, :, None] * delta[:, :, None]
        memory.deltas[:, t] = delta
        out.append((state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(out, dim=1).to(mixed.dtype)


def convolve_rows_eager(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, kept: Tensor) -> Tensor:
    """A causal convolution of each channel, and SiLU.

    Args:
        x: [B, T, C].
        weight: [C, W].
        bias: [C].
        window: [B, S + n, C], as of `DeltaMemory`, S being W.
        kept: [B] int64, inputs of the last block that count.

    Returns:
        [B, T, C].
    """
    T, C = x.shape[1:]
    W = weight.shape[1]
    at = kept[:, None] + torch.arange(W, device=x.device)  # [B, W]
    whole = torch.cat([window.gather(1, at[..., None].expand(-1, -1, C)), x.to(window.dtype)], dim=1)  # [B, W + T, C]
    window[:, : W + T] = whole
    out = F.conv1d(whole[:, 1:].mT.to(weight.dtype), weight[:, None], bias, groups=C)
    return F.silu(out).mT.to(x.dtype).contiguous()


# ---- kernels ----


@jit()
def unit(x, EPS: tl.constexpr):
    """`x` [K] over its length."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + EPS)


@jit()
def softplus(x):
    """log(1 + exp(x)), exact also where exp(x) is tiny beside 1; `x` itself from 20 on, as PyTorch has it."""
    y = tl.exp(tl.minimum(x, 20.0))
    total = 1.0 + y
    return tl.where(
        x > 20.0, x, tl.where(total == 1.0, y, tl.log(total) * (y / tl.where(total == 1.0, 1.0, total - 1.0)))
    )


@jit()
def _load_token(
    mixed, a, b, token, head, k, v, WIDTH, H: tl.constexpr, H_K: tl.constexpr, K: tl.constexpr, V: tl.constexpr
):
    """Query and key [BLOCK_K], value [BLOCK_V] and the two inputs of the gates, as they are."""
    base = mixed + token * WIDTH
    key_head = head // (H // H_K)
    query = tl.load(base + key_head * K + k, mask=k < K, other=0.0)
    key = tl.load(base + (H_K + key_head) * K + k, mask=k < K, other=0.0)
    value = tl.load(base + 2 * H_K * K + head * V + v, mask=v < V, other=0.0)
    return query, key, value, tl.load(a + token * H + head), tl.load(b + token * H + head)


@jit()
def load_kept(keys, deltas, decays, place, part, k, v, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr):
    """Key, delta and decay of a token of the last block."""
    key = tl.load(keys + (place * P + part) * K + k, mask=k < K, other=0.0)
    delta = tl.load(deltas + place * V + v, mask=v < V, other=0.0)
    return key, delta, tl.load(decays + place * P + part)


@jit()
def _take_token(
    S,
    query,
    raw,
    value,
    x,
    y,
    rate,
    gate_bias,
    strength,
    token,
    place,
    head,
    part,
    k,
    v,
    keys,
    deltas,
    decays,
    out,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The state after a token of what `_load_token` gave; what it says, and its parts, are stored."""
    beta = (1.0 / (1.0 + tl.exp(-y.to(tl.float32)))).to(y.dtype).to(tl.float32) * strength
    decay = tl.exp(-rate * softplus(x.to(tl.float32) + gate_bias))
    key = unit(raw.to(tl.float32), EPS)
    S = S * decay
    delta = (value.to(tl.float32) - tl.sum(S * key[:, None], 0)) * beta
    S = tl.fma(key[:, None], delta[None, :], S)
    said = tl.sum(S * (unit(query.to(tl.float32), EPS) * SCALE)[:, None], 0)
    tl.store(out + (token * H + head) * V + v, said.to(out.dtype.element_ty), mask=v < V)
    tl.store(keys + (place * P + part) * K + k, raw, mask=k < K)
    tl.store(deltas + place * V + v, delta, mask=v < V)
    tl.store(decays + place * P + part, decay)
    return S


@jit("N", "WIDTH")
def _delta_rule(
    mixed,
    a,
    b,
    log_rate,
    bias,
    strength,
    state,
    keys,
    deltas,
    decays,
    kept,
    out,
    N,
    WIDTH,
    T: tl.constexpr,
    IS_UNROLLED: tl.constexpr,
    H: tl.constexpr,
    H_K: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
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
    S = tl.load(state + at, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_V]
    num_kept = tl.load(kept + row)
    # Every program has keys and decays of its own, so none overwrites what another has yet to read. Each token is loaded
    # while the one before it is at work.
    raw, delta, decay = load_kept(keys, deltas, decays, row * N * H + head, part, k, v, K, V, P)
    for t in range(num_kept):
        place = (row * N + tl.minimum(t + 1, N - 1)) * H + head
        next_raw, next_delta, next_decay = load_kept(keys, deltas, decays, place, part, k, v, K, V, P)
        S = tl.fma(unit(raw.to(tl.float32), EPS)[:, None], delta[None, :], S * decay)
        raw, delta, decay = next_raw, next_delta, next_decay
    tl.debug_barrier()  # all threads have read what is overwritten from here on
    if num_kept > 0:
        tl.store(state + at, S, mask=mask)
    if T > 0:
        rate = tl.exp(tl.load(log_rate + head).to(tl.float32))
        gate_bias = tl.load(bias + head).to(tl.float32)
        first = row * T
        q, raw, u, x, y = _load_token(mixed, a, b, first, head, k, v, WIDTH, H, H_K, K, V)
        if IS_UNROLLED:
            for t in tl.static_range(T):
                following = first + (t + 1 if t + 1 < T else t)
                q2, raw2, u2, x2, y2 = _load_token(mixed, a, b, following, head, k, v, WIDTH, H, H_K, K, V)
                place = (row * N + t) * H + head
                S = _take_token(
                    S, q, raw, u, x, y, rate, gate_bias, strength, first + t, place, head, part, k, v,
                    keys, deltas, decays, out, H, K, V, P, EPS, SCALE,
                )  # fmt: skip
                q, raw, u, x, y = q2, raw2, u2, x2, y2
        else:
            for t in range(T):
                following = first + tl.minimum(t + 1, T - 1)
                q2, raw2, u2, x2, y2 = _load_token(mixed, a, b, following, head, k, v, WIDTH, H, H_K, K, V)
                place = (row * N + t) * H + head
                S = _take_token(
                    S, q, raw, u, x, y, rate, gate_bias, strength, first + t, place, head, part, k, v,
                    keys, deltas, decays, out, H, K, V, P, EPS, SCALE,
                )  # fmt: skip
                q, raw, u, x, y = q2, raw2, u2, x2, y2


def delta_rule_rows(
    mixed: Tensor, gates: Gates, memory: DeltaMemory, kept: Tensor, *, num_key_heads: int, num_warps: int = 1
) -> Tensor:
    """The kernel of `delta_rule_rows_eager`; same arguments, but that `mixed` has 16 or 32 bits and states have 32.

    Sums over a head are taken in another order.
    """
    require(mixed.device)
    B, H, K, V = memory.state.shape
    T, width = mixed.shape[1:]
    expected = 2 * num_key_heads * K + H * V
    if width != expected or memory.num_tokens < T:
        raise ValueError(
            f"mixed must be [B, up to {memory.num_tokens}, {expected}] for {num_key_heads} heads of keys and {H} of values, "
            f"got {tuple(mixed.shape)}."
        )
    mixed, a, b = mixed.contiguous(), gates.a.contiguous(), gates.b.contiguous()
    P = memory.keys.shape[3]
    block_v = round_up_to_power(-(-V // P))
    out = torch.empty(B, T, H, V, dtype=mixed.dtype, device=mixed.device)
    with torch.cuda.device_of(mixed):
        _delta_rule[(H * P, B)](
            mixed,
            a,
            b,
            gates.log_rate,
            gates.bias,
            gates.strength,
            memory.state,
            memory.keys,
            memory.deltas,
            memory.decays,
            kept,
            out,
            memory.num_tokens,
            width,
            T=T,
            IS_UNROLLED=T <= MAX_UNROLLED,
            H=H,
            H_K=num_key_heads,
            K=K,
            V=V,
            P=P,
            EPS=L2_EPS,
            SCALE=K**-0.5,
            BLOCK_K=round_up_to_power(K),
            BLOCK_V=block_v,
            num_warps=num_warps,
        )
    return out


def settle_rows(memory: DeltaMemory, kept: Tensor) -> None:
    """The kernel of `settle_rows_eager`: that of a block without tokens, so it rounds as the next block would have."""
    B, H, K, V = memory.state.shape
    mixed = memory.keys.new_zeros(B, 0, 2 * H * K + H * V)
    heads = memory.state.new_zeros(H)
    gates = Gates(mixed[..., :H], mixed[..., :H], heads, heads)
    delta_rule_rows(mixed, gates, memory, kept, num_key_heads=H)


@jit()
def _convolve_token(x, weight, shift, places, num_kept, out, t, row, T, C, c, W: tl.constexpr):
    """Store what token `t` becomes; inputs before the block are in the window, from `num_kept` on."""
    total = shift
    for j in tl.static_range(W):
        i = t - (W - 1) + j
        # i >= 0, as a block: interpreters of some versions take no truth of one number in a mask.
        is_fresh = c + i >= c
        fresh = tl.load(x + (row * T + i) * C + c, mask=(c < C) & is_fresh, other=0.0).to(tl.float32)
        old = tl.load(places + (num_kept + W + i) * C + c, mask=(c < C) & (c + i < c), other=0.0).to(tl.float32)
        tap = tl.load(weight + c * W + j, mask=c < C, other=0.0).to(tl.float32)
        total += tap * (fresh + old)  # one of them is zero
    rounded = total.to(out.dtype.element_ty).to(tl.float32)
    said = rounded / (1.0 + tl.exp(-rounded))
    tl.store(out + (row * T + t) * C + c, said.to(out.dtype.element_ty), mask=c < C)


@jit("T", "NUM_PLACES", "C")
def _convolve(
    x,
    weight,
    bias,
    window,
    kept,
    out,
    T,
    NUM_PLACES,
    C,
    NUM_UNROLLED: tl.constexpr,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.arange(0, BLOCK_W)
    places = window + row * NUM_PLACES * C
    num_kept = tl.load(kept + row)
    shift = tl.zeros([BLOCK_C], dtype=tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    if NUM_UNROLLED > 0:
        for t in tl.static_range(NUM_UNROLLED):
            _convolve_token(x, weight, shift, places, num_kept, out, t, row, T, C, c, W)
    else:
        for t in range(T):
            _convolve_token(x, weight, shift, places, num_kept, out, t, row, T, C, c, W)
    mask = (w < W)[:, None] & (c < C)[None, :]
    before = tl.load(places + (num_kept + w)[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.debug_barrier()  # all threads have read what is overwritten from here on
    tl.store(places + w[:, None] * C + c[None, :], before, mask=mask)
    for t in range(T):
        new = tl.load(x + (row * T + t) * C + c, mask=c < C, other=0.0)
        tl.store(places + (W + t) * C + c, new.to(window.dtype.element_ty), mask=c < C)


def convolve_rows(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, kept: Tensor) -> Tensor:
    """The kernel of `convolve_rows_eager`; same arguments. Sums in float32, rounds before SiLU and after it."""
    require(x.device)
    B, T, C = x.shape
    W, num_places = weight.shape[1], window.shape[1]
    if num_places < W + T or window.shape[2] != C or len(weight) != C:
        raise ValueError(
            f"x must be [B, T, C] with a window of at least {W} + T places of C channels, and weight [C, {W}], got "
            f"{tuple(x.shape)}, {tuple(window.shape)} and {tuple(weight.shape)}."
        )
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _convolve[(-(-C // BLOCK_C), B)](
            x,
            weight,
            weight if bias is None else bias,
            window,
            kept,
            out,
            T,
            num_places,
            C,
            NUM_UNROLLED=T if T <= MAX_UNROLLED else 0,
            W=W,
            HAS_BIAS=bias is not None,
            BLOCK_W=round_up_to_power(W),
            BLOCK_C=BLOCK_C,
        )
    return out
