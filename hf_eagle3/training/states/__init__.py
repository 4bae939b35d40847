"""Where the target's hidden states come from."""
