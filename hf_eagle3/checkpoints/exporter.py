"""Writing a drafter as others read it, and checking what was written by loading it back."""

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..console.opening import opening
from ..console.paths import refuse_used_folder
from ..console.quoting import quote_python, quote_shell
from ..drafters.draft import Committed, Prompted, choose_greedy
from ..drafters.kinds import find_kind
from ..modeling import DFlashDrafterConfig, DFlashDrafterModel, DrafterModel, Eagle3DrafterConfig
from ..modeling.text_eagle3 import escape_controls, escape_record
from ..modeling.weights_eagle3 import find_weight_files, list_tensors, read_tensor
from ..speculation.shape import Shapes, chain
from ..tensor_parallel import whole
from .block_export import copy_borrowed, find_layout, list_borrowed, make_block_command, refuse_vocabulary
from .card import check_metrics, write_card
from .engines import (
    ENGINES,
    HF,
    OWN_DEFAULT,
    SGLANG,
    SPECULATORS,
    VLLM,
    Target,
    find_refusals,
    make_native_config,
    make_speculators_config,
    to_sglang_ids,
)
from .load import load_published_config
from .target_name import read_recorded_name

logger = logging.getLogger(__name__)
logger.addFilter(escape_record)

DEFAULT_DEPTH = 3
NAMES_ITS_TARGET = {SPECULATORS: "speculators' config", HF: "A model card"}


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    engines: tuple[str, ...]  # that serve the folder as it is
    command: str  # serves it with the chosen engine
    notes: tuple[str, ...]  # what to know

    def __str__(self) -> str:
        served = " and ".join(ENGINES[engine] for engine in self.engines)
        lines = [f"{self.folder}: serves with {served}", *(f"Note: {note}" for note in self.notes), "", self.command]
        return "\n".join(map(escape_controls, lines))


def export(
    drafter: DrafterModel,
    folder: str | os.PathLike,
    *,
    to: str,
    target: str | os.PathLike | PreTrainedModel | PreTrainedConfig | None = None,
    metrics: Mapping[str, float] | None = None,
    repo_id: str | None = None,
) -> Exported:
    """Write `drafter` as an engine reads it, load it back, and compare weights bit by bit and drafts token by token.

    Args:
        drafter: Of any flavour, bound to a target or not.
        folder: Where to; must be empty or not there.
        to: "sglang", "vllm", "speculators" (vLLM's own layout) or "hf" (ours, with its code and a model card).
        target: What it was made for: a model, a config, a folder or a repository. SGLang counts captured layers by it,
            speculators and the model card name it.
        metrics: Name -> value, for the model card.
        repo_id: Where the folder will be published, for the model card.

    Raises:
        ValueError: The engine cannot serve this drafter (the message names the config field), or needs to know more.
        FileExistsError: `folder` has something in it.
    """
    if to not in ENGINES:
        raise ValueError(f"to must be one of {', '.join(ENGINES)}, got {to!r}.")
    refuse(drafter, to)
    check_metrics(metrics or {})
    folder = Path(folder)
    refuse_used_folder(folder)
    known = describe_target(target, drafter)
    if to in NAMES_ITS_TARGET and known.name is None:
        raise ValueError(
            f"{NAMES_ITS_TARGET[to]} names the target the drafter is for: give it (target=..., --target)."
        )
    notes = compare_embeddings(drafter, target) if to == SGLANG else []
    depth = drafter.generation_config.num_assistant_tokens or DEFAULT_DEPTH

    engines: tuple[str, ...] = (to,)
    with borrowing(drafter, find_lent(drafter, to, target)):
        if to == HF:
            drafter.save_pretrained(folder)
            write_card(drafter, folder, target=known, metrics=metrics or {}, name=repo_id or str(folder))
        elif isinstance(drafter, DFlashDrafterModel):
            engines = (
                to,
                *(e for e in (SGLANG, VLLM) if e != to != SPECULATORS and not find_refusals(drafter.config, e)),
            )
            published = find_layout(drafter.config, to).make_config(drafter.config, known)
            write(folder, published, to_tensors(drafter, both_names=False) | copy_borrowed(drafter, to))
        else:
            config = copy.deepcopy(drafter.config)
            config.dtype = drafter.dtype
            boundaries, sglang_ids = place_ids(config, known, to)
            if to == SPECULATORS:
                published = make_speculators_config(config, boundaries, known, depth)
            else:
                published = make_native_config(config, boundaries, sglang_ids)
                is_placed = boundaries is None or sglang_ids is not None
                servable = {SGLANG: is_placed, VLLM: True}
                engines = (to, *(e for e, ok in servable.items() if e != to and ok and not find_refusals(config, e)))
            write(folder, published, to_tensors(drafter, both_names=to != SPECULATORS))
        check_export(drafter, folder)
    return Exported(folder, engines, make_command(drafter.config, folder, to, known, depth), tuple(notes))


def refuse(drafter: DrafterModel, engine: str) -> None:
    """Raise if `engine` cannot serve the drafter, or the drafter is not all there to be written."""
    if reasons := find_refusals(drafter.config, engine):
        raise ValueError(f"{ENGINES[engine]} cannot serve this drafter. " + "; ".join(reasons) + ".")
    if getattr(drafter, "hf_quantizer", None) is not None and engine != HF:
        raise ValueError("This drafter is quantised: load it without quantization_config to export it.")
    if offloaded := sorted(name for name, tensor in drafter.state_dict().items() if tensor.is_meta):
        raise ValueError(
            f"{offloaded[0]} is offloaded (device 'meta'): load the drafter without an offloading device_map."
        )
    if engine != HF and len(drafter.d2t) == drafter.config.vocab_size and drafter.d2t.any():
        raise ValueError(
            f"draft_vocab_size={len(drafter.d2t)}: the draft vocabulary is the whole of the target's in another order, and "
            f"{ENGINES[engine]} then takes no d2t."
        )


def describe_target(
    target: str | os.PathLike | PreTrainedModel | PreTrainedConfig | None, drafter: DrafterModel
) -> Target:
    """Facts about the target: from the argument, or else from the drafter."""
    given = target if target is not None else (read_recorded_name(drafter.config) or drafter.bound_target_name)
    known = Target(model_type=drafter.config.target_model_type)
    if given is None:
        return known
    config: PreTrainedConfig | None = None
    if isinstance(given, str | os.PathLike):
        known = replace(known, name=os.fspath(given))
        try:
            with opening("target", os.fspath(given)):
                config = AutoConfig.from_pretrained(given)
        except (OSError, ValueError, ImportError) as error:  # a caller that needs more than the name raises itself
            logger.info("The config of the target %s cannot be read (%s).", given, error)
    else:
        config = given.config if isinstance(given, PreTrainedModel) else given
        known = replace(known, name=getattr(config, "_name_or_path", None) or None)
    if config is None:
        return known
    text = config.get_text_config(decoder=True)
    return Target(
        name=known.name,
        # SGLang's class for a vision-language model is chosen by the whole config, that of its text model by the inner.
        model_type=config.model_type if config.model_type in OWN_DEFAULT else text.model_type.removesuffix("_text"),
        num_layers=text.num_hidden_layers,
        architectures=config.architectures,
    )


def place_ids(config: Eagle3DrafterConfig, target: Target, engine: str) -> tuple[list[int] | None, list[int] | None]:
    """The boundaries to write at the top, and SGLang's ids to write in `eagle_config`. Null: the engine's own default.

    Raises:
        ValueError: SGLang cannot capture them and is the engine, or the target is not known well enough.
    """
    if not config.use_aux_hidden_state:
        return None, None
    ids = config.aux_layer_ids
    if ids is None and target.model_type not in OWN_DEFAULT:
        return None, None
    if target.num_layers is not None:
        boundaries = list(config.resolve_aux_layer_ids(target.num_layers))
    elif ids is not None:
        boundaries = list(ids)
    else:
        raise ValueError(f"SGLang has other default layers for {target.model_type}: give the target (--target).")
    if engine == SPECULATORS:
        return boundaries, None
    if engine == SGLANG:
        return boundaries, to_sglang_ids(boundaries, target)
    if find_refusals(config, SGLANG):
        return boundaries, None
    try:
        return boundaries, to_sglang_ids(boundaries, target)
    except ValueError as error:  # the folder then serves with vLLM only, and its card states it
        logger.info("Written for vLLM only. %s", error)
        return boundaries, None


def compare_embeddings(drafter: DrafterModel, target: Any) -> list[str]:  # Any: as `export`
    """Notes on embeddings of the drafter's own, in whose place SGLang uses the target's.

    Raises:
        ValueError: They differ.
    """
    config = drafter.config
    if not config.has_own_embeddings or config.target_hidden_size != config.hidden_size:
        return []
    theirs = read_vocabulary(target).get("embed_tokens")
    if theirs is None:
        return [
            "SGLang uses the target's token embeddings in place of the drafter's. Give the target as a model or a folder to "
            "have them compared."
        ]
    own = drafter.embed_tokens.weight
    if not torch.equal(own, theirs[: len(own)].to(own.device, own.dtype)):
        raise ValueError(
            "has_own_embeddings=True: SGLang uses the target's token embeddings for every drafter of the target's width, "
            "and this drafter's differ from them."
        )
    return []


def find_lent(drafter: DrafterModel, engine: str, target: Any) -> dict[str, Tensor]:  # Any: as `export`
    """What a drafter borrows: of the target that it is bound to, or of `target` where what is written holds it."""
    if drafter._borrowed or not isinstance(drafter, DFlashDrafterModel) or engine == HF:
        return drafter._borrowed
    if not (names := list_borrowed(drafter.config, engine)):
        return {}
    lent = read_vocabulary(target)
    refuse_vocabulary(names, lent, drafter.config)
    return lent


def read_vocabulary(target: Any) -> dict[str, Tensor]:  # Any: as `export`
    """The target's token embeddings and head [>= V, Ht], as `embed_tokens` and `lm_head`, from a model or a folder.

    Empty where only a download would tell. A target that stores no head has its embeddings as one.
    """
    if isinstance(target, PreTrainedModel):
        modules = {"embed_tokens": target.get_input_embeddings(), "lm_head": target.get_output_embeddings()}
        return {name: whole(module.weight.detach()) for name, module in modules.items() if module is not None}
    if not isinstance(target, str | os.PathLike) or not Path(target).is_dir():
        return {}
    stored = list_tensors(find_weight_files(os.fspath(target)))
    found = {name: [key for key in stored if key.endswith(f"{name}.weight")] for name in ("embed_tokens", "lm_head")}
    read = {name: read_tensor(stored[keys[0]], keys[0]) for name, keys in found.items() if len(keys) == 1}
    return {"lm_head": read["embed_tokens"], **read} if "embed_tokens" in read and not found["lm_head"] else read


# ---- files ----


def to_tensors(drafter: DrafterModel, *, both_names: bool) -> dict[str, Tensor]:
    """The drafter's tensors under the names that engines know, on the CPU.

    Args:
        drafter: Whose.
        both_names: Give the input norm of a further layer under SGLang's name too. Both engines own both parameters and
            use one of them.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    d2t = tensors.pop("d2t")
    if len(d2t) < drafter.config.vocab_size:
        members = torch.zeros(drafter.config.vocab_size, dtype=torch.bool)
        members[drafter.draft_to_target_ids.cpu()] = True
        tensors |= {"d2t": d2t, "t2d": members}
    if both_names:
        for i in range(1, drafter.config.num_hidden_layers):
            norm = tensors[f"layers.{i}.input_layernorm.weight"]
            tensors[f"layers.{i}.hidden_norm.weight"] = norm.clone()
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_command(config: PreTrainedConfig, folder: Path, engine: str, target: Target, depth: int) -> str:
    """The line that serves an exported folder."""
    if isinstance(config, DFlashDrafterConfig) and engine != HF:
        return make_block_command(config, folder, engine, target)
    name, here = quote_shell(target.name or "TARGET"), quote_shell(str(folder))
    if engine == SGLANG:
        window = f" --speculative-draft-window-size {config.sliding_window}" if config.sliding_window else ""
        return (
            f"python -m sglang.launch_server --model-path {name} --speculative-algorithm EAGLE3 "
            f"--speculative-draft-model-path {here} --speculative-num-steps {depth} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {depth + 1}{window}"
        )
    if engine == VLLM:
        speculation = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": depth}
        if config.is_parallel:
            speculation["parallel_drafting"] = True
        return f"vllm serve {name} --speculative-config {quote_shell(json.dumps(speculation))}"
    if engine == SPECULATORS:
        return f"vllm serve {here}"
    place = quote_python(str(folder))
    return f"AutoModel.from_pretrained({place})  # after `import hf_eagle3`"


# ---- checks of what was written ----


def check_export(drafter: DrafterModel, folder: Path) -> None:
    """Load `folder` back and compare.

    Raises:
        RuntimeError: A weight or a draft token differs. That is a fault of ours; the folder is left for a report.
    """
    config = load_published_config(folder) or type(drafter.config).from_pretrained(folder)
    again = type(drafter).from_pretrained(folder, config=config, dtype=drafter.dtype)
    ours, theirs = drafter.state_dict(), again.state_dict()
    for name in theirs.keys() & {"embed_tokens.weight", "lm_head.weight"} - ours.keys():  # written with the target's
        ours[name] = drafter._weight(name.removesuffix(".weight"))[: drafter.config.vocab_size].to(drafter.dtype)
    differing = sorted(ours.keys() ^ theirs.keys())
    differing += [n for n in ours.keys() & theirs.keys() if not torch.equal(ours[n].cpu(), theirs[n].cpu())]
    if differing:
        raise RuntimeError(f"{folder}: {differing[0]} came back different from what was exported. Please report it.")
    again.to(drafter.device)
    with borrowing(drafter) as borrowed, borrowing(again, borrowed):
        if not torch.equal(sample_drafts(drafter), sample_drafts(again)):
            raise RuntimeError(f"{folder}: the drafter that came back drafts other tokens. Please report it.")


@contextmanager
def borrowing(drafter: DrafterModel, weights: dict[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """The drafter with `weights` in place of what it borrows from a target; by default its target's, or random ones."""
    before = drafter._borrowed
    drafter._borrowed = weights or before or make_stand_ins(drafter)
    try:
        yield drafter._borrowed
    finally:
        drafter._borrowed = before


def make_stand_ins(drafter: DrafterModel) -> dict[str, Tensor]:
    """Random embeddings and head [V, H] in the memory of V + H numbers: each row is the one before, moved by one."""
    V, H = drafter.config.vocab_size, drafter.config.hidden_size
    values = torch.randn(V + H, generator=torch.Generator().manual_seed(0)).to(drafter.device, drafter.dtype)
    table = values.as_strided((V, H), (1, 1))
    return {"embed_tokens": table, "lm_head": table}


@torch.no_grad()
def sample_drafts(drafter: DrafterModel, num_positions: int = 16, depth: int = 4) -> Tensor:
    """Greedy draft tokens [1, K] after random states, the same for every drafter of these sizes."""
    config = drafter.config
    depth = min(depth, config.max_draft_depth or depth)
    generator = torch.Generator().manual_seed(1)
    width = config.num_captured_states * (config.target_hidden_size or config.hidden_size)
    states = torch.randn(1, num_positions, width, generator=generator).to(drafter.device)
    ids = torch.randint(config.vocab_size, (1, num_positions), generator=generator).to(drafter.device)
    count = torch.tensor([num_positions])
    kind, shape = find_kind(config), chain(depth)
    prompted = Prompted(ids.roll(1, dims=1), states, count, torch.zeros_like(count))  # ids come one after their states
    memory = kind.begin(drafter, prompted, Shapes((shape,)))
    kind.catch_up(memory, Committed(ids[:, -1:], None, torch.ones_like(count)), shape)
    return kind.propose(drafter, memory, shape, choose_greedy).tokens
