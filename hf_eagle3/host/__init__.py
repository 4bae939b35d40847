"""All that knows the host's `generate()`."""
