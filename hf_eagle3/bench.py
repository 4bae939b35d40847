"""What a drafter brings, measured: stock `generate`, our loop without drafting, and our loop with it, in one process.

The protocol: fixed prompts; a warm-up of each kind, in which rows whose text is that of stock `generate` are counted (in
16 bits, ties differ); then all kinds in turn in each repeat; medians and spread. Speed of prompts made up of random tokens is that of decoding alone: the difference of two lengths,
so that the prompt's forward cancels. Speed of real prompts is new tokens over wall time.
"""

import argparse
import importlib.util
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import __version__
from .graphs import release_graphs, synchronize
from .modeling import Eagle3DrafterConfig, Eagle3DrafterModel
from .stats import Speculation

# Shapes to measure without weights: speed does not depend on values.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
DRAFT_VOCAB_SIZE = 32000

STOCK, PLAIN, DRAFTED = "generate()", "our loop, no drafting", "our loop, drafting"
STATIC = 'generate(cache_implementation="static")'  # which the host compiles
KINDS = {"stock": STOCK, "static": STATIC, "plain": PLAIN, "drafted": DRAFTED}

logger = logging.getLogger(__name__)


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


def make_target(shape: str, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A target of a known shape, with random weights made on the device."""
    fields = dict(SHAPES[shape])
    config: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields, tie_word_embeddings=False)
    config.eos_token_id = config.bos_token_id = None
    config.pad_token_id = 0
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_random_drafter(target: PreTrainedModel) -> Eagle3DrafterModel:
    """A drafter for `target`, of the shape that the field trains for it, with random weights."""
    text = target.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    config = Eagle3DrafterConfig(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        draft_vocab_size=min(DRAFT_VOCAB_SIZE, text.vocab_size),
        max_position_embeddings=text.max_position_embeddings,
    )
    with target.device:
        return Eagle3DrafterModel(config).to(target.dtype).eval().bind(target)


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


def describe_machine(target: PreTrainedModel) -> str:
    """Device and versions."""
    device = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else platform.machine() + " CPU"
    triton = ""
    if target.device.type == "cuda":
        import triton as triton_module

        triton = f", triton {triton_module.__version__}"
    versions = f"torch {torch.__version__}{triton}, transformers {transformers.__version__}, hf-eagle3 {__version__}"
    return f"{device}, {versions}, Python {platform.python_version()}"


def to_markdown(results: list[Measured], *, title: str, notes: Sequence[str]) -> str:
    """The tables: by batch size, and by category where there are some."""
    sizes = sorted({r.batch_size for r in results})
    by_key = {(r.kind, r.batch_size): r for r in results}
    lines = [f"# {title}", "", *notes, "", "Tokens a second, median (slowest to fastest):", ""]
    lines.append("| | " + " | ".join(f"BS {size}" for size in sizes) + " |")
    lines.append("|---|" + "---:|" * len(sizes))
    for kind in dict.fromkeys(r.kind for r in results):
        cells = []
        for size in sizes:
            r = by_key.get((kind, size))
            cells.append("-" if r is None else f"{r.tokens_per_second:.1f} ({r.slowest:.1f} to {r.fastest:.1f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    for name, kind in (("drafting against generate()", STOCK), ("drafting against our loop without", PLAIN)):
        pairs = [(by_key.get((DRAFTED, size)), by_key.get((kind, size))) for size in sizes]
        cells = [
            "-" if a is None or b is None else f"{a.tokens_per_second / b.tokens_per_second:.2f}x" for a, b in pairs
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    drafted = [by_key.get((DRAFTED, size)) for size in sizes]
    for name, show in (
        ("acceptance length", lambda r: f"{r.acceptance_length:.2f}"),
        ("rows identical to generate()", lambda r: f"{r.num_identical} of {r.num_rows}"),
        ("memory beyond weights, GiB", lambda r: "-" if r.peak_gib is None else f"{r.peak_gib:.2f}"),
        ("a round, ms", lambda r: f"{1000 * r.seconds_in['seconds'] / max(r.seconds_in['rounds'], 1):.2f}"),
        (
            "of which draft, ms",
            lambda r: f"{1000 * r.seconds_in['draft_seconds'] / max(r.seconds_in['rounds'], 1):.2f}",
        ),
        ("graphs, first call", lambda r: r.graphs),
    ):
        lines.append(
            f"| {name} | "
            + " | ".join("-" if r is None or r.acceptance_length is None else show(r) for r in drafted)
            + " |"
        )
    categories = {c for r in results for c in r.by_category} - {"random", "all"}
    if categories:
        lines += [
            "",
            "Acceptance length by category:",
            "",
            "| category | " + " | ".join(f"BS {s}" for s in sizes) + " |",
        ]
        lines.append("|---|" + "---:|" * len(sizes))
        order = dict.fromkeys(c for r in results for c in r.by_category)
        for category in order:
            cells = [
                f"{r.by_category[category]['acceptance_length']:.2f}" if r and category in r.by_category else "-"
                for r in drafted
            ]
            lines.append(f"| {category} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_json(results: list[Measured], *, notes: Sequence[str]) -> str:
    """The same as data."""
    return json.dumps({"notes": list(notes), "results": [asdict(r) for r in results]}, indent=1) + "\n"


# ---- the command ----


def add_bench_parser(commands: Any) -> None:  # Any: argparse's own private class
    """The options of `hf-eagle3 bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure what a drafter brings, by batch size and prompt category",
        description="Stock generate(), our loop without drafting and our loop with it, in turn in one process. Writes "
        "tables as Markdown, the same as JSON, and a picture where matplotlib is installed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", metavar="REPO_OR_DIR", help="the model to generate with")
    parser.add_argument("--drafter", metavar="REPO_OR_DIR", help="its drafter; random weights if left out")
    parser.add_argument("--shape", choices=list(SHAPES), help="instead of --target: a known shape, random weights")
    parser.add_argument(
        "--simulate-acceptance-length",
        type=float,
        metavar="AL",
        help="accept as if drafts were that good, whatever they are; for weights that were never trained",
    )
    parser.add_argument("--prompts", type=Path, metavar="JSONL", help="lines with `turns` or `prompt`, and `category`")
    parser.add_argument("--limit", type=int, metavar="N", help="first N prompts only")
    parser.add_argument("--prompt-length", type=int, default=512, metavar="T", help="of random prompts")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64], metavar="B", help="rows at once")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of each row")
    parser.add_argument("--num-draft-tokens", type=int, metavar="K", help="draft depth (the drafter's own)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each kind")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=["stock", "plain", "drafted"], help="what to compare"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="PATH", help="without suffix")
    parser.set_defaults(run=run_bench_command)


def run_bench_command(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    if (args.target is None) == (args.shape is None):
        raise ValueError("Give one of --target and --shape.")
    if args.shape and args.prompts:
        raise ValueError("--prompts needs a tokenizer: give --target, not --shape.")
    if args.drafter is None and args.simulate_acceptance_length is None:
        raise ValueError("Without --drafter there are only random weights: give --simulate-acceptance-length too.")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.shape:
        target = make_target(args.shape, device=device, dtype=dtype)
    else:
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(device).eval()
    if args.drafter is None:
        drafter = make_random_drafter(target)
    else:
        drafter = AutoModel.from_pretrained(args.drafter, dtype=dtype).to(device).bind(target)
    if args.num_draft_tokens is not None:
        drafter.generation_config.num_assistant_tokens = args.num_draft_tokens
    if args.simulate_acceptance_length is not None:
        drafter.generation_config.simulated_acceptance_length = args.simulate_acceptance_length
    options: dict[str, Any] = {"do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_k": 0}

    V = target.config.get_text_config(decoder=True).vocab_size
    kinds = [KINDS[name] for name in args.kinds]
    results: list[Measured] = []
    depth = drafter.generation_config.num_assistant_tokens or 3
    simulated = args.simulate_acceptance_length
    notes = [
        describe_machine(target) + ".",
        f"{args.dtype}, draft depth {depth}, {'greedy' if args.temperature == 0 else f'temperature {args.temperature}'}, "
        f"{args.max_new_tokens} new tokens, {args.repeats} repeats"
        + (f", acceptance length simulated at {simulated}" if simulated else "")
        + ("; speed of decoding alone, from two lengths." if args.prompts is None else "; speed over the whole call."),
        "`hf-eagle3 bench " + " ".join(describe_arguments(args)) + "`",
    ]
    name = args.shape or Path(args.target).name
    with tqdm(total=len(args.batch_sizes) * len(kinds) * (args.repeats + 1), unit="pass", mininterval=1) as bar:
        for size in args.batch_sizes:
            bar.set_description(f"batch {size}")
            if args.prompts is None:
                batches, subtract = [random_prompts(size, args.prompt_length, V, device)], args.max_new_tokens // 8
            else:
                tokenizer = AutoTokenizer.from_pretrained(args.target)
                batches, subtract = read_prompts(args.prompts, tokenizer, size, device, limit=args.limit), 0
            results += measure(
                *(target, drafter, batches),
                max_new_tokens=args.max_new_tokens,
                repeats=args.repeats,
                kinds=kinds,
                subtract=subtract,
                on_run=bar.update,
                **options,
            )
            # After each batch size, so that what was measured is kept if a later one fails.
            text = to_markdown(results, title=f"{name}, with and without drafting", notes=notes)
            args.out.with_suffix(".md").write_text(text, encoding="utf-8")
            args.out.with_suffix(".json").write_text(to_json(results, notes=notes), encoding="utf-8")
    draw(results, args.out.with_suffix(".png"), title=name)
    print(text)  # noqa: T201  what was asked for
    return 0


def describe_arguments(args: argparse.Namespace) -> list[str]:
    """The command's arguments as they would be typed again; of paths, the last part."""
    words = []
    for name, value in vars(args).items():
        if name in ("command", "run", "out") or value is None:
            continue
        values = value if isinstance(value, list) else [value]
        shown = [Path(v).name if name in ("target", "drafter", "prompts") else str(v) for v in values]
        words += [f"--{name.replace('_', '-')}", *shown]
    return words


def draw(results: list[Measured], path: Path, *, title: str) -> None:
    """A bar chart of speed by batch size, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("No picture: it needs matplotlib (pip install matplotlib).")
        return
    from matplotlib.figure import Figure

    sizes = sorted({r.batch_size for r in results})
    kinds = list(dict.fromkeys(r.kind for r in results))
    figure = Figure(figsize=(3 * len(sizes) + 1, 3.2), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for i, kind in enumerate(kinds):
            found = [r for r in results if (r.kind, r.batch_size) == (kind, size)]
            for r in found:
                span = [[r.tokens_per_second - r.slowest], [r.fastest - r.tokens_per_second]]
                axes.bar(i, r.tokens_per_second, yerr=span, capsize=3, label=kind, color=f"C{i}")
        axes.set_title(f"batch {size}")
        axes.set_xticks([])
        axes.set_ylabel("tokens/s")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(kinds))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
