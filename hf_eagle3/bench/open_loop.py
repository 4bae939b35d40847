"""`hf-eagle3 bench --open-loop`: requests that come when they come, whoever still runs, as a server sees them.

A request's first token is late by its wait for a place, too, and its time counts from when it came, not from when the
engine took it in.
"""

import argparse
import json
import math
import random
import shlex
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from ..console.devices import choose_device
from ..console.opening import rendering
from ..console.progress import Progress
from ..console.quoting import quote_code, quote_markdown
from ..console.tables import say_table
from ..console.terminal import note, say
from ..data_parallel import Team, list_arguments
from .loading import Setting, Steps, load_setting, refuse_models
from .names import DRAFTED, PLAIN, STOCK
from .prompts import random_prompts
from .report import describe_machine
from .tables import beside, for_report

NAMES = {STOCK: "the host's engine", PLAIN: "ours, no drafting", DRAFTED: "ours, drafting"}
SPREAD = 0.9  # of the logarithm of drawn lengths, as answers to chats have it
POLL = 0.05  # seconds that are waited for a result at most, while nobody is due to come
PERCENTILES = (50, 95, 99)


class Arrival(NamedTuple):
    """One request."""

    prompt: list[int]
    max_new: int
    seconds: float  # behind the first one


class Answer(NamedTuple):
    """What became of it."""

    came: float  # on the clock of `times`
    times: list[float]  # of each new token
    error: str | None
    speculation: Any  # of ours


@dataclass(frozen=True)
class Served:
    """The numbers of one run. Seconds are by percentile, empty where there are none."""

    kind: str
    places: int
    rate: float | None  # requests a second; None: all at once
    requests: int
    failed: int
    tokens: int
    seconds: float
    tokens_per_second: float
    to_first_token: dict[str, float]
    per_token: dict[str, float]  # behind the first, the mean of each request
    acceptance_length: float | None


def run_open_loop(args: argparse.Namespace, steps: Steps) -> int:
    """Measure, print and write; 0, or 1 if nothing was measured."""
    args.device = choose_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    refuse_models(args)
    results: list[Served] = []
    with Team(torch.device(args.device), is_alone=True) as team, Progress() as step:
        with step.aside("Loading the models"):
            setting = load_setting(args, team, steps)
        if args.num_draft_tokens is None and args.simulate_acceptance_length is None:
            setting.drafter.generation_config.num_assistant_tokens = None  # chosen by cost
        prompts = list_prompts(setting, args)
        runs = [(p, r, k) for p in args.batch_sizes for r in args.request_rates or [None] for k in setting.ways]
        for number, (places, rate, kind) in enumerate(runs):
            step(f"{places} places, {NAMES[kind]}", number, len(runs))
            arrivals = draw_arrivals(prompts, args, rate)
            try:
                results.append(measure_open(setting, kind, places, rate, arrivals, args))
            except Exception as error:  # noqa: BLE001  another kind may do
                note(f"{NAMES[kind]}, {places} places: {type(error).__name__}: {error}")
                continue
            write(args, results, setting)
    if args.json and results:
        say(beside(args.out, ".json").read_text(encoding="utf-8").rstrip())
    elif results:
        say_table(HEAD, list_rows(results), left=3)
        say(f"\nThe table is in {beside(args.out, '.md')}, the same as data in {beside(args.out, '.json')}.")
    return 0 if results else 1


def list_prompts(setting: Setting, args: argparse.Namespace) -> list[list[int]]:
    """The prompts that requests go round."""
    if setting.questions is None or setting.tokenizer is None:
        vocab_size = setting.target.config.get_text_config(decoder=True).vocab_size
        return random_prompts(args.requests, args.prompt_length, vocab_size)
    prompts = []
    for question in setting.questions:
        chat = [{"role": "user", "content": question.text}]
        with rendering(setting.tokenizer):
            rendered = setting.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        prompts.append(list(rendered["input_ids"]))
    return prompts


def draw_arrivals(prompts: Sequence[list[int]], args: argparse.Namespace, rate: float | None) -> list[Arrival]:
    """Requests, the same for all kinds: gaps are exponential, and lengths log-normal where a mean is given."""
    draws, seconds, arrivals = random.Random(0), 0.0, []
    for number in range(args.requests):
        max_new = args.max_new_tokens
        if args.mean_new_tokens is not None:
            length = draws.lognormvariate(0, SPREAD) * args.mean_new_tokens / math.exp(SPREAD**2 / 2)
            max_new = min(max(round(length), 1), max_new)
        arrivals.append(Arrival(prompts[number % len(prompts)], max_new, seconds))
        seconds += 0.0 if rate is None else draws.expovariate(rate)
    return arrivals


def measure_open(
    setting: Setting, kind: str, places: int, rate: float | None, arrivals: list[Arrival], args: argparse.Namespace
) -> Served:
    """One run of a kind, after a warm-up by requests of the same lengths that come at once."""
    config = GenerationConfig(
        do_sample=args.temperature > 0,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=0,
        **({"temperature": args.temperature, "top_k": 0} if args.temperature > 0 else {}),
    )
    own: dict[str, Any] = {PLAIN: {"decode_loop": "own"}, DRAFTED: {"assistant_model": setting.drafter}}.get(kind, {})
    # Natural ends where texts are real, and none where lengths are drawn.
    is_drawn = setting.questions is None or args.mean_new_tokens is not None
    manager = setting.target.init_continuous_batching(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=places),
        **own,
    )
    manager.start()
    try:
        ends = -1 if is_drawn else None
        list(serve(manager, [arrival._replace(seconds=0.0) for arrival in arrivals[: 2 * places]], ends))
        start = time.perf_counter()
        answers = list(serve(manager, arrivals, ends))
        seconds = time.perf_counter() - start
    finally:
        manager.stop(block=True)
    return summarise(answers, kind, places, rate, seconds)


def serve(manager: Any, arrivals: Sequence[Arrival], eos_token_id: int | None) -> Iterator[Answer]:
    """Let requests come at their times; what became of each, as they end.

    Args:
        manager: The host's, or ours behind its names.
        arrivals: In the order of their times.
        eos_token_id: What ends a text; -1 for nothing, None for the target's own.

    Raises:
        RuntimeError: The manager has stopped.
    """
    start, due = time.perf_counter(), deque(arrivals)
    came: dict[str, float] = {}  # of requests under way
    while due or came:
        while due and start + due[0].seconds <= time.perf_counter():
            arrival = due.popleft()
            ends = {} if eos_token_id is None else {"eos_token_id": eos_token_id}
            given = {"max_new_tokens": arrival.max_new, "record_timestamps": True, **ends}
            came[manager.add_request(arrival.prompt, **given)] = start + arrival.seconds
        wait = POLL if not due else min(max(start + due[0].seconds - time.perf_counter(), 0.0), POLL)
        output = manager.get_result(timeout=wait + 1e-4)
        if output is not None and output.is_finished() and output.request_id in came:
            times = output.timestamps or []
            yield Answer(came.pop(output.request_id), times, output.error, getattr(output, "speculation", None))
        elif output is None and not manager.is_running():
            raise RuntimeError("the engine has stopped, and requests are left")


def summarise(answers: Sequence[Answer], kind: str, places: int, rate: float | None, seconds: float) -> Served:
    """The numbers of a run."""
    done = [answer for answer in answers if answer.error is None and answer.times]
    tokens = sum(len(answer.times) for answer in done)
    firsts = [answer.times[0] - answer.came for answer in done]
    paces = [(a.times[-1] - a.times[0]) / (len(a.times) - 1) for a in done if len(a.times) > 1]
    counted = [answer.speculation for answer in done if answer.speculation is not None]
    rounds = sum(speculation.rounds for speculation in counted)
    accepted = sum(speculation.num_accepted for speculation in counted)
    return Served(
        kind=NAMES[kind],
        places=places,
        rate=rate,
        requests=len(answers),
        failed=len(answers) - len(done),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        to_first_token=find_percentiles(firsts),
        per_token=find_percentiles(paces),
        acceptance_length=1 + accepted / rounds if rounds else None,
    )


def find_percentiles(values: Sequence[float]) -> dict[str, float]:
    """By name, such as p95: the least value that so many of a hundred are not above."""
    ordered = sorted(values)
    places = {f"p{p}": max(math.ceil(p / 100 * len(ordered)) - 1, 0) for p in PERCENTILES}
    return {name: ordered[place] for name, place in places.items()} if ordered else {}


# ---- the table ----

HEAD = (
    *("engine", "places", "requests/s", "tokens/s", "failed"),
    *("first token p50", "p95", "p99", "per token p50", "p95", "acceptance length"),
)


def list_rows(results: Sequence[Served]) -> list[list[str]]:
    """The table's rows; seconds as they are read."""
    rows = []
    for r in results:
        rate = "all at once" if r.rate is None else f"{r.rate:g}"
        firsts = [show_seconds(r.to_first_token.get(name)) for name in ("p50", "p95", "p99")]
        paces = [show_seconds(r.per_token.get(name)) for name in ("p50", "p95")]
        length = "-" if r.acceptance_length is None else f"{r.acceptance_length:.2f}"
        rows.append(
            [r.kind, str(r.places), rate, f"{r.tokens_per_second:.1f}", str(r.failed), *firsts, *paces, length]
        )
    return rows


def show_seconds(seconds: float | None) -> str:
    """A time in the unit that suits it."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def write(args: argparse.Namespace, results: Sequence[Served], setting: Setting) -> None:
    """Write Markdown and JSON, after each run."""
    name = args.shape or Path(args.target).name
    lengths = "as texts end" if args.mean_new_tokens is None else f"log-normal of mean {args.mean_new_tokens:g}"
    simulated = args.simulate_acceptance_length
    notes = [
        describe_machine(setting.target) + ".",
        f"{args.dtype}, {'greedy' if args.temperature == 0 else f'temperature {args.temperature}'}, {args.requests} "
        f"requests of up to {args.max_new_tokens} new tokens, lengths {lengths}"
        + (f", acceptance length simulated at {simulated}" if simulated is not None else "")
        + ". Requests come by chance at their rate; times count from when they come.",
        quote_code(shlex.join(["hf-eagle3", "bench", *list_arguments(for_report(args))])),
    ]
    lines = [f"# {quote_markdown(name)}, requests that come and go", ""]
    lines += [line for text in notes for line in (text, "")]
    lines += ["| " + " | ".join(HEAD) + " |", "|---" * 3 + "|---:" * (len(HEAD) - 3) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in list_rows(results)]
    data = {"notes": notes, "results": [asdict(result) for result in results]}
    beside(args.out, ".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside(args.out, ".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
