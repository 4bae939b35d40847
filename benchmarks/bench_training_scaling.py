"""TTT steps of the 8B shape on several GPUs: the drafter replicated or sharded, the frozen target whole on each or shared.

    torchrun --standalone --nproc-per-node 1 benchmarks/bench_training_scaling.py --output OUT
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_training_scaling.py --output OUT --ways ddp fsdp tp --target DIR

Run it with 1 process first: what follows is compared with it. Each process trains on documents of its own. The way "tp"
needs the target as a folder, since shares of it are loaded: `python benchmarks/save_shape.py llama-3.1-8b DIR`.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from bench_training import SHAPE_8B, TINY, make_batch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from hf_eagle3.tensor_parallel import find_peers
from hf_eagle3.training.distributed import call_as_forward
from hf_eagle3.training.new_drafter import new_drafter
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.states.shared import SharedStates
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary
from hf_eagle3.training.step.ttt import ttt


def replicate(drafter: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """DDP, as the trainer has it."""
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(drafter, device_ids=ids, broadcast_buffers=False)


def shard(drafter: torch.nn.Module, device: torch.device) -> torch.nn.Module:  # noqa: ARG001  as of `replicate`
    """FSDP2, the drafter as one unit."""
    return fully_shard(drafter)


WAYS = {"ddp": replicate, "fsdp": shard, "tp": replicate}  # by what the drafter is wrapped in


def measure(
    way: str, target: torch.nn.Module, args: argparse.Namespace, accumulation: int, device: torch.device
) -> dict:
    """Seconds an update takes, and the memory it needs."""
    torch.manual_seed(0)
    config, world = target.config, dist.get_world_size()
    kept = torch.randperm(config.vocab_size)[: 64 if args.tiny else 32000].sort().values
    drafter = new_drafter(target, kept).to(device).train()
    model = WAYS[way](drafter, device)
    vocabulary = DraftVocabulary(drafter.draft_to_target_ids, config.vocab_size)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
    source = OnlineStates(target, drafter.bound_aux_layer_ids)
    if (peers := find_peers(target)) is not None:
        source = SharedStates(source, peers)
    batch = make_batch(args.ttt_steps, 1, args.length, 1.0, config.vocab_size, str(device))
    scale = 0.8 ** torch.arange(args.ttt_steps, device=device) / (args.length * accumulation)
    method = Method(LOSSES["forward_kl"], scale, torch.zeros_like(scale))

    def micro_step() -> None:
        states = source.states(batch)

        def forward():
            with torch.autocast(device.type, torch.bfloat16):
                return ttt(drafter, batch, states, source.head, vocabulary, method)

        loss, _ = call_as_forward(model, drafter, forward)
        loss.backward()

    def update() -> None:
        for i in range(accumulation):
            is_last = i + 1 == accumulation
            if isinstance(model, DistributedDataParallel):
                with contextlib.nullcontext() if is_last else model.no_sync():
                    micro_step()
            else:
                model.set_requires_gradient_sync(is_last)
                micro_step()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    for _ in range(2):
        update()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(args.repeats):
        wait()
        began = time.perf_counter()
        for _ in range(4):
            update()
        wait()
        times.append((time.perf_counter() - began) / 4)
    return {
        "way": way,
        "processes": world,
        "accumulation": accumulation,
        "update_ms": statistics.median(times) * 1e3,
        "update_ms_min_max": [min(times) * 1e3, max(times) * 1e3],
        "tokens_per_second": world * args.length * accumulation / statistics.median(times),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON Lines, added to")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["ddp"])
    parser.add_argument("--target", type=Path, help="for tp: a folder with the 8B shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ttt-steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1], help="micro-batches between two updates")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script on a CPU")
    args = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if is_cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    config = LlamaConfig(**(TINY if args.tiny else SHAPE_8B), dtype=torch.bfloat16)
    target = None
    for way in sorted(args.ways, key=list(WAYS).index):
        if way == "tp":
            target = None
            target = AutoModelForCausalLM.from_pretrained(
                args.target, dtype=torch.bfloat16, distributed_config=DistributedConfig(tp_plan="auto")
            )
        elif target is None:
            with device:
                torch.set_default_dtype(torch.bfloat16)
                target = LlamaForCausalLM(config)
                torch.set_default_dtype(torch.float32)
        target.eval().requires_grad_(False)
        for accumulation in args.accumulation:
            report = measure(way, target, args, accumulation, device)
            gc.collect()
            if dist.get_rank() == 0:
                gpu = torch.cuda.get_device_name() if is_cuda else "none"
                line = json.dumps(
                    {**report, "gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__}
                )
                print(line, flush=True)
                if args.output:
                    with args.output.open("a") as file:
                        file.write(line + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
