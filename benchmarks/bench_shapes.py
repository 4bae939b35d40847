"""Shapes by cost against each fixed shape and no draft, by turns in one process.

    python benchmarks/bench_shapes.py --shape llama-3.1-8b --coverage COVERAGE.json --lengths 1.3 2.4 --out OUT.json
    python benchmarks/bench_shapes.py --target TARGET --drafter DRAFTER --prompts PROMPTS.jsonl --out OUT.json
    python benchmarks/bench_shapes.py --target TARGET --drafter DRAFTER --prompts PROMPTS.jsonl --write-coverage COVERAGE.json

Speeds are those of decoding alone: the time of a call of one new token is taken off. A coverage is how often the target's
token has each rank among a drafter's, by depth; `--lengths` scales it so that a chain of 3 has that acceptance length.
"""

import argparse
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
from hf_eagle3.decoding.choosing import forget
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


class Way:
    """Not drafting, a fixed shape, or shapes by cost, in one cell of the grid."""

    def __init__(self, name: str, shape: Any):
        self.name, self.shape = name, shape
        self.speeds: list[float] = []  # tokens a second
        self.lengths: list[float] = []  # tokens a row and round, drafted or not
        self.rounds: list[float] = []  # milliseconds
        self.out: Any = None  # of the last call
        self.broken: str | None = None

    def add(self, seconds: float, num_rows: int, promised: dict[str, float] | None) -> None:
        """Note a call that took so long without its prompt; what its rounds promise counts, if known, and luck does not."""
        speculation = self.out.speculation
        num_rounds = sum(speculation.shapes.values())
        if promised is None:
            length = (sum(row.num_tokens for row in speculation.rows) / num_rows - 1) / num_rounds
        else:
            length = sum(number * promised[name] for name, number in speculation.shapes.items()) / num_rounds
        self.rounds.append(1000 * seconds / num_rounds)
        self.lengths.append(length)
        self.speeds.append(length * num_rows * num_rounds / seconds)

    def summary(self, plain: torch.Tensor | None) -> dict[str, Any]:
        """For the JSON file; `plain` is the text without a draft, where it is the same."""
        if self.broken is not None:
            return {"way": self.name, "broken": self.broken}
        speculation = self.out.speculation
        num_rounds = sum(speculation.shapes.values())
        phases = ("draft", "verify", "accept", "host")
        return {
            "way": self.name,
            "tokens_per_second": statistics.median(self.speeds),
            "slowest": min(self.speeds),
            "fastest": max(self.speeds),
            "tokens_a_round": statistics.mean(self.lengths),
            "milliseconds_a_round": statistics.median(self.rounds),
            "acceptance_length": None if speculation.rounds == 0 else speculation.acceptance_length,
            "shapes": speculation.shapes,
            "changes": speculation.changes[-4:],
            "graphs": speculation.graphs,
            "milliseconds": {
                name: round(1000 * getattr(speculation, f"{name}_seconds") / max(num_rounds, 1), 3) for name in phases
            },
            "rule": speculation.rule,
            "same_text": None if plain is None else torch.equal(self.out.sequences, plain),
        }


def measure(
    args: argparse.Namespace,
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    cell: tuple[float, float, int],
    known: dict[str, float],
) -> list[dict[str, Any]]:
    """One row of results a way, in one cell of the grid: acceptance length, temperature, rows.

    `known` holds the milliseconds of rounds of fixed shapes: with a coverage they are measured once for all lengths.
    """
    _, temperature, num_rows = cell
    batch = read_prompts(args, target, num_rows)
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": temperature > 0,
        "assistant_model": drafter,
    }
    if temperature:
        options |= {"temperature": temperature, "top_k": 0}
    coverage = getattr(drafter.generation_config, "simulated_coverage", None)
    shapes = {shape.name: shape for shape in list_candidates(drafter)}
    promised: dict[str, float] | None = None  # tokens of a row and round, by shape
    if coverage is not None:
        rates = Rates(tuple(map(tuple, coverage)))
        promised = {name: rates.expect(shape) for name, shape in shapes.items()}
    fixed = [name for name in shapes if name != "none" and (not args.fixed or name in args.fixed)]
    ways = [Way("none", "off"), Way("auto", "auto")]
    ways += [Way(name, shapes[name]) for name in fixed if promised is None or name not in known]
    before = min(run(target, batch, **{**options, "max_new_tokens": 1, "draft_shape": "off"})[0] for _ in range(3))
    for turn in range(args.warm_up + args.repeats):
        for way in ways:
            if way.broken is not None:
                continue
            try:
                seconds, way.out = run(target, batch, **options, draft_shape=way.shape)
            except (torch.OutOfMemoryError, ValueError) as error:
                way.broken = str(error)
                continue
            if turn >= args.warm_up:
                way.add(seconds - before, num_rows, promised)
    plain = None if temperature else ways[0].out.sequences
    found = [way.summary(plain) for way in ways]
    if promised is not None:
        known |= {
            one["way"]: one["milliseconds_a_round"] for one in found if one["way"] in fixed and "broken" not in one
        }
        found = found[:2]
        for name, milliseconds in known.items():
            length = promised[name]
            speed = 1000 * num_rows * length / milliseconds
            found.append({"way": name, "tokens_per_second": speed, "tokens_a_round": length})
            found[-1]["milliseconds_a_round"] = milliseconds
    return found


def describe(cell: tuple[float, float, int], found: list[dict[str, Any]]) -> str:
    """A line: what is chosen against not drafting, and against the best fixed shape."""
    none, auto, *others = (one for one in found if "broken" not in one)
    best = max([none, *others], key=lambda one: one["tokens_per_second"])
    speed = auto["tokens_per_second"]
    return (
        f"AL {cell[0]} T {cell[1]} BS {cell[2]:3d}: none {none['tokens_per_second']:.1f} auto {speed:.1f} "
        f"({speed / none['tokens_per_second']:.3f}), best {best['way']} ({speed / best['tokens_per_second']:.3f})"
    )


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
    parser.add_argument("--verbose", action="store_true", help="a line for each way")
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
    for temperature, num_rows in itertools.product(args.temperatures, args.batch_sizes):
        known: dict[str, float] = {}
        for length in args.lengths:
            forget(target)
            if coverage is not None:
                drafter.generation_config.simulated_coverage = scale(coverage, length) if length else coverage
            cell = (length, temperature, num_rows)
            found = measure(args, target, drafter, cell, known)
            results += [{"length": length, "temperature": temperature, "rows": num_rows, **one} for one in found]
            for one in found:
                if args.verbose or "broken" in one:
                    print("   ", one)
            print(describe(cell, found), found[1].get("shapes"), flush=True)
            args.out.write_text(json.dumps({"machine": describe_machine(target), "results": results}, indent=1) + "\n")
        hf_eagle3.release_graphs()


if __name__ == "__main__":
    main()
