"""Our loop beside vLLM or SGLang on one GPU, with and without EAGLE-3, by turns in one run. Install the engine first.

    python benchmarks/bench_engines.py speed --out OUT
    python benchmarks/bench_engines.py acceptance --target TARGET --drafter DRAFTER --prompts questions.jsonl --out OUT
    python benchmarks/bench_engines.py acceptance --engine sglang --target TARGET ...
    python benchmarks/bench_engines.py speed --coverage COVERAGE.json --draft-shapes auto tree-8 --out OUT
    python benchmarks/bench_engines.py requests --target TARGET --drafter DRAFTER --prompts questions.jsonl --out OUT
    python benchmarks/bench_engines.py speed --tiny --without-engine    # a CPU: does it run? Times mean nothing

`speed`: the 8B shape with random weights; both sides keep drafts by a schedule, so that the acceptance length is what
`--simulate-acceptance-length` says; speed of decoding alone, from two lengths. `acceptance`: a real target and its
drafter, exported for the engine; what both accept, their speed over whole calls, and how many texts are the same.
`requests`: the same models, and more sampled requests than places, all asked for at once; tokens a second until the last
answer is there. Written for vLLM 0.26 and SGLang 0.5.17.

With `--coverage`, `speed` accepts as often as a real drafter's ranks do, scaled so that a chain of 3 has the acceptance
length: ours by rank, the engine by the same rates for its chain. Without it rounds of ours follow a schedule.

Ours, the engine without drafting and the engine with it are processes of their own with models of their own, all there
at once, one at work at a time. One that fails or does not answer in time says so in the tables, and the others go on.
`.md` and `.json` are written after each turn, and a log of each process beside them.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# The engines' processes import this file too, and are to be as they come: our side imports hf_eagle3, inside functions.

OURS = "ours"
BEGAN = time.monotonic()
LONGEST_START, LONGEST_TURN = 240.0, 90.0  # seconds to wait for a process
MAX_ROWS, MAX_LENGTH, KV_GIB = 64, 2048, 12  # of the engines
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy decoding draws nothing
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Turn(NamedTuple):
    """One pass over prompts."""

    seconds: float
    rows: list[list[int]]  # new tokens, the end-of-sequence token included
    num_rounds: int  # that verified a draft, of all rows; 0 without drafting
    num_accepted: list[int]  # [K] rounds that kept the draft token at depth k


@dataclass
class Series:
    """All turns of one way at one batch size."""

    way: str
    batch_size: int
    speeds: list[float] = field(default_factory=list)  # tokens a second
    rounds: list[float] = field(default_factory=list)  # that verified a draft, a second and row: without luck
    num_rounds: int = 0
    num_accepted: list[int] = field(default_factory=list)  # [K]
    num_gained: int = 0  # tokens after the first of each row
    rows: list[list[int]] = field(default_factory=list)  # of the last turn

    def add(self, turn: Turn) -> None:
        """Count what `turn` accepted."""
        self.num_rounds += turn.num_rounds
        missing = len(turn.num_accepted) - len(self.num_accepted)
        self.num_accepted = [a + b for a, b in zip(self.num_accepted + [0] * missing, turn.num_accepted, strict=True)]
        self.num_gained += sum(len(row) - 1 for row in turn.rows)
        self.rows = turn.rows

    @property
    def acceptance_length(self) -> float:
        """Tokens a round by the side's own counters; NaN where none drafted."""
        return 1 + sum(self.num_accepted) / self.num_rounds if self.num_rounds else math.nan

    def summary(self) -> dict[str, Any]:
        """For the JSON file."""
        out = {"way": self.way, "batch_size": self.batch_size, "tokens_per_second": self.speeds}
        if self.num_rounds:
            out |= {
                "rounds_per_second_and_row": self.rounds,
                "acceptance_length": self.acceptance_length,
                "tokens_gained_per_round": self.num_gained / self.num_rounds,
                "accepted_at_depth": [n / self.num_rounds for n in self.num_accepted],
                "rounds": self.num_rounds,
            }
        return out


class Side(ABC):
    """What one process decodes with: `facts` about it, and `run(kind, prompts, limit)`."""

    title = "our loop"
    told: str | None = None  # matches lines of its log that say how it was set up
    error: str | None = None  # and those that say what went wrong in a process of the engine's own
    facts: dict[str, Any]

    @abstractmethod
    def run(self, kind: str, prompts: list[list[int]], limit: int) -> Turn:
        """Decode a batch of prompts, up to `limit` new tokens each."""


# ---- our side ----


class OurSide(Side):
    """A target and its drafter in this process; `folder` gets them as the engine reads them."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        from hf_eagle3 import join_projections
        from hf_eagle3.bench.loading import find_swept
        from hf_eagle3.bench.names import KINDS
        from hf_eagle3.bench.report import describe_machine
        from hf_eagle3.bench.shapes import make_random_drafter, make_target
        from hf_eagle3.bench.ways import list_eos, make_ways

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, args.dtype)
        if args.part == "speed":
            target = make_target(args.shape, device=device, dtype=dtype)
            drafter = make_random_drafter(target)
            if args.coverage is None:
                drafter.generation_config.simulated_acceptance_length = args.simulate_acceptance_length
            else:
                drafter.generation_config.simulated_coverage = args.coverage
            write_shapes(target, drafter, folder)
        else:
            target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).eval().to(device)
            drafter = AutoModel.from_pretrained(args.drafter, dtype=dtype).to(device).bind(target)
            drafter.export(folder / "drafter", to=args.engine, target=args.target)
        if args.join_projections:
            join_projections(target, drafter)
        drafter.generation_config.num_assistant_tokens = args.num_draft_tokens
        self.is_open = args.part == "requests"
        self.device, self.pad = device, target.generation_config.pad_token_id or 0
        if args.part == "requests":
            self.ways = make_open_ways(target, drafter, args.temperature)
        else:
            found = {name: find_swept(drafter, [name]) for name in args.draft_shapes}  # each has one
            swept = {title: shape for one in found.values() for title, shape in one.items()}
            ways = make_ways(target, drafter, temperature=0.0, swept=swept)
            titles = {"plain": KINDS["plain"], "drafted": KINDS["drafted"]}
            titles |= {name: title for name, one in found.items() for title in one}
            self.ways = {name: ways[title] for name, title in titles.items()}
        sizes = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
        self.facts = {
            "machine": describe_machine(target),
            "aux_layer_ids": list(drafter.bound_aux_layer_ids),
            "draft_head_rows": sizes["lm_head.weight"][0] if "lm_head.weight" in sizes else None,
            "eos": list_eos(target),
        }

    def run(self, kind: str, prompts: list[list[int]], limit: int) -> Turn:
        if self.is_open:
            return self.ways[kind](prompts, limit)
        call = self.ways[kind](pad_left(prompts, self.pad, self.device), limit)
        told = call.speculation
        if told is None or kind == "plain":
            return Turn(call.seconds, call.rows, 0, [])
        self.facts["graphs"] = told.graphs
        if kind != "drafted":
            self.facts.setdefault("shapes", {})[f"{kind}, BS {len(prompts)}"] = told.shapes
        return Turn(call.seconds, call.rows, told.rounds, list(told.rounds_accepting))


def make_open_ways(
    target: PreTrainedModel, drafter: PreTrainedModel, temperature: float
) -> dict[str, Callable[[list[list[int]], int], Turn]]:
    """Requests that take places as they come free, with and without drafting; shapes are chosen by cost."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from hf_eagle3.bench.ways import list_eos

    eos = list_eos(target)
    pad = target.generation_config.pad_token_id
    settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    places = ContinuousBatchingConfig(max_requests_per_batch=MAX_ROWS)

    def decode(options: dict[str, Any], prompts: list[list[int]], limit: int) -> Turn:
        config = GenerationConfig(
            max_new_tokens=limit, eos_token_id=eos, pad_token_id=eos[0] if pad is None else pad, **settings
        )
        start = time.perf_counter()
        found = target.generate_batch(
            prompts, generation_config=config, continuous_batching_config=places, **options
        ).values()
        seconds = time.perf_counter() - start
        if errors := {output.error for output in found if output.error}:
            raise RuntimeError(f"generate_batch: {errors}")
        if len(found) != len(prompts):
            raise RuntimeError(f"generate_batch answered {len(found)} of {len(prompts)} requests.")
        told = [output.speculation for output in found if output.speculation is not None]
        depth = max((len(row.rounds_accepting) for row in told), default=0)
        accepted = [sum(sum(row.rounds_accepting[k : k + 1]) for row in told) for k in range(depth)]
        rows = [list(output.generated_tokens) for output in found]
        return Turn(seconds, rows, sum(row.rounds for row in told), accepted)

    return {"plain": partial(decode, {"decode_loop": "own"}), "drafted": partial(decode, {"assistant_model": drafter})}


def write_shapes(target: PreTrainedModel, drafter: PreTrainedModel, folder: Path) -> None:
    """The configs of two models, as engines read them; weights they make up themselves."""
    from hf_eagle3.checkpoints.engines import make_native_config

    target.config.architectures = [type(target).__name__]
    target.config.save_pretrained(folder / "target")
    drafter.config.dtype = drafter.dtype
    (folder / "drafter").mkdir()
    config = make_native_config(drafter.config, None, None)  # layers: the default of both
    (folder / "drafter" / "config.json").write_text(json.dumps(config, indent=2))


def pad_left(prompts: list[list[int]], pad: int, device: torch.device) -> Any:  # hf_eagle3.bench.prompts.Prompts
    """Prompts of any lengths as one batch."""
    from hf_eagle3.bench.prompts import Prompts

    T = max(map(len, prompts))
    ids = torch.tensor([[pad] * (T - len(row)) + row for row in prompts], device=device)  # [B, T]
    mask: Tensor = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in prompts], device=device)
    return Prompts({"input_ids": ids, "attention_mask": mask}, [""] * len(prompts), list(range(len(prompts))))


# ---- the engines' sides ----


def __getattr__(name: str) -> Any:
    """`Worker`, which vLLM's process asks for by name; a class of vLLM's, so made only where vLLM is."""
    if name != "Worker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
    from vllm.v1.worker import gpu_worker

    class Worker(gpu_worker.Worker):
        """vLLM's own. Where weights are made up, no checkpoint says that the drafter has a head of its own, and vLLM
        would let it draft with the target's, of four times as many rows.
        """

        def load_model(self, **kwargs: Any) -> None:
            Eagle3LlamaForCausalLM.has_own_lm_head = True
            super().load_model(**kwargs)

        def count_draft_rows(self) -> int:
            """Rows of the head it drafts with."""
            runner = self.model_runner
            proposer = getattr(runner, "speculator", None) or runner.drafter
            return int(proposer.model.lm_head.weight.shape[0])

    return Worker


class VllmSide(Side):
    """vLLM's offline engine as it comes, but for prefix caching and the sizes it must share a GPU with."""

    title = "vLLM"
    told = (
        r"\[\w+\.py:\d+\] (.*(?:attention backend|FlashAttention version|Model Runner|auxiliary layers|KV cache size"
        r"|Graph capturing|took .* s).*)"
    )
    error = r"\(EngineCore[^)]*\).* (\w+Error: .*)"

    def __init__(self, folder: Path, args: argparse.Namespace, eos: list[int], is_drafting: bool):
        import vllm

        is_random = args.part == "speed"
        options: dict[str, Any] = {}
        if is_drafting:
            speculation = {"method": "eagle3", "model": str(folder / "drafter")}
            speculation["num_speculative_tokens"] = args.num_draft_tokens
            speculation |= args.speculation
            if is_random:
                speculation["rejection_sample_method"] = "synthetic"
                if args.coverage is None:
                    speculation["synthetic_acceptance_length"] = args.simulate_acceptance_length
                else:
                    firsts = [row[0] for row in args.coverage[: args.num_draft_tokens]]
                    speculation["synthetic_acceptance_rates"] = list(accumulate(firsts, mul))
                options["worker_cls"] = "bench_engines.Worker"
            # Counters are kept with statistics only.
            options |= {"speculative_config": speculation, "disable_log_stats": False}
        if is_random:
            options["load_format"] = "dummy"
        if args.attention_backend:
            options["attention_backend"] = args.attention_backend
        self.llm = vllm.LLM(
            str(folder / "target") if is_random else args.target,
            dtype=args.dtype,
            skip_tokenizer_init=True,
            max_model_len=MAX_LENGTH,
            max_num_seqs=MAX_ROWS,
            enable_prefix_caching=False,
            # With its size given, vLLM does not measure free memory, which others take from meanwhile.
            kv_cache_memory_bytes=KV_GIB << 30,
            gpu_memory_utilization=0.2,
            **options | args.engine_options,
        )
        self.options = {
            "temperature": args.temperature,
            "detokenize": False,
            "ignore_eos": is_random,
            "stop_token_ids": eos,
        }
        self.is_drafting = is_drafting
        self.facts = {"version": vllm.__version__}
        if is_drafting and is_random:
            self.facts["draft_head_rows"] = self.llm.collective_rpc("count_draft_rows")[0]

    def run(self, _: str, prompts: list[list[int]], limit: int) -> Turn:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=limit, **self.options)
        before = self.count()
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": row} for row in prompts], sampling, use_tqdm=False)
        rows = [list(output.outputs[0].token_ids) for output in outputs]
        seconds = time.perf_counter() - start
        rounds, *accepted = [now - then for now, then in zip(self.count(), before, strict=True)]
        return Turn(seconds, rows, rounds, accepted)

    def count(self) -> list[int]:
        """Rounds so far, and of these the ones that kept the draft token at each depth."""
        if not self.is_drafting:
            return [0]
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}
        by_depth = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        return [metrics["vllm:spec_decode_num_drafts"].value, *map(int, by_depth)]


class SglangSide(Side):
    """SGLang's offline engine as it comes, but for prefix caching and the sizes it must share a GPU with."""

    title = "SGLang"
    told = r"^\[[^\]]*\] ((?:Load weight end|KV Cache is allocated|Capture .* end|Engine startup timings).*)"
    error = r"^(\w+Error: .*)"

    def __init__(self, folder: Path, args: argparse.Namespace, eos: list[int], is_drafting: bool):
        is_random = args.part == "speed"
        options: dict[str, Any] = {}
        if is_drafting:
            if is_random:
                # Read where SGLang is imported. All rows of a batch keep as many drafts in a round.
                os.environ["SGLANG_SIMULATE_ACC_LEN"] = str(args.simulate_acceptance_length)
                os.environ["SGLANG_SIMULATE_ACC_TOKEN_MODE"] = "real-draft-token"
            options = {
                "speculative_algorithm": "EAGLE3",
                "speculative_draft_model_path": str(folder / "drafter"),
                "speculative_num_steps": args.num_draft_tokens,
                "speculative_eagle_topk": 1,
                "speculative_num_draft_tokens": args.num_draft_tokens + 1,  # the root is one of them
            }
        if args.attention_backend:
            options["attention_backend"] = args.attention_backend
        import sglang

        self.llm = sglang.Engine(
            model_path=str(folder / "target") if is_random else args.target,
            load_format="dummy" if is_random else "auto",
            dtype=args.dtype,
            skip_tokenizer_init=True,
            context_length=MAX_LENGTH,
            max_running_requests=MAX_ROWS,
            max_total_tokens=MAX_ROWS * MAX_LENGTH,
            # A share of what is free at the start, less what others take meanwhile; the line above takes far less.
            mem_fraction_static=0.5,
            disable_radix_cache=True,
            log_level="info",
            **options | args.engine_options,
        )
        self.options = {"temperature": args.temperature, "ignore_eos": is_random, "stop_token_ids": eos}
        self.depth = args.num_draft_tokens if is_drafting else 0
        self.facts = {"version": sglang.__version__}

    def run(self, _: str, prompts: list[list[int]], limit: int) -> Turn:
        start = time.perf_counter()
        outputs = self.llm.generate(input_ids=prompts, sampling_params={"max_new_tokens": limit, **self.options})
        rows = [list(output["output_ids"]) for output in outputs]
        seconds = time.perf_counter() - start
        kept = [0] * (self.depth + 1)  # rounds that kept so many draft tokens
        for output in outputs:
            for count, rounds in enumerate(output["meta_info"].get("spec_correct_drafts_histogram", [])):
                kept[count] += rounds
        if self.depth and not any(kept):
            raise RuntimeError(
                "SGLang told of no rounds. Written for 0.5.17, which has spec_correct_drafts_histogram."
            )
        return Turn(seconds, rows, sum(kept), [sum(kept[k:]) for k in range(1, self.depth + 1)])


ENGINES: dict[str, type[Side]] = {"vllm": VllmSide, "sglang": SglangSide}


def list_ways(engine: str, draft_shapes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Each way of decoding -> the process that does it, and what to ask of it. Ours and the engine's by turns.

    Further shapes of ours come last.
    """
    title = ENGINES[engine].title
    return {
        "our loop, no drafting": (OURS, "plain"),
        title: (engine, ""),
        "our loop, drafting": (OURS, "drafted"),
        f"{title}, EAGLE-3": (f"{engine}-eagle3", ""),
        **{f"our loop, {shape}": (OURS, shape) for shape in draft_shapes},
    }


# ---- processes ----


def serve(connection: Connection, log: Path, make: type[Side], arguments: tuple) -> None:
    """What a process does: make its side, then answer turns until there are no more."""
    os.setsid()  # ended together with what it starts
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        side = make(*arguments)
        connection.send(side.facts)
        while (asked := connection.recv()) is not None:
            connection.send((side.run(*asked), side.facts))
    except EOFError:
        pass
    except BaseException as error:  # noqa: BLE001  told to who asked
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")


class SideFailedError(RuntimeError):
    """A process that failed, ended, or did not answer in time."""


class Process:
    """A side in a process of its own."""

    def __init__(self, name: str, log: Path, make: type[Side], *arguments: Any):
        self.name, self.log, self.make, self.facts = name, log, make, {}
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, log, make, arguments))
        self.process.start()
        theirs.close()

    def wait(self, seconds: float) -> Any:
        """What it says.

        Raises:
            SideFailedError: Nothing in that time, or that it failed.
        """
        try:
            if not self.connection.poll(seconds):
                raise SideFailedError(f"{self.name} did not answer in {seconds:.0f} s")
            said = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise SideFailedError(self.explain("ended")) from error
        if isinstance(said, str):
            raise SideFailedError(self.explain(said.splitlines()[0]))
        return said

    def explain(self, why: str) -> str:
        """Why it failed. What went wrong in a process of the engine's own is in the log alone."""
        return f"{self.name}: {[*self.find(self.make.error), why][0][:300]}"

    def start(self) -> None:
        """Wait until it is ready."""
        self.facts = self.wait(LONGEST_START)
        say(f"{self.name} is ready: {self.facts}")

    def run(self, kind: str, prompts: list[list[int]], limit: int) -> Turn:
        """One batch."""
        try:
            self.connection.send((kind, prompts, limit))
        except (BrokenPipeError, ConnectionError) as error:
            raise SideFailedError(self.explain("ended")) from error
        turn, self.facts = self.wait(LONGEST_TURN)
        return turn

    def read_text(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def find(self, pattern: str | None) -> list[str]:
        """What `pattern` finds in its log."""
        return re.findall(pattern, self.read_text(), re.MULTILINE) if pattern else []

    def read_log(self) -> list[str]:
        """The lines of its log that say how it was set up."""
        return list(dict.fromkeys(line[:200] for line in self.find(self.make.told)))

    def end(self) -> None:
        """End it and what it started."""
        if self.process.is_alive():
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group, and gone already, as a rule
        self.process.kill()  # where it had no group yet
        self.process.join(5)


def say(text: str) -> None:
    """Progress, with the time."""
    print(f"[{time.monotonic() - BEGAN:4.0f} s] {text}", flush=True)


# ---- measuring ----


class Work(NamedTuple):
    """What to decode at one batch size."""

    batch_size: int
    batches: list[list[list[int]]]
    limit: int
    shorter: int  # tokens of a second run, whose time is taken off; 0 for none


class Bench:
    """The processes, what they measured, and what went wrong."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.engine, self.ways = args, ENGINES[args.engine], list_ways(args.engine, args.draft_shapes)
        self.processes: dict[str, Process] = {}
        self.failures: dict[str, str] = {}
        self.series: dict[tuple[str, int], Series] = {}

    def start(self, folder: Path) -> None:
        """Ours first, since it writes what the engine reads; then the engine's two together."""
        args = self.args
        self.launch(OURS, OurSide, folder, args)
        self.attempt(OURS, lambda: self.processes[OURS].start())
        if args.without_engine or OURS in self.failures:
            return
        eos = self.processes[OURS].facts["eos"]
        names = (args.engine, f"{args.engine}-eagle3")
        for name in names:
            self.launch(name, self.engine, folder, args, eos, name != args.engine)
        for name in names:
            self.attempt(name, lambda: self.processes[name].start())  # noqa: B023  called at once

    def launch(self, name: str, make: type[Side], *arguments: Any) -> None:
        """Start a process."""
        log = self.args.out.with_name(f"{self.args.out.name}.{name}.log")
        self.processes[name] = Process(name, log, make, *arguments)

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` of a process gives; None if it failed, and then it is ended."""
        try:
            return work()
        except SideFailedError as error:
            self.failures[name] = str(error)
            self.processes[name].end()
            say(f"FAILED: {error}\n{self.processes[name].read_text()[-2000:]}")
            self.write()
            return None

    def measure(self, work: Work) -> None:
        """A warm-up of each way, then turns."""
        warm_up = work._replace(batches=list({len(b): b for b in work.batches}.values()))
        for way in self.alive():
            self.attempt(self.ways[way][0], lambda: self.take_turn(way, warm_up))  # noqa: B023  called at once
        for number in range(self.args.repeats):
            for way in self.alive():
                if time.monotonic() - BEGAN > self.args.seconds:
                    say("out of time")
                    return
                done = self.attempt(self.ways[way][0], lambda: self.take_turn(way, work))  # noqa: B023  called at once
                if done is not None:
                    speed, rounds, turn = done
                    series = self.series.setdefault((way, work.batch_size), Series(way, work.batch_size))
                    series.speeds.append(speed)
                    series.rounds.append(rounds / work.batch_size)
                    series.add(turn)
                    say(f"BS {work.batch_size}, turn {number + 1}, {way}: {speed:.1f} tokens/s")
                    self.write()

    def take_turn(self, way: str, work: Work) -> tuple[float, float, Turn]:
        """Tokens and rounds a second, and the whole pass."""
        name, kind = self.ways[way]

        def run(limit: int) -> Turn:
            turns = [self.processes[name].run(kind, batch, limit) for batch in work.batches]
            depths = max(len(t.num_accepted) for t in turns)
            accepted = [sum(t.num_accepted[k] for t in turns if k < len(t.num_accepted)) for k in range(depths)]
            rows = [row for t in turns for row in t.rows]
            return Turn(sum(t.seconds for t in turns), rows, sum(t.num_rounds for t in turns), accepted)

        whole = run(work.limit)
        seconds, tokens, rounds = whole.seconds, sum(map(len, whole.rows)), whole.num_rounds
        if work.shorter:
            less = run(work.shorter)
            seconds, tokens = seconds - less.seconds, tokens - sum(map(len, less.rows))
            rounds -= less.num_rounds
        return tokens / seconds, rounds / seconds, whole

    def alive(self) -> list[str]:
        """The ways whose process is there."""
        return [way for way, (name, _) in self.ways.items() if name in self.processes and name not in self.failures]

    def write(self) -> None:
        """What there is so far."""
        out = self.args.out
        engines = {
            name: {"facts": process.facts, "log": process.read_log()} for name, process in self.processes.items()
        }
        found = [series.summary() for series in self.series.values()]
        report = {"notes": self.notes(), "results": found, "identical": self.compare(), "engines": engines}
        report["failures"] = self.failures
        out.with_name(out.name + ".json").write_text(json.dumps(report, indent=1))
        out.with_name(out.name + ".md").write_text(self.to_markdown())

    def end(self) -> None:
        """End all processes."""
        for process in self.processes.values():
            process.end()

    # ---- telling ----

    def notes(self) -> list[str]:
        """Machine, versions, what was measured, the command."""
        args = self.args
        facts = {name: process.facts for name, process in self.processes.items()}
        versions = {f"{self.engine.title} {f['version']}" for f in facts.values() if "version" in f}
        told = f"temperature {args.temperature}" if args.temperature else "greedy"
        about = [f"{args.dtype}, K = {args.num_draft_tokens}, {told}, up to {args.max_new_tokens} new tokens"]
        if args.part == "speed":
            about.append(
                f"random weights of the {args.shape} shape, prompts of {args.prompt_length} random tokens, acceptance "
                f"length simulated at {args.simulate_acceptance_length}"
                f"{' by rates of ranks' if args.coverage is not None else ''}; speed of decoding alone, from two lengths"
            )
        elif args.part == "requests":
            about.append(
                f"{args.requests} requests asked for at once, {MAX_ROWS} places, shapes of ours chosen by cost"
            )
        else:
            about.append("speed over whole calls, prompts included")
        return [
            ", ".join([facts.get(OURS, {}).get("machine", "?"), *sorted(versions)]) + ".",
            ", ".join(about) + ".",
            "`python benchmarks/bench_engines.py " + " ".join(list_arguments(sys.argv[1:])) + "`",
        ]

    def compare(self) -> dict[str, dict[str, int]]:
        """Of each two ways at each batch size, how many rows are the same; empty where they need not be."""
        if self.args.part != "acceptance":
            return {}
        found: dict[str, dict[str, int]] = {}
        for size in self.args.batch_sizes:
            there = [way for way in self.ways if (way, size) in self.series]
            for a in there:
                for b in there[there.index(a) + 1 :]:
                    pairs = zip(self.series[a, size].rows, self.series[b, size].rows, strict=True)
                    found.setdefault(f"BS {size}", {})[f"{a} / {b}"] = sum(x == y for x, y in pairs)
        return found

    def to_markdown(self) -> str:
        """The tables."""
        sizes = self.args.batch_sizes
        lines = [f"# Beside {self.engine.title}", "", *self.notes(), ""]
        lines += ["Tokens a second, median (slowest to fastest):", ""]
        lines += ["| | " + " | ".join(f"BS {size}" for size in sizes) + " |", "|---|" + "---:|" * len(sizes)]

        def line(title: str, show: Callable[[int], str]) -> None:
            lines.append(f"| {title} | " + " | ".join(show(size) for size in sizes) + " |")

        def of(way: str, show: Callable[[Series], str]) -> Callable[[int], str]:
            return lambda size: show(self.series[way, size]) if (way, size) in self.series else "-"

        for way in self.ways:
            line(
                way,
                of(way, lambda s: f"{statistics.median(s.speeds):.0f} ({min(s.speeds):.0f} to {max(s.speeds):.0f})"),
            )
        our_plain, plain, our_drafted, drafted, *further = self.ways
        for a, b in ((our_plain, plain), *((way, drafted) for way in (our_drafted, *further))):
            line(f"{a} / {b}", lambda size, a=a, b=b: self.show_ratio(a, b, size))
        for way in (our_drafted, drafted, *further):
            line(f"{way}: acceptance length", of(way, lambda s: f"{s.acceptance_length:.3f}"))
            line("rounds a second and row", of(way, lambda s: f"{statistics.median(s.rounds):.1f}"))
            line("tokens gained a round", of(way, lambda s: f"{s.num_gained / (s.num_rounds or math.nan):.3f}"))
            shares = of(way, lambda s: " / ".join(f"{n / (s.num_rounds or math.nan):.3f}" for n in s.num_accepted))
            line("share of rounds keeping draft token 1 / 2 / ...", shares)
        for size, pairs in self.compare().items():
            total = len(next(s.rows for s in self.series.values() if f"BS {s.batch_size}" == size))
            lines += ["", f"Texts that are the same at {size}, of {total}:", ""]
            lines += [f"- {names}: {count}" for names, count in pairs.items()]
        lines += ["", *(f"- {name} failed: {why}" for name, why in self.failures.items())]
        for name, process in self.processes.items():
            lines += ["", f"{name}: `{process.facts}`", "", *(f"- `{told}`" for told in process.read_log())]
        return "\n".join(lines) + "\n"

    def show_ratio(self, a: str, b: str, size: int) -> str:
        """How many times as fast `a` is as `b`."""
        if (a, size) not in self.series or (b, size) not in self.series:
            return "-"
        first, second = (statistics.median(self.series[way, size].speeds) for way in (a, b))
        return f"{first / second:.2f}x"


def list_arguments(arguments: Sequence[str]) -> list[str]:
    """A command's arguments without --out, and of paths the last part."""
    kept = [a for i, a in enumerate(arguments) if a != "--out" and (i == 0 or arguments[i - 1] != "--out")]
    return [Path(a).name if "/" in a else a for a in kept]


def make_work(args: argparse.Namespace) -> list[Work]:
    """Prompts by batch size."""
    from hf_eagle3.bench.prompts import random_prompts, read_questions

    if args.part == "speed":
        vocab_size = 256 if args.tiny else 128256
        return [
            Work(
                size,
                [random_prompts(size, args.prompt_length, vocab_size)],
                args.max_new_tokens,
                args.max_new_tokens // 8,
            )
            for size in args.batch_sizes
        ]
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = []
    for question in read_questions(args.prompts, limit=args.limit):
        chat = [{"role": "user", "content": question.text}]
        prompts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
    if args.part == "requests":
        asked = [list(prompts[n % len(prompts)]) for n in range(args.requests)]
        return [Work(MAX_ROWS, [asked], args.max_new_tokens, 0)]
    return [
        Work(size, [prompts[i : i + size] for i in range(0, len(prompts), size)], args.max_new_tokens, 0)
        for size in args.batch_sizes
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    speed = parts.add_parser("speed", help="the 8B shape, random weights, simulated acceptance")
    speed.add_argument("--prompt-length", type=int, default=512)
    speed.add_argument("--simulate-acceptance-length", type=float, default=2.41)
    speed.add_argument("--coverage", type=Path, help="JSON with acceptance_by_rank, as bench_shapes.py writes it")
    speed.add_argument(
        "--draft-shapes",
        nargs="+",
        default=[],
        help="further ones of ours: auto, K of a chain, tree-N; with --coverage",
    )
    speed.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script on a CPU")
    speed.set_defaults(batch_sizes=[1, 8, 64], max_new_tokens=256, repeats=5, shape="llama-3.1-8b")
    acceptance = parts.add_parser("acceptance", help="a real target and a real drafter")
    requests = parts.add_parser("requests", help="more requests than places")
    requests.add_argument("--requests", type=int, default=512, help="prompts come again where there are fewer")
    requests.add_argument("--temperature", type=float, default=0.7)
    for part in (acceptance, requests):
        part.add_argument("--target", required=True, help="a folder")
        part.add_argument("--drafter", required=True, help="a folder, of any flavour")
        part.add_argument("--prompts", type=Path, required=True, help="JSON lines with `turns` or `prompt`")
        part.add_argument("--limit", type=int, help="first prompts only")
        part.set_defaults(repeats=2, tiny=False, coverage=None, draft_shapes=[])
    acceptance.set_defaults(batch_sizes=[1, 8], max_new_tokens=128)
    requests.set_defaults(batch_sizes=[MAX_ROWS], max_new_tokens=1024)
    for part in (speed, acceptance):
        part.add_argument("--batch-sizes", type=int, nargs="+")
        part.set_defaults(temperature=0.0)
    for part in (speed, acceptance, requests):
        part.add_argument("--max-new-tokens", type=int)
        part.add_argument("--num-draft-tokens", type=int, default=3, help="K")
        part.add_argument("--repeats", type=int, help="timed turns of each way")
        part.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
        part.add_argument("--engine", choices=ENGINES, default="vllm")
        part.add_argument("--attention-backend", help="of the engine, as it names them; its own choice if left out")
        part.add_argument("--engine-options", type=json.loads, default={}, help="more for its constructor, as JSON")
        part.add_argument(
            "--speculation", type=json.loads, default={}, help="more for vLLM's speculative_config, as JSON"
        )
        part.add_argument("--join-projections", action="store_true", help="of our side")
        part.add_argument("--without-engine", action="store_true", help="our side alone")
        part.add_argument("--seconds", type=float, default=420.0, help="begin no turn after that time")
        part.add_argument("--out", type=Path, default=Path("bench_engines"), help="without suffix")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.prompt_length, args.max_new_tokens, args.batch_sizes = "tiny", 24, 16, [1, 2]
    if args.draft_shapes and args.coverage is None:
        parser.error(
            "--draft-shapes needs --coverage: only with it are trees and chains accepted as a drafter's would be."
        )
    if args.coverage is not None and args.engine != "vllm":
        parser.error("--coverage is for --engine vllm; SGLang has no acceptance by depth.")
    return args


def read_coverage(path: Path, length: float) -> list[list[float]]:
    """Rates by depth and rank, scaled so that a chain of 3 has that acceptance length."""
    from bench_shapes import scale

    return scale(json.loads(path.read_text(encoding="utf-8"))["acceptance_by_rank"], length)


def main() -> int:
    args = parse_arguments()
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    if args.coverage is not None:
        args.coverage = read_coverage(args.coverage, args.simulate_acceptance_length)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench.start(Path(folder))
            for work in make_work(args):
                bench.measure(work)
            bench.write()
        finally:
            bench.end()
    print(bench.to_markdown())
    return 0 if bench.series and not bench.failures else 1


if __name__ == "__main__":
    sys.exit(main())
