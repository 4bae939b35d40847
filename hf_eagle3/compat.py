"""What differs between releases of the host: its cache."""

import transformers
from packaging.version import Version
from transformers.cache_utils import Cache, CacheLayerMixin

# The host's name for it, among a model's arguments and outputs.
CACHE_NAME = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"


def count_cached(cache: Cache) -> int:
    """Positions that a `cache` of the host holds; 0 where all layers are recurrent, which count none."""
    counts = not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    return int(cache.get_seq_length()) if counts else 0


def is_empty(cache: Cache) -> bool:
    """Whether a `cache` of the host holds nothing yet."""
    has_begun = any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers)
    return count_cached(cache) == 0 and not has_begun


def rewind(cache: Cache, num_tokens: int) -> None:
    """Forget the last `num_tokens` positions of `cache`."""
    if num_tokens:
        cache.crop(-num_tokens)
