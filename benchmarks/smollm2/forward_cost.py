"""What one target forward over 1 to 8 tokens costs on this CPU, and one draft step: which depth pays.

python benchmarks/smollm2/forward_cost.py --target TARGET [--threads 2]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from measure import ASSET
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from hf_eagle3.compat import CACHE_NAME

CONTEXT, REPEATS = 100, 15


def milliseconds(run: Callable[[], None]) -> float:
    """Median time of `run`, after one warm-up."""
    run()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    drafter = AutoModel.from_pretrained(ASSET, dtype=torch.float32).bind(target).eval()
    config = drafter.config

    cache = DynamicCache()
    target(torch.randint(0, config.vocab_size, (1, CONTEXT)), **{CACHE_NAME: cache})

    def forward(num_tokens: int) -> None:
        target(torch.randint(0, config.vocab_size, (1, num_tokens)), **{CACHE_NAME: cache})
        cache.crop(-num_tokens)

    drafter_cache = DynamicCache()
    states = torch.randn(1, CONTEXT, config.num_captured_states * config.target_hidden_size)
    ids = torch.randint(0, config.vocab_size, (1, CONTEXT))
    feedback = drafter(ids, aux_hidden_states=states, past_key_values=drafter_cache).feedback[:, -1:]

    def draft_step() -> None:
        drafter(ids[:, :1], hidden_states=feedback, past_key_values=drafter_cache)
        drafter_cache.crop(-1)

    print(
        f"CPU, {args.threads} threads, float32, context {CONTEXT}; Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}. Medians of {REPEATS}.\n"
    )
    print("| forward | ms |\n|---|---:|")
    for n in (1, 2, 3, 4, 5, 6, 8):
        print(f"| target, {n} tokens | {milliseconds(lambda n=n: forward(n)):.1f} |")
    print(f"| drafter, one draft step | {milliseconds(draft_step):.1f} |")


if __name__ == "__main__":
    main()
