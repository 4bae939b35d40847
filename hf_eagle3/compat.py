"""What differs between releases of the host: its cache."""

import transformers
from packaging.version import Version
from transformers.cache_utils import Cache

# The host's name for it, among a model's arguments and outputs.
CACHE_NAME = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"


def rewind(cache: Cache, num_tokens: int) -> None:
    """Forget the last `num_tokens` positions of `cache`."""
    if num_tokens:
        cache.crop(-num_tokens)
