"""Forgetting cache positions, by count."""

from transformers.cache_utils import Cache


def rewind(cache: Cache, num_tokens: int) -> None:
    """Forget the last `num_tokens` positions of `cache`.

    A negative argument of the host's `crop` is a count in every version since 5.8; 0 empties the cache up to 5.12.1,
    and a positive one was a length there.
    """
    if num_tokens:
        cache.crop(-num_tokens)
