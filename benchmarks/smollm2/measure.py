"""Decode eval prompts for real, with and without the drafter: identity, acceptance and speed, in one run.

    python benchmarks/smollm2/measure.py --target TARGET --prompts prompts.npz --out OUT.json [--plain 80]

Greedy, float32. Each prompt is answered with the drafter; the first `--plain` of a set also without, interleaved, and
the two must be identical token for token. Answers that end in a loop are counted apart, since they flatter acceptance.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from prompts import EVAL_SETS, unpack
from tqdm.auto import tqdm
from train import is_repetitive
from transformers import AutoModel, AutoModelForCausalLM

import hf_eagle3
from hf_eagle3 import Speculation

ASSET = Path(hf_eagle3.__file__).parent / "assets" / "smollm2-135m-instruct-eagle3"


def answer(target, ids: torch.Tensor, max_new_tokens: int, **kwargs):
    """One greedy answer and the seconds it took."""
    began = time.perf_counter()
    out = target.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **kwargs,
    )
    return out, time.perf_counter() - began


def merge(parts: list[Speculation]) -> dict:
    """Acceptance over many answers, each round weighing the same."""
    depth = max((len(p.rounds_reaching) for p in parts), default=0)
    reaching, accepting = (
        [sum(counts[k] for counts in rows if k < len(counts)) for k in range(depth)]
        for rows in ([p.rounds_reaching for p in parts], [p.rounds_accepting for p in parts])
    )
    rounds = sum(p.rounds for p in parts)
    return {
        "answers": len(parts),
        "rounds": rounds,
        "acceptance_length": round(1 + sum(accepting) / rounds, 4) if rounds else None,
        "rate_by_depth": [round(b / a, 4) if a else None for a, b in zip(reaching, accepting, strict=True)],
    }


TITLES = {"mt_bench": "MT-Bench", "gsm8k": "GSM8K", "humaneval": "HumanEval", "alpaca": "Alpaca"}


def to_markdown(report: dict) -> str:
    """The report as tables."""
    lines = [
        f"# SmolLM2-135M-Instruct with its drafter, depth {report['depth']}, greedy, float32",
        "",
        f"{report['device']}; Python {report['python']}, torch {report['torch']}, transformers "
        f"{report['transformers']}; first turns, at most {report['max_new_tokens']} new tokens. Written by "
        "`benchmarks/smollm2/measure.py`.",
        "",
        "| prompts | answers | acceptance length | rate by depth | ending in a loop | not ending in a loop |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for name, groups in report["sets"].items():
        title = TITLES[name]
        for group, values in groups.items():
            if group in ("ending in a loop", "not ending in a loop", "against plain"):
                continue
            apart = ["", ""]
            if group == "all":
                parts = (groups["ending in a loop"], groups["not ending in a loop"])
                apart = [f"{part['acceptance_length'] or float('nan'):.2f} ({part['answers']})" for part in parts]
            rates = " ".join(f"{rate:.2f}" for rate in values["rate_by_depth"])
            lines.append(
                f"| {title if group == 'all' else f'{title}: {group}'} | {values['answers']} | "
                f"{values['acceptance_length']:.2f} | {rates} | {apart[0]} | {apart[1]} |"
            )
    lines += [
        "",
        "| prompts | identical to plain | plain tokens/s | with the drafter | speed-up, median (quartiles) |",
    ]
    lines.append("|---|---|---:|---:|---|")
    for name, groups in report["sets"].items():
        if against := groups.get("against plain"):
            low, high = against["speedup_quartiles"]
            lines.append(
                f"| {TITLES[name]} | {against['identical']} of {against['of']} | "
                f"{against['plain_tokens_per_second']:.1f} | {against['tokens_per_second']:.1f} | "
                f"{against['speedup_median']:.2f} ({low:.2f} to {high:.2f}) |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", default=str(ASSET))
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--sets", nargs="+", default=list(EVAL_SETS))
    parser.add_argument(
        "--plain", type=int, default=80, help="prompts of a set that are also answered without drafter"
    )
    parser.add_argument("--every", type=int, default=1, help="take only every so-manyth prompt of a set")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).to(args.device).eval()
    drafter = AutoModel.from_pretrained(args.drafter, dtype=torch.float32).to(args.device).eval()
    drafter.generation_config.num_assistant_tokens = args.depth
    arrays = dict(np.load(args.prompts))
    report = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "depth": args.depth,
        "max_new_tokens": args.max_new_tokens,
        "sets": {},
    }
    for name in args.sets:
        prompts, categories = unpack(arrays, name)[:: args.every], arrays[f"{name}_category"][:: args.every]
        records = []
        for number, prompt in enumerate(tqdm(prompts, desc=name)):
            ids = torch.from_numpy(prompt.astype(np.int64))[None].to(args.device)
            out, seconds = answer(target, ids, args.max_new_tokens, assistant_model=drafter)
            text = out.sequences[0, ids.shape[1] :]
            record = {"speculation": out.speculation, "loop": is_repetitive(text.cpu().numpy()), "tokens": len(text)}
            record["tokens_per_second"] = len(text) / seconds
            if number < args.plain:
                plain, seconds = answer(target, ids, args.max_new_tokens)
                record["identical"] = torch.equal(plain.sequences, out.sequences)
                record["plain_tokens_per_second"] = len(text) / seconds
            records.append(record)
        groups = {"all": range(len(records))}
        groups["ending in a loop"] = [i for i, r in enumerate(records) if r["loop"]]
        groups["not ending in a loop"] = [i for i, r in enumerate(records) if not r["loop"]]
        if len(set(categories)) > 1:
            groups |= {str(c): np.flatnonzero(categories == c).tolist() for c in np.unique(categories)}
        result = {group: merge([records[i]["speculation"] for i in members]) for group, members in groups.items()}
        both = [r for r in records if "identical" in r]
        if both:
            ratios = sorted(r["tokens_per_second"] / r["plain_tokens_per_second"] for r in both)
            result["against plain"] = {
                "identical": sum(r["identical"] for r in both),
                "of": len(both),
                "plain_tokens_per_second": round(statistics.median(r["plain_tokens_per_second"] for r in both), 2),
                "tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in both), 2),
                "speedup_median": round(statistics.median(ratios), 3),
                "speedup_quartiles": [round(float(q), 3) for q in np.quantile(ratios, [0.25, 0.75])],
            }
        report["sets"][name] = result
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(to_markdown(report))
        print(name, json.dumps(result["all"]), json.dumps(result.get("against plain")), flush=True)


if __name__ == "__main__":
    main()
