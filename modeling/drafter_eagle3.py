"""What drafters of all kinds share: the target that they borrow from, the draft vocabulary, and their files.

Copied into every published drafter and run from there with `trust_remote_code=True`, so it imports torch, Transformers
and its siblings only.

Shapes: B batch, T positions, H drafter width, Ht target width, V target vocabulary, V_d draft vocabulary.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import LogRecord
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import create_repo, upload_folder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, eager_attention_forward
from transformers.utils import logging

from .text_eagle3 import escape_record
from .weights_eagle3 import (
    HUB_KEYS,
    NOT_LOADED,
    CheckpointError,
    StoredTensor,
    find_file,
    find_weight_files,
    list_problems,
    list_tensors,
    read_json_file,
    read_tensor,
    refuse_misfits,
    refuse_outside,
    to_our_names,
)

logger = logging.get_logger(__name__)
logger.addFilter(escape_record)
HOST_LOGGER = logging.get_logger(PreTrainedModel.__module__)

GENERATION_CONFIG_NAME = "generation_config.json"
NEEDS_PACKAGE = (
    "Drafting with an EAGLE-3 drafter needs hf-eagle3: pip install hf-eagle3, then `import hf_eagle3` before "
    "target.generate(assistant_model=drafter)."
)
# Files that every drafter's network is made of.
SHARED_FILES = ("drafter_eagle3.py", "fields_eagle3.py", "strict_eagle3.py", "text_eagle3.py", "weights_eagle3.py")


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
    """[B, T, heads, width]: attention as the config chooses it, for `query` [B, heads, T, width]."""
    function: Callable = eager_attention_forward
    if module.config._attn_implementation != "eager":
        function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out, _ = function(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        sliding_window=module.sliding_window,
        **kwargs,
    )
    return out


class DrafterModel(PreTrainedModel):
    """A drafter of any kind. Load it, pass it as `assistant_model`; nothing else is needed.

    What it lacks (token embeddings, sometimes the head) it borrows from a target by `bind`. Logits are over the draft
    vocabulary only; `draft_to_target_ids` maps ids.
    """

    kind_name: ClassVar[str] = "A drafter"
    # No drafter has it. Empty, the host would strip a tensor's first letter to make it fit: enorm.weight as norm.weight.
    base_model_prefix = "eagle3_drafter"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    # Tensors that `from_pretrained` accounts for itself: membership of the draft vocabulary, and a norm's second name.
    _keys_to_ignore_on_load_unexpected = list(NOT_LOADED)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    remote_code: ClassVar[Mapping[str, str]] = {}  # auto class -> module and class, of a published drafter
    remote_code_files: ClassVar[tuple[str, ...]] = SHARED_FILES
    # How published checkpoints spell our tensor names: regular expression -> replacement. hf-eagle3 fills it in on
    # import; a drafter run as remote code knows its own names only.
    published_names: ClassVar[Mapping[str, str]] = {}
    # Writes a drafter in another producer's layout; also filled in by hf-eagle3.
    exporter: ClassVar[Callable | None] = None

    def __init__(self, config):
        super().__init__(config)
        if config.has_own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # Where `generate(assistant_model=...)` looks for the draft shape; null leaves it to hf-eagle3.
        self.generation_config = GenerationConfig()
        # The target's own tensors and the boundaries to read it at, once bound. Plain attributes: what is borrowed is
        # neither saved, nor trained, nor moved.
        self._borrowed: dict[str, Tensor] = {}
        self._shards: dict[str, Tensor] = {}  # what was gathered from the processes of a tensor-parallel target
        self.bound_aux_layer_ids: tuple[int, ...] | None = None
        self.bound_target_name: str | None = None  # of its repository, for the model card

    def _add_head(self, config) -> None:
        """What follows the layers: rotary positions, the head over the draft vocabulary, and the vocabulary itself."""
        try:
            self.rotary_emb = LlamaRotaryEmbedding(config)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{config.name_or_path or 'config'}: rope_parameters {config.rope_parameters} are not rotary parameters that "
                f"Transformers knows ({type(error).__name__}: {error})."
            ) from error
        if not config.share_lm_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        # As published: offsets, target id = draft id + d2t[draft id].
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))  # [V_d]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.d2t)

    def __getstate__(self) -> dict:
        """What a pickle and a deep copy hold: nothing of the target, so that a copy borrows again from its own."""
        return {**self.__dict__, "_borrowed": {}, "_shards": {}}

    # ---- the target ----

    def bind(self, target: PreTrainedModel) -> "DrafterModel":
        """Borrow from `target` what this drafter lacks, after checking that the two fit. Returns the drafter.

        May be called again, with this or another target. Nothing changes when it raises. Of a target that processes
        share by tensor parallelism, what is borrowed is gathered, the first time: all of them must bind.

        Raises:
            ValueError: `target` is an encoder-decoder, or its sizes, vocabulary or layers are not those this drafter
                was made for.
        """
        if target.config.is_encoder_decoder:
            raise ValueError(
                f"{self.kind_name} needs a decoder-only target, but {type(target).__name__} is an encoder-decoder. "
                "Call generate() without assistant_model."
            )
        config, text_config = self.config, target.config.get_text_config(decoder=True)
        for what, ours, theirs in (
            ("hidden size", config.target_hidden_size, text_config.hidden_size),
            ("vocabulary size", config.vocab_size, text_config.vocab_size),
        ):
            if ours != theirs:
                raise ValueError(
                    f"This drafter does not fit {type(target).__name__}: it was made for a target with {what} {ours}, "
                    f"and this one has {theirs}. Load the drafter that was trained for this target."
                )
        aux_layer_ids = config.resolve_aux_layer_ids(text_config.num_hidden_layers)

        borrowed: dict[str, Tensor] = {}
        if not config.has_own_embeddings:
            borrowed["embed_tokens"] = target.get_input_embeddings().weight  # [>= V, Ht]
        if config.share_lm_head:
            borrowed["lm_head"] = target.get_output_embeddings().weight  # [>= V, Ht]
        for name, weight in borrowed.items():
            if weight.is_meta:
                raise ValueError(
                    f"This drafter borrows the target's {name}, which is offloaded (device 'meta'). Load the target "
                    "with its embeddings on a device."
                )
            if weight.shape[-1] != config.hidden_size:
                raise ValueError(
                    f"This drafter of width {config.hidden_size} has no {name} of its own and cannot borrow the "
                    f"target's, whose width is {weight.shape[-1]}. Its checkpoint is incomplete, or was made for "
                    "another target."
                )
        shards = {name: weight for name, weight in borrowed.items() if hasattr(weight, "full_tensor")}
        for name, shard in shards.items():
            is_gathered = self._shards.get(name) is shard
            borrowed[name] = self._borrowed[name] if is_gathered else shard.detach().full_tensor()  # type: ignore[attr-defined]
        self._shards, self._borrowed, self.bound_aux_layer_ids = shards, borrowed, aux_layer_ids
        name = target.config.name_or_path
        self.bound_target_name = name if name and not Path(name).exists() else None
        return self

    def _weight(self, name: str) -> Tensor:
        """The weight of `embed_tokens` or `lm_head`: our own, or the target's."""
        if (module := getattr(self, name, None)) is not None:
            return module.weight
        if name not in self._borrowed:
            raise ValueError(
                f"This drafter borrows {name} from its target and is bound to none yet. Pass it to "
                "generate(assistant_model=...), or call drafter.bind(target)."
            )
        return self._borrowed[name].detach()  # borrowed, not trained

    # ---- the vocabulary ----

    @property
    def draft_to_target_ids(self) -> Tensor:
        """[V_d] int64: the target id of each draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Target ids of `draft_ids`, any shape."""
        return draft_ids + self.d2t[draft_ids]

    def set_draft_to_target_ids(self, ids: Tensor) -> None:
        """Make `ids` [V_d] int64, distinct target ids, the draft vocabulary."""
        with torch.no_grad():
            self.d2t.copy_(ids.to(self.d2t.device) - torch.arange(len(self.d2t), device=self.d2t.device))
        self._check_draft_vocabulary("the ids given")

    def _check_draft_vocabulary(self, where: str) -> None:
        if self.d2t.is_meta:
            return
        ids, V = self.draft_to_target_ids, self.config.vocab_size
        if (outside := ((ids < 0) | (ids >= V)).nonzero()).numel():
            i = int(outside[0])
            raise CheckpointError(
                f"{where}: d2t sends draft id {i} to target id {int(ids[i])}, outside the target's vocabulary of {V}. "
                "d2t holds offsets: target id = draft id + d2t[draft id]."
            )
        if ids.unique().numel() < ids.numel():
            ordered = ids.sort().values
            twice = int(ordered[1:][ordered.diff() == 0][0])
            raise CheckpointError(f"{where}: d2t sends two draft ids to the same target id, {twice}.")

    # ---- embeddings and head ----

    def get_input_embeddings(self) -> nn.Module | None:
        """The drafter's own; None if it borrows the target's. Quantisation and adapters of the host ask."""
        return getattr(self, "embed_tokens", None)

    def get_output_embeddings(self) -> nn.Module | None:
        """The drafter's own head, over the draft vocabulary; None if it borrows the target's."""
        return getattr(self, "lm_head", None)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings [B, T, H] of `input_ids` [B, T], unscaled."""
        weight = self._weight("embed_tokens")
        return F.embedding(input_ids.to(weight.device), weight).to(self.norm.weight.device, self.dtype)

    def compute_logits(self, normed: Tensor) -> Tensor:
        """Draft logits [..., V_d] of normed outputs [..., H]."""
        if not self.config.share_lm_head:
            return self.lm_head(normed)
        weight = self._weight("lm_head")[: self.config.draft_vocab_size]
        return F.linear(normed.to(weight.device, weight.dtype), weight).to(normed.device, normed.dtype)

    # ---- the host's own assisted decoding, which would take this for a language model ----

    def generate(self, *args, **kwargs):  # noqa: ARG002  whatever the host's takes
        """Raise: a drafter says nothing by itself, and the host's own assisted decoding cannot use it.

        Raises:
            ImportError: Always.
        """
        raise ImportError(NEEDS_PACKAGE)

    def _supports_logits_to_keep(self) -> bool:
        # The first thing that the host asks of an assistant, before any forward.
        raise ImportError(NEEDS_PACKAGE)

    # ---- files ----

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ) -> "DrafterModel":
        """Load a drafter; see `PreTrainedModel.from_pretrained`. Strict: no tensor is left out, made up or reshaped.

        Raises:
            CheckpointError: The weights are not readable, or tensors are missing, extra, misshapen or out of range.
        """
        files, stored, names = [], {}, {}
        theirs = ("state_dict", "key_mapping", "gguf_file")
        if not any(kwargs.get(key) for key in theirs):  # else the caller says what the weights are
            files = find_weight_files(pretrained_model_name_or_path, **kwargs)
            refuse_outside(*files)
            stored = list_tensors(files)
            names = to_our_names(stored, cls.published_names)
            # Exact names, so that nothing else of the host's renaming applies.
            kwargs["key_mapping"] = {rf"^{re.escape(name)}$": ours for name, ours in names.items() if name != ours}
        where = ", ".join(map(str, files)) or str(pretrained_model_name_or_path)
        if stored:
            refuse_misfits(cls._find_config(pretrained_model_name_or_path, kwargs), stored, names, where)

        kwargs["ignore_mismatched_sizes"] = True  # so that we hear of them; none is ignored
        with _without_report(cls):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )

        info["mismatched_keys"] = model._mend_mismatched(info["mismatched_keys"], stored, names)
        by_our_name = {ours: f"{stored[name].file}: {name}" for name, ours in names.items()}
        problems = list_problems(
            info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"], by_our_name, where
        )
        if "t2d" in stored or model.config.draft_vocab_size == model.config.vocab_size:  # it is made from these
            problems.pop("d2t", None)
        if errors := [*problems.values(), *map(str, info.get("error_msgs") or ())]:
            raise CheckpointError("; ".join(errors) + ". config.json and the weights do not agree.")

        is_quantized = getattr(model, "hf_quantizer", None) is not None
        model._load_draft_vocabulary(stored, where)
        for name, weight in model.named_parameters():
            if not is_quantized and not weight.is_meta and not _is_finite(weight):
                raise CheckpointError(
                    f"{by_our_name.get(name, f'{where}: {name}')} holds NaN or infinity. Expected numbers."
                )
        if pretrained_model_name_or_path is not None:
            model._load_generation_config(pretrained_model_name_or_path, kwargs)
        return (model, info) if output_loading_info else model  # type: ignore[return-value]  # the host's way

    @classmethod
    def _find_config(cls, name_or_path, kwargs: Mapping) -> PreTrainedConfig:
        """The config that the host will load with, from the same arguments."""
        if isinstance(config := kwargs.get("config"), PreTrainedConfig):
            return config  # of this class, at times imported a second time
        fields = cls.config_class.field_names | set(HUB_KEYS)
        asked = {key: value for key, value in kwargs.items() if key in fields}
        return cls.config_class.from_pretrained(config or name_or_path, **asked)

    def _mend_mismatched(self, mismatched, stored: Mapping[str, StoredTensor], names: Mapping[str, str]) -> list:  # noqa: ARG002  others have some
        """Take tensors that are stored in another shape than ours and mean the same; the mismatches that are left."""
        return list(mismatched)

    def _load_draft_vocabulary(self, stored: Mapping[str, StoredTensor], where: str) -> None:
        """Check `d2t` against the vocabulary and against `t2d`; make it from `t2d` where a file has only that."""
        V, V_d = self.config.vocab_size, self.config.draft_vocab_size
        t2d = stored.get("t2d")
        members: Tensor | None = None
        if t2d is not None:
            file = t2d.file
            if t2d.shape != (V,):
                raise CheckpointError(
                    f"{file}: t2d has shape {list(t2d.shape)}, expected [{V}], one flag for each of the target's tokens."
                )
            members = read_tensor(t2d, "t2d").to(torch.bool).nonzero().squeeze(-1)  # [V_d]
            if len(members) != V_d:
                raise CheckpointError(
                    f"{file}: t2d marks {len(members)} tokens, but the draft vocabulary has {V_d} (draft_vocab_size)."
                )
        if members is not None and "d2t" not in stored:
            self.set_draft_to_target_ids(members)
        elif self._is_surely_absolute(members):
            logger.warning(f"{where}: d2t holds target ids where every other drafter has offsets; read so.")
            self.d2t -= torch.arange(len(self.d2t), device=self.d2t.device)
        self._check_draft_vocabulary(where)
        if self.d2t.is_meta:
            return
        if members is not None:
            ids = self.draft_to_target_ids.sort().values.cpu()
            if not torch.equal(ids, members):
                i = int((ids != members).nonzero()[0])
                raise CheckpointError(
                    f"{where}: t2d and d2t disagree: d2t reaches target id {int(ids[i])} where t2d marks "
                    f"{int(members[i])}. d2t holds offsets: target id = draft id + d2t[draft id]."
                )
        elif V_d < V and not self.d2t.any():
            logger.warning(
                f"{where}: d2t is all zeros, so the draft vocabulary is the target's first {V_d} tokens. That is what a "
                "table looks like that was never filled."
            )

    def _is_surely_absolute(self, members: Tensor | None) -> bool:
        """Whether `d2t` as stored is a list of target ids: ascending, in range, and as offsets impossible.

        Args:
            members: [V_d] int64 the draft vocabulary by `t2d`, ascending; it decides alone where it is known.
        """
        d2t, V = self.d2t, self.config.vocab_size
        if d2t.is_meta or len(d2t) == V or d2t[0] < 0 or d2t[-1] >= V or (d2t.diff() <= 0).any():
            return False
        if members is not None:
            return torch.equal(d2t.cpu(), members)
        ids = self.draft_to_target_ids
        return bool((ids >= V).any())

    def _load_generation_config(self, name_or_path, kwargs: dict) -> None:
        if (found := find_file(name_or_path, GENERATION_CONFIG_NAME, **kwargs)) is None:
            return
        refuse_outside(found)
        read_json_file(found)  # more strictly than the host
        try:
            self.generation_config = GenerationConfig.from_pretrained(found.parent)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{found}: not a generation config ({error}). Correct it, or delete it.") from error

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        """Write config, weights, generation config and the `modeling/` files, so that the folder loads anywhere."""
        self.config.auto_map = dict(self.remote_code)
        kwargs["save_original_format"] = False  # our names, never those of the checkpoint it came from
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        self.generation_config.save_pretrained(folder)
        here = Path(__file__).parent
        for name in self.remote_code_files:
            (folder / name).write_text((here / name).read_text(encoding="utf-8"), encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", folder.name), token=kwargs.get("token"), **hub)

    def push_to_hub(self, repo_id: str, *, target=None, metrics=None, **kwargs):
        """Upload the drafter with its code and a model card filled in from it.

        Args:
            repo_id: Where to, `owner/name` or `name`.
            target: What it drafts for, as in `export`; by default what it was last bound to.
            metrics: Name -> value, for the card.
            kwargs: `private` and `token` for the repository; the rest is `huggingface_hub.upload_folder`'s,
                such as `commit_message`, `revision` and `create_pr`.
        """
        if type(self).exporter is None:
            return super().push_to_hub(repo_id, **kwargs)
        token = kwargs.pop("token", None)
        made = create_repo(repo_id, private=kwargs.pop("private", None), token=token, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.export(folder, to="hf", target=target, metrics=metrics, repo_id=made.repo_id)
            kwargs.setdefault("commit_message", "Upload drafter")
            return upload_folder(repo_id=made.repo_id, folder_path=folder, token=token, **kwargs)

    def export(self, folder, *, to: str, **kwargs):
        """Write the drafter as an engine reads it, load it back and compare. Needs hf-eagle3.

        Args:
            folder (`str` or `os.PathLike`): Where to; must be empty or not there.
            to: "sglang", "vllm", "speculators" (vLLM's own layout) or "hf" (ours, with its code and a model card).
            kwargs: See `hf_eagle3.checkpoints.export`.

        Returns:
            `Exported`: what was written, and the command that serves it.

        Raises:
            ValueError: The engine cannot serve this drafter; the message names the config field.
        """
        if (exporter := type(self).exporter) is None:
            raise ImportError("Exporting needs hf-eagle3: pip install hf-eagle3, then `import hf_eagle3`.")
        return exporter(self, folder, to=to, **kwargs)


@contextmanager
def _without_report(cls: type) -> Iterator[None]:
    """Without the host's table of tensors that were missing, extra or misshapen: each is an error of ours, or made good.

    Of a failed conversion the host's own error says to read the table.
    """

    def is_wanted(record: LogRecord) -> bool:
        text = record.getMessage()
        return f"{cls.__name__} LOAD REPORT" not in text or "CONVERSION" in text

    HOST_LOGGER.addFilter(is_wanted)
    try:
        yield
    finally:
        HOST_LOGGER.removeFilter(is_wanted)


def _is_finite(weight: Tensor) -> bool:
    local = getattr(weight, "to_local", lambda: weight)()  # of a parallel load, this process's shard
    low, high = local.detach().aminmax()  # no copy, and NaN wins
    return bool(low.isfinite() & high.isfinite())
