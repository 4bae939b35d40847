"""Who proposes: drafts of a round, and every position at once for training and diagnosis."""
