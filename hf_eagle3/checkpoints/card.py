"""The model card of a published drafter, filled in from the drafter itself."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from ..console.quoting import is_repository, quote_markdown, quote_python
from ..modeling import DrafterModel
from ..modeling.text_eagle3 import show
from .engines import ENGINES, HF, Target, find_refusals

CARD = """---
{data}
---

# {title}

{kind} for {target}: it proposes tokens, the target checks them, and the text is the target's own, sooner. Made for [hf-eagle3](https://pypi.org/project/hf-eagle3/).

## Use

```python
{snippet}
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
ADAPT = "drafter = PeftModel.from_pretrained(drafter, {}).merge_and_unload()"
DRAFT = """inputs = tokenizer("The capital of France is", return_tensors="pt").to(target.device)
out = target.generate(**inputs, assistant_model=drafter, max_new_tokens=128)
print(tokenizer.decode(out[0], skip_special_tokens=True))"""


class Adapters(NamedTuple):
    """Adapters of PEFT that a folder has in the place of a drafter."""

    kind: str  # PEFT's name for it, such as LORA
    num_parameters: int
    drafter_name: str | None  # the drafter that they adapt, if it was loaded by name


def write_card(
    drafter: DrafterModel,
    folder: Path,
    *,
    target: Target,
    metrics: Mapping[str, float],
    name: str,
    metadata: Mapping[str, Any] | None = None,
    adapters: Adapters | None = None,
) -> None:
    """Write README.md.

    Args:
        drafter: Whose card it is, or whose adapters'.
        folder: Where to.
        target: What it drafts for.
        metrics: Name -> value, as measured. The card has no such section without them.
        name: What a reader loads: the repository, or the folder.
        metadata: More keys for the Hub, such as `license`.
        adapters: What the folder has instead of the drafter, if it has not the drafter.

    Raises:
        ValueError: `metrics` are not names and numbers.
    """
    check_metrics(metrics)
    config = drafter.config
    is_eagle = config.family == "EAGLE-3"
    is_31 = is_eagle and (config.fc_norm or config.norm_output)
    title = name.rstrip("/").split("/")[-1]
    results = list_results(metrics)
    made_from = target.name if adapters is None else adapters.drafter_name
    data = ModelCardData(
        library_name="transformers" if adapters is None else "peft",
        pipeline_tag="text-generation",
        base_model=made_from if is_on_hub(made_from) else None,
        tags=[
            config.family.lower().replace("-", ""),
            *(["eagle3.1"] if is_31 else []),
            "speculative-decoding",
            "assisted-generation",
            "hf-eagle3",
        ],
        model_name=title if results else None,
        eval_results=results or None,
        **(metadata or {}),
    )
    measured = MEASURED.format(
        rows="\n".join(f"| {quote_markdown(label)} | {value:g} |" for label, value in metrics.items())
    )
    kind = f"{'An' if is_eagle else 'A'} {'EAGLE-3.1' if is_31 else config.family} drafter"
    if adapters is not None:
        kind = f"Adapters ({adapters.kind}) of {', '.join(filter(None, [link(made_from), kind.replace('An', 'an')]))}"
    text = CARD.format(
        data=data.to_yaml(),
        title=quote_markdown(title),
        kind=kind,
        target=link(target.name) or describe_kind(target),
        snippet=make_snippet(target, name, adapters),
        facts="\n".join(f"| {label} | {value} |" for label, value in list_facts(drafter, target, adapters).items()),
        measured=measured if metrics else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def list_results(metrics: Mapping[str, float]) -> list[EvalResult]:
    """Metrics as the Hub's cards keep them."""
    return [
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


def is_on_hub(name: str | None) -> bool:
    """Whether `name` can be a repository on the Hub, and is no folder here."""
    return name is not None and is_repository(name) and not Path(name).exists()


def link(name: str | None) -> str | None:
    """The name of a repository, as a link; None if it is none."""
    return f"[{name}](https://huggingface.co/{name})" if is_on_hub(name) else None


def describe_kind(target: Target) -> str:
    """A target without a name on the Hub, in words."""
    kind = "one target" if target.model_type is None else f"a {quote_markdown(target.model_type)} model"
    return kind if target.num_layers is None else f"{kind} of {target.num_layers} layers"


def make_snippet(target: Target, name: str, adapters: Adapters | None) -> str:
    """Lines of Python that draft. What has no name, not even that of a folder, is a comment."""
    adapted = name if adapters is None else adapters.drafter_name
    load = {
        "tokenizer": "AutoTokenizer.from_pretrained({})",
        "target": 'AutoModelForCausalLM.from_pretrained({}, dtype="auto", device_map="auto")',
        "drafter": 'AutoModel.from_pretrained({}, dtype=target.dtype, device_map="auto")',
    }
    names = {"tokenizer": target.name, "target": target.name, "drafter": adapted}
    loaded = [f"{it} = {load[it].format(quote_python(at))}" for it, at in names.items() if at is not None]
    unnamed = [it for it, at in names.items() if at is None]
    return "\n".join(
        [
            "import hf_eagle3  # pip install hf-eagle3",
            *([] if adapters is None else ["from peft import PeftModel"]),
            "from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer",
            "",
            *([f"# {' and '.join(unnamed)}: loaded as they were for training"] if unnamed else []),
            *loaded,
            *([] if adapters is None else [ADAPT.format(quote_python(name))]),
            DRAFT,
        ]
    )


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise ValueError unless `metrics` are names and finite numbers."""
    if not isinstance(metrics, Mapping):
        raise ValueError(f"metrics must be a table from name to number, got {show(metrics)}.")
    for label, value in metrics.items():
        if not isinstance(label, str) or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"metrics must be a table from name to number, got {show(label)}: {show(value)}.")
        if not abs(value) < math.inf:
            raise ValueError(f"metrics: {show(label)} is {value}. Give a number that was measured, or leave it out.")


def list_facts(drafter: DrafterModel, target: Target, adapters: Adapters | None = None) -> dict[str, str]:
    """What there is to say of a drafter, as label -> text."""
    config = drafter.config
    num_adapted = 0 if adapters is None else adapters.num_parameters
    if not getattr(config, "use_aux_hidden_state", True):
        reads = "the final state, normed"
    elif target.num_layers is not None:
        reads = f"boundaries {list(config.resolve_aux_layer_ids(target.num_layers))}"
    else:
        ids = config.aux_layer_ids
        reads = f"boundaries {list(ids)}" if ids else "boundaries 2, n // 2 and n - 3 of n layers"
    served = [title for engine, title in ENGINES.items() if engine != HF and not find_refusals(config, engine)]
    parameters = sum(parameter.numel() for parameter in drafter.parameters()) - num_adapted
    return {
        **({"Adapters": f"{num_adapted / 1e6:.2f} million parameters"} if num_adapted else {}),
        "Parameters": f"{parameters / 1e6:.1f} million, {str(drafter.dtype).removeprefix('torch.')}",
        "Layers, width": f"{config.num_hidden_layers}, {config.hidden_size}",
        "Attention": "multi-head latent (MLA)" if getattr(config, "is_latent", False) else "Llama's",
        **({} if config.max_draft_depth is None else {"Draft tokens of a block": str(config.max_draft_depth)}),
        "Reads from the target": reads,
        "Draft vocabulary": f"{config.draft_vocab_size:,} of {config.vocab_size:,} tokens",
        "Trained positions": f"{config.max_position_embeddings:,}",
        "Can be exported to": ", ".join(served) or "no other engine",
    }
