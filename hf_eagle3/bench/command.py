"""`hf-eagle3 bench`."""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from .measure import KINDS, Measured, measure, random_prompts, read_prompts
from .report import describe_machine, draw, to_json, to_markdown
from .shapes import SHAPES, make_random_drafter, make_target


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
