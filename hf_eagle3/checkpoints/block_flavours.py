"""The published families of D-Flash and DSpark checkpoints: how each spells our config fields.

A flavour is a row of data; `blocks.py` reads by it. Tensors have our names in all of them, but for a prefix `model.`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SAME = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "attention_bias", "rms_norm_eps", "hidden_act"),
    *("initializer_range", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
)
SHARED: Mapping[str, str] = {
    **{key: key for key in SAME},
    "model_type": "target_model_type",  # configs are made from the target's
    "block_size": "block_size",
    "mask_token_id": "mask_token_id",
}
MARKOV: Mapping[str, str] = {
    "markov_rank": "markov_rank",
    "markov_head_type": "markov_head_type",
    "enable_confidence_head": "has_confidence_head",
    "confidence_head_with_markov": "confidence_reads_markov",
}
# Values that our network computes. Some configs are the target's with keys added, so its keys may ask for another network.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, 1.0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_sink_bias": (False, None),
    "use_attention_sink_bias": (False, None),
    "tie_word_embeddings": (False, True, None),  # it says how the target stores its head, and nothing of the drafter
}


@dataclass(frozen=True)
class BlockFlavour:
    """How one family spells what our config calls by our names.

    Attributes:
        name: Of the producer.
        matches: Whether a config.json is of this family.
        config_keys: Published key -> our field; keys of `table` as `table.KEY`.
        layer_ids: Published keys of the captured layers, the first that is there counts.
        spreads_layers: Layers that are not stated are spread over the target as z-lab does.
        ids_are_outputs: They name the outputs of layers, from 0, and -1 the embeddings: a boundary is one more.
        table: Whose keys are the drafter's own; "" if there is none.
        lifted: A table whose keys stand for those at the top.
        defaults: Our field -> what it means that no key is there for it.
        why_not: What of a config our network does not compute, in words; None if it does.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    config_keys: Mapping[str, str]
    layer_ids: tuple[str, ...]
    ids_are_outputs: bool
    spreads_layers: bool = False
    table: str = ""
    lifted: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    why_not: Callable[[Mapping[str, Any]], str | None] = lambda config: None  # noqa: ARG005  called as the others are


def names(config: Mapping[str, Any], word: str) -> bool:
    """Whether `architectures` has a word."""
    return word in str(config.get("architectures")).lower()


def why_not_gemma(config: Mapping[str, Any]) -> str | None:
    """DeepSpec's network for Gemma 4 has norms and a scale of embeddings that ours has not."""
    return "its network is Gemma 4's, with further norms" if names(config, "gemma4") else None


def why_not_mixed(config: Mapping[str, Any]) -> str | None:
    """Why not, if sliding layers are causal within the block, as speculators has them by default, and others are not."""
    kinds = set(config.get("layer_types") or ())
    if kinds == {"full_attention", "sliding_attention"} and not config.get("sliding_window_non_causal"):
        return "its sliding layers are causal within the block (sliding_window_non_causal is false) and its full ones are not"
    return None


BLOCK_FLAVOURS = (
    BlockFlavour(
        name="DSpark, speculators",
        matches=lambda config: config.get("speculators_model_type") == "dspark",
        config_keys={
            **SHARED,
            **MARKOV,
            "draft_vocab_size": "draft_vocab_size",
            "sample_from_anchor": "drafts_from_root",
        },
        layer_ids=("aux_hidden_state_layer_ids",),
        ids_are_outputs=False,
        lifted="transformer_layer_config",
        defaults={
            "drafts_from_root": True,
            "markov_rank": 256,
            "has_confidence_head": True,
            "confidence_reads_markov": True,
        },
        why_not=why_not_mixed,
    ),
    BlockFlavour(
        name="D-Flash, speculators",
        matches=lambda config: config.get("speculators_model_type") == "dflash",
        config_keys={**SHARED, "draft_vocab_size": "draft_vocab_size", "sample_from_anchor": "drafts_from_root"},
        layer_ids=("aux_hidden_state_layer_ids",),
        ids_are_outputs=False,
        lifted="transformer_layer_config",
        defaults={"drafts_from_root": False},
        why_not=why_not_mixed,
    ),
    BlockFlavour(
        name="DeepSpec",
        matches=lambda config: names(config, "dsparkmodel") and "target_layer_ids" in config,
        config_keys={**SHARED, **MARKOV},
        layer_ids=("target_layer_ids",),
        ids_are_outputs=True,
        defaults={"drafts_from_root": True},
        why_not=why_not_gemma,
    ),
    BlockFlavour(
        name="z-lab",
        matches=lambda config: "dflash_config" in config or names(config, "dflashdraftmodel"),
        config_keys={
            **SHARED,
            "causal": "is_causal",
            "sample_from_anchor": "drafts_from_root",
            **{
                f"dflash_config.{key}": ours
                for key, ours in (
                    ("block_size", "block_size"),
                    ("mask_token_id", "mask_token_id"),
                    ("causal", "is_causal"),
                    ("sample_from_anchor", "drafts_from_root"),
                )
            },
        },
        layer_ids=("dflash_config.target_layer_ids", "target_layer_ids"),
        ids_are_outputs=True,
        spreads_layers=True,
        table="dflash_config",
        defaults={"drafts_from_root": False},
    ),
)


def find_block_flavour(config: Mapping[str, Any]) -> BlockFlavour | None:
    """The family that a config.json is of; None if it is no block drafter's."""
    return next((flavour for flavour in BLOCK_FLAVOURS if flavour.matches(config)), None)
