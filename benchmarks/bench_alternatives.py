"""Our attention and our fusion against what else there is. One CUDA GPU, about a minute and a half.

python benchmarks/bench_alternatives.py --out OUT [--only attention fusion]

A way that is not installed, does not run or takes too long says so in its row; the others go on. `--tiny` runs on toy
sizes, also on a CPU, where most ways need a GPU and times mean nothing.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib.util
import inspect
import json
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers
from bench_kernels import (
    DEVICE,
    DTYPE,
    ON_GPU,
    Rows,
    StaticRows,
    attend_low,
    attention_of_rows,
    capture_stream,
    error,
    flash_rows,
    free,
    make_caches,
    measure_bandwidth,
    random,
    sdpa_rows,
)
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, LlamaConfig
from transformers.models.llama import modeling_llama

from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.kernels import language
from hf_eagle3.kernels.attention import attend_rows, attend_rows_eager, write_rows, write_rows_eager
from hf_eagle3.kernels.fusion import fused

PARTS = ["attention", "fusion"]
BEGAN = time.perf_counter()
TURNS = 9
LONGEST = 30.0  # seconds for one way at one size
BOTH = "liger-kernel, and compiled layer by layer"
COMPILED = {"FlexAttention, compiled", "torch.compile, layer by layer", BOTH}
HAS_KERNELS = language.is_available(DEVICE)


class UnavailableError(Exception):
    """Why a way cannot be measured here."""


class Timed(NamedTuple):
    """Microseconds of one call, over the turns."""

    median: float
    fastest: float
    slowest: float


class Ready(NamedTuple):
    """A way that is right, and can be timed."""

    run: Callable[[], Any]
    how: str  # graph, direct, or why there is no graph
    error: float
    set_up: float = 0.0  # seconds


class Report:
    """Rows as they come: printed, and kept for the files."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.lines: list[str] = []
        self.data: dict[str, Any] = {}

    def section(self, title: str, note: str, head: Sequence[str]) -> None:
        """Begin a table."""
        self.say(f"\n## {title}\n\n{note}\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        self.title, self.head = title, list(head)
        self.data[title] = []

    def row(self, *cells: object, **more: Any) -> None:
        """A row of the table last begun, and numbers that go to the JSON only."""
        shown = [str(cell).replace("|", "/").replace("\n", " ") for cell in cells]
        self.say("| " + " | ".join(shown) + " |")
        self.data[self.title].append(dict(zip(self.head, shown, strict=True)) | more)

    def say(self, text: str) -> None:
        """Text between tables."""
        self.lines.append(text)
        print(text, flush=True)
        if self.out is not None:  # each time, so that what was measured is kept
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "alternatives.md").write_text("\n".join(self.lines) + "\n")
            (self.out / "alternatives.json").write_text(json.dumps(self.data, indent=1, default=str))


# ---- time ----


@contextlib.contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Stop what runs inside after `seconds`, with a TimeoutError."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    if seconds < 1:
        raise TimeoutError("no time left: raise --seconds")
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def capture(calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], str]:
    """What runs all of `calls`, as a CUDA graph where that works, and how it runs them."""

    def run() -> None:
        for call in calls:
            call()

    if not ON_GPU:
        run()
        return run, "direct"
    torch.cuda.synchronize()
    with torch.cuda.stream(capture_stream()):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        except RuntimeError as problem:
            synchronize()
            return run, f"no graph: {explain(problem)}"

    def replay(kept: object = calls) -> None:  # noqa: ARG001  what the graph reads lives as long as it
        graph.replay()

    torch.cuda.synchronize()
    replay()
    torch.cuda.synchronize()
    return replay, "graph"


def time_in_turn(ready: dict[str, Ready], num_calls: int) -> dict[str, Timed]:
    """Microseconds of one of the `num_calls` calls of each way, all ways taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(TURNS):
        for name, (run, *_) in ready.items():
            if ON_GPU:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                stop.record()
                torch.cuda.synchronize()
                took = 1e3 * start.elapsed_time(stop)
            else:
                began = time.perf_counter()
                run()
                took = 1e6 * (time.perf_counter() - began)
            times[name].append(took / num_calls)
    return {name: Timed(statistics.median(t), min(t), max(t)) for name, t in times.items()}


def explain(problem: BaseException) -> str:
    """The reason in a line, for a row."""
    if isinstance(problem, UnavailableError):
        return str(problem)
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:200]}" if text else type(problem).__name__


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def attempt(run: Callable[[], Any]) -> Any:
    """The result, or in words why there is none: a way that fails must not cost the others."""
    try:
        return run()
    except Exception as problem:  # noqa: BLE001  any
        reason = explain(problem)
    with contextlib.suppress(RuntimeError):  # of a kernel that failed: the next way says so too, if it matters there
        synchronize()
    return reason


def prepare_all(
    ways: dict[str, Any], prepare: Callable[[Any], Ready], *, until: float
) -> tuple[dict[str, Ready], dict[str, str]]:
    """What can be timed, and why the others cannot. Ways that compile get what is left of the time."""
    ready, failed = {}, {}
    for name, way in ways.items():
        seconds = min(until - time.perf_counter(), LONGEST) if name in COMPILED else LONGEST

        def run(way: Any = way, seconds: float = seconds) -> Ready:
            with time_box(seconds):
                return prepare(way)

        result = attempt(run)
        if isinstance(result, str):
            failed[name] = result
        else:
            ready[name] = result
    return ready, failed


def need(name: str) -> ModuleType:
    """An optional package's module."""
    if not ON_GPU:
        raise UnavailableError("needs a GPU")
    if importlib.util.find_spec(name.split(".")[0]) is None:
        raise UnavailableError("not installed")
    return importlib.import_module(name)


# ---- attention ----

Attend = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # query [B, H, T, D], keys and values [B, L, H_kv, D] -> [B, T, H, D]
MakeAttend = Callable[[Tensor, int, int, float], Attend]  # start [B], T, L, scaling


def make_ours(start: Tensor, T: int, L: int, scaling: float) -> Attend:  # noqa: ARG001
    """Our kernel."""
    if not HAS_KERNELS:
        raise UnavailableError("needs a GPU")
    return lambda q, k, v: attend_rows(q, k, v, start, scaling=scaling)


def make_sdpa(start: Tensor, T: int, L: int, scaling: float) -> Attend:  # noqa: ARG001
    """What the host's sdpa does with a mask."""
    return lambda q, k, v: sdpa_rows(q, k, v, start, scaling=scaling)


def make_aten(start: Tensor, T: int, L: int, scaling: float) -> Attend:  # noqa: ARG001
    """ATen's variable-length flash attention."""
    if not ON_GPU:
        raise UnavailableError("needs a GPU")
    used = (start + T).int()
    return lambda q, k, v: flash_rows(q, k, v, start, scaling=scaling, used=used)


def make_varlen(start: Tensor, T: int, L: int, scaling: float) -> Attend:
    """The public call of torch over the same."""
    if not ON_GPU:
        raise UnavailableError("needs a GPU")
    varlen_attn = getattr(need("torch.nn.attention.varlen"), "varlen_attn")  # noqa: B009  not in older releases
    taken = inspect.signature(varlen_attn).parameters
    if "seqused_k" not in taken:
        raise UnavailableError(f"torch {torch.__version__} has no seqused_k there")
    B = len(start)
    used = (start + T).int()
    bounds = [torch.arange(0, B * n + 1, n, dtype=torch.int32, device=DEVICE) for n in (T, L)]
    options: dict[str, Any] = {"scale": scaling, "seqused_k": used}
    options |= {"window_size": (-1, 0)} if "window_size" in taken else {"is_causal": True}
    if "enable_gqa" in taken:
        options["enable_gqa"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q.transpose(1, 2), k, v)]
        return varlen_attn(*flat, *bounds, T, L, **options).view(B, T, q.shape[1], -1)

    return attend


def make_kvcache(module: str, start: Tensor, T: int, L: int, scaling: float) -> Attend:  # noqa: ARG001
    """flash-attn's call for decoding, which packs query heads that share a KV head."""
    call = need(module).flash_attn_with_kvcache
    used = (start + T).int()
    return lambda q, k, v: call(q.transpose(1, 2), k, v, cache_seqlens=used, softmax_scale=scaling, causal=True)


def make_paged(start: Tensor, T: int, L: int, scaling: float) -> Attend:
    """flash-attn 3 over pages of 16 slots, by the call and in the copy that vLLM brings."""
    call = need("vllm.vllm_flash_attn").flash_attn_varlen_func
    B, page = len(start), 16
    rows = {"max_seqlen_q": T, "cu_seqlens_q": torch.arange(0, B * T + 1, T, dtype=torch.int32, device=DEVICE)}
    pages = torch.arange(B * L // page, dtype=torch.int32, device=DEVICE).view(B, -1)
    slots = {"max_seqlen_k": L, "seqused_k": (start + T).int(), "block_table": pages}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = q.transpose(1, 2).reshape(B * T, q.shape[1], -1)
        keys, values = (x.view(-1, page, *x.shape[2:]) for x in (k, v))
        out = call(flat, keys, values, **rows, **slots, softmax_scale=scaling, causal=True, fa_version=3)
        return out.view(B, T, q.shape[1], -1)

    return attend


def make_flex(start: Tensor, T: int, L: int, scaling: float, *, is_compiled: bool = True) -> Attend:
    """FlexAttention, with a block mask by row lengths that is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if is_compiled and not ON_GPU:
        raise UnavailableError("needs a GPU")

    def is_visible(b: Tensor, _h: Tensor, t: Tensor, slot: Tensor) -> Tensor:
        return slot <= start[b] + t

    torch._dynamo.reset()  # so that no limit on recompiling is met
    mask = create_block_mask(is_visible, len(start), None, T, L, device=DEVICE)
    attend = torch.compile(flex_attention, dynamic=False) if is_compiled else flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        out: Any = attend(q, keys, values, block_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    return run


ATTENTIONS: dict[str, MakeAttend] = {
    "ours": make_ours,
    "flash-attn 2, with KV cache": functools.partial(make_kvcache, "flash_attn"),
    "flash-attn 3, with KV cache": functools.partial(make_kvcache, "flash_attn_interface"),
    "flash-attn 3, paged, of vLLM": make_paged,
    "torch varlen_attn": make_varlen,
    "aten flash, seqused_k": make_aten,
    "sdpa with a mask": make_sdpa,
    "FlexAttention, compiled": make_flex,
}


def time_attention(report: Report, *, is_tiny: bool, until: float) -> None:
    """4 tokens a row over rows of lengths of their own."""
    H, H_kv, D, T = (8, 2, 32, 4) if is_tiny else (32, 8, 128, 4)
    sizes = [(1, 40), (3, 40)] if is_tiny else [(B, S) for S in (640, 8192) for B in (1, 8, 64)]
    ways = dict(ATTENTIONS)
    if not ON_GPU:
        ways["FlexAttention, eager"] = functools.partial(make_flex, is_compiled=False)
    report.section(
        f"Attention, {H} query heads, {H_kv} KV heads, D {D}, {T} tokens a row",
        "Rows of lengths from half of S up to S; one call, caches not in L2. First each is compared with float64: its "
        "relative error, and twice that of eager attention in its own dtype, which it may have. FlexAttention's block "
        "mask is made beforehand, and is not in its time.",
        ["B", "S", "way", "us, median (fastest to slowest)", "ours is faster by", "error (allowed)", "runs as"],
    )
    for B, S in sizes:
        time_attention_of(report, ways, (B, S, H, H_kv, D, T), until=until)
        free()


def time_attention_of(
    report: Report, ways: dict[str, MakeAttend], size: tuple[int, int, int, int, int, int], *, until: float
) -> None:
    """One size: (B, S, H, H_kv, D, T)."""
    B, S, H, H_kv, D, T = size
    L, scaling = S + 64, D**-0.5
    caches = make_caches(B, L, H_kv, D)
    query = random(B, T, H, D).transpose(1, 2)
    start = torch.linspace(S // 2, S - T, B, device=DEVICE).long() if B > 1 else torch.tensor([S - T], device=DEVICE)
    first = slice(0, 8)  # rows stand alone, so a few of them tell
    few = [x[first] for x in (query, *caches[0], start)]
    truth = attend_rows_eager(*[x.double() if x.is_floating_point() else x for x in few], scaling=scaling)
    allowed = 2 * error(attend_low(*few, scaling=scaling), truth) + 1e-7

    def prepare(make: MakeAttend) -> Ready:
        attend = make(start, T, L, scaling)
        off = error(attend(query, *caches[0])[first], truth)
        if off > allowed:
            raise ValueError(f"error {off:.1e}, allowed {allowed:.1e}")
        run, how = capture([functools.partial(attend, query, *cache) for cache in caches])
        return Ready(run, how, off)

    ready, failed = prepare_all(ways, prepare, until=until)
    times = time_in_turn(ready, len(caches))
    for name in ways:
        if name in failed:
            report.row(B, S, name, "-", "-", "-", failed[name])
            continue
        took = times[name]
        ours = f"{took.median / times['ours'].median:.2f}x" if "ours" in times else "-"
        cell = f"{took.median:.1f} ({took.fastest:.1f} to {took.slowest:.1f})"
        off = f"{ready[name].error:.1e} ({allowed:.1e})"
        report.row(B, S, name, cell, ours, off, ready[name].how, us=took._asdict())


# ---- fusion ----


def make_layers(*, is_tiny: bool) -> nn.Module:
    """Eight decoder layers of the 8B shape with random weights, attending by row lengths."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if is_tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    AttentionInterface.register("alternatives_rows", attention_of_rows)
    config = LlamaConfig(
        **sizes, num_hidden_layers=2 if is_tiny else 8, vocab_size=96, attn_implementation="alternatives_rows"
    )
    with DEVICE:
        model = AutoModel.from_config(config, dtype=DTYPE).eval()
    generator = torch.Generator(DEVICE).manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.uniform_(0.5, 1.5, generator=generator)
    return model


@contextlib.contextmanager
def as_stock(model: nn.Module) -> Iterator[nn.Module]:
    """The host's layers as they are."""
    yield model


@contextlib.contextmanager
def as_fused(model: nn.Module) -> Iterator[nn.Module]:
    """Our kernels in their place."""
    if not HAS_KERNELS:
        raise UnavailableError("needs a GPU")
    with fused(model):
        yield model


@contextlib.contextmanager
def as_liger(model: nn.Module) -> Iterator[nn.Module]:
    """liger-kernel's RMSNorm, rotary embedding and SwiGLU, in a copy; what it replaces in the host's module is put back."""
    patch = need("liger_kernel.transformers").apply_liger_kernel_to_llama
    before = dict(vars(modeling_llama))
    changed = copy.deepcopy(model)
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    try:
        patch(rope=True, rms_norm=True, swiglu=True, **off, model=changed)
        yield changed
    finally:
        vars(modeling_llama).update(before)


@contextlib.contextmanager
def as_compiled(model: nn.Module) -> Iterator[nn.Module]:
    """Each layer compiled, in a copy."""
    if not ON_GPU:
        raise UnavailableError("needs a GPU")
    config: Any = torch._dynamo.config
    torch._dynamo.reset()
    config.recompile_limit = 256  # every layer has an index of its own
    if hasattr(config, "fail_on_recompile_limit_hit"):
        config.fail_on_recompile_limit_hit = True
    changed = copy.deepcopy(model)
    for layer in changed.layers:  # type: ignore[union-attr]  # Llama's
        layer.compile(dynamic=False)
    yield changed


@contextlib.contextmanager
def as_both(model: nn.Module) -> Iterator[nn.Module]:
    """liger-kernel's parts, and each layer compiled around them."""
    with as_liger(model) as changed, as_compiled(changed) as compiled:
        yield compiled


FUSIONS: dict[str, Callable] = {
    "stock": as_stock,
    "ours": as_fused,
    "liger-kernel": as_liger,
    "torch.compile, layer by layer": as_compiled,
    BOTH: as_both,
}


@torch.no_grad()
def time_fusion(report: Report, *, is_tiny: bool, until: float, bandwidth: float) -> None:
    """4 tokens a row through eight layers."""
    model = make_layers(is_tiny=is_tiny)
    config, T = model.config, 4
    S, capacity = (20, 32) if is_tiny else (640, 1024)
    attend, write = (attend_rows, write_rows) if HAS_KERNELS else (attend_rows_eager, write_rows_eager)
    # Opaque to the compiler, which would otherwise try to trace kernels and cache.
    Rows.attend, Rows.write = (staticmethod(torch.compiler.disable(f)) for f in (attend, write))
    num_layers = config.num_hidden_layers
    layer_bytes = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    report.section(
        f"{num_layers} decoder layers, {T} tokens a row, context {S}",
        "All with our attention. Floor: weights, keys and values read once at the bandwidth above. Set-up: the first "
        "forward, with whatever is compiled in it. Difference: relative, of the hidden states from those of stock layers.",
        [
            "B",
            "way",
            "ms, median (fastest to slowest)",
            "stock over it",
            "floor, ms",
            "set-up, s",
            "difference",
            "runs as",
        ],
    )
    sizes = [2] if is_tiny else [1, 8, 64]
    for B in sizes:
        time_fusion_of(report, model, B, S, capacity, floor_of_layers=layer_bytes, bandwidth=bandwidth, until=until)
        free()


def time_fusion_of(
    report: Report,
    model: Any,  # the host's
    B: int,
    S: int,
    capacity: int,
    *,
    floor_of_layers: int,
    bandwidth: float,
    until: float,
) -> None:
    """One number of rows."""
    config, T = model.config, 4
    cache = StaticRows(config.num_hidden_layers, capacity)
    generator = torch.Generator(DEVICE).manual_seed(1)
    head_dim = config.hidden_size // config.num_attention_heads
    like = torch.empty(B, config.num_key_value_heads, 1, head_dim, dtype=DTYPE, device=DEVICE)
    for layer in cache.layers:
        layer.lazy_initialization(like, like)
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
    Rows.start = torch.full((B,), S - T, device=DEVICE)
    states = torch.randn(B, T, config.hidden_size, generator=generator, device=DEVICE).to(DTYPE)
    slots = Rows.start[:, None] + torch.arange(T, device=DEVICE)
    wanted: list[Tensor] = []

    def prepare(change: Callable) -> Ready:
        with change(model) as changed:

            def forward() -> Tensor:
                out = changed(inputs_embeds=states, position_ids=slots, use_cache=True, **{CACHE_NAME: cache})
                return out.last_hidden_state

            began = time.perf_counter()
            out = forward().clone()
            synchronize()
            set_up = time.perf_counter() - began
            wanted.append(out)
            run, how = capture([forward])
            if ON_GPU and how != "graph":  # run later, it would run without what was changed
                raise UnavailableError(how)
            return Ready(run, how, error(out, wanted[0]), set_up)

    ready, failed = prepare_all(FUSIONS, prepare, until=until)
    times = time_in_turn(ready, 1)
    kv_bytes = 2 * like.numel() * like.element_size() * S * config.num_hidden_layers
    floor = (floor_of_layers + kv_bytes) / bandwidth / 1e6
    for name in FUSIONS:
        if name in failed:
            report.row(B, name, "-", "-", "-", "-", "-", failed[name])
            continue
        took, (_, how, off, set_up) = times[name], ready[name]
        cell = f"{took.median / 1e3:.2f} ({took.fastest / 1e3:.2f} to {took.slowest / 1e3:.2f})"
        ratio = f"{times['stock'].median / took.median:.2f}x" if "stock" in times else "-"
        report.row(B, name, cell, ratio, f"{floor:.2f}", f"{set_up:.1f}", f"{off:.1e}", how, us=took._asdict())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for alternatives.md and alternatives.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=90, help="after which nothing new is begun")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not ON_GPU and not args.tiny:
        parser.error("there is no CUDA GPU; --tiny runs without, to see that it runs")
    torch.manual_seed(0)
    gc.disable()  # collected between sizes, not in the middle of a capture
    report = Report(args.out)
    bandwidth = measure_bandwidth()
    name = torch.cuda.get_device_name() if ON_GPU else platform.machine() + " CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for package in ("triton", "flash_attn", "flash_attn_interface", "liger_kernel"):
        found = importlib.util.find_spec(package) is not None
        versions[package] = getattr(importlib.import_module(package), "__version__", "installed") if found else "-"
    report.data["machine"] = {"device": name, "Python": platform.python_version(), "dtype": str(DTYPE), **versions}
    report.data["machine"]["read bandwidth, GB/s"] = bandwidth
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    report.say(
        f"# Attention and fusion, ours and others\n\n{name}, Python {platform.python_version()}, {listed}; "
        f"{str(DTYPE)[6:]}. Read bandwidth {bandwidth:.0f} GB/s. Median of {TURNS} turns, all ways taking turns.\n\n"
        f"`python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}`"
    )
    middle = BEGAN + args.seconds * (0.55 if "fusion" in args.only else 1.0)
    parts: dict[str, Callable[[], None]] = {
        "attention": lambda: time_attention(report, is_tiny=args.tiny, until=middle),
        "fusion": lambda: time_fusion(report, is_tiny=args.tiny, until=BEGAN + args.seconds, bandwidth=bandwidth),
    }
    failed = False
    for part in args.only:
        if isinstance(reason := attempt(parts[part]), str):
            report.say(f"\n{part} ended early: {reason}")
            failed = True
        free()
    report.say(f"\n{time.perf_counter() - BEGAN:.0f} s in all.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
