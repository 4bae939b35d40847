"""Loading a published drafter of the 8B shape against a bare read of its file: time, and memory at the peak.

Random bfloat16 weights in SpecForge's layout, 850 MB. The bare read is `safetensors.torch.load_file` and a copy of each
tensor, since without a copy nothing is read. Both take turns in one process, the file in the page cache. First the loaded
weights are compared with those of the file.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import hf_eagle3  # noqa: F401  its import is what makes AutoModel know drafters

H, I, HEADS, KV_HEADS, HEAD_DIM, V, V_D = 4096, 14336, 32, 8, 128, 128256, 32000


def write(folder: Path) -> Path:
    """A drafter for Llama-3.1-8B as SpecForge publishes one; the weight file."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": I,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": V,
        "draft_vocab_size": V_D,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "fc": (H, 3 * H),
        "midlayer.self_attn.q_proj": (HEADS * HEAD_DIM, 2 * H),
        "midlayer.self_attn.k_proj": (KV_HEADS * HEAD_DIM, 2 * H),
        "midlayer.self_attn.v_proj": (KV_HEADS * HEAD_DIM, 2 * H),
        "midlayer.self_attn.o_proj": (H, HEADS * HEAD_DIM),
        "midlayer.mlp.gate_proj": (I, H),
        "midlayer.mlp.up_proj": (I, H),
        "midlayer.mlp.down_proj": (H, I),
        **{f"midlayer.{n}": (H,) for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
        "norm": (H,),
        "lm_head": (V_D, H),
    }
    weights = {f"{name}.weight": torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    used = torch.arange(V_D) * 4
    weights |= {"d2t": used - torch.arange(V_D), "t2d": torch.isin(torch.arange(V), used)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("This system does not tell RssAnon.")


def measure(work: Callable[[], Any]) -> tuple[float, int]:  # Any: kept alive while measured
    """Seconds, and bytes at the peak over those before."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    peak = max(peak, anonymous_bytes())
    del result
    return seconds, peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write the drafter (a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        file = write(args.folder or Path(temporary))
        size = file.stat().st_size
        drafter, stored = AutoModel.from_pretrained(file.parent), load_file(file)
        loaded = {n.replace("layers.0.", "midlayer."): t for n, t in drafter.state_dict().items()}
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items() if name != "t2d")
        del drafter, stored, loaded

        kinds: dict[str, Callable[[], Any]] = {
            "bare read": lambda: {name: tensor.clone() for name, tensor in load_file(file).items()},
            "from_pretrained": lambda: AutoModel.from_pretrained(file.parent),
            "bare read, float16": lambda: {name: tensor.half() for name, tensor in load_file(file).items()},
            "from_pretrained, float16": lambda: AutoModel.from_pretrained(file.parent, dtype=torch.float16),
        }
        runs: dict[str, list[tuple[float, int]]] = {kind: [] for kind in kinds}
        for _ in range(args.repeats):
            for kind, work in kinds.items():
                runs[kind].append(measure(work))
    print(f"{size / 1e6:.0f} MB, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for kind, results in runs.items():
        seconds = sorted(s for s, _ in results)
        print(
            f"{kind:24} {statistics.median(seconds):6.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), "
            f"peak {max(b for _, b in results) / size:.3f} of the file"
        )
    medians = [statistics.median(s for s, _ in results) for results in runs.values()]
    print(f"ratio of medians {medians[1] / medians[0]:.2f}, in float16 {medians[3] / medians[2]:.2f}")


if __name__ == "__main__":
    main()
