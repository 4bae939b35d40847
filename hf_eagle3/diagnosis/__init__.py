"""How a drafter's weights want to be read."""
