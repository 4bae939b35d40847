"""Shapes by cost against each fixed shape and no draft, by turns in one process.

    python benchmarks/bench_shapes.py --shape llama-3.1-8b --coverage COVERAGE.json --lengths 1.3 2.4 --out OUT.json
    python benchmarks/bench_shapes.py --target TARGET --drafter DRAFTER --prompts PROMPTS.jsonl --out OUT.json
    python benchmarks/bench_shapes.py --target TARGET --drafter DRAFTER --prompts PROMPTS.jsonl --write-coverage COVERAGE.json

Speeds are those of decoding alone: the time of a call of one new token is taken off. A coverage is how often the target's
token has each rank among a drafter's, by depth; `--lengths` scales it so that a chain of 3 has that acceptance length.
"""

import argparse
import copy
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_eagle3
from hf_eagle3.bench.report import describe_machine
from hf_eagle3.bench.shapes import make_random_drafter, make_target
from hf_eagle3.decoding.cuda_graphs import synchronize
from hf_eagle3.host.shapes import list_candidates
from hf_eagle3.speculation.rates import Rates
from hf_eagle3.speculation.shape import chain

WIDE = {"steps": 8, "topk": 8, "draft_tokens": 61}  # the tree that a coverage is read from


def scale(coverage: list[list[float]], length: float) -> list[list[float]]:
    """A coverage like `coverage` of which a chain of 3 accepts `length` tokens on average.

    Of a better drafter the other ranks get their share of fewer misses, of a worse one all ranks get less.
    """
    low, high = 0.0, 1 / max(row[0] for row in coverage)
    for _ in range(50):
        factor = (low + high) / 2
        first = [min(factor * row[0], 0.999) for row in coverage]
        scaled = [
            [rate, *(r * min(factor, (1 - rate) / max(1 - row[0], 1e-9)) for r in row[1:])]
            for rate, row in zip(first, coverage, strict=True)
        ]
        if Rates(tuple(map(tuple, scaled))).expect(chain(3)) < length:
            low = factor
        else:
            high = factor
    return scaled


def read_prompts(args: argparse.Namespace, target: PreTrainedModel, num_rows: int) -> dict[str, torch.Tensor]:
    """`num_rows` prompts, of the file or random."""
    if args.prompts is None:
        size = target.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(num_rows)
        ids = torch.randint(size, (num_rows, args.prompt_length), generator=generator).to(target.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokenizer = AutoTokenizer.from_pretrained(args.target, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    questions = [line["turns"][0] if "turns" in line else line["prompt"] for line in lines]
    chats = [
        [{"role": "user", "content": question}] for question in itertools.islice(itertools.cycle(questions), num_rows)
    ]
    options: dict[str, Any] = {
        "add_generation_prompt": True,
        "return_tensors": "pt",
        "return_dict": True,
        "padding": True,
    }
    return tokenizer.apply_chat_template(chats, **options).to(target.device)


def run(target: PreTrainedModel, batch: dict[str, torch.Tensor], **options: Any) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    synchronize(target.device)
    start = time.perf_counter()
    out = target.generate(**batch, return_dict_in_generate=True, **options)
    synchronize(target.device)
    return time.perf_counter() - start, out


def measure(
    args: argparse.Namespace, target: PreTrainedModel, drafter: PreTrainedModel, num_rows: int, temperature: float
) -> list[dict[str, Any]]:
    """One row of results a way, at one batch size and temperature."""
    batch = read_prompts(args, target, num_rows)
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": temperature > 0,
        "assistant_model": drafter,
    }
    if temperature:
        options |= {"temperature": temperature, "top_k": 0}
    ways: dict[str, Any] = {"none": "off", "auto": "auto"}
    names = {shape.name: shape for shape in list_candidates(drafter)}
    ways |= {name: names[name] for name in names if name != "none" and (not args.fixed or name in args.fixed)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    lengths: dict[str, list[float]] = {name: [] for name in ways}  # tokens a row and round, drafted or not
    rounds: dict[str, list[float]] = {name: [] for name in ways}  # milliseconds
    outs: dict[str, Any] = {}
    broken: dict[str, str] = {}
    before = min(run(target, batch, **{**options, "max_new_tokens": 1, "draft_shape": "off"})[0] for _ in range(3))
    for turn in range(args.warm_up + args.repeats):
        for name, shape in ways.items():
            if name in broken:
                continue
            try:
                seconds, outs[name] = run(target, batch, **options, draft_shape=shape)
            except (torch.OutOfMemoryError, ValueError) as error:
                broken[name] = str(error)
                continue
            num_tokens = sum(row.num_tokens for row in outs[name].speculation.rows) - num_rows
            if turn >= args.warm_up:
                speeds[name].append(num_tokens / (seconds - before))
                num_rounds = sum(outs[name].speculation.shapes.values())
                rounds[name].append(1000 * (seconds - before) / num_rounds)
                lengths[name].append(num_tokens / num_rows / num_rounds)
    plain = outs["none"].sequences
    found = []
    for name in ways:
        if name in broken:
            found.append({"way": name, "broken": broken[name]})
            continue
        speculation = outs[name].speculation
        found.append(
            {
                "way": name,
                "tokens_per_second": statistics.median(speeds[name]),
                "slowest": min(speeds[name]),
                "fastest": max(speeds[name]),
                "tokens_a_round": statistics.mean(lengths[name]),
                "milliseconds_a_round": statistics.median(rounds[name]),
                "acceptance_length": None if speculation.rounds == 0 else speculation.acceptance_length,
                "shapes": speculation.shapes,
                "changes": speculation.changes[-4:],
                "graphs": speculation.graphs,
                "milliseconds": {
                    name: round(
                        1000 * getattr(speculation, f"{name}_seconds") / max(sum(speculation.shapes.values()), 1), 3
                    )
                    for name in ("draft", "verify", "accept", "host")
                },
                "rule": speculation.rule,
                "same_text": None if temperature else torch.equal(outs[name].sequences, plain),
            }
        )
    return found


def write_coverage(args: argparse.Namespace, target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    """Rates by depth and rank of a real drafter, along greedy answers."""
    batch = read_prompts(args, target, args.batch_sizes[0])
    options = {
        "assistant_model": drafter,
        "draft_shape": WIDE,
        "max_new_tokens": args.max_new_tokens,
        "do_sample": False,
    }
    speculation = run(target, batch, **options)[1].speculation
    table = [[round(rate, 4) for rate in row if rate == rate] for row in speculation.acceptance_by_rank]
    note = {"target": Path(args.target).name, "drafter": Path(args.drafter).name, "rounds": speculation.rounds}
    args.write_coverage.write_text(
        json.dumps({**note, "acceptance_by_rank": table}, indent=1) + "\n", encoding="utf-8"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--shape")
    parser.add_argument("--drafter")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--coverage", type=Path)
    parser.add_argument("--write-coverage", type=Path)
    parser.add_argument(
        "--lengths", type=float, nargs="+", default=[0.0], help="0: as the coverage, or the weights, are"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--fixed", nargs="*", help="names of the fixed shapes to compare; all by default")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--eos", action="store_true", help="let answers end")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.shape:
        target = make_target(args.shape, device=device, dtype=dtype)
        drafter: PreTrainedModel = make_random_drafter(target)
    else:
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(device).eval()
        drafter = AutoModel.from_pretrained(args.drafter, dtype=dtype).to(device).eval()
    if not args.eos:
        target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = target.generation_config.pad_token_id or 0
    drafter.generation_config.num_assistant_tokens = None
    if args.write_coverage:
        write_coverage(args, target, drafter)
        return
    coverage = None if args.coverage is None else json.loads(args.coverage.read_text())["acceptance_by_rank"]
    results: list[dict[str, Any]] = []
    for length, temperature, num_rows in itertools.product(args.lengths, args.temperatures, args.batch_sizes):
        drafter = copy.deepcopy(drafter)  # nothing is known of it
        if coverage is not None:
            drafter.generation_config.simulated_coverage = scale(coverage, length) if length else coverage
        cell = {"length": length, "temperature": temperature, "rows": num_rows}
        for found in measure(args, target, drafter, num_rows, temperature):
            results.append({**cell, **found})
            if "broken" in found:
                print(cell, found, flush=True)
                continue
            al = found["acceptance_length"]
            print(
                f"AL {length} T {temperature} BS {num_rows:3d} {found['way']:24s} {found['tokens_per_second']:9.1f} "
                f"({found['slowest']:.1f} to {found['fastest']:.1f}) {'' if al is None else f'{al:.2f}'} "
                f"{found['tokens_a_round']:.2f} / {found['milliseconds_a_round']:.2f} ms {found['shapes']}",
                flush=True,
            )
        args.out.write_text(json.dumps({"machine": describe_machine(target), "results": results}, indent=1) + "\n")
        hf_eagle3.release_graphs()


if __name__ == "__main__":
    main()
