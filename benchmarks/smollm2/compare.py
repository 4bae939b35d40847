"""Ways to train the SmolLM2 drafter, side by side on the same answers: losses from the shipped drafter on, and versions.

    python benchmarks/smollm2/compare.py --target TARGET --prompts prompts.npz --out OUT --seconds 60

Every way trains for the same number of steps, `--seconds` of the first one, and is then walked along the target's greedy
answers to the eval prompts at depths up to 8. Needs one CUDA GPU. The best of those that went on from the shipped drafter is
written to OUT/best.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from prompts import EVAL_SETS, unpack
from train import RecipeArguments, generate_answers, is_repetitive, joined
from transformers import AutoModel, AutoModelForCausalLM

from hf_eagle3 import Eagle3Trainer, Eagle3TrainingArguments
from hf_eagle3.smollm2 import DRAFTER_FOLDER
from hf_eagle3.training import TokenDataset, choose_draft_vocabulary, count_supervised_tokens, new_drafter
from hf_eagle3.training.evaluation import walk_batch
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.step.acceptance import Walk
from hf_eagle3.training.step.batch import Collator
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary
from hf_eagle3.training.step.ttt import ttt

DEPTH = 8
AUX_LAYER_IDS = [2, 9, 16, 23, 29]
# Name -> whether it goes on from the shipped drafter, its loss, what a new drafter is, peak learning rate.
WAYS = {
    "shipped, forward_kl": (True, "forward_kl", {}, 1e-3),
    "shipped, cross_entropy": (True, "cross_entropy", {}, 1e-3),
    "shipped, expected_acceptance": (True, "expected_acceptance", {}, 5e-4),
    "new, EAGLE-3": (False, "forward_kl", {"fc_norm": False, "norm_output": False}, 2e-3),
    "new, EAGLE-3.1": (False, "forward_kl", {"fc_norm": True, "norm_output": True}, 2e-3),
}


def evaluate(drafter, target, arrays: dict[str, np.ndarray], answers: Path) -> dict:
    """Acceptance lengths by eval set and depth; of MT-Bench, also without answers that loop."""
    device, collate = target.device, Collator(DEPTH)
    source = OnlineStates(target, drafter.bound_aux_layer_ids)
    vocabulary = DraftVocabulary(drafter.draft_to_target_ids, drafter.config.vocab_size)
    method = Method(LOSSES["forward_kl"], torch.ones(DEPTH, device=device), torch.zeros(DEPTH, device=device))
    result = {}
    for name in EVAL_SETS:
        prompts, texts = unpack(arrays, name), unpack(dict(np.load(answers / f"eval_{name}.npz")), "answer")
        totals = {
            group: [Walk(0, np.zeros(k, dtype=np.int64)) for k in range(1, DEPTH + 1)] for group in ("all", "no loops")
        }
        for prompt, text in zip(prompts, texts, strict=True):
            batch = collate([joined(prompt, text)]).to(device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                _, sums = ttt(drafter, batch, source.states(batch), source.head, vocabulary, method)
            for k in range(1, DEPTH + 1):
                walked = walk_batch(sums.hits[:k], batch)
                totals["all"][k - 1] += walked
                if not is_repetitive(text):
                    totals["no loops"][k - 1] += walked
        result[name] = {
            group: {f"K={k}": round(float(total.acceptance_length), 4) for k, total in enumerate(of_depth, 1)}
            for group, of_depth in totals.items()
        }
        deepest = totals["all"][-1]
        reached = np.concatenate([[deepest.rounds], deepest.accepted[:-1]])
        result[name]["rate_by_depth"] = [round(float(x), 4) for x in deepest.accepted / np.maximum(reached, 1)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--answers", default="answers", help="folder; made if it is not there")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--limit", type=int, default=18000, help="prompts to answer at each temperature")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for the first way")
    parser.add_argument("--max-steps", type=int, help="steps of each way, instead of seconds")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).to(device).eval()
    if not Path(args.answers).exists():
        recipe = RecipeArguments(args.target, args.prompts, args.answers, args.temperatures, limit=args.limit)
        generate_answers(recipe, target)
        torch.cuda.empty_cache()
    arrays = dict(np.load(args.prompts))
    prompts, rows = unpack(arrays, "train"), []
    for temperature in args.temperatures:
        file = dict(np.load(Path(args.answers, f"train_{temperature}.npz")))
        rows += [
            joined(prompts[i], a) for i, a in zip(file["prompt"], unpack(file, "answer"), strict=True) if len(a) >= 3
        ]
    dataset = TokenDataset(rows, max_length=512)
    counts = count_supervised_tokens(dataset, target.config.vocab_size)
    shipped = AutoModel.from_pretrained(DRAFTER_FOLDER, dtype=torch.float32).draft_to_target_ids
    print(f"{len(dataset)} rows, {int(counts.sum())} supervised tokens; the shipped draft vocabulary covers "
          f"{counts[shipped].sum() / counts.sum():.4f}", flush=True)  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "torch": torch.__version__,
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "rows": len(dataset),
        "supervised_tokens": int(counts.sum()),
        "ways": {},
    }

    def make_drafter(goes_on: bool, shape: dict):
        if goes_on:
            return AutoModel.from_pretrained(DRAFTER_FOLDER, dtype=torch.float32)
        torch.manual_seed(0)
        ids = choose_draft_vocabulary(counts, len(shipped), always=[target.config.eos_token_id])
        sizes = {
            "aux_layer_ids": AUX_LAYER_IDS,
            "num_aux_hidden_states": len(AUX_LAYER_IDS),
            "intermediate_size": 1536,
        }
        return new_drafter(target, ids, **sizes, **shape)

    def train(drafter, loss: str, rate: float, steps: int) -> tuple[float, list]:
        settings = Eagle3TrainingArguments(
            output_dir=str(args.out / "run"),
            max_steps=steps,
            per_device_train_batch_size=4,
            packing=True,
            max_length=4096,
            min_coverage=0.0,
            ttt_steps=7,
            loss_type=loss,
            learning_rate=rate,
            warmup_steps=0.05,
            bf16=device == "cuda",
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=2,
            use_cpu=device == "cpu",
        )
        trainer = Eagle3Trainer(model=drafter, target_model=target, args=settings, train_dataset=dataset)
        began = time.time()
        trainer.train()
        return time.time() - began, trainer.state.log_history

    baseline = AutoModel.from_pretrained(DRAFTER_FOLDER, dtype=torch.float32).to(device).bind(target)
    report["shipped"] = evaluate(baseline, target, arrays, Path(args.answers))
    print("shipped", report["shipped"]["mt_bench"], flush=True)
    steps = args.max_steps
    if steps is None:
        train(make_drafter(True, {}), "forward_kl", 1e-3, 10)  # compiles
        steps = round(args.seconds * 40 / train(make_drafter(True, {}), "forward_kl", 1e-3, 40)[0])
    best = 0.0
    for name in args.ways:
        goes_on, loss, shape, rate = WAYS[name]
        drafter = make_drafter(goes_on, shape)
        seconds, log = train(drafter, loss, rate, steps)
        result = evaluate(drafter, target, arrays, Path(args.answers))
        tokens = [entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry]
        report["ways"][name] = {
            "steps": steps,
            "seconds": round(seconds, 1),
            "tokens_per_second": tokens[-1] if tokens else None,
            "loss": [entry["loss"] for entry in log if "loss" in entry],
            "acceptance": result,
        }
        (args.out / "report.json").write_text(json.dumps(report, indent=1))
        print(f"{name:30} {steps} steps, {seconds:.0f} s", {k: v["all"]["K=3"] for k, v in result.items()}, flush=True)
        if goes_on and result["mt_bench"]["all"]["K=3"] > best:
            best = result["mt_bench"]["all"]["K=3"]
            drafter.to(torch.bfloat16).save_pretrained(args.out / "best", max_shard_size="13MB")


if __name__ == "__main__":
    main()
