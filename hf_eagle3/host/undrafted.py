"""Our decode loop without a drafter: plain decoding in captured rounds."""

from typing import Any

from transformers import PreTrainedModel

from ..decoding.captured import CudaGraphs
from ..decoding.preparation import find_asked, find_switch
from .loop_choice import why_not_target
from .refusals import why_not_drafted


def decode_plainly(target: PreTrainedModel) -> dict[str, Any]:
    """What to give `target.generate` so that our loop decodes without drafting.

    An empty dict where stock `generate` is as fast: for a target that our loop does not take, or whose rounds run eagerly
    on a GPU.
    """
    if target.config.is_encoder_decoder or any(p.is_meta for p in target.parameters()) or why_not_drafted(target):
        return {}
    is_slow = target.device.type != "cpu" and CudaGraphs().why_not(target, None) is not None
    switch = find_switch(target)
    is_lost = switch is not None and not switch.computes_anew  # which our loop refuses to follow
    if is_slow or is_lost or find_asked(target) is not None or why_not_target(target) is not None:
        return {}
    return {"decode_loop": "own"}
