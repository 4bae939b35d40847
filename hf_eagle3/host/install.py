"""The host functions that must know drafters, wrapped in this one place.

Each wrap looks at its arguments and, unless a drafter is among them, calls the original with exactly what it was given.
Written against Transformers 5.24.0.
"""

from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)
from transformers.generation import ContinuousMixin, GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.pipelines import base as pipelines

from ..checkpoints.exporter import export
from ..checkpoints.load import register_weight_names
from ..modeling import (
    DFlashDrafterConfig,
    DFlashDrafterModel,
    DrafterModel,
    Eagle3DrafterConfig,
    Eagle3DrafterModel,
)
from .assisted import wrap_assisted_decoding, wrap_get_candidate_generator, wrap_speculative_sampling
from .auto_config import wrap_from_pretrained
from .batching import wrap_context_manager, wrap_generate_batch, wrap_init_continuous_batching
from .generate import wrap_generate
from .pipelines import wrap_load_assistant_model

# Candidate generators are given the model's outputs from 5.8 on, but only from 5.17 on can the host take draft tokens
# back out of a sliding-window cache.
MINIMUM_TRANSFORMERS = "5.17.0"


WRAPS: tuple[tuple[Any, str, Callable], ...] = (  # Any: a class or a module
    (AutoConfig, "from_pretrained", wrap_from_pretrained),
    (GenerationMixin, "generate", wrap_generate),
    (GenerationMixin, "_get_candidate_generator", wrap_get_candidate_generator),
    (GenerationMixin, "_assisted_decoding", wrap_assisted_decoding),
    (generation_utils, "_speculative_sampling", wrap_speculative_sampling),
    (pipelines, "load_assistant_model", wrap_load_assistant_model),
    (ContinuousMixin, "generate_batch", wrap_generate_batch),
    (ContinuousMixin, "init_continuous_batching", wrap_init_continuous_batching),
    (ContinuousMixin, "continuous_batching_context_manager", wrap_context_manager),
)
DRAFTERS = ((Eagle3DrafterConfig, Eagle3DrafterModel), (DFlashDrafterConfig, DFlashDrafterModel))
_originals: dict[tuple[Any, str], Any] = {}  # as they stand in the namespace of the class or module


def check_host() -> None:
    """Raise unless this host can be worked with."""
    if Version(transformers.__version__).release < Version(MINIMUM_TRANSFORMERS).release:
        raise ImportError(
            f"hf-eagle3 needs transformers>={MINIMUM_TRANSFORMERS}, found {transformers.__version__}: "
            f'pip install -U "transformers>={MINIMUM_TRANSFORMERS}".'
        )
    if missing := [f"{owner.__name__}.{name}" for owner, name, _ in WRAPS if name not in vars(owner)]:
        raise ImportError(
            f"hf-eagle3 does not know transformers {transformers.__version__}, which has no {', '.join(missing)}: "
            "pip install -U hf-eagle3, or an older transformers (5.24.0 is known to work)."
        )


def install() -> None:
    """Make the host know drafters: `AutoModel` loads them, `generate(assistant_model=...)` uses them.

    Done by `import hf_eagle3`; a second call changes nothing.
    """
    check_host()
    for config_class, model_class in DRAFTERS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    register_weight_names()
    DrafterModel.exporter = export
    for owner, name, wrap in WRAPS:
        if (owner, name) not in _originals:
            _originals[owner, name] = vars(owner)[name]
            setattr(owner, name, wrap(vars(owner)[name]))


def uninstall() -> None:
    """Put the host's own functions back. What `AutoModel` has learnt stays; it concerns `model_type: eagle3` only."""
    while _originals:
        (owner, name), original = _originals.popitem()
        setattr(owner, name, original)
