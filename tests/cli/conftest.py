"""A tiny target and its drafter, in memory and as folders."""

from helpers.byte_models import drafter, folders, target, tokenizer  # noqa: F401  fixtures
