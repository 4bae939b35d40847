"""The geometry of a draft: who follows whom, as parents, depths, ancestors and paths.

Nodes are numbered in the order of their slots: 0 is the root, the newest verified token; the draft tokens follow, each
behind its parent. A node sees its ancestors and itself, which is one int64 of bits a node.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = 0
MAX_NODES = 63  # draft tokens, so that the root and they fit into the bits of an int64


class Ancestry(NamedTuple):
    """Who sees whom among the T tokens of a block that is no chain."""

    bits: Tensor  # [T] int64: bit j of token t is set if t sees token j
    depths: Tensor  # [T] int64: how many positions a token comes after the first


def find_depths(parents: Sequence[int]) -> list[int]:
    """[N+1] the depth of the root and of each node."""
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    return depths


def find_ancestors(parents: Sequence[int]) -> list[int]:
    """[N+1] for the root and each node the bits of its ancestors, its own included."""
    bits = [1]
    for node, parent in enumerate(parents, start=1):
        bits.append(bits[parent] | 1 << node)
    return bits


def find_paths(parents: Sequence[int]) -> list[list[int]]:
    """[N+1][D+1] for the root and each node the way from the root to it; its last entry repeats up to the depth D."""
    paths = [[ROOT]]
    for node, parent in enumerate(parents, start=1):
        paths.append([*paths[parent], node])
    longest = max(map(len, paths))
    return [path + path[-1:] * (longest - len(path)) for path in paths]


def to_bits(bits: int) -> int:
    """The int64 with the same 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits


@functools.cache  # graphs read these tensors for as long as they live
def make_ancestry(parents: tuple[int, ...], device: torch.device) -> Ancestry:
    """The tensors of a tree, once for each device: graphs read them where they lie."""
    with torch.inference_mode(False):
        bits = torch.tensor([to_bits(b) for b in find_ancestors(parents)], device=device)
        return Ancestry(bits, torch.tensor(find_depths(parents), device=device))


@functools.cache  # graphs read these tensors for as long as they live
def make_paths(parents: tuple[int, ...], device: torch.device) -> Tensor:
    """[N+1, D+1] int64, `find_paths` as a tensor."""
    with torch.inference_mode(False):
        return torch.tensor(find_paths(parents), device=device)
