"""The masked diffusion transformer, as pure functions."""
