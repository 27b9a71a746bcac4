"""Asking a model: requests, sampler settings, a loaded session, and answers in a terminal."""
