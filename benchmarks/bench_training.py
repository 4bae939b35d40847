"""Training speed and memory of the 8B shape: one TTT step with the frozen target in the loop.

    python benchmarks/bench_training.py --output results/training_h100.json

Random weights, AdamW, float32 masters under bf16 autocast. The peer's figures beside ours are quoted from a run of its
own step on one H100 (SpecForge 0.2, flex attention, bf16 weights, target by sdpa). With `--peer` it is measured in turn
with ours, on the same device (`peer_training.py`).
"""

import argparse
import gc
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from peer_training import Peer
from transformers import GptOssConfig, LlamaConfig, LlamaForCausalLM

from hf_eagle3.training.forecast import STATE_BYTES, DrafterShape, activation_bytes, borrowed_bytes
from hf_eagle3.training.new_drafter import new_drafter
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.states.stored_target import StoredTarget
from hf_eagle3.training.step.batch import Batch, Collator, States
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary, TargetHead
from hf_eagle3.training.step.ttt import ttt
from hf_eagle3.training.step.unroll_rows import unroll_rows

SHAPE_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TINY = {**SHAPE_8B, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STEPS = 4  # timed together
# Memory from states in memory, at these lengths: config of the target, fields of the drafter (arXiv:2503.01840; SpecForge).
BUDGET = {
    "Llama-3.1-8B": (LlamaConfig, SHAPE_8B, {}),
    "gpt-oss-120b": (
        GptOssConfig,
        {"vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "head_dim": 64},
        {"intermediate_size": 17280},
    ),
}
LENGTHS = (4096, 8192, 16384, 32768)
# TTT steps, documents, tokens each, share of them supervised -> the peer's tokens a second, of all and drafter only.
WORK = {
    "TTT 4, 1 x 4096": (4, 1, 4096, 1.0, 17824, 42465, 25.3),
    "TTT 7, 2 x 2048": (7, 2, 2048, 1.0, 13523, 23574, 32.3),
    "TTT 7, 2 x 2048, a quarter supervised": (7, 2, 2048, 0.25, None, None, None),
}


def make_batch(steps: int, documents: int, length: int, share: float, vocab_size: int, device: str) -> Batch:
    """Random documents, of which the last `share` of tokens are the target's."""
    rng = np.random.default_rng(0)
    prompt = max(1, round(length * (1 - share)))
    rows = [
        {"input_ids": rng.integers(2, vocab_size, length), "loss_mask": np.arange(length) >= prompt}
        for _ in range(documents)
    ]
    return Collator(steps)(rows).to(device)


def num_bytes(drafter, optimizer) -> int:
    """What we keep on the device between steps, without the target."""
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in [*drafter.parameters(), *moments])


def measure(
    name: str, source: OnlineStates, drafter, optimizer, vocabulary, vocab_size: int, repeats: int, make_peer=None
) -> dict:
    """Times of whole steps, and of their parts, medians in ms; of ours and, if it is there, the peer's, in turn."""
    steps, documents, length, share, peer, peer_drafter, peer_memory = WORK[name]
    device = vocabulary.to_draft.device.type
    if device == "cpu":
        length = 48
    batch = make_batch(steps, documents, length, share, vocab_size, device)
    depth = batch.depth.cpu()
    scale = torch.tensor([0.8**t / max(1, int((depth > t).sum())) for t in range(steps)], device=device)
    method = Method(LOSSES["forward_kl"], scale, torch.zeros_like(scale))
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def learn(states: States) -> None:
        with torch.autocast(device, torch.bfloat16):
            loss, _ = ttt(drafter, batch, states, source.head, vocabulary, method)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    def timed(function):
        sync()
        began = time.perf_counter()
        out = function()
        sync()
        return (time.perf_counter() - began) * 1e3, out

    ours = [lambda: source.states(batch), learn]
    kinds = {"ours": ours}
    if make_peer is not None:
        peer_model = make_peer(steps)
        ids = batch.input_ids.reshape(documents, -1)  # equally long, without gaps
        mask = torch.ones_like(ids)
        kinds["peer"] = [lambda: peer_model.states(ids), lambda states: peer_model.learn(ids, mask, *states)]

    began = time.perf_counter()
    for get_states, teach in kinds.values():
        for _ in range(2):
            teach(get_states())
    sync()
    warm_up = time.perf_counter() - began
    resident = {"ours": num_bytes(drafter, optimizer)} | ({"peer": peer_model.num_bytes()} if make_peer else {})
    whole: dict[str, list[float]] = {kind: [] for kind in kinds}
    target: dict[str, list[float]] = {kind: [] for kind in kinds}
    alone: dict[str, list[float]] = {kind: [] for kind in kinds}
    peak = {}
    for _ in range(repeats):  # as in training, the host looks at nothing between steps
        for kind, (get_states, teach) in kinds.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            whole[kind].append(timed(lambda: [teach(get_states()) for _ in range(STEPS)])[0] / STEPS)  # noqa: B023  called at once
            if device == "cuda":
                others = sum(resident.values()) - resident[kind]
                peak[kind] = (torch.cuda.max_memory_allocated() - others) / 2**30
    for _ in range(repeats):
        for kind, (get_states, teach) in kinds.items():
            spent, states = timed(get_states)
            target[kind].append(spent)
            alone[kind].append(timed(lambda: teach(states))[0])  # noqa: B023  called at once
            states = None  # not beside those of the other
    tokens = documents * length
    if make_peer is not None:
        kinds, peer_model = {}, None
        gc.collect()

    def account(kind: str) -> dict:
        median = statistics.median(whole[kind])
        return {
            "step_ms": median,
            "step_ms_min_max": [min(whole[kind]), max(whole[kind])],
            "target_ms": statistics.median(target[kind]),
            "drafter_ms": statistics.median(alone[kind]),
            "tokens_per_second": tokens / median * 1e3,
            "drafter_tokens_per_second": tokens / statistics.median(alone[kind]) * 1e3,
            "peak_gib": peak.get(kind, float("nan")),
        }

    row = {"work": name, **account("ours"), "warm_up_s": warm_up}
    if make_peer is not None:
        row["peer"] = account("peer")
        row["ratio_here"] = row["tokens_per_second"] / row["peer"]["tokens_per_second"]
    return row | {
        "peer_tokens_per_second": peer,
        "peer_drafter_tokens_per_second": peer_drafter,
        "peer_peak_gib": peer_memory,
        "ratio": row["tokens_per_second"] / peer if peer else None,
    }


def measure_stored(
    head, drafter, optimizer, vocabulary, aux_width: int, vocab_size: int, length: int, steps: int
) -> dict:
    """One step over a single document, from hidden states that are there already."""
    device = vocabulary.to_draft.device.type
    batch = make_batch(steps, 1, length, 1.0, vocab_size, device)
    H = head.weight.shape[1]
    states = States(
        torch.randn(length, aux_width, device=device, dtype=torch.bfloat16),
        torch.randn(length, H, device=device, dtype=torch.bfloat16),
    )
    scale = torch.full((steps,), 1 / length, device=device)
    method = Method(LOSSES["forward_kl"], scale, torch.zeros_like(scale))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss, _ = ttt(drafter, batch, states, head, vocabulary, method)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return {
        "work": f"TTT {steps}, 1 x {length}, stored states",
        "tokens_per_second": length / min(times[1:]),
        "peak_gib": peak,
    }


def measure_budget(device: str, is_tiny: bool, steps: int) -> list[dict]:
    """Peak memory of a step over one document, drafter only, beside what the forecast says."""
    rows = []
    for name, (kind, fields, overrides) in BUDGET.items():
        fields, overrides = (TINY, {}) if is_tiny else (fields, overrides)
        config = (LlamaConfig if is_tiny else kind)(**fields)
        V, H = config.vocab_size, config.hidden_size
        tensors = {
            part: torch.randn(V, H, device=device, dtype=torch.bfloat16)
            for part in ("embed_tokens.weight", "lm_head.weight")
        }
        target = StoredTarget(config, 1, tensors)
        kept = torch.randperm(V)[: 64 if is_tiny else 32000].sort().values
        for length in (96, 160) if is_tiny else LENGTHS:
            drafter = new_drafter(target, kept, **overrides).to(device).train()
            vocabulary = DraftVocabulary(drafter.draft_to_target_ids, V)
            optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-4, fused=device == "cuda")
            row = measure_stored(TargetHead.of(target), drafter, optimizer, vocabulary, 3 * H, V, length, steps)
            shape = DrafterShape.of(drafter.config)
            trained = sum(p.numel() for p in drafter.parameters())
            said = trained * STATE_BYTES + borrowed_bytes(shape) + activation_bytes(shape, length, steps)
            rows.append({**row, "work": f"{name}: {row['work']}", "forecast_gib": said / 2**30})
            print(json.dumps(rows[-1]), flush=True)
            drafter = optimizer = None
            gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script on a CPU")
    parser.add_argument("--stock-target", action="store_true", help="the target's own norms and rotary, no kernels")
    parser.add_argument("--peer", action="store_true", help="run the peer's step too, where it is installed")
    parser.add_argument("--profile", action="store_true", help="print where one step's time goes, and stop")
    parser.add_argument("--budget", action="store_true", help="memory of two shapes by length, and stop")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if args.budget:
        write_report(measure_budget(device, args.tiny, 4), device, args.output)
        return
    config = LlamaConfig(**(TINY if args.tiny else SHAPE_8B), dtype=torch.bfloat16)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        target = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    V = config.vocab_size
    kept = torch.randperm(V)[: 64 if args.tiny else 32000].sort().values
    drafter = new_drafter(target, kept).to(device).train()
    vocabulary = DraftVocabulary(drafter.draft_to_target_ids, V)
    optimizer = torch.optim.AdamW(
        drafter.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda"
    )
    source = OnlineStates(target, drafter.bound_aux_layer_ids, use_kernels=not args.stock_target)
    results = []
    if args.profile:
        profile(source, drafter, optimizer, vocabulary, V, device)
        return
    for name in WORK:
        has_peer = args.peer and WORK[name][4] is not None
        make_peer = (lambda steps: Peer(target, kept, steps)) if has_peer else None
        row = measure(name, source, drafter, optimizer, vocabulary, V, args.repeats, make_peer)
        results.append(row)
        print(json.dumps(row), flush=True)
    write_report(results, device, args.output)


def write_report(results: list[dict], device: str, output: Path | None) -> None:
    """All as JSON, and a line for each."""
    report = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": results,
    }
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1))
    for row in results:
        print(
            f"{row['work']:42} {row['tokens_per_second']:9.0f} tok/s  "
            + (f"{row['ratio']:.2f} x peer as quoted  " if row.get("ratio") else "")
            + (f"{row['ratio_here']:.2f} x peer here  " if "ratio_here" in row else "")
            + (f"target {row['target_ms']:.0f} ms  drafter {row['drafter_ms']:.0f} ms  " if "target_ms" in row else "")
            + f"peak {row['peak_gib']:.1f} GiB"
            + (f"  forecast {row['forecast_gib']:.1f} GiB" if "forecast_gib" in row else "")
        )


def profile(source, drafter, optimizer, vocabulary, vocab_size: int, device: str) -> None:
    """Kernels of one step by time."""
    batch = make_batch(4, 1, 4096 if device == "cuda" else 48, 1.0, vocab_size, device)
    scale = torch.full((4,), 1 / 4096, device=device)
    method = Method(LOSSES["forward_kl"], scale, torch.zeros_like(scale))

    def step() -> None:
        states = source.states(batch)
        with torch.autocast(device, torch.bfloat16):
            loss, _ = ttt(drafter, batch, states, source.head, vocabulary, method)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    phases: dict[str, list[float]] = {}
    for _ in range(5):
        marks = [("begin", time.perf_counter())]

        def mark(name: str) -> None:
            sync()
            marks.append((name, time.perf_counter()))  # noqa: B023  called at once

        states = source.states(batch)
        mark("target")
        with torch.autocast(device, torch.bfloat16):
            unroll_rows(drafter, batch, states.aux_hidden_states, 4)
            mark("steps alone")
            loss, _ = ttt(drafter, batch, states, source.head, vocabulary, method)
        mark("steps, heads and loss")
        loss.backward()
        mark("backward")
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 0.5)
        mark("clip")
        optimizer.step()
        mark("optimizer")
        optimizer.zero_grad()
        for (_, before), (name, now) in pairwise(marks):
            phases.setdefault(name, []).append((now - before) * 1e3)
    for name, spent in phases.items():
        print(f"{name:24} {statistics.median(spent):7.2f} ms")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        sync()
    kernels = sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)
    print(f"all kernels {sum(e.self_device_time_total for e in kernels) / 1e3:.1f} ms")
    for event in kernels[:60]:
        print(f"{event.self_device_time_total / 1e3:8.2f} ms {event.count:5}  {event.key[:110]}")


if __name__ == "__main__":
    main()
