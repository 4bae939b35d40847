"""`hf-eagle3 env`: versions, for bug reports."""

import argparse
import os
import platform

from .. import __version__
from ..console.installed import installed_version
from ..console.terminal import say, say_json
from .arguments import Parser, add_json

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "numpy")
OPTIONAL_PACKAGES = ("gguf", "datasets", "flash-attn", "triton", "peft", "bitsandbytes")


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 env`."""
    parser.description = "Print versions and devices, for bug reports."
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the environment; exit status 0."""
    facts = describe_environment()
    if args.json:
        say_json(facts)
    else:
        say("\n".join(f"{name}: {'not installed' if value is None else value}" for name, value in facts.items()))
    return 0


def describe_environment() -> dict[str, str | None]:
    """The facts that a bug report needs; None for a package that is not installed."""
    import torch

    facts: dict[str, str | None] = {
        "hf-eagle3": __version__,
        "Python": platform.python_version(),
        "Platform": platform.platform(),
        **{name: installed_version(name) for name in PACKAGES + OPTIONAL_PACKAGES},
        "CUDA (torch)": str(torch.version.cuda),
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
    }
    return facts | {f"GPU {i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
