"""D-Flash and DSpark drafters as engines read them: z-lab's, DeepSpec's and speculators' layouts.

z-lab's has neither embeddings nor a head, DeepSpec's has the target's whole ones, speculators' what the drafter has. The
methods are those of SGLang 0.5.23 and vLLM 0.33.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..console.quoting import quote_shell
from ..modeling import DFlashDrafterConfig, DFlashDrafterModel
from .engines import SGLANG, SPECULATORS, VLLM, Target


def make_layer_config(config: DFlashDrafterConfig) -> dict[str, Any]:
    """The keys that describe the layers, as a Qwen3 config has them."""
    n = config.num_hidden_layers
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    rope = dict(config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0})
    return {
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": n,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.hidden_act,
        "attention_bias": config.attention_bias,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_parameters": rope,
        "layer_types": list(config.layer_types or [kind] * n),
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "tie_word_embeddings": False,
    }


def list_outputs(config: DFlashDrafterConfig) -> list[int]:
    """The layers whose outputs are read, -1 for the embeddings."""
    return [boundary - 1 for boundary in config.aux_layer_ids or ()]


def make_zlab_config(config: DFlashDrafterConfig, target: Target) -> dict[str, Any]:
    """config.json as z-lab publishes it."""
    nested = {"target_layer_ids": list_outputs(config), "mask_token_id": config.mask_token_id}
    if config.is_causal:
        nested["causal"] = True
    return {
        "architectures": ["DFlashDraftModel"],
        **make_layer_config(config),
        "block_size": config.block_size,
        "dflash_config": nested,
        **({"num_target_layers": target.num_layers} if target.num_layers is not None else {}),
        "dtype": str(config.dtype).removeprefix("torch."),
    }


def make_deepspec_config(config: DFlashDrafterConfig, target: Target) -> dict[str, Any]:
    """config.json as DeepSpec writes it."""
    return {
        "architectures": ["Qwen3DSparkModel"],
        **make_layer_config(config),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list_outputs(config),
        "num_anchors": 512,  # of a training step; its reader wants the key
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.has_confidence_head,
        "confidence_head_with_markov": config.confidence_reads_markov,
        **({"num_target_layers": target.num_layers} if target.num_layers is not None else {}),
        "dtype": str(config.dtype).removeprefix("torch."),
    }


def make_speculators_config(config: DFlashDrafterConfig, target: Target) -> dict[str, Any]:
    """config.json as speculators writes it, with its defaults for how many tokens are drafted."""
    is_dspark = config.markov_rank > 0 or config.has_confidence_head
    algorithm = "dspark" if is_dspark else "dflash"
    markov = {
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.has_confidence_head,
        "confidence_head_with_markov": config.confidence_reads_markov,
    }
    return {
        "architectures": ["DSparkSpeculator" if is_dspark else "DFlashSpeculator"],
        "speculators_model_type": algorithm,
        "transformer_layer_config": make_layer_config(config),
        "draft_vocab_size": config.draft_vocab_size,
        "block_size": config.block_size,
        "target_hidden_size": config.target_hidden_size,
        "aux_hidden_state_layer_ids": list(config.aux_layer_ids or ()),
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.drafts_from_root,
        "sliding_window_non_causal": config.sliding_window is not None and not config.is_causal,
        **(markov if is_dspark else {}),
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": config.max_draft_depth},
            ],
            "verifier": {"name_or_path": target.name, "architectures": target.architectures or []},
        },
        "dtype": str(config.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class Layout:
    """How one producer writes block drafters."""

    make_config: Callable[[DFlashDrafterConfig, Target], dict[str, Any]]
    stores_vocabulary: bool | None  # embeddings and head: the target's whole ones, none, or (None) the drafter's own


ZLAB, DEEPSPEC = (
    Layout(make_zlab_config, stores_vocabulary=False),
    Layout(make_deepspec_config, stores_vocabulary=True),
)
OF_SPECULATORS = Layout(make_speculators_config, stores_vocabulary=None)


def find_layout(config: DFlashDrafterConfig, engine: str) -> Layout:
    """The layout that an engine reads a drafter of this config in."""
    if engine == SPECULATORS:
        return OF_SPECULATORS
    return DEEPSPEC if config.drafts_from_root else ZLAB


def list_borrowed(config: DFlashDrafterConfig, engine: str) -> list[str]:
    """Which of `embed_tokens` and `lm_head` the layout for an engine stores and the drafter borrows."""
    if not find_layout(config, engine).stores_vocabulary:
        return []
    owns = {"embed_tokens": config.has_own_embeddings, "lm_head": not config.share_lm_head}
    return [name for name, is_own in owns.items() if not is_own]


def copy_borrowed(drafter: DFlashDrafterModel, engine: str) -> dict[str, Tensor]:
    """The target's tensors that the layout for an engine holds, on the CPU; `drafter` has what `list_borrowed` names."""
    weights = {
        name: drafter._weight(name)[: drafter.config.vocab_size] for name in list_borrowed(drafter.config, engine)
    }
    return {
        f"{name}.weight": weight.detach().cpu().to(drafter.dtype).contiguous().clone()
        for name, weight in weights.items()
    }


def refuse_vocabulary(names: list[str], theirs: Mapping[str, Tensor], config: DFlashDrafterConfig) -> None:
    """Raise if `theirs` lacks one of `names`, or has one of another target.

    Raises:
        ValueError: So it is.
    """
    for name in names:
        if name not in theirs:
            raise ValueError(
                f"This layout holds the target's own {name}, which this drafter borrows: give the target as a model or as a "
                "folder with its weights (target=..., --target FOLDER)."
            )
        shape = tuple(theirs[name].shape)
        if shape[0] < config.vocab_size or shape[1] != config.hidden_size:
            raise ValueError(
                f"The target's {name} is {list(shape)}, and this drafter borrows one of at least {config.vocab_size} tokens "
                f"and width {config.hidden_size}: it was made for another target."
            )


def make_block_command(config: DFlashDrafterConfig, folder: Path, engine: str, target: Target) -> str:
    """The line that serves an exported folder."""
    name, here = quote_shell(target.name or "TARGET"), quote_shell(str(folder))
    is_dspark = find_layout(config, engine) is DEEPSPEC
    if engine == SGLANG:
        return (
            f"python -m sglang.launch_server --model-path {name} --speculative-algorithm "
            f"{'DSPARK' if is_dspark else 'DFLASH'} --speculative-draft-model-path {here}"
        )
    if engine == VLLM:
        speculation: Mapping[str, Any] = {
            "method": "dspark" if is_dspark else "dflash",
            "model": str(folder),
            "num_speculative_tokens": config.max_draft_depth,
        }
        return f"vllm serve {name} --speculative-config {quote_shell(json.dumps(speculation))}"
    return f"vllm serve {here}"
