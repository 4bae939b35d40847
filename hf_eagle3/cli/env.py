"""`hf-eagle3 env`: versions, for bug reports."""

import argparse
import os
import platform

import torch

from .. import __version__
from ..compat import installed_version
from ..console.terminal import say
from .arguments import Commands

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "numpy")
OPTIONAL_PACKAGES = ("gguf", "datasets", "flash-attn", "triton", "peft", "bitsandbytes")


def add_env_parser(commands: Commands) -> None:
    """`hf-eagle3 env` has no options."""
    parser = commands.add_parser("env", help="print versions, for bug reports")
    parser.set_defaults(run=run_env_command)


def run_env_command(_: argparse.Namespace) -> int:
    """Print the environment; exit status 0."""
    say(describe_environment())
    return 0


def describe_environment() -> str:
    """The facts that a bug report needs, as lines of `name: value`."""
    facts = {
        "hf-eagle3": __version__,
        "Python": platform.python_version(),
        "Platform": platform.platform(),
        **{name: installed_version(name) or "not installed" for name in PACKAGES + OPTIONAL_PACKAGES},
        "CUDA (torch)": str(torch.version.cuda),
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
    }
    for i in range(torch.cuda.device_count()):
        facts[f"GPU {i}"] = torch.cuda.get_device_name(i)
    return "\n".join(f"{name}: {value}" for name, value in facts.items())
