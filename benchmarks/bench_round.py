"""Where a round's time goes, kernel by kernel. One CUDA GPU, about a minute.

    python benchmarks/bench_round.py --out OUT
    python benchmarks/bench_round.py --tiny    # a CPU: does it run? Operators in place of kernels, and times mean nothing

A known shape with random weights, acceptance simulated. Two calls of different lengths are timed, and profiled apart from
that; what the longer takes more, over the rounds that it has more, is a round's. Idle is what a round takes beyond its
kernels.
"""

import argparse
import json
import statistics
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from hf_eagle3 import join_projections
from hf_eagle3.bench.prompts import batch_random_prompts
from hf_eagle3.bench.report import describe_machine
from hf_eagle3.bench.shapes import SHAPES, make_random_drafter, make_target
from hf_eagle3.bench.ways import DRAFTED, make_ways
from hf_eagle3.data_parallel import Team

SHOWN = 25  # kernels


class Call(NamedTuple):
    """One `generate` call."""

    seconds: float
    num_rounds: int
    kernels: Counter  # microseconds by name, of a profiled call
    calls: Counter  # launches by name


def make_call(
    target: PreTrainedModel, drafter: PreTrainedModel, batch_size: int, prompt_length: int, temperature: float
) -> Any:
    """A function of the number of new tokens, and whether to profile."""
    device = target.device
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    (prompts,) = batch_random_prompts(batch_size, prompt_length, vocab_size, device, Team(device))
    decode = make_ways(target, drafter, temperature=temperature)[DRAFTED]
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU

    def call(limit: int, *, is_profiled: bool = False) -> Call:
        kernels, calls = Counter(), Counter()
        with profile(activities=[activity]) if is_profiled else nullcontext() as trace:
            done = decode(prompts, limit)
        for event in trace.events() if is_profiled else []:
            if device.type == "cuda" and event.device_type != DeviceType.CUDA:
                continue
            kernels[event.name] += (
                event.time_range.elapsed_us() if device.type == "cuda" else event.self_cpu_time_total
            )
            calls[event.name] += 1
        return Call(done.seconds, max(row.rounds for row in done.speculation.rows), kernels, calls)

    return call


def measure(call: Any, limits: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Microseconds of a round, and of each kernel in it."""
    for limit in (*limits, *limits):  # graphs, and what is compiled
        call(limit)
    turns = [[call(limit) for limit in limits] for _ in range(repeats)]
    took = [1e6 * (long.seconds - short.seconds) / (long.num_rounds - short.num_rounds) for short, long in turns]
    short, long = (call(limit, is_profiled=True) for limit in limits)
    more = long.num_rounds - short.num_rounds
    kernels = {name: (long.kernels[name] - short.kernels[name]) / more for name in long.kernels}
    calls = {name: (long.calls[name] - short.calls[name]) / more for name in long.kernels}
    return {
        "round_us": statistics.median(took),
        "round_us_min_max": [min(took), max(took)],
        "kernels_us": sum(kernels.values()),
        "kernels": {name: [us, calls[name]] for name, us in sorted(kernels.items(), key=lambda item: -item[1])},
    }


def to_markdown(found: dict[int, dict[str, Any]], notes: list[str]) -> str:
    """A table of rounds, and one of kernels for each batch size."""
    lines = ["# A round, kernel by kernel", "", *notes, "", "| | a round, us (fastest to slowest) | kernels | idle |"]
    lines.append("|---|---:|---:|---:|")
    for size, one in found.items():
        low, high = one["round_us_min_max"]
        idle = one["round_us"] - one["kernels_us"]
        lines.append(
            f"| BS {size} | {one['round_us']:.0f} ({low:.0f} to {high:.0f}) | {one['kernels_us']:.0f} | {idle:.0f} |"
        )
    for size, one in found.items():
        lines += ["", f"## BS {size}", "", "| kernel | launches a round | us a round |", "|---|---:|---:|"]
        for name, (us, calls) in list(one["kernels"].items())[:SHOWN]:
            lines.append(f"| `{name[:100].replace('|', '/')}` | {calls:.1f} | {us:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--num-draft-tokens", type=int, default=3)
    parser.add_argument("--simulate-acceptance-length", type=float, default=2.41)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="above 0 nothing is simulated, and little accepted"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--join", action="store_true", help="after `join_projections`")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="without suffix")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.batch_sizes, args.prompt_length, args.max_new_tokens = "tiny", [1, 2], 9, 32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = make_target(args.shape, device=device, dtype=torch.bfloat16)
    drafter = make_random_drafter(target)
    drafter.generation_config.num_assistant_tokens = args.num_draft_tokens
    is_simulated = args.temperature == 0
    drafter.generation_config.simulated_acceptance_length = args.simulate_acceptance_length if is_simulated else None
    if args.join:
        join_projections(target, drafter)
    limits = (args.max_new_tokens // 4, args.max_new_tokens)
    notes = [
        f"{describe_machine(target)}; {args.shape}, bfloat16, prompts of {args.prompt_length} tokens, new tokens "
        f"{limits[0]} and {limits[1]}, K = {args.num_draft_tokens}, "
        + (f"acceptance length simulated at {args.simulate_acceptance_length}" if is_simulated else "")
        + (f"temperature {args.temperature}" if not is_simulated else "")
        + f", {args.repeats} repeats{', projections joined' if args.join else ''}.",
    ]
    found: dict[int, dict[str, Any]] = {}
    for size in args.batch_sizes:
        found[size] = measure(
            make_call(target, drafter, size, args.prompt_length, args.temperature), limits, args.repeats
        )
        text = to_markdown(found, notes)
        if args.out is not None:  # after each, so that what was measured is kept
            args.out.with_name(args.out.name + ".md").write_text(text)
            args.out.with_name(args.out.name + ".json").write_text(
                json.dumps({"notes": notes, "results": found}, indent=1)
            )
    print(text)


if __name__ == "__main__":
    main()
