"""Answers, verdicts and rewards. No jax in here."""
