"""Configuration of a D-Flash or DSpark drafter.

Copied into every published drafter of this kind and run from there with `trust_remote_code=True`: it imports nothing but
Transformers, huggingface_hub and its siblings.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .fields_dflash import FIELD_NAMES, DFlashFields
from .strict_eagle3 import StrictConfig


@strict
class DFlashDrafterConfig(StrictConfig, DFlashFields, PreTrainedConfig):
    r"""Sizes and switches of a D-Flash drafter (arXiv:2602.06036) or a DSpark drafter (arXiv:2607.05147).

    Every size must be given, and keys that are not known are refused, as with `Eagle3DrafterConfig`; fields that are not
    listed here mean what they do there.

    Args:
        block_size (`int`): Tokens of a block: the newest token of the text, the root, and mask tokens behind it.
        mask_token_id (`int`): What every other position of a block reads.
        drafts_from_root (`bool`): The output at the root proposes the token behind it, as in DSpark, so that a block of B
            drafts B tokens. False: each mask position proposes its own token, and a block drafts B - 1.
        is_causal (`bool`): A position of a block sees those before it only. False: all of its block.
        aux_layer_ids (`list[int]`): The boundaries that the target's states are taken at, ascending.
        sliding_window (`int`, *optional*): A position p of sliding layers sees keys j > p - sliding_window.
        layer_types (`list[str]`, *optional*): "full_attention" or "sliding_attention" for each layer. Null: all alike,
            sliding where `sliding_window` is given.
        markov_rank (`int`): r, the rank of DSpark's Markov head, which adds to the logits of a position what the token
            before it says. 0: none.
        markov_head_type (`str`): "vanilla" reads that token, "gated" the position's output as well, and "rnn" also all
            tokens of the block before.
        has_confidence_head (`bool`): There is a head that estimates how likely each draft token is accepted.
        confidence_reads_markov (`bool`): It reads the Markov head's embedding of the token before, too.
    """

    model_type = DFlashFields.model_type
    field_names = FIELD_NAMES
