"""`hf-eagle3 bench`."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.distributed import DistributedConfig

from ..console.opening import opening
from ..console.quoting import quote_code
from ..console.terminal import note, say
from ..data_parallel import Team, launch, list_arguments, must_launch
from ..host.refusals import refuse_other_models
from ..kernels.qkv import join_projections
from ..tensor_parallel import is_spread
from .arguments import refuse_acceptance_length, refuse_arguments, settle_depth, spell
from .dflash import load_dflash
from .equality import OutputDiffersError
from .measure import Measured, Skipped, measure
from .prompts import batch_questions, batch_random_prompts, describe_turns, read_questions
from .reads import Reads, Weights, account, find_weights, measure_read_bandwidth
from .report import describe_machine, draw, to_json, to_markdown
from .shapes import SHAPES, make_random_drafter, make_target
from .ways import DFLASH, DRAFTED, KINDS, OF_OTHERS, make_ways


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
    parser.add_argument(
        "--dflash-drafter",
        metavar="REPO_OR_DIR",
        help="a D-Flash drafter for the same target, for a column beside ours; code in its repository is run",
    )
    parser.add_argument(
        "--dp-size",
        type=int,
        metavar="N",
        help="processes, each with its share of the prompts on a device of its own; not needed under accelerate launch "
        "and torchrun (1, or what they started)",
    )
    parser.add_argument(
        "--tp-size",
        type=int,
        metavar="N",
        help="processes that share one target by tensor parallelism, each with a device of its own",
    )
    parser.add_argument(
        "--device-map", metavar="MAP", help="spread the target over the devices of one process: auto, ..."
    )
    parser.add_argument(
        "--read-bandwidth",
        type=float,
        metavar="TB/s",
        help="of the device, for the account of what weights cost to read (measured)",
    )
    parser.add_argument(
        "--join-projections",
        action="store_true",
        help="run query, key and value projections as one product (hf_eagle3.join_projections): for large batches",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="PATH", help="without suffix")
    parser.set_defaults(run=run_bench_command)


def run_bench_command(args: argparse.Namespace) -> int:
    """Measure, print and write: exit status 0, or 1 if what was decoded is not what `generate` says, or nothing was
    measured.
    """
    refuse_arguments(args)
    for name in ("dp_size", "tp_size"):
        if must_launch(getattr(args, name), spell(name)):
            return launch(getattr(args, name), ["bench", *list_arguments(args)])
    with Team(torch.device(args.device), is_one=args.tp_size is not None) as team:
        try:
            has_results, problem = measure_all(args, team), "nothing could be measured; the tables say why."
        except OutputDiffersError as error:
            has_results, problem = False, str(error)
        if not has_results and team.rank == 0:
            note(f"hf-eagle3: error: {problem}")
    return 0 if has_results else 1


def measure_all(args: argparse.Namespace, team: Team) -> bool:
    """Every batch size, and the files after each of them; whether anything was measured.

    Raises:
        OutputDiffersError: What was decoded is not what `generate` says.
    """
    dtype = getattr(torch, args.dtype)
    questions, tokenizer = None, None
    if args.prompts is not None:
        questions = read_questions(args.prompts, limit=args.limit, at_least=team.size)
        with opening("--target", args.target):
            tokenizer = AutoTokenizer.from_pretrained(args.target)
    loaded = load_drafter(args, dtype)
    target = load_target(args, team.device, dtype)
    device = target.device
    drafter = make_random_drafter(target) if loaded is None else loaded.to(device).bind(target)
    if args.join_projections:
        join_projections(target, drafter)
    depth = settle_depth(drafter, args.num_draft_tokens)
    drafter.generation_config.num_assistant_tokens = depth
    target.generation_config.num_assistant_tokens = None  # one of the target's own would go before it
    simulated = args.simulate_acceptance_length
    if simulated is not None:
        drafter.generation_config.simulated_acceptance_length = simulated
    kinds = [KINDS[name] for name in args.kinds]
    other = None
    if args.dflash_drafter is not None:
        other = load_dflash(args.dflash_drafter, dtype=dtype, device=device)
        kinds.append(DFLASH)
    all_ways = make_ways(target, drafter, temperature=args.temperature, dflash_drafter=other)
    ways = {kind: all_ways[kind] for kind in kinds}
    judged = None if simulated is not None else make_ways(target, drafter, temperature=0.0)

    V = target.config.get_text_config(decoder=True).vocab_size
    results: list[Measured] = []
    skipped: list[Skipped] = []
    reads: list[Reads] = []
    # Of random prompts a shorter run is taken off, where there is room for one.
    subtract = args.max_new_tokens // 8 if questions is None else 0
    notes = [
        describe_machine(target) + ".",
        f"{args.dtype}, draft depth {depth}, {'greedy' if args.temperature == 0 else f'temperature {args.temperature}'}, "
        f"{args.max_new_tokens} new tokens, {args.repeats} repeats"
        + (f", acceptance length simulated at {simulated}" if simulated is not None else "")
        + ("; speed of decoding alone, from two lengths." if subtract else "; speed over the whole call."),
        quote_code(shlex.join(["hf-eagle3", "bench", *list_arguments(for_report(args))])),
    ]
    if team.size > 1:
        notes.insert(
            2,
            f"{team.size} processes, each with its share of the prompts on its own device, in batches of the size "
            "given; tokens of all over the time of the slowest.",
        )
    if args.tp_size is not None:
        notes.insert(
            2, f"{args.tp_size} processes share the target by tensor parallelism; memory is that of the first."
        )
    if args.device_map is not None:
        places = sorted(map(str, set(getattr(target, "hf_device_map", {"": device}).values())))
        notes.insert(2, f"The target is spread over {', '.join(places)}; memory is that of the first.")
    if questions is not None and (cut := describe_turns(questions)):
        notes.insert(2, cut)
    weights = None if is_spread(target) else find_weights(target, drafter, depth)
    bandwidth = 0.0
    if weights is None:
        notes.insert(2, "What weights cost to read is left out: some are no whole parameters of the target.")
    else:
        bandwidth = 1e12 * args.read_bandwidth if args.read_bandwidth else measure_read_bandwidth(device)
        how = "given" if args.read_bandwidth else "measured"
        notes.insert(2, f"Read bandwidth {bandwidth / 1e12:.2f} TB/s, {how}.")
    name = args.shape or Path(args.target).name
    num_passes = len(args.batch_sizes) * len(kinds) * (args.repeats + 1)
    with tqdm(total=num_passes, unit="pass", mininterval=1, disable=team.rank > 0) as bar:
        for size in args.batch_sizes:
            bar.set_description(f"batch {size}")
            if questions is None:
                batches = batch_random_prompts(size, args.prompt_length, V, device, team)
            else:
                batches = batch_questions(questions, tokenizer, size, device, team)
            found, missing = measure(
                *(target, ways, batches),
                batch_size=size,
                max_new_tokens=args.max_new_tokens,
                repeats=args.repeats,
                team=team,
                subtract=subtract,
                is_greedy=args.temperature == 0,
                judged=judged,
                on_run=bar.update,
            )
            results += found
            skipped += missing
            if weights is not None:
                reads += account_for(found, weights, depth=depth, num_processes=team.size, bandwidth=bandwidth)
            if team.rank > 0:
                continue
            # After each batch size, so that what was measured is kept if a later one fails.
            both: dict[str, Any] = {"notes": notes, "skipped": skipped, "reads": reads}
            text = to_markdown(results, title=f"{name}, with and without drafting", **both)
            beside(args.out, ".md").write_text(text, encoding="utf-8")
            beside(args.out, ".json").write_text(to_json(results, **both), encoding="utf-8")
    if team.rank == 0:
        if results:
            draw(results, beside(args.out, ".png"), title=name)
        say(text)
    return bool(results)


def beside(out: Path, suffix: str) -> Path:
    """`out` with `suffix`; dots in its name stay."""
    return out.with_name(out.name + suffix)


def load_drafter(args: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel | None:
    """The drafter, looked at before its target is loaded; None for one of random weights.

    Raises:
        ValueError: It is none, or does not draft as deep as is to be simulated.
    """
    if args.drafter is None:
        return None
    with opening("--drafter", args.drafter):
        drafter = AutoModel.from_pretrained(args.drafter, dtype=dtype)
    refuse_other_models(drafter, args.drafter)
    refuse_acceptance_length(args.simulate_acceptance_length, settle_depth(drafter, args.num_draft_tokens))
    return drafter


def load_target(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The target: on `device`, or in parts on several."""
    if args.shape:
        return make_target(args.shape, device=device, dtype=dtype)
    options: dict[str, Any] = {}
    if args.tp_size is not None:
        options["distributed_config"] = DistributedConfig(tp_plan="auto")
    if args.device_map is not None:
        options["device_map"] = args.device_map
    with opening("--target", args.target):
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype, **options).eval()
    return target if options else target.to(device)


def account_for(
    results: list[Measured], weights: Weights, *, depth: int, num_processes: int, bandwidth: float
) -> list[Reads]:
    """What weights cost to read in a round of each kind; plain kinds have one token a row, drafts K+1."""
    reads = []
    for r in results:
        if r.kind in OF_OTHERS:  # only their own code knows how many tokens they verify
            continue
        is_drafted = r.kind == DRAFTED
        gained = r.acceptance_length if is_drafted and r.acceptance_length is not None else 1.0
        reads.append(
            account(
                weights,
                kind=r.kind,
                batch_size=r.batch_size,
                num_tokens=r.batch_size * (depth + 1 if is_drafted else 1),
                is_drafted=is_drafted,
                measured_seconds=num_processes * r.batch_size * gained / r.tokens_per_second,
                bandwidth=bandwidth,
            )
        )
    return reads


def for_report(args: argparse.Namespace) -> argparse.Namespace:
    """The command's arguments without --out, and of paths the last part."""
    paths = ("target", "drafter", "prompts", "dflash_drafter")
    shown = {n: Path(v).name if n in paths and v is not None else v for n, v in vars(args).items() if n != "out"}
    return argparse.Namespace(**shown)
