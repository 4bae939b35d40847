"""Kinds of decoding, run in turn over the same prompts."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..graphs import release_graphs, synchronize
from ..stats import Speculation

STOCK, PLAIN, DRAFTED = "generate()", "our loop, no drafting", "our loop, drafting"
STATIC = 'generate(cache_implementation="static")'  # which the host compiles
KINDS = {"stock": STOCK, "static": STATIC, "plain": PLAIN, "drafted": DRAFTED}


class Prompts(NamedTuple):
    """A batch's worth of prompts."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask [B, T]
    categories: list[str]  # [B]


@dataclass
class Measured:
    """One kind of decoding at one batch size."""

    kind: str
    batch_size: int
    tokens_per_second: float  # median over repeats
    slowest: float
    fastest: float
    acceptance_length: float | None = None
    peak_gib: float | None = None  # beyond the weights
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds_in: dict[str, float] = field(default_factory=dict)  # of a drafted call
    graphs: str = ""
    num_identical: int | None = None  # rows whose text is that of generate()
    num_rows: int = 0


def random_prompts(batch_size: int, length: int, vocab_size: int, device: torch.device) -> Prompts:
    """Prompts of random tokens, all of one length."""
    generator = torch.Generator().manual_seed(batch_size)
    ids = torch.randint(1, vocab_size, (batch_size, length), generator=generator).to(device)
    return Prompts({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ["random"] * batch_size)


def read_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int, device: torch.device, *, limit: int | None
) -> list[Prompts]:
    """Batches of the first turns of a JSON Lines file, with `turns` or `prompt`, and `category`, in its order."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    batches = []
    for start in range(0, len(lines), batch_size):
        part = lines[start : start + batch_size]
        turns = [line["turns"][0] if "turns" in line else line["prompt"] for line in part]
        chats = [[{"role": "user", "content": turn}] for turn in turns]
        tokenizer.padding_side = "left"
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        tensors = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        batches.append(Prompts(tensors, [line.get("category", "all") for line in part]))
    return batches


class Call(NamedTuple):
    """One `generate` call."""

    seconds: float
    rows: list[list[int]]  # new tokens, without pads
    told: Speculation | None


def run(
    target: PreTrainedModel, prompts: Prompts, *, max_new_tokens: int, drafter: PreTrainedModel | None, **options: Any
) -> Call:
    """Generate once, and wait for all of it."""
    assistant = {} if drafter is None else {"assistant_model": drafter}
    synchronize()
    start = time.perf_counter()
    out = target.generate(
        **prompts.inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **assistant, **options
    )
    new = out.sequences[:, prompts.inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - start
    eos = options.get("eos_token_id", target.generation_config.eos_token_id)
    ends = set(eos if isinstance(eos, (list, tuple)) else [eos]) - {None}
    rows = [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in new]
    return Call(seconds, rows, getattr(out, "speculation", None))


def measure(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    batches: Sequence[Prompts],
    *,
    max_new_tokens: int,
    repeats: int,
    kinds: Iterable[str] = (STOCK, PLAIN, DRAFTED),
    subtract: int = 0,
    on_run: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[Measured]:
    """Run all kinds of decoding over `batches`, which have one batch size, in turn.

    Args:
        target: Given to `generate`.
        drafter: Its drafter, with its draft shape.
        batches: Prompts.
        max_new_tokens: Of each row.
        repeats: How often each kind runs, after one warm-up.
        kinds: What to compare.
        subtract: New tokens of a second, shorter run, whose tokens and time are taken off; 0 for none.
        on_run: Called after each pass.
        options: Further arguments of `generate`.
    """
    batch_size = max(len(batch.categories) for batch in batches)
    extras: dict[str, dict[str, Any]] = {
        STOCK: {"drafter": None},
        STATIC: {"drafter": None, "cache_implementation": "static"},
        PLAIN: {"drafter": drafter, "num_assistant_tokens": 0},
        DRAFTED: {"drafter": drafter},
    }

    def run_all(kind: str, limit: int) -> list[Call]:
        return [run(target, batch, max_new_tokens=limit, **extras[kind], **options) for batch in batches]

    firsts: dict[str, list[Call]] = {}
    peaks: dict[str, float | None] = {}
    for kind in kinds:
        if target.device.type == "cuda":
            release_graphs()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        firsts[kind] = run_all(kind, max_new_tokens)
        peaks[kind] = (torch.cuda.max_memory_allocated() - before) / 2**30 if target.device.type == "cuda" else None
        on_run()
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    calls: dict[str, list[Call]] = {}
    for _ in range(repeats):
        for kind in kinds:
            calls[kind] = run_all(kind, max_new_tokens)
            seconds = sum(call.seconds for call in calls[kind])
            tokens = sum(len(row) for call in calls[kind] for row in call.rows)
            if subtract:
                shorter = run_all(kind, subtract)
                seconds -= sum(call.seconds for call in shorter)
                tokens -= sum(len(row) for call in shorter for row in call.rows)
            speeds[kind].append(tokens / seconds)
            on_run()

    measured = []
    for kind in kinds:
        told = [call.told for call in calls[kind] if call.told is not None]
        result = Measured(
            kind,
            batch_size,
            statistics.median(speeds[kind]),
            min(speeds[kind]),
            max(speeds[kind]),
            peak_gib=peaks[kind],
            num_rows=sum(len(call.rows) for call in calls[kind]),
        )
        if STOCK in firsts:
            pairs = zip(firsts[STOCK], firsts[kind], strict=True)
            result.num_identical = sum(a == b for x, y in pairs for a, b in zip(x.rows, y.rows, strict=True))
        if told and kind == DRAFTED:
            rows = [row for speculation in told for row in speculation.rows]
            categories = [category for batch in batches for category in batch.categories]
            result.acceptance_length = acceptance(rows)
            result.by_category = {
                category: {
                    "acceptance_length": acceptance(
                        [r for r, c in zip(rows, categories, strict=True) if c == category]
                    )
                }
                for category in dict.fromkeys(categories)
            }
            for name in ("seconds", "draft_seconds", "verify_seconds", "accept_seconds", "host_seconds"):
                result.seconds_in[name] = sum(getattr(speculation, name) for speculation in told)
            result.seconds_in["rounds"] = sum(max(r.rounds for r in s.rows) for s in told)
            first = firsts[kind][0].told
            result.graphs = first.graphs if first is not None else ""
        measured.append(result)
    return measured


def acceptance(rows: list[Speculation]) -> float:
    """Tokens gained a round over all of `rows`."""
    rounds = sum(row.rounds for row in rows)
    return 1 + sum(row.num_accepted for row in rows) / rounds if rounds else float("nan")
