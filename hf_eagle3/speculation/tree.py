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
    """Who sees whom among the T tokens of a block, and the n tokens of the same tree in the slots before it."""

    bits: Tensor  # [T] int64: bit j of token t is set if t sees token j, counted from the first of the tree
    depths: Tensor  # [n+T] int64: how many positions a token comes after the first

    @property
    def num_before(self) -> int:
        """The tokens n before the block; 0 if it holds the whole tree."""
        return len(self.depths) - len(self.bits)


def make_block_ancestry(num_tokens: int, device: torch.device) -> Ancestry:
    """Of a block whose tokens all see one another."""
    everyone = (1 << num_tokens) - 1
    bits = everyone if num_tokens < 64 else everyone - (1 << 64)  # as 64 bits with a sign hold it
    return Ancestry(torch.full((num_tokens,), bits, device=device), torch.arange(num_tokens, device=device))


class Level(NamedTuple):
    """A draft step: the nodes of one depth that have children, and the children."""

    num_before: int  # slots behind the pending states that earlier levels have written
    num_fed: int  # m, nodes with children; the root is fed with the pending states
    fed: Tensor | None  # [m] int64, where they are among the nodes of their depth; None: all
    parents: (
        Tensor | None
    )  # [m] int64, where the parent of each is among the nodes fed by the level before; None: alike
    ancestry: Ancestry | None  # of the nodes fed; None: each sees all that was fed before
    width: int  # most children of a node
    children: Tensor | None  # [n] int64, which of the m * width best each child is; None: all


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


class Descent(NamedTuple):
    """What finds the end of a path in a tree, by whether each draft token matches what the target says before it."""

    parents: Tensor  # [N] int64, the node before each draft token
    is_no_ancestor: Tensor  # [N+1, N] bool, whether node t does not follow draft token j, nor is it
    depths: Tensor  # [N+1] int64


@functools.cache  # graphs read these tensors for as long as they live
def make_descent(parents: tuple[int, ...], device: torch.device) -> Descent:
    """The tensors of a tree, once for each device."""
    N = len(parents)
    sees = [[bool(bits >> node & 1) for node in range(1, N + 1)] for bits in find_ancestors(parents)]
    with torch.inference_mode(False):
        return Descent(
            torch.tensor(parents, dtype=torch.long, device=device),
            ~torch.tensor(sees, device=device),
            torch.tensor(find_depths(parents), device=device),
        )


def find_children(parents: Sequence[int]) -> list[list[int]]:
    """[N+1] the children of the root and of each node; the first of them is the likeliest."""
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for node, parent in enumerate(parents, start=1):
        children[parent].append(node)
    return children


def find_heights(parents: Sequence[int]) -> list[int]:
    """[N+1] the nodes on the longest way down from the root and from each node."""
    heights = [0] * (len(parents) + 1)
    for node in range(len(parents), 0, -1):
        parent = parents[node - 1]
        heights[parent] = max(heights[parent], heights[node] + 1)
    return heights


def find_depth_order(parents: Sequence[int]) -> list[int]:
    """[N] the nodes but for the root, level by level, each behind the children of earlier parents."""
    children, level, order = find_children(parents), [ROOT], []
    while level := [child for node in level for child in children[node]]:
        order.extend(level)
    return order


def make_index(index: Sequence[int], size: int, device: torch.device) -> Tensor | None:
    """`index` as int64; None if it is 0..size-1."""
    return None if list(index) == list(range(size)) else torch.tensor(index, dtype=torch.long, device=device)


@functools.cache  # graphs read these tensors for as long as they live
def make_levels(parents: tuple[int, ...], device: torch.device) -> tuple[Level, ...]:
    """The draft steps of a tree, each over one level: as many as it is deep."""
    children = find_children(parents)
    levels: list[Level] = []
    nodes, before = [ROOT], [ROOT]  # of this depth, and those that were fed before
    bits: dict[int, int] = {ROOT: 0}  # of the nodes fed
    depths: list[int] = []  # of them, the root left out
    with torch.inference_mode(False):
        while fed := [node for node in nodes if children[node]]:
            num_before, depth = len(depths), len(levels)
            for node in fed if depth else []:
                bits[node] = bits[parents[node - 1]] | 1 << len(depths)
                depths.append(depth - 1)
            sees = [bits[node] for node in fed]
            is_causal = sees == [(1 << len(depths)) - 1]
            width = max(len(children[node]) for node in fed)
            best = [i * width + rank for i, node in enumerate(fed) for rank in range(len(children[node]))]
            levels.append(
                Level(
                    num_before=num_before,
                    num_fed=len(fed),
                    fed=make_index([nodes.index(node) for node in fed], len(nodes), device),
                    parents=make_index([before.index(parents[node - 1]) for node in fed], len(before), device)
                    if depth
                    else None,
                    ancestry=None
                    if is_causal
                    else Ancestry(
                        torch.tensor([to_bits(b) for b in sees], device=device), torch.tensor(depths, device=device)
                    ),
                    width=width,
                    children=make_index(best, len(fed) * width, device),
                )
            )
            nodes, before = [child for node in fed for child in children[node]], fed
    return tuple(levels)


@functools.cache  # graphs read these tensors for as long as they live
def make_node_order(parents: tuple[int, ...], device: torch.device) -> Tensor | None:
    """[N] int64, where each node is among all that are drafted level by level; None if it is there already."""
    order = find_depth_order(parents)
    with torch.inference_mode(False):
        return make_index([order.index(node) for node in range(1, len(order) + 1)], len(order), device)


@functools.cache  # graphs read these tensors for as long as they live
def make_ranks(parents: tuple[int, ...], width: int, device: torch.device) -> Tensor | None:
    """[N] int64, which of the `width` best of each depth a node is, those of one depth behind those of another."""
    depths, children = find_depths(parents), find_children(parents)
    ranks = [children[parent].index(node) for node, parent in enumerate(parents, start=1)]
    index = [(depths[node] - 1) * width + rank for node, rank in enumerate(ranks, start=1)]
    with torch.inference_mode(False):
        return make_index(index, max(depths) * width, device)
