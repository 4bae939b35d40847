"""An engine of rows, without `generate`."""

import torch
from transformers import DynamicCache, GenerationConfig

from helpers.batches import pad
from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.decoding.engine import Engine, Room


def run_rows(target, drafter, prompts, rows, config, **options):
    """Let an engine decode `prompts` [1, T_b] as `rows` until all are done; how it ran."""
    batch = pad(prompts)
    mask = batch["attention_mask"].bool()
    room = Room(len(rows), int(mask.sum(-1).max()), rows[0].max_new)
    inputs = {
        "attention_mask": batch["attention_mask"],
        "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0),
        CACHE_NAME: DynamicCache(config=target.config),
        "use_cache": True,
    }
    with torch.no_grad(), Engine(target, drafter.bind(target), config, room, **options) as engine:
        prompt = engine.prefill(batch["input_ids"], mask, inputs, GenerationConfig())
        engine.admit(rows, prompt)
        while any(row.is_live for row in rows):
            engine.round()
        return engine.graphs
