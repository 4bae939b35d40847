"""Attention of a few new tokens in each row over a cache whose rows have lengths of their own.

Flash-decoding: the slots that a row can see are divided among programs, each of which keeps a running softmax; a second
kernel joins them. What makes it cheap for speculative decoding: the T tokens of a row and the G query heads that share a
KV head form one tile, so that keys and values are read once, and a row costs its own length, not the cache's capacity.

B rows, T new tokens each, L slots in the cache, H query heads, H_kv KV heads, G = H / H_kv. Queries and keys have D
features, values D_v: fewer in multi-head latent attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..speculation.tree import Ancestry
from .deferred import take
from .language import jit, require, round_up_to_power, shared_memory, tl
from .rotary import ROTATION, apply_rotary, rotate_and_write


def attend_rows_eager(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    ancestry: Ancestry | None = None,
) -> Tensor:
    """Attention of T new tokens in each row, which sit at the slots from `start` on, over what they can see.

    Args:
        query: [B, H, T, D].
        keys: [B, L, H_kv, D], those of the new tokens included. What lies behind a row's last token is never used.
        values: [B, L, H_kv, D_v].
        start: [B] int64. Token t of row b sits at slot start[b] + t, and sees its own slot and those before.
        scaling: Multiplies the scores.
        window: How many slots a token sees at most, its own included.
        sinks: [H], a score that each head also gives to nothing.
        softcap: Scores are squashed into (-softcap, softcap).
        ancestry: Which of the new tokens see one another, if they are no chain, and which tokens of the same tree in the
            slots right before. Positions, which a window counts, are slots but for tokens of the tree: those come by
            their depth behind the slot of its first.

    Returns:
        [B, T, H, D_v] in the query's dtype.
    """
    B, H, T, _ = query.shape
    L, H_kv = keys.shape[1:3]
    is_visible = see_rows(start, T, L, window=window, ancestry=ancestry)  # [B, T, L]
    at = torch.arange(L, device=start.device)
    is_used = (at < start[:, None] + T)[..., None, None]  # [B, L, 1, 1]

    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.reshape(B, H_kv, -1, T, query.shape[-1]).to(wide)  # [B, H_kv, G, T, D]
    k, v = (x.to(wide).masked_fill(~is_used, 0) for x in (keys, values))
    scores = torch.einsum("bhgtd,blhd->bhgtl", q, k) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~is_visible[:, None, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide).view(1, H_kv, -1, 1, 1).expand(B, -1, -1, T, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = torch.einsum("bhgtl,blhd->bthgd", weights, v)  # [B, T, H_kv, G, D_v]
    return out.reshape(B, T, H, -1).to(query.dtype)


def see_rows(start: Tensor, T: int, L: int, *, window: int | None, ancestry: Ancestry | None) -> Tensor:
    """[B, T, L] bool: which slots each new token sees. Arguments as of `attend_rows_eager`."""
    first = start[:, None, None]  # [B, 1, 1]
    at = torch.arange(L, device=start.device)
    if ancestry is None:
        places = first + torch.arange(T, device=start.device)[:, None]  # [B, T, 1]
        is_visible, positions = at <= places, at
    else:
        first = first - ancestry.num_before  # of the tree
        places = first + ancestry.depths[ancestry.num_before :, None]
        new, size = at - first, len(ancestry.depths)  # [B, 1, L], which token of the tree a slot holds
        is_new, token = (new >= 0) & (new < size), new.clamp(0, size - 1)
        is_visible = (new < 0) | (is_new & (ancestry.bits[:, None] >> token & 1).bool())
        positions = torch.where(is_new, first + ancestry.depths[token], at)
    return is_visible if window is None else is_visible & (positions > places - window)


@jit()
def _tanh(x):
    """Right to a few units in the last place. Near 0 the formula with the exponential is not: there a polynomial."""
    square = x * x
    series = ((1.57394409e-2 * square - 5.23039624e-2) * square + 1.33152977e-1) * square - 3.33327681e-1
    return tl.where(tl.abs(x) < 0.6, x + x * (square * series), 1 - 2 / (tl.exp2(x * (2 * 1.4426950408889634)) + 1))


@jit("T", "num_before", "window", "num_splits")
def _attend_split(
    query,
    keys,
    values,
    start,
    sinks,
    ancestors,  # [T] int64: bits of the tree's tokens that each new one sees
    depths,  # [num_before+T] int64
    out,  # [B, T, H, D_v]
    partial,  # [B*H_kv, num_splits, T*G, D_v] float32
    stats,  # [B*H_kv, num_splits, T*G, 2] float32: largest score, sum of exponentials; to the base 2
    T,
    num_before,  # tokens of the tree in the slots before the new ones
    scaling,
    softcap,
    window,
    num_splits,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    H_KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_TREE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    b = (pair // H_KV).to(tl.int64)
    h_kv = pair % H_KV
    first = tl.load(start + b).to(tl.int32)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], t * G + g
    t = row // G
    head = h_kv * G + row % G
    is_row = t < T
    d = tl.arange(0, BLOCK_D)
    is_d = d < D
    dv = tl.arange(0, BLOCK_DV)
    is_dv = dv < D_V
    q_at = query + b * stride_qb + head[:, None] * stride_qh + t[:, None] * stride_qt + d[None, :]
    q = tl.load(q_at, mask=is_row[:, None] & is_d[None, :], other=0.0)

    # Which slots the tile's tokens can see between them, and this program's share of those. In a chain nobody sees a later
    # token; who sees whom in a tree or a block, its bits say.
    high = first + tl.minimum(T, (tile * BLOCK_M + BLOCK_M - 1) // G + 1)
    low = 0
    if IS_TREE:
        high = first + T
        first = first - num_before
        seen = tl.load(ancestors + t, mask=is_row, other=0)
        depth = tl.load(depths + num_before + t, mask=is_row, other=0).to(tl.int32)
        if HAS_WINDOW:
            low = tl.maximum(0, first - window + 1)
    elif HAS_WINDOW:
        low = tl.maximum(0, first + (tile * BLOCK_M) // G - window + 1)
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_N), num_splits) * BLOCK_N
    begin = low + split * share
    end = tl.minimum(high, begin + share)

    slot = tl.arange(0, BLOCK_N)
    k_base = keys + b * stride_kb + h_kv * stride_kh + begin.to(tl.int64) * stride_kl
    v_base = values + b * stride_vb + h_kv * stride_vh + begin.to(tl.int64) * stride_vl
    k_at = k_base + slot[:, None] * stride_kl + d[None, :]
    v_at = v_base + slot[:, None] * stride_vl + dv[None, :]

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for n in range(begin, end, BLOCK_N):
        # Zeros behind the end: junk there could be NaN, which even a weight of 0 lets through.
        is_slot = (n + slot < end)[:, None]
        k = tl.load(k_at, mask=is_slot & is_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if HAS_SOFTCAP:
            scores = _tanh(scores * (scaling / softcap)) * (softcap * 1.4426950408889634)
        else:
            scores = scores * (scaling * 1.4426950408889634)
        at = n + slot
        if IS_TREE:
            new = at - first  # which token of the tree a slot holds
            is_new = (new >= 0) & (new < num_before + T)
            bit = tl.where(is_new, new, 0).to(tl.int64)
            is_visible = (new < 0)[None, :] | (is_new[None, :] & (((seen[:, None] >> bit[None, :]) & 1) != 0))
            if HAS_WINDOW:
                new_depth = tl.load(depths + bit, mask=is_new, other=0).to(tl.int32)
                position = tl.where(is_new, first + new_depth, at)
                is_visible = is_visible & (position[None, :] > (first + depth)[:, None] - window)
        else:
            is_visible = at[None, :] <= (first + t)[:, None]
            if HAS_WINDOW:
                is_visible = is_visible & (at[None, :] > (first + t)[:, None] - window)
        scores = tl.where(is_visible, scores, float("-inf"))

        new_best = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # a token that sees none of this block
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(best - shift)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(v_at, mask=is_slot & is_dv[None, :], other=0.0)  # [BLOCK_N, BLOCK_DV]
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        best = new_best
        k_at += BLOCK_N * stride_kl
        v_at += BLOCK_N * stride_vl

    if not IS_SPLIT:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
            new_best = tl.maximum(best, sink)
            fade = tl.exp2(best - new_best)
            total = total * fade + tl.exp2(sink - new_best)
            acc = acc * fade[:, None]
        out_at = out + ((b * T + t) * (H_KV * G) + head)[:, None] * D_V + dv[None, :]
        tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_row[:, None] & is_dv[None, :])
    else:
        at = (pair.to(tl.int64) * num_splits + split) * (T * G) + row
        tl.store(stats + at * 2, best, mask=is_row)
        tl.store(stats + at * 2 + 1, total, mask=is_row)
        if begin < end:
            tl.store(partial + at[:, None] * D_V + dv[None, :], acc, mask=is_row[:, None] & is_dv[None, :])


@jit("T", "num_splits")
def _join_splits(
    partial,
    stats,
    sinks,
    out,
    T,
    num_splits,
    H_KV: tl.constexpr,
    G: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    pair = tl.program_id(0)
    row = tl.program_id(1)
    b = (pair // H_KV).to(tl.int64)
    t = row // G
    head = (pair % H_KV) * G + row % G
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_DV)
    at = (pair.to(tl.int64) * num_splits + s) * (T * G) + row  # [BLOCK_S]
    best = tl.load(stats + at * 2, mask=s < num_splits, other=float("-inf"))
    total = tl.load(stats + at * 2 + 1, mask=s < num_splits, other=0.0)
    is_filled = best > float("-inf")
    overall = tl.max(best, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        overall = tl.maximum(overall, sink)
    fade = tl.exp2(best - overall)
    acc = tl.load(partial + at[:, None] * D_V + d[None, :], mask=is_filled[:, None] & (d < D_V)[None, :], other=0.0)
    joined = tl.sum(acc * fade[:, None], 0)  # [BLOCK_DV]
    denominator = tl.sum(total * fade, 0)
    if HAS_SINKS:
        denominator += tl.exp2(sink - overall)
    out_at = out + ((b * T + t) * (H_KV * G) + head) * D_V + d
    tl.store(out_at, (joined / denominator).to(out.dtype.element_ty), mask=d < D_V)


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    ancestry: Ancestry | None = None,
    num_splits: int | None = None,
    blocks: tuple[int, int, int] | None = None,
) -> Tensor:
    """The kernel of `attend_rows_eager`; same arguments, and some for speed.

    Which sums are made in which order depends on sizes only, so equal calls give equal bits.

    Args:
        num_splits: Programs that share a row's slots. By default chosen from the sizes.
        blocks: Slots a step, warps, and pipeline stages. By default chosen from the sizes.
    """
    require(query.device)
    B, H, T, D = query.shape
    L, H_kv = keys.shape[1:3]
    D_v, G = values.shape[-1], H // H_kv
    if H % H_kv or keys.shape != (B, L, H_kv, D) or values.shape[:-1] != keys.shape[:-1] or start.shape != (B,):
        raise ValueError(
            "query must be [B, H, T, D], keys [B, L, H_kv, D] and values [B, L, H_kv, D_v] with H_kv dividing H, and "
            f"start [B]; got {tuple(query.shape)}, {tuple(keys.shape)}, {tuple(values.shape)} and {tuple(start.shape)}."
        )
    if not query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1:
        raise ValueError("query, keys and values must be contiguous in their last dimension, D or D_v.")
    block_m = min(64, max(16, round_up_to_power(T * G)))
    num_tiles = -(-T * G // block_m)
    block_d, block_dv = (max(16, round_up_to_power(width)) for width in (D, D_v))
    slot_bytes = (block_d + block_dv) * keys.element_size()
    block_n, num_warps, num_stages = blocks or choose_blocks(slot_bytes, shared_memory(query.device))
    if num_splits is None:
        num_splits = choose_num_splits(B * H_kv * num_tiles, L if window is None else min(L, window + T), block_n)
    rows = T * G

    out = query.new_empty(B, T, H, D_v)
    if num_splits == 1:
        partial = stats = out  # not written
    else:
        partial = torch.empty(B * H_kv, num_splits, rows, D_v, dtype=torch.float32, device=query.device)
        stats = torch.empty(B * H_kv, num_splits, rows, 2, dtype=torch.float32, device=query.device)
    sinks_at = out if sinks is None else sinks
    with torch.cuda.device_of(query):
        _attend_split[B * H_kv, num_splits, num_tiles](
            query,
            keys,
            values,
            start,
            sinks_at,
            *(ancestry or (start, start)),  # not read where there is none
            out,
            partial,
            stats,
            T,
            0 if ancestry is None else ancestry.num_before,
            scaling,
            softcap or 1.0,
            window or 0,
            num_splits,
            *query.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            H_KV=H_kv,
            G=G,
            D=D,
            D_V=D_v,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            IS_SPLIT=num_splits > 1,
            HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None,
            HAS_SOFTCAP=softcap is not None,
            IS_TREE=ancestry is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=num_warps,
            num_stages=num_stages,
        )
        if num_splits > 1:
            _join_splits[B * H_kv, rows](
                partial,
                stats,
                sinks_at,
                out,
                T,
                num_splits,
                H_KV=H_kv,
                G=G,
                D_V=D_v,
                BLOCK_DV=block_dv,
                BLOCK_S=round_up_to_power(num_splits),
                HAS_SINKS=sinks is not None,
                num_warps=4,
            )
    return out


def choose_blocks(slot_bytes: int, shared_memory: int) -> tuple[int, int, int]:
    """Slots a step, warps and pipeline stages, of which keys and values fit into the memory of a multiprocessor.

    `slot_bytes` is what a key and a value take of it.
    """
    num_stages, budget = (4, 140_000) if shared_memory > 160_000 else (3, 90_000)
    block_n = 128
    while block_n > 16 and num_stages * block_n * slot_bytes > budget:
        block_n //= 2
    while num_stages > 1 and num_stages * block_n * slot_bytes > budget:
        num_stages -= 1
    return block_n, 4, num_stages


def choose_num_splits(num_programs: int, num_slots: int, block_n: int, *, wanted: int = 132) -> int:
    """How many programs share a row's slots, so that there is one for each multiprocessor of an H100."""
    num_blocks = -(-num_slots // block_n)
    return max(1, min(wanted // num_programs, num_blocks, 64))


def write_rows_eager(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, start: Tensor) -> None:
    """Put the keys and values of T new tokens into each row of a cache, in its dtype.

    Args:
        keys: [B, L, H_kv, D], written to.
        values: [B, L, H_kv, D_v], written to.
        new_keys: [B, H_kv, T, D].
        new_values: [B, H_kv, T, D_v].
        start: [B] int64. Token t of row b goes to slot start[b] + t.
    """
    T = new_keys.shape[2]
    slots = (start[:, None] + torch.arange(T, device=start.device)).to(keys.device)  # [B, T]
    rows = torch.arange(len(slots), device=keys.device)[:, None]
    keys[rows, slots] = new_keys.transpose(1, 2).to(keys.dtype)
    values[rows, slots] = new_values.transpose(1, 2).to(values.dtype)


@jit("T")
def _write_rows(
    keys,
    values,
    new_keys,
    new_values,
    start,
    T,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_nkb,
    stride_nkh,
    stride_nkt,
    stride_nvb,
    stride_nvh,
    stride_nvt,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0)
    b = (token // T).to(tl.int64)
    t = token % T
    slot = tl.load(start + b) + t
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (h < H_KV) & (d < D)
    mask_v = (h < H_KV) & (d < D_V)
    key = tl.load(new_keys + b * stride_nkb + t * stride_nkt + h * stride_nkh + d, mask=mask)
    tl.store(keys + b * stride_kb + slot * stride_kl + h * stride_kh + d, key, mask=mask)
    value = tl.load(new_values + b * stride_nvb + t * stride_nvt + h * stride_nvh + d, mask=mask_v)
    tl.store(values + b * stride_vb + slot * stride_vl + h * stride_vh + d, value, mask=mask_v)


def write_rows(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, start: Tensor) -> None:
    """The kernel of `write_rows_eager`: one for both, where the twin needs four. Same arguments.

    Keys whose rotation was put off are rotated on the way.
    """
    rotation = take(ROTATION, new_keys)
    require(keys.device)
    start = start.to(keys.device)
    B, H_kv, T, D = new_keys.shape
    D_v = new_values.shape[-1]
    caches = (B, keys.shape[1], H_kv, D), (B, keys.shape[1], H_kv, D_v)
    if (keys.shape, values.shape) != caches or new_values.shape != (B, H_kv, T, D_v):
        raise ValueError(
            "keys must be [B, L, H_kv, D] and values [B, L, H_kv, D_v], for new ones [B, H_kv, T, D] and [B, H_kv, T, D_v]; "
            f"got {tuple(keys.shape)}, {tuple(values.shape)}, {tuple(new_keys.shape)} and {tuple(new_values.shape)}."
        )
    if any(x.stride(-1) != 1 for x in (keys, values, new_keys, new_values)):
        raise ValueError("keys and values, new and cached, must be contiguous in their last dimension, D or D_v.")
    if rotation is not None and new_values.shape == new_keys.shape:
        rotate_and_write(rotation, new_values, keys, values, start)
        return
    if rotation is not None:
        apply_rotary(*rotation[:4], outs=rotation[4:])
    block_d = round_up_to_power(max(D, D_v))
    block_h = min(round_up_to_power(H_kv), max(1, 2048 // block_d))
    with torch.cuda.device_of(keys):
        _write_rows[B * T, -(-H_kv // block_h)](
            keys,
            values,
            new_keys,
            new_values,
            start,
            T,
            *keys.stride()[:3],
            *values.stride()[:3],
            *new_keys.stride()[:3],
            *new_values.stride()[:3],
            H_KV=H_kv,
            D=D,
            D_V=D_v,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
        )


def keep_rows_eager(keys: Tensor, values: Tensor, start: Tensor, path: Tensor) -> None:
    """Keep of a block in each row of a cache only the tokens on a path: token path[b, i] moves to slot start[b] + i.

    Args:
        keys: [B, L, H_kv, D], written to.
        values: [B, L, H_kv, D_v], written to.
        start: [B] int64, the block's.
        path: [B, n] int64, ascending.
    """
    rows = torch.arange(len(path), device=keys.device)[:, None]
    start, path = start[:, None].to(keys.device), path.to(keys.device)
    kept, to = start + path, start + torch.arange(path.shape[1], device=keys.device)
    for held in (keys, values):
        held[rows, to] = held[rows, kept]


@jit()
def _keep_rows(
    first,
    offsets,  # [layers, 2] int64, elements from `first` to a layer's keys, and to its values
    start,
    path,
    n,
    width_k,
    width_v,
    stride_kb,
    stride_kl,
    stride_vb,
    stride_vl,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    keys = first + tl.load(offsets + 2 * tl.program_id(2))
    values = first + tl.load(offsets + 2 * tl.program_id(2) + 1)
    i = tl.arange(0, BLOCK_N)
    slot = tl.load(start + b)
    kept = (slot + tl.load(path + b * n + i, mask=i < n, other=0))[:, None]
    to = (slot + i)[:, None]
    x = (tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    mask_k = (i < n)[:, None] & (x < width_k)
    mask_v = (i < n)[:, None] & (x < width_v)
    key = tl.load(keys + b * stride_kb + kept * stride_kl + x, mask=mask_k)
    value = tl.load(values + b * stride_vb + kept * stride_vl + x, mask=mask_v)
    tl.debug_barrier()  # a slot that is written may be one that is read
    tl.store(keys + b * stride_kb + to * stride_kl + x, key, mask=mask_k)
    tl.store(values + b * stride_vb + to * stride_vl + x, value, mask=mask_v)


def keep_rows(
    held: Sequence[tuple[Tensor, Tensor]], start: Tensor, path: Tensor, found: dict[tuple[int, ...], Tensor]
) -> None:
    """The kernel of `keep_rows_eager`, over layers that are alike at once.

    Args:
        held: Keys and values of each layer.
        start: As of the twin.
        path: As of the twin.
        found: Where layers lie, from earlier calls; for as long as their memory is used. What is not in it yet is copied to
            the device.
    """
    alike: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    for keys, values in held:
        is_plain = keys.dtype == values.dtype and all(x.stride()[2:] == (x.shape[3], 1) for x in (keys, values))
        if not is_plain:  # heads that are not side by side
            keep_rows_eager(keys, values, start, path)
            continue
        kind = (keys.device, keys.dtype, keys.shape, values.shape, keys.stride(), values.stride())
        alike.setdefault(kind, []).append((keys, values))
    for pairs in alike.values():
        _keep_alike(pairs, start, path, found)


def _keep_alike(
    held: Sequence[tuple[Tensor, Tensor]], start: Tensor, path: Tensor, found: dict[tuple[int, ...], Tensor]
) -> None:
    keys, values = held[0]
    require(keys.device)
    where = tuple(x.data_ptr() for pair in held for x in pair)
    if where not in found:
        offsets = [(place - where[0]) // keys.element_size() for place in where]
        found[where] = torch.tensor(offsets, device=keys.device)
    B, n = path.shape
    widths = [x.shape[2] * x.shape[3] for x in (keys, values)]
    block_n = round_up_to_power(n)
    block_x = max(32, 2048 // block_n)
    with torch.cuda.device_of(keys):
        _keep_rows[B, -(-max(widths) // block_x), len(held)](
            *(keys, found[where], start.to(keys.device).contiguous(), path.to(keys.device).contiguous(), n, *widths),
            *(*keys.stride()[:2], *values.stride()[:2]),
            BLOCK_N=block_n,
            BLOCK_X=block_x,
            num_warps=4,
        )
