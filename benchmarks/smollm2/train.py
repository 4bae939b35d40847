"""The recipe behind the shipped drafter: let the target answer, train on the answers, measure on eval prompts.

    python benchmarks/smollm2/prompts.py TARGET PROMPT_FOLDER prompts.npz
    python benchmarks/smollm2/train.py --target TARGET --prompts prompts.npz --output_dir OUT [training arguments]

Needs one CUDA GPU. Every training argument of `Eagle3TrainingArguments` can be given. The answers are kept in
`--answers` and reused when the file is there.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from answers import Answerer, pick_attention
from prompts import EVAL_SETS, pack, unpack
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaForCausalLM

from hf_eagle3.training import (
    Eagle3Trainer,
    Eagle3TrainingArguments,
    TokenDataset,
    choose_draft_vocabulary,
    count_supervised_tokens,
    new_drafter,
)
from hf_eagle3.training.evaluation import walk_batch
from hf_eagle3.training.loading import DRAFT_VOCAB_SIZE
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.step.acceptance import Walk
from hf_eagle3.training.step.batch import Collator
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary
from hf_eagle3.training.step.ttt import ttt

# Of the drafter, where the training arguments do not say otherwise.
SHAPE = {"aux_layer_ids": [2, 15, 27], "num_aux_hidden_states": 3, "intermediate_size": 1536, "num_hidden_layers": 1}


@dataclass
class RecipeArguments:
    """What the recipe adds to the training arguments."""

    target: str = field(metadata={"help": "Folder of the target."})
    prompts: str = field(metadata={"help": "File that prompts.py wrote."})
    answers: str = field(default="answers", metadata={"help": "Folder for the target's answers; files are reused."})
    temperatures: list[float] = field(
        default_factory=lambda: [0.0, 0.7, 1.0], metadata={"help": "One answer to each prompt at each; 0 is greedy."}
    )
    max_prompt: int = field(default=256, metadata={"help": "Longer prompts are left out, in tokens."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest training answer, in tokens."})
    capacity: int = field(default=704, metadata={"help": "KV slots a row while answering: prompt and answer."})
    rows: int = field(default=2048, metadata={"help": "Rows answered side by side."})
    limit: int = field(default=0, metadata={"help": "Only the first so many prompts; 0 means all."})
    answers_only: bool = field(default=False, metadata={"help": "Stop once the answers are there."})


def is_repetitive(ids: np.ndarray, times: int = 4) -> bool:
    """Whether a text ends in a loop: its last tokens are one stretch of up to 64 tokens, `times` times over."""
    for period in range(1, min(64, len(ids) // times) + 1):
        span = max(times * period, 24)
        tail = ids[-span:]
        if len(tail) == span and (tail[period:] == tail[:-period]).all():
            return True
    return False


def generate_answers(args: RecipeArguments, target: LlamaForCausalLM) -> None:
    """Answer the training prompts once at each temperature, and eval prompts greedily; one file each."""
    folder, arrays = Path(args.answers), dict(np.load(args.prompts))
    folder.mkdir(parents=True, exist_ok=True)
    answerer = Answerer(target, args.rows, args.capacity, args.max_new_tokens)
    pick_attention(answerer)
    step = answerer.capture()
    prompts = unpack(arrays, "train")
    keep = np.array([i for i, p in enumerate(prompts) if len(p) <= args.max_prompt])
    keep = keep[: args.limit] if args.limit else keep
    for temperature in args.temperatures:
        began = time.time()
        answers = answerer.answer(
            step, [prompts[i] for i in keep], np.full(len(keep), temperature), f"temperature {temperature}"
        )
        seconds, tokens = time.time() - began, sum(map(len, answers))
        print(f"temperature {temperature}: {len(keep)} answers, {tokens} tokens, {tokens / seconds:,.0f} tokens/s")
        np.savez_compressed(folder / f"train_{temperature}.npz", prompt=keep, **prefixed("answer", answers))
    for name in EVAL_SETS:
        rows = unpack(arrays, name)
        answers = [a[:128] for a in answerer.answer(step, rows, np.zeros(len(rows)), name)]
        np.savez_compressed(folder / f"eval_{name}.npz", **prefixed("answer", answers))


def prefixed(name: str, rows: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}_{key}": value for key, value in pack(rows).items()}


def joined(prompt: np.ndarray, answer: np.ndarray) -> dict[str, np.ndarray]:
    """A token row: the prompt, and the answer that the target generated."""
    return {
        "input_ids": np.concatenate([prompt, answer]),
        "loss_mask": np.arange(len(prompt) + len(answer)) >= len(prompt),
    }


def evaluate(trainer: Eagle3Trainer, arrays: dict[str, np.ndarray], answers: Path) -> dict:
    """Acceptance of greedy chain drafting along the target's greedy answers, by eval set, category and depth."""
    device, collate = trainer.args.device, Collator(7)
    source = OnlineStates(trainer.target_model, trainer.model.bound_aux_layer_ids)
    vocabulary = DraftVocabulary(trainer.model.draft_to_target_ids, trainer.model.config.vocab_size)
    method = Method(LOSSES["forward_kl"], torch.ones(7, device=device), torch.zeros(7, device=device))
    result: dict = {}
    for name in EVAL_SETS:
        prompts, texts = unpack(arrays, name), unpack(dict(np.load(answers / f"eval_{name}.npz")), "answer")
        categories = arrays[f"{name}_category"]
        rows = [joined(p, a) for p, a in zip(prompts, texts, strict=True)]
        walks: list[dict[int, Walk]] = []
        for row in rows:
            batch = collate([row]).to(device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                _, sums = ttt(trainer.model, batch, source.states(batch), source.head, vocabulary, method)
            walks.append({k: walk_batch(sums.hits[:k], batch) for k in (3, 5, 7)})
        loops = np.array([is_repetitive(a) for a in texts])
        groups = {"all": np.ones(len(rows), bool), "loops": loops, "no loops": ~loops}
        groups |= {str(c): categories == c for c in np.unique(categories)} if len(np.unique(categories)) > 1 else {}
        for group, members in groups.items():
            for k in (3, 5, 7):
                total = sum((walks[i][k] for i in np.flatnonzero(members)), Walk(0, np.zeros(k, dtype=np.int64)))
                reached = np.concatenate([[total.rounds], total.accepted[:-1]])
                result.setdefault(name, {}).setdefault(group, {"answers": int(members.sum())})[f"K={k}"] = {
                    "acceptance_length": round(float(total.acceptance_length), 4),
                    "rounds": total.rounds,
                    "rate_by_depth": [round(float(x), 4) for x in total.accepted / np.maximum(reached, 1)],
                }
    return result


def main() -> None:
    args, training = HfArgumentParser((RecipeArguments, Eagle3TrainingArguments)).parse_args_into_dataclasses()
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).cuda().eval()
    if not Path(args.answers).exists():
        generate_answers(args, target)
        torch.cuda.empty_cache()
    if args.answers_only:
        return
    arrays = dict(np.load(args.prompts))
    prompts, rows = unpack(arrays, "train"), []
    for temperature in args.temperatures:
        file = dict(np.load(Path(args.answers, f"train_{temperature}.npz")))
        answers = unpack(file, "answer")
        rows += [joined(prompts[i], a) for i, a in zip(file["prompt"], answers, strict=True) if len(a) >= 3]
    dataset = TokenDataset(rows, max_length=training.max_length)
    counts = count_supervised_tokens(dataset, target.config.vocab_size)
    for size in (8192, 12288, 16384, 24576):
        kept = counts[choose_draft_vocabulary(counts, size)].sum() / counts.sum()
        print(f"draft vocabulary of {size}: {kept:.4f} of the supervised tokens")
    size = training.draft_vocab_size or DRAFT_VOCAB_SIZE
    vocabulary = choose_draft_vocabulary(counts, size, always=[target.config.eos_token_id])
    shape = {**SHAPE, **training.drafter_fields()}
    drafter = new_drafter(target, vocabulary, **shape)
    print(
        f"{len(dataset)} rows, {int(counts.sum())} supervised tokens, {drafter.num_parameters()} weights", flush=True
    )
    trainer = Eagle3Trainer(model=drafter, target_model=target, args=training, train_dataset=dataset)
    began = time.time()
    trainer.train()
    seconds = time.time() - began
    drafter.generation_config.num_assistant_tokens = 3
    drafter.to(torch.bfloat16).save_pretrained(training.output_dir, max_shard_size="14MB")
    result = evaluate(trainer, arrays, Path(args.answers))
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "arguments": {**vars(args), **shape, "draft_vocab_size": size},
        "rows": len(dataset),
        "supervised_tokens": int(counts.sum()),
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "log": trainer.state.log_history,
        "acceptance": result,
    }
    Path(training.output_dir, "report.json").write_text(json.dumps(report, indent=1))
    for name, groups in result.items():
        for group, values in groups.items():
            print(
                f"{name:10} {group:12} "
                + "  ".join(f"{k} {values[k]['acceptance_length']:.3f}" for k in ("K=3", "K=5", "K=7"))
                + f"  ({values['answers']} answers)"
            )
    print(f"trained {seconds:.0f} s")


if __name__ == "__main__":
    main()
