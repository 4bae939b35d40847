"""Requests of uneven lengths in closed batches, and in places that the next one takes: the same texts, in less time.

    python benchmarks/bench_in_flight.py TARGET --out OUT.json [--drafter DRAFTER] [--requests 64] [--places 8]

Greedy. Each request has a prompt and a limit of new tokens of its own, drawn once: log-normal, as lengths of answers are.
Closed batches take the requests in their order, as many as there are places; a row that has ended leaves its batch, and
the next batch begins when the last row has. Both ways are asserted to say the same, and are timed by turns.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_eagle3
from hf_eagle3.decoding.engine import Engine
from hf_eagle3.decoding.in_flight import make_inputs
from hf_eagle3.decoding.room import Room
from hf_eagle3.host.batching import make_open_config
from hf_eagle3.host.request_rows import RowMaker
from hf_eagle3.host.shapes import resolve_shapes

ASSET = Path(hf_eagle3.__file__).parent / "assets" / "smollm2-135m-instruct-eagle3"
TOPICS = (
    *(
        "the water cycle",
        "a sonnet",
        "binary search",
        "the French revolution",
        "compound interest",
        "bread",
        "glaciers",
    ),
    *("photosynthesis", "a chess opening", "vaccines", "the Silk Road", "noise-cancelling headphones", "black holes"),
    *("recursion", "bees", "the printing press"),
)
ASKS = (
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "List five facts about {}, one a line, and say for each why it matters to somebody who has never heard of it.",
    "You are a patient teacher. A student writes: 'I have read three articles about {} and still do not see what it is "
    "good for. Could you tell me in plain words what it is, where I meet it, and what I should read next?' Answer.",
)


class Request(NamedTuple):
    """A prompt, and how many tokens its answer may have."""

    prompt: list[int]
    max_new: int


def draw_requests(tokenizer: PreTrainedTokenizerBase, number: int, mean: float, most: int) -> list[Request]:
    """As many, the same each time; limits are log-normal with that mean."""
    generator, requests = random.Random(7), []
    for n in range(number):
        text = ASKS[n % len(ASKS)].format(TOPICS[n // len(ASKS) % len(TOPICS)])
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        limit = generator.lognormvariate(0, 0.9) * mean / 1.5  # exp(0.9 ** 2 / 2) is 1.5
        requests.append(Request(prompt, max(4, min(int(limit), most))))
    return requests


def decode_closed(
    target: PreTrainedModel, drafter: PreTrainedModel, requests: list[Request], num_places: int
) -> list[list[int]]:
    """The text of each request, in batches that nobody joins."""
    maker = RowMaker(target, GenerationConfig(do_sample=False))
    shapes = resolve_shapes(target, drafter, None, {})
    texts = []
    for first in range(0, len(requests), num_places):
        asked = [
            (r, maker.ask({}, max_new_tokens=r.max_new, eos_token_id=None)) for r in requests[first:][:num_places]
        ]
        rows = [maker.make(request.prompt, ask, seed=None) for request, ask in asked]
        ids, mask, inputs = make_inputs(target, [row.prompt[0] for row in rows])
        room = Room(len(rows), mask.shape[1], max(row.max_new or 0 for row in rows))
        config = make_open_config(target, drafter, shapes, maker)
        with torch.no_grad(), Engine(target, drafter, config, room) as engine:
            engine.admit(rows, engine.prefill(ids, mask, inputs, GenerationConfig()))
            while any(row.is_live for row in rows):
                engine.round()
        texts += [row.text for row in rows]
    return texts


def decode_open(
    target: PreTrainedModel, drafter: PreTrainedModel, requests: list[Request], num_places: int
) -> list[list[int]]:
    """The text of each request, by `generate_batch`."""
    config = ContinuousBatchingConfig(max_requests_per_batch=num_places)
    outputs = target.generate_batch(
        [request.prompt for request in requests],
        generation_config=GenerationConfig(do_sample=False),
        continuous_batching_config=config,
        assistant_model=drafter,
        request_kwargs=[{"max_new_tokens": request.max_new} for request in requests],
    )
    return [output.generated_tokens for output in outputs.values()]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--drafter", default=str(ASSET))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--places", type=int, default=8)
    parser.add_argument("--mean", type=float, default=48, help="new tokens of a request, on average")
    parser.add_argument("--most", type=int, default=192, help="new tokens of a request, at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, help="tokens of a draft; chosen by cost unless given")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    options = {"dtype": getattr(torch, args.dtype)}
    target = AutoModelForCausalLM.from_pretrained(args.target, **options).to(args.device).eval()
    drafter = AutoModel.from_pretrained(args.drafter, **options).to(args.device).bind(target)
    drafter.generation_config.num_assistant_tokens = args.depth
    requests = draw_requests(AutoTokenizer.from_pretrained(args.target), args.requests, args.mean, args.most)
    ways = {"closed": decode_closed, "open": decode_open}
    for way in ways.values():  # a warm-up, and shapes' costs
        way(target, drafter, requests[: 2 * args.places], args.places)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    texts: list[list[int]] = []
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            answers = way(target, drafter, requests, args.places)
            seconds = time.perf_counter() - start
            texts = texts or answers
            if answers != texts:
                raise SystemExit(f"{name}: texts differ")
            speeds[name].append(round(sum(map(len, answers)) / seconds, 1))
            print(f"{name}: {speeds[name][-1]} tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result = {
        "prompt_lengths": [len(request.prompt) for request in requests],
        "tokens": list(map(len, texts)),
        "tokens_per_second": speeds,
        "open_over_closed": round(medians["open"] / medians["closed"], 3),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
