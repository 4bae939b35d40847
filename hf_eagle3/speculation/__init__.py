"""Speculative decoding as tensors in, tensors out: accept rules, sampling, counts."""
