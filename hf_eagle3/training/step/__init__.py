"""One step of training-time test: from a batch to a loss."""
