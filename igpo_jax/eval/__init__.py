"""Evaluation through the same sampler as training."""
