"""Which kind a drafter is of, by its config. A new kind is a file beside this one, and a row here."""

from transformers import PreTrainedConfig

from .blocks import BLOCKS
from .chain import CHAIN
from .draft import DrafterKind
from .nobody import NOBODY
from .parallel import PARALLEL

KINDS: list[DrafterKind] = [NOBODY, BLOCKS, PARALLEL, CHAIN]  # the first that fits


def find_kind(config: PreTrainedConfig | None) -> DrafterKind:
    """The kind of a drafter with this config; None where there is no drafter."""
    return next(kind for kind in KINDS if kind.fits(config))
