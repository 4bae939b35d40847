"""A batch of prompts of different lengths, with and without the drafter, in one run.

    python benchmarks/smollm2/batch.py --target TARGET --prompts PROMPTS.jsonl --out OUT.json [--rows 8] [--repeats 5]

Greedy, float32. The first prompts of the file's categories, in turn. Each row of the batch must be the text that its prompt alone gives without a drafter; then batches with
and without it, and our loop without drafting (K=0), are timed in turn. A row counts up to its end-of-sequence.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_eagle3
from hf_eagle3.bench.names import KINDS
from hf_eagle3.bench.prompts import read_prompts
from hf_eagle3.bench.ways import make_ways
from hf_eagle3.data_parallel import Team

ASSET = Path(hf_eagle3.__file__).parent / "assets" / "smollm2-135m-instruct-eagle3"


def choose(path: Path, num_rows: int) -> list[str]:
    """Lines of the file: the first of each category, then the second, ..."""
    by_category: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        by_category.setdefault(json.loads(line)["category"], []).append(line)
    rounds = itertools.zip_longest(*by_category.values())
    return [line for lines in rounds for line in lines if line is not None][:num_rows]


def read_cpu() -> str:
    """What the CPU says it is, and what PyTorch makes of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", default=str(ASSET))
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    drafter = AutoModel.from_pretrained(args.drafter, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "chosen.jsonl"
        chosen.write_text("\n".join(choose(args.prompts, args.rows)), encoding="utf-8")
        team = Team(torch.device("cpu"))
        (batch,) = read_prompts(chosen, tokenizer, args.rows, team.device, team, limit=None)
        singles = read_prompts(chosen, tokenizer, 1, team.device, team, limit=None)
    ways = make_ways(target, drafter, temperature=0.0)
    plain, undrafted, drafted = (ways[KINDS[kind]] for kind in ("stock", "plain", "drafted"))
    alone = [plain(single, args.max_new_tokens).rows[0] for single in singles]

    depths = {"plain": None} | {f"K={k}": k for k in (0, *args.depth)}  # K=0: our loop alone
    speeds: dict[str, list[float]] = {kind: [] for kind in depths}
    lengths = {}
    for repeat in range(args.repeats + 1):
        for kind, depth in depths.items():
            drafter.generation_config.num_assistant_tokens = depth
            way = plain if depth is None else drafted if depth else undrafted
            call = way(batch, args.max_new_tokens)
            if call.rows != alone:
                raise SystemExit(f"{kind}: rows of the batch are not those of their prompts alone")
            if depth:
                lengths[kind] = call.speculation.acceptance_length
                print(kind, repeat, call.speculation)
            if repeat:  # the first is a warm-up
                speeds[kind].append(sum(map(len, call.rows)) / call.seconds)
    base = statistics.median(speeds["plain"])
    result = {
        "rows": args.rows,
        "prompt_lengths": batch.inputs["attention_mask"].sum(-1).tolist(),
        "tokens": [len(row) for row in alone],
        "identical": True,
        "tokens_per_second": {k: [round(x, 1) for x in v] for k, v in speeds.items()},
        "speed_up": {k: round(statistics.median(v) / base, 3) for k, v in speeds.items()},
        "acceptance_length": {k: round(v, 3) for k, v in lengths.items()},
        "threads": torch.get_num_threads(),
        "cpu": read_cpu(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
