"""A trial before states are stored: the head on stored states must give the target's argmax."""

import numpy as np
import torch
from torch import Tensor

from ..data.token_rows import TokenDataset
from .folder import stored_positions
from .online import OnlineStates

SAMPLE, SAMPLE_TOKENS, SAMPLE_POSITIONS = 16, 8192, 256  # documents, tokens, and positions of one document
AGREEMENT = 0.999  # the share of positions where the argmax must be the target's


def refuse_head_without_weight(source: OnlineStates) -> None:
    """Raise ValueError for a target whose head is more than a linear layer."""
    if source.head.weight is None:
        raise ValueError(
            f"The head of {type(source.target).__name__} is more than a plain linear layer over the last hidden states, so "
            f"logits of its whole vocabulary ({source.head.vocab_size} a token) would have to be stored. Train with the target "
            "in the loop instead (Eagle3Trainer with target_model)."
        )


@torch.no_grad()
def check_head_on_sample(source: OnlineStates, dataset: TokenDataset, lengths: np.ndarray, dtype: torch.dtype) -> None:
    """Compare the head on states in `dtype` with the target's own logits, on the shortest documents of `dataset`.

    Args:
        source: Runs the target.
        dataset: Documents.
        lengths: [D], of each document.
        dtype: The dtype of the stored states.

    Raises:
        ValueError: Their argmaxes differ.
    """
    target = source.target
    right = total = tokens = 0
    for i in np.argsort(lengths, kind="stable")[:SAMPLE]:
        row = dataset[int(i)]
        tokens += len(row["input_ids"])
        if total and tokens > SAMPLE_TOKENS:
            break
        ids = torch.from_numpy(np.asarray(row["input_ids"], dtype=np.int64))
        positions = torch.from_numpy(stored_positions(np.asarray(row["loss_mask"], dtype=bool))[:SAMPLE_POSITIONS])
        is_right, is_known = _agreement(source, ids, positions.to(target.device), dtype)
        right += int((is_right & is_known).sum())
        total += int(is_known.sum())
    if right < AGREEMENT * total:
        raise ValueError(
            f"The head of {type(target).__name__} on its last hidden states in {dtype} says what the target says "
            f"at {right} of {total} sampled positions, expected {AGREEMENT:.1%}. Store them in the target's own dtype, "
            f"{target.dtype}; if they are, please report it with the target's name."
        )


def _agreement(source: OnlineStates, ids: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n] bool at `positions`: whether the argmaxes agree, and whether the target's logits are finite.

    Documents that are not finite are found later, one by one. Either of two tied argmaxes is right.
    """
    target = source.target
    last = source.run([ids], target.device).last_hidden_states
    refuse_head_without_weight(source)
    ours = torch.cat([tile for _, tile in source.head.tiles(last[positions].to(dtype))], dim=-1)
    here = ids.to(target.device)[None]
    logits = target(input_ids=here, use_cache=False, logits_to_keep=positions).logits[0]
    theirs = logits[:, : ours.shape[1]].to(ours.dtype)
    chosen = theirs.gather(1, ours.argmax(-1, keepdim=True))[:, 0]
    rounding = 2 * torch.finfo(dtype).eps * theirs.abs().amax(-1)
    return chosen >= theirs.amax(-1) - rounding, theirs.isfinite().all(-1)
