"""From conversations to rows of tokens."""
