"""The model card of a published drafter, filled in from the drafter itself."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..console.quoting import is_model_name, is_repository, quote_markdown, quote_python
from ..modeling import Eagle3DrafterModel
from ..modeling.text_eagle3 import show
from .engines import ENGINES, HF, Target, find_refusals

CARD = """---
{data}
---

# {title}

An {kind} drafter for {link}: it proposes tokens, the target checks them, and the text is the target's own, sooner. Made for [hf-eagle3](https://pypi.org/project/hf-eagle3/).

## Use

```python
import hf_eagle3  # pip install hf-eagle3
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({target})
target = AutoModelForCausalLM.from_pretrained({target}, dtype="auto", device_map="auto")
drafter = AutoModel.from_pretrained({name}, dtype=target.dtype, device_map="auto")
inputs = tokenizer("The capital of France is", return_tensors="pt").to(target.device)
out = target.generate(**inputs, assistant_model=drafter, max_new_tokens=128)
print(tokenizer.decode(out[0], skip_special_tokens=True))
```

## The drafter

| | |
|---|---|
{facts}
{measured}"""
MEASURED = """
## Measured

| | |
|---|---:|
{rows}
"""


def write_card(
    drafter: Eagle3DrafterModel,
    folder: Path,
    *,
    target: Target,
    metrics: Mapping[str, float],
    name: str,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md.

    Args:
        drafter: Whose card it is.
        folder: Where to.
        target: What it drafts for, by name.
        metrics: Name -> value, as measured. The card has no such section without them.
        name: What a reader loads: the repository, or the folder.
        metadata: More keys for the Hub, such as `license`.

    Raises:
        ValueError: `metrics` are not names and numbers.
    """
    check_metrics(metrics)
    config = drafter.config
    is_31 = config.fc_norm or config.norm_output
    title = name.rstrip("/").split("/")[-1]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name="prompts",
            metric_type=label.lower().replace(" ", "_"),
            metric_name=label,
            metric_value=value,
        )
        for label, value in metrics.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=target.name if is_model_name(target.name or "") else None,
        tags=["eagle3", *(["eagle3.1"] if is_31 else []), "speculative-decoding", "assisted-generation", "hf-eagle3"],
        model_name=title if results else None,
        eval_results=results or None,
        **(metadata or {}),
    )
    measured = MEASURED.format(
        rows="\n".join(f"| {quote_markdown(label)} | {value:g} |" for label, value in metrics.items())
    )
    text = CARD.format(
        data=data.to_yaml(),
        title=quote_markdown(title),
        kind="EAGLE-3.1" if is_31 else "EAGLE-3",
        link=link_target(target.name),
        target=quote_python(str(target.name)),
        name=quote_python(name),
        facts="\n".join(f"| {label} | {value} |" for label, value in list_facts(drafter, target).items()),
        measured=measured if metrics else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise ValueError unless `metrics` are names and finite numbers."""
    if not isinstance(metrics, Mapping):
        raise ValueError(f"metrics must be a table from name to number, got {show(metrics)}.")
    for label, value in metrics.items():
        if not isinstance(label, str) or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"metrics must be a table from name to number, got {show(label)}: {show(value)}.")
        if not abs(value) < math.inf:
            raise ValueError(f"metrics: {show(label)} is {value}. Give a number that was measured, or leave it out.")


def link_target(name: str | None) -> str:
    """The target's name, as a link where it can be a repository."""
    name = str(name)
    return f"[{name}](https://huggingface.co/{name})" if is_repository(name) else quote_markdown(name)


def list_facts(drafter: Eagle3DrafterModel, target: Target) -> dict[str, str]:
    """What there is to say of a drafter, as label -> text."""
    config = drafter.config
    if not config.use_aux_hidden_state:
        reads = "the final state, normed"
    elif target.num_layers is not None:
        reads = f"boundaries {list(config.resolve_aux_layer_ids(target.num_layers))}"
    else:
        ids = config.aux_layer_ids
        reads = f"boundaries {list(ids)}" if ids else "boundaries 2, n // 2 and n - 3 of n layers"
    served = [title for engine, title in ENGINES.items() if engine != HF and not find_refusals(config, engine)]
    parameters = sum(parameter.numel() for parameter in drafter.parameters())
    return {
        "Parameters": f"{parameters / 1e6:.1f} million, {str(drafter.dtype).removeprefix('torch.')}",
        "Layers, width": f"{config.num_hidden_layers}, {config.hidden_size}",
        "Attention": "multi-head latent (MLA)" if config.is_latent else "Llama's",
        "Reads from the target": reads,
        "Draft vocabulary": f"{config.draft_vocab_size:,} of {config.vocab_size:,} tokens",
        "Trained positions": f"{config.max_position_embeddings:,}",
        "Can be exported to": ", ".join(served) or "no other engine",
    }
