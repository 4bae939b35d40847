"""Kernels against what they replace: right first, then how fast. One CUDA GPU, about four minutes.

python benchmarks/bench_kernels.py --out OUT [--only correct attention linear ...]

`--tiny` runs every part on toy sizes; with TRITON_INTERPRET=1 also on a CPU, where its times mean nothing.
(Not called kernels.py: that is the name of a package the host looks for.)
"""

import argparse
import concurrent.futures
import contextlib
import functools
import gc
import itertools
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, GptOssConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.kernels import attention
from hf_eagle3.kernels.attention import attend_rows, attend_rows_eager, choose_num_splits, write_rows, write_rows_eager
from hf_eagle3.kernels.fusion import fused
from hf_eagle3.kernels.language import shared_memory
from hf_eagle3.kernels.linear import (
    Blocks,
    choose_blocks,
    choose_gated_blocks,
    is_worth_it,
    linear_gated,
    linear_gated_eager,
    linear_group,
    linear_small,
    linear_small_eager,
)
from hf_eagle3.kernels.mlp import gate
from hf_eagle3.kernels.norms import rms_norm, rms_norm_eager
from hf_eagle3.kernels.rotary import apply_rotary, apply_rotary_eager
from hf_eagle3.rows.cache import RowCache

PARTS = ["correct", "attention", "linear", "default", "experts", "small", "stack", "compiled"]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # Triton's interpreter has no bfloat16 products
COLD_BYTES = 160 * 2**20  # what the copies of an input must exceed together, so that none is left in the L2 cache


class Layer(NamedTuple):
    """A linear layer's shape and where it comes from."""

    name: str
    N: int
    K: int


# Llama-3.1-8B, and the drafter's first layer (2H wide) and fc.
LAYERS = [
    Layer("o", 4096, 4096),
    Layer("k", 1024, 4096),
    Layer("gate", 14336, 4096),
    Layer("down", 4096, 14336),
    Layer("head", 128256, 4096),
    Layer("draft head", 32000, 4096),
    Layer("drafter q", 4096, 8192),
    Layer("drafter fc", 4096, 12288),
]
# Shapes that the sweep does not visit, so that they get what it found for others.
OTHER_LAYERS = [
    Layer("SmolLM2 o", 576, 576),
    Layer("SmolLM2 k", 192, 576),
    Layer("SmolLM2 down", 576, 1536),
    Layer("SmolLM2 draft head", 11520, 576),
    Layer("SmolLM2 head", 49152, 576),
    Layer("Qwen3-8B down", 4096, 12288),
    Layer("Qwen3-8B head", 151936, 4096),
    Layer("GptOss q", 4096, 2880),
    Layer("GptOss k", 512, 2880),
    Layer("GptOss o", 2880, 4096),
    Layer("GptOss head", 201088, 2880),
]
OTHER_GATED = {"SmolLM2": (1536, 576), "Qwen3-8B": (12288, 4096)}
QKV = (4096, 1024, 1024)
GATED = (14336, 4096)
ROW_COUNTS = [1, 4, 8, 32, 64]
CUTS = [(64, 4, 3), (64, 4, 2), (64, 4, 4), (32, 4, 4), (128, 4, 2), (128, 8, 3), (64, 2, 3), (64, 8, 3)]


class Report:
    """Results as they come: printed, and kept for the files."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.data: dict[str, Any] = {}

    def add(self, line: str = "") -> None:
        """One line of Markdown."""
        self.lines.append(line)

    def table(self, title: str, head: list[str], rows: list[list[Any]]) -> None:
        """A table with a heading."""
        cells = [[f"{x:.1f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
        self.add(f"\n### {title}\n")
        self.add("| " + " | ".join(head) + " |")
        self.add("|" + "---|" * len(head))
        for row in cells:
            self.add("| " + " | ".join(row) + " |")
        self.data[title] = [dict(zip(head, row, strict=True)) for row in rows]


def say(text: str) -> None:
    """Progress, to stderr."""
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


BEGAN = time.perf_counter()


@functools.cache
def capture_stream() -> Any:
    """Where graphs are captured."""
    return torch.cuda.Stream()


def microseconds(calls: list[Callable[[], Any]], *, replays: int = 5) -> float:
    """Time of one call: median over replays of a CUDA graph of all of them, in order. Without a GPU, of one run."""
    if not ON_GPU:
        began = time.perf_counter()
        calls[0]()
        return 1e6 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    with torch.cuda.stream(capture_stream()):
        calls[0]()
        torch.cuda.synchronize()
        # Not `torch.cuda.graph`, which collects garbage each time.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [1000 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    del graph
    return statistics.median(times) / len(calls)


def num_copies(num_bytes: int, most: int = 24) -> int:
    """How many copies of an input of `num_bytes` keep the L2 cache cold."""
    return min(most, max(2, -(-COLD_BYTES // num_bytes))) if ON_GPU else 1


def random(*shape: int, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, dtype=dtype, device=DEVICE) * scale


def error(out: Tensor, truth: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN is infinite."""
    ratio = float((out.double() - truth.double()).norm() / truth.double().norm())
    return ratio if ratio == ratio else float("inf")


# ---- right first ----


def attention_case(B: int, H: int, H_kv: int, T: int, D: int, L: int, dtype: torch.dtype = DTYPE) -> dict[str, Tensor]:
    """Rows of lengths of their own, NaN behind each."""
    query = random(B, T, H, D, dtype=dtype).transpose(1, 2)
    keys, values = random(B, L, 2, H_kv, D, dtype=dtype).unbind(2)  # strided, as a cache may be
    start = torch.randint(0, L - T + 1, (B,), device=DEVICE)
    start[0] = 0
    start[-1] = L - T
    is_junk = torch.arange(L, device=DEVICE) >= start[:, None] + T  # [B, L]
    for x in (keys, values):
        x.masked_fill_(is_junk[..., None, None], float("nan"))
    return {"query": query, "keys": keys, "values": values, "start": start}


def in_double(case: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.items()}


def attend_low(
    query: Tensor, keys: Tensor, values: Tensor, start: Tensor, *, scaling: float, **options: Any
) -> Tensor:
    """An independent reference in the inputs' own dtype: the host's eager attention, as GptOss has it."""
    T, G = query.shape[2], query.shape[1] // keys.shape[2]
    at = torch.arange(keys.shape[1], device=query.device)
    slots = start[:, None, None] + torch.arange(T, device=query.device)[:, None]  # [B, T, 1]
    is_visible = at <= slots
    if options.get("window"):
        is_visible &= at > slots - options["window"]
    k, v = (repeat_kv(torch.nan_to_num(x).transpose(1, 2), G) for x in (keys, values))
    scores = query @ k.transpose(2, 3) * scaling
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores.masked_fill(~is_visible[:, None], torch.finfo(scores.dtype).min)
    if options.get("sinks") is not None:
        sinks = options["sinks"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).float().softmax(-1).to(query.dtype)[..., :-1]
    else:
        weights = scores.float().softmax(-1).to(query.dtype)
    return (weights @ v).transpose(1, 2)


class Case(NamedTuple):
    """An attention to check."""

    name: str
    shape: tuple[int, int, int, int, int]  # B, H, H_kv, T, D
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = DTYPE

    def options(self, H: int, D: int) -> dict[str, Any]:
        """Arguments of attention besides tensors of the cache."""
        given: dict[str, Any] = {"scaling": D**-0.5, "window": self.window, "softcap": self.softcap}
        return {**given, "sinks": random(H, dtype=self.dtype) if self.has_sinks else None}


def attention_cases(tiny: bool) -> list[Case]:
    """Shapes, options and dtypes."""
    many = 2 if tiny else 8
    cases = [
        Case("8B", (3, 4 * many, many, 4, 128)),
        Case("GptOss window", (2, 8 * many, many, 4, 64), window=40, has_sinks=True),
        Case("GptOss full", (2, 8 * many, many, 1, 64), has_sinks=True),
        Case("SmolLM2", (3, 9, 3, 4, 64)),
        Case("D 96", (2, 8, 4, 3, 96), softcap=20.0),
        Case("D 256", (2, 8, 4, 4, 256), softcap=50.0, window=33),
        Case("T 40", (2, 8, 2, 40, 64), window=37),
    ]
    if not tiny:
        cases += [case._replace(dtype=dtype) for case in cases[1:6:4] for dtype in (torch.float16, torch.float32)]
    return cases


def check(report: Report, tiny: bool) -> bool:
    """Errors against float64, and what an independent computation in the same dtype loses. At most twice that."""
    rows: list[list[Any]] = []

    def compare(name: str, run: Callable[[], Tensor], truth: Tensor, low: Tensor) -> None:
        out = run()
        is_same_again = torch.equal(out, run())
        ours, theirs = error(out, truth), error(low, truth)
        budget = 2 * theirs + 1e-7
        verdict = "ok" if ours <= budget and is_same_again else "WRONG"
        rows.append([name, f"{ours:.1e}", f"{theirs:.1e}", "yes" if is_same_again else "NO", verdict])

    for case_of in attention_cases(tiny):
        dtype, H, D = case_of.dtype, case_of.shape[1], case_of.shape[4]
        case = attention_case(*case_of.shape, 96 if tiny else 1100, dtype)
        given = case_of.options(H, D)
        truth = attend_rows_eager(**in_double(case), **in_double(given))
        low = attend_low(**case, **given)
        for num_splits in (None, 1, 5):
            compare(
                f"attention {case_of.name}, {str(dtype)[6:]}, splits {num_splits or 'default'}",
                lambda case=case, given=given, n=num_splits: attend_rows(**case, **given, num_splits=n),
                truth,
                low,
            )
    kv, other = random(3, 20, 2, 2, 48), random(3, 4, 2, 2, 48)
    start = torch.tensor([0, 16, 7], device=DEVICE)
    caches = [kv.clone(), kv.clone()]
    for cache, write in zip(caches, (write_rows_eager, write_rows), strict=True):
        write(*cache.unbind(2), *(x.transpose(1, 2) for x in other.unbind(2)), start)
    is_same = torch.equal(*caches) and not torch.equal(caches[0], kv)
    rows.append(["write_rows", "", "equal to twin", str(is_same), "ok" if is_same else "WRONG"])

    N, K = (80, 96) if tiny else (1040, 4096)
    for M in (1, 3, 17, 64):
        x, w, w2, bias = random(M, K), random(N, K, scale=K**-0.5), random(N, K, scale=K**-0.5), random(N)
        truth = linear_small_eager(x.double(), w.double(), bias.double())
        for blocks in [
            None,
            Blocks("dot", 32, 32, 4, 4, 3),
            *([Blocks("fma", 4, 32 if tiny else 512, 1, 4, s) for s in (1, 3)] if M <= 4 else []),
        ]:
            compare(
                f"linear M {M}, {blocks}",
                lambda x=x, w=w, b=bias, blocks=blocks: linear_small(x, w, b, blocks=blocks),
                truth,
                F.linear(x, w, bias),
            )
        others = random(M, K)
        others[-1] = x[-1]
        is_alone = torch.equal(linear_small(x, w)[-1], linear_small(others, w)[-1])
        rows.append([f"linear M {M}, a row alone", "", "", "", "ok" if is_alone else "WRONG"])
        for name in ("silu", "gelu_tanh"):
            truth = linear_gated_eager(x.double(), w.double(), w2.double(), activation=name)
            low = linear_gated_low(x, w, w2, name)
            compare(
                f"gated M {M}, {name}",
                lambda x=x, w=w, w2=w2, n=name: linear_gated(x, w, w2, activation=n),
                truth,
                low,
            )
        parts = ([w, w2[:16], w[16:]], [bias, None, None])
        for i, (weight, b) in enumerate(zip(*parts, strict=True)):
            truth = linear_small_eager(x.double(), weight.double(), None if b is None else b.double())
            compare(
                f"group M {M}, part {i}",
                lambda x=x, i=i, parts=parts: linear_group(x, *parts)[i],
                truth,
                F.linear(x, weight, b),
            )

    x, w = random(5, N), random(N)
    for variant in ("llama", "wide", "shifted"):
        low = rms_norm_eager(x, w, eps=1e-5, variant=variant)
        out = rms_norm(x, w, eps=1e-5, variant=variant)
        share = float((out == low).float().mean())
        rows.append(
            [f"rms_norm {variant}", f"{error(out, low):.1e}", "equal to host", f"{share:.5f}", verdict_of(share)]
        )
    D = 64
    q, k = random(2, 3, 8, D).transpose(1, 2), random(2, 3, 2, D).transpose(1, 2)
    for width in (D, D // 2):
        cos, sin = random(2, 3, width), random(2, 3, width)
        want = apply_rotary_pos_emb(q, k, cos, sin) if width == D else apply_rotary_eager(q, k, cos, sin)
        is_same = all(map(torch.equal, apply_rotary(q, k, cos, sin), want))
        rows.append([f"rotary, cosines of {width}", "", "equal to host", str(is_same), "ok" if is_same else "WRONG"])
    a, b = random(5, N), random(5, N)
    share = float((gate(a, b) == F.silu(a) * b).float().mean())
    rows.append(["silu(gate) * up", "", "equal to host", f"{share:.5f}", verdict_of(share)])

    bad = [row for row in rows if row[-1] != "ok"]
    report.add(f"\nCorrect: {len(rows) - len(bad)} of {len(rows)} checks.")
    head = ["check", "error", "reference's error", "same again", "verdict"]
    report.data["correct"] = [dict(zip(head, row, strict=True)) for row in rows]
    if bad:
        report.table("Wrong", head, bad)
    worst = sorted((row for row in rows if row[1]), key=lambda row: -float(row[1]))[:6]
    report.table("Largest errors", head, worst)
    return not bad


def verdict_of(share: float) -> str:
    """Whether `share` of equal elements is what rounding at the same points gives."""
    return "ok" if share > 0.99 else "WRONG"


def linear_gated_low(x: Tensor, w: Tensor, w2: Tensor, name: str) -> Tensor:
    """The gated pair as the host computes it."""
    act = F.silu(F.linear(x, w)) if name == "silu" else F.gelu(F.linear(x, w), approximate="tanh")
    return act * F.linear(x, w2)


# ---- attention ----


@functools.cache
def row_bounds(B: int, T: int, L: int) -> tuple[Tensor, Tensor]:
    """Where each row's queries and slots begin, as flash attention wants it."""
    return tuple(torch.arange(0, B * n + 1, n, dtype=torch.int32, device=DEVICE) for n in (T, L))  # type: ignore[return-value]


def flash_rows(
    query: Tensor, keys: Tensor, values: Tensor, start: Tensor, *, scaling: float, used: Tensor | None = None
) -> Tensor:
    """ATen's variable-length flash attention over the same cache: [B, T, H, D]. `used` [B] int32 is start + T."""
    B, H, T, D = query.shape
    L, H_kv = keys.shape[1:3]
    q = query.transpose(1, 2).reshape(B * T, H, D)
    k, v = keys.reshape(B * L, H_kv, D), values.reshape(B * L, H_kv, D)
    used = (start + T).to(torch.int32) if used is None else used
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, *row_bounds(B, T, L), T, L, 0.0, True, False, scale=scaling, seqused_k=used
    )[0]
    return out.view(B, T, H, D)


def sdpa_rows(query: Tensor, keys: Tensor, values: Tensor, start: Tensor, *, scaling: float) -> Tensor:
    """What the host's sdpa does with a mask [B, 1, T, L]."""
    T, G = query.shape[2], query.shape[1] // keys.shape[2]
    slots = start[:, None] + torch.arange(T, device=start.device)
    mask = torch.arange(keys.shape[1], device=start.device) <= slots[:, None, :, None]
    k, v = (repeat_kv(x.transpose(1, 2), G) for x in (keys, values))
    return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scaling).transpose(1, 2)


def make_caches(B: int, L: int, H_kv: int, D: int) -> list[tuple[Tensor, Tensor]]:
    """Enough copies of a cache to keep L2 cold."""
    num_bytes = 4 * B * L * H_kv * D
    return [(random(B, L, H_kv, D), random(B, L, H_kv, D)) for _ in range(num_copies(num_bytes))]


def time_attention(report: Report, tiny: bool) -> None:
    """Ours, flash and sdpa by batch, tokens and context; then how ours is best cut."""
    H, H_kv, D = (8, 2, 32) if tiny else (32, 8, 128)
    contexts = [40] if tiny else [640, 8192, 32768]
    rows: list[list[Any]] = []
    for B in [1, 2] if tiny else [1, 8, 64]:
        for context in contexts:
            L = context + 64
            caches = make_caches(B, L, H_kv, D)
            for T in (1, 4):
                query = random(B, T, H, D).transpose(1, 2)
                start = torch.full((B,), context - T, device=DEVICE)
                row: list[Any] = [B, T, context]
                for name, attend, limit in (
                    ("ours", attend_rows, 10**9),
                    ("flash", functools.partial(flash_rows, used=(start + T).int()), 10**9 if ON_GPU else 0),
                    ("sdpa", sdpa_rows, 70_000),
                ):
                    if B * context > limit:
                        row.append("-")
                        continue
                    calls = [
                        lambda a=attend, q=query, k=k, v=v, s=start: a(q, k, v, s, scaling=D**-0.5) for k, v in caches
                    ]
                    row.append(attempt(lambda calls=calls: microseconds(calls), f"{name} {row}"))
                if isinstance(row[3], float):
                    row.append(4 * B * context * H_kv * D / row[3] / 1e3)
                    row.append(row[4] / row[3] if isinstance(row[4], float) else "-")
                rows.append([*row, *["-"] * (8 - len(row))])
            del caches
            free()
    report.table(
        f"Attention, {H} heads, {H_kv} KV heads, D {D}: us",
        ["B", "T", "context", "ours", "flash", "sdpa", "ours GB/s", "flash / ours"],
        rows,
    )

    # Lengths that differ, window, sinks.
    rows = []
    for name, (h, h_kv, d), options in (
        ("8B, lengths from 64 up", (H, H_kv, D), {}),
        ("GptOss window 128, sinks", (16, 2, 64) if tiny else (64, 8, 64), {"window": 128}),
        ("GptOss full, sinks", (16, 2, 64) if tiny else (64, 8, 64), {"sinks": None}),
        ("SmolLM2", (9, 3, 64), {}),
    ):
        for B in [2] if tiny else [1, 8, 64]:
            context = 40 if tiny else 1024
            caches = make_caches(B, context, h_kv, d)
            query = random(B, 4, h, d).transpose(1, 2)
            low = 20 if tiny else 60
            start = torch.linspace(low, context - 4, B, device=DEVICE).long() if "from" in name else None
            start = torch.full((B,), context - 4, device=DEVICE) if start is None else start
            given = dict(options, scaling=d**-0.5)
            if "sinks" in name:
                given["sinks"] = random(h)
            calls = [lambda q=query, k=k, v=v, s=start, g=given: attend_rows(q, k, v, s, **g) for k, v in caches]
            rows.append([name, B, context, microseconds(calls)])
    report.table("Attention, other shapes, T 4: us", ["shape", "B", "context", "ours"], rows)

    # The cut: slots a step, warps, stages; programs a row.
    rows = []
    splits = {1: [8, 16, 32, 64], 8: [2, 4, 8, 16], 64: [1, 2, 4]}
    for B, context in [(1, 40)] if tiny else [(1, 640), (1, 8192), (8, 640), (8, 8192), (64, 640), (64, 8192)]:
        L = context if tiny else 2048 if context == 640 else context + 64
        caches = make_caches(B, L, H_kv, D)
        query = random(B, 4, H, D).transpose(1, 2)
        start = torch.full((B,), context - 4, device=DEVICE)
        found = []
        for cut in CUTS[:2] if tiny else CUTS:
            for n in splits[B][:2] if tiny else splits[B]:
                calls = [
                    lambda q=query, k=k, v=v, s=start, c=cut, n=n: attend_rows(
                        q, k, v, s, scaling=D**-0.5, num_splits=n, blocks=c
                    )
                    for k, v in caches
                ]
                took = attempt(lambda calls=calls: microseconds(calls), f"cut {cut} {n}")
                if isinstance(took, float):
                    found.append((took, cut, n))
        default = attention.choose_blocks(2 * D * 2, shared_memory(DEVICE))
        n_default = choose_num_splits(B * H_kv, L, default[0])
        calls = [lambda q=query, k=k, v=v, s=start: attend_rows(q, k, v, s, scaling=D**-0.5) for k, v in caches]
        best = [f"{took:.1f}: {cut} x {n}" for took, cut, n in sorted(found)[:4]]
        rows.append(
            [B, context, L, f"{microseconds(calls):.1f}: {default} x {n_default}", *best, *["-"] * (4 - len(best))]
        )
        report.data.setdefault("attention cuts", []).append({"B": B, "context": context, "found": found})
        del caches
        free()
    report.table(
        "Attention, cuts (slots a step, warps, stages) x splits, T 4: us",
        ["B", "context", "L", "default", "best", "2nd", "3rd", "4th"],
        rows,
    )


# ---- linear ----


def list_blocks(M: int, tiny: bool) -> list[Blocks]:
    """What to try for M rows."""
    if tiny:
        return [Blocks("dot", 16, 32, 1, 4, 3), *([Blocks("fma", 4, 32, 1, 4, 2)] if M <= 4 else [])]
    if M <= 16:
        dots = [(16, 256, 4, 4), (16, 512, 4, 3), (16, 512, 8, 3), (16, 512, 4, 4), (16, 256, 4, 6), (16, 256, 2, 4)]
        dots += [(16, 128, 2, 6), (32, 128, 4, 4), (32, 256, 4, 3), (32, 256, 4, 4), (32, 256, 8, 4), (32, 128, 4, 6)]
        dots += [(64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 5), (64, 256, 8, 3), (16, 1024, 8, 3)]
        found = [Blocks("dot", n, k, 1, w, s) for n, k, w, s in dots]
        found += [Blocks("dot", 16, 256, 2, 4, 4), Blocks("dot", 32, 256, 2, 4, 4), Blocks("dot", 16, 256, 4, 4, 4)]
        if M <= 4:
            fmas = [(4, 512, 4, 3), (4, 512, 4, 1), (2, 1024, 4, 3), (2, 1024, 4, 1), (1, 1024, 4, 1), (4, 512, 2, 3)]
            fmas += [(1, 2048, 8, 1), (8, 256, 4, 4)]
            found += [Blocks("fma", n, k, 1, w, s) for n, k, w, s in fmas]
        return found
    dots = [(32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 6), (32, 128, 8, 4)]
    dots += [(64, 128, 8, 4), (128, 64, 4, 4), (128, 128, 8, 3), (128, 64, 8, 5)]
    found = [Blocks("dot", n, k, 1, w, s) for n, k, w, s in dots]
    return found + [Blocks("dot", n, k, s, 4, 4) for n, k in ((32, 128), (64, 64), (128, 64)) for s in (2, 4)]


GATED_BLOCKS = {
    16: [
        (16, 256, 4, 3),
        (16, 256, 4, 4),
        (16, 128, 4, 4),
        (32, 128, 4, 3),
        (32, 128, 4, 4),
        (32, 256, 8, 3),
        (16, 512, 8, 3),
    ],
    64: [(32, 128, 4, 3), (32, 64, 4, 4), (64, 64, 4, 4), (64, 128, 8, 3), (64, 64, 8, 5), (32, 128, 8, 4)],
}


def list_gated_blocks(M: int, tiny: bool) -> list[Blocks]:
    """What to try for a gated pair."""
    cuts = [(16, 32, 4, 3)] if tiny else GATED_BLOCKS[16 if M <= 16 else 64]
    return [Blocks("dot", n, k, 1, w, s) for n, k, w, s in cuts]


def build(job: tuple[str, Any, Any]) -> str | None:
    """Compile one kernel into the cache on disk, by running it small. In a process of its own."""
    kind, what, M = job
    try:
        if kind == "attend":
            B, H, H_kv, T, D = what.shape
            case = attention_case(B, H, H_kv, T, D, 128, what.dtype)
            attend_rows(**case, **what.options(H, D), num_splits=M[0], blocks=M[1])
        else:
            x, w = random(M, 4096), random(256, 4096)
            n = 3 if kind == "group" else 1
            if kind == "gated":
                linear_gated(x, w, w, blocks=what)
            else:
                linear_group(x, [w] * n, [None] * n, blocks=what)
        torch.cuda.synchronize()
    except Exception as problem:  # noqa: BLE001  whoever needs the kernel meets it again
        return f"{kind} {what} {M}: {type(problem).__name__}: {str(problem)[:200]}"
    return None


def build_all(num_workers: int, parts: list[str]) -> None:
    """Compile in parallel what most of the time would be spent on."""
    jobs: dict[tuple, tuple[str, Any, Any]] = {}
    if "correct" in parts:
        for case in attention_cases(False):
            for n in (1, 5):
                jobs["attend", case, n] = ("attend", case, (n, None))
    if "attention" in parts:
        for cut in CUTS:
            for n in (1, 2):
                jobs["cut", cut, n] = ("attend", attention_cases(False)[0], (n, cut))
    if "linear" in parts:
        for M in ROW_COUNTS:
            padded = max(16, M)
            for blocks in list_blocks(M, False):
                for kind in ("one", "group"):
                    if kind == "one" or blocks.split_k == 1:
                        jobs[kind, blocks, padded if blocks.kind == "dot" else M] = (kind, blocks, M)
            for blocks in list_gated_blocks(M, False):
                jobs["gated", blocks, padded] = ("gated", blocks, M)
    if not jobs:
        return
    say(f"compiling {len(jobs)} kernels with {num_workers} processes")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        for problem in pool.map(build, jobs.values(), chunksize=1):
            if problem:
                say(problem)
    say("compiled")


def sweep(run: Callable[[Any, Blocks], Tensor], inputs: list, choices: list[Blocks], truth: Tensor) -> list[tuple]:
    """(us, blocks) of every way to cut that gives `truth` on the first input, fastest first."""
    found = []
    for blocks in choices:

        def once(blocks: Blocks = blocks) -> float:
            if (off := error(run(inputs[0], blocks), truth)) > 0.01:
                raise ValueError(f"error {off}")
            return microseconds([lambda given=given: run(given, blocks) for given in inputs], replays=3)

        took = attempt(once, f"{[tuple(x.shape) for x in inputs[0]]} {blocks}")
        if isinstance(took, float):
            found.append((took, blocks))
    return sorted(found)


def time_linear(report: Report, tiny: bool, deadline: float) -> None:
    """The sweep, against cuBLAS as called and with the rows padded, and against what `choose_blocks` says."""
    layers = [Layer("toy", 48, 64)] if tiny else LAYERS
    rows: list[list[Any]] = []
    for layer in layers:
        N, K = layer.N, layer.K
        weights = [random(N, K, scale=K**-0.5) for _ in range(num_copies(2 * N * K))]
        for M in [1, 4, 32] if tiny else ROW_COUNTS:
            x = random(M, K)
            if time.perf_counter() - BEGAN > deadline:
                say(f"out of time before {layer} M {M}")
                break
            found = sweep(
                lambda given, b: linear_small(x, *given, blocks=b),  # noqa: B023
                [(w,) for w in weights],
                list_blocks(M, tiny),
                F.linear(x, weights[0]),
            )
            took, blocks = found[0]
            plain = microseconds([lambda w=w: F.linear(x, w) for w in weights])  # noqa: B023
            padded = []
            for size in (8, 16):
                wide = random(max(M, size), K)
                padded.append(microseconds([lambda w=w: F.linear(wide, w) for w in weights]) if size > M else "-")  # noqa: B023
            default = microseconds([lambda w=w: linear_small(x, w) for w in weights])  # noqa: B023
            fma = min((t for t, b in found if b.kind == "fma"), default="-")
            second = f"{found[1][0]:.1f}: {tuple(found[1][1])}" if len(found) > 1 else "-"
            gbps = 2 * N * K / took / 1e3
            rows.append(
                [layer.name, N, K, M, took, gbps, default, fma, plain, *padded, plain / took, tuple(blocks), second]
            )
            report.data.setdefault("linear sweep", []).append({"N": N, "K": K, "M": M, "found": found})
        del weights
        free()
        say(f"linear {layer}")
    head = [
        "layer",
        "N",
        "K",
        "M",
        "ours",
        "GB/s",
        "default",
        "fma",
        "cuBLAS",
        "pad 8",
        "pad 16",
        "cuBLAS / ours",
        "blocks",
        "2nd",
    ]
    report.table("Linear: us", head, rows)

    rows = []
    sizes, (N, K) = ((32, 16, 16), (48, 64)) if tiny else (QKV, GATED)
    for M in [1, 4] if tiny else ROW_COUNTS:
        x = random(M, K)
        pairs = [[random(N, K, scale=K**-0.5) for _ in range(2)] for _ in range(num_copies(4 * N * K))]
        found = sweep(
            lambda p, b: linear_gated(x, *p, blocks=b),  # noqa: B023
            pairs,
            list_gated_blocks(M, tiny),
            F.silu(F.linear(x, pairs[0][0])) * F.linear(x, pairs[0][1]),
        )
        host = microseconds([lambda p=p: F.silu(F.linear(x, p[0])) * F.linear(x, p[1]) for p in pairs])  # noqa: B023
        two = microseconds([lambda p=p: gate(F.linear(x, p[0]), F.linear(x, p[1])) for p in pairs])  # noqa: B023
        second = f"{found[1][0]:.1f}: {tuple(found[1][1])}" if len(found) > 1 else "-"
        rows.append(["gated", M, found[0][0], 4 * N * K / found[0][0] / 1e3, host, two, tuple(found[0][1]), second])
        report.data.setdefault("gated sweep", []).append({"M": M, "found": found})
        del pairs
        free()
        triples = [[random(n, K, scale=K**-0.5) for n in sizes] for _ in range(num_copies(2 * sum(sizes) * K))]
        found = sweep(
            lambda p, b: linear_group(x, p, [None] * 3, blocks=b)[0],  # noqa: B023
            triples,
            [blocks for blocks in list_blocks(M, tiny) if blocks.split_k == 1],
            F.linear(x, triples[0][0]),
        )
        host = microseconds([lambda p=p: [F.linear(x, w) for w in p] for p in triples])  # noqa: B023
        second = f"{found[1][0]:.1f}: {tuple(found[1][1])}" if len(found) > 1 else "-"
        rows.append(
            ["q k v", M, found[0][0], 2 * sum(sizes) * K / found[0][0] / 1e3, host, "-", tuple(found[0][1]), second]
        )
        report.data.setdefault("group sweep", []).append({"M": M, "found": found})
        del triples
        free()
    head = ["what", "M", "ours", "GB/s", "host", "cuBLAS + gate kernel", "blocks", "2nd"]
    report.table("Linear layers fused: us", head, rows)


def time_defaults(report: Report, tiny: bool) -> None:
    """Layers of other models, cut as `choose_blocks` says, against cuBLAS."""
    rows: list[list[Any]] = []
    for layer in [Layer("toy", 48, 80)] if tiny else OTHER_LAYERS:
        N, K = layer.N, layer.K
        weights = [random(N, K, scale=K**-0.5) for _ in range(num_copies(2 * N * K, most=200))]
        for M in [4] if tiny else ROW_COUNTS:
            x = random(M, K)
            ours = microseconds([lambda w=w: linear_small(x, w) for w in weights])  # noqa: B023
            plain = microseconds([lambda w=w: F.linear(x, w) for w in weights])  # noqa: B023
            used = "ours" if is_worth_it(N, M) else "cuBLAS"
            rows.append([layer.name, N, K, M, ours, plain, plain / ours, used, tuple(choose_blocks(N, K, M))])
        del weights
        free()
    head = ["layer", "N", "K", "M", "ours", "cuBLAS", "cuBLAS / ours", "used", "blocks"]
    report.table("Linear layers of other models, by default: us", head, rows)

    rows = []
    for name, (N, K) in {"toy": (48, 80)}.items() if tiny else OTHER_GATED.items():
        pairs = [[random(N, K, scale=K**-0.5) for _ in range(2)] for _ in range(num_copies(4 * N * K, most=100))]
        for M in [4] if tiny else ROW_COUNTS:
            x = random(M, K)
            ours = microseconds([lambda p=p: linear_gated(x, *p) for p in pairs])  # noqa: B023
            two = microseconds([lambda p=p: gate(F.linear(x, p[0]), F.linear(x, p[1])) for p in pairs])  # noqa: B023
            rows.append([name, N, K, M, ours, two, two / ours, tuple(choose_gated_blocks(N, M))])
        del pairs
        free()
    head = ["model", "N", "K", "M", "ours", "cuBLAS + gate kernel", "that / ours", "blocks"]
    report.table("Gated pairs of other models, by default: us", head, rows)


# ---- experts ----


def time_experts(report: Report, tiny: bool, bandwidth: float) -> None:
    """One layer's experts of the GptOss-20b shape: ours, the host's grouped products, and its copies of weights."""
    H, width, E, each = (64, 96, 4, 2) if tiny else (2880, 2880, 32, 4)
    shape = {"hidden_size": H, "intermediate_size": width, "num_local_experts": E, "num_experts_per_tok": each}
    layers = []
    for _ in range(2 if ON_GPU else 1):  # 1.6 GB each
        with torch.device(DEVICE):
            layers.append(GptOssExperts(GptOssConfig(**shape)).to(DTYPE).requires_grad_(False))
        for parameter in layers[-1].parameters():
            parameter.normal_(std=0.02)
    rows: list[list[Any]] = []
    for M in [3] if tiny else [1, 4, 8, 32, 64, 128, 256]:
        x = random(M, H)
        chosen = torch.stack([torch.randperm(E, device=DEVICE)[:each] for _ in range(M)])
        weights = torch.full((M, each), 1 / each, device=DEVICE, dtype=DTYPE)

        def run(how: str, x=x, chosen=chosen, weights=weights) -> float | str:
            for layer in layers:
                layer.config._experts_implementation = how
            return attempt(lambda: microseconds([lambda e=e: e(x, chosen, weights) for e in layers]), how)

        copied = run("batched_mm") if M <= 32 else "-"
        grouped = run("grouped_mm")
        with fused(torch.nn.ModuleList(layers)) as swaps:
            is_ours = bool(swaps.experts)
            ours = run("grouped_mm")
        hit = len(chosen.unique())
        floor = hit * 3 * H * width * x.element_size() / bandwidth / 1e3
        rows.append([M, hit, ours if is_ours else "refused", grouped, copied, floor])
    head = ["tokens", "experts hit", "ours", "grouped_mm", "batched_mm", "to read their weights"]
    report.table("Experts of a GptOss-20b layer: us", head, rows)


# ---- norms, rotary, gate ----


def host_norm(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm.forward."""
    return rms_norm_eager(x, weight, eps=1e-5)


def host_gate(g: Tensor, u: Tensor) -> Tensor:
    """The middle of LlamaMLP.forward."""
    return F.silu(g) * u


def time_small(report: Report, tiny: bool, with_compiled: bool) -> None:
    """Each against the host's eager code, and compiled."""
    H, heads, kv_heads, D, width = (64, 4, 2, 16, 96) if tiny else (4096, 32, 8, 128, 14336)
    rows: list[list[Any]] = []
    for M in [4] if tiny else [4, 32, 256]:
        n = 4 if ON_GPU else 1
        x, w = random(M, H), random(H)
        q, k = random(M, 1, heads, D).transpose(1, 2), random(M, 1, kv_heads, D).transpose(1, 2)
        cos, sin = random(M, 1, D), random(M, 1, D)
        g, u = random(M, width), random(M, width)
        for name, ours, host, args in (
            ("rms_norm", lambda x, w: rms_norm(x, w, eps=1e-5), host_norm, (x, w)),
            ("rotary", apply_rotary, apply_rotary_pos_emb, (q, k, cos, sin)),
            ("silu * up", gate, host_gate, (g, u)),
            ("add", None, torch.add, (x, x)),
        ):
            row: list[Any] = [name, M]
            for function in (ours, host):
                row.append(microseconds([lambda f=function, a=args: f(*a)] * n) if function else "-")
            if with_compiled and ours and M == 4:
                compiled = torch.compile(host, dynamic=False)
                row.append(
                    attempt(lambda c=compiled, a=args, n=n: microseconds([lambda: c(*a)] * n), f"compiled {name}")
                )
            else:
                row.append("-")
            rows.append(row)
    title = "Norm, rotary, gate (in L2), with compiled: us" if with_compiled else "Norm, rotary, gate (in L2): us"
    report.table(title, ["what", "rows", "ours", "host eager", "torch.compile"], rows)


# ---- a stack of layers ----


class Rows:
    """A static cache, and the attention that reads it, for a model that is captured."""

    attend: Callable = staticmethod(attend_rows)
    write: Callable = staticmethod(write_rows)
    start: Tensor | None = None


class StaticRows(RowCache):
    """A cache of rows whose new tokens are written by `Rows.write`."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """As the host's."""
        layer = self.layers[layer_idx]
        Rows.write(layer.keys, layer.values, key_states, value_states, Rows.start)
        return layer.keys.transpose(1, 2), layer.values.transpose(1, 2)


def attention_of_rows(
    module: torch.nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  none is built
    scaling: float,
    **kwargs: Any,  # noqa: ARG001  the host's
) -> tuple[Tensor, None]:
    """As the host calls attention; `key` and `value` are the whole cache, [B, H_kv, L, D]."""
    out = Rows.attend(query, key.transpose(1, 2), value.transpose(1, 2), Rows.start, scaling=scaling)
    return out, None


@contextlib.contextmanager
def as_stock(model: torch.nn.Module) -> Iterator[None]:  # noqa: ARG001  in the place of `fused`
    """Nothing replaced."""
    yield


def time_stack(report: Report, tiny: bool, bandwidth: float) -> None:
    """Layers of the 8B shape with a cache of rows: stock and fused, as a CUDA graph."""
    AttentionInterface.register("bench_rows", attention_of_rows)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    num_layers, vocabulary = (2, 96) if tiny else (8, 128256)
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=num_layers,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        attn_implementation="bench_rows",
    )
    with torch.device(DEVICE), transformers.initialization.no_init_weights():
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.data.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.data.normal_(0, 1.0 if "embed" in name else weight.shape[1] ** -0.5, generator=generator)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.compute_default_rope_parameters(config)[0].to(DEVICE)

    layer_bytes = 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    head_bytes = 2 * model.lm_head.weight.numel()
    floor = (32 * layer_bytes + head_bytes) / bandwidth / 1e6  # ms
    context, capacity = (20, 32) if tiny else (640, 2048)
    rows: list[list[Any]] = []
    ways: list[tuple[str, Callable, Callable, Callable]] = [
        ("stock, flash", flash_rows, write_rows_eager, as_stock),
        ("stock, our attention", attend_rows, write_rows_eager, as_stock),
        ("fused", attend_rows, write_rows, fused),
    ]
    if not ON_GPU:
        ways = ways[1:]
    for B in [2] if tiny else [1, 8, 64]:
        for T in [4] if tiny else [1, 4]:
            row: list[Any] = [B, T]
            wanted: Tensor | None = None
            for name, *way in ways:
                result = attempt(
                    lambda way=way, B=B, T=T: run_stack(model, way, B, T, context, capacity),
                    f"{name} {row[:2]}",
                )
                if isinstance(result, str):
                    row += [result, "-"]
                    continue
                total, logits = result
                wanted = logits if wanted is None else wanted
                row += [total, f"{error(logits, wanted):.1e}"]
                if T == 4 and name != "stock, flash":
                    say(f"stack B {B} T {T} {name}: {total:.2f} ms")
            kv_floor = 32 * 2 * 2 * B * context * config.num_key_value_heads * config.head_dim / bandwidth / 1e6
            rows.append([*row, floor + kv_floor])
            free()
    head = ["B", "T"]
    for name, *_ in ways:
        head += [f"{name}", f"{name}: error"]
    cells = [[f"{x:.2f}" if isinstance(x, float) else x for x in row] for row in rows]
    report.table(
        f"32 layers and head of the 8B shape, context {context}, from stacks of {num_layers} and {num_layers // 2}: ms "
        "(errors: relative, against the first)",
        [*head, "floor"],
        cells,
    )


@torch.no_grad()
def run_stack(
    model: LlamaForCausalLM, way: list[Callable], B: int, T: int, context: int, capacity: int
) -> tuple[float, Tensor]:
    """Ms of a forward with 32 layers, by extrapolation, and the logits of the stack as it is."""
    layers = model.model.layers
    num_layers = len(layers)
    generator = torch.Generator(DEVICE).manual_seed(1)
    attend, write, change = way
    cache = StaticRows(num_layers, capacity)
    kv = (B, model.config.num_key_value_heads, 1, model.config.head_dim)
    for layer in cache.layers:
        like = torch.empty(kv, dtype=DTYPE, device=DEVICE)
        layer.lazy_initialization(like, like)
        for x in (layer.keys, layer.values):
            x.normal_(generator=generator)
    ids = torch.randint(0, model.config.vocab_size, (B, T), generator=generator, device=DEVICE)
    Rows.start = torch.full((B,), context - T, device=DEVICE)
    if attend is flash_rows:
        attend = functools.partial(flash_rows, used=(Rows.start + T).int())
    Rows.attend, Rows.write = staticmethod(attend), staticmethod(write)
    slots = Rows.start[:, None] + torch.arange(T, device=DEVICE)
    logits: list[Tensor] = []

    def forward() -> None:
        logits[:] = [model(input_ids=ids, position_ids=slots, use_cache=True, **{CACHE_NAME: cache}).logits]

    times = {}
    with change(model):
        for n in (num_layers // 2, num_layers):
            model.config.num_hidden_layers = n
            try:
                times[n] = microseconds([forward], replays=9) / 1000
            finally:
                model.config.num_hidden_layers = num_layers
    layer_ms = (times[num_layers] - times[num_layers // 2]) / (num_layers - num_layers // 2)
    return times[num_layers] + (32 - num_layers) * layer_ms, logits[0].clone()


# ---- all of it ----


def attempt(run: Callable[[], Any], what: str) -> Any:
    """The result, or the reason why there is none: one configuration that fails must not cost the others."""
    try:
        return run()
    except Exception as problem:  # noqa: BLE001  any
        say(f"{what}: {type(problem).__name__}: {str(problem)[:300]}")
        if ON_GPU:
            torch.cuda.synchronize()
        return type(problem).__name__


def free() -> None:
    """Give memory back between parts."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def measure_bandwidth() -> float:
    """GB/s that a large read reaches."""
    if not ON_GPU:
        return 1.0
    x = torch.ones(2**30, dtype=torch.float32, device=DEVICE)
    took = microseconds([lambda: x.sum(), lambda: x.sum()])
    return 4 * x.numel() / took / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for kernels.md and kernels.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--sweep-until", type=float, default=170, help="seconds after which the linear sweep stops")
    args = parser.parse_args()
    torch.manual_seed(0)
    report = Report()
    gc.disable()  # collected between parts, not in the middle of a capture
    if ON_GPU and not args.tiny:
        build_all(args.workers, args.only)
    bandwidth = measure_bandwidth()
    name = torch.cuda.get_device_name() if ON_GPU else platform.processor() or "CPU"
    triton = __import__("triton").__version__
    report.add(
        f"{name}, Python {platform.python_version()}, torch {torch.__version__}, Triton {triton}, transformers "
        f"{transformers.__version__}, {DTYPE}. Read bandwidth {bandwidth:.0f} GB/s."
    )
    parts: dict[str, Callable[[], Any]] = {
        "correct": lambda: check(report, args.tiny),
        "attention": lambda: time_attention(report, args.tiny),
        "small": lambda: time_small(report, args.tiny, with_compiled=False),
        "linear": lambda: time_linear(report, args.tiny, args.sweep_until),
        "default": lambda: time_defaults(report, args.tiny),
        "experts": lambda: time_experts(report, args.tiny, bandwidth),
        "stack": lambda: time_stack(report, args.tiny, bandwidth),
        "compiled": lambda: time_small(report, args.tiny, with_compiled=True),
    }
    is_right = True
    for part, run in parts.items():
        if part not in args.only or (part == "compiled" and not ON_GPU):
            continue
        say(part)
        result = attempt(run, part)
        is_right &= result is not False and not isinstance(result, str)
        free()
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "kernels.md").write_text("\n".join(report.lines) + "\n")
            (args.out / "kernels.json").write_text(json.dumps(report.data, default=str))
    say("done")
    print("\n".join(report.lines))
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
