"""Forgetting cache positions, by count."""

from transformers.cache_utils import Cache


def rewind(cache: Cache, num_tokens: int) -> None:
    """Forget the last `num_tokens` positions of `cache`."""
    if num_tokens:
        cache.crop(-num_tokens)
