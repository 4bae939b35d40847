"""The target and the drafter that a command names."""

import argparse
from typing import NamedTuple

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as host_logging

from ..console.devices import choose_device, choose_dtype
from ..console.opening import opening, refuse_drafter, refuse_target
from ..console.progress import Progress
from ..host.refusals import refuse_other_models


class Pair(NamedTuple):
    """A target and its drafter, ready to generate."""

    target: PreTrainedModel
    drafter: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_pair(args: argparse.Namespace, step: Progress) -> Pair:
    """What `--target`, `--drafter`, `--device`, `--device-map` and `--dtype` name.

    Raises:
        ValueError: They are not there, or something else; the message names the option.
    """
    host_logging.disable_progress_bar()
    device = choose_device(args.device, args.device_map)
    refuse_drafter("--drafter", args.drafter)
    refuse_target("--target", args.target)
    with step.aside(f"Loading {args.target}"), opening("--target", args.target):
        tokenizer = AutoTokenizer.from_pretrained(args.target)
        target = AutoModelForCausalLM.from_pretrained(
            args.target, dtype=choose_dtype(args.dtype, device), device_map=args.device_map or device
        ).eval()
    with step.aside(f"Loading {args.drafter}"), opening("--drafter", args.drafter):
        drafter = AutoModel.from_pretrained(args.drafter, dtype=target.dtype, device_map={"": target.device}).eval()
    refuse_other_models(drafter, args.drafter)
    return Pair(target, drafter, tokenizer)
