"""Arguments of commands: checked before anything is loaded, and loaded with errors that name the option.

PyTorch and the host's auto classes take seconds to import, and `inspect` needs neither: functions import them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from ..modeling import MODEL_TYPES
from ..modeling.text_eagle3 import one_line, show
from ..modeling.weights_eagle3 import CheckpointError
from .paths import refuse_missing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

KINDS = (CheckpointError, OSError, ValueError, ImportError)  # that stay what they are


@contextmanager
def opening(option: str, name: str) -> Iterator[None]:
    """Name `option` in any error that the host raises while it loads `name`: damaged files make it raise anything.

    Raises:
        ValueError: It cannot be loaded; or an error of `KINDS`.
    """
    try:
        yield
    except Exception as error:  # the Rust parts of the host raise the base class itself
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which this module does without
            raise
        kind = next((kind for kind in KINDS if isinstance(error, kind)), None)
        what = "" if kind is not None else f"{type(error).__name__}: "
        message = f"{option} {name}: {what}{one_line(str(error))}"
        raise (kind or ValueError)(message) from error


@contextmanager
def rendering(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Name the chat template in any error that it raises.

    Raises:
        ValueError: It cannot render what it was given.
    """
    try:
        yield
    except (TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot render a conversation: "
            f"{one_line(str(error))}"
        ) from error


def refuse_drafter(option: str, name: str, **where: str | None) -> None:
    """Raise unless `name` is an EAGLE-3 drafter, by its config.

    Raises:
        ValueError: It is something else, or cannot be read.
    """
    from transformers import AutoConfig

    refuse_missing(option, name)
    with opening(option, name):
        config = AutoConfig.from_pretrained(name, **{key: value for key, value in where.items() if value is not None})
    if not is_drafters_config(config):
        raise ValueError(
            f"{option} {name} is a {name_class(config)}, and no EAGLE-3 drafter. Give one made for the target (are target and "
            "drafter swapped?)."
        )


def name_class(config: "PreTrainedConfig") -> str:
    """The class that AutoModel would make of a config, or what the config calls itself."""
    from transformers import MODEL_MAPPING

    kind = MODEL_MAPPING.get(type(config), None)
    kind = kind[0] if isinstance(kind, (list, tuple)) else kind
    return kind.__name__ if kind is not None else show(config.model_type)


def refuse_target(option: str, name: str) -> None:
    """Raise if `name` is not there, or is a drafter. The host reports all else that can be wrong with a target.

    Raises:
        ValueError: It is.
    """
    from transformers import AutoConfig

    refuse_missing(option, name)
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception:  # noqa: BLE001  adapters, a tokenizer alone, remote code, or damage: the host reports it
        return
    if is_drafters_config(config):
        raise ValueError(
            f"{option} {name} is an EAGLE-3 drafter. Give the model that it is to draft for (are target and drafter swapped?)."
        )


def is_drafters_config(config: "PreTrainedConfig") -> bool:
    """Whether a config is that of an EAGLE-3 drafter, by any class that it was read as."""
    return config.model_type in MODEL_TYPES
