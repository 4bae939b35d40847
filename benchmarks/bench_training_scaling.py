"""One TTT step of the 8B shape on several GPUs: the drafter replicated (DDP), the frozen target whole on each.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_training_scaling.py --output results/scaling.json

Run it with 1 process first: the ratio is to be of one machine. Each process trains on documents of its own.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from bench_training import SHAPE_8B, TINY, make_batch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from hf_eagle3.training.distributed import call_as_forward
from hf_eagle3.training.losses import LOSSES
from hf_eagle3.training.new import new_drafter
from hf_eagle3.training.states import OnlineStates
from hf_eagle3.training.target_head import DraftVocabulary
from hf_eagle3.training.ttt import Method, ttt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ttt-steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches between two updates")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script on a CPU")
    args = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if is_cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if args.tiny else SHAPE_8B), dtype=torch.bfloat16)
    with device:
        torch.set_default_dtype(torch.bfloat16)
        target = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    kept = torch.randperm(config.vocab_size)[: 64 if args.tiny else 32000].sort().values
    drafter = new_drafter(target, kept).to(device).train()
    model = DistributedDataParallel(drafter, device_ids=[device] if is_cuda else None, broadcast_buffers=False)
    vocabulary = DraftVocabulary(drafter.draft_to_target_ids, config.vocab_size)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-4, weight_decay=0.0, fused=is_cuda)
    source = OnlineStates(target, drafter.bound_aux_layer_ids)
    batch = make_batch(args.ttt_steps, 1, args.length, 1.0, config.vocab_size, str(device))
    scale = 0.8 ** torch.arange(args.ttt_steps, device=device) / (args.length * args.accumulation)
    method = Method(LOSSES["forward_kl"], scale, torch.zeros_like(scale))

    def micro_step() -> None:
        states = source.states(batch)

        def forward():
            with torch.autocast(device.type, torch.bfloat16):
                return ttt(drafter, batch, states, source.head, vocabulary, method)

        loss, _ = call_as_forward(model, drafter, forward)
        loss.backward()

    def update() -> None:
        with model.no_sync():
            for _ in range(args.accumulation - 1):
                micro_step()
        micro_step()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize()
        dist.barrier()

    for _ in range(2):
        update()
    times = []
    for _ in range(args.repeats):
        wait()
        began = time.perf_counter()
        for _ in range(4):
            update()
        wait()
        times.append((time.perf_counter() - began) / 4)
    if rank == 0:
        tokens = world * args.length * args.accumulation
        report = {
            "gpu": torch.cuda.get_device_name() if is_cuda else "none",
            "torch": torch.__version__,
            "processes": world,
            "accumulation": args.accumulation,
            "update_ms": statistics.median(times) * 1e3,
            "update_ms_min_max": [min(times) * 1e3, max(times) * 1e3],
            "tokens_per_second": tokens / statistics.median(times),
        }
        print(json.dumps(report))
        if args.output:
            args.output.write_text(json.dumps(report, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
