"""One of several processes that share a target; started by `test_tensor_parallel.py`, not a test by itself."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria
from transformers.distributed import DistributedConfig
from transformers.generation.streamers import BaseStreamer

from helpers.batches import make_oracle, pad, prompts_of
from helpers.capture import capture_on_cpus
from helpers.models import DRAFTERS, make_drafter, make_prompt, make_target
from hf_eagle3 import release_graphs
from hf_eagle3.decoding import arena

GREEDY = {"do_sample": False, "return_dict_in_generate": True}
BATCH = (30, 7, 1, 18)
RANK = int(os.environ.get("RANK", "0"))


EXPERTS = "gpt_oss, experts"  # each process has some of a mixture's experts, whole
# Transformers 5.17 has a switch for what later ones give a number of processes for.
BY_EXPERTS = (
    {"ep_size": 2} if "ep_size" in DistributedConfig.__dataclass_fields__ else {"enable_expert_parallel": True}
)


def load_split(folder, family):
    """The target `family` in `folder`, of which each process has a part."""
    more = BY_EXPERTS if family == EXPERTS else {}
    config = DistributedConfig(tp_plan="auto", **more)
    return AutoModelForCausalLM.from_pretrained(folder / family.split(",")[0], distributed_config=config).eval()


def save_targets(folder, families):
    for family in families:
        if family != EXPERTS:
            make_target(family).save_pretrained(folder / family)


class StopAfter(StoppingCriteria):
    """Says stop at a length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= self.length] * len(input_ids))


class Collect(BaseStreamer):
    def __init__(self):
        self.columns = []

    def put(self, value):
        self.columns.append(value.tolist())

    def end(self):
        pass


def fail_at_last(capture, function, *args, pool):
    """Fails in the end, when the others have no more messages to wait for: the stand-in for a capture does run."""
    if function.__name__ == "accept":
        function(*args)
        raise RuntimeError("no graphs here")
    return capture(function, *args, pool=pool)


def tell(out):
    told = {"sequences": out.sequences.tolist(), "graphs": out.speculation.graphs, "loop": out.speculation.loop}
    return {**told, "acceptance_length": out.speculation.acceptance_length}


def greedy(target, drafter_options, **options):
    """With and without a drafter that is right at times."""
    batch, options = pad(prompts_of(*BATCH)), {**GREEDY, "max_new_tokens": 24, **options}
    plain = target.generate(**batch, **options)
    oracle = make_oracle(target, plain.sequences, batch, **drafter_options)
    return {"plain": plain.sequences.tolist(), **tell(target.generate(**batch, assistant_model=oracle, **options))}


def sampled(target, oracle, batch, seed, **options):
    torch.manual_seed(seed)
    options = {"do_sample": True, "top_k": 3, "max_new_tokens": 24, "return_dict_in_generate": True, **options}
    out = target.generate(**batch, assistant_model=oracle, **options)
    return {**tell(out), "next_random": torch.rand(1).item()}


def stopped(target, drafter, prompt, loop, **options):
    options = {**GREEDY, "max_new_tokens": 250, "decode_loop": loop, **options}
    return tell(target.generate(prompt, assistant_model=drafter, **options))


def leave():
    """While targets live, and with them graphs that hold messages."""
    assert arena._arenas
    torch.distributed.destroy_process_group()  # NCCL would wait for them
    assert not arena._arenas


def on_gpus(folder, families):
    """Captured and eager rounds, greedy and sampled."""
    results = {"version": transformers.__version__}
    for family in families:
        target = load_split(folder, family)
        batch = {name: value.to(target.device) for name, value in pad(prompts_of(*BATCH)).items()}
        options = {**GREEDY, "max_new_tokens": 24}
        plain = target.generate(**batch, **options)
        oracle = make_oracle(target, plain.sequences, batch).to(target.device)
        results[f"oracle {family}"] = tell(
            target.generate(**batch, assistant_model=oracle, decode_loop="eager", **options)
        )
        drafter = make_drafter(target).to(target.device)
        for time in ("first", "second"):
            results[f"{time} {family}"] = tell(target.generate(**batch, assistant_model=drafter, **options))
        torch.manual_seed(RANK)
        more = {**options, "do_sample": True, "top_k": 5}
        results[f"sampled {family}"] = tell(target.generate(**batch, assistant_model=drafter, **more))
    (folder / f"{RANK}.json").write_text(json.dumps(results))
    leave()


def main(folder, families):
    results = {"version": transformers.__version__}
    targets = {family: load_split(folder, family) for family in families}
    experts = targets[EXPERTS].model.layers[0].mlp.experts.gate_up_proj  # [E, ...]
    results["has experts"] = experts.placements[0].is_shard(0)
    for family, target in targets.items():
        results[f"greedy {family}"] = greedy(target, {"fc_norm": True, "norm_output": True})
    target = targets["llama"]
    results["is_split"] = hasattr(target.model.layers[0].self_attn.q_proj.weight, "full_tensor")
    for name in ("no_fc", "two_layers", "peagle"):
        results[f"greedy {name}"] = greedy(
            target, {n: x for n, x in DRAFTERS[name].items() if n != "draft_vocab_size"}
        )
    results["greedy in order"] = greedy(target, {}, repetition_penalty=1.5)

    drafter = make_drafter(target, **DRAFTERS["no_fc"])
    embeddings, head = drafter._borrowed["embed_tokens"], drafter._borrowed["lm_head"]
    drafter.bind(target)
    results["borrowed"] = [embeddings.tolist(), head.tolist()]
    results["gathered once"] = drafter._borrowed["embed_tokens"] is embeddings and drafter._borrowed["lm_head"] is head

    batch = pad(prompts_of(*BATCH))
    oracle = make_oracle(target, target.generate(**batch, max_new_tokens=24, do_sample=False), batch)
    results["sampled, one seed"] = sampled(target, oracle, batch, 5)
    results["sampled, another seed"] = sampled(target, oracle, batch, 6)
    results["sampled, a seed for each"] = sampled(target, oracle, batch, 5 + RANK)
    results["sampled in order"] = sampled(target, oracle, batch, 5 + RANK, no_repeat_ngram_size=2)

    prompt, drafter = make_prompt(9), make_drafter(target)
    for loop in ("own", "host"):
        where = StopAfter(20 + 9 * RANK)  # the processes would not stop at the same token
        results[f"criterion, {loop}"] = stopped(target, drafter, prompt, loop, stopping_criteria=[where])
        results[f"time, {loop}"] = stopped(target, drafter, prompt, loop, max_time=0.2 + 0.3 * RANK)
        streamer = Collect() if RANK == 0 else None
        more = {"streamer": streamer, "max_new_tokens": 12}
        results[f"streamer, {loop}"] = stopped(target, drafter, prompt, loop, **more)
        if streamer is not None:
            results[f"streamed, {loop}"] = [token for column in streamer.columns[1:] for token in column]
    with pytest.MonkeyPatch.context() as patch:
        counts = capture_on_cpus(patch)
        for family, target in targets.items():
            results[f"captured {family}"] = greedy(target, {"fc_norm": True})
        results["captured and sampled"] = sampled(targets["llama"], oracle, batch, 5 + RANK)
        results["replays"] = counts.replayed
        release_graphs()
        if RANK == 1:
            capture_on_cpus(patch, around=fail_at_last)
        results["captured by one"] = greedy(targets["llama"], {})
    (folder / f"{RANK}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "gpu":
        on_gpus(Path(sys.argv[1]), sys.argv[3:])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
