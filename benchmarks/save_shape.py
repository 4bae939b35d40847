"""Write a known shape with random weights as a folder, for what must be loaded: targets in parts.

python benchmarks/save_shape.py llama-3.1-8b DIR
"""

import argparse
from pathlib import Path

import torch

from hf_eagle3.bench.shapes import SHAPES, make_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_target(args.shape, device=device, dtype=torch.bfloat16).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
