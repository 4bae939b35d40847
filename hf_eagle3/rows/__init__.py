"""Memory whose rows have lengths of their own: caches, masks, attentions, rotary embeddings."""
