"""Block drafters of random weights, and one that knows the texts."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.models import NUM_LAYERS, H, V, randomize
from hf_eagle3.modeling import DFlashDrafterConfig, DFlashDrafterModel

# The drafters in the field differ in these.
BLOCK_DRAFTERS: dict[str, dict] = {
    "dflash": {},
    "causal": {"is_causal": True},
    "windows": {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    "one_window": {"sliding_window": 5, "is_causal": True},
    "own_vocabulary": {"draft_vocab_size": 40, "share_lm_head": False, "has_own_embeddings": True},
    "dspark": {
        "drafts_from_root": True,
        "markov_rank": 6,
        "has_confidence_head": True,
        "confidence_reads_markov": True,
    },
    "gated": {"drafts_from_root": True, "markov_rank": 6, "markov_head_type": "gated"},
    "rnn": {"markov_rank": 6, "markov_head_type": "rnn", "draft_vocab_size": 40, "share_lm_head": False},
}


def block_config(**overrides) -> DFlashDrafterConfig:
    """A config that fits the tiny targets: blocks of 8, two layers."""
    sizes = {
        "hidden_size": H,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": V,
        "draft_vocab_size": V,
        "share_lm_head": True,
        "aux_layer_ids": [1, 4, NUM_LAYERS - 2],
        "mask_token_id": 61,
        "block_size": 8,
        "max_position_embeddings": 16,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return DFlashDrafterConfig(**{**sizes, **overrides})


def make_block_drafter(target: PreTrainedModel, kind: str = "dflash", **overrides) -> DFlashDrafterModel:
    """A drafter of random weights, bound to `target`."""
    return finish(DFlashDrafterModel, target, {**BLOCK_DRAFTERS[kind], **overrides})


def finish(cls: type, target: PreTrainedModel, overrides: dict):
    torch.manual_seed(1)
    drafter = cls(block_config(**overrides))
    if drafter.config.draft_vocab_size < V:
        return randomize(drafter).bind(target)
    d2t = drafter.d2t.clone()
    randomize(drafter)
    drafter.d2t.copy_(d2t)  # a head that is the target's has its vocabulary
    return drafter.bind(target)


class BlockOracle(DFlashDrafterModel):
    """Drafts what follows a token at its position in the texts it was told, and at some positions something else.

    Tables of tensors, so that its rounds can be captured.
    """

    def tell(self, texts: list[list[int]], *, wrong_share: float) -> "BlockOracle":
        follow = torch.zeros(512, V, dtype=torch.long)  # [P, V]
        for text in texts:
            follow[torch.arange(len(text) - 1), torch.tensor(text[:-1])] = torch.tensor(text[1:])
        is_wrong = torch.rand(512, generator=torch.Generator().manual_seed(7)) < wrong_share
        self.register_buffer("follow", follow.to(self.device), persistent=False)
        self.register_buffer("is_wrong", is_wrong.long().to(self.device), persistent=False)
        self.generation_config.decode_loop = "own"
        return self

    def forward(self, input_ids=None, *args, position_ids=None, **kwargs):
        out = super().forward(input_ids, *args, position_ids=position_ids, **kwargs)
        if kwargs.get("writes_only"):
            return out
        places = position_ids.expand_as(input_ids).clamp(max=len(self.follow) - 1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        known, logits = input_ids[:, 0], torch.zeros_like(out.logits)
        for n in range(input_ids.shape[1]):
            # Logits at a position are of the token behind it, or of its own, which the one before says.
            if n or self.config.drafts_from_root:
                at = places[:, n] - int(not self.config.drafts_from_root)
                known = self.follow[at, known]
                said = (known + self.is_wrong[(at * 5 + rows * 3) % len(self.is_wrong)]) % V
                logits[:, n] = logits[:, n].scatter(-1, said[:, None], 5.0)
        return out._replace(logits=logits)


def make_block_oracle(target, outputs: Tensor, batch: dict[str, Tensor], *, wrong_share: float = 0.4, **overrides):
    """An oracle of the rows of a batch and what the target said to them [B, S], bound to `target`."""
    T = batch["input_ids"].shape[1]
    texts = [
        [*ids[mask.bool()].tolist(), *row[T:].tolist()]
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], outputs, strict=True)
    ]
    return finish(BlockOracle, target, {**overrides, "draft_vocab_size": V}).tell(texts, wrong_share=wrong_share)
