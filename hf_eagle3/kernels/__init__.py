"""Kernels that a round spends its time in. Each has an eager twin, which defines it, and needs Triton to run."""
