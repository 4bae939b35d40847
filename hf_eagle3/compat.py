"""What differs between releases of the host: its cache. And which releases are installed."""

from importlib import metadata

import transformers
from packaging.version import Version
from transformers.cache_utils import Cache

# The host's name for it, among a model's arguments and outputs.
CACHE_NAME = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"


def rewind(cache: Cache, num_tokens: int) -> None:
    """Forget the last `num_tokens` positions of `cache`."""
    if num_tokens:
        cache.crop(-num_tokens)


def installed_version(package: str) -> str | None:
    """The version of a package, without importing it; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
