"""D-Flash drafters (arXiv:2602.06036) beside the other drafter: in our loop, or as a check by their own code or the host's.

Drafters whose config we read run in our loop like any other. Of the rest, z-lab publishes some whose remote code has a
decode loop, `drafter.spec_generate(target=...)`, and from 5.23 on the host has one,
`generate(assistant_model=drafter, speculation_type="dflash")`, for drafters of its own architectures. Both decode one row
at a time.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, GenerationConfig, PreTrainedModel

from ..compat import CACHE_NAME
from ..drafters.blocks import drafts_blocks
from ..host.refusals import is_drafter_config
from ..modeling import CheckpointError

OWN_LOOP = {"target", "input_ids", "max_new_tokens", "stop_token_ids", "temperature"}  # z-lab/dflash:dflash/model.py
# Transformers 5.24 generation/candidate_generator.py:DFlashTokenCandidateGenerator
HOST_FORWARD = {"noise_embeds", "context_hidden_states", "position_ids", CACHE_NAME}
HOST_FIELDS = ("target_layer_ids", "block_size", "mask_token_id")
ONE_ROW = "D-Flash drafters decode one row at a time, by their own code and by the host's"


class Request(NamedTuple):
    """One prompt, and how it is continued."""

    inputs: dict[str, Tensor]  # input_ids [1, T]
    max_new_tokens: int
    temperature: float  # 0: greedy
    eos_token_ids: list[int]


Decode = Callable[[PreTrainedModel, Any, Request], Tensor]  # Any: a drafter, perhaps from remote code


def load_dflash(source: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A D-Flash drafter: ours where its config is one that we read, else with the code that its repository brings.

    Raises:
        ValueError: It cannot be loaded, or nothing here can run it.
    """
    try:
        if is_read(source):
            return AutoModel.from_pretrained(source, dtype=dtype).to(device).eval()
        drafter = AutoModel.from_pretrained(source, dtype=dtype, trust_remote_code=True)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"--dflash-drafter {source} cannot be loaded ({type(error).__name__}: {error}). {EXPECTED}"
        ) from error
    find_decode(drafter)
    return drafter.to(device).eval()


EXPECTED = (
    "Expected: a D-Flash drafter in a layout that AutoModel loads; or a repository or folder whose own code gives AutoModel "
    "a class with spec_generate(target=, input_ids=, max_new_tokens=, stop_token_ids=, temperature=), as z-lab publishes "
    "them; or, with Transformers 5.23 or newer, a drafter of the host's own whose config has target_layer_ids, block_size and mask_token_id."
)


def is_read(source: str) -> bool:
    """Whether `source` has a block drafter's config that we read."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        return False  # code of its own, or nothing: loading it says
    return drafts_blocks(config) and is_drafter_config(config)


def find_decode(drafter: PreTrainedModel) -> Decode:
    """The function that decodes with `drafter`.

    Raises:
        ValueError: Nothing here can.
    """
    own = getattr(drafter, "spec_generate", None)
    if own is not None and inspect.signature(own).parameters.keys() >= OWN_LOOP:
        return decode_by_own_code
    is_hosts = inspect.signature(drafter.forward).parameters.keys() >= HOST_FORWARD and all(
        getattr(drafter.config, name, None) is not None for name in HOST_FIELDS
    )
    if is_hosts and hasattr(GenerationConfig(), "speculation_type"):
        return decode_by_host
    raise ValueError(f"{type(drafter).__name__} is no D-Flash drafter that can run here. {EXPECTED}")


def decode(target: PreTrainedModel, drafter: PreTrainedModel, request: Request) -> Tensor:
    """[1, T + n]: the prompt and its continuation.

    Raises:
        ValueError: There is more than one row.
    """
    if len(request.inputs["input_ids"]) > 1:
        raise ValueError(ONE_ROW)
    return find_decode(drafter)(target, drafter, request)


def decode_by_own_code(target: PreTrainedModel, drafter: Any, request: Request) -> Tensor:  # Any: from remote code
    """By the loop that the drafter's own code brings."""
    options = {}
    if "mask_token_id" in inspect.signature(drafter.spec_generate).parameters:  # of the first releases
        mask = getattr(drafter, "mask_token_id", None)
        options["mask_token_id"] = drafter.config.dflash_config["mask_token_id"] if mask is None else mask
    return drafter.spec_generate(
        target=target,
        input_ids=request.inputs["input_ids"],
        max_new_tokens=request.max_new_tokens,
        stop_token_ids=request.eos_token_ids or None,
        temperature=request.temperature,
        **options,
    )


def decode_by_host(target: PreTrainedModel, drafter: PreTrainedModel, request: Request) -> Tensor:
    """By the host's assisted decoding."""
    temperature = request.temperature
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    return target.generate(
        **request.inputs,
        assistant_model=drafter,
        speculation_type="dflash",
        max_new_tokens=request.max_new_tokens,
        eos_token_id=request.eos_token_ids or None,
        repetition_penalty=1.0,
        **sampling,
    )
